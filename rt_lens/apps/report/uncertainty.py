"""How certain the results of a run are, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rt_lens.apps.report.labels import arm, counted, grouped, joined
from rt_lens.apps.report.sentences import holds, holm_note, shows
from rt_lens.results.schema import checked

_SCORERS = {"vader": "VADER"}


def uncertainty_sentences(results: Mapping[str, Any]) -> list[str]:
    """What the intervals, seeds and corrections of this run show and do not show, and what would strengthen it.

    Args:
        results: the content of results.json.

    Raises:
        ValueError: if a key is missing.

    Example:
        >>> from rt_lens.apps.report.uncertainty import uncertainty_sentences
        >>> sentences = uncertainty_sentences(load_results("runs/mood").content)
        >>> sentences[0].startswith("Each score is a mean over 24 prompts.")
        True
        >>> sentences[-1]
        'To strengthen these results: use more seeds; use more test prompts (four times as many halve the ...
    """
    results = checked(results)
    return [_intervals(results), *_seeds(results), *_corrected(results), *_choices(results), _improvements(results)]


def _intervals(results: Mapping[str, Any]) -> str:
    sizes, several = [row["n"] for row in results["summary"]], any(len(row["seeds"]) > 1 for row in results["summary"])
    over_seeds = " (and, for an arm with several seeds, with other seeds)" if several else ""
    return (
        f"Each score is a mean over {counted(sizes)} prompts. The 95 % confidence interval in brackets shows how much "
        f"the mean would vary with another sample of prompts{over_seeds}. About 95 in 100 such "
        f"intervals contain the true mean.{_without_interval(results['summary'])}"
    )


def _without_interval(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why some scores have no interval, as a further sentence; empty if all have one."""
    without = [row for row in rows if row["low"] is None or math.isnan(row["low"])]
    if not without:
        return ""
    alike = "there is one prompt" if all(row["n"] == 1 for row in without) else "all responses have the same score"
    arms = "each arm" if len(without) == len(rows) else joined(dict.fromkeys(map(arm, without)))
    return f" A score with a dash in its brackets has no interval, since {alike} ({arms}): such data show no spread."


def _seeds(results: Mapping[str, Any]) -> list[str]:
    """Which tuned arms have one seed, and which have several."""
    tuned = {(row["arm"], row["direction"]) for row in results["history"]}
    sentences = []
    rows = [{**row, "seeds": tuple(row["seeds"])} for row in results["summary"]]
    by_seeds = grouped([row for row in rows if (row["arm"], row["direction"]) in tuned], "seeds")
    for (seeds,), seed_rows in by_seeds.items():
        arms = "; ".join(dict.fromkeys(map(arm, seed_rows)))
        if len(seeds) == 1:
            sentences.append(
                f"Tuned once, with seed {seeds[0]}: {arms}. This interval does not reflect variation between seeds."
            )
        else:
            sentences.append(
                f"Tuned with seeds {joined(map(str, seeds))}: {arms}. The interval reflects seed-to-seed "
                "variance, which makes it wider."
            )
    draws = results.get("seed_draws")
    if sentences and draws:
        sentences.append(f"The seed controls {joined(draws)}. All arms with the same seed share these random choices.")
    elif sentences:
        sentences.append("In this run the seed controls only the order of the batches (an older version of rt_lens).")
    return sentences


def _corrected(results: Mapping[str, Any]) -> list[str]:
    rows = results["comparisons"]
    if not rows:
        return ["The run has no paired comparisons, so intervals that overlap do not show whether arms differ."]
    beyond = sum(holds(row) for row in rows)
    if any(row["p_holm"] is None for row in rows):
        result = f"{beyond} of {len(rows)} comparisons have p below 0.05, without a correction for their number."
    else:
        uncorrected = sum(shows(row) and not holds(row) for row in rows)
        result = (
            f"The run makes {len(rows)} comparisons. If no arms truly differed, about 1 in 20 p-values would fall "
            f"below 0.05. After Holm correction, {beyond} are significant; {uncorrected} more are significant only "
            "before the correction."
        )
    caution = "A non-significant result does not mean there is no difference; the interval shows how large it could be."
    return [result, *holm_note(rows), caution]


def _choices(results: Mapping[str, Any]) -> list[str]:
    sizes = [row["n"] for row in results["dose_response"]]
    prompts = f"{counted(sizes)} validation prompts" if sizes else "validation prompts"
    data = "Vectors used training topics only. Layer and multiplier were selected on"
    if results["history"]:
        # The validation loss stops the tuning and selects the weights.
        data = (
            "Vectors and gradients used training topics only. Early stopping used validation topics; layer and "
            "multiplier were selected on"
        )
    sentences = [
        f"{data} {prompts}. The test prompts were used once, at the end, and for no choice. This report cannot rule "
        "out that settings were adjusted after the test responses of an earlier run were seen."
    ]
    if results["protocol"]["calibration"]:
        sentences.append("The protocol was chosen by what the untuned model is able to do (see Protocol).")
    scorers = joined(dict.fromkeys(_SCORERS.get(row["scorer"], row["scorer"]) for row in results["summary"]))
    sentences.append(f"Scores are computed with {scorers}. Read some of the responses before you rely on them.")
    return sentences


def _improvements(results: Mapping[str, Any]) -> str:
    tuned = {(row["arm"], row["direction"]) for row in results["history"]}
    few = any(len(row["seeds"]) < 3 for row in results["summary"] if (row["arm"], row["direction"]) in tuned)
    seeds = "three or more seeds for every tuned arm" if few else "more seeds"
    # With several seeds their spread is part of the interval, and more prompts do not make it smaller.
    single_seed = any(len(row["seeds"]) == 1 for row in results["summary"])
    halve = " (four times as many halve the interval of an arm with one seed)" if single_seed else ""
    return (
        f"To strengthen these results: use {seeds}; use more test prompts{halve}; replicate with another split of the "
        "topics, another scorer, behaviour and model."
    )
