"""Activations of texts, read in batches with `run_with_cache`. Knows nothing of vectors or steering."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rt_lens.common.inputs import as_text, text_list
from rt_lens.common.progress import Bar
from rt_lens.models.backends import backend_of
from rt_lens.models.context import token_context
from rt_lens.models.forward import quick, unknown_hook
from rt_lens.models.prompts import beginnings, kinds_of_rows
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode, encoded_texts, in_batches, pad, pad_id_of
from rt_lens.models.tokens.texts import token_texts

WORTHWHILE = 0.1
"""Share of all tokens that must be saved, else shared beginnings are not worth passes of their own."""


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

    Texts are sorted by length and padded; a beginning that several share runs once for all of them. The forward pass
    stops after the last hook point.

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
    encoded = encoded_texts(model, texts, batch_size)
    activations: dict[str, Tensor] = {}
    with quick(model), Bar(total=len(texts), desc="activations", unit="text", disable=not progress) as bar:
        for part in _parts(model, encoded, hook_names, reads, batch_size):
            weights = _weights(part, [reads[row] for row in part.rows])
            for name in hook_names:
                means = torch.einsum("brp,bp...->br...", weights, part.cache[name].float()).cpu()
                if name not in activations:
                    activations[name] = means.new_zeros(len(texts), *means.shape[1:])
                activations[name][list(part.rows)] += means
            bar.update(part.finished)
    return activations


@dataclass(frozen=True)
class _Part:
    """Activations of some tokens of some texts.

    Attributes:
        cache: of `run_with_cache`: hook name -> Float[Tensor, "row pos *heads d"].
        mask: Int[Tensor, "row pos"], 1 for real tokens; padding is on the left.
        rows: index of each text.
        first: index in each text of the first token that is here.
        finished: how many texts have been read with it.
    """

    cache: Any
    mask: Int[Tensor, "row pos"]
    rows: list[int]
    first: list[int]
    finished: int


def _parts(
    model: Model,
    encoded: Sequence[Sequence[int]],
    hook_names: Sequence[str],
    reads: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
) -> Iterator[_Part]:
    """The activations of all tokens that are read; beginnings that texts share run once, before the rest of these."""
    starts, kinds = _beginnings(model, encoded, hook_names)
    groups: dict[Any, list[int]] = {}
    for row, n in enumerate(starts):
        groups.setdefault((tuple(encoded[row][:n]), kinds[row] if n else None), []).append(row)
    alone = groups.pop(((), None), [])
    for index in in_batches([len(encoded[row]) for row in alone], batch_size):
        rows = [alone[i] for i in index]
        yield _run(model, encoded, rows, [0] * len(rows), [None] * len(rows), hook_names)
    together = list(groups.values())
    for index in in_batches([starts[group[0]] for group in together], batch_size):
        some = [together[i] for i in index]
        yield from _after_beginnings(model, encoded, hook_names, reads, some, starts, batch_size)


def _after_beginnings(
    model: Model,
    encoded: Sequence[Sequence[int]],
    hook_names: Sequence[str],
    reads: Sequence[Sequence[Sequence[int]]],
    groups: Sequence[Sequence[int]],
    starts: Sequence[int],
    batch_size: int,
) -> Iterator[_Part]:
    """The activations of texts that share their beginnings in groups."""
    backend, blocks = backend_of(model), range(_stop(hook_names) or model.cfg.n_layers)
    firsts = [group[0] for group in groups]
    of_row = {row: index for index, group in enumerate(groups) for row in group}
    once = backend.cache(len(groups), max(starts[row] for row in firsts))
    early = any(index < starts[row] for row in of_row for read in reads[row] for index in read)
    part = _run(model, encoded, firsts, [0] * len(firsts), [starts[row] for row in firsts], hook_names, once, early)
    each = list(of_row)
    for start in range(0, len(each) if early else 0, batch_size):
        rows = each[start : start + batch_size]
        index = [of_row[row] for row in rows]
        cache = {name: part.cache[name][index] for name in hook_names}
        yield _Part(cache, part.mask[index], rows, [0] * len(rows), 0)
    for batch in in_batches([len(encoded[row]) - starts[row] for row in each], batch_size):
        rows = [each[i] for i in batch]
        index = [of_row[row] for row in rows]
        cache = backend.cache(len(rows), once.mask.shape[1] + max(len(encoded[row]) - starts[row] for row in rows))
        cache.adopt(once, index, blocks)
        cache.mask = once.mask[index]
        yield _run(model, encoded, rows, [starts[row] for row in rows], [None] * len(rows), hook_names, cache)


def _beginnings(
    model: Model, encoded: Sequence[Sequence[int]], hook_names: Sequence[str]
) -> tuple[list[int], Sequence[Any]]:
    """How many first tokens of each text run once for it and others, and of which kind its row is; or none."""
    none = [0] * len(encoded), [None] * len(encoded)
    of_pairs = any(
        name.endswith(("hook_pattern", "hook_attn_scores", "hook_rot_q", "hook_rot_k")) for name in hook_names
    )
    if of_pairs or not backend_of(model).shares(max(len(ids) for ids in encoded)):
        return none
    kinds = kinds_of_rows(model, range(len(encoded)))
    if kinds is None:
        return none
    starts = beginnings(encoded)
    # A batch has columns for the longest beginning and for the longest rest, which may be of two texts.
    columns = max(starts) + max(len(ids) - n for ids, n in zip(encoded, starts, strict=True))
    if columns > model.cfg.n_ctx or not backend_of(model).shares(columns):
        return none
    each = {(tuple(ids[:n]), kind) for ids, n, kind in zip(encoded, starts, kinds, strict=True)}
    saved = sum(starts) - sum(len(ids) for ids, _ in each)
    return (starts, kinds) if saved > WORTHWHILE * sum(len(ids) for ids in encoded) else none


def _run(
    model: Model,
    encoded: Sequence[Sequence[int]],
    rows: Sequence[int],
    first: Sequence[int],
    end: Sequence[int | None],
    hook_names: Sequence[str],
    past: Any = None,
    read: bool = True,
) -> _Part:
    """Runs some tokens of some texts. Hooks learn from the token context which of the caller's texts these are.

    Args:
        rows: the texts.
        first: of each text, its first token to run.
        end: of each text, the token to stop before.
        hook_names: where to read.
        past: a key-value cache with the tokens before.
        read: False only extends the cache.
    """
    ids = [encoded[row][start:stop] for row, start, stop in zip(rows, first, end, strict=True)]
    batch, backend, stop = pad(ids, pad_id_of(model)).to(model.cfg.device), backend_of(model), _stop(hook_names)
    mask = batch.mask if past is None else torch.cat([past.mask, batch.mask], dim=1)
    lengths = torch.tensor([len(encoded[row]) for row in rows], device=model.cfg.device)
    with token_context(mask, new=batch.mask.shape[1], lengths=lengths, rows=rows, n_rows=len(encoded)):
        if read:
            cache = backend.run_with_cache(batch.tokens, batch.mask, hook_names, stop, past)
        else:
            cache = {}
            backend.extend(batch.tokens, batch.mask, past, stop=stop)
    return _Part(cache, batch.mask, list(rows), list(first), len(rows) if None in end else 0)


def _stop(hook_names: Sequence[str]) -> int | None:
    """The first block that need not run (after the last block: the unembedding); None to run everything."""
    if not all(name.startswith("blocks.") for name in hook_names):
        return None
    return 1 + max(int(name.split(".")[1]) for name in hook_names)


def _weights(part: _Part, reads: Sequence[Sequence[Sequence[int]]]) -> Float[Tensor, "row read pos"]:
    """Averaging weights of the chosen tokens; a single token has weight 1, so its activation stays exact."""
    width, weights = part.mask.shape[1], torch.zeros(len(reads), len(reads[0]), part.mask.shape[1], device="cpu")
    for row, (n, first, row_reads) in enumerate(zip(part.mask.sum(1).tolist(), part.first, reads, strict=True)):
        for read, indices in enumerate(row_reads):
            here = [width - n + index - first for index in indices if first <= index < first + n]
            weights[row, read].index_add_(
                0, torch.tensor(here, dtype=torch.long, device="cpu"),
                torch.full((len(here),), 1 / len(indices), device="cpu"),
            )  # fmt: skip
    return weights.to(part.mask.device)


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
    with quick(model):
        cache = _run(model, [ids], [0], [0], [None], hook_names).cache
    return token_texts(model, ids), {name: cache[name][0].float().cpu() for name in hook_names}
