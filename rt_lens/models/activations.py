"""Activations of texts, read in batches with `run_with_cache`. Knows nothing of vectors or steering."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.common.inputs import as_text, text_list
from rt_lens.common.progress import Bar
from rt_lens.models.backends import backend_of
from rt_lens.models.context import token_context
from rt_lens.models.forward import quick, unknown_hook
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import TokenBatch, batches, encode, pad, pad_id_of
from rt_lens.models.tokens.texts import token_texts


def check_hook_names(model: Model, hook_names: Sequence[str]) -> None:
    """Raises a ValueError for a hook name that the model does not have, or for an empty list.

    Raises:
        ValueError: the message names the nearest hook points.
    """
    if not hook_names:
        raise ValueError("hook_names must name at least one hook point, got an empty list. Add one.")
    for name in hook_names:
        if name not in model.hook_dict:
            raise ValueError(unknown_hook("hook_names", name, model))


@torch.no_grad()
def read_activations(
    model: Model,
    texts: Iterable[str],
    hook_names: Sequence[str],
    reads: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, Float[Tensor, "text read *heads d"]]:
    """Mean activations over chosen tokens of each text, one or more means per text.

    Texts are sorted by length and padded. The forward pass stops after the last hook point.

    Args:
        model: HookedTransformer or TransformerBridge.
        texts: with the chat template applied, special tokens included.
        hook_names: for example `["blocks.18.hook_resid_post"]`.
        reads: for each text a list of reads, as many for every text. A read is a list of token indices from 0, not
            counting padding; its result is the mean activation over these tokens.
        batch_size: texts per forward pass.
        progress: show a bar.

    Returns:
        hook name -> Float[Tensor, "text read *heads d"] in the order of `texts`, float32 on the CPU.

    Raises:
        ValueError: for an unknown hook name or an empty list of texts.

    Example:
        The first token of each text, and the mean of its first two tokens:

        >>> hook = "blocks.3.hook_resid_post"
        >>> activations = read_activations(model, texts, [hook], [[[0], [0, 1]]] * len(texts))
        >>> activations[hook].shape  # text, read, d_model
        torch.Size([2, 2, 576])
    """
    check_hook_names(model, hook_names)
    texts = text_list(texts, "texts", blank=True)
    activations: dict[str, Tensor] = {}
    with quick(model), Bar(total=len(texts), desc="activations", unit="text", disable=not progress) as bar:
        for batch in batches(model, texts, batch_size):
            weights = _weights(batch, [reads[row] for row in batch.rows])
            cache = _run(model, batch, hook_names, len(texts))
            for name in hook_names:
                means = torch.einsum("brp,bp...->br...", weights, cache[name].float()).cpu()
                if name not in activations:
                    activations[name] = means.new_empty(len(texts), *means.shape[1:])
                activations[name][list(batch.rows)] = means
            bar.update(len(batch.rows))
    return activations


def _run(model: Model, batch: TokenBatch, hook_names: Sequence[str], n_rows: int) -> Any:
    """The cache of one batch. Hooks learn from the token context which of the caller's texts it holds."""
    with token_context(batch.mask, rows=batch.rows, n_rows=n_rows):
        return backend_of(model).run_with_cache(batch.tokens, batch.mask, hook_names, _stop(hook_names))


def _stop(hook_names: Sequence[str]) -> int | None:
    """The first block that need not run (after the last block: the unembedding); None to run everything."""
    if not all(name.startswith("blocks.") for name in hook_names):
        return None
    return 1 + max(int(name.split(".")[1]) for name in hook_names)


def _weights(batch: TokenBatch, reads: Sequence[Sequence[Sequence[int]]]) -> Float[Tensor, "batch read pos"]:
    """Averaging weights of the chosen tokens; a single token has weight 1, so its activation stays exact."""
    starts = batch.mask.argmax(1).tolist()  # column of each row's first real token
    weights = torch.zeros(len(reads), len(reads[0]), batch.tokens.shape[1], device=batch.tokens.device)
    for row, (start, row_reads) in enumerate(zip(starts, reads, strict=True)):
        for read, indices in enumerate(row_reads):
            columns = torch.tensor([start + index for index in indices], device=weights.device)
            weights[row, read].index_add_(
                0, columns, torch.full((len(indices),), 1 / len(indices), device="cpu").to(weights)
            )
    return weights


def last_token_activations(
    model: Model, texts: Iterable[str], hook_names: Sequence[str], *, batch_size: int = 32, progress: bool = False
) -> dict[str, Float[Tensor, "text *heads d"]]:
    """Activations at the last token of each text; see `read_activations`.

    Returns:
        hook name -> Float[Tensor, "text *heads d"] in the order of `texts`, float32 on the CPU.

    Example:
        >>> activations = last_token_activations(model, texts, ["blocks.3.hook_resid_post"])
        >>> {hook: h.shape for hook, h in activations.items()}
        {'blocks.3.hook_resid_post': torch.Size([2, 576])}
    """
    texts = text_list(texts, "texts", blank=True)
    ends = [[[len(encode(model, text)) - 1]] for text in texts]
    activations = read_activations(model, texts, hook_names, ends, batch_size=batch_size, progress=progress)
    return {name: h[:, 0] for name, h in activations.items()}


@torch.no_grad()
def token_activations(
    model: Model, text: str, hook_names: Sequence[str]
) -> tuple[list[str], dict[str, Float[Tensor, "pos *heads d"]]]:
    """Activations at every token of one text.

    Returns:
        The tokens as strings (see `token_texts`), and hook name -> Float[Tensor, "pos *heads d"].

    Example:
        >>> tokens, activations = token_activations(model, "It rained.", ["blocks.3.hook_resid_post"])
        >>> tokens
        ['It', ' ra', 'ined', '.']
        >>> activations["blocks.3.hook_resid_post"].shape
        torch.Size([4, 576])
    """
    check_hook_names(model, hook_names)
    ids = encode(model, as_text(text, "text", blank=True))
    batch = pad([ids], pad_id_of(model)).to(model.cfg.device)
    with quick(model):
        cache = _run(model, batch, hook_names, 1)
    return token_texts(model, ids), {name: cache[name][0].float().cpu() for name in hook_names}
