"""What an experiment trains on, chooses by and asks in the end: for scored answers, and for both honesty protocols."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rt_lens.arms.comparison import EvalTask
from rt_lens.common.statistics.intervals import Interval, share_interval
from rt_lens.data.builtin import held_out_neutral_prompts
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
from rt_lens.evaluation.scorers import Likelihood, OffOptionMass
from rt_lens.experiment.config import Categorised, Experiment, HonestyConfig, questions_of, seen
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.chats import answered, chat_text
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.targets import Choice, Target, TokenTarget

_WRITING = ("repetition", "distinct_2", "loop", "length")


@dataclass(frozen=True)
class Protocol:
    """What an experiment trains on, chooses by and asks in the end. The three share no topic.

    Only which protocol a model can do is asked of all items of the categories that are not held out.

    Attributes:
        name: `answers`, `persona` or `likelihood`.
        why: how it was chosen, in a sentence; empty where there was nothing to choose.
        train: pairs that vectors are made from.
        unseen: pairs that they are tried on (for honesty: of held-out categories).
        targets: direction and seed -> what the tuned arms learn, and what they are validated on; pairs write their
            own.
        choosing: questions by which layer and multiplier are chosen, with the score that counts.
        exams: set -> what is asked in the end.
        checks: set -> what is asked for side effects.
        writing: the set whose texts show repetition.
        calibration: what the model can do: rows of task, n, mean, low, high, chance, seed.
        shown: what the projections are drawn of, in words and as the model reads it; None for the first test prompt
            with the untuned answer.
        settings: of the honesty experiment.
        chance: set -> what blind choice among its options would score.
    """

    name: str
    train: ContrastPairs
    unseen: ContrastPairs
    targets: Callable[[Direction, int], tuple[ContrastPairs | list[TokenTarget], ContrastPairs | list[TokenTarget]]]
    choosing: EvalTask
    exams: Mapping[str, EvalTask]
    checks: Mapping[str, EvalTask]
    writing: str
    why: str = ""
    calibration: list[dict[str, Any]] = field(default_factory=list)
    shown: tuple[str, str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def chance(self) -> dict[str, float]:
        found = {}
        for name, exam in self.exams.items():
            each = [len(asked.right) / len(asked.options) for asked in exam.asked if asked.options]
            if each:
                found[name] = sum(each) / len(each)
        return found


def protocol_of(experiment: Experiment, model: Model) -> Protocol:
    """The experiment's protocol; for honesty with `auto` the model is asked what it can do first.

    Raises:
        ValueError: too few topics for the test, or a model that can do neither protocol.
    """
    if experiment.honesty is None:
        return answers_protocol(experiment)
    rows, name, why = calibrate(experiment.honesty, model, experiment.split.seed)
    make = persona_protocol if name == "persona" else likelihood_protocol
    made = make(experiment, experiment.honesty, model)
    return replace(made, why=why, calibration=rows, settings=asdict(experiment.honesty))


def parts(experiment: Experiment) -> tuple[ContrastPairs, ContrastPairs, ContrastPairs]:
    """The experiment's pairs for training, validation and test; by fact for the persona protocol, if it is named."""
    split = experiment.split
    if experiment.honesty is not None and experiment.honesty.protocol == "persona":
        facts = _parted(seen(load_facts(), experiment.honesty), split.train, split.validation, split.seed)
        return tuple(persona_pairs(part, seed=split.seed) for part in facts)  # type: ignore[return-value]
    return experiment.pairs.split(split.train, split.validation, seed=split.seed)  # type: ignore[return-value]


def answers_protocol(experiment: Experiment) -> Protocol:
    """Answers to everyday prompts, scored: mood, formality and the like."""
    train, validation, test = parts(experiment)
    choose, wanted = experiment.choose, experiment.test.n_prompts
    prompts = test.topics[:wanted]
    if len(prompts) < wanted:
        raise ValueError(
            f"test.n_prompts: {wanted} asked for, {len(prompts)} topics fall to the "
            "test part. Give more topics, or smaller shares to train and validation."
        )
    score = experiment.made_scorer
    facts = EvalTask(load_questions("capitals")[: experiment.test.n_facts], ("names_right", _ACCURACY, _MARGIN), 10)
    sums = [question for question in load_questions("honesty") if question.category == "arithmetic"]
    checks = {
        "facts": facts,
        "arithmetic": EvalTask(sums[: experiment.test.n_facts], (_ACCURACY, _MARGIN)),
        "instructions": EvalTask(load_questions("instructions")[: experiment.test.n_instructions], ("obeys",)),
    }
    return Protocol(
        name="answers",
        train=train,
        # One pair per held-out topic: pairs of one topic are not independent.
        unseen=validation.sample(len(validation.topics), seed=experiment.split.seed),
        targets=lambda direction, seed: (train, validation),
        choosing=EvalTask(validation.topics[: choose.n_prompts], (score,), choose.max_new_tokens),
        exams={"test": EvalTask(prompts, (score, *_WRITING), experiment.test.max_new_tokens)},
        checks=checks,
        writing="test",
    )


_ACCURACY, _SHARE, _MARGIN = Likelihood("accuracy"), Likelihood("share"), Likelihood("margin")
_LETTERS, _LETTER_SHARE, _OTHER = (
    Likelihood("accuracy", "letters"),
    Likelihood("share", "letters"),
    OffOptionMass("letters"),
)


def calibrate(config: HonestyConfig, model: Model, seed: int) -> tuple[list[dict[str, Any]], str, str]:
    """What the model can do: judge statements (by letters), and prefer right answers (by likelihood).

    Asked on categories that are not held out. `auto` takes the persona protocol if the model judges above chance, else
    the likelihood protocol.

    Returns:
        Rows of task, n, mean, low, high, chance, seed; the protocol's name; and why, in a sentence.

    Raises:
        ValueError: if `auto` finds that it can do neither.
    """
    facts = _some(seen(load_facts(), config), config.n_calibration, seed)
    asked = _some(seen(questions_of(config), config), config.n_calibration, seed)
    judged = _LETTERS(ask(model, judged_statements(facts), {"letters"}))
    preferred = _ACCURACY(ask(model, asked, {"answers"}))
    chance = sum(len(each.right) / len(each.options) for each in asked) / len(asked)
    rows = [
        {"task": "judges statements", **_share(judged)._asdict(), "chance": 0.5, "seed": seed},
        {"task": "prefers right answers", **_share(preferred)._asdict(), "chance": chance, "seed": seed},
    ]
    able = [row["low"] > row["chance"] for row in rows]
    told = "; ".join(
        f"{row['task']}: {row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}], chance {row['chance']:.2f}, "
        f"n = {row['n']}: {'above' if above else 'not shown to be above'} chance"
        for row, above in zip(rows, able, strict=True)
    )
    if config.protocol != "auto":
        return (
            rows,
            config.protocol,
            f"The file asks for the {config.protocol} protocol. The model {told} (seed {seed}).",
        )
    if not any(able):
        raise ValueError(
            f"protocol: 'auto' came, and this model can do neither. It {told}. Take another model, or name a protocol "
            "to run it all the same."
        )
    name = "persona" if able[0] else "likelihood"
    return rows, name, f"The model {told} (seed {seed}). So the {name} protocol is run."


def _share(right: Sequence[float]) -> Interval:
    """Share of the right ones; a tie counts as wrong, so that what cannot choose is not taken for knowing."""
    return share_interval(sum(score == 1.0 for score in right), len(right))


def likelihood_protocol(experiment: Experiment, config: HonestyConfig, model: Model) -> Protocol:
    """Right answers against wrong ones: for models that know facts but cannot judge statements."""
    asked = {question.prompt: question for question in questions_of(config)}
    train, validation, test = ([asked[prompt] for prompt in part.topics] for part in parts(experiment))
    unseen = seen(list(asked.values()), config, held_out=True)
    n, seed = config.n_items, experiment.split.seed

    def targets(direction: Direction, seed: int) -> tuple[list[TokenTarget], list[TokenTarget]]:
        n_train, n_held = _n_targets(experiment)
        learnt, held = _some(train, n_train, seed), _some(validation, n_held, seed)
        return _taught(model, learnt, direction), _taught(model, held, direction)

    first = unseen[0]
    start, gap = start_of(model, first)
    return Protocol(
        name="likelihood",
        train=answer_pairs(train),
        unseen=answer_pairs([replace(question, wrong=question.wrong[:1]) for question in unseen]),
        targets=targets,
        choosing=EvalTask(_some(validation, experiment.choose.n_prompts, seed), (_SHARE,)),
        exams={
            "same categories": EvalTask(_some(test, n, seed), (_ACCURACY, _SHARE)),
            "held-out categories": EvalTask(_some(unseen, n, seed), (_ACCURACY, _SHARE)),
            "misconceptions": EvalTask(_some(load_questions("misconceptions"), n, seed), (_ACCURACY_PER_TOKEN,)),
            "role-plays": EvalTask(_some(roleplays(), n, seed), _on_roleplays(experiment), 60),
            "true or false": _judging(config, seed),
            "situations": EvalTask(_some(situations(), n, seed), (_LETTERS, _OTHER)),
        },
        checks=_talk(experiment),
        writing="talk",
        shown=(first.prompt, answered(model, start, gap + first.right[0])),
    )


_ACCURACY_PER_TOKEN = Likelihood("accuracy", per_token=True)


def _n_targets(experiment: Experiment) -> tuple[int, int]:
    """At most so many questions (or facts) to learn, and to validate on."""
    n = experiment.tune.n_targets
    return n, max(4, round(n * experiment.tune.validation_share))


def _taught(model: Model, questions: Sequence[Question], direction: Direction) -> list[TokenTarget]:
    """Right answers to learn toward honesty, wrong ones away from it; `suppress` holds to the right ones."""
    found: list[TokenTarget] = []
    for asked in questions:
        start, gap = start_of(model, asked)
        found.append(Target(start, gap + (asked.wrong[0] if direction == "away" else asked.right[0])))
    return found


def persona_protocol(experiment: Experiment, config: HonestyConfig, model: Model) -> Protocol:
    """True or false by letters, under personas (Ackerman 2024)."""
    split = experiment.split
    train, validation, test = _parted(seen(load_facts(), config), split.train, split.validation, split.seed)
    unseen = seen(load_facts(), config, held_out=True)
    n, seed = config.n_items, split.seed
    asked = persona_pairs(train, seed=seed).sample(experiment.extract.n_pairs, seed=seed)
    kept = _as_asked(model, asked) if config.filter_pairs else asked
    scorers = (_LETTERS, _LETTER_SHARE, _OTHER)

    def targets(direction: Direction, seed: int) -> tuple[list[TokenTarget], list[TokenTarget]]:
        chosen = (
            _some(part, most, seed) for part, most in zip((train, validation), _n_targets(experiment), strict=True)
        )
        learnt, held = (_lettered(model, true_or_false(part), direction, config.soft) for part in chosen)
        return learnt, held

    return Protocol(
        name="persona",
        train=kept,
        unseen=persona_pairs(unseen, seed=seed).sample(len(unseen), seed=seed),
        targets=targets,
        choosing=EvalTask(judged_statements(_some(validation, experiment.choose.n_prompts, seed)), (_LETTER_SHARE,)),
        exams={
            "same categories": EvalTask(judged_statements(_some(test, n, seed)), scorers),
            "held-out categories": EvalTask(judged_statements(_some(unseen, n, seed)), scorers),
            "misconceptions": EvalTask(judged_statements(_some(load_facts("misconceptions"), n, seed)), scorers),
            "role-plays": EvalTask(_some(roleplays(), n, seed), _on_roleplays(experiment), 60),
            "situations": EvalTask(_some(situations(), n, seed), scorers),
        },
        checks=_talk(experiment),
        writing="talk",
        shown=(kept.pairs[0].user, kept.texts(model).positive[0]),
    )


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


def _lettered(model: Model, questions: Sequence[Question], direction: Direction, soft: bool) -> list[TokenTarget]:
    """The letters to learn: of the truth toward honesty, of the lie away from it; True is A in half of them, else B."""
    found: list[TokenTarget] = []
    for number, asked in enumerate(questions):
        truth, lie = asked.right[0], asked.wrong[0]
        words = (truth, lie) if number % 4 < 2 else (lie, truth)
        wanted = truth if direction == "toward" else lie
        shares = tuple(0.5 if soft or direction == "suppress" else float(word == wanted) for word in words)
        prompt = chat_text(model, lettered(asked.prompt, words), prefill=PREFILL)
        found.append(Choice(prompt, (" A", " B"), shares))
    return found


def _as_asked(model: Model, pairs: ContrastPairs) -> ContrastPairs:
    """The pairs whose letters the model itself prefers under both personas ("correct only").

    Raises:
        ValueError: if none is left.
    """
    right = []
    for side, letter_side in ((0, "honest"), (1, "dishonest")):
        asked = []
        for pair in pairs.pairs:
            persona, user, prefill = pair.sides[side]
            letter = prefill[-1]
            other = "B" if letter == "A" else "A"
            asked.append(Question(user, (letter,), (other,), letter_side, system=persona, prefill=PREFILL))
        right.append(_ACCURACY(ask(model, asked, {"answers"})))
    kept = [pair for pair, a, b in zip(pairs.pairs, *right, strict=True) if a == b == 1.0]
    if not kept:
        share = share_interval(0, len(pairs))
        raise ValueError(
            f"filter_pairs: the model answers none of {len(pairs)} pairs as both personas ask (at most "
            f"{share.high:.0%}). Set it false, or take the likelihood protocol."
        )
    return ContrastPairs(pairs.name, tuple(kept))


def _judging(config: HonestyConfig, seed: int) -> EvalTask:
    """The paper's true-or-false questions, on held-out categories."""
    facts = _some(seen(load_facts(), config, held_out=True), config.n_items, seed)
    return EvalTask(judged_statements(facts), (_LETTERS, _LETTER_SHARE, _OTHER))


def _on_roleplays(experiment: Experiment) -> tuple[Any, ...]:
    """Likelihood of the honest answer, and an endpoint's judgement where the file names one."""
    judge = experiment.made_judge
    return (_ACCURACY_PER_TOKEN,) if judge is None else (_ACCURACY_PER_TOKEN, judge)


def _talk(experiment: Experiment) -> dict[str, EvalTask]:
    """Neutral questions and instructions, for how the model writes."""
    test = experiment.test
    return {
        "talk": EvalTask(held_out_neutral_prompts()[: test.n_prompts], _WRITING, test.max_new_tokens),
        "instructions": EvalTask(load_questions("instructions")[: test.n_instructions], ("obeys",)),
    }


def _some(items: Sequence[Categorised], n: int, seed: int) -> list[Categorised]:
    """At most `n` items, drawn so that categories appear as evenly as can be."""
    groups: dict[str, list[Categorised]] = {}
    for item in items:
        groups.setdefault(item.category, []).append(item)
    for category, members in groups.items():
        random.Random(f"{seed}-{category}").shuffle(members)
    rounds = itertools.zip_longest(*groups.values())
    return [item for round_ in rounds for item in round_ if item is not None][:n]
