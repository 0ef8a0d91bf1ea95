"""The state of a tuning run on disk: written whole, at intervals, and resumed with the same bits."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rt_lens.common.files import check_can_write, read_safetensors, remove_leftovers, write_safetensors
from rt_lens.models.checksums import parameters_sha256, tensors_sha256
from rt_lens.models.protocol import Model
from rt_lens.tuning.config import TuneConfig, modern
from rt_lens.tuning.tuning_data import Row, TuningData
from rt_lens.tuning.weights import TrainableParam

_SCHEMA = 1
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class State:
    """Where a run stands after a step; everything that the next step depends on, beside the leaves and the optimiser.

    Attributes:
        step: the last step taken.
        best: "parameter/part" -> the leaf's value at the lowest validation loss.
        best_loss: that loss; infinite before the first validation.
        worse: validations since.
        done: whether the run has ended.
        history: rows of step, split and losses.
    """

    best: dict[str, Tensor]
    step: int = 0
    best_loss: float = float("inf")
    worse: int = 0
    done: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


def named_tensors(leaves: Mapping[str, TrainableParam]) -> dict[str, nn.Parameter]:
    """ "parameter/part" -> tensor, of all leaves."""
    return {f"{name}/{part}": tensor for name, leaf in leaves.items() for part, tensor in leaf.tensors.items()}


class Checkpoint:
    """One file for one run: refuses another run's."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """A checkpoint of a run; whatever can be refused is refused now, before the run's long work.

        Args:
            path: of the file; it need not be there yet.
            run: what makes two runs the same (`run_of`).

        Raises:
            ValueError: if there is a file that is damaged, no checkpoint, or another run's; or a folder.
            OSError: if `path` cannot be written.
        """
        self.path, self.run = path, _as_stored(run)
        remove_leftovers(path)
        stored = None if os.path.isdir(path) else self._stored()
        if stored is None or not stored[1].get("done"):  # a finished run writes no more
            check_can_write(path, "checkpoint")

    def reads(self, material: TuningData) -> None:
        """Adds what the run reads to what makes it the same.

        Raises:
            ValueError: if there is a checkpoint of a run that read something else.
        """
        self.run |= _as_stored(contents_of(material))
        self._stored()

    def _stored(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The file's tensors and state, if it is this run's as far as that is known; None if there is no file."""
        if not os.path.exists(self.path):  # Path's own raises where a folder may not be looked into
            return None
        tensors, header = read_safetensors(self.path, "checkpoint")
        try:
            content = json.loads(header.get("rt_lens", "{}"))
            known = content["kind"] == "tuning_checkpoint" and content["schema"] == _SCHEMA
            run, state = modern(dict(content["run"])), dict(content["state"])
        except (ValueError, KeyError, TypeError):  # some other program's header
            known = False
        if not known:
            raise ValueError(
                f"checkpoint must be a checkpoint of schema {_SCHEMA}, got {self.path}. Choose a different name."
            )
        if differing := [name for name, value in self.run.items() if run.get(name) != value]:
            raise ValueError(
                f"checkpoint must be of this run, got {self.path}, which belongs to a run with other "
                f"{', '.join(differing)}. Choose a different name, or remove the file to start again."
            )
        return tensors, state

    def load(self, leaves: Mapping[str, TrainableParam], optimiser: torch.optim.Optimizer) -> State | None:
        """The state that the file holds, with leaves and optimiser put back; None if there is no file.

        Raises:
            ValueError: if it is damaged, no checkpoint, or another run's.
        """
        if (on_disk := self._stored()) is None:
            return None
        stored, state = on_disk
        best: dict[str, Tensor] = {}
        for name, leaf in named_tensors(leaves).items():
            for part in ("now", "best"):
                if f"{part}/{name}" not in stored or stored[f"{part}/{name}"].shape != leaf.shape:
                    raise ValueError(
                        f"checkpoint must be complete, got {self.path} without a whole {part}/{name}. Remove it to "
                        "start "
                        "again."
                    )
            # Copies, since what is read lies in the mapped file, whose space on the disk would stay in use.
            leaf.data.copy_(stored[f"now/{name}"])
            best[name] = stored[f"best/{name}"].to(leaf.device, copy=True)
            moments = {part: stored[f"{part}/{name}"] for part in _MOMENTS if f"{part}/{name}" in stored}
            if moments:
                optimiser.state[leaf] = {part: moment.to(leaf.device, copy=True) for part, moment in moments.items()}
        for param in leaves.values():
            param.write()
        return State(best, **state)

    def save(self, state: State, leaves: Mapping[str, TrainableParam], optimiser: torch.optim.Optimizer) -> None:
        """Writes the state; if the disk refuses, it warns and the run continues, with the last file as it was."""
        tensors = {f"best/{name}": tensor for name, tensor in state.best.items()}
        for name, leaf in named_tensors(leaves).items():
            tensors[f"now/{name}"] = leaf
            moments = optimiser.state.get(leaf, {})  # none for a weight that no loss has reached yet
            tensors |= {f"{part}/{name}": moments[part] for part in _MOMENTS if part in moments}
        plain = {key: value for key, value in vars(state).items() if key != "best"}
        content = {"schema": _SCHEMA, "kind": "tuning_checkpoint", "run": self.run, "state": plain}
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            write_safetensors(self.path, on_cpu, {"rt_lens": json.dumps(content)})
        except OSError as error:
            earlier = "the one before it is still there" if self.path.exists() else "there is none before it"
            warnings.warn(
                f"checkpoint: {self.path} could not be written at step {state.step} ({error}); {earlier}. Tuning goes "
                "on. Free some space on the disk, or give another path.",
                stacklevel=2,
            )


def run_of(
    config: TuneConfig, model: Model | nn.Module, about: Mapping[str, Any], weights: str | None = None
) -> dict[str, Any]:
    """What makes two runs the same beside the texts: settings, and checksums of the model's weights and the vectors.

    How memory is used is no part of it, so that a run which ran out of it can go on with less; nor is the model's name,
    since one model has several. `weights` is the checksum of the model's, where it is known already.
    """
    memory = ("micro_batch_size", "prefix_cache")
    return {
        **{name: value for name, value in asdict(config).items() if name not in memory},
        "model": parameters_sha256(model) if weights is None else weights,
        **about,
    }


def contents_of(material: TuningData) -> dict[str, str]:
    """Checksums of the texts that a run reads.

    What the untuned model computed for them is left out: it follows from them, and another number of threads would
    give it other last bits.
    """
    rows = {"train": material.train, "validation": material.held_out, "neutral": material.neutral}
    return {name: tensors_sha256(part for row in some for part in _parts(row)) for name, some in rows.items()}


def _parts(row: Row) -> Iterator[tuple[str, Tensor]]:
    yield from (("tokens", row.tokens), ("predicts", row.predicts), ("choices", row.choices), ("shares", row.shares))
    yield from row.places.items()
    for other in (row.rejected, *(row.contrast or ())):
        if other is not None:
            yield from _parts(other)


def _as_stored(run: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: lists for tuples."""
    return dict(json.loads(json.dumps(run)))
