"""What helps or hurts a behaviour before a run: its texts, its split, its scorer, and the untuned model's responses.

Nothing here sees a response to a test topic: `check_behaviour` reads the texts alone, and `measure_behaviour` asks
topics of the validation and training parts.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rt_lens.common.formatting import estimate, number, p_value
from rt_lens.common.statistics.comparisons import Comparison, paired_comparison
from rt_lens.common.statistics.power import detectable, prompts_for_effect
from rt_lens.data.builtin import neutral_prompts
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.data.questions import Answer, Question
from rt_lens.evaluation.registry import unmade_scorer
from rt_lens.evaluation.scorers import Lexicon, OfText, Pattern, is_share
from rt_lens.evaluation.tasks import Evaluation
from rt_lens.experiment.config import DIRECTIONS, Experiment
from rt_lens.experiment.heeding import N_TOPICS, PersonaEffect, direction_of, measure_personas
from rt_lens.experiment.plan import duration, gigabytes, plan_of
from rt_lens.experiment.protocols import answers_protocol, calibrate, family_of, test_topics
from rt_lens.experiment.shape import shape_of
from rt_lens.models.protocol import Model

Verdict: TypeAlias = Literal["ok", "warning", "error"]
"""`error`: a run would refuse it. `warning`: a run takes it, and its results show less, or something else."""

_FEW_PERSONAS = 8
_LARGE = 0.8  # Cohen's (1988) large difference, in standard deviations
_CONFOUNDED = 0.64  # AUC of a medium difference (0.5 standard deviations) between two normal distributions
_OF_WORDS = {"vader", "lexicon", "pattern"}
_OF_A_MODEL = {"logit_judge", "endpoint_judge", "classifier"}


@dataclass(frozen=True)
class Finding:
    """One thing that helps or hurts a behaviour.

    Attributes:
        verdict: `ok`, `warning` or `error`.
        subject: what it is about, in a word or two.
        text: what was found.
        fix: how to mend it; empty where nothing needs to be.

    Example:
        >>> print(Finding("warning", "topics", "'Rain?' occurs 2 times.", "Keep one."))
        warning  topics    'Rain?' occurs 2 times. Keep one.
    """

    verdict: Verdict
    subject: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:<9}{self.subject:<10}{self.text} {self.fix}".rstrip()


def check_behaviour(experiment: Experiment) -> list[Finding]:
    """Checks a behaviour's texts, split and scorer, and estimates the time of a run. It loads no weights.

    Args:
        experiment: from `load_experiment`.

    Returns:
        Findings about the personas (number, length, wording), topics, prefills, split, power of the test, scorer and
        time. One with the verdict `error` is a reason for which `run_experiment` would refuse the behaviour.

    Example:
        >>> findings = check_behaviour(load_experiment("mood"))
        >>> {finding.subject: finding.verdict for finding in findings}["length"]
        'ok'
        >>> any(finding.verdict == "error" for finding in findings)
        False
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            parts = family_of(experiment).parts()
        except ValueError as error:
            return [*_of_texts(experiment), Finding("error", "split", str(error))]
    findings = [*_of_texts(experiment), _split(experiment, parts)]
    findings += [Finding("warning", "split", str(warning.message).removeprefix("split: ")) for warning in caught]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the split's, again
        return [*findings, *_of_run(experiment)]


def _of_texts(experiment: Experiment) -> list[Finding]:
    """Findings about personas, topics and prefills; none for honesty, whose texts are built in."""
    if experiment.honesty is not None:
        return []
    pairs = experiment.pairs
    personas = list(dict.fromkeys((pair.positive, pair.negative) for pair in pairs.pairs))
    prefills = [text for text in dict.fromkeys(pair.prefill for pair in pairs.pairs) if text]
    positive, negative = ([pair[side] for pair in personas] for side in (0, 1))
    return [
        _personas(personas), _length(positive, negative), *_on_both_sides(positive, negative),
        *_repeated("positive", positive), *_repeated("negative", negative), *_repeated_pairs(pairs),
        *_repeated("prefills", prefills), *_repeated("topics", pairs.topics), *_neutral(pairs.topics),
        *_scored(experiment, {"topics": pairs.topics, "prefills": prefills}, positive, negative),
    ]  # fmt: skip


def _of_run(experiment: Experiment) -> list[Finding]:
    """Findings about the test and the time of a run."""
    if experiment.honesty is None:
        try:
            answers_protocol(experiment.unmade())
        except ValueError as error:
            return [Finding("error", "test", str(error))]
    power = [_power(experiment, len(test_topics(experiment)))] if experiment.honesty is None else []
    return [*power, _time(experiment)]


def _personas(personas: Sequence[tuple[str, str]]) -> Finding:
    n = len(personas)
    text = f"{n} positive and {n} negative personas, in pairs."
    more = f"Write at least {_FEW_PERSONAS} pairs, each in other words."
    if n < 3:
        shared = "Fewer than 3 pairs cannot be split, so the direction is validated on the wording it was found with."
        return Finding("warning", "personas", f"{text} {shared}", more)
    if n < _FEW_PERSONAS:
        return Finding("warning", "personas", f"{text} A direction from so few also holds their wording.", more)
    return Finding("ok", "personas", text)


def _repeated(subject: str, texts: Sequence[str]) -> list[Finding]:
    """Texts of one list that are the same up to case and punctuation."""
    alike: dict[str, list[str]] = {}
    for text in texts:
        alike.setdefault(_plain(text), []).append(text)
    groups = [group for group in alike.values() if len(group) > 1]
    if not groups:
        return []
    example = " and ".join(map(_quoted, dict.fromkeys(groups[0])))
    same = "is there more than once" if len(set(groups[0])) == 1 else "are the same but for case and punctuation"
    more = f" ({len(groups)} such cases)" if groups[1:] else ""
    why = " They can fall to training and test at once." if subject == "topics" else ""
    return [Finding("warning", subject, f"{example} {same}{more}.{why}", "Keep one of them.")]


def _repeated_pairs(pairs: ContrastPairs) -> list[Finding]:
    """Pairs that occur more than once: a text is twice in its list."""
    n_repeated = len(pairs) - len(set(pairs.pairs))
    if not n_repeated:
        return []
    fields = {
        "personas": Counter(pair.positive for pair in pairs.pairs), "topics": Counter(p.user for p in pairs.pairs),
        "prefills": Counter(pair.prefill for pair in pairs.pairs),
    }  # fmt: skip
    often = [
        f"{_quoted(text)} ({subject})"
        for subject, counts in fields.items()
        for text, count in counts.items()
        if count > min(counts.values())
    ]
    what = f": {', '.join(often[:3])}" if often else ""
    return [
        Finding("warning", "pairs", f"{n_repeated:,} of {len(pairs):,} pairs are copies{what}.", "Keep each text once.")
    ]


def _on_both_sides(positive: Sequence[str], negative: Sequence[str]) -> list[Finding]:
    if list(positive) == list(negative):
        text = "Each positive persona is the same as its negative one, so there is no direction."
        return [Finding("error", "personas", text, "Write the opposites as negative personas.")]
    opposite = set(map(_plain, negative))
    both = [text for text in positive if _plain(text) in opposite]
    if not both:
        return []
    text = f"{_some(both)} {_are(both)} on both sides, and cancel the behaviour there."
    return [Finding("warning", "personas", text, "Rewrite one side.")]


def _neutral(topics: Sequence[str]) -> list[Finding]:
    neutral = set(map(_plain, neutral_prompts()))
    both = [topic for topic in topics if _plain(topic) in neutral]
    if not both:
        return []
    text = f"{_some(both)} {_are(both)} among the neutral prompts, on which tuning keeps the model as it is."
    return [Finding("warning", "topics", text, "Choose other topics.")]


def _length(positive: Sequence[str], negative: Sequence[str]) -> Finding:
    """Whether the personas of one side are longer, so that the direction could be that of length."""
    longer, shorter = ([len(text.split()) for text in side] for side in (positive, negative))
    auc = sum((a > b) + 0.5 * (a == b) for a in longer for b in shorter) / (len(longer) * len(shorter))
    means = sum(longer) / len(longer), sum(shorter) / len(shorter)
    n, difference, low, high, *_ = paired_comparison(longer, shorter)
    text = (
        f"Positive personas have {means[0]:.1f} words and negative ones {means[1]:.1f}: difference "
        f"{estimate(difference, low, high, 1)} (n = {n} pairs, seed 0), AUC {number(auc, 2)}."
    )
    shown = low > 0 or high < 0 or (math.isnan(low) and difference != 0)
    if shown and max(auc, 1 - auc) >= _CONFOUNDED:
        return Finding(
            "warning",
            "length",
            f"{text} The direction can mean length.",
            "Give both sides as many words, pair by pair.",
        )
    return Finding("ok", "length", text)


def _scored(
    experiment: Experiment, lists: dict[str, list[str]], positive: Sequence[str], negative: Sequence[str]
) -> list[Finding]:
    """Whether the scorer counts words that come with the prompt and not with the persona."""
    scorer = unmade_scorer(experiment.scorer)
    if scorer.name in _OF_WORDS:
        scorer = experiment.made_scorer
    if not isinstance(scorer, OfText):
        why = "needs a model or a service" if scorer.name in _OF_A_MODEL else "counts no words of its own"
        return [Finding("ok", "scorer", f"'{scorer.name}' {why}, and is not tried on the texts.")]
    if is_share(scorer) and scorer.score(""):
        text = f"'{scorer.name}' counts an empty response, and so every response."
        return [Finding("warning", "scorer", text, "Change the expression.")]
    findings = []
    for subject, texts in lists.items():
        counted = _counted(scorer, texts)
        if counted:
            text = f"'{scorer.name}' itself counts {len(counted)} of {len(texts)} {subject}, such as {_some(counted)}"
            text += f"{_matched(scorer, counted)}."
            why = "A response that repeats them scores without the behaviour."
            findings.append(Finding("warning", subject, f"{text} {why}", "Word them without what the scorer counts."))
    quoted = (
        f"'{scorer.name}' counts {len(_counted(scorer, positive))} of {len(positive)} positive and "
        f"{len(_counted(scorer, negative))} of {len(negative)} negative personas: a response that quotes one of them "
        "scores."
    )
    if not findings:
        quoted = f"'{scorer.name}' counts no topic and no prefill. {quoted[0].upper() + quoted[1:]}"
    return [*findings, Finding("ok", "scorer", quoted)]


def _counted(scorer: OfText, texts: Sequence[str]) -> list[str]:
    """The texts that do not score as an empty text does."""
    empty, *scores = scorer([Answer(Question("?"), text) for text in ("", *texts)])
    return [text for text, score in zip(texts, scores, strict=True) if score != empty]


def _matched(scorer: OfText, texts: Sequence[str]) -> str:
    """What a word list or an expression finds in the texts, the most frequent first."""
    if not isinstance(scorer.score, Lexicon | Pattern):
        return ""
    found = Counter(match.lower() for text in texts for match in scorer.score.matches(text) if match.strip())
    return f" (for {_some([match for match, _ in found.most_common()])})" if found else ""


def _split(experiment: Experiment, parts: Sequence[ContrastPairs]) -> Finding:
    """How many topics each part has."""
    train, validation, test = (len(part.topics) for part in parts)
    n_pairs, wanted = sum(map(len, parts)), experiment.choose.n_prompts
    fresh = f" The test asks {len(experiment.test.topics)} other topics." if experiment.test.topics else ""
    asked = f", of which {experiment.test.n_prompts} are asked" if experiment.test.n_prompts < test else ""
    text = (
        f"{train + validation + test} topics: {train} for training, {validation} for validation, {test} for the "
        f"test{asked if experiment.honesty is None and not fresh else ''}.{fresh} "
    )
    if left_out := getattr(parts, "left_out", 0):
        text += (
            f"{left_out:,} of {left_out + n_pairs:,} pairs are left out, so that parts share no persona or prefill. "
        )
    text += f"Vectors are made of {min(len(parts[0]), experiment.extract.n_pairs)} training pairs."
    if validation < wanted and experiment.honesty is None:
        few = f"choose.n_prompts = {wanted}, but layer and multiplier are chosen on {validation} validation topics."
        return Finding("warning", "split", f"{text} {few}", "Give more topics, or a larger share to validation.")
    return Finding("ok", "split", text)


def _power(experiment: Experiment, n_topics: int) -> Finding:
    """What difference the test can show, and how many topics a medium one needs."""
    n, split = min(n_topics, experiment.test.n_prompts), experiment.split
    needed = [prompts_for_effect(0.5, power) for power in (0.8, 0.9)]
    in_all = [math.ceil(prompts / (1 - split.train - split.validation)) for prompts in needed]
    fix = (
        f"A medium difference (0.5) needs {needed[0]} test topics for a power of 0.8 and {needed[1]} for 0.9: "
        f"{in_all[0]} and {in_all[1]} topics in all at these shares."
    )
    arms = experiment.arms
    against_rep = len(arms) - 1 if "rep_tuned" in arms else 0
    n_compared = len(DIRECTIONS) * (len(arms) + against_rep)  # at most: an arm without a strength has one less
    if 2 * n_compared / 2**n > 0.05:  # the smallest p of a sign-flip test, after Holm's correction
        text = f"With {n} test topics, no difference of two arms can be significant after Holm's correction."
        return Finding("warning", "power", text, fix)
    size = detectable(n, 1.0)
    text = (
        f"With {n} test topics, two arms must differ by {size:.2f} standard deviations of the paired differences for a "
        "power of 0.8 (before Holm's correction)."
    )
    if is_share(unmade_scorer(experiment.scorer)) or unmade_scorer(experiment.scorer).name == "pattern":
        text += f" That is a share of {size * math.sqrt(0.5):.2f} if they differ on half of the topics."
    return Finding("warning" if size > _LARGE else "ok", "power", text, fix)


def _time(experiment: Experiment) -> Finding:
    """How long a run takes here, and whether it fits into memory."""
    try:
        shape_of(experiment.model)
    except (OSError, ValueError) as error:  # a run may still know the model, from the hub
        return Finding("warning", "time", f"Not estimated: {error}", "A run may still load it; try --measure first.")
    try:
        plan = plan_of(experiment)
    except ValueError as error:
        return Finding("error", "settings", str(error))
    stage, need = plan.peak(plan.here)
    text = (
        f"About {duration(sum(plan.seconds(plan.here).values()))} on this machine, with at most {gigabytes(need)} of "
        f"memory (in {stage}), by estimate."
    )
    if plan.here.memory and need > plan.here.memory:
        text += f" That is more than its {gigabytes(plan.here.memory)}."
        return Finding("warning", "time", text, "rt-lens run --plan says which setting lowers it.")
    return Finding("ok", "time", text)


def measure_behaviour(experiment: Experiment, model: Model, n_topics: int = N_TOPICS) -> list[Finding]:
    """Asks topics without a persona and with those of each side: does the score have room, and does it move?

    Args:
        experiment: of the behaviour. Honesty is measured as a run measures it before its test.
        model: the untuned model.
        n_topics: the largest number of topics to ask, each three times. They are of the validation part, and of the
            training part where these are too few; never of the test.

    Returns:
        Whether the personas move the score comes first. Numbers have their n, a 95 % interval and the seed.

    Example:
        >>> findings = measure_behaviour(load_experiment("mood"), model, n_topics=3)
        >>> [finding.subject for finding in findings]
        ['personas', 'positive', 'negative', 'untuned']
    """
    try:
        if experiment.honesty is not None:
            _, _, why = calibrate(experiment.honesty, model, experiment.split.seed)
            return [Finding("ok", "protocol", why)]
        effect = measure_personas(experiment, model, n_topics)
    except ValueError as error:
        return [Finding("error", "scorer", str(error))]
    untuned, positive, negative = effect.untuned, effect.positive, effect.negative
    if effect.alike:
        return [_constant(untuned)]
    return [
        _between_sides(effect.between, positive, negative),
        _of_side("positive", effect.compared(positive, untuned), positive, untuned),
        _of_side("negative", effect.compared(negative, untuned), negative, untuned),
        _room(effect),
    ]


def _constant(untuned: Evaluation) -> Finding:
    n, score = len(untuned.scores), number(untuned.scores[0], 2)
    text = (
        f"The scorer '{untuned.scorer}' gives {score} to all {3 * n} responses, with the positive personas, with the "
        f"negative ones and without (n = {n} topics each, seed {untuned.seed}). A run would show nothing. "
        f"A response: {_quoted(untuned.responses[0])}."
    )
    return Finding("warning", "scorer", text, "Change the scorer, or the personas, until the score differs.")


def _between_sides(comparison: Comparison, positive: Evaluation, negative: Evaluation) -> Finding:
    text = f"positive minus negative is {_difference(comparison, positive.seed)}."
    means = f" The means are {number(positive.interval.mean, 2)} and {number(negative.interval.mean, 2)}."
    if direction_of(comparison) > 0:
        return Finding("ok", "personas", f"The personas move the score: {text}{means}")
    if direction_of(comparison) < 0:
        fix = "Exchange the lists `positive` and `negative`, or turn the scorer round."
        return Finding("warning", "personas", f"The personas move the score the wrong way: {text}{means}", fix)
    fix = "Name the behaviour in plainer words in each persona, read the responses below, or take a larger model."
    return Finding("warning", "personas", f"The model ignores these personas, as far as the score shows: {text}", fix)


def _of_side(side: str, comparison: Comparison, personas: Evaluation, untuned: Evaluation) -> Finding:
    expected = 1 if side == "positive" else -1
    text = (
        f"With them the score goes from {number(untuned.interval.mean, 2)} to {number(personas.interval.mean, 2)}: "
        f"difference {_difference(comparison, untuned.seed)}. A response: {_quoted(personas.responses[0])}."
    )
    if direction_of(comparison) == expected:
        return Finding("ok", side, text)
    direction, way = ("toward", "up") if expected > 0 else ("away", "down")
    fix = f"Tuning {direction!r} learns from such responses; make these personas more explicit."
    return Finding("warning", side, f"These personas are not shown to move the score {way}. {text}", fix)


def _room(effect: PersonaEffect) -> Finding:
    """Whether the untuned score can go both ways."""
    untuned = effect.untuned
    scores, (n, mean, low, high) = untuned.scores, untuned.interval
    alike = ", the same for all, so without an interval" if len(set(scores)) == 1 else ""
    text = (
        f"Without a persona the score is {estimate(mean, low, high, 2)}{alike} (n = {n} topics, seed {untuned.seed})."
    )
    if effect.end:
        direction = "away" if effect.end == "low" else "toward"
        found = (
            f"{effect.n_at_end} of {n} responses are at the {effect.end} end of the scale, so {direction!r} has no "
            "room."
        )
        fix = f"Read the other direction alone, or choose topics and a scorer with room for {direction!r}."
        return Finding("warning", "untuned", f"{text} {found}", fix)
    least, most = effect.range or (math.nan, math.nan)
    if alike and not least < mean < most:
        return Finding("warning", "untuned", text, "Check that the scorer counts what responses contain.")
    room = " Both directions have room." if least < mean < most else ""
    return Finding("ok", "untuned", f"{text}{room}")


def _difference(comparison: Comparison, seed: int) -> str:
    n, difference, low, high, p, _ = comparison
    return f"{estimate(difference, low, high, 2)} (n = {n} topics, seed {seed}, p {p_value(p)})"


def _plain(text: str) -> str:
    """A text without case and punctuation; itself if it is little else, as the prefill `1.`."""
    return " ".join(re.findall(r"\w+", text.casefold())) if sum(map(str.isalpha, text)) > 1 else text


def _quoted(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= most else f"{text[:most].rstrip()} ...")


def _some(texts: Iterable[str], most: int = 3) -> str:
    texts = list(texts)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(map(_quoted, texts[:most])) + more


def _are(texts: Sequence[str]) -> str:
    return "is" if len(texts) == 1 else "are"
