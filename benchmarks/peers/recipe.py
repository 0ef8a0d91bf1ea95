"""What several workers share: batches of texts, the mean difference, a sweep, and tuning as in Ackerman (2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.inputs import Inputs

BATCH = 16
COSINE_WEIGHT = 14.0
COSINE_LAYERS = tuple(range(20, 25))
TRAINED_BLOCKS = tuple(range(15, 25))
LEARNING_RATE, WARMUP, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.1, 0.1, 1.0


class Loaded(NamedTuple):
    """A model and its tokenizer, which pads on the left."""

    model: Any
    tokenizer: Any


def load_huggingface(folder: str) -> Loaded:
    """The folder as transformers reads it, in float32."""
    from transformers import AutoModelForCausalLM

    return Loaded(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load_tokenizer(folder))


def load_tokenizer(folder: str) -> Any:
    """The folder's tokenizer, padding on the left."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, padding_side="left")


def encode(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Token ids and mask of a padded batch; the texts contain their special tokens."""
    return tokenizer(list(texts), padding=True, return_tensors="pt", add_special_tokens=False)


def in_batches(texts: Sequence[str], size: int = BATCH) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def mean_difference(activations: Sequence[Tensor], n_pairs: int) -> dict[str, Tensor]:
    """Vectors of activations [layer, text, d_model] whose first texts are the positive sides."""
    stacked = torch.cat(list(activations), dim=1)
    return {"vectors": stacked[:, :n_pairs].mean(1) - stacked[:, n_pairs:].mean(1)}


def continuations(generate: Callable[..., Tensor], tokenizer: Any, prompts: Sequence[str], n: int) -> Tensor:
    """The n greedy tokens after each prompt, by a function like Hugging Face's `generate`."""
    batch = encode(tokenizer, prompts)
    return generate(**batch, max_new_tokens=n, do_sample=False)[:, batch["input_ids"].shape[1] :]


def swept(
    next_logits: Callable[[Sequence[str], int, Tensor], Tensor], inputs: Inputs, multipliers: Sequence[float]
) -> dict[str, Tensor]:
    """A sweep as most people write it: one call of the model per layer, multiplier and batch.

    Args:
        next_logits: function of texts, a layer and what is added after it at all positions; returns the logits of the
            next token.
        inputs: their sweep.
        multipliers: of the layer's vector.
    """
    vectors, (first, second) = inputs.load_vectors(), inputs.sweep_tokens
    differences = []
    for layer in inputs.sweep_layers:
        for multiplier in multipliers:
            for texts in in_batches(inputs.sweep_prompts):
                logits = next_logits(texts, layer, multiplier * vectors[layer])
                differences.append(logits[:, first] - logits[:, second])
    return {"differences": torch.cat(differences)}


def trained_matrices(layers: Any) -> list[nn.Parameter]:
    """The matrices of the trained blocks of a Hugging Face model."""
    return [p for block in TRAINED_BLOCKS for p in layers[block].parameters() if p.ndim == 2]


def reload_weights(model: nn.Module, folder: str) -> None:
    """Copies the folder's weights into a Hugging Face model."""
    from safetensors.torch import load_file

    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, tensor in load_file(f"{folder}/model.safetensors").items():
            if name in parameters:
                parameters[name].copy_(tensor)
    model.zero_grad()


def train(
    forward: Callable[[Tensor, slice], tuple[Tensor, Sequence[Tensor]]],
    parameters: Sequence[nn.Parameter],
    forget_gradients: Callable[[], None],
    inputs: Inputs,
    *,
    fused: bool = False,
) -> dict[str, Tensor]:
    """Trains on all rows at every step, and returns the total loss of each step.

    Args:
        forward: function of token ids and of the positions that predict the answer; returns the logits there and the
            activations after COSINE_LAYERS, at all positions.
        parameters: what is trained.
        forget_gradients: begins a step.
        inputs: their tuning rows.
        fused: AdamW in one kernel.
    """
    tokens = torch.tensor(inputs.tuning_tokens)
    end = tokens.shape[1]
    predicts = slice(end - inputs.answer_tokens - 1, end - 1)
    vectors = inputs.load_vectors()
    directions = [vectors[layer] for layer in COSINE_LAYERS]
    optimiser = torch.optim.AdamW(parameters, lr=0.0, weight_decay=WEIGHT_DECAY, fused=fused or None)
    losses = []
    for step in range(inputs.tuning_steps):
        forget_gradients()
        logits, activations = forward(tokens, predicts)
        token = F.cross_entropy(logits.flatten(0, 1), tokens[:, end - inputs.answer_tokens :].flatten())
        total = token + COSINE_WEIGHT * cosine_toward([h[:, predicts] for h in activations], directions)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * rate(step, inputs.tuning_steps)
        optimiser.step()
        losses.append(float(total.detach()))
    return {"losses": torch.tensor(losses)}


def cosine_toward(activations: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """Mean of (1 - cos) / 2 over layers and positions."""
    cosines = [
        F.cosine_similarity(h, direction, dim=-1).mean() for h, direction in zip(activations, directions, strict=True)
    ]
    return (1 - torch.stack(cosines).mean()) / 2


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay, as a fraction of the peak."""
    warm = max(1, round(steps * WARMUP))
    return (step + 1) / warm if step < warm else max(0.0, (steps - step) / max(1, steps - warm))
