"""Counts the work of each stage of `run_experiment`, from the same protocols and without a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rt_lens.arms.equal_damage import N_OWN
from rt_lens.arms.registry import registered_arm
from rt_lens.data.builtin import (
    calibration_paragraphs,
    calibration_prompts,
    neutral_paragraphs,
    neutral_prompts,
)
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.data.honesty import PREFILL
from rt_lens.data.questions import Question, lettered
from rt_lens.evaluation.tasks import EvalTask
from rt_lens.experiment.config import DIRECTIONS, Experiment
from rt_lens.experiment.costs import Costs, Work, steps_of, summed
from rt_lens.experiment.heeding import BATCH_SIZE, persona_task
from rt_lens.experiment.protocols import Protocol, family_of
from rt_lens.experiment.shape import Shape
from rt_lens.models.protocol import HasTokenizer
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import chat_text
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.targets import Choice, TokenTarget

_FIRST = 1
"""Strengths that are tried before those of the budgets, one for each: all budgets share what was tried."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def protocols_of(experiment: Experiment, model: HasTokenizer) -> list[Protocol]:
    """The protocols that can run, without making a scorer. Pairs that the model would filter are all counted."""
    return family_of(experiment).candidates(model)


class Planner:
    """The work of each stage of `run_experiment` for one protocol."""

    def __init__(
        self, experiment: Experiment, shape: Shape, model: HasTokenizer, protocol: Protocol, local: bool
    ) -> None:
        self.experiment, self.model, self.protocol, self.local = experiment, model, protocol, local
        self.family = family_of(experiment)
        self.shape, self.costs = shape, Costs(shape, BYTES[experiment.dtype])
        self.pairs = protocol.train.sample(experiment.extract.n_pairs, experiment.split.seed)
        paragraphs, chosen = neutral_paragraphs(), experiment.choose.n_paragraphs
        self.choice_texts, self.test_texts = (
            self._sizes(paragraphs[:chosen]),
            self._sizes(paragraphs[chosen : chosen + self.experiment.test.n_texts]),
        )
        self.tests = {**protocol.tasks, **protocol.checks}
        sizes = max(map(self._targets, DIRECTIONS), key=lambda parts: sum(map(sum, parts[0])))
        self.training, self.validation = ([sum(tokens) for tokens in part] for part in sizes)
        self.longest = max(answer for _, answer in sizes[0])
        self.writes = protocol.name == "answers"
        self.arms = list(experiment.tuned_arms.values())
        self.steps = max(steps_of(arm, len(self.training)) for arm in self.arms)
        n_read = [arm.max_steps * arm.neutral_batch_size for arm in self.arms if arm.kl_weight]
        prompts = neutral_prompts()[: max(n_read, default=0)]
        self.neutral = self._sizes([chat_text(model, prompt) for prompt in prompts])

    def _targets(self, direction: Direction) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Tokens of the prompt and of the response of each training target, and of each validation target."""
        config, (training, validation) = (
            self.experiment.tune,
            self.protocol.targets(direction, self.experiment.tune.seed),
        )
        n_validation = max(4, round(config.n_targets * config.validation_share))
        return self._target_sizes(training, config.n_targets), self._target_sizes(validation, n_validation)

    def _target_sizes(self, targets: ContrastPairs | Sequence[TokenTarget], n: int) -> list[tuple[int, int]]:
        config = self.experiment.tune
        if isinstance(targets, ContrastPairs):  # the model writes n responses
            pairs = targets.sample(n, seed=config.seed).pairs
            return [(self._size(chat_text(self.model, pair.user)), config.target_tokens) for pair in pairs]
        return [
            (self._size(target.prompt), 1 if isinstance(target, Choice) else self._option(target.answer) + target.ended)
            for target in targets
        ]

    def items(self) -> dict[str, int]:
        """Set -> number of items."""
        return {
            "contrast pairs": len(self.pairs),
            "unseen pairs": len(self.protocol.unseen),
            "choosing questions": len(self.protocol.choosing.asked),
            "targets to learn": len(self.training),
            "targets to validate on": len(self.validation),
            "neutral prompts": len(self.neutral),
            **{f"test, {name}": len(task.asked) for name, task in self.tests.items()},
            "test, neutral paragraphs": len(self.test_texts),
        }

    def stages(self) -> dict[str, Work]:
        """Name -> Work."""
        experiment, shape, size = self.experiment, self.shape, self.costs.size
        # Memory holds a tuned arm's weights beside the untuned ones, and the delta and the scaled one beside both.
        kept = {used for arm in experiment.arms for used in registered_arm(arm).uses}
        deltas = 3 + len(DIRECTIONS) * len(kept)
        tuned = {
            "a tuned arm's weights, its delta and those it is made of": deltas
            * max(map(shape.trained, self.arms))
            * size
        }
        return {
            # Files of the hub are loaded into a Hugging Face model first; those of a folder are views of the file.
            "load": Work(host={} if self.local else {"a Hugging Face model": shape.parameters * size}),
            **({"calibrate": self._calibrate()} if self.family.asks_model else {}),
            **({} if self.family.asks_model else {"personas": self._personas()}),
            "extract": self._extract(),
            "choose": self._choose(),
            **({"search": self._search()} if experiment.search.trials else {}),
            "tune": self._tune(),
            "evaluate": self._evaluate().holding(tuned),
        }

    def _evaluate(self) -> Work:
        """The untuned model, and each arm at each budget: its strength, the tests, and KL where it is reported."""
        experiment, compare, costs = self.experiment, self.experiment.compare, self.costs
        own = [size + compare.max_new_tokens for size in self._own_prompts()]
        calibration, reported = self._calibration(), [*self.test_texts, *own[1::2]]
        responses = [
            self._size(chat_text(self.model, question.prompt)) + task.max_new_tokens
            for task in list(self.protocol.tasks.values())[:1]
            for question in task.asked[:N_OWN]
            if not question.options
        ]
        texts = costs.fit(reported, kept=True) + (costs.fit(responses, kept=True) if responses else Work())
        behaviour = summed(self._task(task, 64) for task in self.protocol.tasks.values()) + texts
        checks = summed(self._task(task, 64) for task in self.protocol.checks.values())
        strength, budgets = costs.fit(calibration, kept=True), len(compare.kl)
        with_checks = budgets if compare.side_effects == "every" else 1
        at_budgets = strength * (_FIRST + budgets) + behaviour * budgets + checks * with_checks
        work = costs.written(self._own_prompts(), compare.max_new_tokens, 64) + strength + behaviour + checks
        inside = costs.fit(own[: compare.n_inside]) * 3  # the untuned model's responses, and those of both personas
        work += inside * (1 + len(DIRECTIONS) * len(experiment.arms))
        for seeds in experiment.tune_seeds.values():
            for arm in map(registered_arm, experiment.arms):
                times = len(seeds) if arm.seeded else 1
                work += (behaviour + checks + strength if self._prompts(arm.name) else at_budgets) * times
        return work

    def _calibrate(self) -> Work:
        """Judging statements and answering questions; to filter pairs, the letters of each pair on both sides."""
        statements, questions = self.family.calibration()
        work = self._options(statements, "multiple_choice", 16)
        work += self._options(questions, "completion", 16)
        if self.family.filters(self.protocol):
            for texts in self.protocol.train.texts(self.model):
                work += self.costs.read(self._sizes(texts), 16, logits=1)
        return work

    def _personas(self) -> Work:
        """Some topics without a persona, and with those of both sides."""
        return self._task(persona_task(self.experiment, self.protocol.choosing.made[0]), BATCH_SIZE)

    def _extract(self) -> Work:
        """Residuals at all blocks, for the pairs of each seed and for the unseen pairs."""
        work, batch, shape = Work(), 32, self.shape
        draws = len({self.experiment.split.seed, *self.experiment.seeds})
        for pairs in (*[self.pairs] * draws, self.protocol.unseen):
            sizes = [size for side in pairs.texts(self.model) for size in self._sizes(side)]
            tokens = min(batch, len(sizes)) * max(sizes)
            work += self.costs.read(sizes, batch, cut=True).holding(
                {"residuals of all blocks": shape.n_layers * tokens * shape.d_model * self.costs.size},
                {"residuals read, in float32": 2 * 4 * len(sizes) * shape.n_layers * shape.d_model},
            )
        return work

    def _choose(self) -> Work:
        """All multipliers of a layer in one batch, and perplexity under each of them; a persona for each direction."""
        choose, task = self.experiment.choose, self.protocol.choosing
        doses = len({0.0, *choose.multipliers, *(-m for m in choose.multipliers)})
        all_doses = EvalTask(list(task.asked) * doses, task.made, task.max_new_tokens)
        fit = self.costs.fit(self.choice_texts)
        work = (self._task(all_doses, 128) + fit * (doses - 1)) * len(choose.layers) + fit
        settings = self.experiment.settings
        if any(self._prompts(arm) and "persona" not in settings.get(arm, {}) for arm in self.experiment.arms):
            work += self._task(task, 64) * (self.experiment.compare.n_personas * len(DIRECTIONS))
        return work

    def _search(self) -> Work:
        """In each trial an arm in both directions: it is tuned, its strength set, and validation prompts answered."""
        experiment, search, costs = self.experiment, self.experiment.search, self.costs
        task = self.protocol.choosing
        if not self.family.asks_model:
            task = replace(task, questions=self.family.parts()[1].topics[: search.n_prompts])
        measured = self._task(task, 64)
        strength = costs.fit(self._calibration(), kept=True) * (_FIRST + 1)
        work = costs.written(self._own_prompts(), experiment.compare.max_new_tokens, 64) + measured
        for arm in map(registered_arm, experiment.arms):
            if arm.knobs:
                of_trial = measured + (Work() if self._prompts(arm.name) else strength)
                work += (of_trial + (self._trained(arm.name) if arm.tunes else Work())) * (2 * search.trials)
        return work

    def _prompts(self, arm: str) -> bool:
        """Whether an arm is a system prompt, which has no strength to set."""
        return "persona" in registered_arm(arm).knobs

    def _trained(self, arm: str) -> Work:
        """One tuning run with its data; of an arm that is made of others, one of those."""
        config = next(
            self.experiment.tuned_arms[name]
            for name in (arm, *registered_arm(arm).uses) if name in self.experiment.tuned_arms
        )  # fmt: skip
        neutral = [size + config.target_tokens for size in self.neutral]
        predicted = max(self.longest, config.target_tokens if neutral else 1)
        data = self.costs.material([*self.training, *self.validation, *neutral], config)
        return data + self.costs.tuning(config, self.training, self.validation, neutral, predicted)

    def _own_prompts(self) -> list[int]:
        prompts = calibration_prompts()[: 2 * self.experiment.compare.n_texts]
        return self._sizes([chat_text(self.model, prompt) for prompt in prompts])

    def _calibration(self) -> list[int]:
        """Tokens of the texts that set strengths: paragraphs, and every second of the model's own responses."""
        compare = self.experiment.compare
        own = [size + compare.max_new_tokens for size in self._own_prompts()]
        return [*self._sizes(calibration_paragraphs()[: compare.n_texts]), *own[::2]]

    def _tune(self) -> Work:
        """Writing the targets, the untuned model's prefix of them, and the tuning runs."""
        base, costs, work, seeds = self.experiment.tune, self.costs, Work(), self.experiment.tune_seeds
        answer = base.target_tokens
        neutral = [size + answer for size in self.neutral]
        if neutral:
            work += costs.written(self.neutral, answer, 64) * len(self.experiment.seeds)
        predicted = max(self.longest, answer if neutral else 1)
        for direction in DIRECTIONS:
            if self.writes:
                for sizes in (self.training, self.validation):
                    work += costs.written([size - answer for size in sizes], answer, 64) * len(seeds[direction])
            rows = [*self.training, *self.validation, *neutral]
            work += costs.material(rows, base) * len(seeds[direction])
        for arm, _, _ in self.experiment.tuning_runs:
            work += costs.tuning(self.experiment.tuned_arms[arm], self.training, self.validation, neutral, predicted)
        return work

    def _task(self, task: EvalTask, batch: int) -> Work:
        """What the scorers of a task read; all scorers share it."""
        reads, work = {scorer.reads for scorer in task.made}, Work()
        if "text" in reads:
            texts = [
                chat_text(self.model, question.prompt, system=question.system, prefill=question.prefill)
                for question in task.asked
            ]
            work += self.costs.written(self._sizes(texts), task.max_new_tokens, batch)
        for form in ("completion", "multiple_choice"):
            if form in reads:
                work += self._options(task.asked, form, max(1, batch // 4))
        return work

    def _options(self, questions: Sequence[Question], form: str, batch: int) -> Work:
        """Likelihoods of the options as completions, or of their letters in every rotation."""
        starts: list[int] = []
        options: list[list[int]] = []
        for question in questions:
            n = len(question.options)
            user = question.prompt if form == "completion" else lettered(question.prompt, question.options)
            prefill = question.prefill or ("" if form == "completion" else PREFILL)
            text = chat_text(self.model, user, system=question.system, prefill=prefill)
            sizes = [self._option(option) for option in question.options] if form == "completion" else [1] * n
            for _ in range(1 if form == "completion" else n):
                starts.append(self._size(text))
                options.append(sizes)
        return self.costs.options(starts, options, batch)

    def _sizes(self, texts: Iterable[str]) -> list[int]:
        return [self._size(text) for text in texts]

    def _size(self, text: str) -> int:
        return len(encode(self.model, text))

    def _option(self, text: str) -> int:
        return max(1, len(self.model.tokenizer.encode(text, add_special_tokens=False)))
