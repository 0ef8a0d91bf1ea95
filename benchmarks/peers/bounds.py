"""What a task needs at least, and what the machine can do at best. Knows no tool.

Only matrix products with weights count, each distinct beginning of the texts once; attention is about 1 % more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peers.inputs import MULTIPLIERS, Inputs
from peers.recipe import TRAINED_BLOCKS

FLOAT = 4  # bytes
ADAMW_PASSES = 7  # reads weight, gradient and both moments; writes weight and both moments


class Machine(NamedTuple):
    """Best rates in operations and bytes per second."""

    square: float
    model_like: float
    stream: float

    @property
    def flops(self) -> float:
        return max(self.square, self.model_like)


class Phase(NamedTuple):
    """Work whose arithmetic and reading can overlap."""

    flop: float
    bytes: float = 0.0

    def seconds(self, machine: Machine) -> float:
        return max(self.flop / machine.flops, self.bytes / machine.stream)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-style model."""

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_vocab: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """Of a Hugging Face configuration."""
        heads = config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"], heads,
            config["num_key_value_heads"], config.get("head_dim") or config["hidden_size"] // heads,
            config["vocab_size"],
        )  # fmt: skip

    @classmethod
    def read(cls, folder: str) -> Shape:
        return cls.of(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))

    @property
    def block_weights(self) -> int:
        """Weights of the matrices of a block."""
        attention = 2 * (self.n_heads + self.n_key_value_heads) * self.d_head * self.d_model
        return attention + 3 * self.d_model * self.d_mlp

    @property
    def head_weights(self) -> int:
        return self.d_model * self.d_vocab

    @property
    def weights(self) -> int:
        """All that a decoding step reads."""
        return self.n_layers * self.block_weights + self.head_weights


def distinct_tokens(rows: Iterable[Sequence[int]]) -> int:
    """Tokens of the rows, where rows that begin alike share their beginning."""
    return len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})


def needs(inputs: Inputs, shape: Shape, encode: Callable[[Sequence[str]], list[list[int]]]) -> dict[str, list[Phase]]:
    """Name of a measure -> what it needs; training per step.

    Args:
        inputs: of the tasks.
        shape: of their model.
        encode: token ids of texts.
    """
    block = 2 * shape.block_weights
    sweep_tokens = distinct_tokens(encode(inputs.sweep_prompts))
    below = max(inputs.sweep_layers) + 1
    above = sum(shape.n_layers - 1 - layer for layer in inputs.sweep_layers)
    learning = _step(inputs, shape)
    frozen = distinct_tokens(inputs.tuning_tokens) * block * min(TRAINED_BLOCKS)
    return {
        "extract": extraction(shape, encode([*inputs.positive, *inputs.negative]), inputs.layers),
        "generate_one": decoding(shape, encode(inputs.prompts[:1]), inputs.new_tokens),
        "generate_batch": decoding(shape, encode(inputs.prompts), inputs.new_tokens),
        "tune": learning,
        "tune_all": [*learning, Phase(frozen / inputs.tuning_steps)],
        **{
            name: [Phase(sweep_tokens * block * (below + above * len(multipliers)))]
            for name, multipliers in MULTIPLIERS.items()
        },
    }


def extraction(shape: Shape, rows: Sequence[Sequence[int]], layers: Sequence[int]) -> list[Phase]:
    """Every distinct token once through the blocks up to the last one that is read."""
    return [Phase(2 * shape.block_weights * (max(layers) + 1) * distinct_tokens(rows))]


def decoding(shape: Shape, rows: Sequence[Sequence[int]], new_tokens: int) -> list[Phase]:
    """The prompts once, then one reading of all weights per token."""
    prompt = Phase(2 * shape.n_layers * shape.block_weights * distinct_tokens(rows), shape.weights * FLOAT)
    steps = [Phase(2 * shape.weights * len(rows), shape.weights * FLOAT)] * (new_tokens - 1)
    return [prompt, *steps]


def _step(inputs: Inputs, shape: Shape) -> list[Phase]:
    """Forward from the first trained block, back to it, gradients of the trained matrices, and AdamW."""
    n_tokens = sum(map(len, inputs.tuning_tokens))
    running = shape.n_layers - min(TRAINED_BLOCKS)
    blocks = running + (running - 1) + len(TRAINED_BLOCKS)
    head = 2 * 2 * shape.head_weights * inputs.answer_tokens * len(inputs.tuning_tokens)
    trained = len(TRAINED_BLOCKS) * shape.block_weights
    return [
        Phase(2 * shape.block_weights * n_tokens * blocks + head),
        Phase(0.0, ADAMW_PASSES * FLOAT * trained),
    ]


def seconds(phases: Iterable[Phase], machine: Machine) -> float:
    """The least time in which the machine can do it."""
    return sum(phase.seconds(machine) for phase in phases)


def measured(tries: int = 5) -> Machine:
    """The machine's best rates now, as torch reaches them."""
    return Machine(_matrix_rate(2048, 2048, 2048, tries), _matrix_rate(1600, 576, 1536, 4 * tries), _stream_rate(tries))


def best(machines: Iterable[Machine]) -> Machine:
    """The best of several measurements, rate by rate."""
    return Machine(*map(max, zip(*machines, strict=True)))


def _matrix_rate(rows: int, inner: int, columns: int, tries: int) -> float:
    """Operations per second of a float32 matrix product."""
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    return 2 * rows * inner * columns / _shortest(lambda: left @ right, tries)


def _stream_rate(tries: int) -> float:
    """Bytes per second read by a dot product of arrays that no cache holds."""
    left, right = torch.ones(2**26), torch.ones(2**26)
    return 2 * 2**26 * FLOAT / _shortest(lambda: torch.dot(left, right), tries)


def _shortest(work: Callable[[], Any], tries: int) -> float:
    times = []
    for _ in range(tries + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
