"""The stages of a run as `run_experiment` goes through them, as work: from the same protocols, with no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rt_lens.arms.comparison import EvalTask
from rt_lens.data.builtin import neutral_paragraphs, neutral_prompts
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.data.honesty import PREFILL, judged_statements, load_facts
from rt_lens.data.questions import Question, lettered
from rt_lens.experiment.config import DIRECTIONS, Experiment, questions_of, seen
from rt_lens.experiment.costs import Costs, Work, steps_of, summed
from rt_lens.experiment.protocols import Protocol, answers_protocol, likelihood_protocol, persona_protocol
from rt_lens.experiment.shape import Shape
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import chat_text
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.targets import Choice, TokenTarget

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def protocols_of(experiment: Experiment, model: Model) -> list[Protocol]:
    """The protocols that may run, with no scorer made. Where the model's answers decide what is kept, all is."""
    experiment = experiment.unmade()
    if experiment.honesty is None:
        return [answers_protocol(experiment)]
    config = replace(experiment.honesty, filter_pairs=False)
    made = {"persona": persona_protocol, "likelihood": likelihood_protocol}
    return [make(experiment, config, model) for name, make in made.items() if config.protocol in (name, "auto")]


class Planner:
    """The stages of one protocol, as `run_experiment` goes through them."""

    def __init__(self, experiment: Experiment, shape: Shape, model: Model, protocol: Protocol, local: bool) -> None:
        self.experiment, self.model, self.protocol, self.local = experiment, model, protocol, local
        self.shape, self.costs = shape, Costs(shape, BYTES[experiment.dtype])
        self.pairs = protocol.train.sample(experiment.extract.n_pairs, experiment.split.seed)
        paragraphs, chosen = neutral_paragraphs(), experiment.choose.n_paragraphs
        self.choice_texts, self.test_texts = (
            self._sizes(paragraphs[:chosen]),
            self._sizes(paragraphs[chosen : chosen + self.experiment.test.n_texts]),
        )
        self.tests = {**protocol.exams, **protocol.checks}
        both = max(map(self._targets, DIRECTIONS), key=lambda parts: sum(map(sum, parts[0])))
        self.learnt, self.checked = ([sum(sizes) for sizes in part] for part in both)
        self.longest = max(answer for _, answer in both[0])
        self.writes = protocol.name == "answers"
        self.arms = list(experiment.tuned_arms.values())
        self.steps = max(steps_of(arm, len(self.learnt)) for arm in self.arms)
        read = [arm.max_steps * arm.neutral_batch_size for arm in self.arms if arm.kl_weight]
        enough = neutral_prompts()[: max(read, default=0)]
        self.neutral = self._sizes([chat_text(model, prompt) for prompt in enough])

    def _targets(self, direction: Direction) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Tokens of the prompt and of the answer of each target to learn, and of each to validate on."""
        config, (learnt, checked) = self.experiment.tune, self.protocol.targets(direction, self.experiment.tune.seed)
        few = max(4, round(config.n_targets * config.validation_share))
        return self._target_sizes(learnt, config.n_targets), self._target_sizes(checked, few)

    def _target_sizes(self, wanted: ContrastPairs | Sequence[TokenTarget], n: int) -> list[tuple[int, int]]:
        config = self.experiment.tune
        if isinstance(wanted, ContrastPairs):  # the model writes n answers
            pairs = wanted.sample(n, seed=config.seed).pairs
            return [(self._size(chat_text(self.model, pair.user)), config.target_tokens) for pair in pairs]
        return [
            (self._size(each.prompt), 1 if isinstance(each, Choice) else self._option(each.answer) + each.ended)
            for each in wanted
        ]

    def items(self) -> dict[str, int]:
        """Set -> how many."""
        return {
            "contrast pairs": len(self.pairs),
            "unseen pairs": len(self.protocol.unseen),
            "choosing questions": len(self.protocol.choosing.asked),
            "targets to learn": len(self.learnt),
            "targets to validate on": len(self.checked),
            "neutral prompts": len(self.neutral),
            **{f"test, {name}": len(exam.asked) for name, exam in self.tests.items()},
            "test, neutral paragraphs": len(self.test_texts),
        }

    def stages(self) -> dict[str, Work]:
        """Name -> Work."""
        experiment, shape, size = self.experiment, self.shape, self.costs.size
        arms = 1 + 3 * sum(map(len, experiment.tune_seeds.values()))  # untuned; steered and both tuned, each seed
        asked = summed(self._exam(exam, 64) for exam in self.tests.values()) + self.costs.fit(
            self.test_texts, kept=True
        )
        # A tuned arm's own weights lie beside the untuned ones, and the delta beside both.
        worn = {"a tuned arm's weights and delta": 2 * max(map(shape.trained, self.arms)) * size}
        return {
            # The hub's files go through a Hugging Face model first; a folder's are views of the file.
            "load": Work(host={} if self.local else {"a Hugging Face model": shape.parameters * size}),
            **({} if experiment.honesty is None else {"calibrate": self._calibrate()}),
            "extract": self._extract(),
            "choose": self._choose(),
            "tune": self._tune(),
            "evaluate": (asked * arms).holding(worn),
        }

    def _calibrate(self) -> Work:
        """Statements judged and questions answered; for correct-only, the letters of each pair on both sides."""
        config, protocol = self.experiment.honesty, self.protocol
        assert config is not None
        facts, asked = seen(load_facts(), config), seen(questions_of(config), config)
        work = self._options(judged_statements(facts[: config.n_calibration]), "letters", 16)
        work += self._options(asked[: config.n_calibration], "answers", 16)
        if protocol.name == "persona" and config.filter_pairs:
            for texts in protocol.train.texts(self.model):
                work += self.costs.read(self._sizes(texts), 16, logits=1)
        return work

    def _extract(self) -> Work:
        """Residuals at all blocks, of each seed's pairs and of the unseen ones."""
        work, batch, shape = Work(), 32, self.shape
        draws = len({self.experiment.split.seed, *self.experiment.seeds})
        for pairs in (*[self.pairs] * draws, self.protocol.unseen):
            sizes = [size for side in pairs.texts(self.model) for size in self._sizes(side)]
            tokens = min(batch, len(sizes)) * max(sizes)
            work += self.costs.read(sizes, batch).holding(
                {"residuals of all blocks": shape.n_layers * tokens * shape.d_model * self.costs.size},
                {"residuals read, in float32": 2 * 4 * len(sizes) * shape.n_layers * shape.d_model},
            )
        return work

    def _choose(self) -> Work:
        """All doses of a layer at once, and perplexity under each of them."""
        choose, exam = self.experiment.choose, self.protocol.choosing
        doses = len({0.0, *choose.multipliers, *(-m for m in choose.multipliers)})
        all_doses = EvalTask(list(exam.asked) * doses, exam.made, exam.max_new_tokens)
        fit = self.costs.fit(self.choice_texts)
        return (self._exam(all_doses, 128) + fit * (doses - 1)) * len(choose.layers) + fit

    def _tune(self) -> Work:
        """Targets written or given, the untuned model's part of them, and both arms' runs."""
        base, costs, work, seeds = self.experiment.tune, self.costs, Work(), self.experiment.tune_seeds
        answer = base.target_tokens
        neutral = [size + answer for size in self.neutral]
        if neutral:
            work += costs.written(self.neutral, answer, 64) * len(self.experiment.seeds)
        predicted = max(self.longest, answer if neutral else 1)
        for direction in DIRECTIONS:
            if self.writes:
                for sizes in (self.learnt, self.checked):
                    work += costs.written([size - answer for size in sizes], answer, 64) * len(seeds[direction])
            rows = [*self.learnt, *self.checked, *neutral]
            for config in self.arms:
                run = costs.tuning(config, self.learnt, self.checked, neutral, predicted)
                work += run * len(seeds[direction])
            work += costs.material(rows, base) * len(seeds[direction])
        return work

    def _exam(self, exam: EvalTask, batch: int) -> Work:
        """What its scorers read, once for all of them."""
        reads, work = {scorer.reads for scorer in exam.made}, Work()
        if "text" in reads:
            texts = [
                chat_text(self.model, each.prompt, system=each.system, prefill=each.prefill) for each in exam.asked
            ]
            work += self.costs.written(self._sizes(texts), exam.max_new_tokens, batch)
        for form in ("answers", "letters"):
            if form in reads:
                work += self._options(exam.asked, form, max(1, batch // 4))
        return work

    def _options(self, asked: Sequence[Question], form: str, batch: int) -> Work:
        """Options as answers, or their letters in every rotation."""
        starts: list[int] = []
        options: list[list[int]] = []
        for each in asked:
            n = len(each.options)
            user = each.prompt if form == "answers" else lettered(each.prompt, each.options)
            prefill = each.prefill or ("" if form == "answers" else PREFILL)
            text = chat_text(self.model, user, system=each.system, prefill=prefill)
            sizes = [self._option(option) for option in each.options] if form == "answers" else [1] * n
            for _ in range(1 if form == "answers" else n):
                starts.append(self._size(text))
                options.append(sizes)
        return self.costs.options(starts, options, batch)

    def _sizes(self, texts: Iterable[str]) -> list[int]:
        return [self._size(text) for text in texts]

    def _size(self, text: str) -> int:
        return len(encode(self.model, text))

    def _option(self, text: str) -> int:
        return max(1, len(self.model.tokenizer.encode(text, add_special_tokens=False)))
