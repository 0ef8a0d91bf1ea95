"""A model as the judge of answers, by its logits: nothing is written, so nothing has to be parsed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from rt_lens.data.questions import Answer, Question
from rt_lens.evaluation.choices import Form, likelihoods
from rt_lens.evaluation.scorers import Reads, option_shares
from rt_lens.models.load import load_model


@dataclass(frozen=True)
class LogitJudge:
    """How far answers meet a criterion, by what a model finds likelier to say of them.

    The criterion completes "the answer ...", as in `sounds happy`. Without an opposite the judge is asked whether that
    is true, and the score is P(yes) / (P(yes) + P(no)); with one, whether "It sounds happy" or "It sounds sad" is, and
    the score is the first one's share. With `pairs` the answer and its baseline are listed in both orders, averaged,
    and asked which of them it is truer of; the score is P(answer) - P(baseline).

    What a small model is worth as a judge: of 24 happy and 24 sad answers that were not used to choose the wording,
    SmolLM2-135M-Instruct, given the opposite, puts each happy one above each sad one (1.00 of all pairs, 95 % interval
    0.90 to 1.00; though the sad ones' mean is still 0.52). By yes and no it is not above chance (0.33, 0.18 to 0.53),
    nor are its `pairs` clearly so (0.67, 0.47 to 0.82 of 24). So give a small model an opposite, trust the order of its
    scores and not their level, and try any judge on answers of which you know the truth.

    Attributes:
        model: HookedTransformer, TransformerBridge, or a name or path for `load_model`. It judges with whatever it
            carries; `compare_arms` asks judges when an arm is off again, so it may be the untuned model itself.
        criterion: a verb phrase.
        opposite: another one that is true where the criterion is not; empty for yes and no.
        pairs: compare each answer with its baseline, from -1 to 1, in place of 0 to 1 on its own.
        form: `answers` or `letters`, see `likelihoods`; pairs are always letters.
        batch_size: answers per batch; it changes no score.
        name: for tables; made of the criterion where it is empty.

    Raises:
        ValueError: empty criterion, unknown form, an opposite for pairs; when called, pairs without a baseline.

    Example:
        >>> judge = LogitJudge(model, "sounds happy", "sounds sad")
        >>> compare_arms(model, {"untuned": None, "tuned": delta}, {"test": EvalTask(test, ["vader", judge])})

    Source: zero-shot classification by the likelihood of verbalised labels; order swap as in Zheng et al. 2023
    (arXiv:2306.05685).
    """

    model: Any = field(repr=False)
    criterion: str
    opposite: str = ""
    pairs: bool = False
    form: Form = "answers"
    batch_size: int = 16
    name: str = ""

    def __post_init__(self) -> None:
        check_criterion(self.criterion)
        if self.form not in get_args(Form):
            raise ValueError(f"form: {self.form!r} came; 'answers' or 'letters' is wanted.")
        if self.pairs and self.opposite:
            raise ValueError("opposite: pairs are compared by the criterion alone. Leave it out, or set pairs=False.")
        if isinstance(self.model, str):
            object.__setattr__(self, "model", load_model(self.model))
        if not self.name:
            object.__setattr__(self, "name", judge_name("logit_judge", self.criterion, self.pairs))

    @property
    def reads(self) -> Reads:
        return "text"

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        if not self.pairs:
            return self._shares([self._question(answer) for answer in answers], self.form)
        sides = [both_sides(answer) for answer in answers]
        apart = [number for number, (mine, theirs) in enumerate(sides) if mine != theirs]
        scores = [0.0] * len(answers)  # two that are the same are equal, whoever judges
        asked = [self._comparison(answers[number], *sides[number]) for number in apart]
        for number, share in zip(apart, self._shares(asked, "letters"), strict=True):
            scores[number] = 2 * share - 1
        return scores

    def _question(self, answer: Answer) -> Question:
        said = f"Question: {asked(answer)}\nAnswer: {shown(answer)}\n\n"
        if self.opposite:
            return Question(f"{said}Which is true of the answer?", (f"It {self.criterion}",), (f"It {self.opposite}",))
        return Question(f"{said}Is it true of this answer that it {self.criterion}? Say yes or no.", ("Yes",), ("No",))

    def _comparison(self, answer: Answer, mine: str, theirs: str) -> Question:
        prompt = f"{asked(answer)}\n\nOf which of these answers is it truer that it {self.criterion}?"
        return Question(prompt, (mine,), (theirs,))

    def _shares(self, questions: Sequence[Question], form: Form) -> list[float]:
        if not questions:
            return []
        found = likelihoods(self.model, questions, form=form, batch_size=self.batch_size)
        return [option_shares(each)[0] for each in found]


def check_criterion(criterion: str) -> None:
    """Raises ValueError for an empty criterion."""
    if not criterion.strip():
        raise ValueError("criterion: it is empty. Complete 'the answer ...', as in 'sounds happy'.")


def judge_name(kind: str, criterion: str, pairs: bool) -> str:
    """A judge's name for tables: `logit_judge_sounds_happy`, `logit_judge_pairs_sounds_happy`."""
    return "_".join([kind, *(["pairs"] if pairs else []), *re.findall(r"\w+", criterion.lower())])


def asked(answer: Answer) -> str:
    """What was asked, with the role it was asked in: that may hold what an answer is judged by."""
    role = answer.question.system
    return f"(The one who answers was told: {role}) {answer.question.prompt}" if role else answer.question.prompt


def shown(answer: Answer, text: str | None = None) -> str:
    """An answer (or another text to the same question) as a judge reads it, with its prefill."""
    return (answer.question.prefill + (answer.text if text is None else text)).strip() or "(no answer)"


def both_sides(answer: Answer) -> tuple[str, str]:
    """An answer and its baseline, as a judge reads them.

    Raises:
        ValueError: if it has none.
    """
    if answer.baseline is None:
        raise ValueError(
            f"answers: {answer.question.prompt[:60]!r} has no baseline to compare with. Score it in compare_arms, of "
            "which the first arm is the baseline, or set pairs=False."
        )
    return shown(answer), shown(answer, answer.baseline)
