"""What a run's folder holds, and reading it back checked. The one place that knows the schema.

| file | what |
|---|---|
| results.json | the run: settings, choices and tables, see below; put there last, so that it stands for a whole run |
| scores.csv | a row per arm, direction, seed, set, item and scorer: prompt, category, score |
| texts.csv | a row per arm, direction, seed and text: tokens, nll, kl (nats, summed over tokens); none without texts |
| summary.csv | a row per arm, direction, set and scorer, side effects too: n, mean, low, high, perplexity, kl, seeds |
| responses.jsonl | a row per arm, direction, seed, set and prompt: response, every score, score (the first scorer's) |
| projections.json | prompt, tokens, layers, and arms: name -> projections [layer][token] |
| table.md, table.tex | summary and side effects as tables |
| vectors.safetensors, rep_tuned_DIRECTION.safetensors | what an experiment found and tuned |
| report.html | the page that is made of them, later: no part of the run |

All of them take their place together, and results.json has a checksum of each: what another run has left, or somebody
has changed, is refused by its name. Files of other names are somebody's own, and stay.

results.json, schema 1. Intervals are of 95 %; null is what was not measured.

| key | what |
|---|---|
| schema | 1 |
| behaviour, description, model, seed | names, and the seed of the splits |
| versions | package -> version |
| again | command, call: that make this run again; file, toml, sha256: its settings file's name, text and hash |
| again, more | settings: all of them, as they ran. Null: settings that no file has |
| protocol | name; why it was chosen; calibration: rows of task, n, mean, low, high, chance, seed |
| protocol, more | settings: of the honesty experiment; chance: set -> what blind choice scores |
| choices | direction -> layer, multiplier, why; rule: how they were chosen |
| arms | a row per arm, direction, seed, set and scorer, see the columns below; with `seed` |
| summary | the same pooled over seeds, with `seeds` |
| side_effects | other sets and scorers, pooled: arm, direction, set, scorer, n, mean, low, high, seeds |
| comparisons | a - b: a, a_direction, b, b_direction, set, scorer, n, difference, low, high, p, p_holm, test, seeds |
| separability | a row per layer: accuracy, low, high, n |
| dose_response | a row per layer and multiplier: n, mean, low, high, perplexity, admissible |
| bound | the most that perplexity may rise, as a ratio |
| history | a row per arm, direction, seed, split and step of tuning: losses |
| logit_lens | a row per layer and sign: tokens |
| seconds | stage -> seconds |
| seed_draws | what a tuning seed draws, in words; runs without it drew the order of the batches only |
| files | name -> SHA-256 of each other file of the run; kept apart when it is read |

Columns of arms and summary: arm, direction, set, scorer, n, mean, low, high (score); perplexity, perplexity_low,
perplexity_high, kl, kl_low, kl_high (nats per token), n_texts; facts, facts_low, facts_high, n_facts (share of plain
questions answered right); repetition, repetition_low, repetition_high.

Runs without `files`, `again`, `side_effects`, `protocol`, scores.csv and texts.csv, and with comparisons of
`direction`, a, b alone, were written before these were; they load, with what can be filled in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rt_lens.common.files import file_sha256

SCHEMA = 1
TABLES = (
    *("results.json", "scores.csv", "texts.csv", "summary.csv", "responses.jsonl", "projections.json"),
    *("table.md", "table.tex"),
)
"""What `write_results` writes."""
REPORT = "report.html"
_MADE_BEFORE = ("vectors.safetensors", "rep_tuned_toward.safetensors", "rep_tuned_away.safetensors")
_KEYS = (
    *("schema", "behaviour", "description", "model", "versions", "seed", "choices", "arms", "summary", "comparisons"),
    *("separability", "dose_response", "bound", "history", "logit_lens", "seconds"),
)
_SCORED = (
    *("arm", "direction", "set", "scorer", "n", "mean", "low", "high"),
    *("perplexity", "kl", "facts", "repetition", "n_texts", "n_facts"),
)
_COLUMNS = {
    "arms": (*_SCORED, "seed"),
    "summary": (*_SCORED, "seeds"),
    "side_effects": (*_SCORED[:8], "seeds"),
    "comparisons": (
        *("a", "a_direction", "b", "b_direction", "set", "scorer"),
        *("n", "difference", "low", "high", "p", "p_holm", "test", "seeds"),
    ),
}
_CALIBRATION = ("task", "n", "mean", "low", "high", "chance", "seed")
_AGAIN = ("command", "call", "file", "toml", "sha256", "settings")
_RESPONSE = ("arm", "direction", "seed", "prompt", "response", "score")
_CELL = ("arm", "direction", "set", "scorer", "seed")


@dataclass(frozen=True)
class Results:
    """A finished run, read from its folder.

    Attributes:
        folder: where its files lie; the methods read those beside results.json.
        content: results.json, checked and with newer keys filled in.
        files: name -> SHA-256 of the run's other files; empty for older runs, of which none is checked.
    """

    folder: Path
    content: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, str] = field(default_factory=dict, repr=False)

    def file(self, name: str) -> Path:
        """The path of a file in the folder; whether it is there is for the caller to see.

        Raises:
            ValueError: if it is not the one that the run wrote.
        """
        path = self.folder / name
        if name in self.files and path.is_file() and file_sha256(path) != self.files[name]:
            raise ValueError(
                f"run: {path} must be the file that the run of results.json wrote, got another: it is of another run, "
                "or damaged or changed since. Run the experiment again, to its end."
            )
        return path

    def scores(self) -> pd.DataFrame:
        """A row per arm, direction, set, scorer, seed and item: prompt, score. Older runs: from responses.jsonl.

        Raises:
            FileNotFoundError: if neither file is there.
            ValueError: if the file is damaged; the message says how.
        """
        path = self.file("scores.csv")
        if path.is_file():
            return _csv(path, words=("arm", "direction", "set", "scorer", "prompt"), numbers=("seed", "item", "score"))
        # Before there was scores.csv, a run had one set and one scorer.
        first = self.content["summary"][0]
        rows = [{"set": first["set"], "scorer": first["scorer"], **row} for row in self.responses()]
        frame = pd.DataFrame(rows)
        return frame.assign(item=frame.groupby(list(_CELL)).cumcount())[[*_CELL, "item", "prompt", "score"]]

    def texts(self) -> pd.DataFrame | None:
        """A row per arm, direction, seed and text: tokens, nll, kl; None if the run has none.

        Raises:
            ValueError: if the file is damaged.
        """
        path = self.file("texts.csv")
        numbers = ("seed", "text", "tokens", "nll", "kl")
        return _csv(path, words=("arm", "direction"), numbers=numbers) if path.is_file() else None

    def responses(self) -> list[dict[str, Any]]:
        """The rows of responses.jsonl.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if a line is not valid JSON, or lacks a key.
        """
        path = self.file("responses.jsonl")
        # Not splitlines(), which also parts at characters that JSON leaves as they are.
        rows = [_json(path, line) for line in _text(path).split("\n") if line.strip()]
        for row in rows:
            _need(path.name, row, _RESPONSE)
        return rows

    def projections(self) -> dict[str, Any]:
        """The content of projections.json.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is not valid JSON, or lacks a key.
        """
        path = self.file("projections.json")
        found = _json(path, _text(path))
        _need(path.name, found, ("prompt", "tokens", "layers", "arms"))
        return found


def load_results(path: str | Path) -> Results:
    """A finished run from its folder, or from the results.json in it.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not valid JSON, lacks a key, or has a schema that this version does not know; or if a file
            of the run is not the one that it wrote.

    Example:
        >>> run = load_results("runs/mood")
        >>> print(run.content["behaviour"], run.scores().groupby(["arm", "direction"])["score"].mean())
    """
    path = Path(path).expanduser()
    file = path if path.suffix == ".json" else path / "results.json"
    content = checked(_json(file, _text(file)))
    run = Results(file.parent, content, _checksums(content.pop("files", {})))
    for name in run.files:
        run.file(name)
    return run


def checked_file(path: str | Path) -> Path:
    """A file by itself, such as vectors; if it lies in a run's folder as one of its files, it must be the run's.

    Raises:
        ValueError: if it is not the one that the run wrote.
    """
    path = Path(path).expanduser()
    return Results(path.parent, {}, _known(path.parent) or {}).file(path.name)


def check_no_run(folder: Path) -> None:
    """Raises ValueError if there is a finished run in a folder, whose scores others would replace."""
    if (folder / "results.json").exists():
        raise ValueError(f"out: must be a folder without a run, got {folder}, which has one. Give another folder.")


def files_of_run(folder: Path) -> list[str]:
    """Names of the files in a folder that are of the run there, finished or not, and not somebody's own."""
    known = _known(folder)
    return [*TABLES, REPORT, *(_MADE_BEFORE if known is None else known)]


def _known(folder: Path) -> dict[str, str] | None:
    """The checksums of the run in a folder; None if there is none, or none that has some."""
    file = folder / "results.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return _checksums(content["files"]) if "files" in content else None
    except (ValueError, TypeError):
        return None


def _checksums(files: Any) -> dict[str, str]:
    """The entry `files`, whose names may lead nowhere but into the run's own folder."""
    if not isinstance(files, Mapping) or not all(map(_is_checksum, files.items())):
        raise ValueError("results.json: files must be names with checksums. The file is damaged.")
    return dict(files)


def _is_checksum(entry: tuple[Any, Any]) -> bool:
    name, checksum = entry
    inside = isinstance(name, str) and not set(name) & set("/\\:\0") and name not in ("", ".", "..", "results.json")
    return inside and isinstance(checksum, str) and re.fullmatch("[0-9a-f]{64}", checksum) is not None


def checked(content: Any) -> dict[str, Any]:
    """The content of results.json with every key and column there, those of newer versions filled in.

    Raises:
        ValueError: names the key that is missing, or the schema that is not known.

    Example:
        >>> results = checked(run_experiment(load_experiment("mood"), Path("runs/mood")))
    """
    if isinstance(content, Mapping) and content.get("schema", SCHEMA) != SCHEMA:
        versions = content.get("versions")
        wrote = versions.get("rt_lens", "?") if isinstance(versions, Mapping) else "?"
        raise ValueError(
            f"results.json: schema {content['schema']!r} came, {SCHEMA} is wanted. Use the rt_lens that wrote it "
            f"(version {wrote}), or run the experiment again with this one."
        )
    _need("results.json", content, _KEYS)
    found = {"side_effects": [], "protocol": {"name": "answers", "why": "", "calibration": []}, **content}
    if "again" in found:
        _need("results.json: again", found["again"], _AGAIN)
    _need("results.json: choices", found["choices"], ("rule",))
    for direction, choice in choices_of(found).items():
        _need(f"results.json: choices: {direction}", choice, ("layer", "multiplier", "why"))
    _need("results.json: protocol", found["protocol"], ("name", "why", "calibration"))
    _need_each("results.json: protocol: calibration", found["protocol"]["calibration"], _CALIBRATION)
    for key in ("arms", "summary", "side_effects"):
        _need_each(f"results.json: {key}", found[key], _COLUMNS[key])
    if not found["summary"]:
        raise ValueError("results.json: summary is empty, at least one arm is wanted.")
    found["comparisons"] = _compared(found)
    return found


def choices_of(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Direction -> layer, multiplier and why."""
    return {direction: choice for direction, choice in content["choices"].items() if direction != "rule"}


def _compared(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The comparisons; those of an older run, which name one direction and no set, are told as they are now."""
    first, rows = content["summary"][0], []
    _need_each("results.json: comparisons", content["comparisons"], ("a", "b"))
    for row in content["comparisons"]:
        if "direction" in row:
            direction = row["direction"]
            told = {"a_direction": direction, "b_direction": "none" if row["b"] == "untuned" else direction}
            row = {**told, "set": first["set"], "scorer": first["scorer"], "p_holm": None, **row}
        rows.append(dict(row))
    _need_each("results.json: comparisons", rows, _COLUMNS["comparisons"])
    return rows


def _need_each(where: str, rows: Any, wanted: Sequence[str]) -> None:
    if not isinstance(rows, list):
        raise ValueError(f"{where}: a {type(rows).__name__} came, a list of rows is wanted. The file is damaged.")
    for row in rows:
        _need(where, row, wanted)


def _need(where: str, came: Any, wanted: Sequence[str]) -> None:
    if not isinstance(came, Mapping):
        raise ValueError(f"{where}: a {type(came).__name__} came, an object is wanted. The file is damaged.")
    if missing := [key for key in wanted if key not in came]:
        raise ValueError(
            f"{where}: no key {', '.join(missing)} (came: {', '.join(map(str, came))}). Run the experiment again, to "
            "its end."
        )


def _csv(path: Path, *, words: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    try:
        # Every text as it stands: pandas takes "None" and "NA" for holes.
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (ValueError, UnicodeDecodeError) as refusal:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path}: no table that can be read ({refusal}). Run the experiment again.") from None
    if missing := [column for column in (*words, *numbers) if column not in frame]:
        raise ValueError(
            f"{path}: no column {', '.join(missing)} (came: {', '.join(map(str, frame.columns))}). Run it again."
        )
    try:
        for column in numbers:
            frame[column] = frame[column].astype(float if column in ("score", "nll", "kl") else int)
    except ValueError as refusal:
        raise ValueError(f"{path}: column {column} holds what is no number ({refusal}). Run it again.") from None
    if frame.empty:
        raise ValueError(f"{path}: it has no rows. Run the experiment again, to its end.")
    return frame


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"run: {path} is not there. Run the experiment first, to its end.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as refusal:
        raise ValueError(f"{path}: not UTF-8 ({refusal}). The file is damaged; run the experiment again.") from None


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as refusal:
        raise ValueError(f"{path}: not valid JSON ({refusal}). Run the experiment again, to its end.") from None
