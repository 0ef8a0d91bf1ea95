"""Readers of users' files and tables: JSON, CSV, plain lines, TOML, frames. They do not know what the rows mean."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import threading
import tomllib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

ROW_ENDINGS = (".jsonl", ".json", ".csv", ".tsv")
"""The endings of the files that `read_rows` reads."""

Table: TypeAlias = Iterable[Any]
"""Rows in memory: a pandas frame, a `datasets.Dataset`, a list of objects, or a list of pairs of texts."""

_OLD_NAMES = {"opener": "prefill", "negative_opener": "negative_prefill", "openers": "prefills"}
"""Names that fields and TOML keys had in earlier versions -> today's names."""


class Row(NamedTuple):
    """A line of JSONL, an item of a JSON list or a row of a table, without empty values (null, NaN, an empty cell).

    Attributes:
        where: file and line, for messages; the first line of a row that spans several.
        cells: name -> value.
        names_at: file and line of the column names, if that is another line.
    """

    where: str
    cells: dict[str, Any]
    names_at: str = ""


def read_text(path: Path, argument: str) -> str:
    r"""A text file as UTF-8, whatever the system's encoding is, without a byte-order mark.

    Line ends stay as they are: `\r\n` within a quoted cell of a CSV file is part of the cell.

    Raises:
        ValueError: if it is in another encoding; the message begins with `argument` and names the line.
    """
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    nul = content.find(b"\0")  # no UTF-8 text has one; UTF-16 has one in each letter
    try:
        text = content.decode("utf-8")
        at = nul
    except UnicodeDecodeError as error:
        text, at = "", error.start
    if at >= 0:
        line = content[:at].count(b"\n") + 1
        raise ValueError(
            f"{argument}: {path.name} must be UTF-8 text, got the byte {content[at]:#04x} in line {line}. "
            "Save it as UTF-8 (a spreadsheet calls it 'CSV UTF-8')."
        )
    return text


def read_lines(path: Path, argument: str) -> list[tuple[int, str]]:
    r"""The lines of a text file that are not blank, with their numbers from 1.

    Only `\n`, `\r\n` and `\r` end a line. `str.splitlines` would also split at U+2028, U+0085 or a form feed, which
    may be part of a text.
    """
    lines = _unix(read_text(path, argument)).split("\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dictionary; a syntax error names the file and the line."""
    try:
        return tomllib.loads(_unix(read_text(path, "config")))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config must be valid TOML, got {path}: {error}. Correct that line.") from None


def read_rows(path: Path, argument: str, known: Collection[str], foreign: Collection[str] = ()) -> list[Row]:
    """The rows of a .jsonl, .json, .csv or .tsv file.

    A JSON file is a list of objects, or of pairs of texts, which become the fields `positive` and `negative`. Commas,
    semicolons or tabs separate the cells of a CSV file; the delimiter is the one that finds most known names in the
    first line. Cells may have any length, and quoted cells may contain line ends.

    Args:
        path: the file.
        argument: what the rows are, `pairs` say; messages begin with it.
        known: names that columns may have. They determine the delimiter, and are not enforced here: see
            `refuse_misspelt`.
        foreign: names that they may have in files of other tools.

    Raises:
        ValueError: a line that is no JSON object, a row with more cells than columns, a column without a name or with
            another's name, or quotes that do not close; the message names the line.

    Warns:
        UserWarning: for columns under an earlier version's name.
    """
    read = {".jsonl": _objects, ".json": _items}.get(path.suffix.lower(), _table)
    rows = list(read(path, argument, [*known, *_OLD_NAMES], foreign))
    _warn_of_old_names((name for row in rows for name in row.cells), f"{argument}: {path.name}")
    return [row._replace(cells=_renamed(row.cells, f"{argument}: {row.where}")) for row in rows]


def table_rows(table: Table, argument: str) -> list[Row]:
    """The rows of a table in memory, as `read_rows` gives those of a file.

    Args:
        table: a pandas frame, a `datasets.Dataset`, a list of objects, or a list of pairs of texts.
        argument: what the rows are; messages begin with it.

    Raises:
        ValueError: names the row that is neither an object nor a pair of texts; a dataset of several splits.

    Example:
        >>> table_rows([("It was great.", "It was awful.")], "pairs")[0].cells
        {'positive': 'It was great.', 'negative': 'It was awful.'}
    """
    if isinstance(table, Mapping):
        raise ValueError(
            f"{argument} must be one table, got a {type(table).__name__} of {', '.join(map(str, table))}. Give one of "
            "its parts."
        )
    rows = table.to_dict("records") if hasattr(table, "to_dict") and hasattr(table, "columns") else table
    return [_row(_plain(row), f"row {number}", argument) for number, row in enumerate(rows, start=1)]


def _plain(row: Any) -> Any:
    """Arrays, which frames hold as cells, as lists."""
    if not isinstance(row, Mapping):
        return row
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}


def current_names(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A table in which the fields that an earlier version called otherwise have today's names.

    Args:
        table: as it was read.
        where: the file, for messages.

    Raises:
        ValueError: if a field is there under both names.

    Warns:
        UserWarning: for each old name.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     current_names({"topics": ["Rain"], "openers": ["It"]}, "rain.toml")
        {'topics': ['Rain'], 'prefills': ['It']}
        >>> print(caught[0].message)
        rain.toml: 'openers' is now 'prefills'; the old name still works.
    """
    _warn_of_old_names(table, where)
    return _renamed(table, where)


def _renamed(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    for old, new in _OLD_NAMES.items():
        if old in table and new in table:
            raise ValueError(f"{where} must have either {new!r} or {old!r}, got both. Leave out {old!r}.")
    return {_OLD_NAMES.get(name, name): value for name, value in table.items()}


def _warn_of_old_names(names: Iterable[str], where: str) -> None:
    for old in dict.fromkeys(name for name in names if name in _OLD_NAMES):
        warnings.warn(f"{where}: {old!r} is now {_OLD_NAMES[old]!r}; the old name still works.", stacklevel=4)


def _without_old(names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in _OLD_NAMES]


def refuse_misspelt(row: Row, argument: str, known: Collection[str]) -> list[str]:
    """The unknown names of a row.

    Raises:
        ValueError: if an unknown name resembles a known one that the row lacks.
    """
    unknown = [name for name in row.cells if name not in known]
    for name in unknown:
        near = nearest(name, known)
        if near and near not in row.cells:
            raise ValueError(
                f"{argument}: {row.names_at or row.where} must have the fields {', '.join(known)}, got {name!r}. "
                f"Did you mean {near!r}?"
            )
    return unknown


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that another one resembles, if there is one."""
    return next(iter(get_close_matches(name.strip().lower(), known, n=1)), None)


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _is_empty(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return not value
    if value is None or type(value).__name__ == "NAType":  # of pandas, which compares with nothing
        return True
    return bool(value == "" or value != value)  # NaN is not equal to itself


def _objects(path: Path, argument: str, known: Collection[str], foreign: Collection[str]) -> Iterator[Row]:
    for number, line in read_lines(path, argument):
        where = f"{path.name}, line {number}"
        try:
            item, why = json.loads(line, object_pairs_hook=_named_once), ""
        except (ValueError, RecursionError) as error:
            item, why = None, f" ({error})"
        yield _row(item, where, argument, why, shown=line, fix="Write one object, in braces, on each line.")


def _items(path: Path, argument: str, known: Collection[str], foreign: Collection[str]) -> Iterator[Row]:
    """The items of a list; a file may also hold an object with the list as its only value."""
    text = _unix(read_text(path, argument))
    decoder, at, line = json.JSONDecoder(object_pairs_hook=_named_once), 0, 1
    begin = re.match(r'\s*(?:\{\s*"[^"]*"\s*:\s*)?\[\s*', text)
    if begin is None:
        raise ValueError(
            f"{argument}: {path.name} must hold a list, got {text.strip()[:60]!r}. Write [ and ] around the items."
        )
    after = begin.end()
    while not text.startswith("]", after):
        at, line = after, line + text.count("\n", at, after)
        where = f"{path.name}, line {line}"
        try:
            item, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{argument}: {where} must be JSON, got {text[at : at + 60]!r} ({error}). Correct it."
            ) from None
        yield _row(item, where, argument)
        comma = re.compile(r"\s*(,\s*|(?=\]))").match(text, end)
        if comma is None:
            raise ValueError(
                f"{argument}: {where} must be followed by a comma or the list's end, got {text[end : end + 20]!r}. "
                "Correct it."
            )
        after = comma.end()
    rest = text[after + 1 :].strip()
    if rest.startswith("}") and rest[1:].lstrip().startswith("{"):
        raise ValueError(
            f"{argument}: {path.name} must hold one list, got an object on each line. Name it .jsonl, or write [ and ] "
            "around the objects and commas between them."
        )
    if rest and not (begin.group().lstrip().startswith("{") and rest == "}"):
        raise ValueError(f"{argument}: {path.name} must end with its list, got {rest[:60]!r} after it. Leave that out.")


def _row(
    item: Any,
    where: str,
    argument: str,
    why: str = "",
    *,
    shown: str = "",
    fix: str = "Write each as an object with named fields.",
) -> Row:
    """An object as a row; a pair of texts as the row of a positive and a negative one."""
    if isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(part, str) for part in item):
        item = dict(zip(("positive", "negative"), item, strict=True))
    if isinstance(item, Mapping) and not why:
        try:
            json.dumps(item, ensure_ascii=False, default=str).encode()  # fails at half an emoji
            return Row(where, {name: value for name, value in item.items() if not _is_empty(value)})
        except UnicodeEncodeError as error:
            why = f" ({error})"
    raise ValueError(
        f"{argument}: {where} must be a JSON object, got {(shown or str(item)).strip()[:60]!r}{why}. {fix}"
    )


def _named_once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in entries]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the name {twice!r} occurs twice")
    return dict(entries)


def _table(path: Path, argument: str, known: Collection[str], foreign: Collection[str]) -> Iterator[Row]:
    text = read_text(path, argument)
    delimiter, skipped = _delimiter(text, [*known, *foreign], "\t" if path.suffix.lower() == ".tsv" else ",;\t")
    records = _records(text, delimiter, f"{argument}: {path.name}")[skipped:]
    if not records:
        return
    number, names = records[0][0], [name.strip() for name in records[0][1]]
    at = f"{path.name}, line {number}"
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"{argument}: {at} must name each column once, got {twice!r} twice. Rename one.")
    if not any(name in [*known, *foreign] or nearest(name, known) for name in names):
        raise ValueError(
            f"{argument}: {at} must name the columns (some of {', '.join(_without_old(known))}), got "
            f"{', '.join(names)[:60]!r}. Write their names into the first line."
        )
    for number, cells in records[1:]:
        where = f"{path.name}, line {number}"
        if len(cells) > len(names):
            raise ValueError(
                f"{argument}: {where} must have at most one cell for each of the {len(names)} columns, got "
                f"{len(cells)}. Put texts that hold {delimiter!r} in quotes."
            )
        filled = {name: cell for name, cell in zip(names, cells, strict=False) if cell}
        if "" in filled:
            raise ValueError(
                f"{argument}: {where} must have a name for each of its columns, got {filled['']!r} in one that has "
                "none. Name it in the first line."
            )
        yield Row(where, filled, at)


def _delimiter(text: str, known: Collection[str], candidates: str) -> tuple[str, int]:
    """The delimiter that fits the column names, and the number of records before these."""
    if declared := re.match(r'"?sep=(.)"?[\r\n]', text):  # spreadsheets may declare it in a first line
        return declared[1], 1

    def fit(delimiter: str) -> tuple[int, int]:
        try:
            names = next(
                (cells for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(cells)), []
            )
        except csv.Error:
            return 0, 0
        return sum(name.strip() in known for name in names), len(names)

    return max(candidates, key=fit), 0  # the first of equals


def _records(text: str, delimiter: str, where: str) -> list[tuple[int, list[str]]]:
    """The cells of each record that is not blank, with the number of its first line."""
    with _cells_as_long_as(len(text)):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        records, start = [], 1
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    records.append((start, cells))
                start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{where}, line {start} must close each quote that it opens, got: {error}. Write a quote within a "
                'quoted text twice ("").'
            ) from None
    return records


_LIMIT = threading.Lock()


@contextmanager
def _cells_as_long_as(length: int) -> Iterator[None]:
    """Context manager that raises csv's limit on the length of a cell, which applies to the whole process."""
    with _LIMIT:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, length))
        try:
            yield
        finally:
            csv.field_size_limit(before)
