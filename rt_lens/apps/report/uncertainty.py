"""How sure one may be of what a run found, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rt_lens.apps.report.labels import counted, grouped, joined
from rt_lens.apps.report.sentences import holds, shows
from rt_lens.results.schema import checked


def uncertainty_sentences(results: Mapping[str, Any]) -> list[str]:
    """What the intervals, seeds and corrections of this run can and cannot vouch for, and what would make it surer.

    Args:
        results: the content of results.json.

    Raises:
        ValueError: if a key is missing.

    Example:
        >>> print(*uncertainty_sentences(load_results("runs/mood").content), sep="\\n")
    """
    results = checked(results)
    return [_intervals(results), *_seeds(results), *_corrected(results), *_choices(results), *_surer(results)]


def _intervals(results: Mapping[str, Any]) -> str:
    sizes, several = [row["n"] for row in results["summary"]], any(len(row["seeds"]) > 1 for row in results["summary"])
    seeded = ", and for an arm with several seeds how far other seeds could have" if several else ""
    return (
        f"Each score is a mean over {counted(sizes)} prompts. The 95 % interval in brackets says how far other prompts "
        f"of the same kind could have moved it{seeded}: about 95 in 100 such intervals hold the true mean."
    )


def _seeds(results: Mapping[str, Any]) -> list[str]:
    """Which tuned arms rest on one seed, and which on several."""
    tuned = {(row["arm"], row["direction"]) for row in results["history"]}
    sentences = []
    rows = [{**row, "seeds": tuple(row["seeds"])} for row in results["summary"]]
    for (seeds,), own in grouped([row for row in rows if (row["arm"], row["direction"]) in tuned], "seeds").items():
        arms = joined(dict.fromkeys(f"{row['arm']} {row['direction']}" for row in own))
        if len(seeds) == 1:
            sentences.append(
                f"{arms}: tuned once, with seed {seeds[0]}. Another seed may give another number, and the interval "
                "does not hold that."
            )
        else:
            sentences.append(
                f"{arms}: tuned with seeds {joined(map(str, seeds))}. The interval holds how these differ, and is the "
                "wider for it."
            )
    drawn = results.get("seed_draws")
    if sentences and drawn:
        sentences.append(f"A seed draws {joined(drawn)}; all arms of a seed share what it drew.")
    elif sentences:
        sentences.append("In this run a seed drew the order of the batches only (an older version of rt_lens).")
    return sentences


def _corrected(results: Mapping[str, Any]) -> list[str]:
    rows = results["comparisons"]
    if not rows:
        return ["Nothing was compared in pairs, so intervals that overlap decide nothing."]
    beyond = sum(holds(row) for row in rows)
    if any(row["p_holm"] is None for row in rows):
        found = f"{beyond} of {len(rows)} comparisons have p below 0.05, which was not corrected for their number."
    else:
        alone = sum(shows(row) and not holds(row) for row in rows)
        found = (
            f"{len(rows)} comparisons were made; if nothing differed, about one in twenty would have p below 0.05. "
            f"After Holm’s correction for that {beyond} hold; {alone} more hold only taken alone."
        )
    return [found, "Where no difference is shown there may still be one: its interval says how large."]


def _choices(results: Mapping[str, Any]) -> list[str]:
    asked = [row["n"] for row in results["dose_response"]]
    on = f"{counted(asked)} validation prompts" if asked else "validation prompts"
    seen = "Vectors saw training topics only; layer and multiplier were chosen on"
    if results["history"]:
        # The validation loss ends the tuning and picks the weights that are kept.
        seen = (
            "Vectors and gradients saw training topics only; when to stop tuning was chosen on validation topics, "
            "layer and multiplier on"
        )
    sentences = [
        f"{seen} {on}. The test prompts were asked once, at the end: they chose nothing in this run. Whether somebody "
        "changed the settings after seeing answers to them in an earlier run, no page can tell."
    ]
    if results["protocol"]["calibration"]:
        sentences.append("The protocol was chosen by what the untuned model was shown to be able to do (see Protocol).")
    scorers = joined(dict.fromkeys(row["scorer"] for row in results["summary"]))
    sentences.append(f"A score is what {scorers} makes of an answer. Read some of the answers before you believe it.")
    return sentences


def _surer(results: Mapping[str, Any]) -> list[str]:
    tuned = {(row["arm"], row["direction"]) for row in results["history"]}
    few = any(len(row["seeds"]) < 3 for row in results["summary"] if (row["arm"], row["direction"]) in tuned)
    seeds = "three or more seeds for every tuned arm" if few else "more seeds"
    # With several seeds their spread is part of the interval, and more prompts leave it as it is.
    once = any(len(row["seeds"]) == 1 for row in results["summary"])
    halve = " (four times as many halve the interval of an arm with one seed)" if once else ""
    return [
        f"What would make it surer: {seeds}; more test prompts{halve}; another split of the topics; another scorer, "
        "behaviour and model."
    ]
