"""Files of deltas and steering vectors as the endpoint's models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rt_lens.arms.intervention import Intervention
from rt_lens.arms.projections import check_arms
from rt_lens.models.protocol import Model
from rt_lens.results.schema import checked_file
from rt_lens.steering.binding import add
from rt_lens.tuning.delta import WeightDelta
from rt_lens.vectors.interop.tensors import import_vectors
from rt_lens.vectors.steering_vectors import SteeringVectors

UNTUNED = "untuned"
"""The name of the model as it is."""


def arms_of(deltas: Sequence[Path], steer: Sequence[str]) -> Callable[[Model], dict[str, Intervention]]:
    """Reads the files, and gives a function that binds them to a model.

    Args:
        deltas: files of weight deltas.
        steer: `FILE:LAYER:MULTIPLIER` each.

    Raises:
        ValueError: a file that is none, a steer that is not of that form, or two files of one name.
    """
    read = {path: WeightDelta.load(checked_file(path)) for path in deltas}
    steered = [_steered(text) for text in steer]
    names = [UNTUNED, *(path.stem for path in deltas), *(name for name, *_ in steered)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"delta and steer must be files with different names, got {twice!r} twice. Rename one.")

    def bound(model: Model) -> dict[str, Intervention]:
        """Name -> intervention, the untuned model first."""
        hooks = {name: add(vectors, [layer], multiplier) for name, vectors, layer, multiplier in steered}
        arms: dict[str, Intervention] = {UNTUNED: None, **{path.stem: delta for path, delta in read.items()}, **hooks}
        check_arms(model, arms)
        return arms

    return bound


def _steered(text: str) -> tuple[str, SteeringVectors, int, float]:
    parts = text.rsplit(":", 2)
    try:
        file, layer, multiplier = parts[0], int(parts[1]), float(parts[2])
    except (IndexError, ValueError):
        raise ValueError(
            f"steer must be FILE:LAYER:MULTIPLIER, got {text!r}. Write for example mood.safetensors:21:-2."
        ) from None
    vectors = import_vectors(checked_file(Path(file)))
    vectors.at_layers([layer])  # refuses a block that has no vector
    return Path(file).stem, vectors, layer, multiplier
