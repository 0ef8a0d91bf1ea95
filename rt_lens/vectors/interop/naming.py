"""What another tool's file may claim: layer numbers and hook names, judged before anything is read."""

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
    """A fault that we found, which `reading` lets through as it is."""


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever a parser trips over in a damaged or hostile file comes out as one ValueError."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:  # parsers raise anything from KeyError to RecursionError
        why = f"{type(error).__name__}: {str(error)!r:.120}"
        raise ValueError(f"vectors: {path} is truncated or no {kind} file ({why}). Make it again.") from None


@dataclass(frozen=True)
class Naming:
    """Hook names for a foreign file's entries. Names and shapes are judged before any entry is read.

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
            raise RefusedError(
                f"vectors: {self.origin} holds {n} entries; 1 to {_MOST_ENTRIES} are wanted, one for each layer."
            )

    def __call__(self, shapes: Mapping[Any, Sequence[int]]) -> dict[str, Any]:
        """Hook name -> the file's own key, in the blocks' order."""
        self.count(len(shapes))
        places: dict[tuple[int, str], Any] = {}
        widths: dict[str, tuple[Any, tuple[int, ...]]] = {}
        for key, shape in shapes.items():
            place = self._place(key)
            if place in places:
                raise RefusedError(
                    f"vectors: {shown(places[place])} and {shown(key)} in {self.origin} are both {place[1]}."
                )
            places[place] = key
            per_head = place[1].endswith(_PER_HEAD)
            if len(shape) != 1 + per_head or not all(shape):
                wanted = "[head, d_head]" if per_head else "[d_model]"
                raise RefusedError(
                    f"vectors: {shown(key)} in {self.origin} has shape {tuple(shape)!s:.60}; {wanted} is wanted."
                )
            first, before = widths.setdefault(place[1].split(".", 2)[2], (key, tuple(shape)))
            if before != tuple(shape):
                raise RefusedError(
                    f"vectors: widths differ in {self.origin}: {shown(first)} has {before}, {shown(key)} has "
                    f"{tuple(shape)}. One model's vectors have one width."
                )
        if sum(math.prod(shape) for shape in shapes.values()) > _MOST_NUMBERS:
            raise RefusedError(f"vectors: {self.origin} claims more than {_MOST_NUMBERS} numbers, beyond any model.")
        return {place[1]: places[place] for place in sorted(places)}

    def knows(self, key: Any) -> bool:
        """Whether a key is a layer number or a hook name at all."""
        text = str(key) if type(key) is int else key  # bool is an int too, but no layer
        return isinstance(text, str) and bool(LAYER.fullmatch(text) or HOOK_NAME.fullmatch(text))

    def _place(self, key: Any) -> tuple[int, str]:
        """Block and hook name of a file's key."""
        if not self.knows(key):
            raise RefusedError(
                f"vectors: {shown(key)} in {self.origin} is no layer number and no hook name. "
                "Rename the entries to 0, 1, 2, ... or blocks.0.hook_resid_post, ..."
            )
        if named := HOOK_NAME.fullmatch(str(key)):
            no_offset(self.origin, self.offset)
            layer, name = int(named[1]), named[0]
        elif int(key) < 0:
            raise RefusedError(
                f"vectors: layer {key} in {self.origin} counts from the model's end, which is not known here. "
                "Number the layers from 0."
            )
        else:
            layer = int(key) + self.offset
            name = hook_names([layer], self.hook)[0]
            if layer == -1 and self.hook == "resid_post":  # the embedding's output is what goes into block 0
                return 0, "blocks.0.hook_resid_pre"
        if not 0 <= layer < _MOST_LAYERS:
            raise RefusedError(
                f"vectors: {shown(key)} in {self.origin} means block {layer} (offset {self.offset}); "
                f"0..{_MOST_LAYERS - 1} is wanted."
            )
        return layer, name

    def read(self, shapes: Mapping[Any, Sequence[int]], entry: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """The vectors, each a float32 copy of its own."""
        vectors = {}
        for name, key in self(shapes).items():
            vectors[name] = entry(key).detach().to("cpu", torch.float32, copy=True).contiguous()
            if not torch.isfinite(vectors[name]).all():
                raise RefusedError(f"vectors: {shown(key)} in {self.origin} holds NaN or infinite values.")
        return vectors

    def read_tensors(self, tensors: Mapping[Any, Any]) -> dict[str, Tensor]:
        """The same for a dict of tensors."""
        self.count(len(tensors))
        for key, value in tensors.items():
            dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
            if not dense or value.is_meta or value.dtype not in _FLOATS:
                came = f"a {value.layout} tensor of {value.dtype}" if isinstance(value, Tensor) else type(value)
                raise RefusedError(
                    f"vectors: {shown(key)} in {self.origin} is {came}; a plain tensor of floating numbers is wanted."
                )
        return self.read({key: value.shape for key, value in tensors.items()}, tensors.__getitem__)


def float32(array: Any) -> Tensor:
    """A tensor of its own, in this machine's byte order."""
    with np.errstate(over="ignore"):  # infinite numbers are refused later, by name
        return torch.from_numpy(array.astype(np.float32))


def no_offset(origin: str | Path, offset: int) -> None:
    if offset:
        raise RefusedError(f"offset: {offset} came, but {origin} names hook points and no layers. Leave it out.")


def must_exist(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"vectors: there is no file {path}.")


def unknown(model: str, behaviour: str) -> Provenance:
    """Provenance of what another tool made."""
    return Provenance(model, behaviour, "unknown", "unknown", "unknown", 0, "unknown", 0, "unknown")


def shown(name: Any) -> str:
    """A name from a file, short and with nothing in it that a terminal obeys."""
    return f"{name!r:.60}"
