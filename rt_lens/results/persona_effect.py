"""What a run says first where it had little to show: personas without an effect, or a score without room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rt_lens.common.formatting import bracketed, number, p_value, with_minus_sign

_TO_TEST = 6  # topics from which on a sign-flip test can give p below 0.05


def persona_warnings(effect: Mapping[str, Any] | None) -> list[str]:
    """What to know of the personas and the scorer before the rest of a run is read; nothing where both work.

    Args:
        effect: the entry `persona_effect` of results.json.

    Example:
        >>> row = {
        ...     "scorer": "pattern", "seed": 0, "n": 24, "difference": 0.04, "low": -0.1, "high": 0.18, "p": 1.0,
        ...     "moves": 0, "alike": False, "range": [0.0, 1.0], "end": "", "n_at_end": 0,
        ...     "sides": [{"side": "untuned", "n": 24, "mean": 0.5, "low": 0.31, "high": 0.69}],
        ... }
        >>> persona_warnings(row)[0][:88]
        'The personas are not shown to move the score: on the untuned model, positive minus negat'
        >>> persona_warnings({**row, "difference": 0.5, "low": 0.3, "high": 0.7, "p": 0.001, "moves": 1})
        []
    """
    if effect is None:
        return []
    if effect["alike"]:
        return [_alike(effect)]
    return [*_of_personas(effect), *_of_room(effect)]


def _alike(effect: Mapping[str, Any]) -> str:
    score, n = with_minus_sign(number(_untuned(effect)["mean"], 2)), effect["n"]
    return (
        f"The scorer {effect['scorer']!r} gives {score} to all {3 * n} responses of the untuned model, with positive "
        f"personas, with negative ones and without any, so this run can show little: positive minus negative is "
        f"{_difference(effect)}. Change the scorer or the personas, and try them with rt-lens check FILE --measure."
    )


def _of_personas(effect: Mapping[str, Any]) -> list[str]:
    if effect["moves"] > 0:
        return []
    measured = f"on the untuned model, positive minus negative is {_difference(effect)}"
    if effect["moves"] < 0:
        return [
            f"The personas move the score the wrong way: {measured}, so expect arms toward the positive personas to "
            "lower it, and arms away from them to raise it."
        ]
    few = "" if effect["n"] >= _TO_TEST else f" With {effect['n']} topics no difference could be shown."
    return [
        f"The personas are not shown to move the score: {measured}, so the vector, and the arms that learn from the "
        f"personas, may hold little of the behaviour.{few}"
    ]


def _of_room(effect: Mapping[str, Any]) -> list[str]:
    if not effect["end"]:
        return []
    untuned, (least, most) = _untuned(effect), effect["range"]
    verb, blocked, other = ("lower", "away", "toward") if effect["end"] == "low" else ("raise", "toward", "away")
    mean = with_minus_sign(bracketed(untuned["mean"], untuned["low"], untuned["high"], 2))
    span = f"{with_minus_sign(f'{least:g}')} to {most:g}"
    return [
        f"The untuned score stands at the {effect['end']} end of the scorer's range ({span}), at "
        f"{effect['n_at_end']} of {untuned['n']} responses: {mean} (n = {untuned['n']} topics outside "
        f"the test, seed {effect['seed']}), so no arm can {verb} it: read {other}, not {blocked}."
    ]


def _difference(effect: Mapping[str, Any]) -> str:
    size = with_minus_sign(bracketed(effect["difference"], effect["low"], effect["high"], 2))
    return f"{size} (n = {effect['n']} topics outside the test, seed {effect['seed']}, p {p_value(effect['p'])})"


def _untuned(effect: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(row for row in effect["sides"] if row["side"] == "untuned")
