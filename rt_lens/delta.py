"""What tuning changed: a difference of weights that can be put on and taken off, and its file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from rt_lens.files import read_safetensors, write_atomically

_SCHEMA = 1


@dataclass(frozen=True)
class WeightDelta:
    """What tuning changed: the difference to add to each changed parameter.

    Attributes:
        changes: parameter name -> difference, of the parameter's shape.
        model: name of the model it belongs to.
        config: how it was made: the TuneConfig as a dictionary, or what was baked.
        history: rows of step, split, total, token, cosine, kl.

    Example:
        >>> with delta.applied(model):
        ...     print(generate(model, ["Tell me about your weekend."]))
    """

    changes: dict[str, Tensor] = field(repr=False)
    model: str
    config: dict[str, Any]
    history: list[dict[str, Any]] = field(repr=False)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[Any]:
        """The tuned model, for as long as the block lasts; afterwards the weights are bit for bit what they were.

        Raises:
            ValueError: if the model lacks a parameter, or it has another shape.
        """
        parameters = dict(model.named_parameters())
        for name, change in self.changes.items():
            if name not in parameters or parameters[name].shape != change.shape:
                has = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise ValueError(f"delta: {name} is {tuple(change.shape)} ({self.model}), this model has {has}.")
        before = {name: parameters[name].data for name in self.changes}
        try:
            for name, change in self.changes.items():
                parameters[name].data = before[name] + change.to(before[name])
            yield model
        finally:
            for name, kept in before.items():
                parameters[name].data = kept

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file with the configuration and history, in one rename."""
        content = {"schema": _SCHEMA, "kind": "weight_delta", "model": self.model, "config": self.config}
        header = {"rt_lens": json.dumps({**content, "history": self.history})}
        tensors = {name: change.detach().cpu().contiguous() for name, change in self.changes.items()}
        return write_atomically(Path(path), save(tensors, metadata=header))

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
        return cls(changes, stored["model"], stored["config"], stored["history"])
