"""Files: written whole or not at all, alone or as a set, and read without running any code in them."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from uuid import uuid4

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_log = logging.getLogger(__name__)
_BEFORE = ".before"
_LONGEST = 100  # characters of a name, which leaves room for prefixes and endings
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?", re.IGNORECASE | re.DOTALL)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Context manager that gives a temporary folder on the same disk as `path`, and removes it with its content.

    It is a folder because safetensors writes a temporary file under its own name. So `remove_leftovers` can recognise
    what a killed process leaves behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}-{uuid4().hex}"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _renamed_at_the_end(path: Path) -> Iterator[Path]:
    """Context manager that gives a temporary path and renames it to `path`; after an exception nothing is left."""
    path = path.expanduser()
    with _folder_beside(path) as folder:
        temporary = folder / path.name
        yield temporary
        temporary.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read
        with temporary.open("r+b") as stream:
            os.fsync(stream.fileno())  # else a power cut could leave an empty file under the new name
        os.replace(temporary, path)


def write_atomically(path: Path, content: bytes) -> Path:
    """Writes to a temporary name beside `path`, then renames it: a reader finds the old file, the new one, or none.

    Example:
        >>> from pathlib import Path
        >>> write_atomically(Path("notes.txt"), b"hello").read_bytes()
        b'hello'
    """
    with _renamed_at_the_end(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Writes tensors like `write_atomically`, without a copy of them in memory.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    with _renamed_at_the_end(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(header))
        except SafetensorError as error:  # it wraps the system's error
            raise OSError(f"{path} cannot be written ({error}). Free some disk space or give another path.") from error
    return path


@contextmanager
def together(folder: Path, replaced: Callable[[Path], Iterable[str]], last: str, *, kept: str = "") -> Iterator[Path]:
    """Context manager that gives a temporary folder and moves its files into `folder` together at the end.

    Until then, and after an exception, `folder` is unchanged. Other files in it stay.

    Args:
        folder: the target; created if it does not exist.
        replaced: a function from `folder` to the names of its files that belong to the previous set; those that the
            new set lacks are removed.
        last: the file that marks a complete set: the first to be removed, and the last to be moved in.
        kept: what to call the files in the message that says where they are after an exception. Without it they are
            removed.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    folder = folder.expanduser().resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if kept and (unfinished := _temporary_folders_of(folder)):
        paths = ", ".join(map(str, unfinished))
        _log.warning(
            "%s: unfinished runs (still under way, or broken off) keep their files in %s. Delete those that you do not "
            "need.", folder, paths,
        )  # fmt: skip
    temporary = _temporary_folder_of(folder)
    temporary.mkdir()
    try:
        yield temporary
        _exchange(temporary, folder, replaced(folder), last)
    except BaseException as error:
        if kept and any(temporary.iterdir()):
            message = f"{kept} broken off. The files so far are kept in {temporary}; {folder} is unchanged."
            _log.warning("%s", message)
            error.add_note(message)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)


def _temporary_folder_of(folder: Path) -> Path:
    """A new name beside a folder; or in it, if its parent cannot be written or is on another disk."""
    name = f".{folder.name}-{uuid4().hex}"
    if not os.access(folder.parent, os.W_OK):
        return folder / name
    on_another_disk = folder.exists() and folder.stat().st_dev != folder.parent.stat().st_dev
    return (folder if on_another_disk else folder.parent) / name


def _temporary_folders_of(folder: Path) -> list[Path]:
    """The temporary folders of a folder that exist and are not empty."""
    pattern = f".{escape(folder.name)}-{'[0-9a-f]' * 32}"
    candidates = [path for parent in (folder.parent, folder) for path in sorted(parent.glob(pattern))]
    return [path for path in candidates if any(path.glob("*"))]


def _exchange(temporary: Path, folder: Path, replaced: Iterable[str], last: str) -> None:
    """Moves the previous set out of a folder and the new one in; after an exception all files are where they were."""
    folder.mkdir(parents=True, exist_ok=True)
    new = sorted((path.name for path in temporary.iterdir()), key=lambda name: (name == last, name))
    old = [name for name in dict.fromkeys([last, *replaced, *new]) if os.path.lexists(folder / name)]
    if folders := [name for name in old if (folder / name).is_dir()]:
        raise OSError(f"{folder / folders[0]} must be free for a file, got a folder of that name. Rename the folder.")
    (temporary / _BEFORE).mkdir()
    moves = [(folder / name, temporary / _BEFORE / name) for name in old]
    moves += [(temporary / name, folder / name) for name in new]
    moved = 0
    try:
        for moved, (source, target) in enumerate(moves):  # noqa: B007
            os.replace(source, target)
    except BaseException:
        for source, target in reversed(moves[: moved + 1]):
            if os.path.lexists(target) and not os.path.lexists(source):
                os.replace(target, source)
        (temporary / _BEFORE).rmdir()
        raise


def check_name(name: object, argument: str) -> str:
    """The name, if it can be a file's name on any system: no path, not hidden, and no device of Windows.

    Raises:
        ValueError: if it cannot.

    Example:
        >>> check_name("mood 2", "name")
        'mood 2'
        >>> check_name("../mood", "name")
        Traceback (most recent call last):
        ValueError: name must be 1 to 100 letters, digits, spaces and - _ . ..., got '../mood'. ...
    """
    if not isinstance(name, str) or name != as_name(name):
        raise ValueError(
            f"{argument} must be 1 to {_LONGEST} letters, digits, spaces and - _ . that begin with a letter, digit or "
            f"_, do not end with a space or dot and are no name of a Windows device, got {str(name)[:60]!r}. "
            "Choose another name: files are named after it."
        )
    return name


def as_name(text: str) -> str:
    """The nearest name to a text that `check_name` accepts.

    Example:
        >>> as_name("mood: happy/sad")
        'mood_ happy_sad'
    """
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


def lock_of(path: Path) -> FileLock:
    """The lock of a file or folder among all processes and threads of this machine; the system frees a dead one's."""
    # Not beside the file: a lock file stays there for good, and not every shared disk has locks.
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    return FileLock(Path(tempfile.gettempdir()) / f"rt_lens-{name}.lock", mode=0o666)  # other users may share the path


def check_can_write(path: Path, argument: str) -> None:
    """Checks now whether a later write to `path` can succeed: the folder, its permissions, the name.

    Raises:
        ValueError: if `path` is a folder.
        OSError: if the system refuses.
    """
    if os.path.isdir(path):  # Path.is_dir raises if the parent folder may not be read
        raise ValueError(
            f"{argument} must be the name of a file, got the folder {path}. Name a file in it, such as "
            f"{path / 'it'}.safetensors."
        )
    try:
        with _folder_beside(path) as folder:
            (folder / path.name).touch()
    except OSError as error:
        raise OSError(
            f"{argument} must be a path that can be written, got {path} ({error}). Choose a different path."
        ) from error


def remove_leftovers(path: Path) -> None:
    """Removes the temporary folders of processes that were killed while they wrote `path`."""
    for folder in path.parent.glob(f".{escape(path.name)}-{'[0-9a-f]' * 32}"):
        shutil.rmtree(folder, ignore_errors=True)


def read_safetensors(path: Path, argument: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        FileNotFoundError: if the file does not exist.
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
