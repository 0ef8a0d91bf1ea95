"""The tuning loop. It gives a WeightDelta and leaves the model as it was, whatever happens."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rt_lens.delta import WeightDelta
from rt_lens.forward import check_layers, model_name
from rt_lens.losses import cosine_loss, kl_divergence, token_loss
from rt_lens.prompts import ContrastPairs
from rt_lens.tokens import pad_id_of
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.material import Batch, Material, Row, Target, logits_of, prepare, read
from rt_lens.vectors import SteeringVectors


def tune(
    model: Any,
    vectors: SteeringVectors,
    train: ContrastPairs | Sequence[Target] | Material,
    config: TuneConfig | None = None,
    *,
    validation: ContrastPairs | Sequence[Target] | None = None,
    neutral: Sequence[str] | Sequence[Target] = (),
    progress: bool = True,
) -> WeightDelta:
    """Tunes a direction into, or out of, the weights.

    Each step adds up the weighted cosine loss at the answers' positions, the cross-entropy of the target answers, and
    the KL divergence from the untuned model on neutral prompts; terms of weight 0 are not computed. The weights with
    the lowest validation loss are kept. Blocks below the first trained one are run once and remembered.

    Args:
        model: HookedTransformer or TransformerBridge; left as it was, also on an exception or Ctrl-C.
        vectors: the directions, at the blocks that `config.layers` names.
        train: pairs, for which the model writes its own targets; or targets; or what `prepare` made of them, which
            several runs can share (`validation` and `neutral` are part of it then).
        config: see TuneConfig.
        validation: held-out pairs or targets; by default a share of the training topics.
        neutral: prompts (or targets) for the KL term; needed if its weight is above 0.
        progress: show a bar with the losses.

    Returns:
        The change of each trained parameter.

    Raises:
        ValueError: vectors of another model, layers out of range, nothing to train on.
        FloatingPointError: if a loss is not finite; says at which step.

    Example:
        >>> delta = tune(model, vectors, train, TuneConfig(direction="away"), neutral=["Name three metals."])
    """
    config = config or TuneConfig()
    vectors.check_fits(model)
    directions = vectors.at_layers(config.layers, config.hook)
    for name, direction in directions.items():
        if direction.norm() == 0:
            raise ValueError(f"vectors: {name} is all zeros, which has no direction to tune. Extract it again.")
    trained = _trained_parameters(model, config.blocks)
    if config.kl_weight > 0 and not (train.neutral if isinstance(train, Material) else neutral):
        raise ValueError("neutral: the KL term needs neutral prompts. Give some, or set kl_weight=0.")
    if not isinstance(train, Material):
        train = prepare(model, vectors, train, config, validation=validation, neutral=neutral, progress=progress)
    _check_material(train, directions, config)
    with _trainable(model, trained):
        loop = _Loop(model, directions, config, trained, train)
        history, best = loop.run(progress)
        changes = {name: best[name] - loop.original[name] for name in trained}
    return WeightDelta(changes, model_name(model), {**asdict(config), "layers": list(config.layers)}, history)


def _check_material(material: Material, directions: dict[str, Tensor], config: TuneConfig) -> None:
    if material.first_block not in (0, min(config.blocks)) or not set(directions) <= set(material.centres):
        raise ValueError(
            f"train: this material was prepared for blocks from {material.first_block} and "
            f"{', '.join(material.centres)}. Prepare it with the same layers and trained_layers."
        )


def _trained_parameters(model: Any, blocks: Sequence[int]) -> dict[str, nn.Parameter]:
    """Attention and MLP matrices of the blocks, by name."""
    check_layers(model, blocks)
    # A HookedTransformer's biases have a head axis, so "a matrix" cannot be told by the number of axes alone.
    # A bridge's parameters keep Hugging Face's names, where blocks are `layers` or, in GPT-2, `h`.
    wanted = re.compile(r"(?:^|\.)(?:blocks|layers|h)\.(\d+)\..*(?:attn|mlp)(?:.*\.weight|\._?W_\w+)$")
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (match := wanted.search(name)) and int(match[1]) in blocks
    }
    if not found:
        raise ValueError(f"trained_layers: no attention or MLP matrix found in blocks {list(blocks)} of this model.")
    return found


@contextmanager
def _trainable(model: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """Only `trained` takes gradients, on copies of their own; afterwards memory, values and flags are as before."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    memory = {parameter: parameter.data for parameter in trained.values()}
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in memory)
        for parameter in memory:
            parameter.data = parameter.data.clone()
        yield
    finally:
        for parameter, kept in memory.items():
            parameter.data = kept
            parameter.grad = None
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


class _Loop:
    """One tuning run over prepared material."""

    def __init__(
        self,
        model: Any,
        directions: dict[str, Tensor],
        config: TuneConfig,
        trained: dict[str, nn.Parameter],
        material: Material,
    ) -> None:
        self.model, self.config, self.trained, self.material = model, config, trained, material
        self.original = {name: parameter.detach().clone() for name, parameter in trained.items()}
        used = directions if config.cosine_weight else {}
        self.directions = {name: vector.to(model.cfg.device) for name, vector in used.items()}
        self.centres = material.centres if config.centred else {}
        self.neutral = material.neutral if config.kl_weight else []
        self.pad_id = pad_id_of(model)
        # Weights keep Hugging Face's layout as transposed views; AdamW would copy each of them at every step.
        self.axes = {name: _by_stride(parameter) for name, parameter in trained.items()}
        self.views = {name: nn.Parameter(p.detach().permute(self.axes[name])) for name, p in trained.items()}

    def losses(self, rows: Sequence[Row], neutral: Sequence[Row]) -> dict[str, Tensor]:
        """The terms of the loss that have weight, and their weighted sum `total`."""
        config, terms = self.config, {}
        batch = Batch.of(rows, self.pad_id)
        found, final = self._read(batch, final=config.token_weight > 0)
        if self.directions:
            each = [
                cosine_loss(found[name], vector, config.direction, self.centres.get(name))
                for name, vector in self.directions.items()
            ]
            terms["cosine"] = torch.stack(each).mean()
        if final is not None:
            terms["token"] = token_loss(logits_of(self.model, final), batch.tokens[:, 1:][batch.reads[:, :-1]])
        if neutral:
            terms["kl"] = self._kl(Batch.of(neutral, self.pad_id))
        weights = {"cosine": config.cosine_weight, "token": config.token_weight, "kl": config.kl_weight}
        terms["total"] = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return terms

    def _read(self, batch: Batch, *, final: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        return read(self.model, batch, list(self.directions), self.material.first_block, final=final)

    def _kl(self, batch: Batch) -> Tensor:
        _, final = read(self.model, batch, [], self.material.first_block, final=True)
        assert final is not None
        assert batch.reference is not None
        with torch.no_grad():
            reference = logits_of(self.model, batch.reference).log_softmax(-1)
        return kl_divergence(logits_of(self.model, final).log_softmax(-1), reference).mean()

    def run(self, progress: bool) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """The loop: history rows, and the trained parameters at the lowest validation loss."""
        config = self.config
        order = random.Random(config.seed)
        steps = min(config.max_steps, config.epochs * math.ceil(len(self.material.train) / config.batch_size))
        optimiser = torch.optim.AdamW(
            self.views.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
        history: list[dict[str, Any]] = []
        best, best_loss, worse = self.original, math.inf, 0
        with tqdm(total=steps, desc=f"tuning {config.direction}", unit="step", disable=not progress) as bar:
            for step, rows in enumerate(self._stream(order, steps), start=1):
                neutral = order.sample(self.neutral, min(len(self.neutral), config.neutral_batch_size))
                terms = self.losses(rows, neutral)
                self._step(optimiser, schedule, terms, step)
                history.append(_history_row(step, "train", terms))
                bar.update()
                bar.set_postfix({name: f"{history[-1][name]:.3f}" for name in terms})
                if step % config.validate_every and step != steps:
                    continue
                history.append(_history_row(step, "validation", self._validate()))
                if history[-1]["total"] < best_loss:
                    best_loss, worse = history[-1]["total"], 0
                    best = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
                elif (worse := worse + 1) >= config.patience:
                    break
        return history, best

    def _stream(self, order: random.Random, steps: int) -> Iterator[list[Row]]:
        size, given = self.config.batch_size, 0
        while given < steps:
            shuffled = order.sample(self.material.train, len(self.material.train))
            for start in range(0, len(shuffled), size):
                if given == steps:
                    return
                given += 1
                yield shuffled[start : start + size]

    def _step(self, optimiser: Any, schedule: Any, terms: dict[str, Tensor], step: int) -> None:
        if not torch.isfinite(terms["total"]):
            raise FloatingPointError(f"tune: the loss is not finite at step {step}. Lower learning_rate.")
        for parameter in self.trained.values():
            parameter.grad = None
        terms["total"].backward()
        nn.utils.clip_grad_norm_(self.trained.values(), self.config.max_grad_norm)
        for name, parameter in self.trained.items():
            self.views[name].grad = None if parameter.grad is None else parameter.grad.permute(self.axes[name])
        optimiser.step()
        schedule.step()

    @torch.no_grad()
    def _validate(self) -> dict[str, Tensor]:
        """Mean losses over the held-out rows, with the KL over the same few neutral rows each time."""
        size, held_out = self.config.batch_size * 2, self.material.held_out
        neutral = self.neutral[: self.config.neutral_batch_size]
        found = [self.losses(held_out[start : start + size], neutral) for start in range(0, len(held_out), size)]
        return {name: torch.stack([terms[name] for terms in found]).mean() for name in found[0]}


def _by_stride(tensor: Tensor) -> list[int]:
    """The axes from the widest stride to the narrowest: permuted so, a transposed view is contiguous."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then linear decay."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else max(0.0, (steps - step) / max(1, steps - warm))


def _history_row(step: int, split: str, terms: dict[str, Tensor]) -> dict[str, Any]:
    parts = {
        name: float(terms[name].detach()) if name in terms else None for name in ("total", "token", "cosine", "kl")
    }
    return {"step": step, "split": split, **parts}
