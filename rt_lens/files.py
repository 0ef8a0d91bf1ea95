"""Files written whole or not at all, and read without running anything in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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
            raise OSError(f"{path} could not be written ({error})") from error
    return path


def check_can_write(path: Path, argument: str) -> None:
    """Tries now what a later write to `path` would fail at: the folder, its permissions, the name.

    Raises:
        ValueError: if `path` is a folder.
        OSError: if the system refuses.
    """
    if os.path.isdir(path):  # Path's own raises where a folder may not be looked into
        raise ValueError(f"{argument}: {path} is a folder; a file's name is wanted, such as {path / 'it'}.safetensors.")
    try:
        with _folder_beside(path) as folder:
            (folder / path.name).touch()
    except OSError as error:
        raise OSError(f"{argument}: {path} cannot be written ({error}). Give another place.") from error


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
        raise FileNotFoundError(f"{argument}: there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in list(stored.keys())}, stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{argument}: {path} is truncated or no safetensors file ({error}). Make it again.") from None
