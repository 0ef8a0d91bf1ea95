"""Files written whole or not at all, and read without running anything in them."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from torch import Tensor


def write_atomically(path: Path, content: bytes) -> Path:
    """Writes to a temporary name beside `path`, then renames: a reader finds the old file, the new one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}-{uuid4().hex}"  # not mkstemp, whose files only their owner may read
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def read_safetensors(path: Path, argument: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is truncated or no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in list(stored.keys())}, stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{argument}: {path} is truncated or no safetensors file ({error}). Make it again.") from None
