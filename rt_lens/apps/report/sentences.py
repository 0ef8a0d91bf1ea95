"""What a run found, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rt_lens.apps.report.labels import Row, brief, estimate, grouped, listed, of_first_scorer, p_value, sample, seeds
from rt_lens.results.schema import checked

_ALPHA = 0.05


def summary_sentences(results: Mapping[str, Any]) -> list[str]:
    """What the run found, in plain text: scores, paired differences, damage; each with n, 95 % interval and seeds.

    Of a set with several scorers the first is told; the page's tables hold the others.

    Args:
        results: the content of results.json.

    Raises:
        ValueError: if a key is missing.

    Example:
        >>> print(*summary_sentences(load_results("runs/mood").content), sep="\\n")
    """
    told = findings(results)
    return [*told.opening, *(sentence for own in told.sets.values() for sentence in own), *told.cost, *told.notes]


class Findings(NamedTuple):
    """The same sentences in their parts: of the protocol, of each set, of the damage done, and how to read them."""

    opening: list[str]
    sets: dict[str, list[str]]
    cost: list[str]
    notes: list[str]


def findings(results: Mapping[str, Any]) -> Findings:
    """What `summary_sentences` says, set by set."""
    results = checked(results)
    compared, sets = of_first_scorer(results["comparisons"]), {}
    for name, rows in of_first_scorer(results["summary"]).items():
        untuned = [row for row in rows if row["arm"] == "untuned"]
        where = f"{results['behaviour']}, {name}, scored by {rows[0]['scorer']}"
        sentences = [f"Untuned, {results['model']} scores {brief(row)} ({where}; {sample(row)})." for row in untuned]
        for (direction,), moved in grouped([row for row in rows if row["arm"] != "untuned"], "direction").items():
            means = listed(moved, lambda row: f"{row['arm']} {brief(row)}")
            sentences.append(f"{_begin(direction)}{name}: {means}.")
        for (direction,), pairs in grouped(compared.get(name, []), "a_direction").items():
            sentences += _differences(f"{_begin(direction)}{name}", pairs)
        sets[name] = sentences
    n, counted = len(results["comparisons"]), any(row["p_holm"] is not None for row in results["comparisons"])
    holm = [f"By Holm: corrected for all {n} comparisons of this run."] if counted else []
    opening = [results["protocol"]["why"]] if results["protocol"]["why"] else []
    return Findings(opening, sets, _damage_sentences(results), [*holm, "Brackets hold 95 % intervals."])


def headline(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of the first set, the arm that went furthest toward the behaviour, and away from it; or that none did.

    Returns:
        What is claimed of each direction, and the paired differences that it rests on.
    """
    rows = next(iter(of_first_scorer(results["summary"]).values()))
    untuned = next((row for row in rows if row["arm"] == "untuned" and row["mean"] is not None), None)
    told = []
    for direction, sign in (("toward", 1), ("away", -1)):
        own = [row for row in rows if row["direction"] == direction and row["mean"] is not None]
        if own and untuned is not None:
            best = max(own, key=lambda row: sign * row["mean"])
            moved = sign * (best["mean"] - untuned["mean"]) > 0
            told.append(_furthest(best, untuned, len(own), results["comparisons"], moved=moved))
    return told


def _furthest(best: Row, untuned: Row, n_arms: int, comparisons: Sequence[Row], *, moved: bool) -> tuple[str, str]:
    """One direction of the headline; without a comparison with the untuned model those with other arms are told."""
    mine, theirs = ((row["arm"], row["direction"]) for row in (best, untuned))
    sides = [
        (row, {(row["a"], row["a_direction"]), (row["b"], row["b_direction"])})
        for row in comparisons
        if (row["set"], row["scorer"]) == (best["set"], best["scorer"])
    ]
    against_untuned = [row for row, labels in sides if labels == {mine, theirs}]
    pairs = against_untuned or [row for row, labels in sides if mine in labels]
    where = f"({best['set']}; {sample(best)})"
    if moved:
        verdict = _verdict(against_untuned)
        claim = (
            f"Furthest {best['direction']} went {best['arm']}: from {brief(untuned)} untuned to {brief(best)} {where}"
        )
        claim += f", {verdict}." if verdict else "."
    else:
        nearest = f"{best['arm']}{f', the nearest of {n_arms},' if n_arms > 1 else ''}"
        claim = f"No arm went {best['direction']}: untuned {brief(untuned)}, {nearest} {brief(best)} {where}."
    # The largest of several means is large by luck too.
    picked = [f"Picked for its mean, the best of {n_arms} arms: that flatters it."] if moved and n_arms > 1 else []
    return claim, " ".join([*_differences("In pairs", pairs), *picked])


def _verdict(against_untuned: Sequence[Row]) -> str:
    """What to add to a claim that a test does not bear out."""
    if not against_untuned:
        return "not compared with untuned in pairs"
    row = against_untuned[0]
    return "" if holds(row) else "a difference shown only taken alone" if shows(row) else "no difference shown"


def _begin(direction: str) -> str:
    return "" if direction == "none" else f"{direction.capitalize()}, "


def holds(row: Row) -> bool:
    """Whether the difference stands after Holm's correction; in older runs, which have none, before it."""
    p = row["p"] if row["p_holm"] is None else row["p_holm"]
    return p is not None and p < _ALPHA


def shows(row: Row) -> bool:
    """Whether the difference stands by itself, as if nothing else had been compared."""
    return row["p"] is not None and row["p"] < _ALPHA


def _differences(where: str, rows: Sequence[Row]) -> list[str]:
    """A sentence of what holds, one of what holds only by itself, and one of what is not shown."""
    kinds = {
        where: [row for row in rows if holds(row)],
        f"{where}, only taken alone": [row for row in rows if shows(row) and not holds(row)],
        f"{where}, no difference shown": [row for row in rows if not shows(row) and not holds(row)],
    }
    *shown, quiet = kinds
    sentences = [f"{kind}: {listed(kinds[kind], _beats)}." for kind in shown if kinds[kind]]
    return sentences + ([f"{quiet}: {listed(kinds[quiet], _minus)}."] if kinds[quiet] else [])


def _beats(row: Row) -> str:
    """`rep_tuned scores 0.326 [0.223, 0.442] higher than token_tuned, p < 0.001`."""
    lower = row["difference"] < 0
    turned = {"difference": -row["difference"], "low": -row["high"], "high": -row["low"]} if lower else row
    than = f"{'lower' if lower else 'higher'} than {row['b']}"
    return f"{row['a']} scores {estimate(turned, 'difference')} {than}, {_significance(row)}"


def _minus(row: Row) -> str:
    return f"{row['a']} minus {row['b']} {estimate(row, 'difference')}, {_significance(row)}"


def _significance(row: Row) -> str:
    corrected = "" if row["p_holm"] is None else f" (by Holm {p_value(row['p_holm'])})"
    return f"p {p_value(row['p'])}{corrected}"


def _damage_sentences(results: Mapping[str, Any]) -> list[str]:
    """The worst perplexity, the fewest facts kept and the most repetition, each against the untuned model's."""
    untuned = next((row for row in results["summary"] if row["arm"] == "untuned"), None)
    moved = [row for row in results["summary"] if row["arm"] != "untuned"]
    sentences = []
    priced = [row for row in moved if row["perplexity"] is not None]
    if untuned and untuned["perplexity"] and priced:
        worst = max(priced, key=lambda row: row["perplexity"])
        # A ratio of the two would need an interval of its own, which no table has.
        bound = results["bound"]
        allowed = "" if bound is None else f" Doses were chosen among those of at most {bound:g} times the untuned."
        measured = f"{worst['arm']} {worst['direction']} {brief(worst, 'perplexity')}"
        texts = f"n = {worst['n_texts']} texts, {seeds(worst)}"
        sentences.append(f"Highest perplexity: {measured}, untuned {brief(untuned, 'perplexity')} ({texts}).{allowed}")
    asked = [row for row in moved if row["facts"] is not None]
    if untuned and untuned["facts"] is not None and asked:
        least = min(asked, key=lambda row: row["facts"])
        measured = f"{least['arm']} {least['direction']} {brief(least, 'facts')}"
        sentences.append(
            f"Fewest facts kept: {measured}, untuned {brief(untuned, 'facts')} "
            f"(n = {least['n_facts']}, {seeds(least)})."
        )
    wrote = [row for row in moved if row["repetition"] is not None]
    if untuned and untuned["repetition"] is not None and wrote:
        most = max(wrote, key=lambda row: row["repetition"])
        measured = f"{most['arm']} {most['direction']} {brief(most, 'repetition')}"
        sentences.append(f"Most repetition: {measured}, untuned {brief(untuned, 'repetition')} ({sample(most)}).")
    return sentences
