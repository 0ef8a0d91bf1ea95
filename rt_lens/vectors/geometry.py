"""What vectors and activations look like over layers and texts, as tables for the figures to draw.

It judges no vector (`validation` does) and leaves the model as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from rt_lens.common.inputs import text_list
from rt_lens.common.statistics.intervals import mean_interval
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.models.activations import last_token_activations
from rt_lens.models.forward import check_layers
from rt_lens.models.generation import as_chat
from rt_lens.models.positions import Position, position_of
from rt_lens.models.protocol import Model
from rt_lens.vectors.extraction import read_sides
from rt_lens.vectors.guards import one_per_layer
from rt_lens.vectors.steering_vectors import SteeringVectors, hook_names, layer_of


def norms(model: Model, vectors: SteeringVectors, texts: Iterable[str], *, seed: int = 0) -> pd.DataFrame:
    """What a multiplier of 1 means: each vector's length beside that of the activations it would be added to.

    Activations are read at the last token of each prompt, which predicts the response's first token.

    Args:
        model: HookedTransformer or TransformerBridge.
        vectors: of the residual stream or of what is written into it, one for each layer.
        texts: user messages, put through the chat template as `generate` does.
        seed: seed for the bootstrap.

    Returns:
        Columns layer, vector (its length), n (texts), mean, low, high (length of the activations, with a 95 %
        bootstrap interval over texts, NaN for one text; activation units), ratio (vector / mean), ratio_low,
        ratio_high, seed.

    Raises:
        ValueError: if the vectors do not fit the model, or there is no text.

    Example:
        >>> table = norms(model, vectors.select([18, 21]), prompts)
        >>> table["layer"].tolist(), bool((table["ratio"] == table["vector"] / table["mean"]).all())
        ([18, 21], True)
        >>> plots.norms(table).show()
    """
    lengths = {name: float(vector.norm()) for name, vector in one_per_layer(model, vectors).items()}
    activations = last_token_activations(model, _chats(model, texts), list(lengths))
    rows = []
    for name, length in lengths.items():
        interval = mean_interval(activations[name].double().norm(dim=-1).numpy(), seed)
        divisors = {"ratio": interval.mean, "ratio_low": interval.high, "ratio_high": interval.low}
        ratios = {column: length / divisor if divisor else float("nan") for column, divisor in divisors.items()}
        rows.append({"layer": layer_of(name), "vector": length, **interval._asdict(), **ratios, "seed": seed})
    return pd.DataFrame(rows)


def cosines(
    vectors: Mapping[str, SteeringVectors], *, layers: Iterable[int] | None = None, hook: str = "resid_post"
) -> pd.DataFrame:
    """Cosines between all vectors of several behaviours, across layers too.

    Args:
        vectors: name -> its vectors, all of one model.
        layers: block indices. Defaults to all blocks that each has.
        hook: kind of hook point.

    Returns:
        Columns a, b ("mood, layer 18"; of one name the block index alone), cosine, chance (95 % of
        pairs of random directions have a cosine between this and its negative). No sampling, so no interval.

    Raises:
        ValueError: if there are no vectors, a layer has no vector, or the vectors differ in d_model.

    Example:
        >>> table = cosines({"mood": vectors, "the opposite": -1 * vectors}, layers=[21])
        >>> table[["a", "b", "cosine"]].round(2).to_dict("records")[1]
        {'a': 'mood, layer 21', 'b': 'the opposite, layer 21', 'cosine': -1.0}
        >>> plots.cosines(table).show()
    """
    if not vectors:
        raise ValueError('vectors must be at least one name with its vectors, got none. Try {"mood": mood}.')
    chosen = None if layers is None else list(layers)
    by_layer = {
        (name, layer_of(hook_name)): vector.detach().cpu().double()
        for name, of_behaviour in vectors.items()
        for hook_name, vector in of_behaviour.at_layers(chosen, hook).items()
    }
    if len(widths := {vector.numel() for vector in by_layer.values()}) > 1:
        raise ValueError(f"vectors must have the same d_model, got {sorted(widths)}. Extract them all from one model.")
    labels = [layer if len(vectors) == 1 else f"{name}, layer {layer}" for name, layer in by_layer]
    flat = torch.stack([vector.flatten() for vector in by_layer.values()])
    flat = flat / flat.norm(dim=-1, keepdim=True)  # a vector of zeros has no direction: NaN
    matrix = (flat @ flat.T).tolist()
    # A random unit vector's projection on a fixed one has the standard deviation 1 / sqrt(d).
    chance = 1.96 / math.sqrt(flat.shape[1])
    return pd.DataFrame(
        [
            {"a": a, "b": b, "cosine": matrix[i][j], "chance": chance}
            for i, a in enumerate(labels)
            for j, b in enumerate(labels)
        ]
    )


def activation_map(
    model: Model,
    pairs: ContrastPairs,
    *,
    layers: Iterable[int] | None = None,
    hook: str = "resid_post",
    position: str | int | Position = "last",
    method: Literal["pca", "tsne"] = "pca",
    paired: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Both sides' activations on a plane, layer by layer: do the sides separate, and is that how texts differ most?

    PCA is of both sides together, centred, and gives the same every time. t-SNE (van der Maaten and Hinton 2008)
    keeps neighbours only; its axes, gaps and sizes mean nothing. The positive side is turned to the right.

    Texts mostly differ by topic and prefill, which the two sides of a pair share. `paired` subtracts each pair's mean;
    what is left is how its sides differ, mirrored about 0, and the colours separate where the pairs' differences have a
    direction in common.

    Args:
        model: HookedTransformer or TransformerBridge.
        pairs: three or more; some 60 are enough to see, `pairs.sample(60)`.
        layers: block indices. Defaults to all.
        hook: kind of hook point; heads at `z` are taken together.
        position: what is read of each text, as for `extract_vectors`.
        method: `pca` or `tsne`.
        paired: subtract what the two sides of a pair share.
        seed: seed for t-SNE.

    Returns:
        Columns layer, side (positive or negative), x, y (activation units for PCA, none for t-SNE), text (user message
        and prefill), explained_x, explained_y, explained (fraction of the variance along x, y and both; NaN for t-SNE,
        or where all activations are the same), method, paired, n (pairs), seed.

    Raises:
        ValueError: unknown method, layer, hook point or position; too few pairs.

    Example:
        >>> table = activation_map(model, train, layers=[18], paired=True)
        >>> len(table) == 2 * len(train), table.groupby("side")["x"].mean().round(1).gt(0).to_dict()
        (True, {'negative': False, 'positive': True})
        >>> plots.activation_map(table).show()
    """
    if method not in ("pca", "tsne"):
        raise ValueError(f"method must be 'pca' or 'tsne', got {method!r}.")
    if len(pairs) < 3:
        raise ValueError(f"pairs must be at least 3 to span a plane, got {len(pairs)}. Give more pairs.")
    names = hook_names(check_layers(model, layers), hook)
    (sides,) = read_sides(model, pairs, names, [position_of(position)])
    texts = [_short(*pair.sides[side][1:]) for side in (0, 1) for pair in pairs.pairs]
    n, tables = len(pairs), []
    for name in names:
        both = torch.stack([sides.positive[name], sides.negative[name]]).double()
        shared = both.mean(0, keepdim=True) if paired else 0.0
        coordinates, shares = _plane(
            rearrange(both, "side text ... -> (side text) (...)").numpy(),
            rearrange(both - shared, "side text ... -> (side text) (...)").numpy(),
            method,
            seed,
        )
        if coordinates[:n, 0].mean() < coordinates[n:, 0].mean():
            coordinates[:, 0] *= -1
        explained = {"explained_x": shares[0], "explained_y": shares[1], "explained": sum(shares)}
        columns = {"side": ["positive"] * n + ["negative"] * n, "x": coordinates[:, 0], "y": coordinates[:, 1]}
        tables.append(pd.DataFrame({"layer": layer_of(name), **columns, "text": texts, **explained}))
    return pd.concat(tables, ignore_index=True).assign(method=method, paired=paired, n=n, seed=seed)


def _plane(
    whole: Float[np.ndarray, "text d"], points: Float[np.ndarray, "text d"], method: str, seed: int
) -> tuple[Float[np.ndarray, "text 2"], tuple[float, float]]:
    """Two coordinates of each point, and the fraction of the variance along each."""
    unknown = float("nan")
    # The embedding of the same last token, for example: what is left is rounding, and no axis of it means anything.
    if np.linalg.norm(points.std(axis=0)) <= 1e-6 * np.linalg.norm(whole, axis=1).mean():
        return np.zeros((len(points), 2)), (unknown, unknown)
    if method == "tsne":
        embedding = TSNE(perplexity=min(30.0, (len(points) - 1) / 3), init="pca", random_state=seed)
        return embedding.fit_transform(points).astype(float), (unknown, unknown)
    fitted = PCA(2, svd_solver="full").fit(points)
    first, second = fitted.explained_variance_ratio_
    return fitted.transform(points), (float(first), float(second))


def _chats(model: Model, texts: Iterable[str]) -> list[str]:
    return as_chat(model, text_list(texts, "texts", chats=True))


def _short(user: str, prefill: str) -> str:
    text = " ".join(user.split())
    return (text if len(text) <= 80 else f"{text[:79]}…") + (f" → {prefill}" if prefill else "")
