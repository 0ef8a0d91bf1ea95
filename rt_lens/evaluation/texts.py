"""How well a model predicts texts: perplexity, and KL from a reference, with intervals over texts.

Nothing is generated. This module knows of no question and no scorer.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rt_lens.common.inputs import as_text, listed
from rt_lens.common.progress import breathe
from rt_lens.common.statistics.intervals import Interval, ratio_interval
from rt_lens.models.context import token_context
from rt_lens.models.divergence import kl_divergence
from rt_lens.models.forward import logits_where
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode, pad, pad_id_of
from rt_lens.models.tokens.chats import answered, chat_text


@dataclass(frozen=True)
class Response:
    """A response to a prompt, to be scored: its tokens count, those of the prompt do not.

    Attributes:
        prompt: the user's message, in the model's chat template and under its current system prompt.
        text: the response.

    Example:
        >>> reply = Response("Name a metal.", "Iron is a metal.")
        >>> perplexity(model, [reply]).sizes.tolist() < perplexity(model, [reply.text]).sizes.tolist()
        False
    """

    prompt: str
    text: str


Scored: TypeAlias = str | Response
"""A plain text, or a response to a prompt."""


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model predicts some texts.

    Tokens of one text are not independent, so intervals resample whole texts.

    Attributes:
        nll: negative log-likelihood of each text, in nats, summed over its tokens.
        kl: KL(reference || model) in nats, summed over each text's tokens; None without a reference.
        sizes: number of tokens predicted in each text.
        texts_sha256: checksum of the texts.
        seed: seed for the bootstrap.
        log_probabilities: Float[Tensor, "token d_vocab"] if kept, so that this result can be a reference. Tokens are
            in the order of the forward passes, windows that score most first.
        window: tokens per forward pass, if a text is longer than that; None if all texts fit.
        stride: tokens from the start of one window to the start of the next; None if all texts fit.

    Example:
        >>> result = perplexity(model, texts)
        >>> result.perplexity.n, result.perplexity.mean > 1
        (2, True)
        >>> result.mean_kl is None  # no reference
        True
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
        """Perplexity: exp of the mean negative log-likelihood per token."""
        n, *values = ratio_interval(self.nll, self.sizes, self.seed)
        return Interval(n, *(math.exp(value) for value in values))

    @property
    def mean_kl(self) -> Interval | None:
        """Mean KL(reference || model) per token, in nats."""
        return None if self.kl is None else ratio_interval(self.kl, self.sizes, self.seed)

    @classmethod
    def pooled(cls, results: Sequence[PerplexityResult]) -> PerplexityResult:
        """The average over several models, such as tuning seeds, on the same texts.

        Raises:
            ValueError: for an empty list, or results on different texts or windows.
        """
        if not results:
            raise ValueError("results must be a list of at least one PerplexityResult, got an empty list.")
        if (n := len({(result.texts_sha256, result.window, result.stride) for result in results})) > 1:
            raise ValueError(
                f"results must be of the same texts and windows, got {n} different ones. Measure all on the same texts."
            )
        first, kls = results[0], [result.kl for result in results if result.kl is not None]
        kl = np.mean(kls, axis=0) if len(kls) == len(results) else None
        return cls(
            np.mean([result.nll for result in results], axis=0), kl, first.sizes, first.texts_sha256, first.seed,
            window=first.window, stride=first.stride,
        )  # fmt: skip


@torch.no_grad()
def perplexity(
    model: Model,
    texts: Iterable[Scored],
    *,
    reference: PerplexityResult | None = None,
    keep: bool = False,
    batch_size: int = 4,
    window: int | None = None,
    stride: int | None = None,
    seed: int = 0,
) -> PerplexityResult:
    """Perplexity of texts, and KL(reference || model) on the same tokens, in one pass.

    A text longer than the window runs in overlapping windows, as is usual (see the "strided" perplexity of Hugging
    Face's documentation): each token is predicted once, by the first window that reaches it, from at least
    `window - stride` tokens before it. The last window moves back to be full. A small stride costs more and gives
    each token more context; a text that fits runs whole, whatever the stride. Sums are in float64, and the rounding of
    a token's log-likelihood does not grow with the vocabulary: in float64 the perplexity equals a direct computation,
    in float32 it is as exact as the model's own logits.

    Hooks see each token at its position in its text, and the text's length. A condition by example reads a prompt's
    last token, so it fails if a text does not fit: the first window does not hold that token.

    Args:
        model: the model, measured with its current hooks and weights.
        texts: texts, each scored on its own, from its second token on; a Response from its first.
        reference: an earlier result with `keep=True` on the same texts and windows.
        keep: keep the log-probabilities (4 bytes x tokens x vocabulary; 8 bytes for a model in float64).
        batch_size: windows per forward pass; it affects speed and memory only.
        window: maximum number of tokens per forward pass. Defaults to the model's context.
        stride: tokens from the start of one window to the start of the next. Defaults to half the window.
        seed: seed for the bootstrap.

    Raises:
        ValueError: for no text, a text of a single token, a response that does not fit into the window, a window beyond
            the context, a stride beyond the window, or a reference without log-probabilities or of other texts or
            windows.

    Example:
        >>> untuned = perplexity(model, texts, keep=True)
        >>> with applied(model, delta):
        ...     tuned = perplexity(model, texts, reference=untuned)
        >>> tuned.mean_kl.mean > 0  # nats per token
        True
        >>> tuned.sizes.tolist() == untuned.sizes.tolist()
        True
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    window, stride = _checked(model, window, stride)
    texts = scored_list(texts, "texts")
    encoded = _encoded(model, texts)
    checksum = hashlib.sha256("\0".join(map(_name, texts)).encode()).hexdigest()
    longer = any(len(text.ids) > window for text in encoded if text.first == 1)
    in_windows = (window, stride) if longer else (None, None)
    sizes = np.array([len(text.ids) - text.first for text in encoded])
    expected = None if reference is None else _log_probabilities_of(reference, checksum, in_windows, sizes)
    pieces = _in_windows(encoded, window, stride)
    nll, kl, kept, start = np.zeros(len(texts)), np.zeros(len(texts)), None, 0
    for first in range(0, len(pieces), batch_size):
        breathe()
        batch = pieces[first : first + batch_size]
        losses, divergences = [], []
        for logits, targets in predictions(model, batch, len(texts)):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            normaliser = log_normaliser(logits)
            losses.append(normaliser - logits.gather(1, targets)[:, 0].cpu().double())
            if expected is not None or keep:
                logits = logits - normaliser.to(logits)[:, None]
            rows = slice(start, start + len(logits))
            if expected is not None:
                divergences.append(kl_divergence(logits, expected[rows].to(logits)).cpu().double())
            if keep:
                kept = (
                    torch.empty(int(sizes.sum()), logits.shape[1], dtype=logits.dtype, device="cpu")
                    if kept is None
                    else kept
                )
                kept[rows] = logits.cpu()
            start = rows.stop
        _add(nll, batch, losses)
        _add(kl, batch, divergences)
    return PerplexityResult(nll, None if expected is None else kl, sizes, checksum, seed, kept, *in_windows)


class Window(NamedTuple):
    """Tokens of a text that run in one forward pass.

    Attributes:
        start: index of the first token.
        end: index after the last token.
        first: index of the first token whose prediction counts; all up to `end` follow, as far as the text goes.
    """

    start: int
    end: int
    first: int


def windows_of(length: int, window: int, stride: int) -> list[Window]:
    """Windows that predict each token of a text but its first exactly once.

    Each predicted token has at least `window - stride + 1` tokens before it in its window, or all there are.

    Args:
        length: number of tokens of the text, at least 2.
        window: maximum number of tokens per window.
        stride: 1 to `window`.

    Example:
        >>> windows_of(10, window=4, stride=2)[:2]
        [Window(start=0, end=4, first=1), Window(start=2, end=6, first=5)]
    """
    if length <= window:
        return [Window(0, length, 1)]
    windows = [Window(0, window, 1)]
    while windows[-1].end < length - 1:  # the last token predicts nothing, so it need not run
        start = min(windows[-1].start + stride, length - 1 - window)
        windows.append(Window(start, start + window, windows[-1].end + 1))
    return windows


def log_normaliser(logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n"]:
    """Log of the sum of the logits' exponentials, in float64, exact to about 1e-7 for logits in float32.

    torch's own float32 log_softmax adds up a vocabulary's small probabilities one by one, which on a CPU shifts every
    token's log-likelihood by 9e-6 in the same direction.
    """
    normalisers = []
    for part in logits.split(16):  # few enough rows to stay in the processor's cache
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        highest = part.amax(-1, keepdim=True)
        normalisers.append(highest[:, 0].cpu().double() + (part - highest).exp_().sum(-1).cpu().double().log())
    return torch.cat(normalisers)


@dataclass(frozen=True)
class Piece:
    """Tokens to run, and the target tokens among and after them, whose log-likelihoods count.

    Attributes:
        number: index of the text in the caller's list.
        start: index in the text of the first token to run.
        ids: tokens to run.
        first: index in the text of the first target token.
        targets: target tokens, from `first` on without a gap.
        length: number of the text's tokens that count as prompt; the rest count as generated, for edits.
    """

    number: int
    start: int
    ids: tuple[int, ...]
    first: int
    targets: tuple[int, ...]
    length: int


def predictions(
    model: Model, batch: Sequence[Piece], n_rows: int
) -> Iterator[tuple[Float[Tensor, "n d_vocab"], Int[Tensor, "n 1"]]]:
    """Logits that predict the targets of a batch, piece after piece and some at a time, with the target tokens."""
    padded = pad([piece.ids for piece in batch], pad_id_of(model)).to(model.cfg.device)
    width, device = padded.mask.shape[1], padded.mask.device
    where = torch.zeros_like(padded.mask, dtype=torch.bool)
    for row, piece in enumerate(batch):
        begin = width - len(piece.ids) + piece.first - 1 - piece.start  # a position predicts the next token
        where[row, begin : begin + len(piece.targets)] = True
    # Tokens before the window count as seen, so that hooks get each token's position in its text.
    starts = torch.tensor([piece.start for piece in batch], device=device)
    before = torch.arange(int(starts.max()), device=device) >= starts.max() - starts[:, None]
    mask = torch.cat([before.to(padded.mask), padded.mask], dim=1)
    with token_context(
        mask, new=width, lengths=torch.tensor([piece.length for piece in batch], device=device),
        rows=[piece.number for piece in batch], n_rows=n_rows,
    ):  # fmt: skip
        parts = logits_where(model, padded.tokens, padded.mask, where)
        parts = itertools.chain([next(parts)], parts)  # the model runs when the first part is read
    targets = torch.tensor([token for piece in batch for token in piece.targets], device=device)
    done = 0
    for logits in parts:
        yield logits, targets[done : done + len(logits), None]
        done += len(logits)


def scored_list(given: Iterable[Scored], argument: str, *, none: bool = False) -> list[Scored]:
    """Texts and responses as a list.

    Raises:
        ValueError: as `text_list`.
    """
    return [
        item if isinstance(item, Response) else as_text(item, argument, number, blank=True)
        for number, item in enumerate(listed(given, argument, none=none))
    ]


def _name(text: Scored) -> str:
    """What tells a text from all others."""
    return text if isinstance(text, str) else f"{text.prompt}\1{text.text}"


class _Encoded(NamedTuple):
    """Tokens of a text, the index of the first that is scored, and how many count as the prompt."""

    ids: list[int]
    first: int
    length: int


def _in_windows(encoded: Sequence[_Encoded], window: int, stride: int) -> list[Piece]:
    """All windows of all texts, the longest first, so that a batch too large for memory fails at once.

    Their order is by what is scored alone: a system prompt, which makes responses longer, does not change it.
    """
    pieces = []
    for number, (ids, begin, length) in enumerate(encoded):
        if begin > 1:
            pieces.append(Piece(number, 0, tuple(ids[:-1]), begin, tuple(ids[begin:]), length))
            continue
        pieces += [
            Piece(number, start, tuple(ids[start:end]), first, tuple(ids[first : end + 1]), length)
            for start, end, first in windows_of(len(ids), window, stride)
        ]
    return sorted(pieces, key=lambda piece: -len(piece.targets))


def _checked(model: Model, window: int | None, stride: int | None) -> tuple[int, int]:
    context = model.cfg.n_ctx
    window = context if window is None else window
    if not 1 <= window <= context:
        raise ValueError(f"window must be between 1 and {context} tokens, this model's context, got {window}.")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride must be between 1 and {window}, the window, got {stride}. A larger one would skip tokens. Try "
            f"stride={max(1, window // 2)}."
        )
    return window, stride


def _encoded(model: Model, texts: Sequence[Scored]) -> list[_Encoded]:
    encoded = [_encoded_text(model, text) for text in texts]
    for number, (ids, first, _) in enumerate(encoded):
        if len(ids) - first < 1:
            raise ValueError(
                "texts must have at least two tokens each, so that there is one to predict, got "
                f"{len(ids) or 'no'} token{'s' * (len(ids) != 1)} at index {number}, {texts[number]!r}. Leave it out, "
                "or join it to another text."
            )
        if first > 1 and len(ids) - 1 > model.cfg.n_ctx:
            raise ValueError(
                f"texts must be responses that fit into the model's context of {model.cfg.n_ctx} tokens with their "
                f"prompts, got {len(ids)} tokens at index {number}. Shorten it."
            )
    return encoded


def _encoded_text(model: Model, text: Scored) -> _Encoded:
    if isinstance(text, str):
        ids = encode(model, text)
        return _Encoded(ids, 1, len(ids))
    prompt = chat_text(model, text.prompt)
    before, ids = encode(model, prompt), encode(model, answered(model, prompt, text.text))
    # A token may span the end of the prompt and the start of the response, which then begins with it.
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False))
    first = max(1, sum(1 for _ in alike))
    return _Encoded(ids, first, first)


def _log_probabilities_of(
    reference: PerplexityResult,
    checksum: str,
    in_windows: tuple[int | None, int | None],
    sizes: Int[np.ndarray, "text"],
) -> Float[Tensor, "token d_vocab"]:
    if reference.log_probabilities is None:
        raise ValueError(
            "reference must hold its log-probabilities, got a result without them. Measure it with keep=True."
        )
    if reference.texts_sha256 != checksum:
        raise ValueError(
            "reference must be measured on the same texts in the same order, got one of other texts. Measure it again."
        )
    if not np.array_equal(reference.sizes, sizes):
        raise ValueError(
            "reference must score as many tokens of each text as this model, got other numbers: the system prompt "
            "changes how a response is split into tokens. Leave out the responses that it changes."
        )
    its_windows = (reference.window, reference.stride)
    if its_windows != in_windows:
        raise ValueError(
            f"reference must have the window and stride {in_windows} (None if all texts fit), got {its_windows}. Use "
            "the same for both."
        )
    return reference.log_probabilities


def _add(totals: Float[np.ndarray, "text"], batch: Sequence[Piece], chunks: Sequence[Float[Tensor, "_"]]) -> None:
    """Adds the values of each window to its text's total; the chunks hold them window after window."""
    if chunks:
        parts = torch.cat(list(chunks)).split([len(piece.targets) for piece in batch])
        for piece, part in zip(batch, parts, strict=True):
            totals[piece.number] += float(part.sum())
