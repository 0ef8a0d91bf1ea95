"""Text to token batches.

Padding is on the left by default, and every batch has its attention mask. So the last real token of each row is at
position -1, and a batch gives the same results as its rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from rt_lens.common.inputs import text_list
from rt_lens.models.protocol import HasTokenizer, TextModel
from rt_lens.models.tokens.chats import ChatText, tokenizer_of


@dataclass(frozen=True)
class TokenBatch:
    """Token ids with their attention mask.

    Attributes:
        tokens: Int[Tensor, "batch pos"], padded with the tokenizer's pad (or end-of-text) id.
        mask: Int[Tensor, "batch pos"], 1 for real tokens, 0 for padding.
        rows: indices of these rows in the caller's list (batches are in order of length).
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    rows: tuple[int, ...]

    def to(self, device: Any) -> TokenBatch:
        return TokenBatch(self.tokens.to(device), self.mask.to(device), self.rows)


def encode(model: HasTokenizer, text: str) -> list[int]:
    """Token ids of a text that the model continues.

    A chat has its special tokens already; plain text gets the start token that the tokenizer adds, once. An end token
    that the tokenizer adds is left out, since the text continues.

    Example:
        >>> encode(model, "It rained.") == model.tokenizer.encode("It rained.")
        True
    """
    tokenizer = tokenizer_of(model)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if isinstance(text, ChatText) or (ids and ids[0] in tokenizer.all_special_ids):
        return ids
    whole = tokenizer.encode(text)
    if not ids:
        return [number for number in whole if number == tokenizer.bos_token_id]
    before = next((n for n in range(len(whole) - len(ids) + 1) if whole[n : n + len(ids)] == ids), None)
    return whole if before is None else whole[: before + len(ids)]


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"] = "left") -> TokenBatch:
    """Pads sequences of ids to one length.

    Raises:
        ValueError: if there is none, or one of them is empty.
    """
    if not sequences or any(len(ids) == 0 for ids in sequences):
        empty = next((i for i, ids in enumerate(sequences) if len(ids) == 0), None)
        received = "an empty list" if empty is None else f"none at index {empty}"
        raise ValueError(f"texts must have at least one token each, got {received}. Leave empty texts out.")
    length = max(len(ids) for ids in sequences)
    tokens = torch.full((len(sequences), length), pad_id, dtype=torch.long, device="cpu")
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(sequences):
        span = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
        tokens[row, span] = torch.tensor(list(ids), device="cpu")
        mask[row, span] = 1
    return TokenBatch(tokens, mask, tuple(range(len(sequences))))


def pad_id_of(model: HasTokenizer) -> int:
    """The id for padding: the pad token, else the end-of-text token, else 0; always an id in the model's vocabulary."""
    tokenizer, rows = tokenizer_of(model), getattr(getattr(model, "cfg", None), "d_vocab", math.inf)
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and candidate < rows:
            return candidate
    return 0


PASS = 32
"""What a forward pass costs besides its tokens, in tokens: a pass of few rows uses a processor badly."""


def in_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Splits rows into batches of similar length, longest first, with the fewest tokens of padding and passes.

    Args:
        lengths: tokens of each row.
        batch_size: most rows in a batch.

    Example:
        >>> in_batches([9, 500, 480, 8], batch_size=4)
        [[1, 2], [0, 3]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    costs, ends = [0.0], [0]  # of the first n rows in order: least cost, and where their last batch begins
    for n in range(1, len(order) + 1):
        first = range(max(0, n - batch_size), n)
        cost, begin = min((costs[i] + PASS + lengths[order[i]] * (n - i), i) for i in first)
        costs.append(cost)
        ends.append(begin)
    batches, end = list[list[int]](), len(order)
    while end:
        batches.append(order[ends[end] : end])
        end = ends[end]
    return batches[::-1]


def encoded_texts(model: HasTokenizer, texts: Iterable[str], batch_size: int) -> list[list[int]]:
    """Token ids of texts that run in batches.

    Raises:
        ValueError: if `texts` is empty or holds an empty text, or the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size}. The default is 32.")
    encoded = [encode(model, text) for text in text_list(texts, "texts", blank=True)]
    if [] in encoded:
        raise ValueError(
            f"texts must have at least one token each, got none at index {encoded.index([])}. Leave empty texts out."
        )
    return encoded


def batches(
    model: TextModel, texts: Iterable[str], batch_size: int, side: Literal["left", "right"] = "left"
) -> Iterator[TokenBatch]:
    """Token batches of similar length, longest first (see `in_batches`).

    Raises:
        ValueError: if `texts` is empty or holds an empty text, or the batch size is below 1.
    """
    encoded = encoded_texts(model, texts, batch_size)
    for rows in in_batches([len(ids) for ids in encoded], batch_size):
        padded = pad([encoded[i] for i in rows], pad_id_of(model), side)
        yield TokenBatch(padded.tokens, padded.mask, tuple(rows)).to(model.cfg.device)
