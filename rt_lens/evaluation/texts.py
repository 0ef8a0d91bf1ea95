"""How a model predicts texts: perplexity, and KL from a reference, with intervals over texts."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rt_lens.common.inputs import text_list
from rt_lens.common.progress import breathe
from rt_lens.common.statistics.intervals import Interval, ratio_interval
from rt_lens.models.context import token_context
from rt_lens.models.divergence import kl_divergence
from rt_lens.models.forward import logits_where
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode, pad, pad_id_of


@dataclass(frozen=True)
class PerplexityResult:
    """How a model predicts some texts; tokens of one text are not independent, so intervals resample whole texts.

    Attributes:
        nll: negative log-likelihood of each text, in nats, summed over its tokens.
        kl: KL to the reference, in nats, summed over each text's tokens; None without a reference.
        sizes: tokens predicted in each text.
        texts_sha256: checksum of the texts.
        seed: of the bootstrap.
        log_probabilities: Float[Tensor, "token d_vocab"], if kept: what makes this a reference for others. Tokens are
            in the order in which they were run, longest windows first.
        window: tokens run at once where a text was longer than that; None where all texts fitted.
        stride: from one window's start to the next; None where all texts fitted.
    """

    nll: Float[np.ndarray, "text"]
    kl: Float[np.ndarray, "text"] | None
    sizes: Int[np.ndarray, "text"]
    texts_sha256: str
    seed: int
    log_probabilities: Float[Tensor, "token d_vocab"] | None = field(default=None, repr=False)
    window: int | None = None
    stride: int | None = None

    @property
    def perplexity(self) -> Interval:
        """exp of the mean negative log-likelihood per token."""
        n, *values = ratio_interval(self.nll, self.sizes, self.seed)
        return Interval(n, *(math.exp(value) for value in values))

    @property
    def mean_kl(self) -> Interval | None:
        """Mean KL(reference || model) per token, in nats."""
        return None if self.kl is None else ratio_interval(self.kl, self.sizes, self.seed)

    @classmethod
    def pooled(cls, fits: Sequence[PerplexityResult]) -> PerplexityResult:
        """The average over several models (tuning seeds, say) on the same texts.

        Raises:
            ValueError: if there is none, or they are of different texts or windows.
        """
        if not fits:
            raise ValueError("fits: none came; at least one is wanted.")
        if len({(fit.texts_sha256, fit.window, fit.stride) for fit in fits}) > 1:
            raise ValueError("fits: they are of different texts or windows. Measure all on the same ones.")
        first, kls = fits[0], [fit.kl for fit in fits if fit.kl is not None]
        kl = np.mean(kls, axis=0) if len(kls) == len(fits) else None
        return cls(
            np.mean([fit.nll for fit in fits], axis=0), kl, first.sizes, first.texts_sha256, first.seed,
            window=first.window, stride=first.stride,
        )  # fmt: skip


@torch.no_grad()
def perplexity(
    model: Model,
    texts: Iterable[str],
    *,
    reference: PerplexityResult | None = None,
    keep: bool = False,
    batch_size: int = 4,
    window: int | None = None,
    stride: int | None = None,
    seed: int = 0,
) -> PerplexityResult:
    """Perplexity of texts, and KL(reference || model) on the same tokens, in one pass.

    A text longer than the window is run in overlapping windows, as is usual (see the "strided" perplexity of Hugging
    Face's documentation): each token is predicted once, by the first window that reaches it, from at least
    `window - stride` tokens before it. The last window is moved back to be full. A small stride costs more and gives
    each token more context; a text that fits is run whole, whatever the stride. Sums are in float64, and a token's
    log-likelihood has no rounding that grows with the vocabulary: in float64 the perplexity is that of a direct
    computation, in float32 it is as good as the model's own logits.

    Hooks see each token at its place in its text, and the text's length. A condition by example, which reads a
    prompt's last token, fails where a text does not fit: it is not in the first window.

    Args:
        model: whatever it carries is what is measured.
        texts: each scored on its own, from its second token on.
        reference: an earlier result with `keep=True` on the same texts, in the same windows.
        keep: keep the log-probabilities (4 bytes x tokens x vocabulary, 8 for a model in float64).
        batch_size: windows per forward pass; it changes nothing but speed and memory.
        window: most tokens run at once; the model's context for None.
        stride: tokens from one window's start to the next; half the window for None.
        seed: of the bootstrap.

    Raises:
        ValueError: no text, a text of a single token, a window beyond the context, a stride beyond the window, or a
            reference that was not kept or is of other texts or windows.

    Example:
        >>> untuned = perplexity(model, texts, keep=True)
        >>> with delta.applied(model):
        ...     fit = perplexity(model, texts, reference=untuned)
        >>> fit.perplexity, fit.mean_kl
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} came, a whole number of at least 1 is wanted.")
    window, stride = _checked(model, window, stride)
    texts = text_list(texts, "texts", blank=True)
    encoded = _encoded(model, texts)
    checksum = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    longer = max(map(len, encoded)) > window
    in_windows = (window, stride) if longer else (None, None)
    theirs = None if reference is None else _log_probabilities_of(reference, checksum, in_windows)
    pieces = _in_windows(encoded, window, stride)
    sizes = np.array([len(ids) - 1 for ids in encoded])
    nll, kl, kept, start = np.zeros(len(texts)), np.zeros(len(texts)), None, 0
    for first in range(0, len(pieces), batch_size):
        breathe()
        batch = pieces[first : first + batch_size]
        losses, divergences = [], []
        for logits, wanted in predictions(model, batch, len(texts)):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            normaliser = log_normaliser(logits)
            losses.append(normaliser - logits.gather(1, wanted)[:, 0].cpu().double())
            if theirs is not None or keep:
                logits = logits - normaliser.to(logits)[:, None]
            rows = slice(start, start + len(logits))
            if theirs is not None:
                divergences.append(kl_divergence(logits, theirs[rows].to(logits)).cpu().double())
            if keep:
                kept = torch.empty(int(sizes.sum()), logits.shape[1], dtype=logits.dtype) if kept is None else kept
                kept[rows] = logits.cpu()
            start = rows.stop
        _add(nll, batch, losses)
        _add(kl, batch, divergences)
    return PerplexityResult(nll, None if theirs is None else kl, sizes, checksum, seed, kept, *in_windows)


class Window(NamedTuple):
    """Tokens of a text that are run at once.

    Attributes:
        start: number of the first token run.
        end: number after the last token run.
        first: number of the first token whose prediction counts; all up to `end` follow, as far as the text goes.
    """

    start: int
    end: int
    first: int


def windows_of(length: int, window: int, stride: int) -> list[Window]:
    """Windows in which each token of a text but its first is predicted once.

    Each predicted token has at least `window - stride + 1` tokens before it in its window, or all there are.

    Args:
        length: tokens of the text, at least 2.
        window: most tokens run at once.
        stride: 1 to `window`.

    Example:
        >>> windows_of(10, window=4, stride=2)[:2]
        [Window(start=0, end=4, first=1), Window(start=2, end=6, first=5)]
    """
    if length <= window:
        return [Window(0, length, 1)]
    found = [Window(0, window, 1)]
    while found[-1].end < length - 1:  # the last token need not be run
        start = min(found[-1].start + stride, length - 1 - window)
        found.append(Window(start, start + window, found[-1].end + 1))
    return found


def log_normaliser(logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n"]:
    """log of the sum of the logits' exponentials, in float64, exact to about 1e-7 for logits in float32.

    torch's own float32 log_softmax adds up a vocabulary's small probabilities one by one, which on a CPU puts every
    token's log-likelihood off by 9e-6 in the same direction.
    """
    found = []
    for part in logits.split(16):  # few enough rows to stay in the processor's cache
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        highest = part.amax(-1, keepdim=True)
        found.append(highest[:, 0].cpu().double() + (part - highest).exp_().sum(-1).cpu().double().log())
    return torch.cat(found)


@dataclass(frozen=True)
class Piece:
    """Tokens to run, and those of them, and after them, whose log-likelihoods are wanted.

    Attributes:
        number: of the text in the caller's list.
        start: number in the text of the first token run.
        ids: tokens that are run.
        first: number in the text of the first token that is predicted.
        wanted: tokens that are predicted, from `first` on without a gap.
        length: tokens of the text that count as prompt; those from there on count as generated, for edits.
    """

    number: int
    start: int
    ids: tuple[int, ...]
    first: int
    wanted: tuple[int, ...]
    length: int


def predictions(
    model: Model, batch: Sequence[Piece], n_rows: int
) -> Iterator[tuple[Float[Tensor, "n d_vocab"], Int[Tensor, "n 1"]]]:
    """Logits that predict what is wanted of a batch, piece after piece and some at a time, with the tokens wanted."""
    padded = pad([piece.ids for piece in batch], pad_id_of(model)).to(model.cfg.device)
    width, device = padded.mask.shape[1], padded.mask.device
    where = torch.zeros_like(padded.mask, dtype=torch.bool)
    for row, piece in enumerate(batch):
        begin = width - len(piece.ids) + piece.first - 1 - piece.start  # a prediction stands one before its token
        where[row, begin : begin + len(piece.wanted)] = True
    # Tokens before the window count as seen, so that hooks are told each token's place in its text.
    starts = torch.tensor([piece.start for piece in batch], device=device)
    before = torch.arange(int(starts.max()), device=device) >= starts.max() - starts[:, None]
    mask = torch.cat([before.to(padded.mask), padded.mask], dim=1)
    with token_context(
        mask, new=width, lengths=torch.tensor([piece.length for piece in batch], device=device),
        rows=[piece.number for piece in batch], n_rows=n_rows,
    ):  # fmt: skip
        parts = logits_where(model, padded.tokens, padded.mask, where)
        parts = itertools.chain([next(parts)], parts)  # the model runs when the first part is made
    wanted = torch.tensor([token for piece in batch for token in piece.wanted], device=device)
    done = 0
    for logits in parts:
        yield logits, wanted[done : done + len(logits), None]
        done += len(logits)


def _in_windows(encoded: Sequence[Sequence[int]], window: int, stride: int) -> list[Piece]:
    """All windows of all texts, like lengths together; the longest first, so that too large a batch fails at once."""
    pieces = [
        Piece(number, start, tuple(ids[start:end]), first, tuple(ids[first : end + 1]), len(ids))
        for number, ids in enumerate(encoded)
        for start, end, first in windows_of(len(ids), window, stride)
    ]
    return sorted(pieces, key=lambda piece: -len(piece.ids))


def _checked(model: Model, window: int | None, stride: int | None) -> tuple[int, int]:
    context = model.cfg.n_ctx
    window = context if window is None else window
    if not 1 <= window <= context:
        raise ValueError(f"window: {window} came; 1 to {context} tokens, this model's context, are wanted.")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride: {stride} came; 1 to {window}, the window, is wanted: a larger one would leave tokens out. "
            f"Use stride={max(1, window // 2)}, say."
        )
    return window, stride


def _encoded(model: Model, texts: Sequence[str]) -> list[list[int]]:
    encoded = [encode(model, text) for text in texts]
    for number, ids in enumerate(encoded):
        if len(ids) < 2:
            raise ValueError(
                f"texts: number {number}, {texts[number]!r}, has {len(ids) or 'no'} token{'s' * (len(ids) != 1)}, so "
                "there is nothing to predict. Leave it out, or join it to another text."
            )
    return encoded


def _log_probabilities_of(
    reference: PerplexityResult, checksum: str, in_windows: tuple[int | None, int | None]
) -> Float[Tensor, "token d_vocab"]:
    if reference.log_probabilities is None:
        raise ValueError("reference: its log-probabilities were not kept. Make it with keep=True.")
    if reference.texts_sha256 != checksum:
        raise ValueError("reference: it was made from other texts. Make it from the same ones, in the same order.")
    theirs = (reference.window, reference.stride)
    if theirs != in_windows:
        raise ValueError(
            f"reference: it was made with window and stride {theirs}, here they are {in_windows} (None where all texts "
            "fit). Make both with the same."
        )
    return reference.log_probabilities


def _add(totals: Float[np.ndarray, "text"], batch: Sequence[Piece], chunks: Sequence[Float[Tensor, "_"]]) -> None:
    """Adds up values laid end to end, each window's to its text."""
    if chunks:
        for piece, part in zip(batch, torch.cat(list(chunks)).split([len(each.wanted) for each in batch]), strict=True):
            totals[piece.number] += float(part.sum())
