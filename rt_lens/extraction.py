"""Finding a behaviour's direction: contrast pairs in, steering vectors and a measure of how well they separate out."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.activations import last_token_activations, token_activations
from rt_lens.forward import check_layers, model_name
from rt_lens.prompts import ContrastPairs
from rt_lens.statistics import share_interval
from rt_lens.tokens import tokenizer_of
from rt_lens.vectors import Provenance, SteeringVectors, hook_names


def package_version() -> str:
    """Version of rt_lens, or `source` where it is not installed."""
    try:
        return version("rt_lens")
    except PackageNotFoundError:
        return "source"


def mean_diff(
    positive: Float[Tensor, "pair d_model"], negative: Float[Tensor, "pair d_model"]
) -> Float[Tensor, "d_model"]:
    """Mean of the pairwise differences (Ackerman 2024; Panickssery et al. 2024)."""
    return (positive - negative).mean(0)


_METHODS = {"mean_diff": mean_diff}


def extract_vectors(
    model: Any,
    pairs: ContrastPairs,
    *,
    method: str = "mean_diff",
    position: str = "last",
    layers: Iterable[int] | None = None,
    hook: str = "resid_post",
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> SteeringVectors:
    """Steering vectors of contrast pairs, one for each block.

    Args:
        model: HookedTransformer or TransformerBridge.
        pairs: what differs between the two sides is what the vectors will mean.
        method: `mean_diff`.
        position: `last`, the last token of the prompt and opener.
        layers: block indices; all for None.
        hook: kind of hook point, `resid_post` for the block's output.
        batch_size: texts per forward pass.
        seed: of the pairs' selection, kept in the provenance.
        progress: show a bar.

    Returns:
        Vectors keyed by hook name, not normalised: multiplier 1 is the mean difference itself.

    Raises:
        ValueError: unknown method, position, layer or hook point.

    Example:
        >>> vectors = extract_vectors(model, load_pairs("mood").sample(128))
    """
    if method not in _METHODS:
        raise ValueError(f"method: {method!r} came; one of {', '.join(_METHODS)} is wanted.")
    if position != "last":
        raise ValueError(f"position: {position!r} came; 'last' is wanted.")
    names = hook_names(check_layers(model, layers), hook)
    positive, negative = _both_sides(model, pairs, names, batch_size, progress)
    found = {name: _METHODS[method](positive[name], negative[name]) for name in names}
    provenance = Provenance(
        model=model_name(model),
        behaviour=pairs.name,
        method=method,
        position="last token of the chat prompt and the answer's opener",
        processing="none",
        n_pairs=len(pairs),
        data_sha256=pairs.sha256,
        seed=seed,
        version=package_version(),
    )
    return SteeringVectors(found, provenance)


def _both_sides(
    model: Any, pairs: ContrastPairs, names: list[str], batch_size: int, progress: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    texts = pairs.texts(model)
    found = last_token_activations(
        model, texts.positive + texts.negative, names, batch_size=batch_size, progress=progress
    )
    n = len(pairs)
    return {name: h[:n] for name, h in found.items()}, {name: h[n:] for name, h in found.items()}


def separability(
    model: Any, vectors: SteeringVectors, pairs: ContrastPairs, *, batch_size: int = 32, progress: bool = False
) -> pd.DataFrame:
    """Share of pairs whose positive side projects higher than its negative side, at each block.

    Give pairs that the vectors were not made from.

    Returns:
        Columns layer, accuracy, low, high (Wilson 95 % interval), n. Pairs of one topic are not independent of each
        other, so take `n` below the number of topics for a fair interval.
    """
    vectors.check_fits(model)
    positive, negative = _both_sides(model, pairs, vectors.hook_names, batch_size, progress)
    rows = []
    for name in vectors.hook_names:
        margin = (positive[name] - negative[name]) @ vectors[name]
        found = share_interval(int((margin > 0).sum()), len(pairs))
        rows.append({"layer": int(name.split(".")[1]), "accuracy": found.mean, **found._asdict()})
    return pd.DataFrame(rows).drop(columns="mean")


def token_projections(model: Any, vectors: SteeringVectors, text: str) -> tuple[list[str], Float[Tensor, "layer pos"]]:
    """Projection of every token of a text on the unit vector of every block, under whatever hooks the model carries."""
    vectors.check_fits(model)
    tokens, found = token_activations(model, text, vectors.hook_names)
    rows = [found[name] @ (vectors[name] / vectors[name].norm()) for name in vectors.hook_names]
    return tokens, torch.stack(rows)


@torch.no_grad()
def logit_lens(model: Any, vectors: SteeringVectors, *, top: int = 8) -> pd.DataFrame:
    """Tokens whose unembedding each vector, and its negative, points to most (nostalgebraist 2020).

    Returns:
        Columns layer, sign (`+v` or `-v`), tokens (list of strings, the strongest first).
    """
    tokenizer = tokenizer_of(model)
    rows = []
    for name in vectors.hook_names:
        scores = model.ln_final(vectors[name].to(model.W_U)[None, None])[0, 0] @ model.W_U
        for sign, ranked in (("+v", scores), ("-v", -scores)):
            words = [tokenizer.decode([i]) for i in ranked.topk(top).indices.tolist()]
            rows.append({"layer": int(name.split(".")[1]), "sign": sign, "tokens": words})
    return pd.DataFrame(rows)
