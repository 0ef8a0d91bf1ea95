"""Reading with steering vectors: how well they separate pairs, projections of any text, and what they say in words."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.common.inputs import text_list
from rt_lens.common.statistics.intervals import share_interval
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.models.activations import token_activations
from rt_lens.models.backends import backend_of
from rt_lens.models.positions import Position, position_of
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.texts import token_text
from rt_lens.vectors.extraction import read_sides
from rt_lens.vectors.guards import refuse_heads
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of


def separability(
    model: Model,
    vectors: SteeringVectors,
    pairs: ContrastPairs,
    *,
    position: str | int | Position = "last",
    batch_size: int = 32,
    progress: bool = False,
) -> pd.DataFrame:
    """Fraction of pairs whose positive side projects higher than its negative side, at each block.

    Give pairs that the vectors were not made from, and the position that they were read at.

    Returns:
        Columns layer, accuracy, low, high (Wilson 95 % interval), n, and head for vectors at `attn.hook_z`. Pairs of
        one topic are not independent of each other, so take `n` below the number of topics for a fair interval.

    Example:
        >>> table = separability(model, vectors.select([18, 21]), held_out)
        >>> list(table.columns), table["layer"].tolist()
        (['layer', 'accuracy', 'n', 'low', 'high'], [18, 21])
        >>> bool((table["accuracy"] > 0.5).all())  # half of the pairs would do so by chance
        True
    """
    vectors.check_fits(model)
    read_at = position_of(position)
    (sides,) = read_sides(model, pairs, vectors.hook_names, [read_at], batch_size=batch_size, progress=progress)
    rows = []
    for name, vector in vectors.vectors.items():
        margins = ((sides.positive[name] - sides.negative[name]) * vector).sum(-1)  # [pair] or [pair, head]
        for head, margin in enumerate(margins.reshape(len(pairs), -1).T):
            interval = share_interval(int((margin > 0).sum()), len(pairs))
            row = {"layer": layer_of(name), "accuracy": interval.mean, **interval._asdict()}
            rows.append(row if margins.ndim == 1 else {**row, "head": head})
    return pd.DataFrame(rows).drop(columns="mean")


def token_projections(
    model: Model, vectors: SteeringVectors, text: str
) -> tuple[list[str], Float[Tensor, "layer pos"]]:
    """Projection of every token of a text on the unit vector of every block, under whatever hooks the model carries.

    Vectors of the residual stream, or of what is written into it.

    Example:
        >>> tokens, projections = token_projections(model, vectors.select([18, 21]), "What a lovely day")
        >>> tokens
        ['What', ' a', ' lovely', ' day']
        >>> projections.shape
        torch.Size([2, 4])
    """
    refuse_heads(vectors.vectors)
    vectors.check_fits(model)
    tokens, activations = token_activations(model, text, vectors.hook_names)
    rows = [activations[name] @ unit for name, unit in vectors.unit().vectors.items()]
    return tokens, torch.stack(rows)


def projection_quantiles(
    model: Model, vectors: SteeringVectors, texts: Iterable[str], *, quantile: float = 0.99
) -> dict[str, float]:
    """The projection on each unit vector below which a fraction of all tokens of some texts lie: limits for `cap`.

    A text's first token is left out, since its activations are far larger than all others.

    Args:
        model: HookedTransformer or TransformerBridge.
        vectors: of the residual stream, or of what is written into it.
        texts: ordinary ones, such as `neutral_paragraphs()`.
        quantile: the fraction.

    Returns:
        Hook name -> projection, in the activations' own units.

    Raises:
        ValueError: for a quantile outside 0 to 1, or no text of at least two tokens.

    Example:
        >>> low, high = (
        ...     projection_quantiles(model, vectors.select([21]), neutral, quantile=q)["blocks.21.hook_resid_post"]
        ...     for q in (0.1, 0.9)
        ... )
        >>> low < high
        True
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be from 0 to 1, got {quantile}.")
    read = [token_projections(model, vectors, text)[1][:, 1:] for text in text_list(texts, "texts")]
    if not any(projections.numel() for projections in read):
        raise ValueError("texts must have at least two tokens in one of them, got none. Give longer ones.")
    limits = torch.quantile(torch.cat(read, dim=1).float(), quantile, dim=1)
    return dict(zip(vectors.hook_names, limits.tolist(), strict=True))


@torch.no_grad()
def logit_lens(model: Model, vectors: SteeringVectors, *, top: int = 8) -> pd.DataFrame:
    """Tokens whose unembedding each vector, and its negative, points to most (nostalgebraist 2020).

    A token's score is what the direction itself adds to its logit: W_U applied to the odd part of the last norm,
    (LN(v) - LN(-v)) / 2, which is the norm without its bias. That bias and the unembedding's are the same whatever the
    direction, and left out, as in direct logit attribution (Elhage et al. 2021); else they would put the same tokens
    first for v and for -v. So the scores of -v are minus those of v. LayerNorm centres v, a root-mean-square norm does
    not.

    Returns:
        Columns layer, sign (`+v` or `-v`), tokens (list of strings, the strongest first; see `token_text`).

    Example:
        >>> table = logit_lens(model, vectors.select([21]), top=3)
        >>> table["sign"].tolist(), [len(tokens) for tokens in table["tokens"]]
        (['+v', '-v'], [3, 3])
    """
    refuse_heads(vectors.vectors)
    vectors.check_fits(model)
    rows = []
    backend = backend_of(model)
    unembedding = backend.unembedding()
    for name in vectors.hook_names:
        vector = vectors[name].to(unembedding)[None, None]
        scores = ((backend.final_norm(vector) - backend.final_norm(-vector)) / 2)[0, 0] @ unembedding
        for sign, ranked in (("+v", scores), ("-v", -scores)):
            tokens = [token_text(model, token) for token in ranked.topk(top).indices.tolist()]
            rows.append({"layer": layer_of(name), "sign": sign, "tokens": tokens})
    return pd.DataFrame(rows)
