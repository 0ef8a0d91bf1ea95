"""The first screen of the page: effect against damage in one picture, and in some sentences what was found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from rt_lens import plots
from rt_lens.apps.report.labels import Row, brief, estimate, joined, of_first_scorer, p_value, said, sample
from rt_lens.apps.report.markup import Part, boxed, chart, items
from rt_lens.apps.report.sentences import ALPHA, holds, in_words, plain_text, summary_sentences
from rt_lens.results.persona_effect import persona_warnings

_SIGNS = {"toward": 1, "away": -1}
_CURVES = 8
"""As many curves can be told apart in one picture."""


def notice(results: Mapping[str, Any]) -> list[Part]:
    """What stands before the picture: that the personas or the scorer leave a run little to show; nothing elsewhere."""
    found = persona_warnings(results["persona_effect"])
    return [Part("Read this first", items(found))] if found else []


def opening(results: Mapping[str, Any], responses: Sequence[Row]) -> list[Part]:
    """The picture, the sentences beside it, and one prompt answered by every arm; nothing for a run without at_kl."""
    at_kl = results["at_kl"]
    if at_kl is None:
        return []
    figure = picture(results)
    drawn = chart("at-kl", figure) if figure else f"<p>{no_picture(at_kl)}</p>"
    answered = [Part("One prompt, every arm", _same_prompt(responses, at_kl["arms"]))] if responses else []
    curves = [Part("Effect against KL, as curves", chart("at-kl-curves", _curves(at_kl)))] if _is_ranked(at_kl) else []
    return [
        Part("Which arm moves the behaviour most?", drawn),
        Part("What was found", items([*verdict(results), searched(results), sureness(results)])),
        *answered,
        *curves,
    ]


def picture(results: Mapping[str, Any], budget: float | None = None) -> go.Figure | None:
    """Effect against KL by the first set and scorer, with a budget marked; None if no arm reached a budget.

    With more arms than one can tell apart as curves, all at that budget (the stated one), sorted.
    """
    at_kl = results["at_kl"]
    rows = first_rows(at_kl["table"])
    if all(row["budget"] is None for row in rows):
        return None
    title, one = f"{results['behaviour']}: effect at equal damage", at_kl["stated"] if budget is None else budget
    if _is_ranked(at_kl, one):
        return plots.arms_at_kl(rows, one, title=title)
    return _curves(at_kl, budget, title)


def _curves(at_kl: Mapping[str, Any], budget: float | None = None, title: str = "Effect at equal damage") -> go.Figure:
    gaps = [row for row in at_kl["strengths"] if row["reason"]]
    return plots.effect_at_kl(first_rows(at_kl["table"]), gaps, budget=budget, title=title)


def _is_ranked(at_kl: Mapping[str, Any], budget: float | None = None) -> bool:
    """Whether a run has more arms at a budget (the stated one) than one can tell apart as curves."""
    one = at_kl["stated"] if budget is None else budget
    reached = {row["arm"] for row in first_rows(at_kl["table"]) if row["budget"] == one}
    return len(at_kl["arms"]) > _CURVES and bool(reached)


def no_picture(at_kl: Mapping[str, Any]) -> str:
    """Why there is none."""
    missed = any(row["reason"] for row in at_kl["strengths"])
    return "No arm reached a budget." if missed else "No arm has a strength to set; each stands at its own KL."


def spoken(results: Mapping[str, Any]) -> list[str]:
    """The sentences of the first screen for a terminal; those of all tables for a run without at_kl."""
    if results["at_kl"] is None:
        return summary_sentences(results)
    found = [*persona_warnings(results["persona_effect"]), *verdict(results), searched(results), sureness(results)]
    return [plain_text(sentence) for sentence in found]


def first_rows(table: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of the first set and scorer."""
    first = table[0]
    return [dict(row) for row in table if (row["set"], row["scorer"]) == (first["set"], first["scorer"])]


def without_strength(at_kl: Mapping[str, Any]) -> set[str]:
    """The arms that are measured as they are, at their own KL."""
    with_budget = {row["arm"] for row in at_kl["table"] if row["budget"] is not None}
    return {row["arm"] for row in at_kl["table"] if row["direction"] != "none"} - with_budget


def verdict(results: Mapping[str, Any]) -> list[str]:
    """For each direction the arm that moved the score most at the stated KL and by how much; then what it cost.

    Args:
        results: the content of results.json, with `at_kl`.
    """
    at_kl = results["at_kl"]
    rows = next(iter(of_first_scorer(results["summary"]).values()))
    untuned = next(row for row in rows if row["arm"] == "untuned")
    alone = without_strength(at_kl)
    sentences: list[str] = []
    for direction, sign in _SIGNS.items():
        measured = [row for row in rows if row["direction"] == direction and row["mean"] is not None]
        equal = [row for row in measured if row["arm"] not in alone]
        if equal:
            best = max(equal, key=lambda row: sign * row["mean"])
            sentences += _most(results, best, untuned, equal, sign)
        sentences += [_as_it_is(row) for row in measured if row["arm"] in alone]
    return sentences + gap_sentences(at_kl, at_kl["stated"])


def gap_sentences(at_kl: Mapping[str, Any], budget: float) -> list[str]:
    """The arms that do not reach a budget, with the reason."""
    gaps = {(row["arm"], row["direction"]): row["reason"] for row in _missed(at_kl, budget)}
    return [f"{arm} ({way}) does not reach that KL: {reason}" for (arm, way), reason in gaps.items()]


def _missed(at_kl: Mapping[str, Any], budget: float) -> list[Row]:
    return [row for row in at_kl["strengths"] if row["reason"] and row["budget"] == budget]


def sureness(results: Mapping[str, Any]) -> str:
    """One line on how sure one may be: the comparisons stated in advance, and the control."""
    rows = of_first_scorer(results["comparisons"])
    of_set = next(iter(rows.values()), [])
    n, held = len(results["comparisons"]), sum(map(holds, results["comparisons"]))
    line = (
        f"How sure: {held} of the {n} comparisons that were stated before the run hold after Holm's correction"
        if n
        else "How sure: no comparison could be made"
    )
    line += f" ({_held(results['comparisons'])})" if held else ""
    missed = _missed(results["at_kl"], results["at_kl"]["stated"])
    line += f"{'; arms that miss the KL are in none of them. ' if missed else '. '}{_too_few(results['comparisons'])}"
    controls = [row for row in of_set if (row["a"], row["b"]) == ("random", "untuned")]
    for row in controls:
        moved = "moves" if holds(row) else "is not shown to move"
        line += f"A random direction {moved} the score ({row['a_direction']}, {estimate(row, 'difference')}). "
    dash = "; [–] where all values are the same" if "[–]" in "".join([line, *verdict(results)]) else ""
    return f"{line}Brackets are 95 % confidence intervals{dash}."


def _held(comparisons: Sequence[Row]) -> str:
    """Which comparisons hold: `toward: rep_tuned against steered and untuned; away: steered against untuned`."""
    by_way: dict[str, dict[str, list[str]]] = {}
    for row in filter(holds, comparisons):
        by_way.setdefault(row["a_direction"], {}).setdefault(row["a"], []).append(row["b"])
    return "; ".join(
        f"{way}: " + ", ".join(f"{arm} against {joined(dict.fromkeys(others))}" for arm, others in by_arm.items())
        for way, by_arm in by_way.items()
    )


def _too_few(comparisons: Sequence[Row]) -> str:
    """That so few prompts cannot show a difference, whatever it is: a sign-flip test's p is 2 in 2^n at least."""
    if not comparisons or any(len(row["seeds"]) > 1 for row in comparisons):
        return ""
    n = max(row["n"] for row in comparisons)
    return f"With so few prompts (n = {n}) none of them could. " if 2 * len(comparisons) / 2**n >= ALPHA else ""


def searched(results: Mapping[str, Any]) -> str:
    """One line on where the arms' settings come from."""
    search = results["search"]
    if search is None:
        record = results.get("reproducibility") or {}
        own = ((record.get("settings") or {}).get("settings") or {}).keys() & results["at_kl"]["arms"].keys()
        file = record.get("file") or "the experiment"
        found = f", where {joined(sorted(own))} have [settings] of their own" if own else ""
        return f"Settings: those of {file}{found}; no search in this run."
    n_arms = len({row["arm"] for row in search["table"]})
    return (
        f"Settings: searched before the test, with {search['trials']} trials for each of {n_arms} arms, on validation "
        f"prompts alone (seed {search['seed']})."
    )


def _most(results: Mapping[str, Any], best: Row, untuned: Row, equal: Sequence[Row], sign: int) -> Iterator[str]:
    stated, direction = results["at_kl"]["stated"], best["direction"]
    where = f"{direction.capitalize()}, at a KL of {stated:g} nats per token:"
    if sign * (best["mean"] - untuned["mean"]) <= 0:
        arms = sorted({row["arm"] for row in equal})
        missed = any(row["direction"] == direction for row in _missed(results["at_kl"], stated))
        none = f"none of the arms that reach it ({joined(arms)}) moves" if missed else "no arm moves"
        yield f"{where} {none} the score that way; untuned {brief(untuned)} ({sample(untuned)})."
        return
    others = sorted((row for row in equal if row is not best), key=lambda row: -sign * row["mean"])
    yield (
        f"{where} {in_words(best['arm']).lower()} moves the score most, from {brief(untuned)} (untuned) to "
        f"{brief(best)} ({sample(best)}).{_further(results, best, others)}"
    )
    yield from _cost(results, best, untuned)


def _further(results: Mapping[str, Any], best: Row, others: Sequence[Row]) -> str:
    """By how much the best arm is ahead of the next, or of the untuned model where it was compared with that alone."""
    label = (best["arm"], best["direction"])
    for other in [*others[:1], {"arm": "untuned", "direction": "none"}]:
        pair = {label, (other["arm"], other["direction"])}
        for row in results["comparisons"]:
            sides = {(row["a"], row["a_direction"]), (row["b"], row["b_direction"])}
            if sides == pair and (row["set"], row["scorer"]) == (best["set"], best["scorer"]):
                p = row["p"] if row["p_holm"] is None else row["p_holm"]
                hold = "" if holds(row) else ": not shown to hold after that correction, which the bracket is without"
                name = other["arm"] if other["arm"] == "untuned" else f"{other['arm']}, the next at that KL"
                return f" That is {_size(row)} further than {name} (Holm-adjusted p {p_value(p)}{hold})."
    return ""


def _size(row: Row) -> str:
    """The size of a difference with its interval, whichever arm is ahead."""
    if row["difference"] is not None and row["difference"] < 0:
        row = {"difference": -row["difference"], "low": -row["high"], "high": -row["low"]}
    return estimate(row, "difference")


def _cost(results: Mapping[str, Any], best: Row, untuned: Row) -> Iterator[str]:
    """Side effects of the arm beside the untuned model's, and KL on the behaviour's own prompts."""
    names = (("repetition", "repetition"), ("facts", f"facts right, of {best['n_facts']},"))
    parts = [
        f"{name} {brief(best, column)} (untuned {brief(untuned, column)})"
        for column, name in names
        if best[column] is not None and untuned[column] is not None
    ]
    stated = results["at_kl"]["stated"]
    own = [
        row
        for row in results["at_kl"]["strengths"]
        if (row["arm"], row["direction"], row["budget"]) == (best["arm"], best["direction"], stated)
        and row["own_kl"] is not None
    ]
    if own:
        mean = sum(row["own_kl"] for row in own) / len(own)
        by_seed = ", ".join(f"seed {row['seed']}: {estimate(row, 'own_kl')}" for row in own)
        parts.append(
            f"KL {mean:.3f} on the behaviour's own prompts, which the budget does not limit ({by_seed}; "
            f"n = {own[0]['n_own']} responses)"
        )
    if parts:
        arm = f"{in_words(best['arm']).lower()} ({best['direction']})"
        yield f"What else {arm} changes there: {', '.join(parts)}."


def _as_it_is(row: Row) -> str:
    kl = f" at a KL of {estimate(row, 'kl')}" if row["kl"] is not None else ""
    return (
        f"{in_words(row['arm'])} ({row['direction']}) scores {brief(row)}{kl}: it has no strength to set, so it does "
        "its own damage."
    )


def _same_prompt(responses: Sequence[Row], arms: Iterable[str]) -> str:
    """The first test prompt, with the response of each arm's first seed; a dash for an arm that misses the KL."""
    first = responses[0]
    rows: dict[str, dict[str, str]] = {}
    for row in responses:
        if (row["prompt"], row.get("set")) == (first["prompt"], first.get("set")):
            rows.setdefault(row["arm"], {}).setdefault(row["direction"], row["response"])
    rows = {arm: rows.get(arm, {}) for arm in dict.fromkeys([first["arm"], *arms, *rows])}
    columns = [way for way in _SIGNS if any(way in by_way for by_way in rows.values())] or list(_SIGNS)
    cells = {arm: [by_way.get(way, by_way.get("none")) for way in columns] for arm, by_way in rows.items()}
    body = [[escape(arm), *map(said, responses_of_arm)] for arm, responses_of_arm in cells.items()]
    dash = " A dash: the arm does not reach it." if any(None in row for row in cells.values()) else ""
    heading = (
        f"<p><q>{escape(first['prompt'])}</q>, the first test prompt, answered at that KL by the first seed of each "
        f"arm: an example, cut off as in the test.{dash}</p>"
    )
    return heading + boxed("one prompt, every arm", ("arm", *columns), body, kind="responses")
