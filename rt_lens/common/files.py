"""Files written whole or not at all, alone or several together, and read without running anything in them."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_log = logging.getLogger(__name__)
_BEFORE = ".before"
_LONGEST = 100  # letters of a name, so that beginnings and endings can be put to it
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?", re.IGNORECASE | re.DOTALL)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder of its own on the same disk as `path`, gone in the end with all that is in it.

    A folder and not a file, because safetensors makes a temporary file with a name of its own where it writes; this way
    what a killed process leaves can be told from other files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}-{uuid4().hex}"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _in_its_place(path: Path) -> Iterator[Path]:
    """A temporary name, renamed to `path` in the end; on any exception nothing is left."""
    path = path.expanduser()
    with _folder_beside(path) as folder:
        temporary = folder / path.name
        yield temporary
        temporary.chmod(folder.stat().st_mode & 0o666)  # safetensors' files only their owner may read
        with temporary.open("r+b") as written:
            os.fsync(written.fileno())  # else a power cut could leave the new name with nothing in it
        os.replace(temporary, path)


def write_atomically(path: Path, content: bytes) -> Path:
    """Writes to a temporary name beside `path`, then renames: a reader finds the old file, the new one, or none."""
    with _in_its_place(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """As `write_atomically`, without a copy of the tensors in memory.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    with _in_its_place(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(header))
        except SafetensorError as error:  # it wraps the system's error in words of its own
            raise OSError(f"{path} cannot be written ({error}). Free some disk space or give another path.") from error
    return path


@contextmanager
def together(folder: Path, replaced: Callable[[Path], Iterable[str]], last: str, *, kept: str = "") -> Iterator[Path]:
    """A folder aside, whose files take their place in `folder` together at the end of the block.

    Until then, and on any exception, `folder` is exactly as it was. What else lies in it stays.

    Args:
        folder: made if it is not there.
        replaced: names of the files in `folder` that belong to the set before: those that the new one lacks go.
        last: the file that stands for the whole set: the first that is taken away, and the last that is put there.
        kept: what the files are called in the message that says where they are after an exception; without it they are
            removed then.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    folder = folder.expanduser().resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if kept and (left := _asides_of(folder)):
        places = ", ".join(map(str, left))
        _log.warning(
            "%s: unfinished runs (still under way, or broken off) keep their files in %s. Delete those that you do not "
            "need.", folder, places,
        )  # fmt: skip
    aside = _aside_of(folder)
    aside.mkdir()
    try:
        yield aside
        _take_place(aside, folder, replaced(folder), last)
    except BaseException as error:
        if kept and any(aside.iterdir()):
            told = f"{kept} broken off. The files so far are kept in {aside}; {folder} is unchanged."
            _log.warning("%s", told)
            error.add_note(told)
        else:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _aside_of(folder: Path) -> Path:
    """A new name beside a folder, or in it where beside it nothing can be written or is another disk."""
    name = f".{folder.name}-{uuid4().hex}"
    if not os.access(folder.parent, os.W_OK):
        return folder / name
    elsewhere = folder.exists() and folder.stat().st_dev != folder.parent.stat().st_dev
    return (folder if elsewhere else folder.parent) / name


def _asides_of(folder: Path) -> list[Path]:
    """Those that are there, with something in them."""
    pattern = f".{escape(folder.name)}-{'[0-9a-f]' * 32}"
    return [each for place in (folder.parent, folder) for each in sorted(place.glob(pattern)) if any(each.glob("*"))]


def _take_place(aside: Path, folder: Path, replaced: Iterable[str], last: str) -> None:
    """Moves the set before out of a folder and another one in; on any exception all is where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    new = sorted((path.name for path in aside.iterdir()), key=lambda name: (name == last, name))
    old = [name for name in dict.fromkeys([last, *replaced, *new]) if os.path.lexists(folder / name)]
    if folders := [name for name in old if (folder / name).is_dir()]:
        raise OSError(f"{folder / folders[0]} must be free for a file, got a folder of that name. Rename the folder.")
    (aside / _BEFORE).mkdir()
    moves = [(folder / name, aside / _BEFORE / name) for name in old]
    moves += [(aside / name, folder / name) for name in new]
    moved = 0
    try:
        for moved, (source, target) in enumerate(moves):  # noqa: B007
            os.replace(source, target)
    except BaseException:
        for source, target in reversed(moves[: moved + 1]):
            if os.path.lexists(target) and not os.path.lexists(source):
                os.replace(target, source)
        (aside / _BEFORE).rmdir()
        raise


def check_name(name: object, argument: str) -> str:
    """The name, if it may become a file's name on any system: it leads nowhere, hides nothing, and is no device.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(name, str) or name != as_name(name):
        raise ValueError(
            f"{argument} must be 1 to {_LONGEST} letters, digits, spaces and - _ . that begin with a letter, digit or "
            f"_, do not end with a space or dot and are no name of a Windows device, got {str(name)[:60]!r}. "
            "Choose another name: files are named after it."
        )
    return name


def as_name(text: str) -> str:
    """The nearest name to a text that `check_name` lets pass."""
    kept = "".join(sign if sign in " -_." or unicodedata.category(sign)[0] in "LMN" else "_" for sign in text)
    kept = kept.lstrip(" -.")[:_LONGEST]
    while len(kept.encode()) > 2 * _LONGEST:
        kept = kept[:-1]
    kept = kept.rstrip(" .") or "_"
    return f"_{kept}"[:_LONGEST] if _DEVICES.fullmatch(kept) or unicodedata.combining(kept[0]) else kept


def file_sha256(path: Path) -> str:
    """Checksum of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_can_write(path: Path, argument: str) -> None:
    """Tries now what a later write to `path` would fail at: the folder, its permissions, the name.

    Raises:
        ValueError: if `path` is a folder.
        OSError: if the system refuses.
    """
    if os.path.isdir(path):  # Path's own raises where a folder may not be looked into
        raise ValueError(
            f"{argument} must be the name of a file, got the folder {path}. Name a file in it, such as "
            f"{path / 'it'}.safetensors."
        )
    try:
        with _folder_beside(path) as folder:
            (folder / path.name).touch()
    except OSError as error:
        raise OSError(
            f"{argument} must be a path that can be written, got {path} ({error}). Give another path."
        ) from error


def remove_leftovers(path: Path) -> None:
    """Removes what processes that were killed while they wrote `path` have left beside it."""
    for folder in path.parent.glob(f".{escape(path.name)}-{'[0-9a-f]' * 32}"):
        shutil.rmtree(folder, ignore_errors=True)


def read_safetensors(path: Path, argument: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is truncated or no safetensors file.
    """
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{argument} must be a file, got {path}, which does not exist. Check the path.")
    try:
        with safe_open(path, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in list(stored.keys())}, stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{argument} must be a complete safetensors file, got {path}, which is damaged or of another kind "
            f"({error}). Write the file again."
        ) from None
