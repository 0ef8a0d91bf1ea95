"""Defines the files of a run's folder, and reads them back checked. The schema is defined here and nowhere else.

| file | what |
|---|---|
| results.json | the run: settings, choices and tables, see below; written last, so that it marks a complete run |
| scores.csv | a row per arm, direction, seed, set, item and scorer: prompt, category, score |
| texts.csv | a row per arm, direction, seed and text: tokens, nll, kl (nats, summed over tokens); only with texts |
| summary.csv | a row per arm, direction, set and scorer, side effects too: n, mean, low, high, perplexity, kl, seeds |
| responses.jsonl | a row per arm, direction, seed, set and prompt: response, every score, score (the first scorer's) |
| responses_at_kl.jsonl | the same at the budgets other than the stated one, with `budget`; only at equal damage |
| projections.json | prompt, tokens, layers, and arms: name -> projections [layer][token] |
| table.md, table.tex | summary and side effects as tables |
| vectors.safetensors, rep_tuned_DIRECTION.safetensors | the extracted vectors, and a weight delta per direction |
| settings.toml | settings that a search found, as tables of a behaviour's file; only after a search |
| report.html | the page that is made from these files later; no part of the run |

The files are put in place together, and results.json has a checksum of each: a file that another run left, or that
somebody changed, is refused by name. Files with other names belong to the user and stay.

results.json, schema 2. Intervals are of 95 %; null marks what was not measured.

| key | what |
|---|---|
| schema | 2 |
| behaviour, description, model, seed | names, and the seed of the splits |
| versions | package -> version |
| reproducibility | command, call: repeat this run; file, toml, sha256: name, text and hash of its settings file |
| reproducibility, more | settings: all of them, as they ran. The others are null if no file has these settings |
| protocol | name; why it was chosen; calibration: rows of task, n, mean, low, high, chance, seed |
| protocol, more | settings: of the honesty experiment; chance: set -> score of a random choice |
| choices | direction -> layer, multiplier, why; rule: how they were chosen |
| arms | a row per arm, direction, seed, set and scorer, see the columns below; with `seed` |
| summary | the same pooled over seeds, with `seeds` |
| side_effects | other sets and scorers, pooled: arm, direction, set, scorer, n, mean, low, high, seeds |
| comparisons | a - b: a, a_direction, b, b_direction, set, scorer, n, difference, low, high, p, p_holm, test, seeds |
| separability | a row per layer: accuracy, low, high, n |
| dose_response | a row per layer and multiplier: n, mean, low, high, perplexity, admissible |
| bound | the largest allowed rise of perplexity, as a ratio |
| history | a row per arm, direction, seed, split and step of tuning: losses |
| logit_lens | a row per layer and sign: tokens |
| persona_effect | null in runs without; what personas do to the untuned model's score, outside the test; see below |
| at_kl | null in runs without; kl: budgets; stated: the one of the tables above; see below |
| inside | null in runs without; what happens inside under each arm at the stated budget; see below |
| search | null in runs without one; settings of the arms, searched before the test; see below |
| seconds | stage -> seconds |
| seed_draws | what a tuning seed controls, in words; in runs without it a seed controls the order of the batches only |
| files | name -> SHA-256 of each other file of the run; `Results.files` when it is read |

Columns of arms and summary: arm, direction, set, scorer, n, mean, low, high (score); perplexity, perplexity_low,
perplexity_high, kl, kl_low, kl_high (nats per token), n_texts; facts, facts_low, facts_high, n_facts (fraction of
plain questions answered right); repetition, repetition_low, repetition_high.

persona_effect: scorer, seed, max_new_tokens; sides: rows of side (untuned, positive, negative), n, mean, low, high; n,
difference, low, high, p, test: positive minus negative, topic by topic; moves: 1, -1 or 0 for up, down or not shown;
alike: whether all responses have one score; range: the scorer's lowest and highest score, or null; end: low or high if
nearly all untuned responses stand there, else empty; n_at_end: how many.

at_kl compares the arms at equal damage. Since there is at_kl, each arm with a strength stands in all tables above as
it is at the stated budget. Further keys: side_effects, n_texts, max_new_tokens, n_personas (settings); arms: name ->
description; table: the columns of summary but facts and repetition, budget (null for the untuned model and for an arm
without a strength), own_kl and n_own (mean over seeds; runs of before lack them); strengths: arm, direction, seed,
budget, strength, kl, kl_low, kl_high, n_texts (on the texts that set the strength), own_kl, own_kl_low, own_kl_high,
n_own (on the untuned responses to the test prompts), reason (why the budget was not reached, or empty).

search: trials (for each arm), seed, budget, rule (how the trials were chosen), toml (the settings found, as tables of a
behaviour's file); table: a row per arm and number: settings; n, effect, low, high (change of the score on validation
prompts, mean of both directions); own_kl (on the untuned responses to them); trained_tokens; seconds; reason (why it
failed, or empty); front (whether no other trial beats it in effect and own_kl); chosen.

inside: of the first seed of each arm; every row has arm, direction, seed. shifts: layer, n, along, along_low,
along_high (shift along the vector on the untuned responses, in lengths of the vector), share, share_low, share_high (of
the shift's squared length that lies along it; null where nothing is shifted). likelihoods: set (own, toward, away:
responses to validation prompts of the untuned model, and of its personas), n, before, after (nats per token), change,
low, high. weights: block, relative, effective_rank, rank_limit.

Older runs still load. Schema 1 used other names: `_OLD_NAMES` maps them, and what is read back has the names of
schema 2. Runs without `files`, `reproducibility`, `side_effects`, `protocol`, scores.csv and texts.csv, or with
comparisons that have `direction`, a and b alone, are older still; missing entries are filled in where that is possible.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rt_lens.common.files import file_sha256

SCHEMA = 2
_OLD_NAMES = {
    "again": "reproducibility",
    "names_right": "contains_answer",
    "obeys": "follows_instruction",
    "other": "off_option_mass",
    "other_letters": "off_option_mass_multiple_choice",
    **{
        f"likelihood_{measure}_letters{end}": f"likelihood_{measure}_multiple_choice{end}"
        for measure in ("accuracy", "share", "margin")
        for end in ("", "_per_token")
    },
}
"""Names in files of schema 1 -> names now: a key of results.json, and the names of scorers."""
TABLES = (
    *("results.json", "scores.csv", "texts.csv", "summary.csv", "responses.jsonl", "projections.json"),
    *("table.md", "table.tex"),
)
"""The files that `write_results` writes."""
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
_AT_KL = {
    "table": ("arm", "direction", "budget", "set", "scorer", "n", "mean", "low", "high", "kl", "n_texts", "seeds"),
    "strengths": ("arm", "direction", "seed", "budget", "strength", "kl", "own_kl", "reason"),
}
_SEARCH = (
    *("arm", "number", "settings", "n", "effect", "low", "high", "own_kl", "trained_tokens", "seconds", "reason"),
    *("front", "chosen"),
)
_INSIDE = {
    "shifts": ("layer", "n", "along", "along_low", "along_high", "share", "share_low", "share_high"),
    "likelihoods": ("set", "n", "before", "after", "change", "low", "high"),
    "weights": ("block", "relative", "effective_rank", "rank_limit"),
}
_PERSONA_EFFECT = (
    *("scorer", "seed", "sides", "n", "difference", "low", "high", "p"),
    *("moves", "alike", "range", "end", "n_at_end"),
)
_CALIBRATION = ("task", "n", "mean", "low", "high", "chance", "seed")
_REPRODUCIBILITY = ("command", "call", "file", "toml", "sha256", "settings")
_RESPONSE = ("arm", "direction", "seed", "prompt", "response", "score")
_CELL = ("arm", "direction", "set", "scorer", "seed")
_log = logging.getLogger(__name__)
_AGAIN = "Run the experiment again until it finishes."
_DAMAGED = f"The file is damaged. {_AGAIN}"


@dataclass(frozen=True)
class Results:
    """A finished run, read from its folder.

    Attributes:
        folder: folder of the run; the methods read its other files.
        content: results.json, checked, with the names of this version and newer keys filled in.
        files: name -> SHA-256 of the run's other files; empty for older runs, whose files are not checked.

    Example:
        >>> run = load_results("runs/mood")
        >>> sorted(run.files)
        ['projections.json', 'responses.jsonl', 'scores.csv', 'summary.csv', 'table.md', 'table.tex', 'texts.csv']
        >>> list(run.texts())
        ['arm', 'direction', 'seed', 'text', 'tokens', 'nll', 'kl']
    """

    folder: Path
    content: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, str] = field(default_factory=dict, repr=False)

    def file(self, name: str) -> Path:
        """The path of a file in the folder, which need not exist.

        Raises:
            ValueError: if the file is not the one that the run wrote.
        """
        path = self.folder / name
        if name in self.files and path.is_file() and file_sha256(path) != self.files[name]:
            raise ValueError(
                f"run: {path} must be the file that the run of results.json wrote, got another: it belongs to another "
                "run, or it is damaged or changed. Run the experiment again until it finishes."
            )
        return path

    def scores(self) -> pd.DataFrame:
        """A row per arm, direction, set, scorer, seed and item: prompt, score. Older runs: from responses.jsonl.

        Raises:
            FileNotFoundError: if neither file exists.
            ValueError: if the file is damaged.
        """
        path = self.file("scores.csv")
        if path.is_file():
            texts = ("arm", "direction", "set", "scorer", "prompt")
            scores = _csv(path, texts=texts, numbers=("seed", "item", "score"))
            return scores.replace({"scorer": _OLD_NAMES}) if self._old else scores
        # Runs without scores.csv have one set and one scorer.
        first = self.content["summary"][0]
        rows = [{"set": first["set"], "scorer": first["scorer"], **row} for row in self.responses()]
        frame = pd.DataFrame(rows)
        return frame.assign(item=frame.groupby(list(_CELL)).cumcount())[[*_CELL, "item", "prompt", "score"]]

    def texts(self) -> pd.DataFrame | None:
        """A row per arm, direction, seed and text: tokens, nll, kl; None for a run without texts.

        Raises:
            ValueError: if the file is damaged.
        """
        path = self.file("texts.csv")
        numbers = ("seed", "text", "tokens", "nll", "kl")
        return _csv(path, texts=("arm", "direction"), numbers=numbers) if path.is_file() else None

    def responses(self) -> list[dict[str, Any]]:
        """The rows of responses.jsonl.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if a line is not valid JSON, or lacks a key.
        """
        return self._rows_of(self.file("responses.jsonl"))

    def responses_at_kl(self) -> list[dict[str, Any]]:
        """The rows of responses_at_kl.jsonl, with `budget`; none for a run without that file.

        Raises:
            ValueError: if a line is not valid JSON, or lacks a key.
        """
        path = self.file("responses_at_kl.jsonl")
        return self._rows_of(path, "budget") if path.is_file() else []

    def _rows_of(self, path: Path, *keys: str) -> list[dict[str, Any]]:
        # Not splitlines(), which also splits at characters that JSON does not escape.
        rows = [_json(path, line) for line in _text(path).split("\n") if line.strip()]
        for row in rows:
            _check_keys(path.name, row, (*_RESPONSE, *keys))
        return [{_OLD_NAMES.get(key, key): value for key, value in row.items()} for row in rows] if self._old else rows

    def projections(self) -> dict[str, Any]:
        """The content of projections.json.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if it is not valid JSON, or lacks a key.
        """
        path = self.file("projections.json")
        content = _json(path, _text(path))
        _check_keys(path.name, content, ("prompt", "tokens", "layers", "arms"))
        return content

    @property
    def _old(self) -> bool:
        """Whether the files have the names of schema 1."""
        return self.content["schema"] < SCHEMA


def load_results(path: str | Path) -> Results:
    """Reads a finished run from its folder, or from the results.json in it.

    Args:
        path: the folder, or its results.json. Runs of older versions load too, with the names of this version.

    Raises:
        FileNotFoundError: if there is no results.json.
        ValueError: if it is not valid JSON, lacks a key, or has a schema that this version does not know; or if a file
            of the run is not the one that it wrote.

    Example:
        >>> run = load_results("runs/mood")
        >>> run.content["behaviour"], run.content["choices"]["away"]["multiplier"]
        ('mood', -2.0)
        >>> scores = run.scores()
        >>> list(scores), len(scores)
        (['arm', 'direction', 'seed', 'set', 'item', 'category', 'scorer', 'score', 'prompt'], 1440)
    """
    path = Path(path).expanduser()
    file = path if path.suffix == ".json" else path / "results.json"
    content = checked(_json(file, _text(file)))
    if content["schema"] < SCHEMA:
        changes = ", ".join(f"{old!r} as {new!r}" for old, new in _OLD_NAMES.items())
        _log.info(
            "%s has schema %s; its old names are read as those of schema %s: %s.",
            file,
            content["schema"],
            SCHEMA,
            changes,
        )
    run = Results(file.parent, content, _checksums(content.pop("files", {})))
    for name in run.files:
        run.file(name)
    return run


def checked_file(path: str | Path) -> Path:
    """The path of a single file, such as vectors. If it is one of a run's files, it must be unchanged.

    Raises:
        ValueError: if the file is not the one that the run wrote.

    Example:
        >>> checked_file("runs/mood/scores.csv").name
        'scores.csv'
    """
    path = Path(path).expanduser()
    return Results(path.parent, {}, _checksums_in(path.parent) or {}).file(path.name)


def check_no_run(folder: Path) -> None:
    """Raises ValueError if a folder holds a finished run, whose scores would be replaced."""
    if (folder / "results.json").exists():
        raise ValueError(f"out must be a folder without a run, got {folder}, which has one. Choose a different folder.")


def files_of_run(folder: Path) -> list[str]:
    """Names of the files in a folder that belong to its run, finished or not, and not to the user."""
    checksums = _checksums_in(folder)
    return [*TABLES, REPORT, *(_MADE_BEFORE if checksums is None else checksums)]


def _checksums_in(folder: Path) -> dict[str, str] | None:
    """The checksums of the run in a folder; None without a run, or for a run without checksums."""
    file = folder / "results.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return _checksums(content["files"]) if "files" in content else None
    except (ValueError, TypeError):
        return None


def _checksums(files: Any) -> dict[str, str]:
    """The entry `files`. Its names must be plain file names, so that none leads out of the run's folder."""
    if not isinstance(files, Mapping) or not all(map(_is_checksum, files.items())):
        raise ValueError(
            f"results.json: files must be an object of file names and SHA-256 checksums, got {str(files)[:80]!r}. The "
            "file is damaged; run the experiment again."
        )
    return dict(files)


def _is_checksum(entry: tuple[Any, Any]) -> bool:
    name, checksum = entry
    inside = isinstance(name, str) and not set(name) & set("/\\:\0") and name not in ("", ".", "..", "results.json")
    return inside and isinstance(checksum, str) and re.fullmatch("[0-9a-f]{64}", checksum) is not None


def checked(content: Any) -> dict[str, Any]:
    """The content of results.json, with every key and column checked, and with the names and keys of this version.

    `schema` stays the number that the file has.

    Raises:
        ValueError: if a key is missing, or the schema is not known.

    Example:
        >>> content = load_results("runs/mood").content
        >>> old_row = {**content["summary"][0], "scorer": "obeys"}
        >>> checked({**content, "schema": 1, "summary": [old_row]})["summary"][0]["scorer"]
        'follows_instruction'
    """
    if isinstance(content, Mapping) and content.get("schema", SCHEMA) not in range(1, SCHEMA + 1):
        versions = content.get("versions")
        version = versions.get("rt_lens", "?") if isinstance(versions, Mapping) else "?"
        raise ValueError(
            f"results.json: schema must be at most {SCHEMA}, got {content['schema']!r}. Use the rt_lens that wrote the "
            f"file (version {version}), or run the experiment again with this one."
        )
    _check_keys("results.json", content, _KEYS)
    missing: dict[str, Any] = {
        "side_effects": [],
        "protocol": {"name": "answers", "why": "", "calibration": []},
        "at_kl": None,
        "search": None,
        "persona_effect": None,
        "inside": None,
    }
    content = {**missing, **content}
    if content["schema"] < SCHEMA:
        content = _with_new_names(content)
    if "reproducibility" in content:
        _check_keys("results.json: reproducibility", content["reproducibility"], _REPRODUCIBILITY)
    _check_keys("results.json: choices", content["choices"], ("rule",))
    for direction, choice in choices_of(content).items():
        _check_keys(f"results.json: choices: {direction}", choice, ("layer", "multiplier", "why"))
    if content["at_kl"] is not None:
        _check_keys("results.json: at_kl", content["at_kl"], ("kl", "stated", "arms", *_AT_KL))
        for key, columns in _AT_KL.items():
            _check_rows(f"results.json: at_kl: {key}", content["at_kl"][key], columns)
    if content["search"] is not None:
        _check_keys("results.json: search", content["search"], ("trials", "seed", "budget", "rule", "toml", "table"))
        _check_rows("results.json: search: table", content["search"]["table"], _SEARCH)
    if content["inside"] is not None:
        _check_keys("results.json: inside", content["inside"], tuple(_INSIDE))
        for key, columns in _INSIDE.items():
            _check_rows(f"results.json: inside: {key}", content["inside"][key], ("arm", "direction", "seed", *columns))
    if (effect := content["persona_effect"]) is not None:
        _check_keys("results.json: persona_effect", effect, _PERSONA_EFFECT)
        _check_rows("results.json: persona_effect: sides", effect["sides"], ("side", "n", "mean", "low", "high"))
    _check_keys("results.json: protocol", content["protocol"], ("name", "why", "calibration"))
    _check_rows("results.json: protocol: calibration", content["protocol"]["calibration"], _CALIBRATION)
    for key in ("arms", "summary", "side_effects"):
        _check_rows(f"results.json: {key}", content[key], _COLUMNS[key])
    if not content["summary"]:
        raise ValueError(
            "results.json: summary must have a row for at least one arm, got an empty list. Run the experiment again."
        )
    content["comparisons"] = _comparisons(content)
    return content


def _with_new_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file of schema 1 with the names of this version; damaged tables stay as they are."""
    renamed = {_OLD_NAMES.get(key, key): value for key, value in content.items()}
    for key in ("arms", "summary", "side_effects", "comparisons"):
        if isinstance(rows := renamed[key], list):
            renamed[key] = [_with_new_scorer(row) if isinstance(row, Mapping) else row for row in rows]
    return renamed


def _with_new_scorer(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "scorer": _OLD_NAMES.get(row["scorer"], row["scorer"])} if "scorer" in row else dict(row)


def choices_of(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Direction -> layer, multiplier and why."""
    return {direction: choice for direction, choice in content["choices"].items() if direction != "rule"}


def _comparisons(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The comparisons; those of an older run, which have one direction and no set, get the columns of newer ones."""
    first, rows = content["summary"][0], []
    _check_rows("results.json: comparisons", content["comparisons"], ("a", "b"))
    for row in content["comparisons"]:
        if "direction" in row:
            direction = row["direction"]
            directions = {"a_direction": direction, "b_direction": "none" if row["b"] == "untuned" else direction}
            row = {**directions, "set": first["set"], "scorer": first["scorer"], "p_holm": None, **row}
        rows.append(dict(row))
    _check_rows("results.json: comparisons", rows, _COLUMNS["comparisons"])
    return rows


def _check_rows(name: str, rows: Any, keys: Sequence[str]) -> None:
    if not isinstance(rows, list):
        raise ValueError(f"{name} must be a list of rows, got a {type(rows).__name__}. {_DAMAGED}")
    for row in rows:
        _check_keys(name, row, keys)


def _check_keys(name: str, entry: Any, keys: Sequence[str]) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name} must be an object, got a {type(entry).__name__}. {_DAMAGED}")
    if missing := [key for key in keys if key not in entry]:
        raise ValueError(
            f"{name} must have the key {', '.join(missing)}, got {', '.join(map(str, entry)) or 'none'}. {_AGAIN}"
        )


def _csv(path: Path, *, texts: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    try:
        # Read every text as it is: pandas reads "None" and "NA" as missing values.
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (ValueError, UnicodeDecodeError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path} must be a CSV table, got a file that cannot be read ({error}). {_AGAIN}") from None
    if missing := [column for column in (*texts, *numbers) if column not in frame]:
        raise ValueError(
            f"{path} must have the column {', '.join(missing)}, got {', '.join(map(str, frame.columns))}. {_AGAIN}"
        )
    try:
        for column in numbers:
            frame[column] = frame[column].astype(float if column in ("score", "nll", "kl") else int)
    except ValueError as error:
        raise ValueError(f"{path}: column {column} must hold numbers, got a text ({error}). {_AGAIN}") from None
    if frame.empty:
        raise ValueError(f"{path} must have at least one row, got none. {_AGAIN}")
    return frame


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"run: there is no file {path}. Run the experiment first, until it finishes.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, got other bytes ({error}). {_DAMAGED}") from None


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be valid JSON, got a text that is not ({error}). {_AGAIN}") from None
