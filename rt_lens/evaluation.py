"""Measuring whatever model is handed over: scores of its answers, perplexity, KL, facts. Knows nothing of steering or
tuning; callers wrap the model in a context."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rt_lens.forward import logits_where
from rt_lens.generation import generate
from rt_lens.losses import kl_divergence
from rt_lens.prompts import ContrastPairs
from rt_lens.statistics import Interval, mean_interval, share_interval
from rt_lens.tokens import TokenBatch, batches
from rt_lens.whereabouts import whereabouts

Scorer = Callable[[str], float]
"""One answer in, one number out; higher means more of the behaviour."""


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(answer: str) -> float:
    """VADER's compound mood, from -1 (sad) to 1 (happy) (Hutto and Gilbert 2014)."""
    return float(_vader().polarity_scores(answer)["compound"])


@dataclass(frozen=True)
class Lexicon:
    """Balance of two word lists: (positive - negative) / (positive + negative) matches, 0 where there is none.

    Attributes:
        positive: words or phrases that count for the behaviour.
        negative: words or phrases that count against it.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.positive or not self.negative:
            raise ValueError("scorer: a lexicon needs words in both lists, positive and negative.")

    def __call__(self, answer: str) -> float:
        text = answer.lower().replace("’", "'")
        hits, misses = (len(_words(words).findall(text)) for words in (self.positive, self.negative))
        return (hits - misses) / (hits + misses) if hits + misses else 0.0


@cache
def _words(words: tuple[str, ...]) -> re.Pattern[str]:
    # Longest first, so that "kind of" is not taken for "kind".
    either = "|".join(re.escape(word.lower()) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<![\w'])(?:{either})(?![\w'])")


def make_scorer(scorer: str | Mapping[str, Any] | Scorer) -> tuple[str, Scorer]:
    """A scorer and its name, from a name, a `[scorer]` table, or a function of your own.

    Raises:
        ValueError: unknown name or kind.
    """
    if callable(scorer):
        return getattr(scorer, "__name__", type(scorer).__name__), scorer
    table = {"kind": scorer} if isinstance(scorer, str) else dict(scorer)
    kind = table.get("kind")
    if kind == "vader":
        return "vader", vader
    if kind == "lexicon":
        return "lexicon", Lexicon(tuple(table.get("positive", ())), tuple(table.get("negative", ())))
    raise ValueError(f"scorer: {kind!r} came; 'vader', 'lexicon' (with word lists) or a function is wanted.")


@dataclass(frozen=True)
class Evaluation:
    """Scored answers.

    Attributes:
        scorer: its name.
        prompts: what was asked.
        responses: what the model answered.
        scores: one for each answer.
        interval: mean with n and a bootstrap 95 % interval over prompts.
        seed: of generation and bootstrap.
    """

    scorer: str
    prompts: list[str] = field(repr=False)
    responses: list[str] = field(repr=False)
    scores: list[float] = field(repr=False)
    interval: Interval
    seed: int


def evaluate(
    model: Any,
    test: ContrastPairs | Sequence[str],
    scorer: str | Mapping[str, Any] | Scorer = "vader",
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Answers to prompts, scored.

    Args:
        model: whatever it carries (hooks, a delta) is what is measured.
        test: prompts, or pairs, of which each topic is asked once with no persona.
        scorer: `vader`, a `[scorer]` table, or a function from answer to number.
        max_new_tokens: length of an answer.
        temperature: 0 for greedy.
        seed: of sampling and bootstrap.
        batch_size: prompts per batch.
        progress: show a bar.

    Example:
        >>> with delta.applied(model):
        ...     print(evaluate(model, test).interval)
    """
    name, score = make_scorer(scorer)
    prompts = test.topics if isinstance(test, ContrastPairs) else list(test)
    responses = generate(
        model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    scores = [float(score(response)) for response in responses]
    return Evaluation(name, prompts, responses, scores, mean_interval(scores, seed), seed)


@dataclass(frozen=True)
class Kept:
    """Pairs in which the model itself behaves as its personas ask.

    Attributes:
        pairs: those kept.
        share: kept of those asked, with a Wilson 95 % interval (pairs of one topic are not independent).
        scorer: its name.
    """

    pairs: ContrastPairs
    share: Interval
    scorer: str


def correct_only(
    model: Any,
    pairs: ContrastPairs,
    scorer: str | Mapping[str, Any] | Scorer = "vader",
    *,
    threshold: float = 0.0,
    max_new_tokens: int = 24,
    batch_size: int = 64,
    progress: bool = False,
) -> Kept:
    """Keeps the pairs whose greedy answer scores above a threshold under the positive persona, below under the other.

    Args:
        model: HookedTransformer or TransformerBridge.
        pairs: asked with their personas and openers.
        scorer: `vader`, a `[scorer]` table, or a function from answer to number.
        threshold: between the two sides.
        max_new_tokens: length of an answer.
        batch_size: texts per batch.
        progress: show a bar.

    Raises:
        ValueError: if no pair is left; the message says how the sides scored.

    Example:
        >>> kept = correct_only(model, train.sample(128), "vader")
        >>> vectors = extract_vectors(model, kept.pairs)
    """
    name, score = make_scorer(scorer)
    texts = pairs.texts(model)
    answers = generate(
        model, texts.positive + texts.negative, chat=False, max_new_tokens=max_new_tokens, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    scores = [float(score(answer)) for answer in answers]
    positive, negative = scores[: len(pairs)], scores[len(pairs) :]
    correct = [high > threshold > low for high, low in zip(positive, negative, strict=True)]
    if not any(correct):
        raise ValueError(
            f"pairs: of {len(pairs)} none is answered as both personas ask ({name} {np.mean(positive):.2f} and "
            f"{np.mean(negative):.2f} in the mean, threshold {threshold:g}). Use another threshold, or all pairs."
        )
    kept = tuple(pair for pair, right in zip(pairs.pairs, correct, strict=True) if right)
    return Kept(ContrastPairs(pairs.name, kept), share_interval(len(kept), len(pairs)), name)


@dataclass(frozen=True)
class TextFit:
    """How a model predicts some texts; tokens of one text are not independent, so intervals resample whole texts.

    Attributes:
        nll: negative log-likelihood of each text, in nats, summed over its tokens.
        kl: KL to the reference, in nats, summed over each text's tokens; None without a reference.
        sizes: tokens predicted in each text.
        texts_sha256: checksum of the texts.
        seed: of the bootstrap.
        log_probabilities: Float[Tensor, "token d_vocab"], if kept: what makes this a reference for others.
    """

    nll: Float[np.ndarray, "text"]
    kl: Float[np.ndarray, "text"] | None
    sizes: Int[np.ndarray, "text"]
    texts_sha256: str
    seed: int
    log_probabilities: Float[Tensor, "token d_vocab"] | None = field(default=None, repr=False)

    @property
    def perplexity(self) -> Interval:
        """exp of the mean negative log-likelihood per token."""
        n, *values = self._per_token(self.nll)
        return Interval(n, *(math.exp(value) for value in values))

    @property
    def mean_kl(self) -> Interval | None:
        """Mean KL(reference || model) per token, in nats."""
        return None if self.kl is None else self._per_token(self.kl)

    def _per_token(self, totals: Float[np.ndarray, "text"]) -> Interval:
        drawn = np.random.default_rng(self.seed).integers(0, len(totals), (4000, len(totals)))
        means = totals[drawn].sum(1) / self.sizes[drawn].sum(1)
        low, high = np.quantile(means, [0.025, 0.975])
        return Interval(len(totals), float(totals.sum() / self.sizes.sum()), float(low), float(high))

    @classmethod
    def pooled(cls, fits: Sequence[TextFit]) -> TextFit:
        """The average over several models (tuning seeds, say) on the same texts."""
        kls = [fit.kl for fit in fits if fit.kl is not None]
        kl = np.mean(kls, axis=0) if len(kls) == len(fits) else None
        return cls(np.mean([fit.nll for fit in fits], axis=0), kl, fits[0].sizes, fits[0].texts_sha256, fits[0].seed)


@torch.no_grad()
def text_fit(
    model: Any,
    texts: Sequence[str],
    *,
    reference: TextFit | None = None,
    keep: bool = False,
    batch_size: int = 4,
    seed: int = 0,
) -> TextFit:
    """Perplexity of texts, and KL(reference || model) on the same tokens, in one pass.

    Args:
        model: whatever it carries is what is measured.
        texts: each scored on its own, from its second token on.
        reference: an earlier result with `keep=True` on the same texts.
        keep: keep the log-probabilities (4 bytes x tokens x vocabulary).
        batch_size: texts per forward pass.
        seed: of the bootstrap.

    Raises:
        ValueError: if the reference was not kept, or is of other texts.
    """
    if reference is not None and reference.log_probabilities is None:
        raise ValueError("reference: its log-probabilities were not kept. Make it with keep=True.")
    checksum = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    if reference is not None and reference.texts_sha256 != checksum:
        raise ValueError("reference: it was made from other texts. Make it from the same ones, in the same order.")
    nll, kl, sizes = np.zeros(len(texts)), np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    kept: list[Tensor] = []
    start = 0
    for batch in batches(model, texts, batch_size):
        where = batch.mask.bool().clone()
        where[:, -1] = False  # left padding: the last column is the last token of every row
        following = torch.roll(batch.tokens, -1, 1)[where]
        losses, divergences, done = [], [], 0
        for logits in _told(batch, len(texts), logits_where(model, batch.tokens, batch.mask, where)):
            log_probabilities = torch.log_softmax(logits.float(), -1)
            wanted = following[done : done + len(logits), None]
            losses.append(-log_probabilities.gather(1, wanted)[:, 0])
            if reference is not None:
                assert reference.log_probabilities is not None
                theirs = reference.log_probabilities[start + done : start + done + len(logits)]
                divergences.append(kl_divergence(log_probabilities, theirs.to(logits.device)))
            if keep:
                kept.append(log_probabilities.cpu())
            done += len(logits)
        start += done
        rows, each = list(batch.rows), where.sum(1).tolist()
        sizes[rows] = each
        nll[rows] = _sums(losses, each)
        kl[rows] = _sums(divergences, each) if divergences else 0.0
    return TextFit(nll, kl if reference is not None else None, sizes, checksum, seed, torch.cat(kept) if keep else None)


def _told(batch: TokenBatch, n_rows: int, parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same parts, with hooks told which tokens are run while the first of them is made."""
    with whereabouts(batch.mask, rows=batch.rows, n_rows=n_rows):
        first = next(parts)
    return itertools.chain([first], parts)


def _sums(chunks: Sequence[Tensor], sizes: Sequence[int]) -> list[float]:
    """Sums over consecutive stretches of the chunks laid end to end."""
    return [float(part.double().sum()) for part in torch.cat(list(chunks)).split(list(sizes))]


def facts_kept(
    model: Any, facts: Sequence[Mapping[str, Any]], *, max_new_tokens: int = 10, batch_size: int = 64
) -> list[bool]:
    """For each question, whether the greedy answer names a right answer and none of the wrong ones.

    Args:
        model: whatever it carries is what is measured.
        facts: `{"question", "answers", "wrong"}`.
        max_new_tokens: length of an answer.
        batch_size: questions per batch.
    """
    asked = [fact["question"] for fact in facts]
    answers = generate(model, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [
        any(right in answer for right in fact["answers"]) and not any(wrong in answer for wrong in fact["wrong"])
        for answer, fact in zip(answers, facts, strict=True)
    ]


def repetition(responses: Sequence[str]) -> list[float]:
    """For each answer, the share of its word pairs that it said before: 0 for none, near 1 for a loop."""
    shares = []
    for response in responses:
        words = response.lower().split()
        pairs = list(itertools.pairwise(words))
        shares.append(1 - len(set(pairs)) / len(pairs) if pairs else 0.0)
    return shares
