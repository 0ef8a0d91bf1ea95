"""Writes what an ArmEvaluator measured: the tables of results.json, and the files beside it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rt_lens.arms.comparison import ArmScores
from rt_lens.common.files import file_sha256, together, write_atomically
from rt_lens.results.schema import REPORT, TABLES, check_no_run
from rt_lens.results.tables import to_latex, to_markdown

# How an answer is written, and not what it says: side effects on every set.
_OF_WRITING = (
    "repetition",
    "distinct_2",
    "loop",
    "length",
    "off_option_mass",
    "off_option_mass_multiple_choice",
)
_SIDE_EFFECTS = [f"{name}{end}" for name in ("perplexity", "kl") for end in ("", "_low", "_high")] + ["n_texts"]
_CELL = ["arm", "direction", "set", "scorer", "n", "mean", "low", "high"]


def tables_of(
    scores: ArmScores,
    *,
    tasks: Sequence[str],
    writing: str,
) -> dict[str, list[dict[str, Any]]]:
    """The tables `arms`, `summary` and `side_effects` of results.json (see `rt_lens.results.schema`).

    Args:
        scores: the scores of all arms.
        tasks: sets that test the behaviour; all other sets are side effects.
        writing: the set whose repetition is reported for each arm.

    Raises:
        ValueError: if a task was not measured, or has only scorers of how answers are written.

    Example:
        >>> task = EvalTask(prompts, ["vader", "repetition"], max_new_tokens=4)
        >>> scores = compare_arms(model, {"untuned": None}, {"test": task}, progress=False)
        >>> tables = tables_of(scores, tasks=["test"], writing="test")
        >>> [(row["scorer"], row["n"], row["repetition"]) for row in tables["summary"]]
        [('vader', 2, 0.0)]
        >>> [row["scorer"] for row in tables["side_effects"]]
        ['repetition']
    """
    pooled = scores.summary()
    measured = pooled[~pooled["scorer"].isin(_OF_WRITING)]["set"]
    if missing := [name for name in tasks if name not in set(measured)]:
        raise ValueError(
            f"tasks must be sets with a scorer of the behaviour, of {sorted(set(measured))}, got {missing}. Name "
            "others, or measure them first."
        )
    rows = _rows(pooled)
    columns = (*_CELL, "seeds")
    return {
        "arms": [
            {**_without(row, "seeds"), "seed": row["seeds"][0]}
            for seed_scores in _by_seed(scores)
            for row in _scored(_rows(seed_scores.summary()), tasks, writing)
        ],
        "summary": _scored(rows, tasks, writing),
        "side_effects": [{key: row[key] for key in columns} for row in rows if not _of_behaviour(row, tasks)],
    }


def plain(value: Any) -> Any:
    """The value as JSON can hold it: plain numbers, lists and dictionaries; NaN and infinity become None.

    Example:
        >>> import numpy as np
        >>> plain({"mean": np.float32(0.5), "low": float("nan"), "seeds": (0, 1)})
        {'mean': 0.5, 'low': None, 'seeds': [0, 1]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_results(
    folder: str | Path,
    results: Mapping[str, Any],
    scores: ArmScores,
    projections: Mapping[str, Any],
    *,
    at_budgets: Mapping[float, ArmScores] | None = None,
    files: Iterable[str] = (),
) -> Path:
    """Writes all files of a run (see `rt_lens.results.schema`), or none of them, and removes those of an earlier run.

    Args:
        folder: created if it does not exist.
        results: the content of results.json, with the tables that `tables_of` gives.
        scores: the scores of all arms.
        projections: the content of projections.json.
        at_budgets: budget -> the scores there, for budgets other than the stated one: their responses are kept.
        files: names of further files of the run that are in the folder already, such as its vectors.

    Returns:
        The path of results.json.

    Raises:
        ValueError: if a key of the tables is missing.
        OSError: if the disk is full or the folder cannot be written.

    Example:
        >>> from rt_lens.results.writing import tables_of
        >>> tasks = {"test": EvalTask(prompts, ["vader", "repetition"], max_new_tokens=4)}
        >>> scores = compare_arms(model, {"untuned": None}, tasks, progress=False)
        >>> results = {"behaviour": "mood", "model": "SmolLM2", **tables_of(scores, tasks=["test"], writing="test")}
        >>> file = write_results("runs/mine", results, scores, {"prompt": "", "tokens": [], "layers": [], "arms": {}})
        >>> sorted(path.name for path in file.parent.iterdir())[:5]
        ['projections.json', 'responses.jsonl', 'results.json', 'scores.csv', 'summary.csv']
    """
    folder, content = Path(folder), plain(results)
    missing = [key for key in ("behaviour", "model", "summary", "side_effects") if key not in content]
    if missing:
        raise ValueError(
            f"results must have the keys behaviour, model, summary and side_effects, got none of {', '.join(missing)}. "
            "Add what tables_of gives, and the names of the run."
        )
    caption = f"{content['behaviour']} on {content['model']}"
    summary, side_effects = content["summary"], content["side_effects"]
    checksums = {name: file_sha256(folder / name) for name in files}
    with together(folder, lambda _: [*TABLES, REPORT], last="results.json") as aside:
        for name, make in (("table.md", to_markdown), ("table.tex", to_latex)):
            pieces = [make(summary, caption=f"{caption}: scores of every arm")]
            if side_effects:
                pieces.append(make(side_effects, caption=f"{caption}: side effects", by_direction=False))
            _write(aside / name, "\n".join(pieces))
        _write_scores(aside, scores)
        if at_budgets:
            _write(aside / "responses_at_kl.jsonl", "".join(f"{_json(row)}\n" for row in _at_kl(at_budgets)))
        _write(aside / "projections.json", _json(plain(projections)))
        content["files"] = checksums | {path.name: file_sha256(path) for path in sorted(aside.iterdir())}
        _write(aside / "results.json", json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False))
    return folder / "results.json"


def write_scores(folder: str | Path, scores: ArmScores) -> Path:
    """Writes the scores without the rest of a run: scores.csv, texts.csv, summary.csv, responses.jsonl.

    Args:
        folder: created if it does not exist.
        scores: the scores of all arms.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder holds a run, whose scores these would replace.
        OSError: if the disk is full or the folder cannot be written.

    Example:
        >>> scores = compare_arms(
        ...     model, {"untuned": None}, {"test": EvalTask(prompts, max_new_tokens=4)}, progress=False
        ... )
        >>> folder = write_scores("scores", scores)
        >>> sorted(path.name for path in folder.iterdir())
        ['responses.jsonl', 'scores.csv', 'summary.csv']
    """
    folder = Path(folder)
    check_no_run(folder)
    names = ("scores.csv", "texts.csv", "summary.csv", "responses.jsonl")
    with together(folder, lambda _: names, last="scores.csv") as aside:
        _write_scores(aside, scores)
    return folder


def _write_scores(folder: Path, scores: ArmScores) -> None:
    _write(folder / "scores.csv", _csv(_with_prompts(scores)))
    summary = scores.summary()
    seeds = [" ".join(map(str, row_seeds)) for row_seeds in summary["seeds"]]
    _write(folder / "summary.csv", _csv(summary.assign(seeds=seeds)))
    if len(scores.texts):
        _write(folder / "texts.csv", _csv(scores.texts))
    _write(folder / "responses.jsonl", "".join(f"{_json(row)}\n" for row in _responses(scores)))


def _scored(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], writing: str) -> list[dict[str, Any]]:
    """Rows of the behaviour's sets and scorers, each with the side effects of its arm."""
    by_arm: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        measures = by_arm.setdefault((row["arm"], row["direction"]), {})
        if (row["set"], row["scorer"]) == ("facts", "contains_answer"):
            measures |= {**_named("facts", row), "n_facts": row["n"]}
        if (row["set"], row["scorer"]) == (writing, "repetition"):
            measures |= _named("repetition", row)
    none = dict.fromkeys([f"{name}{end}" for name in ("facts", "repetition") for end in ("", "_low", "_high")])
    return [
        {**{key: row[key] for key in _CELL}, **{key: row.get(key) for key in _SIDE_EFFECTS}, **none, "n_facts": None,
         **by_arm[row["arm"], row["direction"]], "seeds": row["seeds"]}
        for row in rows
        if _of_behaviour(row, tasks)
    ]  # fmt: skip


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _of_behaviour(row: Mapping[str, Any], tasks: Sequence[str]) -> bool:
    return row["set"] in tasks and row["scorer"] not in _OF_WRITING


def _named(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row["mean"], f"{name}_low": row["low"], f"{name}_high": row["high"]}


def _without(row: Mapping[str, Any], excluded: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != excluded}


def _by_seed(scores: ArmScores) -> Iterable[ArmScores]:
    """The scores of one arm, direction and seed at a time."""
    label = ["arm", "direction", "seed"]
    texts = dict(list(scores.texts.groupby(label, sort=False))) if len(scores.texts) else {}
    # Group by (arm, direction) first, so that an arm's seeds follow one another in whatever order they were measured.
    for _, arm_rows in scores.scores.groupby(label[:2], sort=False):
        for key, rows in arm_rows.groupby(label, sort=False):
            yield replace(scores, scores=rows, texts=texts.get(key, scores.texts[:0]))


def _with_prompts(scores: ArmScores) -> pd.DataFrame:
    """The scores with the prompt of each item, which shows whether two runs asked the same."""
    prompts: dict[tuple[Any, ...], list[str]] = {}
    for answer in scores.answers:
        key = tuple(answer[name] for name in ("arm", "direction", "seed", "set"))
        prompts.setdefault(key, []).append(answer["prompt"])
    keys = scores.scores[["arm", "direction", "seed", "set", "item"]].itertuples(index=False, name=None)
    return scores.scores.assign(prompt=[prompts[key[:4]][key[4]] for key in keys])


def _responses(scores: ArmScores) -> Iterable[dict[str, Any]]:
    first = scores.scores.groupby("set", sort=False)["scorer"].first().to_dict()
    columns = ("arm", "direction", "seed", "set", "prompt", "response")
    for answer in scores.answers:
        row = {key: answer[key] for key in columns} | {"score": answer[first[answer["set"]]]}
        yield plain(row | {key: value for key, value in answer.items() if key not in row})


def _at_kl(at_budgets: Mapping[float, ArmScores]) -> Iterable[dict[str, Any]]:
    """The responses of the arms at each budget, without those that are the same at all of them."""
    for budget, scores in at_budgets.items():
        yield from ({**row, "budget": budget} for row in _responses(scores))


def _csv(table: pd.DataFrame) -> str:
    # Quote every text: pandas does not quote a single carriage return, and reads it as the end of a row.
    return table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write(path: Path, text: str) -> Path:
    # A model can generate half a surrogate pair, which UTF-8 cannot encode.
    return write_atomically(path, text.encode("utf-8", "replace"))
