"""Plain Hugging Face: what most people write, with forward hooks on the decoder layers. The reference of all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peers.inputs import MULTIPLIERS, Inputs
from peers.recipe import (
    COSINE_LAYERS,
    Loaded,
    continuations,
    encode,
    in_batches,
    load_huggingface,
    mean_difference,
    reload_weights,
    swept,
    train,
    trained_matrices,
)
from peers.worker import Task, serve


@contextmanager
def read(layers: Any, numbers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collects the outputs of some decoder layers, in order."""
    outputs: list[Tensor] = []
    handles = [
        layers[number].register_forward_hook(lambda module, args, output: outputs.append(output)) for number in numbers
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def steered(layers: Any, number: int, vector: Tensor) -> Iterator[None]:
    """Adds a vector to the output of one decoder layer, at all positions."""
    handle = layers[number].register_forward_hook(lambda module, args, output: output + vector)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def extract(loaded: Loaded, inputs: Inputs) -> dict[str, Tensor]:
    model, tokenizer = loaded
    activations = []
    for texts in in_batches([*inputs.positive, *inputs.negative]):
        with read(model.model.layers, inputs.layers) as outputs:
            model(**encode(tokenizer, texts))
        activations.append(torch.stack([output[:, -1] for output in outputs]))
    return mean_difference(activations, len(inputs.positive))


def generate(loaded: Loaded, inputs: Inputs, n_prompts: int | None = None) -> dict[str, Tensor]:
    model, tokenizer = loaded
    with steered(model.model.layers, inputs.steer_layer, inputs.load_vectors()[inputs.steer_layer]):
        return {"tokens": continuations(model.generate, tokenizer, inputs.prompts[:n_prompts], inputs.new_tokens)}


def tune(loaded: Loaded, inputs: Inputs) -> dict[str, Tensor]:
    model = loaded.model

    def forward(tokens: Tensor, predicts: slice) -> tuple[Tensor, list[Tensor]]:
        with read(model.model.layers, COSINE_LAYERS) as activations:
            return model(tokens).logits[:, predicts], activations

    return train(forward, trained_matrices(model.model.layers), model.zero_grad, inputs)


@torch.no_grad()
def sweep(loaded: Loaded, inputs: Inputs, multipliers: Sequence[float]) -> dict[str, Tensor]:
    model, tokenizer = loaded

    def next_logits(texts: Sequence[str], layer: int, vector: Tensor) -> Tensor:
        with steered(model.model.layers, layer, vector):
            return model(**encode(tokenizer, texts)).logits[:, -1]

    return swept(next_logits, inputs, multipliers)


TASKS = {
    "extract": Task(extract),
    "generate_one": Task(partial(generate, n_prompts=1)),
    "generate_batch": Task(generate),
    "tune": Task(tune, after=lambda loaded, inputs: reload_weights(loaded.model, inputs.model)),
    **{name: Task(partial(sweep, multipliers=multipliers)) for name, multipliers in MULTIPLIERS.items()},
}

if __name__ == "__main__":
    serve("transformers", load_huggingface, TASKS)
