"""Estimates the computation and memory of each operation of a run, from numbers of tokens and the model's sizes.

The rules follow the code of the subpackages below: what it caches, copies and keeps. They are estimates, and a test
compares them with a real run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rt_lens.experiment.shape import Shape
from rt_lens.models.tokens.batches import in_batches
from rt_lens.tuning.config import TuneConfig

ACTIVATIONS = "activations kept for the gradients"
CHUNK = 128  # positions whose logits are computed at once, as in `logits_where`


@dataclass(frozen=True)
class Work:
    """The computation and memory of a part of a run.

    Attributes:
        tokens: that run through all blocks (through half of the blocks counts half).
        positions: at which logits are computed.
        passes: forward passes; each reads all weights once.
        device: content -> bytes beside the model's weights, at the moment that needs most memory.
        host: the same for the memory of the CPU, wherever the model runs.
    """

    tokens: float = 0.0
    positions: float = 0.0
    passes: float = 0.0
    device: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        """One after the other: computation adds up, and memory is the larger of the two."""
        return Work(
            self.tokens + other.tokens, self.positions + other.positions, self.passes + other.passes,
            max(self.device, other.device, key=total), max(self.host, other.host, key=total),
        )  # fmt: skip

    def __mul__(self, times: float) -> Work:
        return replace(
            self, tokens=times * self.tokens, positions=times * self.positions, passes=times * self.passes
        )  # fmt: skip

    def or_else(self, other: Work) -> Work:
        """Either of the two: the larger computation, and the larger memory."""
        return Work(
            max(self.tokens, other.tokens), max(self.positions, other.positions), max(self.passes, other.passes),
            max(self.device, other.device, key=total), max(self.host, other.host, key=total),
        )  # fmt: skip

    def holding(self, device: Mapping[str, int], host: Mapping[str, int] | None = None) -> Work:
        """The same with this memory in addition, from beginning to end."""
        return replace(self, device={**self.device, **device}, host={**self.host, **(host or {})})


def total(parts: Mapping[str, int]) -> int:
    """Bytes of all parts."""
    return sum(parts.values())


@dataclass(frozen=True)
class Costs:
    """The operations of a run on one model.

    Attributes:
        shape: the model's sizes.
        size: bytes of a number in its weights.
    """

    shape: Shape
    size: int

    def read(
        self, sizes: Sequence[int], batch: int, *, logits: int = 0, blocks: float = 1.0, cut: bool = False
    ) -> Work:
        """One forward pass over texts, batched by length, with logits at the given number of positions per text.

        It is the most that this takes: beginnings that texts share run once.

        Args:
            sizes: tokens of each text.
            batch: texts per batch.
            logits: positions per text with logits.
            blocks: share of the blocks that run.
            cut: batches are cut where that saves padding, as they are for activations.
        """
        if not sizes:
            return Work()
        tokens, passes = _padded(sizes, batch, cut)
        device = self._running(min(batch, len(sizes)) * max(sizes)) | self._logits(min(CHUNK, batch * logits))
        return Work(tokens * blocks, logits * len(sizes), passes, device)

    def written(self, sizes: Sequence[int], new: int, batch: int) -> Work:
        """Generating responses of `new` tokens each; those that end earlier cost less."""
        rows = min(batch, len(sizes))
        prompts = self.read(sizes, batch, logits=1)
        steps = math.ceil(len(sizes) / batch) * (new - 1)
        cache = {"key-value cache": self._cache(rows * (max(sizes) + new))}
        decoding = Work(len(sizes) * (new - 1), len(sizes) * (new - 1), steps)
        return (prompts + decoding).holding(cache)

    def options(self, starts: Sequence[int], options: Sequence[Sequence[int]], batch: int) -> Work:
        """Likelihoods of options, given their tokens: each question runs once, then the other tokens of its options."""
        work = self.read(starts, batch, logits=1)
        longer = [[size - 1 for size in sizes if size > 1] for sizes in options]
        rest = [size for sizes in longer for size in sizes]
        rows, longest = min(batch, len(starts)), max(starts)
        cached = rows * (longest + max(size for sizes in options for size in sizes))  # with room for the options
        if rest:
            branches = batch * max(len(sizes) for sizes in longer)
            parts = math.ceil(len(starts) / batch)
            work += Work(len(rest) * max(rest), sum(rest), parts, self._running(min(branches, len(rest)) * max(rest)))
            cached += min(branches, len(rest)) * (longest + max(rest))
        return work.holding({"key-value cache": self._cache(cached)} | self._logits(CHUNK if rest else rows))

    def fit(self, sizes: Sequence[int], *, kept: bool = False) -> Work:
        """Perplexity of texts, and their KL to stored log-probabilities."""
        work = self.read(sizes, 4)
        reference = {"log-probabilities of the untuned model": 4 * sum(sizes) * self.shape.d_vocab}
        work = replace(work, positions=sum(sizes), device={**work.device, **self._logits(min(CHUNK, sum(sizes)))})
        return work.holding({}, reference if kept else None)

    def tuning(
        self, config: TuneConfig, rows: Sequence[int], held_out: Sequence[int], neutral: Sequence[int], predicted: int
    ) -> Work:
        """One tuning run over prepared data.

        Args:
            config: of the run.
            rows: tokens of each training target.
            held_out: tokens of each validation target.
            neutral: tokens of each neutral target.
            predicted: largest number of predicted positions in a row.
        """
        left = 1 - (0 if config.prefix_cache == "off" else min(config.blocks)) / self.shape.n_layers
        steps = steps_of(config, len(rows))
        mean, batch = sum(rows) / len(rows), config.batch_size
        n_neutral = config.neutral_batch_size if config.kl_weight and neutral else 0
        per_step = batch * mean + n_neutral * (sum(neutral) / len(neutral) if neutral else 0)
        # A backward pass costs a forward pass for the activations, and one in the trained weights for their gradients.
        share = self.shape.trained(config) / (self.shape.in_blocks * left)
        validations = 1 + (steps - 1) // config.validate_every
        per_validation = sum(held_out) + 2 * n_neutral * (max(neutral) if neutral else 0)
        work = Work(
            left * (steps * per_step * (2 + share) + validations * per_validation),
            3 * (steps * (batch + 2 * n_neutral) + validations * len(held_out)) * predicted,
            steps * (3 if n_neutral else 2) + validations * math.ceil(len(held_out) / batch),
        )
        at_once = config.micro_batch_size or max(batch, n_neutral)
        longest = at_once * max([*rows, *neutral])
        # Counted on a Llama, per token: 14 d_model and 4 d_mlp in a trained block, 6 and 3 in the others.
        trained = len(config.blocks)
        others = left * self.shape.n_layers - trained
        widths, wide = 14 * trained + 6 * others, 4 * trained + 3 * others
        kept = round(longest * (widths * self.shape.d_model + wide * self.shape.d_mlp) * self.size)
        logits = {"logits and their gradients": at_once * predicted * self.shape.d_vocab * (24 + self.size)}
        return work.holding(self._optimiser(config) | {ACTIVATIONS: kept} | logits)

    def material(self, rows: Sequence[int], config: TuneConfig) -> Work:
        """Computing the prefix of all rows once, with the untuned model."""
        work = self.read(rows, 16)
        stored = sum(rows) * self.shape.d_model * self.size
        # Above 2 GiB it is stored on disk.
        return work if stored > 2 * 1024**3 else work.holding({"residuals before the first trained block": stored})

    def _optimiser(self, config: TuneConfig) -> dict[str, int]:
        """Memory of the trained weights in `FullRank` or `LowRank`, AdamW and the loop."""
        trained, held, size = self.shape.trained(config), self.shape.optimised(config), self.size
        # While the best weights are replaced, memory holds both; the delta is made later and needs no more than that.
        in_model = 0 if size == 4 and not config.lora_rank else trained * size  # in float32 the parameter is the weight
        gradients = 4 * held + (in_model if size != 4 and not config.lora_rank else 0)
        return {
            "trained weights in float32": 4 * held,
            "trained weights in the model": in_model,
            "gradients": gradients,
            "AdamW's two moments": 8 * held,
            "best weights, and those that replace them": 8 * held,
            "the delta, and that of the run before": trained * size * (2 if config.lora_rank else 1),
        }

    def _running(self, rows: int) -> dict[str, int]:
        """Activations of one block for this many tokens."""
        shape = self.shape
        return {"activations": rows * ((8 * shape.d_model + 3 * shape.d_mlp) * self.size + 8 * shape.d_model)}

    def _cache(self, tokens: int) -> int:
        return 2 * self.shape.n_layers * tokens * self.shape.d_key_value * self.size

    def _logits(self, positions: int) -> dict[str, int]:
        """Logits in the model's type, in float64 or twice in float32, and their logarithms."""
        return {"logits": positions * self.shape.d_vocab * (self.size + 16)} if positions else {}


def steps_of(config: TuneConfig, n_rows: int) -> int:
    """Steps of one tuning run without early stopping."""
    return min(config.max_steps, config.epochs * math.ceil(n_rows / config.batch_size))


def summed(works: Iterable[Work]) -> Work:
    """All of them, one after the other."""
    combined = Work()
    for work in works:
        combined = combined + work
    return combined


def _padded(sizes: Sequence[int], batch: int, cut: bool) -> tuple[int, int]:
    """Tokens with the padding of batches sorted by length, and the number of batches."""
    ordered = sorted(range(len(sizes)), key=lambda row: -sizes[row])
    whole = [ordered[start : start + batch] for start in range(0, len(ordered), batch)]
    batches = in_batches(sizes, batch) if cut else whole
    return sum(sizes[rows[0]] * len(rows) for rows in batches), len(batches)
