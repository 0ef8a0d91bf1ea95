"""What another tool's file may claim: layer numbers and hook names, checked before anything is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rt_lens.vectors.steering_vectors import Provenance, hook_names

# Bounds on what a file may claim, well above any model, so that a hostile one cannot fill the memory.
_MOST_LAYERS = 1024
_MOST_ENTRIES = 4096
_MOST_NUMBERS = 1 << 27

LAYER = re.compile(r"0|-?[1-9][0-9]{0,8}")
HOOK_NAME = re.compile(r"blocks\.(0|[1-9][0-9]{0,8})\.(?:[a-z0-9_]+\.)?hook_[a-z0-9_]+")
_PER_HEAD = (".hook_q", ".hook_k", ".hook_v", ".hook_z")
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class RefusedError(ValueError):
    """A fault that this subpackage names itself, which `reading` lets through as it is."""


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever a parser raises on a damaged or hostile file becomes one ValueError."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:  # parsers raise anything from KeyError to RecursionError
        why = f"{type(error).__name__}: {str(error)!r:.120}"
        raise ValueError(
            f"source must be a whole {kind} file, got {path}, which is truncated or of another kind ({why}). Save it "
            "again."
        ) from None


@dataclass(frozen=True)
class Naming:
    """Hook names for a foreign file's entries. Names and shapes are checked before any entry is read.

    Attributes:
        origin: the file or object, for messages.
        hook: kind of hook point that plain layer numbers mean.
        offset: added to layer numbers.
    """

    origin: str
    hook: str
    offset: int

    def count(self, n: int) -> None:
        if not 1 <= n <= _MOST_ENTRIES:
            raise RefusedError(f"{self.origin} must hold 1 to {_MOST_ENTRIES} entries, one for each layer, got {n}.")

    def __call__(self, shapes: Mapping[Any, Sequence[int]]) -> dict[str, Any]:
        """Hook name -> the file's own key, in the blocks' order."""
        self.count(len(shapes))
        keys: dict[tuple[int, str], Any] = {}
        widths: dict[str, tuple[Any, tuple[int, ...]]] = {}
        for key, shape in shapes.items():
            layer, name = self._hook_point(key)
            if (layer, name) in keys:
                raise RefusedError(
                    f"{self.origin} must hold one entry per hook point, got {shown(keys[layer, name])} and "
                    f"{shown(key)}, which are both {name}."
                )
            keys[layer, name] = key
            per_head = name.endswith(_PER_HEAD)
            if len(shape) != 1 + per_head or not all(shape):
                allowed = "[head, d_head]" if per_head else "[d_model]"
                raise RefusedError(
                    f"{shown(key)} in {self.origin} must have shape {allowed}, got {tuple(shape)!s:.60}."
                )
            first, before = widths.setdefault(name.split(".", 2)[2], (key, tuple(shape)))
            if before != tuple(shape):
                raise RefusedError(
                    f"{self.origin} must hold vectors of one width, since one model has one, got {before} for "
                    f"{shown(first)} and {tuple(shape)} for {shown(key)}."
                )
        if sum(math.prod(shape) for shape in shapes.values()) > _MOST_NUMBERS:
            raise RefusedError(f"{self.origin} must hold at most {_MOST_NUMBERS} numbers, got more, beyond any model.")
        return {name: keys[layer, name] for layer, name in sorted(keys)}

    def knows(self, key: Any) -> bool:
        """Whether a key is a layer number or a hook name at all."""
        text = str(key) if type(key) is int else key  # bool is an int too, but no layer
        return isinstance(text, str) and bool(LAYER.fullmatch(text) or HOOK_NAME.fullmatch(text))

    def _hook_point(self, key: Any) -> tuple[int, str]:
        """Block and hook name of a file's key."""
        if not self.knows(key):
            raise RefusedError(
                f"{self.origin} must name its entries by layer number or hook name, got {shown(key)}. "
                "Rename the entries to 0, 1, 2, ... or blocks.0.hook_resid_post, ..."
            )
        if named := HOOK_NAME.fullmatch(str(key)):
            no_offset(self.origin, self.offset)
            layer, name = int(named[1]), named[0]
        elif int(key) < 0:
            raise RefusedError(
                f"{self.origin} must number its layers from 0, got {key}, which counts from the end of a model that "
                "the file does not name."
            )
        else:
            layer = int(key) + self.offset
            name = hook_names([layer], self.hook)[0]
            if layer == -1 and self.hook == "resid_post":  # the embedding's output is what goes into block 0
                return 0, "blocks.0.hook_resid_pre"
        if not 0 <= layer < _MOST_LAYERS:
            raise RefusedError(
                f"{shown(key)} in {self.origin} must be a block in 0..{_MOST_LAYERS - 1}, got block {layer} (offset "
                f"{self.offset})."
            )
        return layer, name

    def read(self, shapes: Mapping[Any, Sequence[int]], entry: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """The vectors, as float32 copies."""
        vectors = {}
        for name, key in self(shapes).items():
            vectors[name] = entry(key).detach().to("cpu", torch.float32, copy=True).contiguous()
            if not torch.isfinite(vectors[name]).all():
                raise RefusedError(f"{shown(key)} in {self.origin} must be finite, got NaN or infinite values.")
        return vectors

    def read_tensors(self, tensors: Mapping[Any, Any]) -> dict[str, Tensor]:
        """The same for a dict of tensors."""
        self.count(len(tensors))
        for key, value in tensors.items():
            dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
            if not dense or value.is_meta or value.dtype not in _FLOATS:
                kind = f"a {value.layout} tensor of {value.dtype}" if isinstance(value, Tensor) else type(value)
                raise RefusedError(
                    f"{shown(key)} in {self.origin} must be a plain tensor of floating numbers, got {kind}."
                )
        return self.read({key: value.shape for key, value in tensors.items()}, tensors.__getitem__)


def float32(array: Any) -> Tensor:
    """A float32 copy as a tensor, in this machine's byte order."""
    with np.errstate(over="ignore"):  # infinite numbers are refused later, by name
        return torch.from_numpy(array.astype(np.float32))


def no_offset(origin: str | Path, offset: int) -> None:
    if offset:
        raise RefusedError(f"offset must be 0 for {origin}, which names hook points and not layers, got {offset}.")


def must_exist(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"source must be an existing file, got {path}.")


def unknown(model: str, behaviour: str) -> Provenance:
    """Provenance of what another tool made."""
    return Provenance(model, behaviour, "unknown", "unknown", "unknown", 0, "unknown", 0, "unknown")


def shown(name: Any) -> str:
    """A name from a file, shortened and without control characters of a terminal."""
    return f"{name!r:.60}"
