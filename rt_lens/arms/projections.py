"""Where texts lie on a behaviour's direction under each arm, layer by layer, and how far an arm moves them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import pandas as pd
from torch import Tensor

from rt_lens.arms.intervention import Intervention, applied
from rt_lens.common.inputs import text_list
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.models.activations import read_activations
from rt_lens.models.generation import as_chat
from rt_lens.models.positions import Position, numbers_in, position_of, rows_of
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode
from rt_lens.tuning.delta import WeightDelta
from rt_lens.vectors.guards import one_per_layer, refuse_heads, refuse_several_per_layer
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of


def mean_projections(
    model: Model,
    vectors: SteeringVectors,
    texts: Iterable[str],
    *,
    arms: Mapping[str, Intervention] | None = None,
    position: str | int | Position = "last",
    seed: int = 0,
) -> pd.DataFrame:
    """Where texts lie on the unit vector of each layer, under each arm: means over texts with their intervals.

    Args:
        model: HookedTransformer or TransformerBridge.
        vectors: of the residual stream or of what is written into it, one for each layer.
        texts: user messages, put through the chat template as `generate` does.
        arms: name -> WeightDelta, list of hooks, or None for the model as it is; that alone, as `untuned`, for None.
        position: what is read of each text, as for `extract_vectors`.
        seed: of the bootstrap.

    Returns:
        Columns arm, layer, n (texts), mean, low, high (95 % bootstrap interval over texts, NaN for one text; activation
        units), seed.

    Raises:
        ValueError: names the arm, text, layer or position that is wrong.

    Example:
        >>> table = mean_projections(model, vectors, prompts, arms={"untuned": None, "rep_tuned": delta})
        >>> plots.projection_curves(table).show()
    """
    units = one_per_layer(model, vectors.unit())
    chats = as_chat(model, text_list(texts, "texts"))
    arms = {"untuned": None} if arms is None else arms
    check_arms(model, arms)
    place = position_of(position)
    reads = [[numbers_in(row, place, f"text {number}")] for number, row in enumerate(rows_of(model, chats))]
    rows = []
    for arm, changed in arms.items():
        with applied(model, changed):
            found = read_activations(model, chats, list(units), reads)
        for name, unit in units.items():
            interval = mean_interval((found[name][:, 0] @ unit).double().numpy(), seed)
            rows.append({"arm": arm, "layer": layer_of(name), **interval._asdict(), "seed": seed})
    return pd.DataFrame(rows)


def projection_changes(
    model: Model, vectors: SteeringVectors, texts: Iterable[str], arms: Mapping[str, Intervention], *, seed: int = 0
) -> pd.DataFrame:
    """How far each arm moves texts along the unit vector, layer by layer, against the untouched model.

    The projection is averaged over each text's tokens without the first, whose activations are often so large that
    they would hide the rest. For one text, token by token, see `token_projections`; `plots.projection_heatmap` draws
    the difference of two arms.

    Args:
        model: HookedTransformer or TransformerBridge.
        vectors: of the residual stream, one for each layer.
        texts: taken as they are, of two tokens or more; `pairs.texts(model)` gives some through the chat template.
        arms: name -> WeightDelta, list of hooks, or None for the untouched model.
        seed: of the bootstrap.

    Returns:
        Columns arm, layer, n (texts), mean, low, high (95 % bootstrap interval over texts; activation units), seed.

    Raises:
        ValueError: names the arm, text or layer that is wrong.

    Example:
        >>> table = projection_changes(model, vectors, texts, {"steered": add(vectors, [18]), "rep_tuned": delta})
        >>> plots.projection_changes(table).show()
    """
    check_arms(model, arms)
    texts = text_list(texts, "texts", blank=True)
    vectors.check_fits(model)
    units = vectors.unit().vectors
    refuse_heads(units)
    refuse_several_per_layer(units)
    lengths = [len(encode(model, text)) for text in texts]
    if min(lengths) < 2:
        raise ValueError(
            f"texts: number {lengths.index(min(lengths))} has fewer than two tokens, and the first is left out."
        )
    reads = [[range(1, length)] for length in lengths]
    found = by_arm(model, arms, lambda: read_activations(model, texts, list(units), reads))
    rows = []
    for arm, (name, unit) in itertools.product(arms, units.items()):
        moved = (found[arm][name] - found[None][name])[:, 0] @ unit.cpu().float()
        interval = mean_interval(moved.numpy(), seed)
        rows.append({"arm": arm, "layer": layer_of(name), **interval._asdict(), "seed": seed})
    return pd.DataFrame(rows)


def check_arms(model: Model, arms: Mapping[str, Intervention]) -> None:
    """Refuses what is no arm, before anything is run."""
    if not arms:
        raise ValueError("arms: none came, at least one is wanted: {'steered': add(vectors, [18], 2.0)}, say.")
    for name, arm in arms.items():
        if not (arm is None or isinstance(arm, WeightDelta | list | tuple)):
            raise ValueError(
                f"arms: {name!r} is a {type(arm).__name__}; a WeightDelta, the list of hooks that `add` gives, or None "
                "is wanted."
            )
        try:
            with applied(model, arm):
                pass
        except ValueError as refusal:
            raise ValueError(f"arms: {name!r} does not fit this model. {refusal}") from refusal


def by_arm(
    model: Model, arms: Mapping[str, Intervention], read: Callable[[], dict[str, Tensor]]
) -> dict[str | None, dict[str, Tensor]]:
    """What is read under each arm, and under None of the untouched model."""
    found: dict[str | None, dict[str, Tensor]] = {None: read()}
    for name, arm in arms.items():
        with applied(model, arm):
            found[name] = read()
    return found
