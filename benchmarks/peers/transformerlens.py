"""TransformerLens as documented, on the HookedTransformer of rt_lens: `run_with_cache`, `hooks`, `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import rt_lens as rtl
from peers.inputs import MULTIPLIERS, Inputs
from peers.recipe import COSINE_LAYERS, TRAINED_BLOCKS, encode, in_batches, mean_difference, swept, train
from peers.worker import Task, serve

MATRICES = ("attn.W_Q", "attn._W_K", "attn._W_V", "attn.W_O", "mlp.W_gate", "mlp.W_in", "mlp.W_out")


def name_of(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def batch_of(model: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on the left."""
    batch = encode(model.tokenizer, texts)
    return batch["input_ids"], batch["attention_mask"]


@torch.no_grad()
def extract(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    names, activations = [name_of(layer) for layer in inputs.layers], []
    for texts in in_batches([*inputs.positive, *inputs.negative]):
        tokens, mask = batch_of(model, texts)
        _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=names)
        activations.append(torch.stack([cache[name][:, -1] for name in names]))
    return mean_difference(activations, len(inputs.positive))


def adding(vector: Tensor) -> Callable[..., Tensor]:
    return lambda activation, hook: activation + vector


@torch.no_grad()
def generate(model: Any, inputs: Inputs, n_prompts: int | None = None) -> dict[str, Tensor]:
    vector, layer = inputs.load_vectors()[inputs.steer_layer], inputs.steer_layer
    tokens, _ = batch_of(model, inputs.prompts[:n_prompts])
    with model.hooks(fwd_hooks=[(name_of(layer), adding(vector))]):
        output = model.generate(
            tokens, max_new_tokens=inputs.new_tokens, do_sample=False, stop_at_eos=False, prepend_bos=False,
            padding_side="left", verbose=False,
        )  # fmt: skip
    return {"tokens": output[:, tokens.shape[1] :]}


def trained(model: Any) -> list[nn.Parameter]:
    """The matrices of the trained blocks."""
    return [model.blocks[block].get_parameter(name) for block in TRAINED_BLOCKS for name in MATRICES]


def tune(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    names = [name_of(layer) for layer in COSINE_LAYERS]

    def forward(tokens: Tensor, predicts: slice) -> tuple[Tensor, list[Tensor]]:
        activations: list[Tensor] = []
        keep = [(name, lambda activation, hook: activations.append(activation)) for name in names]
        logits = model.run_with_hooks(tokens, fwd_hooks=keep)
        return logits[:, predicts], activations

    return train(forward, trained(model), model.zero_grad, inputs)


def reload_weights(model: Any, inputs: Inputs) -> None:
    """Copies the first weights back."""
    with torch.no_grad():
        for parameter, first in zip(
            trained(model), trained(rtl.load_model(inputs.model, backend="hooked")), strict=True
        ):
            parameter.copy_(first)
    model.zero_grad()


@torch.no_grad()
def sweep(model: Any, inputs: Inputs, multipliers: Sequence[float]) -> dict[str, Tensor]:
    def next_logits(texts: Sequence[str], layer: int, vector: Tensor) -> Tensor:
        tokens, mask = batch_of(model, texts)
        with model.hooks(fwd_hooks=[(name_of(layer), adding(vector))]):
            return model(tokens, attention_mask=mask)[:, -1]

    return swept(next_logits, inputs, multipliers)


TASKS = {
    "extract": Task(extract),
    "generate_one": Task(partial(generate, n_prompts=1)),
    "generate_batch": Task(generate),
    "tune": Task(tune, after=reload_weights),
    **{name: Task(partial(sweep, multipliers=multipliers)) for name, multipliers in MULTIPLIERS.items()},
}

if __name__ == "__main__":
    serve("transformer-lens", partial(rtl.load_model, backend="hooked"), TASKS)
