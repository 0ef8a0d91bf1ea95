"""What a scoreboard becomes on disk: tables of results.json, and the files beside it."""

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

# How an answer is written, whatever it says, and what is not said: side effects on every set.
_OF_WRITING = ("repetition", "distinct_2", "loop", "length", "other", "other_letters")
_DAMAGE = [f"{name}{end}" for name in ("perplexity", "kl") for end in ("", "_low", "_high")] + ["n_texts"]
_CELL = ["arm", "direction", "set", "scorer", "n", "mean", "low", "high"]


def tables_of(board: ArmScores, *, exams: Sequence[str], writing: str) -> dict[str, list[dict[str, Any]]]:
    """The tables `arms`, `summary` and `side_effects` of results.json (see `rt_lens.results.schema`).

    Args:
        board: what was measured.
        exams: sets that test the behaviour; all other sets are side effects.
        writing: the set whose repetition stands beside each arm.

    Raises:
        ValueError: if an exam was not asked, or has no scorer but those of writing.

    Example:
        >>> results |= tables_of(board, exams=["test"], writing="test")
    """
    pooled = board.summary()
    asked = pooled[~pooled["scorer"].isin(_OF_WRITING)]["set"]
    if missing := [name for name in exams if name not in set(asked)]:
        raise ValueError(f"exams: {missing} came; sets with a scorer of the behaviour are {sorted(set(asked))}.")
    rows = _rows(pooled)
    kept = (*_CELL, "seeds")
    return {
        "arms": [
            {**_without(row, "seeds"), "seed": row["seeds"][0]}
            for own in _by_seed(board)
            for row in _scored(_rows(own.summary()), exams, writing)
        ],
        "summary": _scored(rows, exams, writing),
        "side_effects": [{key: row[key] for key in kept} for row in rows if not _of_behaviour(row, exams)],
    }


def plain(value: Any) -> Any:
    """Numbers and containers that JSON knows; what is not a number becomes null.

    Example:
        >>> plain({"mean": np.float32(0.5), "low": float("nan")})  # {"mean": 0.5, "low": None}
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
    board: ArmScores,
    projections: Mapping[str, Any],
    *,
    files: Iterable[str] = (),
) -> Path:
    """Writes all files of a run (see `rt_lens.results.schema`), all or none of them; those of a run before go.

    Args:
        folder: made if it is not there.
        results: the content of results.json, with what `tables_of` gives.
        board: what was measured.
        projections: the content of projections.json.
        files: names of further files of the run that lie in the folder already, such as its vectors.

    Returns:
        The path of results.json.

    Raises:
        ValueError: if a key of the tables is missing.
        OSError: if the disk is full or the folder cannot be written.

    Example:
        >>> write_results("runs/mine", results, board, projections)
    """
    folder, content = Path(folder), plain(results)
    missing = [key for key in ("behaviour", "model", "summary", "side_effects") if key not in content]
    if missing:
        raise ValueError(f"results: no key {', '.join(missing)}. Add what tables_of gives, and the run's names.")
    caption = f"{content['behaviour']} on {content['model']}"
    effects, damage = content["summary"], content["side_effects"]
    checksums = {name: file_sha256(folder / name) for name in files}
    with together(folder, lambda _: [*TABLES, REPORT], last="results.json") as aside:
        for name, make in (("table.md", to_markdown), ("table.tex", to_latex)):
            pieces = [make(effects, caption=f"{caption}: scores of every arm")]
            if damage:
                pieces.append(make(damage, caption=f"{caption}: side effects", by_direction=False))
            _write(aside / name, "\n".join(pieces))
        _write_scores(aside, board)
        _write(aside / "projections.json", _json(plain(projections)))
        content["files"] = checksums | {path.name: file_sha256(path) for path in sorted(aside.iterdir())}
        _write(aside / "results.json", json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False))
    return folder / "results.json"


def write_scores(folder: str | Path, board: ArmScores) -> Path:
    """Writes what a scoreboard holds, without the rest of a run: scores.csv, texts.csv, summary.csv, responses.jsonl.

    Args:
        folder: made if it is not there.
        board: what was measured.

    Returns:
        The folder.

    Raises:
        ValueError: if there is a run in the folder, whose scores these would replace.
        OSError: if the disk is full or the folder cannot be written.

    Example:
        >>> write_scores("scores", compare_arms(model, {"untuned": None}, {"test": EvalTask(prompts)}))
    """
    folder = Path(folder)
    check_no_run(folder)
    names = ("scores.csv", "texts.csv", "summary.csv", "responses.jsonl")
    with together(folder, lambda _: names, last="scores.csv") as aside:
        _write_scores(aside, board)
    return folder


def _write_scores(folder: Path, board: ArmScores) -> None:
    _write(folder / "scores.csv", _csv(_with_prompts(board)))
    summary = board.summary()
    seeds = [" ".join(map(str, each)) for each in summary["seeds"]]
    _write(folder / "summary.csv", _csv(summary.assign(seeds=seeds)))
    if len(board.texts):
        _write(folder / "texts.csv", _csv(board.texts))
    _write(folder / "responses.jsonl", "".join(f"{_json(row)}\n" for row in _responses(board)))


def _scored(rows: Sequence[Mapping[str, Any]], exams: Sequence[str], writing: str) -> list[dict[str, Any]]:
    """Rows of the behaviour's sets and scorers, each with what its arm kept and how it wrote."""
    beside: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        own = beside.setdefault((row["arm"], row["direction"]), {})
        if (row["set"], row["scorer"]) == ("facts", "names_right"):
            own |= {**_named("facts", row), "n_facts": row["n"]}
        if (row["set"], row["scorer"]) == (writing, "repetition"):
            own |= _named("repetition", row)
    none = dict.fromkeys([f"{name}{end}" for name in ("facts", "repetition") for end in ("", "_low", "_high")])
    return [
        {**{key: row[key] for key in _CELL}, **{key: row.get(key) for key in _DAMAGE}, **none, "n_facts": None,
         **beside[row["arm"], row["direction"]], "seeds": row["seeds"]}
        for row in rows
        if _of_behaviour(row, exams)
    ]  # fmt: skip


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _of_behaviour(row: Mapping[str, Any], exams: Sequence[str]) -> bool:
    return row["set"] in exams and row["scorer"] not in _OF_WRITING


def _named(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row["mean"], f"{name}_low": row["low"], f"{name}_high": row["high"]}


def _without(row: Mapping[str, Any], left: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != left}


def _by_seed(board: ArmScores) -> Iterable[ArmScores]:
    """A scoreboard of each arm, direction and seed by itself."""
    label = ["arm", "direction", "seed"]
    texts = dict(list(board.texts.groupby(label, sort=False))) if len(board.texts) else {}
    # By (arm, direction) first, so that an arm's seeds stand together however they were measured.
    for _, arm in board.scores.groupby(label[:2], sort=False):
        for one, scores in arm.groupby(label, sort=False):
            yield replace(board, scores=scores, texts=texts.get(one, board.texts[:0]))


def _with_prompts(board: ArmScores) -> pd.DataFrame:
    """The scores with the prompt of each item, by which two runs are told to have asked the same."""
    asked: dict[tuple[Any, ...], list[str]] = {}
    for answer in board.answers:
        asked.setdefault(tuple(answer[key] for key in ("arm", "direction", "seed", "set")), []).append(answer["prompt"])
    keys = board.scores[["arm", "direction", "seed", "set", "item"]].itertuples(index=False, name=None)
    return board.scores.assign(prompt=[asked[key[:4]][key[4]] for key in keys])


def _responses(board: ArmScores) -> Iterable[dict[str, Any]]:
    first = board.scores.groupby("set", sort=False)["scorer"].first().to_dict()
    about = ("arm", "direction", "seed", "set", "prompt", "response")
    for answer in board.answers:
        told = {key: answer[key] for key in about} | {"score": answer[first[answer["set"]]]}
        yield plain(told | {key: value for key, value in answer.items() if key not in told})


def _csv(table: pd.DataFrame) -> str:
    # Every text in quotes: pandas leaves a lone carriage return bare, and reads it as the end of a row.
    return table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write(path: Path, text: str) -> Path:
    # A model may emit half a surrogate pair, which UTF-8 cannot hold.
    return write_atomically(path, text.encode("utf-8", "replace"))
