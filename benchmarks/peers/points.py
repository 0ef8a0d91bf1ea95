"""The curves of growth.py: what grows, at which points, and the inputs of each point. Measures nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import rt_lens as rtl
from peers.bounds import Shape
from peers.inputs import Inputs
from peers.write_inputs import lasting
from rt_lens.data import Pair, neutral_paragraphs
from rt_lens.models import chat_text

N_LAYERS, STEER_LAYER = 30, 18
DECODED = 16
SHAPES = {  # millions of weights -> layers, width, width of the MLP, heads, heads of keys and values
    10: (18, 128, 384, 2, 2),
    30: (12, 320, 864, 5, 5),
    100: (20, 576, 1536, 9, 3),
    300: (26, 960, 2560, 15, 5),
    1000: (23, 1920, 5120, 30, 10),
}


@dataclass(frozen=True)
class Material:
    """What the points are made of: rt_lens's model, its vectors' file, and a folder to write to."""

    model: Any
    inputs: Inputs
    folder: Path

    @cached_property
    def chats(self) -> list[str]:
        """64 prompts whose steered responses are DECODED tokens long."""
        topics = rtl.load_pairs("mood").topics
        vectors = rtl.SteeringVectors.load(self.inputs.vectors)
        return lasting(self.model, [str(chat_text(self.model, topic)) for topic in topics], vectors, 64, DECODED)

    def with_pairs(self, pairs: rtl.ContrastPairs) -> Inputs:
        """The inputs with other pairs."""
        texts = pairs.texts(self.model)
        return replace(
            self.inputs,
            pairs=[asdict(pair) for pair in pairs.pairs],
            positive=list(texts.positive),
            negative=list(texts.negative),
        )


def n_pairs(material: Material, n: int) -> Inputs:
    return material.with_pairs(rtl.load_pairs("mood").sample(n))


def tokens_per_text(material: Material, n: int) -> Inputs:
    """Eight pairs whose sides are as long as possible below n tokens."""
    pairs = rtl.load_pairs("mood").sample(8).pairs
    return material.with_pairs(rtl.ContrastPairs("mood", tuple(_lengthened(material.model, pair, n) for pair in pairs)))


def _lengthened(model: Any, pair: Pair, n: int) -> Pair:
    """The pair with its user message repeated and cut so that no side has more than n tokens."""
    shortest = Pair(pair.positive, pair.negative, pair.user)
    more = f"{pair.user} {' '.join(neutral_paragraphs())}".split()
    low, high = 1, len(more)
    while low < high:
        middle = (low + high + 1) // 2
        longer = replace(shortest, user=" ".join(more[:middle]))
        low, high = (middle, high) if _length(model, longer) <= n else (low, middle - 1)
    return replace(shortest, user=" ".join(more[:low]))


def _length(model: Any, pair: Pair) -> int:
    texts = [chat_text(model, user, system=persona, prefill=prefill) for persona, user, prefill in pair.sides]
    return max(len(ids) for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"])


def layers_read(material: Material, n: int) -> Inputs:
    return replace(n_pairs(material, 16), layers=list(range(n)))


def rows_decoded(material: Material, n: int) -> Inputs:
    return replace(material.inputs, prompts=material.chats[:n], new_tokens=DECODED)


def model_size(material: Material, millions: int) -> Inputs:
    """Four pairs and one prompt in a random model."""
    folder = material.folder / f"random-{millions}m"
    if not folder.exists():
        write_random_model(folder, millions, Path(material.inputs.model))
    n_layers, width = SHAPES[millions][:2]
    generator = torch.Generator().manual_seed(0)
    vectors = {
        f"blocks.{layer}.hook_resid_post": 0.1 * torch.randn(width, generator=generator) for layer in range(n_layers)
    }
    provenance = replace(rtl.SteeringVectors.load(material.inputs.vectors).provenance, model=folder.name)
    path = rtl.SteeringVectors(vectors, provenance).save(folder / "vectors.safetensors")
    return replace(
        n_pairs(material, 4),
        model=str(folder),
        layers=list(range(n_layers)),
        prompts=material.chats[:1],
        new_tokens=DECODED,
        steer_layer=n_layers // 2,
        vectors=str(path),
    )


def write_random_model(folder: Path, millions: int, source: Path) -> None:
    """A Llama-style model with random weights in float32, with the tokenizer of another folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    n_layers, width, mlp, heads, key_value_heads = SHAPES[millions]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=width, intermediate_size=mlp, num_hidden_layers=n_layers,
        num_attention_heads=heads, num_key_value_heads=key_value_heads, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True, pad_token_id=2, bos_token_id=1, eos_token_id=2, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)


@dataclass(frozen=True)
class Curve:
    """Cost against one quantity.

    Attributes:
        title: heading of its table.
        quantity: what grows.
        points: its values, in rising order.
        inputs: function of the material and a value.
        task: the worker's task.
        size: number on the horizontal axis, of the inputs.
    """

    title: str
    quantity: str
    points: tuple[int, ...]
    inputs: Callable[[Material, int], Inputs]
    task: str
    size: Callable[[Inputs, list[list[int]]], float]

    def made(self, material: Material, n_points: int | None) -> Iterator[Inputs]:
        """The inputs of the first points, one after the other."""
        for value in self.points[:n_points]:
            yield self.inputs(material, value)


def _weights(inputs: Inputs, rows: list[list[int]]) -> float:
    return Shape.read(inputs.model).weights / 1e6


CURVES = {
    "pairs": Curve(
        "Extraction, pairs", "pairs", (32, 64, 128, 256, 512, 1024, 2048), n_pairs, "extract",
        lambda inputs, rows: len(inputs.pairs),
    ),
    "tokens": Curve(
        "Extraction from 16 texts, length", "tokens per text (mean)", (64, 128, 256, 512), tokens_per_text, "extract",
        lambda inputs, rows: sum(map(len, rows)) / len(rows),
    ),
    "layers": Curve(
        "Extraction from 16 pairs, layers", "first blocks read", (1, 5, 10, 20, 30), layers_read, "extract",
        lambda inputs, rows: len(inputs.layers),
    ),
    "rows": Curve(
        f"Steered generation of {DECODED} tokens, rows", "rows", (1, 2, 4, 8, 16, 32, 64), rows_decoded,
        "generate_batch", lambda inputs, rows: len(inputs.prompts),
    ),
    "size_extract": Curve(
        "Extraction from 4 pairs, random models", "million weights", tuple(SHAPES), model_size, "extract", _weights
    ),
    "size_generate": Curve(
        f"Steered generation of {DECODED} tokens in one row, random models", "million weights", tuple(SHAPES),
        model_size, "generate_one", _weights,
    ),
}  # fmt: skip
