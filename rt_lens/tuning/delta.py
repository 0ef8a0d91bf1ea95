"""What tuning changed: a difference of weights that can be put on, taken off, added up and scaled, and its file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rt_lens.common.files import read_safetensors, write_safetensors
from rt_lens.models.protocol import Model

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
        dtype: of the model's weights; files from before it was kept are of float32.

    Raises:
        ValueError: if a change is not finite.

    Example:
        >>> with delta.applied(model):
        ...     print(generate(model, ["Tell me about your weekend."]))
        >>> undo = (happier - 0.5 * formal).apply(model)
        >>> undo()
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
                    f"delta: the change of {name} holds NaN or infinite values; finite ones are wanted. Tune with a "
                    "lower learning_rate, or scale it by less."
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
            raise ValueError(f"factor: {factor!r} came, a finite number is wanted. `0.5 * delta` is half the change.")
        changes = {name: change * float(factor) for name, change in self.changes.items()}
        return WeightDelta(changes, self.model, {"times": float(factor), "of": self.config}, [], self.dtype)

    __rmul__ = __mul__

    def _check_can_join(self, other: WeightDelta) -> None:
        if not isinstance(other, WeightDelta):
            raise ValueError(f"delta: {type(other).__name__} came, a WeightDelta is wanted. Deltas add up with deltas.")
        if other.model.casefold() != self.model.casefold():
            raise ValueError(f"delta: one is of {self.model}, the other of {other.model}. Tune both on one model.")
        for name in self.changes.keys() & other.changes.keys():
            mine, theirs = self.changes[name].shape, other.changes[name].shape
            if mine != theirs:
                raise ValueError(
                    f"delta: {name} is {tuple(mine)} in one and {tuple(theirs)} in the other. Make both on one model, "
                    "loaded with one backend."
                )

    def apply(self, model: Model | nn.Module) -> Callable[[], None]:
        """Puts the change on, until the function that comes back takes it off again.

        The changed parameters get memory of their own; the memory from before is kept, and put back by the undo, so
        that the weights are bit for bit what they were. What the delta does not name is not touched: where input and
        output embeddings are tied, as two parameters on one memory, a change of the one leaves the other as it was.

        The model's name is not compared: one model has several, by its name, its folder and its GGUF file.

        Args:
            model: HookedTransformer or TransformerBridge.

        Returns:
            The undo. Called again it does nothing.

        Raises:
            ValueError: if the model lacks a parameter, or it has another shape; nothing has changed then. From the
                undo: if something else has replaced a parameter's memory since; nothing has changed then either.

        Example:
            >>> undo = delta.apply(model)
            >>> generate(model, ["Tell me about your weekend."])
            >>> undo()
        """
        swap = _Swap(self, model)
        try:
            swap.put_on()
        except BaseException:
            swap.take_off()
            raise
        return swap.take_off

    @contextmanager
    def applied(self, model: Model | nn.Module) -> Iterator[Any]:
        """The tuned model, for as long as the block lasts; afterwards the weights are bit for bit what they were.

        Raises:
            ValueError: as `apply` and its undo.
        """
        swap = _Swap(self, model)
        try:  # not `undo = self.apply(model)`: Ctrl-C could come between it and the `try`
            swap.put_on()
            yield model
        finally:
            swap.take_off()

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
            raise ValueError(f"delta: {path} is not a file of a weight delta of schema {_SCHEMA}.")
        return cls(changes, stored["model"], stored["config"], stored["history"], stored.get("dtype", "float32"))


class _Swap:
    """A delta and a model's parameters: the memory before, and the memory with the change."""

    def __init__(self, delta: WeightDelta, model: Model | nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name, change in delta.changes.items():
            if name not in parameters or parameters[name].shape != change.shape:
                has = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise ValueError(
                    f"delta: {name} is {tuple(change.shape)} ({delta.model}), this model has {has}. Load the model "
                    "that the delta was made on, with the same backend."
                )
        self.parameters = {name: parameters[name] for name in delta.changes}
        # An inference tensor as a parameter's memory would forbid gradients after the caller's inference_mode ends.
        with torch.inference_mode(False), torch.no_grad():
            self.before = {name: parameter.data for name, parameter in self.parameters.items()}
            self.now = {name: _changed(self.before[name], change) for name, change in delta.changes.items()}

    def put_on(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = self.now[name]

    def take_off(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.data_ptr() not in (self.now[name].data_ptr(), self.before[name].data_ptr()):
                raise ValueError(
                    f"delta: {name} was replaced by something else since this change was put on. Undo the later one "
                    "first."
                )
        for name, parameter in self.parameters.items():
            parameter.data = self.before[name]
        self.parameters = {}  # so that a second undo does nothing, whatever was put on in between
        self.before, self.now = {}, {}


def _changed(weight: Tensor, change: Tensor) -> Tensor:
    change = change.to(weight)
    # x + (-0.0) has the bits of x for every x; -0.0 + 0.0 has not.
    return weight + change.masked_fill(change == 0, -0.0)
