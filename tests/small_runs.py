"""Finished runs in small, made of drawn scores: what the results room reads and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rt_lens.arms.comparison import ArmScores
from rt_lens.results.writing import plain, tables_of, write_results

ARMS = (("untuned", "none"), ("steered", "away"), ("rep_tuned", "toward"), ("rep_tuned", "away"))
SETS = {"test": ("vader", "repetition"), "facts": ("contains_answer",), "talk": ("repetition", "follows_instruction")}


def make_board(
    draw: int,
    *,
    shift: float = 0.0,
    seeds: tuple[int, ...] = (0, 1, 2),
    prompts: tuple[int, ...] = tuple(range(24)),
    asked: str = "Question",
    n_texts: int = 8,
    spread: float = 0.2,
) -> ArmScores:
    """Prompts differ from one another and so do seeds; `shift` is added to rep_tuned's vader scores.

    Two draws share the prompts' own levels and nothing else: they are two runs of one experiment. With one seed there
    is no noise of seeds, which nothing could tell from a change.
    """
    noise = np.random.default_rng(draw)
    scores: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for arm, direction in ARMS:
        tuned = arm == "rep_tuned"
        for seed in seeds if tuned else (0,):
            label = {"arm": arm, "direction": direction, "seed": seed}
            for name, scorers in SETS.items():
                jitter = spread / 2 if tuned and len(seeds) > 1 else 0.0
                found = {
                    scorer: _drawn(noise, scorer, prompts, spread)
                    + (shift if tuned and scorer == "vader" else 0.0)
                    + (noise.normal(0, jitter) if scorer in ("vader", "repetition") else 0.0)
                    for scorer in scorers
                }
                for item, number in enumerate(prompts):
                    own = {scorer: float(values[item]) for scorer, values in found.items()}
                    about = {**label, "set": name}
                    answers.append({**about, "prompt": f"{asked} {number}, {name}?", "response": "Well.", **own})
                    scores += [
                        {**about, "item": item, "category": "", "scorer": scorer, "score": score}
                        for scorer, score in own.items()
                    ]
            for text in range(n_texts):
                tokens = 40 + 5 * text
                nll, kl = tokens * (3 + noise.normal(0, 0.05)), tokens * abs(noise.normal(0.1, 0.02))
                texts.append(
                    {**label, "text": text, "tokens": tokens, "nll": nll, "kl": kl if arm != "untuned" else 0.0}
                )
    columns = ["arm", "direction", "seed", "text", "tokens", "nll", "kl"]
    return ArmScores(pd.DataFrame(scores), pd.DataFrame(texts, columns=columns), answers, 0)


def _drawn(noise: np.random.Generator, scorer: str, prompts: tuple[int, ...], spread: float) -> Any:
    if scorer in ("contains_answer", "follows_instruction"):
        return (noise.random(len(prompts)) < 0.7).astype(float)
    levels = np.random.default_rng(99).normal(0.2, 0.5, 1000)[[number % 1000 for number in prompts]]
    return levels + noise.normal(0, spread, len(prompts))


def make_content(board: ArmScores, **changes: Any) -> dict[str, Any]:
    """The content of results.json for a board; keywords replace keys."""
    content = {
        "schema": 2,
        "behaviour": "mood",
        "description": "Cheerful or gloomy?",
        "model": "tiny",
        "versions": {"rt_lens": "0.1.0", "torch": "2.9.0"},
        "seed": 0,
        "protocol": {"name": "answers", "why": "", "calibration": []},
        "choices": {"away": {"layer": 1, "multiplier": -2.0, "why": "Furthest."}, "rule": "The furthest."},
        **tables_of(board, tasks=["test"], writing="test"),
        "comparisons": board.comparisons().to_dict("records"),
        "separability": [],
        "dose_response": [],
        "bound": 1.1,
        "history": [],
        "logit_lens": [],
        "at_kl": None,
        "search": None,
        "persona_effect": None,
        "inside": None,
        "seconds": {"tune": 1.0},
    }
    return {**content, **changes}


def make_at_kl(board: ArmScores, **changes: Any) -> dict[str, Any]:
    """The key at_kl of a board whose arms reach KL 0.01 and do not reach 0.03; steered has no strength."""
    summary, rows = board.summary(), []
    labels = board.scores[["arm", "direction", "seed"]].drop_duplicates().itertuples(index=False, name=None)
    for arm, direction, seed in labels:
        of_arm = {"arm": arm, "direction": direction, "seed": seed, "n_texts": 8, "n_own": 24}
        kl = {"kl": 0.01, "kl_low": 0.009, "kl_high": 0.011, "own_kl": 0.02, "own_kl_low": 0.018, "own_kl_high": 0.022}
        if arm == "steered":
            rows.append({**of_arm, **kl, "budget": None, "strength": None, "reason": ""})
        elif arm != "untuned":
            gap = dict.fromkeys(kl) | {"budget": 0.03, "strength": None, "reason": "KL is at most 0.02."}
            rows += [{**of_arm, **kl, "budget": 0.01, "strength": 1.2, "reason": ""}, {**of_arm, **gap}]
    strong = summary["arm"].isin(["untuned", "steered"])
    table = summary.assign(budget=[None if point else 0.01 for point in strong]).astype({"budget": object})
    content = {
        "kl": [0.01, 0.03], "stated": 0.01, "side_effects": "every", "n_texts": 8, "max_new_tokens": 24,
        "n_personas": 2,
        "arms": {"steered": "The vector is added.", "rep_tuned": "Tuned along the vector."},
        "table": plain(table.to_dict("records")), "strengths": plain(rows),
    }  # fmt: skip
    return {**content, **changes}


PROJECTIONS = {"prompt": "Hello", "tokens": ["Hel", "lo"], "layers": [0], "arms": {"untuned": [[0.1, 0.2]]}}


def write_run(folder: Path, board: ArmScores, **changes: Any) -> Path:
    """A finished run's folder."""
    return write_results(folder, make_content(board, **changes), board, PROJECTIONS).parent


OLD_NAMES = {
    "reproducibility": "again",
    "contains_answer": "names_right",
    "follows_instruction": "obeys",
    "off_option_mass": "other",
    "off_option_mass_multiple_choice": "other_letters",
    **{
        f"likelihood_{measure}_multiple_choice{end}": f"likelihood_{measure}_letters{end}"
        for measure in ("accuracy", "share", "margin")
        for end in ("", "_per_token")
    },
}
"""Names in files of schema 2 -> those that schema 1 has for them."""


def without_checksums(folder: Path) -> Path:
    """The same run without checksums, so that a test can change its files."""
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    del content["files"]
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def as_an_older_run(folder: Path) -> Path:
    """The same run as an older version wrote it: schema 1, with its names, and no checksums."""
    content = json.loads((without_checksums(folder) / "results.json").read_text(encoding="utf-8"))
    content = {OLD_NAMES.get(key, key): value for key, value in content.items()} | {"schema": 1}
    for key in ("arms", "summary", "side_effects", "comparisons"):
        content[key] = [{**row, "scorer": OLD_NAMES.get(row["scorer"], row["scorer"])} for row in content[key]]
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    for name in ("scores.csv", "summary.csv"):
        table = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
        table.assign(scorer=table["scorer"].replace(OLD_NAMES)).to_csv(folder / name, index=False)
    lines = (folder / "responses.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    rows = [{OLD_NAMES.get(key, key): value for key, value in json.loads(line).items()} for line in lines]
    (folder / "responses.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder
