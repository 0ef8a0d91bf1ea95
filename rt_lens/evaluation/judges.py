"""A model as the judge of responses, by its logits: it generates nothing, so nothing has to be parsed.

The functions at the end phrase what any judge is shown; a judge behind an endpoint uses them too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rt_lens.data.questions import Answer, Question
from rt_lens.evaluation.choices import likelihoods
from rt_lens.evaluation.scorers import Form, Reads, check_form, option_shares
from rt_lens.models.load import load_model


@dataclass(frozen=True)
class LogitJudge:
    """How far responses meet a criterion, by what a model finds likelier to say about them.

    The criterion completes "the answer ...", as in `sounds happy`. Without an opposite, the judge is asked whether that
    is true, and the score is P(yes) / (P(yes) + P(no)). With an opposite, it is asked whether "It sounds happy" or "It
    sounds sad" is true, and the score is the share of the first. With `pairs`, the response and its baseline are listed
    in both orders, averaged, and the judge is asked of which the criterion is truer; the score is P(response) -
    P(baseline).

    A small model's worth as a judge: on 24 happy and 24 sad responses that were not used to choose the wording,
    SmolLM2-135M-Instruct with an opposite ranks each happy response above each sad one (1.00 of all pairs, 95 %
    interval 0.90 to 1.00; yet the sad ones' mean is still 0.52). By yes and no it is not above chance (0.33, 0.18 to
    0.53), nor are its `pairs` clearly so (0.67, 0.47 to 0.82 of 24). So give a small model an opposite, trust the order
    of its scores and not their level, and try any judge on responses of which you know the truth.

    Attributes:
        model: HookedTransformer, TransformerBridge, or a name or path for `load_model`. It judges with its current
            hooks and weights; `compare_arms` asks judges after it has reverted an arm, so the judge may be the untuned
            model itself.
        criterion: a verb phrase.
        opposite: a verb phrase that is true where the criterion is not; empty for yes and no.
        pairs: compare each response with its baseline, from -1 to 1, instead of scoring it alone from 0 to 1.
        form: `completion` or `multiple_choice`, see `likelihoods`; pairs always use `multiple_choice`.
        batch_size: responses per batch; it changes no score.
        name: the scorer's name in tables; made from the criterion if empty.

    Raises:
        ValueError: for an empty criterion, an unknown form, or an opposite with pairs; when called with pairs, for an
            answer without a baseline.

    Example:
        >>> judge = LogitJudge(model, "sounds happy", "sounds sad")
        >>> question = Question("How was your day?")
        >>> happy, sad = judge([Answer(question, "It was wonderful!"), Answer(question, "I cried all day.")])
        >>> 0 < sad < happy < 1
        True
        >>> judge.name
        'logit_judge_sounds_happy'

    Source: zero-shot classification by the likelihood of verbalised labels; order swap as in Zheng et al. 2023
    (arXiv:2306.05685).
    """

    model: Any = field(repr=False)
    criterion: str
    opposite: str = ""
    pairs: bool = False
    form: Form = "completion"
    batch_size: int = 16
    name: str = ""

    def __post_init__(self) -> None:
        check_criterion(self.criterion)
        check_form(self.form)
        if self.pairs and self.opposite:
            raise ValueError(
                f"opposite must be empty if pairs=True, got {self.opposite!r}. Leave it out, or set pairs=False."
            )
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
        different = [number for number, (response, baseline) in enumerate(sides) if response != baseline]
        scores = [0.0] * len(answers)  # two identical texts are a tie for every judge
        comparisons = [self._comparison(answers[number], *sides[number]) for number in different]
        for number, share in zip(different, self._shares(comparisons, "multiple_choice"), strict=True):
            scores[number] = 2 * share - 1
        return scores

    def _question(self, answer: Answer) -> Question:
        shown = f"Question: {question_shown(answer)}\nAnswer: {response_shown(answer)}\n\n"
        if self.opposite:
            return Question(f"{shown}Which is true of the answer?", (f"It {self.criterion}",), (f"It {self.opposite}",))
        return Question(f"{shown}Is it true of this answer that it {self.criterion}? Say yes or no.", ("Yes",), ("No",))

    def _comparison(self, answer: Answer, response: str, baseline: str) -> Question:
        prompt = f"{question_shown(answer)}\n\nOf which of these answers is it truer that it {self.criterion}?"
        return Question(prompt, (response,), (baseline,))

    def _shares(self, questions: Sequence[Question], form: Form) -> list[float]:
        if not questions:
            return []
        options = likelihoods(self.model, questions, form=form, batch_size=self.batch_size)
        return [option_shares(of_question)[0] for of_question in options]


def check_criterion(criterion: str) -> None:
    """Raises ValueError for an empty criterion."""
    if not criterion.strip():
        raise ValueError(
            f"criterion must complete 'the answer ...', got {criterion!r}. Give a verb phrase, as in 'sounds happy'."
        )


def judge_name(kind: str, criterion: str, pairs: bool) -> str:
    """A judge's name for tables: `logit_judge_sounds_happy`, `logit_judge_pairs_sounds_happy`."""
    return "_".join([kind, *(["pairs"] if pairs else []), *re.findall(r"\w+", criterion.lower())])


def question_shown(answer: Answer) -> str:
    """The question as a judge reads it, with its persona, which may say what a response is judged by."""
    persona, prompt = answer.question.system, answer.question.prompt
    return f"(The one who answers was told: {persona}) {prompt}" if persona else prompt


def response_shown(answer: Answer, text: str | None = None) -> str:
    """The response (or another text to the same question) as a judge reads it, with its prefill."""
    return (answer.question.prefill + (answer.text if text is None else text)).strip() or "(no answer)"


def both_sides(answer: Answer) -> tuple[str, str]:
    """The response and its baseline, as a judge reads them.

    Raises:
        ValueError: if the answer has no baseline.
    """
    if answer.baseline is None:
        raise ValueError(
            f"answers must each have a baseline to compare with, got none for {answer.question.prompt[:60]!r}. Use the "
            "judge in compare_arms, whose first arm is the baseline, or set pairs=False."
        )
    return response_shown(answer), response_shown(answer, answer.baseline)
