"""What tuning changed: a difference of weights that can be applied, reverted, added up and scaled, and its file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rt_lens.common.files import read_safetensors, write_safetensors
from rt_lens.models.backends import slots_of, translated
from rt_lens.models.backends.base import Slot
from rt_lens.models.protocol import Model
from rt_lens.tuning.config import modern

_SCHEMA = 1


@dataclass(frozen=True)
class WeightDelta:
    """What tuning changed: the difference to add to each changed parameter.

    Deltas of one model can be added, subtracted, negated and multiplied by numbers (task arithmetic, Ilharco et al.
    2023): `0.5 * delta` is half the tuning, `-delta` its opposite. A parameter that only one of two deltas changes
    counts as unchanged in the other. What comes out has no history, and a `config` that says what it was made of.

    Attributes:
        changes: parameter name -> difference, of the parameter's shape.
        model: name of the model it belongs to.
        config: how it was made: the TuneConfig as a dictionary, what was baked, `{"sum_of": [config, config]}`, or
            `{"times": factor, "of": config}`.
        history: rows of step, split, total, token, cosine, kl.
        dtype: of the model's weights; float32 for files that do not name it.

    Raises:
        ValueError: if a change is not finite.

    Example:
        >>> with delta.applied(model):
        ...     answers = generate(model, ["Tell me about your weekend."], max_new_tokens=4)
        >>> undo = (-0.5 * delta).apply(model)
        >>> undo()
        >>> path = delta.save("away.safetensors")
        >>> WeightDelta.load(path).config["direction"]
        'away'
    """

    changes: dict[str, Tensor] = field(repr=False)
    model: str
    config: dict[str, Any]
    history: list[dict[str, Any]] = field(repr=False)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, change in self.changes.items():
            if not torch.isfinite(change).all():
                raise ValueError(
                    f"delta must be finite, got NaN or infinite values in the change of {name}. Tune with a lower "
                    "learning_rate, or scale it by less."
                )

    def __add__(self, other: WeightDelta) -> WeightDelta:
        self._check_can_join(other)
        changes = self.changes | other.changes
        for name in self.changes.keys() & other.changes.keys():
            changes[name] = self.changes[name] + other.changes[name].to(self.changes[name].device)
        return WeightDelta(changes, self.model, {"sum_of": [self.config, other.config]}, [], self.dtype)

    def __sub__(self, other: WeightDelta) -> WeightDelta:
        self._check_can_join(other)
        return self + -other

    def __neg__(self) -> WeightDelta:
        return self * -1

    def __mul__(self, factor: float) -> WeightDelta:
        if not isinstance(factor, Real) or isinstance(factor, bool) or not math.isfinite(factor):
            raise ValueError(f"factor must be a finite number, got {factor!r}. `0.5 * delta` is half the change.")
        changes = {name: change * float(factor) for name, change in self.changes.items()}
        return WeightDelta(changes, self.model, {"times": float(factor), "of": self.config}, [], self.dtype)

    __rmul__ = __mul__

    def _check_can_join(self, other: WeightDelta) -> None:
        if not isinstance(other, WeightDelta):
            raise ValueError(
                f"delta must be a WeightDelta, got {type(other).__name__}. Deltas can be added and scaled."
            )
        if other.model.casefold() != self.model.casefold():
            raise ValueError(f"deltas must be of one model, got {self.model} and {other.model}. Tune both on one.")
        for name in self.changes.keys() & other.changes.keys():
            first, second = self.changes[name].shape, other.changes[name].shape
            if first != second:
                raise ValueError(
                    f"deltas must have the same shapes, got {tuple(first)} and {tuple(second)} for {name}. Make both "
                    "on "
                    "one model, loaded with one backend."
                )

    def apply(self, model: Model | nn.Module) -> Callable[[], None]:
        """Applies the change, until the function that it returns reverts it.

        The changed parameters get new memory; the memory from before is kept, and the undo puts it back, so that the
        weights are bit for bit what they were. What the delta does not name is not touched: where input and output
        embeddings are tied, as two parameters on one memory, a change of the one leaves the other as it was.

        The model's name is not compared: one model has several, by its name, its folder and its GGUF file.

        Args:
            model: HookedTransformer or TransformerBridge.

        Returns:
            The undo. A second call does nothing.

        Raises:
            ValueError: if the model lacks a parameter, or it has another shape; nothing has changed then. From the
                undo: if something else has replaced a parameter's memory since; nothing has changed then either.

        Example:
            >>> undo = delta.apply(model)
            >>> answers = generate(model, ["Tell me about your weekend."], max_new_tokens=4)
            >>> undo()
        """
        swap = _Swap(self, model)
        try:
            swap.apply()
        except BaseException:
            swap.revert()
            raise
        return swap.revert

    @contextmanager
    def applied(self, model: Model | nn.Module) -> Iterator[Any]:
        """Context manager that applies the change; afterwards the weights are bit for bit what they were.

        Raises:
            ValueError: as `apply` and its undo.
        """
        swap = _Swap(self, model)
        try:  # not `undo = self.apply(model)`: Ctrl-C could come between it and the `try`
            swap.apply()
            yield model
        finally:
            swap.revert()

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file with the configuration and history, in one rename."""
        content = {"schema": _SCHEMA, "kind": "weight_delta", "model": self.model, "config": self.config}
        header = {"rt_lens": json.dumps({**content, "history": self.history, "dtype": self.dtype})}
        tensors = {name: change.detach().cpu().contiguous() for name, change in self.changes.items()}
        return write_safetensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> WeightDelta:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is truncated, or no file of a weight delta.
        """
        changes, header = read_safetensors(Path(path), "delta")
        stored = json.loads(header.get("rt_lens", "{}"))
        if stored.get("kind") != "weight_delta" or stored.get("schema") != _SCHEMA:
            raise ValueError(f"path must be a file of a WeightDelta of schema {_SCHEMA}, got {path}.")
        config = modern(stored["config"])
        return cls(changes, stored["model"], config, stored["history"], stored.get("dtype", "float32"))


class _Swap:
    """A delta and a model's parameters: the memory before, and the memory with the change."""

    def __init__(self, delta: WeightDelta, model: Model | nn.Module) -> None:
        slots = slots_of(model)
        changes = fitting(delta, model)
        several = _held_by_several(slots)
        self.slots = {name: slots[name] for name in changes}
        # An inference tensor as a parameter's memory would forbid gradients after the caller's inference_mode ends.
        with torch.inference_mode(False), torch.no_grad():
            self.parameters = {name: _parameter(slots[name], changes[name], several) for name in changes}
            self.before = {name: parameter.data for name, parameter in self.parameters.items()}
            self.now = {name: _changed(self.before[name], change) for name, change in changes.items()}
        self.held = {name: slot.parameter for name, slot in self.slots.items()}

    def apply(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = self.now[name]
            self.slots[name].hold(parameter)

    def revert(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.data_ptr() not in (self.now[name].data_ptr(), self.before[name].data_ptr()):
                raise ValueError(
                    f"delta cannot be reverted: {name} was replaced by something else since this change was applied. "
                    "Undo the later one first."
                )
        for name, parameter in self.parameters.items():
            parameter.data = self.before[name]
            self.slots[name].hold(self.held[name])
        self.parameters = {}  # so that a second undo does nothing, whatever was applied in between
        self.before, self.now = {}, {}


def fitting(delta: WeightDelta, model: Model | nn.Module) -> dict[str, Tensor]:
    """The delta's changes under the model's own names.

    Raises:
        ValueError: the model lacks a parameter, or it has another shape.
    """
    slots, changes = slots_of(model), translated(model, delta.changes)
    check_in_memory({name: slot.parameter for name, slot in slots.items() if name in changes})
    for name, change in changes.items():
        if name not in slots or slots[name].shape != tuple(change.shape):
            has = slots[name].shape if name in slots else "no such parameter"
            raise ValueError(
                f"delta must fit the model, got {tuple(change.shape)} for {name} ({delta.model}); this model has "
                f"{has}. Load the model that the delta was made on."
            )
    return changes


def check_in_memory(parameters: Mapping[str, nn.Parameter | None]) -> None:
    """Raises a ValueError for parameters that a device map has put on the disk."""
    away = [name for name, parameter in parameters.items() if parameter is not None and parameter.is_meta]
    if away:
        raise ValueError(
            f"model must have the weights that change in memory, got {len(away)} that device_map has put elsewhere, "
            f"such as {away[0]}. Load the model with a device_map that keeps those blocks on a device."
        )


def _held_by_several(slots: Mapping[str, Slot]) -> set[int]:
    """The ids of tied parameters: a change of the one place leaves the other as it was."""
    count = Counter(id(slot.parameter) for slot in slots.values() if slot.parameter is not None)
    return {parameter for parameter, n in count.items() if n > 1}


def _parameter(slot: Slot, change: Tensor, several: set[int]) -> nn.Parameter:
    """What takes the change: the parameter, a copy of a tied one, or zeros for a bias that is not there."""
    weight = slot.parameter
    if weight is None:
        like: Any = slot.module.weight
        return nn.Parameter(torch.zeros_like(change, dtype=like.dtype, device=like.device), requires_grad=False)
    return nn.Parameter(weight.data, weight.requires_grad) if id(weight) in several else weight


def _changed(weight: Tensor, change: Tensor) -> Tensor:
    change = change.to(weight)
    # x + (-0.0) has the bits of x for every x; -0.0 + 0.0 has not.
    return weight + change.masked_fill(change == 0, -0.0)
