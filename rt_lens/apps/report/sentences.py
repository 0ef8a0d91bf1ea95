"""The findings of a run, in plain sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rt_lens.apps.report.labels import (
    Row,
    arm,
    brief,
    estimate,
    grouped,
    listed,
    of_first_scorer,
    p_value,
    sample,
    seeds,
)
from rt_lens.results.schema import checked

ALPHA = 0.05
_IN_WORDS = {
    "rep_tuned": "Representation tuning", "token_tuned": "Token tuning", "steered": "Steering",
    "steered_generated": "Steering of generated tokens", "weight_steered": "Weight steering",
    "prompted": "Prompting", "random": "A random direction", "steer_distilled": "Steering, distilled",
    "preventative": "Preventative steering", "preventative_ablated": "Tuning with the direction ablated",
    "lorra": "LoRRA", "circuit_breaker": "Circuit breaking", "dpo": "Preference tuning (DPO)",
    "bipo": "An optimised vector (BiPO)", "reft_r1": "A learned edit (ReFT)", "kl_then_steer": "KL-then-steer",
    "suppress_tuned": "Suppressing while steered",
}  # fmt: skip


def in_words(arm: str) -> str:
    """An arm as a sentence begins with it."""
    return _IN_WORDS.get(arm, arm)


def summary_sentences(results: Mapping[str, Any]) -> list[str]:
    """The findings of a run as plain text: scores, paired differences, side effects; with n, 95 % intervals, seeds.

    A set with several scorers is described by its first; the tables of the page have the others.

    Args:
        results: the content of results.json.

    Raises:
        ValueError: if a key is missing.

    Example:
        >>> from rt_lens.apps.report.sentences import summary_sentences
        >>> sentences = summary_sentences(load_results("runs/mood").content)
        >>> print(sentences[0])
        The untuned tiny scores 0... [0..., 0...] (mood, test, scored by vader; n = 24, seed 0).
        >>> sentences[-1]
        'Brackets are 95 % confidence intervals.'
    """
    parts = findings(results)
    of_sets = [sentence for sentences in parts.sets.values() for sentence in sentences]
    return [*parts.opening, *map(plain_text, [*of_sets, *parts.side_effects, *parts.notes])]


def plain_text(sentence: str) -> str:
    """With the hyphen and the apostrophe that every terminal can print."""
    return sentence.replace("−", "-").replace("–", "-").replace("’", "'")


class Findings(NamedTuple):
    """The same sentences in parts: the protocol, each set, the side effects, and notes on how to read them."""

    opening: list[str]
    sets: dict[str, list[str]]
    side_effects: list[str]
    notes: list[str]


def findings(results: Mapping[str, Any]) -> Findings:
    """The sentences of `summary_sentences`, set by set."""
    results = checked(results)
    compared, sets = of_first_scorer(results["comparisons"]), {}
    for name, rows in of_first_scorer(results["summary"]).items():
        measure = f"{results['behaviour']}, {name}, scored by {rows[0]['scorer']}"
        sentences = [
            f"The untuned {results['model']} scores {brief(row)} ({measure}; {sample(row)})."
            for row in rows
            if row["arm"] == "untuned"
        ]
        others = [row for row in rows if row["arm"] != "untuned"]
        for (direction,), direction_rows in grouped(others, "direction").items():
            means = listed(direction_rows, lambda row: f"{row['arm']} {brief(row)}")
            sentences.append(f"Scores {_setting(name, direction)}: {means}.")
        for (direction,), pairs in grouped(compared.get(name, []), "a_direction").items():
            sentences += _differences(f"Paired differences {_setting(name, direction)}", pairs)
        sets[name] = sentences
    n, corrected = len(results["comparisons"]), any(row["p_holm"] is not None for row in results["comparisons"])
    holm = [f"p-values are Holm-adjusted for all {n} comparisons of this run."] if corrected else []
    holm += holm_note(results["comparisons"])
    opening = [results["protocol"]["why"]] if results["protocol"]["why"] else []
    return Findings(opening, sets, _side_effect_sentences(results), [*holm, "Brackets are 95 % confidence intervals."])


def headline(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The arm with the largest effect on the first set, toward the behaviour and away from it; or that no arm has one.

    Returns:
        For each direction a claim, and the paired differences that support it.
    """
    rows = next(iter(of_first_scorer(results["summary"]).values()))
    untuned = next((row for row in rows if row["arm"] == "untuned" and row["mean"] is not None), None)
    claims = []
    for direction, sign in (("toward", 1), ("away", -1)):
        measured = [row for row in rows if row["direction"] == direction and row["mean"] is not None]
        if measured and untuned is not None:
            best = max(measured, key=lambda row: sign * row["mean"])
            claims.append(_claim(results, best, untuned, n_arms=len(measured), sign=sign))
    return claims


def _claim(results: Mapping[str, Any], best: Row, untuned: Row, *, n_arms: int, sign: int) -> tuple[str, str]:
    """One direction of the headline. Without a comparison with the untuned model, those with other arms support it."""
    label, untuned_label = ((row["arm"], row["direction"]) for row in (best, untuned))
    sides = [
        (row, {(row["a"], row["a_direction"]), (row["b"], row["b_direction"])})
        for row in results["comparisons"]
        if (row["set"], row["scorer"]) == (best["set"], best["scorer"])
    ]
    against_untuned = [row for row, labels in sides if labels == {label, untuned_label}]
    pairs = against_untuned or [row for row, labels in sides if label in labels]
    support = _differences("Paired differences", pairs)
    verb, score = ("raised" if sign > 0 else "lowered"), f"the {results['behaviour']} score"
    measure = f"({best['set']}; {sample(best)})"
    if sign * (best["mean"] - untuned["mean"]) > 0:
        claim = (
            f"{in_words(best['arm'])} {verb} {score} most, from {brief(untuned)} (untuned) to {brief(best)} {measure}."
        )
        claim += _verdict(against_untuned)
        # The largest of several means is partly large by chance.
        support += [f"This is the best of {n_arms} arms, so its effect is likely overestimated (selection bias)."] * (
            n_arms > 1
        )
    else:
        closest = f"{best['arm']}{f', the closest of {n_arms},' if n_arms > 1 else ''}"
        claim = f"No arm {verb} {score}: untuned {brief(untuned)}, {closest} {brief(best)} {measure}."
    return claim, " ".join(support)


def _verdict(against_untuned: Sequence[Row]) -> str:
    """A second sentence for a claim that no test supports."""
    if not against_untuned:
        return " No paired test against the untuned model was run."
    row = against_untuned[0]
    if holds(row):
        return ""
    return (
        " The difference is not significant after Holm correction."
        if shows(row)
        else " The paired test shows no significant difference."
    )


def holm_note(comparisons: Sequence[Row]) -> list[str]:
    """Why a Holm-adjusted p can look too large; nothing for a run without it or with one seed."""
    if not any(row["p_holm"] is not None and len(row["seeds"]) > 1 for row in comparisons):
        return []
    return [
        "Holm-adjusted p-values start from a t-test whose degrees of freedom are limited by the number of seeds, so "
        "they can exceed the plain p times the number of comparisons."
    ]


def _setting(name: str, direction: str) -> str:
    """`(test, toward)`: the set, and the direction if there is one."""
    return f"({name})" if direction == "none" else f"({name}, {direction})"


def holds(row: Row) -> bool:
    """Whether the difference is significant after Holm correction; before it in older runs, which have none."""
    p = row["p"] if row["p_holm"] is None else row["p_holm"]
    return p is not None and p < ALPHA


def shows(row: Row) -> bool:
    """Whether the difference is significant before Holm correction."""
    return row["p"] is not None and row["p"] < ALPHA


def _differences(heading: str, rows: Sequence[Row]) -> list[str]:
    """Sentences on significant differences, on those significant only before the correction, and on all others."""
    significant = {
        heading: [row for row in rows if holds(row)],
        f"{heading}, not significant after Holm correction": [row for row in rows if shows(row) and not holds(row)],
    }
    sentences = [f"{begin}: {listed(group, _score_difference)}." for begin, group in significant.items() if group]
    not_shown = [row for row in rows if not shows(row) and not holds(row)]
    return sentences + ([f"{heading}, no significant difference: {listed(not_shown, _minus)}."] if not_shown else [])


def _score_difference(row: Row) -> str:
    """`rep_tuned scores 0.326 [0.223, 0.442] higher than token_tuned, p < 0.001`."""
    lower = row["difference"] < 0
    size = {"difference": -row["difference"], "low": -row["high"], "high": -row["low"]} if lower else row
    than = f"{'lower' if lower else 'higher'} than {row['b']}"
    return f"{row['a']} scores {estimate(size, 'difference')} {than}, {_significance(row)}"


def _minus(row: Row) -> str:
    return f"{row['a']} minus {row['b']} {estimate(row, 'difference')}, {_significance(row)}"


def _significance(row: Row) -> str:
    corrected = "" if row["p_holm"] is None else f", Holm-adjusted p {p_value(row['p_holm'])}"
    return f"p {p_value(row['p'])}{corrected}"


def _side_effect_sentences(results: Mapping[str, Any]) -> list[str]:
    """The highest perplexity, the lowest accuracy on facts and the most repetition, each beside the untuned model's."""
    untuned = next((row for row in results["summary"] if row["arm"] == "untuned"), None)
    if untuned is None:
        return []
    others = [row for row in results["summary"] if row["arm"] != "untuned"]
    sentences = []

    def worst(column: str, choose: Callable[..., Row]) -> Row | None:
        measured = [row for row in others if row[column] is not None]
        return choose(measured, key=lambda row: row[column]) if measured and untuned[column] is not None else None

    def compared(row: Row, column: str) -> str:
        return f"{brief(row, column)} ({arm(row)}), and {brief(untuned, column)} untuned"

    if untuned["perplexity"] and (row := worst("perplexity", max)):
        # A ratio of the two would need an interval of its own, which no table has.
        bound = results["bound"]
        rule = " Multipliers were restricted to those that keep perplexity within {:g} times the untuned model’s."
        # At equal damage the strengths are set by KL, and the bound was for the choice of a layer alone.
        allowed = "" if bound is None or results["at_kl"] is not None else rule.format(bound)
        texts = f"n = {row['n_texts']} texts, {seeds(row)}"
        sentences.append(f"The highest perplexity is {compared(row, 'perplexity')} ({texts}).{allowed}")
    if row := worst("facts", min):
        n = f"n = {row['n_facts']}, {seeds(row)}"
        sentences.append(f"The lowest accuracy on facts is {compared(row, 'facts')} ({n}).")
    if row := worst("repetition", max):
        sentences.append(f"The highest repetition is {compared(row, 'repetition')} ({sample(row)}).")
    return sentences
