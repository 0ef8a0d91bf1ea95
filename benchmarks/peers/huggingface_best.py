"""Hugging Face used as well as is known: it computes only what is read. Still one call of the model per condition."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from peers.huggingface import read, steered
from peers.inputs import MULTIPLIERS, Inputs
from peers.recipe import (
    COSINE_LAYERS,
    Loaded,
    encode,
    in_batches,
    load_huggingface,
    mean_difference,
    reload_weights,
    train,
    trained_matrices,
)
from peers.worker import Task, serve


def by_length(tokenizer: object, texts: Sequence[str]) -> list[int]:
    """Indices of the texts, shortest first, so that batches have little padding."""
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    return sorted(range(len(texts)), key=lambda number: len(ids[number]))


def in_first_order(values: Tensor, order: Sequence[int]) -> Tensor:
    """Undoes a sorting, along the last axis."""
    return values[..., torch.tensor(order).argsort()]


@torch.no_grad()
def extract(loaded: Loaded, inputs: Inputs) -> dict[str, Tensor]:
    """The base model, so no logits."""
    model, tokenizer = loaded
    texts = [*inputs.positive, *inputs.negative]
    order = by_length(tokenizer, texts)
    activations = []
    for batch in in_batches([texts[number] for number in order]):
        with read(model.model.layers, inputs.layers) as outputs:
            model.model(**encode(tokenizer, batch), use_cache=False)
        activations.append(torch.stack([output[:, -1] for output in outputs]))
    unsorted = torch.cat(activations, dim=1)[:, torch.tensor(order).argsort()]
    return mean_difference([unsorted], len(inputs.positive))


@torch.no_grad()
def generate(loaded: Loaded, inputs: Inputs, n_prompts: int | None = None) -> dict[str, Tensor]:
    """A greedy loop without the overhead of `generate`; logits of the last position only."""
    model, tokenizer = loaded
    batch = encode(tokenizer, inputs.prompts[:n_prompts])
    tokens, mask, cache, columns = batch["input_ids"], batch["attention_mask"], None, []
    vector = inputs.load_vectors()[inputs.steer_layer]
    with steered(model.model.layers, inputs.steer_layer, vector):
        for _ in range(inputs.new_tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            output = model(
                tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            cache, tokens = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            columns.append(tokens)
    return {"tokens": torch.cat(columns, dim=1)}


def tune(loaded: Loaded, inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of the trained matrices only, logits of the answer only, AdamW in one kernel."""
    model = loaded.model
    matrices = trained_matrices(model.model.layers)
    model.requires_grad_(False)
    for matrix in matrices:
        matrix.requires_grad_(True)

    def forward(tokens: Tensor, predicts: slice) -> tuple[Tensor, list[Tensor]]:
        positions = torch.arange(tokens.shape[1])[predicts]
        with read(model.model.layers, COSINE_LAYERS) as activations:
            return model(tokens, use_cache=False, logits_to_keep=positions).logits, activations

    return train(forward, matrices, model.zero_grad, inputs, fused=True)


@torch.no_grad()
def sweep(loaded: Loaded, inputs: Inputs, multipliers: Sequence[float]) -> dict[str, Tensor]:
    """Tokenized once and sorted by length; logits of the last position only."""
    model, tokenizer = loaded
    vectors, (first, second) = inputs.load_vectors(), inputs.sweep_tokens
    order = by_length(tokenizer, inputs.sweep_prompts)
    batches = [encode(tokenizer, texts) for texts in in_batches([inputs.sweep_prompts[number] for number in order])]
    differences = []
    for layer in inputs.sweep_layers:
        for multiplier in multipliers:
            with steered(model.model.layers, layer, multiplier * vectors[layer]):
                logits = [model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1] for batch in batches]
            differences.append(torch.cat([rows[:, first] - rows[:, second] for rows in logits]))
    return {"differences": in_first_order(torch.stack(differences), order).flatten()}


TASKS = {
    "extract": Task(extract),
    "generate_one": Task(partial(generate, n_prompts=1)),
    "generate_batch": Task(generate),
    "tune": Task(tune, after=lambda loaded, inputs: reload_weights(loaded.model, inputs.model)),
    **{name: Task(partial(sweep, multipliers=multipliers)) for name, multipliers in MULTIPLIERS.items()},
}

if __name__ == "__main__":
    serve("transformers", load_huggingface, TASKS)
