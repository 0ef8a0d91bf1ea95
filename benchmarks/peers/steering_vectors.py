"""steering-vectors: `train_steering_vector` with the mean difference, and `apply` for steering. It has no tuning."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from steering_vectors import SteeringVector, train_steering_vector
from torch import Tensor

from peers.inputs import MULTIPLIERS, Inputs
from peers.recipe import BATCH, Loaded, continuations, encode, load_huggingface, swept
from peers.worker import Task, serve


def extract(loaded: Loaded, inputs: Inputs) -> dict[str, Tensor]:
    """A batch of pairs runs each side as one batch of texts."""
    model, tokenizer = loaded
    samples = list(zip(inputs.positive, inputs.negative, strict=True))
    vector = train_steering_vector(model, tokenizer, samples, layers=inputs.layers, batch_size=BATCH)
    return {"vectors": torch.stack([vector.layer_activations[layer] for layer in inputs.layers])}


def generate(loaded: Loaded, inputs: Inputs, n_prompts: int | None = None) -> dict[str, Tensor]:
    model, tokenizer = loaded
    with SteeringVector({inputs.steer_layer: inputs.load_vectors()[inputs.steer_layer]}).apply(model):
        return {"tokens": continuations(model.generate, tokenizer, inputs.prompts[:n_prompts], inputs.new_tokens)}


@torch.no_grad()
def sweep(loaded: Loaded, inputs: Inputs, multipliers: Sequence[float]) -> dict[str, Tensor]:
    model, tokenizer = loaded

    def next_logits(texts: Sequence[str], layer: int, vector: Tensor) -> Tensor:
        with SteeringVector({layer: vector}).apply(model):
            return model(**encode(tokenizer, texts)).logits[:, -1]

    return swept(next_logits, inputs, multipliers)


TASKS = {
    "extract": Task(extract),
    "generate_one": Task(partial(generate, n_prompts=1)),
    "generate_batch": Task(generate),
    **{name: Task(partial(sweep, multipliers=multipliers)) for name, multipliers in MULTIPLIERS.items()},
}

if __name__ == "__main__":
    serve("steering-vectors", load_huggingface, TASKS)
