"""Storage for what the untuned model computes once in a run: one block of memory, or by size a memory-mapped file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

IN_MEMORY = 2 * 1024**3
"""Bytes up to which `auto` stores activations in memory."""


class ActivationStore:
    """Residuals of many rows end to end, in the order in which they are stored."""

    def __init__(self, lengths: Sequence[int], like: Any, where: Literal["auto", "memory", "disk"]) -> None:
        """Allocates the space.

        Args:
            lengths: positions of each row.
            like: the model's configuration: its width, type and device.
            where: `auto` takes the disk above IN_MEMORY bytes.

        Raises:
            OSError: if the disk is full; nothing is left there.
        """
        shape = (sum(lengths), like.d_model)
        size = shape[0] * shape[1] * like.dtype.itemsize
        self.on_disk = where == "disk" or (where == "auto" and size > IN_MEMORY)
        if self.on_disk and size:
            self._all = _mapped(size, like.dtype).view(shape)
        else:
            self._all = torch.empty(shape, dtype=like.dtype, device=like.device)
        self._parts = iter(self._all.split(list(lengths)))

    def put(self, residual: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """Copies a row into the store and returns the stored copy."""
        part = next(self._parts)
        part.copy_(residual)
        return part


def _mapped(size: int, dtype: torch.dtype) -> Tensor:
    handle, name = tempfile.mkstemp(prefix="rt_lens-")
    try:
        # Space is allocated first: a full disk raises now, but would kill the process when the mapping is written.
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(handle, 0, size)
            except OSError as error:
                raise OSError(
                    f"prefix_cache needs {size / 1024**2:,.0f} MB, which {Path(name).parent} does not have free "
                    f"({error}). Set TMPDIR to a larger disk, or prefix_cache='off'."
                ) from error
        return torch.from_file(name, shared=True, size=size // dtype.itemsize, dtype=dtype)
    finally:
        os.close(handle)
        # The mapping outlives the name, so not even a killed process leaves a file; Windows keeps it until the end.
        with contextlib.suppress(PermissionError):
            Path(name).unlink()
