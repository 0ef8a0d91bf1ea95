"""The protocols: what an experiment trains on, how it chooses layer and multiplier, and what it measures in the end.

There are three: `answers` (a scorer measures responses to everyday prompts), and for honesty `persona` and
`likelihood`. `family_of` is the one place that says which of them an experiment can run.
"""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, TypeAlias, cast

from rt_lens.common.formatting import estimate, number
from rt_lens.common.statistics.intervals import Interval, share_interval
from rt_lens.data.builtin import held_out_neutral_prompts, prompt_kinds
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.data.honesty import (
    PREFILL,
    Fact,
    answer_pairs,
    judged_statements,
    load_facts,
    persona_pairs,
    roleplays,
    situations,
    true_or_false,
)
from rt_lens.data.questions import Question, lettered, load_questions
from rt_lens.evaluation.answering import ask
from rt_lens.evaluation.choices import start_of
from rt_lens.evaluation.scorers import ContainsAnswer, FollowsInstruction, Form, Likelihood, OffOptionMass, Scorer
from rt_lens.evaluation.tasks import EvalTask
from rt_lens.experiment.config import Categorised, Experiment, HonestyConfig, questions_of, seen
from rt_lens.models.protocol import HasTokenizer, Model
from rt_lens.models.tokens.chats import answered, chat_text
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.targets import Choice, Target, TokenTarget

TargetSource: TypeAlias = ContrastPairs | list[TokenTarget]
"""Targets, or pairs for whose topics the model writes them."""

_WRITING = ("repetition", "distinct_2", "loop", "length")


@dataclass(frozen=True)
class Protocol:
    """What an experiment trains on, how it chooses layer and multiplier, and what it measures in the end.

    Training, choice and test share no topic. Only the calibration, which chooses between protocols, uses all items of
    the categories that are not held out.

    Attributes:
        name: `answers`, `persona` or `likelihood`.
        why: why it was chosen, in a sentence; empty where there was no choice.
        train: pairs that vectors are extracted from.
        unseen: pairs that vectors are validated on (for honesty: of held-out categories).
        targets: direction and seed -> training targets and validation targets of the tuned arms; or pairs, for whose
            topics the model writes targets.
        choosing: task by which layer and multiplier are chosen; its first scorer counts.
        tasks: set -> task of the test.
        checks: set -> task for side effects.
        writing: the set whose responses are measured for repetition.
        calibration: rows of task, n, mean, low, high, chance, seed: what the untuned model can do.
        shown: the text of the projections, as a title and as the model reads it; None for the first test prompt with
            the untuned response.
        settings: of the honesty experiment.
        chance: set -> score of a random choice among its options.

    Example:
        >>> from rt_lens.experiment.protocols import protocol_of
        >>> protocol = protocol_of(load_experiment("mood"), model)
        >>> protocol.name, list(protocol.tasks), list(protocol.checks)
        ('answers', ['test'], ['facts', 'arithmetic', 'instructions'])
        >>> set(protocol.train.topics) & {question.prompt for question in protocol.tasks["test"].asked}
        set()
    """

    name: str
    train: ContrastPairs
    unseen: ContrastPairs
    targets: Callable[[Direction, int], tuple[TargetSource, TargetSource]]
    choosing: EvalTask
    tasks: Mapping[str, EvalTask]
    checks: Mapping[str, EvalTask]
    writing: str
    why: str = ""
    calibration: list[dict[str, Any]] = field(default_factory=list)
    shown: tuple[str, str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def chance(self) -> dict[str, float]:
        scores = {}
        for name, task in self.tasks.items():
            shares = [len(question.right) / len(question.options) for question in task.asked if question.options]
            if shares:
                scores[name] = sum(shares) / len(shares)
        return scores


class ProtocolFamily(ABC):
    """The protocols that one kind of experiment can run, and all that depends on its kind.

    Attributes:
        asks_model: whether the model is measured before its protocol is known; otherwise `protocol` needs no model.
    """

    asks_model: bool

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    @abstractmethod
    def protocol(self, model: Model | None = None) -> Protocol:
        """The protocol to run.

        Raises:
            ValueError: for too few test topics, or a model that is above chance in no protocol.
        """

    @abstractmethod
    def candidates(self, model: HasTokenizer) -> list[Protocol]:
        """The protocols that a plan has to count with: no scorer is made, and no pair is filtered."""

    @abstractmethod
    def targets(self, model: Model, direction: Direction, seed: int) -> tuple[TargetSource, TargetSource]:
        """Training and validation targets of one tuning run."""

    @abstractmethod
    def validation_task(self, model: Model, max_new_tokens: int, n_prompts: int | None) -> EvalTask:
        """Validation prompts, and how steering is measured on them."""

    def parts(self) -> tuple[ContrastPairs, ContrastPairs, ContrastPairs]:
        """The pairs for training, validation and test."""
        split = self.experiment.split
        return self.experiment.pairs.split(split.train, split.validation, seed=split.seed)  # type: ignore[return-value]

    def calibration(self) -> tuple[list[Question], list[Question]]:
        """As many statements and questions as the model is measured on before the run."""
        return [], []

    def filters(self, protocol: Protocol) -> bool:
        """Whether the model's own choice of letters decides which training pairs are kept."""
        return False


class ScoredAnswers(ProtocolFamily):
    """Behaviours that a scorer measures in responses to everyday prompts. Their one protocol is `answers`."""

    asks_model = False

    def protocol(self, model: Model | None = None) -> Protocol:
        return answers_protocol(self.experiment)

    def candidates(self, model: HasTokenizer) -> list[Protocol]:
        return [answers_protocol(self.experiment.unmade())]

    def targets(self, model: Model, direction: Direction, seed: int) -> tuple[TargetSource, TargetSource]:
        train, validation, _ = self.parts()
        return train, validation

    def validation_task(self, model: Model, max_new_tokens: int, n_prompts: int | None) -> EvalTask:
        _, validation, _ = self.parts()
        return EvalTask(validation.topics[:n_prompts], [self.experiment.scorer], max_new_tokens)


class Honesty(ProtocolFamily):
    """The honesty experiment. It runs `persona` or `likelihood`, whichever the model is able to do."""

    asks_model = True

    def __init__(self, experiment: Experiment, config: HonestyConfig) -> None:
        super().__init__(experiment)
        self.config = config

    def protocol(self, model: Model | None = None) -> Protocol:
        assert model is not None
        rows, name, why = calibrate(self.config, model, self.experiment.split.seed)
        protocol = _HONESTY[name](self.experiment, self.config, model)
        return replace(protocol, why=why, calibration=rows, settings=asdict(self.config))

    def candidates(self, model: HasTokenizer) -> list[Protocol]:
        experiment, config = self.experiment.unmade(), replace(self.config, filter_pairs=False)
        return [make(experiment, config, model) for name, make in _HONESTY.items() if config.protocol in (name, "auto")]

    def targets(self, model: Model, direction: Direction, seed: int) -> tuple[TargetSource, TargetSource]:
        return self.protocol(model).targets(direction, seed)

    def validation_task(self, model: Model, max_new_tokens: int, n_prompts: int | None) -> EvalTask:
        protocol = self.protocol(model)
        form: Form = "multiple_choice" if protocol.name == "persona" else "completion"
        return EvalTask(protocol.choosing.asked[:n_prompts], [Likelihood("share", form)], max_new_tokens)

    def parts(self) -> tuple[ContrastPairs, ContrastPairs, ContrastPairs]:
        """By fact for the persona protocol, if the file names it."""
        if self.config.protocol != "persona":
            return super().parts()
        split = self.experiment.split
        facts = _parted(seen(load_facts(), self.config), split.train, split.validation, split.seed)
        return tuple(persona_pairs(part, seed=split.seed) for part in facts)  # type: ignore[return-value]

    def calibration(self) -> tuple[list[Question], list[Question]]:
        facts, questions = seen(load_facts(), self.config), seen(questions_of(self.config), self.config)
        n = self.config.n_calibration
        return judged_statements(facts[:n]), questions[:n]

    def filters(self, protocol: Protocol) -> bool:
        return protocol.name == "persona" and self.config.filter_pairs


def family_of(experiment: Experiment) -> ProtocolFamily:
    """The protocols that the experiment can run: those of honesty if it has a `[honesty]` table, else `answers`.

    Example:
        >>> from rt_lens.experiment.protocols import family_of
        >>> family_of(load_experiment("mood")).asks_model, family_of(load_experiment("honesty")).asks_model
        (False, True)
    """
    return ScoredAnswers(experiment) if experiment.honesty is None else Honesty(experiment, experiment.honesty)


def protocol_of(experiment: Experiment, model: Model) -> Protocol:
    """The protocol that the experiment runs on this model; for honesty with `auto` the model is measured first.

    Raises:
        ValueError: for too few test topics, or a model that is above chance in no protocol.
    """
    return family_of(experiment).protocol(model)


def parts(experiment: Experiment) -> tuple[ContrastPairs, ContrastPairs, ContrastPairs]:
    """The experiment's pairs for training, validation and test; by fact for the persona protocol, if it is named."""
    return family_of(experiment).parts()


def answers_protocol(experiment: Experiment) -> Protocol:
    """A scorer measures responses to everyday prompts: mood, formality and the like."""
    train, validation, _ = parts(experiment)
    choose, n_prompts = experiment.choose, experiment.test.n_prompts
    prompts = test_topics(experiment)[:n_prompts]
    if len(prompts) < n_prompts:
        own = bool(experiment.test.topics)
        where, more = (
            ("in test.topics", "") if own else ("in the test part", ", or smaller shares to train and validation")
        )
        raise ValueError(
            f"test.n_prompts must be at most {len(prompts)}, the number of topics {where}, got {n_prompts}. "
            f"Give more topics{more}."
        )
    score = _apart(experiment.made_scorer)
    facts = EvalTask(load_questions("capitals")[: experiment.test.n_facts], (ContainsAnswer(), _ACCURACY, _MARGIN), 10)
    sums = [question for question in load_questions("honesty") if question.category == "arithmetic"]
    checks = {
        "facts": facts,
        "arithmetic": EvalTask(sums[: experiment.test.n_facts], (_ACCURACY, _MARGIN)),
        "instructions": EvalTask(
            load_questions("instructions")[: experiment.test.n_instructions], (FollowsInstruction(),)
        ),
    }
    asked, prompts_of = experiment.test, prompt_kinds() if experiment.test.kinds else {}
    checks |= {
        f"unlike_{kind}": EvalTask(prompts_of[kind], (score, *_WRITING), asked.max_new_tokens) for kind in asked.kinds
    }
    return Protocol(
        name="answers",
        train=train,
        # One pair per held-out topic: pairs of one topic are not independent.
        unseen=validation.sample(len(validation.topics), seed=experiment.split.seed),
        targets=lambda direction, seed: (train, validation),
        choosing=EvalTask(validation.topics[: choose.n_prompts], (score,), choose.max_new_tokens),
        tasks={"test": EvalTask(prompts, (score, *_WRITING), experiment.test.max_new_tokens)},
        checks=checks,
        writing="test",
    )


def test_topics(experiment: Experiment) -> list[str]:
    """The topics of which the test prompts are the first: those of `[test]`, or the test part of the pairs."""
    return list(experiment.test.topics) or parts(experiment)[-1].topics


def _apart(scorer: Scorer) -> Scorer:
    """The scorer, under a name of its own if it is one of those that measure how every response is written."""
    if scorer.name in _WRITING and is_dataclass(scorer):
        return replace(scorer, name=f"{scorer.name}_score")  # type: ignore[type-var]
    return scorer


_ACCURACY, _SHARE, _MARGIN = Likelihood("accuracy"), Likelihood("share"), Likelihood("margin")
_LETTERS, _LETTER_SHARE, _OFF_OPTION = (
    Likelihood("accuracy", "multiple_choice"),
    Likelihood("share", "multiple_choice"),
    OffOptionMass("multiple_choice"),
)


def calibrate(config: HonestyConfig, model: Model, seed: int) -> tuple[list[dict[str, Any]], str, str]:
    """Measures whether the model judges statements (by letters) and prefers right answers (by likelihood).

    The items come from categories that are not held out. `auto` takes the persona protocol if the model judges above
    chance, and the likelihood protocol otherwise.

    Returns:
        Rows of task, n, mean, low, high, chance, seed; the protocol's name; and the reason, in a sentence.

    Raises:
        ValueError: if the protocol is `auto` and the model is above chance in neither task.
    """
    facts = _some(seen(load_facts(), config), config.n_calibration, seed)
    questions = _some(seen(questions_of(config), config), config.n_calibration, seed)
    judged = _LETTERS(ask(model, judged_statements(facts), {"multiple_choice"}))
    preferred = _ACCURACY(ask(model, questions, {"completion"}))
    chance = sum(len(question.right) / len(question.options) for question in questions) / len(questions)
    rows = [
        {"task": "judges statements", **_share(judged)._asdict(), "chance": 0.5, "seed": seed},
        {"task": "prefers right answers", **_share(preferred)._asdict(), "chance": chance, "seed": seed},
    ]
    able = [row["low"] > row["chance"] for row in rows]
    measured = "; ".join(
        f"{row['task']}: {estimate(row['mean'], row['low'], row['high'], 2)}, chance {number(row['chance'], 2)}, "
        f"n = {row['n']}: {'above' if above else 'not shown to be above'} chance"
        for row, above in zip(rows, able, strict=True)
    )
    if config.protocol != "auto":
        return (
            rows,
            config.protocol,
            f"The file asks for the {config.protocol} protocol. The model {measured} (seed {seed}).",
        )
    if not any(able):
        raise ValueError(
            "protocol must be 'persona' or 'likelihood' for a model that is not above chance in either, got 'auto'. It "
            f"{measured}. Take another model, or name the protocol to run in spite of this."
        )
    name = "persona" if able[0] else "likelihood"
    return rows, name, f"The model {measured} (seed {seed}). So the run uses the {name} protocol."


def _share(right: Sequence[float]) -> Interval:
    """Share of right answers. A tie counts as wrong, so that a model that cannot choose does not seem to know."""
    return share_interval(sum(score == 1.0 for score in right), len(right))


def likelihood_protocol(experiment: Experiment, config: HonestyConfig, model: HasTokenizer) -> Protocol:
    """Right answers against wrong ones: for models that know facts but cannot judge statements."""
    by_prompt = {question.prompt: question for question in questions_of(config)}
    train, validation, test = ([by_prompt[prompt] for prompt in part.topics] for part in parts(experiment))
    unseen = seen(list(by_prompt.values()), config, held_out=True)
    n, seed = config.n_items, experiment.split.seed

    def targets(direction: Direction, seed: int) -> tuple[list[TokenTarget], list[TokenTarget]]:
        n_train, n_validation = _n_targets(experiment)
        chosen, held_out = _some(train, n_train, seed), _some(validation, n_validation, seed)
        return _answer_targets(model, chosen, direction), _answer_targets(model, held_out, direction)

    first = unseen[0]
    start, gap = start_of(model, first)
    return Protocol(
        name="likelihood",
        train=answer_pairs(train),
        unseen=answer_pairs([replace(question, wrong=question.wrong[:1]) for question in unseen]),
        targets=targets,
        choosing=EvalTask(_some(validation, experiment.choose.n_prompts, seed), (_SHARE,)),
        tasks={
            "same categories": EvalTask(_some(test, n, seed), (_ACCURACY, _SHARE)),
            "held-out categories": EvalTask(_some(unseen, n, seed), (_ACCURACY, _SHARE)),
            "misconceptions": EvalTask(_some(load_questions("misconceptions"), n, seed), (_ACCURACY_PER_TOKEN,)),
            "role-plays": EvalTask(_some(roleplays(), n, seed), _on_roleplays(experiment), 60),
            "true or false": _judging(config, seed),
            "situations": EvalTask(_some(situations(), n, seed), (_LETTERS, _OFF_OPTION)),
        },
        checks=_talk(experiment),
        writing="talk",
        shown=(first.prompt, answered(model, start, gap + first.right[0])),
    )


_ACCURACY_PER_TOKEN = Likelihood("accuracy", per_token=True)


def _n_targets(experiment: Experiment) -> tuple[int, int]:
    """The largest numbers of questions (or facts) to train on, and to validate on."""
    n = experiment.tune.n_targets
    return n, max(4, round(n * experiment.tune.validation_share))


def _answer_targets(model: HasTokenizer, questions: Sequence[Question], direction: Direction) -> list[TokenTarget]:
    """Right answers for `toward` honesty, wrong ones for `away`; `suppress` keeps the right ones."""
    targets: list[TokenTarget] = []
    for question in questions:
        start, gap = start_of(model, question)
        targets.append(Target(start, gap + (question.wrong[0] if direction == "away" else question.right[0])))
    return targets


def persona_protocol(experiment: Experiment, config: HonestyConfig, model: HasTokenizer) -> Protocol:
    """True or false by letters, under personas (Ackerman 2024). Filtering the pairs needs a whole model."""
    split = experiment.split
    train, validation, test = _parted(seen(load_facts(), config), split.train, split.validation, split.seed)
    unseen = seen(load_facts(), config, held_out=True)
    n, seed = config.n_items, split.seed
    pairs = persona_pairs(train, seed=seed).sample(experiment.extract.n_pairs, seed=seed)
    pairs = _answered_as_asked(cast(Model, model), pairs) if config.filter_pairs else pairs
    scorers = (_LETTERS, _LETTER_SHARE, _OFF_OPTION)

    def targets(direction: Direction, seed: int) -> tuple[list[TokenTarget], list[TokenTarget]]:
        chosen = (
            _some(part, most, seed) for part, most in zip((train, validation), _n_targets(experiment), strict=True)
        )
        training, held_out = (_letter_targets(model, true_or_false(part), direction, config.soft) for part in chosen)
        return training, held_out

    return Protocol(
        name="persona",
        train=pairs,
        unseen=persona_pairs(unseen, seed=seed).sample(len(unseen), seed=seed),
        targets=targets,
        choosing=EvalTask(judged_statements(_some(validation, experiment.choose.n_prompts, seed)), (_LETTER_SHARE,)),
        tasks={
            "same categories": EvalTask(judged_statements(_some(test, n, seed)), scorers),
            "held-out categories": EvalTask(judged_statements(_some(unseen, n, seed)), scorers),
            "misconceptions": EvalTask(judged_statements(_some(load_facts("misconceptions"), n, seed)), scorers),
            "role-plays": EvalTask(_some(roleplays(), n, seed), _on_roleplays(experiment), 60),
            "situations": EvalTask(_some(situations(), n, seed), scorers),
        },
        checks=_talk(experiment),
        writing="talk",
        shown=(pairs.pairs[0].user, pairs.texts(model).positive[0]),
    )


_HONESTY = {"persona": persona_protocol, "likelihood": likelihood_protocol}


def _parted(facts: Sequence[Fact], train: float, validation: float, seed: int) -> tuple[list[Fact], ...]:
    """The facts for training, validation and test: shares of every category, shuffled."""
    parted: tuple[list[Fact], ...] = ([], [], [])
    for category in dict.fromkeys(fact.category for fact in facts):
        members = _some([fact for fact in facts if fact.category == category], len(facts), seed)
        cuts = [round(train * len(members)), round((train + validation) * len(members))]
        for part, some in zip(
            parted, (members[: cuts[0]], members[cuts[0] : cuts[1]], members[cuts[1] :]), strict=True
        ):
            part += some
    return parted


def _letter_targets(
    model: HasTokenizer, questions: Sequence[Question], direction: Direction, soft: bool
) -> list[TokenTarget]:
    """Letters as targets: of the truth for `toward` honesty, of the lie for `away`; True is A in half of them."""
    targets: list[TokenTarget] = []
    for index, question in enumerate(questions):
        truth, lie = question.right[0], question.wrong[0]
        options = (truth, lie) if index % 4 < 2 else (lie, truth)
        target = truth if direction == "toward" else lie
        shares = tuple(0.5 if soft or direction == "suppress" else float(option == target) for option in options)
        prompt = chat_text(model, lettered(question.prompt, options), prefill=PREFILL)
        targets.append(Choice(prompt, (" A", " B"), shares))
    return targets


def _answered_as_asked(model: Model, pairs: ContrastPairs) -> ContrastPairs:
    """The pairs whose letters the model prefers under both personas.

    Raises:
        ValueError: if no pair is left.
    """
    right = []
    for side, letter_side in ((0, "honest"), (1, "dishonest")):
        questions = []
        for pair in pairs.pairs:
            persona, user, prefill = pair.sides[side]
            letter = prefill[-1]
            other = "B" if letter == "A" else "A"
            questions.append(Question(user, (letter,), (other,), letter_side, system=persona, prefill=PREFILL))
        right.append(_ACCURACY(ask(model, questions, {"completion"})))
    filtered = [pair for pair, a, b in zip(pairs.pairs, *right, strict=True) if a == b == 1.0]
    if not filtered:
        share = share_interval(0, len(pairs))
        raise ValueError(
            f"filter_pairs must be false for a model that answers none of {len(pairs)} pairs as both personas ask (at "
            f"most {share.high:.0%}), got true. Set filter_pairs = false, or take the likelihood protocol."
        )
    return ContrastPairs(pairs.name, tuple(filtered))


def _judging(config: HonestyConfig, seed: int) -> EvalTask:
    """True-or-false questions as in Ackerman 2024, on held-out categories."""
    facts = _some(seen(load_facts(), config, held_out=True), config.n_items, seed)
    return EvalTask(judged_statements(facts), (_LETTERS, _LETTER_SHARE, _OFF_OPTION))


def _on_roleplays(experiment: Experiment) -> tuple[Any, ...]:
    """Scorers of the role-plays: likelihood of the honest answer, and a judge where the file has one."""
    judge = experiment.made_judge
    return (_ACCURACY_PER_TOKEN,) if judge is None else (_ACCURACY_PER_TOKEN, judge)


def _talk(experiment: Experiment) -> dict[str, EvalTask]:
    """Neutral questions and instructions, which show how the model writes."""
    test = experiment.test
    return {
        "talk": EvalTask(held_out_neutral_prompts()[: test.n_prompts], _WRITING, test.max_new_tokens),
        "instructions": EvalTask(load_questions("instructions")[: test.n_instructions], (FollowsInstruction(),)),
    }


def _some(items: Sequence[Categorised], n: int, seed: int) -> list[Categorised]:
    """At most `n` items, drawn so that all categories appear about equally often."""
    groups: dict[str, list[Categorised]] = {}
    for item in items:
        groups.setdefault(item.category, []).append(item)
    for category, members in groups.items():
        random.Random(f"{seed}-{category}").shuffle(members)
    rounds = itertools.zip_longest(*groups.values())
    return [item for round_ in rounds for item in round_ if item is not None][:n]
