"""Folders written whole or not at all, beside nobody else's files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError


def check_free(path: Path, n_bytes: int) -> None:
    """Raises ValueError if something is at `path` already, it cannot be written, or the disk lacks `n_bytes`."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"path must be a new or empty folder, got {path}, which has content. Name a new folder, or delete that one "
            "first."
        )
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(
            f"path must be in a folder that can be written, got {path.name} in {above}. Choose a different folder."
        )
    free = shutil.disk_usage(above).free
    if n_bytes > free:
        raise ValueError(
            f"path must be on a disk with {n_bytes / 1e6:,.0f} MB free, got {above} with {free / 1e6:,.0f} MB. Name "
            "another disk, or free some space."
        )


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Context manager of a folder under a temporary name beside `path`, which gets that name at the end of the block.

    On an exception, Ctrl-C or a full disk nothing of it is left.

    Raises:
        OSError: if the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.parent / f".{path.name}-{uuid4().hex}"  # not mkdtemp, whose folders only their owner may read
    try:
        making.mkdir()
        yield making
        readable = making.stat().st_mode & 0o666
        for file in making.iterdir():  # safetensors writes files that only their owner may read
            file.chmod(readable)
        os.replace(making, path)
    except SafetensorError as error:  # it wraps the system's error
        raise OSError(f"path: {path} could not be written ({error}). Free some space, or name another disk.") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
