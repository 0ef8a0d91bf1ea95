"""What each operation of a run computes and holds, by rule, from numbers of tokens and a model's sizes.

The rules follow the code of the rooms below (what is cached, copied, kept); they are estimates, and a test compares
them with a real run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rt_lens.experiment.shape import Shape
from rt_lens.tuning.config import TuneConfig

KEPT = "activations kept for the gradients"
CHUNK = 128  # positions whose logits are computed at once, as in `logits_where`


@dataclass(frozen=True)
class Work:
    """What some part of a run computes and holds.

    Attributes:
        tokens: run through all blocks (half of the blocks count half).
        positions: whose logits are computed.
        passes: forward passes; each reads all weights once.
        device: what is held at the worst moment beside the model's weights -> bytes.
        host: the same, held by the CPU wherever the model runs.
    """

    tokens: float = 0.0
    positions: float = 0.0
    passes: float = 0.0
    device: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        """One after the other: work adds up, memory is the larger one's."""
        return Work(
            self.tokens + other.tokens, self.positions + other.positions, self.passes + other.passes,
            max(self.device, other.device, key=total), max(self.host, other.host, key=total),
        )  # fmt: skip

    def __mul__(self, times: float) -> Work:
        return replace(
            self, tokens=times * self.tokens, positions=times * self.positions, passes=times * self.passes
        )  # fmt: skip

    def or_else(self, other: Work) -> Work:
        """One of the two, whichever is larger."""
        return Work(
            max(self.tokens, other.tokens), max(self.positions, other.positions), max(self.passes, other.passes),
            max(self.device, other.device, key=total), max(self.host, other.host, key=total),
        )  # fmt: skip

    def holding(self, device: Mapping[str, int], host: Mapping[str, int] | None = None) -> Work:
        """With these held all the while."""
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

    def read(self, sizes: Sequence[int], batch: int, *, logits: int = 0, blocks: float = 1.0) -> Work:
        """Texts run once, like lengths together, with the logits of so many positions each."""
        if not sizes:
            return Work()
        tokens, passes = _padded(sizes, batch)
        device = self._running(min(batch, len(sizes)) * max(sizes)) | self._logits(min(CHUNK, batch * logits))
        return Work(tokens * blocks, logits * len(sizes), passes, device)

    def written(self, sizes: Sequence[int], new: int, batch: int) -> Work:
        """Answers of `new` tokens each (those that end earlier cost less)."""
        rows = min(batch, len(sizes))
        prompts = self.read(sizes, batch, logits=1)
        steps = math.ceil(len(sizes) / batch) * (new - 1)
        cache = {"key-value cache": self._cache(rows * (max(sizes) + new))}
        wrote = Work(len(sizes) * (new - 1), len(sizes) * (new - 1), steps)
        return (prompts + wrote).holding(cache)

    def options(self, starts: Sequence[int], options: Sequence[Sequence[int]], batch: int) -> Work:
        """Likelihoods of options, each of so many tokens: the question runs once, the options' rest beside it."""
        work = self.read(starts, batch, logits=1)
        longer = [[size - 1 for size in each if size > 1] for each in options]
        rest = [size for each in longer for size in each]
        rows, longest = min(batch, len(starts)), max(starts)
        cached = rows * longest
        if rest:
            branches = batch * max(len(each) for each in longer)
            parts = math.ceil(len(starts) / batch)
            work += Work(len(rest) * max(rest), sum(rest), parts, self._running(min(branches, len(rest)) * max(rest)))
            cached += min(branches, len(rest)) * (longest + max(rest))
        return work.holding({"key-value cache": self._cache(cached)} | self._logits(CHUNK if rest else rows))

    def fit(self, sizes: Sequence[int], *, kept: bool = False) -> Work:
        """Perplexity of texts, and the KL to log-probabilities kept before."""
        work = self.read(sizes, 4)
        reference = {"log-probabilities of the untuned model": 4 * sum(sizes) * self.shape.d_vocab}
        work = replace(work, positions=sum(sizes), device={**work.device, **self._logits(min(CHUNK, sum(sizes)))})
        return work.holding({}, reference if kept else None)

    def tuning(
        self, config: TuneConfig, rows: Sequence[int], held_out: Sequence[int], neutral: Sequence[int], predicted: int
    ) -> Work:
        """One run over prepared material.

        Args:
            config: of the run.
            rows: tokens of each target, and likewise of those for validation and of the neutral ones.
            held_out: see rows.
            neutral: see rows.
            predicted: most positions that are predicted in a row.
        """
        left = 1 - (0 if config.prefix_cache == "off" else min(config.blocks)) / self.shape.n_layers
        steps = steps_of(config, len(rows))
        mean, batch = sum(rows) / len(rows), config.batch_size
        few = config.neutral_batch_size if config.kl_weight and neutral else 0
        seen = batch * mean + few * (sum(neutral) / len(neutral) if neutral else 0)
        # Backward costs a forward pass for the activations, and one in the trained weights for their gradients.
        share = self.shape.trained(config) / (self.shape.in_blocks * left)
        validations = 1 + (steps - 1) // config.validate_every
        checked = sum(held_out) + 2 * few * (max(neutral) if neutral else 0)
        learnt = Work(
            left * (steps * seen * (2 + share) + validations * checked),
            3 * (steps * (batch + 2 * few) + validations * len(held_out)) * predicted,
            steps * (3 if few else 2) + validations * math.ceil(len(held_out) / batch),
        )
        at_once = config.micro_batch_size or max(batch, few)
        longest = at_once * max([*rows, *neutral])
        # Counted on a Llama, for each token: 14 widths and 4 of the MLP's in a trained block, 6 and 3 in others.
        trained = len(config.blocks)
        others = left * self.shape.n_layers - trained
        widths, wide = 14 * trained + 6 * others, 4 * trained + 3 * others
        kept = round(longest * (widths * self.shape.d_model + wide * self.shape.d_mlp) * self.size)
        logits = {"logits and their gradients": at_once * predicted * self.shape.d_vocab * (24 + self.size)}
        return learnt.holding(self._optimiser(config) | {KEPT: kept} | logits)

    def material(self, rows: Sequence[int], config: TuneConfig) -> Work:
        """The untuned model's prefix of all rows, read once."""
        work = self.read(rows, 16)
        shelf = sum(rows) * self.shape.d_model * self.size
        # Above 2 GiB it lies on the disk.
        return work if shelf > 2 * 1024**3 else work.holding({"residuals before the first trained block": shelf})

    def _optimiser(self, config: TuneConfig) -> dict[str, int]:
        """What `FullRank` or `LowRank`, AdamW and the loop hold of the trained weights."""
        trained, held, size = self.shape.trained(config), self.shape.optimised(config), self.size
        # While the best weights are replaced both are held; the delta is made later, in no more room than that.
        own = 0 if size == 4 and not config.lora_rank else trained * size  # in float32 the leaf is the weight
        gradients = 4 * held + (own if size != 4 and not config.lora_rank else 0)
        return {
            "trained weights in float32": 4 * held,
            "trained weights in the model": own,
            "gradients": gradients,
            "AdamW's two moments": 8 * held,
            "best weights, and those that replace them": 8 * held,
            "the delta, and that of the run before": trained * size * (2 if config.lora_rank else 1),
        }

    def _running(self, rows: int) -> dict[str, int]:
        """One block at work on so many tokens."""
        shape = self.shape
        return {"activations": rows * ((8 * shape.d_model + 3 * shape.d_mlp) * self.size + 8 * shape.d_model)}

    def _cache(self, tokens: int) -> int:
        return 2 * self.shape.n_layers * tokens * self.shape.d_key_value * self.size

    def _logits(self, positions: int) -> dict[str, int]:
        """As they come, in double or twice in float32, and their logarithms."""
        return {"logits": positions * self.shape.d_vocab * (self.size + 16)} if positions else {}


def steps_of(config: TuneConfig, n_rows: int) -> int:
    """Steps of one tuning run, if nothing stops it early."""
    return min(config.max_steps, config.epochs * math.ceil(n_rows / config.batch_size))


def summed(works: Iterable[Work]) -> Work:
    """All of them, one after the other."""
    found = Work()
    for work in works:
        found = found + work
    return found


def _padded(sizes: Sequence[int], batch: int) -> tuple[int, int]:
    """Tokens run with the padding of batches of like length, and batches."""
    ordered = sorted(sizes, reverse=True)
    firsts = range(0, len(ordered), batch)
    return sum(ordered[i] * len(ordered[i : i + batch]) for i in firsts), len(firsts)
