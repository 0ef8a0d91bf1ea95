"""repeng: its reading of hidden states, and `ControlModel` for steering. It has no tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from repeng import ControlModel, ControlVector
from repeng.extract import batched_get_hiddens
from torch import Tensor

from peers.inputs import MULTIPLIERS, Inputs
from peers.recipe import BATCH, Loaded, continuations, encode, load_huggingface, swept
from peers.worker import Task, serve


def extract(loaded: Loaded, inputs: Inputs) -> dict[str, Tensor]:
    """Its own vectors are PCA directions; this is the mean difference of the activations that it reads for them."""
    model, tokenizer = loaded
    texts = [*inputs.positive, *inputs.negative]
    hiddens = batched_get_hiddens(model, tokenizer, texts, inputs.layers, BATCH)
    n = len(inputs.positive)
    vectors = [hiddens[layer][:n].mean(0) - hiddens[layer][n:].mean(0) for layer in inputs.layers]
    return {"vectors": torch.from_numpy(np.stack(vectors))}


@contextmanager
def controlled(model: Any, layer: int, vector: Tensor) -> Iterator[ControlModel]:
    """The model under a control vector at one layer."""
    control = ControlModel(model, [layer])
    try:
        control.set_control(ControlVector(model.config.model_type, {layer: vector.numpy()}))
        yield control
    finally:
        control.unwrap()


def generate(loaded: Loaded, inputs: Inputs, n_prompts: int | None = None) -> dict[str, Tensor]:
    model, tokenizer = loaded
    with controlled(model, inputs.steer_layer, inputs.load_vectors()[inputs.steer_layer]) as control:
        return {"tokens": continuations(control.generate, tokenizer, inputs.prompts[:n_prompts], inputs.new_tokens)}


@torch.no_grad()
def sweep(loaded: Loaded, inputs: Inputs, multipliers: Sequence[float]) -> dict[str, Tensor]:
    model, tokenizer = loaded

    def next_logits(texts: Sequence[str], layer: int, vector: Tensor) -> Tensor:
        batch = encode(tokenizer, texts)
        # Its mask of padding reads the positions, one row for each text.
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with controlled(model, layer, vector) as control:
            return control(**batch, position_ids=positions).logits[:, -1]

    return swept(next_logits, inputs, multipliers)


TASKS = {
    "extract": Task(extract),
    "generate_one": Task(partial(generate, n_prompts=1)),
    "generate_batch": Task(generate),
    **{name: Task(partial(sweep, multipliers=multipliers)) for name, multipliers in MULTIPLIERS.items()},
}

if __name__ == "__main__":
    serve("repeng", load_huggingface, TASKS)
