"""nnsight: interventions written inside `trace` and `generate` blocks, in padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from peers.inputs import MULTIPLIERS, Inputs
from peers.recipe import (
    COSINE_LAYERS,
    in_batches,
    load_huggingface,
    mean_difference,
    reload_weights,
    swept,
    train,
    trained_matrices,
)
from peers.worker import Task, serve


def load(folder: str) -> Any:
    model, tokenizer = load_huggingface(folder)
    return TransformersModel(model, tokenizer=tokenizer, task="text-generation")


@torch.no_grad()
def extract(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    activations = []
    for texts in in_batches([*inputs.positive, *inputs.negative]):
        with model.trace(list(texts)):
            last = save([])
            for layer in inputs.layers:
                last.append(model.model.layers[layer].output[:, -1])
        activations.append(torch.stack(list(last)))
    return mean_difference(activations, len(inputs.positive))


@torch.no_grad()
def generate(model: Any, inputs: Inputs, n_prompts: int | None = None) -> dict[str, Tensor]:
    vector, layer = inputs.load_vectors()[inputs.steer_layer], inputs.steer_layer
    with model.generate(inputs.prompts[:n_prompts], max_new_tokens=inputs.new_tokens, do_sample=False) as tracer:
        for _ in tracer.iter[: inputs.new_tokens]:
            model.model.layers[layer].output = model.model.layers[layer].output + vector
        tokens = tracer.result.save()
    return {"tokens": tokens[:, -inputs.new_tokens :]}


def tune(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """The trace gives logits and activations with their graph; loss and optimiser are plain torch."""
    layers = model._module.model.layers

    def forward(tokens: Tensor, predicts: slice) -> tuple[Tensor, list[Tensor]]:
        with model.trace(tokens):
            activations = save([])
            for layer in COSINE_LAYERS:
                activations.append(model.model.layers[layer].output)
            logits = model.output.logits[:, predicts].save()
        return logits, list(activations)

    return train(forward, trained_matrices(layers), model._module.zero_grad, inputs)


@torch.no_grad()
def sweep(model: Any, inputs: Inputs, multipliers: Sequence[float]) -> dict[str, Tensor]:
    def next_logits(texts: Sequence[str], layer: int, vector: Tensor) -> Tensor:
        with model.trace(list(texts)):
            model.model.layers[layer].output = model.model.layers[layer].output + vector
            logits = model.output.logits[:, -1].save()
        return logits

    return swept(next_logits, inputs, multipliers)


TASKS = {
    "extract": Task(extract),
    "generate_one": Task(partial(generate, n_prompts=1)),
    "generate_batch": Task(generate),
    "tune": Task(tune, after=lambda model, inputs: reload_weights(model._module, inputs.model)),
    **{name: Task(partial(sweep, multipliers=multipliers)) for name, multipliers in MULTIPLIERS.items()},
}

if __name__ == "__main__":
    serve("nnsight", load, TASKS)
