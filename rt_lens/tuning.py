"""Representation tuning: a steering vector trained into the weights. `tune` gives a WeightDelta and leaves the model as
it was, whatever happens; how well it works is measured elsewhere."""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from rt_lens.forward import quick, unembed
from rt_lens.losses import Direction, cosine_loss, kl_divergence, token_loss
from rt_lens.prompts import ContrastPairs
from rt_lens.steering import generate
from rt_lens.tokens import chat_text, encode, pad, pad_id_of
from rt_lens.vectors import SteeringVectors, read_safetensors, write_atomically

_log = logging.getLogger(__name__)
_SCHEMA = 1


@dataclass(frozen=True)
class TuneConfig:
    """How to tune; see Ackerman 2024 for the dual loss.

    Attributes:
        direction: `toward` the vector, `away` from it, or `out` (no component left, either way).
        layers: blocks whose activations the cosine loss reads.
        trained_layers: blocks whose attention and MLP matrices may change; by default from three below the first of
            `layers` up to the last of them.
        hook: kind of hook point of the cosine loss.
        cosine_weight: of the cosine loss; 0 leaves it out.
        token_weight: of the cross-entropy on the targets; 0 leaves it out.
        kl_weight: of KL(untuned || tuned) on neutral prompts; 0 leaves it out.
        centred: subtract the untuned model's mean activation before the cosine.
        learning_rate: peak of AdamW's, after a linear warm-up and before a linear decay to zero.
        weight_decay: of AdamW.
        epochs: passes over the targets.
        max_steps: stop after so many steps, whatever the epochs.
        batch_size: targets per step.
        neutral_batch_size: neutral prompts per step, for the KL term.
        n_targets: how many targets to have the model write.
        target_tokens: length of a target.
        validation_share: share of topics held out for early stopping, where no validation pairs are given.
        validate_every: steps between validations.
        patience: validations without improvement before stopping.
        max_grad_norm: gradient clipping.
        seed: of target selection and batch order.
    """

    direction: Direction = "away"
    layers: Sequence[int] = (20, 21, 22, 23, 24)
    trained_layers: Sequence[int] | None = None
    hook: str = "resid_post"
    cosine_weight: float = 8.0
    token_weight: float = 1.0
    kl_weight: float = 1.0
    centred: bool = True
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    epochs: int = 1
    max_steps: int = 16
    batch_size: int = 4
    neutral_batch_size: int = 3
    n_targets: int = 64
    target_tokens: int = 32
    validation_share: float = 0.2
    validate_every: int = 8
    patience: int = 3
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.trained_layers is not None:
            object.__setattr__(self, "trained_layers", tuple(self.trained_layers))
        if self.direction not in ("toward", "away", "out"):
            raise ValueError(f"direction: {self.direction!r} came; 'toward', 'away' or 'out' is wanted.")
        if self.cosine_weight == 0 and self.token_weight == 0:
            raise ValueError("cosine_weight, token_weight: both are 0, so there is nothing to tune. Raise one.")
        if self.direction == "out" and self.token_weight > 0:
            raise ValueError("token_weight: direction 'out' has no target texts. Set token_weight=0.")
        for name in ("cosine_weight", "token_weight", "kl_weight", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} came; 0 or more is wanted.")
        counts = ("epochs", "max_steps", "batch_size", "neutral_batch_size", "n_targets", "target_tokens",
                  "validate_every", "patience")  # fmt: skip
        for name in (*counts, "learning_rate", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} came; more than 0 is wanted.")

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that are trained."""
        if self.trained_layers is not None:
            return tuple(self.trained_layers)
        return tuple(range(max(0, min(self.layers) - 3), max(self.layers) + 1))


@dataclass(frozen=True)
class Target:
    """A prompt and the answer that the model is to learn, as texts."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class WeightDelta:
    """What tuning changed: the difference to add to each changed parameter.

    Attributes:
        changes: parameter name -> difference, of the parameter's shape.
        model: name of the model it belongs to.
        config: the TuneConfig as a dictionary.
        history: rows of step, split, total, token, cosine, kl.

    Example:
        >>> with delta.applied(model):
        ...     print(generate(model, ["Tell me about your weekend."]))
    """

    changes: dict[str, Tensor] = field(repr=False)
    model: str
    config: dict[str, Any]
    history: list[dict[str, Any]] = field(repr=False)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[Any]:
        """The tuned model, for as long as the block lasts; afterwards the weights are bit for bit what they were.

        Raises:
            ValueError: if the model lacks a parameter, or it has another shape.
        """
        parameters = dict(model.named_parameters())
        for name, change in self.changes.items():
            if name not in parameters or parameters[name].shape != change.shape:
                has = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise ValueError(f"delta: {name} is {tuple(change.shape)} ({self.model}), this model has {has}.")
        before = {name: parameters[name].data for name in self.changes}
        try:
            for name, change in self.changes.items():
                parameters[name].data = before[name] + change.to(before[name])
            yield model
        finally:
            for name, kept in before.items():
                parameters[name].data = kept

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file with the configuration and history, in one rename."""
        content = {"schema": _SCHEMA, "kind": "weight_delta", "model": self.model, "config": self.config}
        header = {"rt_lens": json.dumps({**content, "history": self.history})}
        tensors = {name: change.detach().cpu().contiguous() for name, change in self.changes.items()}
        return write_atomically(Path(path), save(tensors, metadata=header))

    @classmethod
    def load(cls, path: str | Path) -> WeightDelta:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is truncated, or no file of a weight delta.
        """
        changes, header = read_safetensors(Path(path), "delta")
        stored = json.loads(header.get("rt_lens", "{}"))
        if stored.get("kind") != "weight_delta" or stored.get("schema") != _SCHEMA:
            raise ValueError(f"delta: {path} is not a file of a weight delta of schema {_SCHEMA}.")
        return cls(changes, stored["model"], stored["config"], stored["history"])


def write_targets(
    model: Any, pairs: ContrastPairs, direction: Direction, config: TuneConfig, *, progress: bool = False
) -> list[Target]:
    """Targets in the model's own words: answers it writes under a persona, to be learnt without the persona.

    Args:
        model: the untuned model.
        pairs: personas and topics.
        direction: `toward` takes the positive personas, `away` the negative; `out` takes none, and the answers serve
            only as places to read activations.
        config: number, length and seed of the targets.
        progress: show a bar.
    """
    chosen = pairs.sample(config.n_targets, seed=config.seed).pairs
    persona = {"toward": lambda p: p.positive, "away": lambda p: p.negative, "out": lambda p: ""}[direction]
    asked = [chat_text(model, pair.user, system=persona(pair)) for pair in chosen]
    answers = generate(model, asked, max_new_tokens=config.target_tokens, progress=progress)
    plain = [chat_text(model, pair.user) for pair in chosen]
    return [Target(prompt, answer) for prompt, answer in zip(plain, answers, strict=True) if answer.strip()]


def write_neutral(model: Any, prompts: Sequence[str], config: TuneConfig) -> list[Target]:
    """The untuned model's answers to neutral prompts: where the KL term holds the tuned model to it."""
    answers = generate(model, prompts, max_new_tokens=config.target_tokens)
    asked = [chat_text(model, prompt) for prompt in prompts]
    return [Target(prompt, answer) for prompt, answer in zip(asked, answers, strict=True) if answer.strip()]


def tune(
    model: Any,
    vectors: SteeringVectors,
    train: ContrastPairs | Sequence[Target],
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
        train: pairs, for which the model writes its own targets, or targets.
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
    trained = _trained_parameters(model, config.blocks)
    if config.kl_weight > 0 and not neutral:
        raise ValueError("neutral: the KL term needs neutral prompts. Give some, or set kl_weight=0.")
    targets, held_out = _targets(model, train, validation, config, progress)
    anchors = _anchors(model, neutral, config)
    with _trainable(model, trained):
        loop = _Loop(model, directions, config, trained, targets, held_out, anchors)
        history, best = loop.run(progress)
        changes = {name: best[name] - loop.original[name] for name in trained}
    return WeightDelta(changes, _name(model), {**asdict(config), "layers": list(config.layers)}, history)


def _name(model: Any) -> str:
    return getattr(model.cfg, "rt_lens_name", None) or model.cfg.model_name


def _targets(
    model: Any, train: Any, validation: Any, config: TuneConfig, progress: bool
) -> tuple[list[Target], list[Target]]:
    if isinstance(train, ContrastPairs):
        if validation is None:
            train, validation = train.split(1 - config.validation_share, seed=config.seed)
        train = write_targets(model, train, config.direction, config, progress=progress)
    elif validation is None:
        cut = max(1, round(len(train) * (1 - config.validation_share)))
        train, validation = list(train)[:cut], list(train)[cut:]
    if isinstance(validation, ContrastPairs):
        few = replace(config, n_targets=max(4, round(config.n_targets * config.validation_share)))
        validation = write_targets(model, validation, config.direction, few)
    if not train or not validation:
        raise ValueError(f"train: {len(train)} targets and {len(validation)} for validation came; both need some.")
    return list(train), list(validation)


def _anchors(model: Any, neutral: Sequence[str] | Sequence[Target], config: TuneConfig) -> list[Target]:
    """Neutral targets for the KL term: those given, or the untuned model's answers to the prompts given."""
    if config.kl_weight == 0:
        return []
    prompts = [entry for entry in neutral if isinstance(entry, str)]
    given = [entry for entry in neutral if isinstance(entry, Target)]
    return given + (write_neutral(model, prompts, config) if prompts else [])


def _trained_parameters(model: Any, blocks: Sequence[int]) -> dict[str, nn.Parameter]:
    """Attention and MLP matrices of the blocks, by name."""
    n = model.cfg.n_layers
    for layer in blocks:
        if not 0 <= layer < n:
            raise ValueError(f"layers: {layer} is outside this model's blocks 0..{n - 1}. Use layers={[n // 2]}, say.")
    # A HookedTransformer's biases have a head axis, so "a matrix" cannot be told by the number of axes alone.
    wanted = re.compile(r"(?:^|\.)blocks\.(\d+)\..*(?:attn|mlp)(?:.*\.weight|\._?W_\w+)$")
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


@dataclass(frozen=True)
class _Rows:
    """Token rows of some targets, with what the untuned model computed for them.

    Attributes:
        tokens: Int[Tensor, "row pos"], padded on the right, so that a causal model needs no mask.
        reads: Bool[Tensor, "row pos"], positions whose next token belongs to the answer.
        prefix: residual before the first trained block, or None where the model cannot start there.
        reference: final residual of the untuned model at the positions read; only for the KL term.
    """

    tokens: Int[Tensor, "row pos"]
    reads: Bool[Tensor, "row pos"]
    prefix: Float[Tensor, "row pos d_model"] | None
    reference: Float[Tensor, "row pos d_vocab"] | None = None


class _Loop:
    """One tuning run: what stays constant is computed at the start, `run` is the loop."""

    def __init__(
        self, model: Any, directions: dict[str, Tensor], config: TuneConfig, trained: dict[str, nn.Parameter],
        targets: Sequence[Target], held_out: Sequence[Target], neutral: Sequence[Target],
    ) -> None:  # fmt: skip
        self.model, self.config, self.trained = model, config, trained
        self.original = {name: parameter.detach().clone() for name, parameter in trained.items()}
        self.directions = {name: vector.to(model.cfg.device) for name, vector in directions.items()}
        self.first = min(config.blocks) if isinstance(model, HookedTransformer) else 0
        self.targets, self.held_out = list(targets), list(held_out)
        self.neutral = list(neutral)
        self.centres = self._mean_activations() if config.centred and config.cosine_weight else {}

    @torch.no_grad()
    def _mean_activations(self) -> dict[str, Tensor]:
        """The untuned model's mean activation at the positions read, over the training targets."""
        total, count = {name: torch.zeros_like(vector) for name, vector in self.directions.items()}, 0
        for rows in self._batches(self.targets, self.config.batch_size * 2):
            found, _ = self._run(rows, logits=False)
            count += int(rows.reads.sum())
            for name, h in found.items():
                total[name] += h.sum(0)
        return {name: summed / count for name, summed in total.items()}

    def _batches(self, targets: Sequence[Target], size: int) -> list[_Rows]:
        return [self._rows(targets[start : start + size]) for start in range(0, len(targets), size)]

    @torch.no_grad()
    def _rows(self, targets: Sequence[Target]) -> _Rows:
        prompts = [encode(self.model, target.prompt) for target in targets]
        whole = [ids + encode_answer(self.model, target.answer) for ids, target in zip(prompts, targets, strict=True)]
        batch = pad(whole, pad_id_of(self.model), side="right").to(self.model.cfg.device)
        reads = torch.zeros_like(batch.tokens, dtype=torch.bool)
        for row, (ids, all_ids) in enumerate(zip(prompts, whole, strict=True)):
            reads[row, len(ids) - 1 : len(all_ids) - 1] = True
        prefix = None
        if self.first > 0:
            with quick(self.model):
                prefix = self.model(
                    batch.tokens, attention_mask=torch.ones_like(batch.tokens), stop_at_layer=self.first
                )
        return _Rows(batch.tokens, reads, prefix)

    def _run(self, rows: _Rows, *, logits: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """Activations at the cosine hook points, and logits, both at the positions read."""
        found: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            found[hook_alias(hook.name, self.directions)] = activation[rows.reads]

        hooks = [(name, keep) for name in self.directions] if self.config.cosine_weight else []
        with quick(self.model), self.model.hooks(fwd_hooks=hooks):
            output = self._forward(rows, logits)
        return found, output

    def _forward(self, rows: _Rows, logits: bool) -> Tensor | None:
        everything = torch.ones_like(rows.tokens)
        if not isinstance(self.model, HookedTransformer):
            output = self.model(rows.tokens, attention_mask=everything)
            return output[rows.reads] if logits else None
        start, given = (self.first, rows.prefix) if rows.prefix is not None else (None, rows.tokens)
        stop = self.model.cfg.n_layers if logits else 1 + max(int(name.split(".")[1]) for name in self.directions)
        residual = self.model(given, start_at_layer=start, stop_at_layer=stop, attention_mask=everything)
        return unembed(self.model, residual[rows.reads]) if logits else None

    def losses(self, rows: _Rows, neutral: _Rows | None) -> dict[str, Tensor]:
        """The terms of the loss that have weight, and their weighted sum `total`."""
        config = self.config
        found, logits = self._run(rows, logits=config.token_weight > 0)
        terms: dict[str, Tensor] = {}
        if config.cosine_weight:
            each = [
                cosine_loss(found[name], vector, config.direction, self.centres.get(name))
                for name, vector in self.directions.items()
            ]
            terms["cosine"] = torch.stack(each).mean()
        if logits is not None:
            terms["token"] = token_loss(logits, rows.tokens[:, 1:][rows.reads[:, :-1]])
        if neutral is not None:
            _, ours = self._run(neutral, logits=True)
            assert ours is not None
            assert neutral.reference is not None
            terms["kl"] = kl_divergence(ours, neutral.reference).mean()
        weights = {"cosine": config.cosine_weight, "token": config.token_weight, "kl": config.kl_weight}
        terms["total"] = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return terms

    def run(self, progress: bool) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """The loop: history rows, and the trained parameters at the lowest validation loss."""
        config = self.config
        order = random.Random(config.seed)
        held_out = self._batches(self.held_out, config.batch_size * 2)
        neutral = [self._with_reference(rows) for rows in self._batches(self.neutral, config.neutral_batch_size)]
        steps = min(config.max_steps, config.epochs * math.ceil(len(self.targets) / config.batch_size))
        optimiser = torch.optim.AdamW(
            self.trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
        history: list[dict[str, Any]] = []
        best, best_loss, worse = self.original, math.inf, 0
        with tqdm(total=steps, desc=f"tuning {config.direction}", unit="step", disable=not progress) as bar:
            for step, chosen in enumerate(self._stream(order, steps), start=1):
                anchor = order.choice(neutral) if neutral else None
                terms = self.losses(self._rows(chosen), anchor)
                self._step(optimiser, schedule, terms, step)
                history.append(_row(step, "train", terms))
                if step % config.validate_every == 0 or step == steps:
                    terms = self._validate(held_out, neutral)
                    history.append(_row(step, "validation", terms))
                    improved = float(terms["total"]) < best_loss
                    worse = 0 if improved else worse + 1
                    if improved:
                        best_loss = float(terms["total"])
                        best = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
                    if worse >= config.patience:
                        break
                bar.update()
                bar.set_postfix({name: f"{float(term):.3f}" for name, term in terms.items()})
        return history, best

    def _stream(self, order: random.Random, steps: int) -> Iterator[list[Target]]:
        size, given = self.config.batch_size, 0
        while given < steps:
            shuffled = order.sample(self.targets, len(self.targets))
            for start in range(0, len(shuffled), size):
                if given == steps:
                    return
                given += 1
                yield shuffled[start : start + size]

    @torch.no_grad()
    def _with_reference(self, rows: _Rows) -> _Rows:
        _, reference = self._run(rows, logits=True)
        return replace(rows, reference=reference)

    def _step(self, optimiser: Any, schedule: Any, terms: dict[str, Tensor], step: int) -> None:
        if not torch.isfinite(terms["total"]):
            raise FloatingPointError(f"tune: the loss is not finite at step {step}. Lower learning_rate.")
        optimiser.zero_grad()
        terms["total"].backward()
        nn.utils.clip_grad_norm_(self.trained.values(), self.config.max_grad_norm)
        optimiser.step()
        schedule.step()

    @torch.no_grad()
    def _validate(self, held_out: Sequence[_Rows], neutral: Sequence[_Rows]) -> dict[str, Tensor]:
        """Mean losses over the validation targets, and the KL over the first neutral batches."""
        found = [self.losses(rows, neutral[i % len(neutral)] if neutral else None) for i, rows in enumerate(held_out)]
        return {name: torch.stack([terms[name] for terms in found]).mean() for name in found[0]}


def encode_answer(model: Any, answer: str) -> list[int]:
    """Token ids of an answer, which gets no start token."""
    return model.tokenizer.encode(answer, add_special_tokens=False)


def hook_alias(name: str | None, wanted: Collection[str]) -> str:
    """The asked-for name of a hook point: a bridge calls hooks by its canonical name, with the same block number."""
    if name is not None and name in wanted:
        return name
    block = f"blocks.{str(name).split('.')[1]}."
    return next(alias for alias in wanted if alias.startswith(block))


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then linear decay."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else max(0.0, (steps - step) / max(1, steps - warm))


def _row(step: int, split: str, terms: dict[str, Tensor]) -> dict[str, Any]:
    parts = {name: float(terms[name]) if name in terms else None for name in ("total", "token", "cosine", "kl")}
    return {"step": step, "split": split, **parts}
