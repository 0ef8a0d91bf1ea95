"""Where texts lie on a behaviour's direction under each arm, layer by layer, and how far an arm moves them.

All functions take user messages and put them through the chat template, as `generate` does; a text that went through
it already stays as it is, and `chat=False` reads plain text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import pandas as pd
from torch import Tensor

from rt_lens.arms.intervention import Intervention, applied, check_intervention
from rt_lens.common.inputs import text_list
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.models.activations import read_activations
from rt_lens.models.generation import as_chat
from rt_lens.models.positions import Position, numbers_in, position_of, rows_of
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode
from rt_lens.vectors.guards import one_per_layer
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of


def mean_projections(
    model: Model,
    vectors: SteeringVectors,
    texts: Iterable[str],
    *,
    arms: Mapping[str, Intervention] | None = None,
    position: str | int | Position = "last",
    chat: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Where texts lie on the unit vector of each layer, under each arm: means over texts with their intervals.

    Args:
        model: HookedTransformer or TransformerBridge.
        vectors: of the residual stream or of what is written into it, one for each layer.
        texts: user messages, put through the chat template as `generate` does.
        arms: name -> Intervention. Defaults to the untuned model alone, as `untuned`.
        position: which tokens of each text are read, as for `extract_vectors`.
        chat: put the texts through the chat template; False for plain text.
        seed: seed for the bootstrap.

    Returns:
        Columns arm, layer, n (texts), mean, low, high (95 % bootstrap interval over texts, NaN for one text; activation
        units), seed.

    Raises:
        ValueError: names the arm, text, layer or position that is wrong.

    Example:
        >>> table = mean_projections(model, vectors.select([21]), prompts, arms={"untuned": None, "rep_tuned": delta})
        >>> table[["arm", "layer", "n"]].values.tolist()
        [['untuned', 21, 2], ['rep_tuned', 21, 2]]
    """
    units = one_per_layer(model, vectors.unit())
    inputs = _inputs(model, texts, chat)
    arms = {"untuned": None} if arms is None else arms
    check_arms(model, arms)
    named = position_of(position)
    reads = [[numbers_in(row, named, f"text {number}")] for number, row in enumerate(rows_of(model, inputs))]
    rows = []
    for arm, intervention in arms.items():
        with applied(model, intervention):
            activations = read_activations(model, inputs, list(units), reads)
        for name, unit in units.items():
            interval = mean_interval((activations[name][:, 0] @ unit).double().numpy(), seed)
            rows.append({"arm": arm, "layer": layer_of(name), **interval._asdict(), "seed": seed})
    return pd.DataFrame(rows)


def projection_changes(
    model: Model,
    vectors: SteeringVectors,
    texts: Iterable[str],
    arms: Mapping[str, Intervention],
    *,
    chat: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """How far each arm moves texts along the unit vector, layer by layer, compared with the untuned model.

    The projection is averaged over each text's tokens without the first, whose activations are often so large that
    they would hide the rest. For one text, token by token, see `token_projections`; `plots.projection_heatmap` draws
    the difference of two arms.

    Args:
        model: HookedTransformer or TransformerBridge.
        vectors: of the residual stream, one for each layer.
        texts: user messages, put through the chat template as `generate` does; `pairs.texts(model)` are through it.
        arms: name -> Intervention.
        chat: put the texts through the chat template; False for plain text, of two tokens or more.
        seed: seed for the bootstrap.

    Returns:
        Columns arm, layer, n (texts), mean, low, high (95 % bootstrap interval over texts; activation units), seed.

    Raises:
        ValueError: names the arm, text or layer that is wrong.

    Example:
        >>> arms = {"steered": add(vectors, [18]), "rep_tuned": delta}
        >>> table = projection_changes(model, vectors.select([18]), prompts, arms)
        >>> table["arm"].tolist(), bool(table["mean"][0] > 0)
        (['steered', 'rep_tuned'], True)
    """
    check_arms(model, arms)
    inputs = _inputs(model, texts, chat)
    units = one_per_layer(model, vectors.unit())
    lengths = [len(encode(model, text)) for text in inputs]
    if min(lengths) < 2:
        raise ValueError(
            f"texts must have two tokens or more, since the first is left out, got fewer at index "
            f"{lengths.index(min(lengths))}. Leave it out."
        )
    reads = [[range(1, length)] for length in lengths]
    activations = by_arm(model, arms, lambda: read_activations(model, inputs, list(units), reads))
    rows = []
    for arm, (name, unit) in itertools.product(arms, units.items()):
        shift = (activations[arm][name] - activations[None][name])[:, 0] @ unit
        interval = mean_interval(shift.numpy(), seed)
        rows.append({"arm": arm, "layer": layer_of(name), **interval._asdict(), "seed": seed})
    return pd.DataFrame(rows)


def _inputs(model: Model, texts: Iterable[str], chat: bool) -> list[str]:
    """Texts as the model reads them."""
    plain = text_list(texts, "texts", blank=not chat, chats=chat)
    return as_chat(model, plain) if chat else plain


def check_arms(model: Model, arms: Mapping[str, Intervention]) -> None:
    """Refuses what is no arm, before anything is run.

    Raises:
        ValueError: for no arm, something that is no Intervention, or one that does not fit the model.
    """
    if not arms:
        raise ValueError(
            "arms must map at least one name to an intervention, got none. Try {'steered': add(vectors, [18], 2.0)}."
        )
    for name, intervention in arms.items():
        check_intervention(intervention, f"arms[{name!r}]")
        try:
            with applied(model, intervention):
                pass
        except ValueError as refusal:
            raise ValueError(f"arms[{name!r}] must fit this model. {refusal}") from refusal


def by_arm(
    model: Model, arms: Mapping[str, Intervention], read: Callable[[], dict[str, Tensor]]
) -> dict[str | None, dict[str, Tensor]]:
    """What `read` gives under each arm and, under None, for the untuned model."""
    by_name: dict[str | None, dict[str, Tensor]] = {None: read()}
    for name, intervention in arms.items():
        with applied(model, intervention):
            by_name[name] = read()
    return by_name
