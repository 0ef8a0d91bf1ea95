"""rt_lens as its README uses it; what a task does not need is not imported for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rt_lens as rtl
from peers.inputs import MULTIPLIERS, Inputs
from peers.recipe import (
    COSINE_LAYERS,
    COSINE_WEIGHT,
    LEARNING_RATE,
    MAX_NORM,
    TRAINED_BLOCKS,
    WARMUP,
    WEIGHT_DECAY,
)
from peers.worker import Task, serve
from rt_lens import data, evaluation, models, tuning


def extract(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """From the pairs, so that applying the chat template is part of the time."""
    pairs = rtl.ContrastPairs("mood", tuple(data.Pair(**pair) for pair in inputs.pairs))
    vectors = rtl.extract_vectors(model, pairs, layers=inputs.layers)
    return {"vectors": torch.stack([vectors[name] for name in vectors.hook_names])}


def generate(model: Any, inputs: Inputs, n_prompts: int | None = None) -> dict[str, Tensor]:
    encoded = model.tokenizer(inputs.prompts[:n_prompts], add_special_tokens=False)["input_ids"]
    vectors = rtl.SteeringVectors.load(inputs.vectors)
    with model.hooks(fwd_hooks=rtl.add(vectors, layers=[inputs.steer_layer], multiplier=1.0)):
        return {"tokens": torch.tensor(models.generate_tokens(model, encoded, inputs.new_tokens))}


def tuning_config(inputs: Inputs) -> rtl.TuneConfig:
    """The settings of `recipe.train`. There is no early stopping: one validation, of one row, follows the last step."""
    return rtl.TuneConfig(
        direction="toward", layers=COSINE_LAYERS, centred=False, trained_layers=TRAINED_BLOCKS, kl_weight=0.0,
        cosine_weight=COSINE_WEIGHT, learning_rate=LEARNING_RATE, warmup=WARMUP, weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_NORM, epochs=inputs.tuning_steps, max_steps=inputs.tuning_steps,
        batch_size=len(inputs.tuning_tokens), validate_every=10**6,
    )  # fmt: skip


def prepare(model: Any, inputs: Inputs) -> tuning.TuningData:
    """Tokens of the targets, and the residual before the first trained block."""
    targets = [
        tuning.Target(prompt, answer, ended=False)
        for prompt, answer in zip(inputs.tuning_prompts, inputs.tuning_answers, strict=True)
    ]
    vectors = rtl.SteeringVectors.load(inputs.vectors)
    return tuning.prepare_data(model, vectors, targets, tuning_config(inputs), validation=targets[:1])


def tune(model: Any, inputs: Inputs, prepared: tuning.TuningData) -> dict[str, Tensor]:
    vectors = rtl.SteeringVectors.load(inputs.vectors)
    delta = rtl.tune(model, vectors, prepared, tuning_config(inputs), progress=False)
    return {"losses": torch.tensor([row["total"] for row in delta.history if row["split"] == "train"])}


def sweep(model: Any, inputs: Inputs, multipliers: Sequence[float]) -> dict[str, Tensor]:
    measure = evaluation.LogitDifference(inputs.sweep_prompts, *inputs.sweep_words)
    vectors = rtl.SteeringVectors.load(inputs.vectors)
    result = rtl.sweep(model, vectors, measure, layers=inputs.sweep_layers, multipliers=multipliers, progress=False)
    return {"differences": torch.tensor(result.table["score"].to_numpy(), dtype=torch.float32)}


TASKS = {
    "extract": Task(extract),
    "generate_one": Task(partial(generate, n_prompts=1)),
    "generate_batch": Task(generate),
    "tune": Task(tune, before=prepare),
    **{name: Task(partial(sweep, multipliers=multipliers)) for name, multipliers in MULTIPLIERS.items()},
}

if __name__ == "__main__":
    serve("rt_lens", rtl.load_model, TASKS)
