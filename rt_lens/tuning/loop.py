"""The tuning loop. It returns a WeightDelta and leaves the model as it was, whatever happens."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rt_lens.common.progress import Bar
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.models.backends import parameters_of
from rt_lens.models.checksums import parameters_sha256
from rt_lens.models.forward import dtype_name, model_name
from rt_lens.models.protocol import Model
from rt_lens.steering.edits import FwdHook
from rt_lens.tuning.checkpoint import Checkpoint, State, named_tensors, run_of
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.direction_targets import (
    DirectionTarget,
    KLThenSteer,
    ResolvedTarget,
    SteerWhileTuning,
    described,
    resolve_targets,
)
from rt_lens.tuning.objective import Objective
from rt_lens.tuning.references import with_references
from rt_lens.tuning.targets import Target, TokenTarget, neutral_list
from rt_lens.tuning.tracking import TrackerLike, check_installed, name_given, tracked, trackers_named
from rt_lens.tuning.tuning_data import Row, TuningData, prepare_data
from rt_lens.tuning.weights import TrainableParam, trainable_params, trained_by
from rt_lens.vectors.steering_vectors import SteeringVectors


class LossNotFinite(FloatingPointError):
    """A loss or gradient that is not finite; the message names the step and the prompts of its batch.

    Attributes:
        delta: the last good weights: those of the lowest validation loss; before any validation the last ones under
            which the losses of a step were finite.

    Example:
        >>> import dataclasses
        >>> hot = dataclasses.replace(config, learning_rate=1e30, max_grad_norm=1e30)
        >>> try:
        ...     tuned = tune(model, vectors, train.sample(4), hot, neutral=neutral, progress=False)
        ... except LossNotFinite as error:
        ...     tuned = error.delta  # the last good weights
        >>> tuned.model == delta.model
        True
    """

    def __init__(self, message: str, delta: WeightDelta) -> None:
        super().__init__(message)
        self.delta = delta


@torch.inference_mode(mode=False)  # gradients are needed, whatever the caller has switched off
@torch.enable_grad()
def tune(
    model: Model,
    vectors: SteeringVectors | Sequence[DirectionTarget],
    train: ContrastPairs | Sequence[TokenTarget] | TuningData,
    config: TuneConfig | None = None,
    *,
    validation: ContrastPairs | Sequence[TokenTarget] | None = None,
    neutral: Iterable[str] | Iterable[Target] = (),
    steer: SteerWhileTuning | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 25,
    report_to: TrackerLike | Sequence[TrackerLike] | None = None,
    progress: bool = True,
) -> WeightDelta:
    """Fine-tunes the model so that its activations align with the directions (or point away from them).

    The loss of each step is the weighted sum of the cosine loss at hook points (Ackerman 2024), the cross-entropy of
    the targets, and the KL divergence from the untuned model on neutral prompts; terms of weight 0 are not computed.
    The result has the weights of the lowest validation loss. Blocks before the first trained one run once, and their
    output is stored.

    Args:
        model: HookedTransformer or TransformerBridge; left as it was, also on an exception or Ctrl-C.
        vectors: the directions, at the blocks that `config.layers` names; or a list of `DirectionTarget`s, to tune
            several at once.
        train: pairs, for which the model writes its own targets; or targets and choices; or what `prepare_data` made of
            them, which several runs can share (`validation` and `neutral` are part of it then).
        config: see TuneConfig.
        validation: held-out pairs or targets; by default a fraction of the training topics.
        neutral: prompts (or targets) for the KL term; needed if its weight is above 0.
        steer: computes the losses under random steering (KLThenSteer), or under constant edits (Preventative).
        checkpoint: file for the run's state. If it exists, the run resumes from it, which gives bit-identical results
            to an uninterrupted run; the checkpoint of a finished run gives its delta at once.
        checkpoint_every: steps between writes.
        report_to: where the losses go as well: `wandb`, `tensorboard`, `trackio`, or a `Tracker` of your own.
        progress: show a bar with the losses.

    Returns:
        The change of each trained parameter.

    Raises:
        ValueError: vectors of another model, layers out of range, nothing to train on, another run's checkpoint.
        OSError: the checkpoint cannot be written there; only at the start, later a refusal is a warning.
        LossNotFinite: names the step and the batch, and carries the last good weights as `delta`.
        MemoryError: says which setting to lower.

    Example:
        >>> config = TuneConfig(direction="away", layers=[21], max_steps=2, n_targets=4, target_tokens=4)
        >>> delta = tune(model, vectors, train, config, neutral=["Name three metals."], progress=False)
        >>> sorted({row["split"] for row in delta.history}), delta.history[0]["step"]
        (['train', 'validation'], 1)
        >>> with delta.applied(model):
        ...     answers = generate(model, ["Tell me about your weekend."], max_new_tokens=4)
    """
    config, neutral, trackers = config or TuneConfig(), neutral_list(neutral), trackers_named(report_to)
    check_installed(trackers)
    trained = trained_by(model, config)
    targets = resolve_targets(model, vectors, config)
    _check_request(model, train, config, validation, neutral, steer, checkpoint_every)
    origin = {"vectors": described(vectors), "steer": None if steer is None else steer.described()}
    # Reading 8 billion weights takes as long as some steps do: once, and only where it is compared.
    weights = parameters_sha256(model) if checkpoint is not None or isinstance(train, TuningData) else ""
    stored = (
        None
        if checkpoint is None
        else Checkpoint(Path(checkpoint).expanduser(), run_of(config, model, origin, weights))
    )
    if not isinstance(train, TuningData):
        train = prepare_data(
            model, vectors, train, config, validation=validation, neutral=neutral, steer=steer, progress=progress,
            weights=weights,
        )  # fmt: skip
    _check_data(model, weights, train, targets, config, steer)
    all_trained = {name: parameter for parameters in trained.values() for name, parameter in parameters.items()}
    if stored:
        stored.reads(train)
    before = {name: parameter.detach() for name, parameter in all_trained.items()}
    with trainable_params(model, all_trained, config) as leaves:
        names = list(dict.fromkeys(name for target in targets for name in target.names))
        train = with_references(model, train, config, names)
        objective = Objective(model, targets, config, train, trained, steered=isinstance(steer, KLThenSteer))
        settings = {**asdict(config), **origin}
        loop = Loop(model, objective, leaves, trained, train, config, steer, before, settings)
        name = name_given(f"{model_name(model)} {config.direction} seed {config.seed}")
        with tracked(trackers, name, settings) as loop.report:
            return loop.run(stored, checkpoint_every, progress)


def _check_request(
    model: Model,
    train: Any,
    config: TuneConfig,
    validation: Any,
    neutral: Sequence[Any],
    steer: SteerWhileTuning | None,
    every: int,
) -> None:
    if config.cosine_weight == 0 and config.token_weight == 0 and steer is None:
        raise ValueError(
            "cosine_weight or token_weight must be above 0, or steer given, got 0 for both and no steer, so there is "
            "nothing to tune."
        )
    prepared = isinstance(train, TuningData)
    if prepared and (validation is not None or len(neutral)):
        raise ValueError(
            "validation and neutral must be left out where train is prepared data, which holds them. Give them to "
            "`prepare_data`."
        )
    if config.kl_weight > 0 and not (train.neutral if prepared else neutral):
        fix = "Prepare the data with some" if prepared else "Give some"
        raise ValueError(f"neutral must be at least one prompt for the KL term, got none. {fix}, or set kl_weight=0.")
    if steer is not None:
        steer.check_fits(model)
    if every < 1:
        raise ValueError(f"checkpoint_every must be at least 1 step, got {every}.")


def _check_data(
    model: Model,
    weights: str,
    data: TuningData,
    targets: Sequence[ResolvedTarget],
    config: TuneConfig,
    steer: SteerWhileTuning | None,
) -> None:
    if data.model != model_name(model):
        raise ValueError(f"train must be data prepared with this model, {model_name(model)}, got data of {data.model}.")
    if data.weights and data.weights != weights:
        raise ValueError(
            f"train must be data prepared with this model's weights, got data of other weights of {data.model}. "
            "Prepare "
            "it again, or revert the change of weights that is applied to the model."
        )
    if config.token_weight and data.direction not in (None, config.direction):
        raise ValueError(
            f"train must be targets written for direction {config.direction!r}, got targets for {data.direction!r}. "
            "Prepare the data again, or set token_weight=0."
        )
    latest = min([*config.blocks, *(steer.layers if steer else ())])
    needed = {(target.positions, name) for target in targets for name in target.names}
    unread = not {position for position, _ in needed} <= set(data.train[0].places)
    uncentred = config.cosine_weight and config.centred and not needed <= set(data.centres)
    if data.first_block > latest or unread or uncentred:
        centres = sorted({f"{name} ({position})" for position, name in data.centres})
        raise ValueError(
            f"train must be data prepared with the same layers, positions, trained_layers and steer, got data for "
            "blocks "
            f"from {data.first_block} on and {', '.join(centres) or 'no centres'}. Prepare it again."
        )


class Loop:
    """One tuning run over prepared data: of weights, or of an edit's own tensors, whose delta changes nothing."""

    def __init__(
        self,
        model: Model,
        objective: Objective,
        leaves: Mapping[str, TrainableParam],
        trained: Mapping[str, Mapping[str, nn.Parameter]],
        data: TuningData,
        config: TuneConfig,
        steer: SteerWhileTuning | None,
        before: Mapping[str, Tensor],
        origin: dict[str, Any],
    ) -> None:
        self.model, self.objective, self.leaves, self.data = model, objective, leaves, data
        self.config, self.steer, self.before, self.origin = config, steer, before, origin
        self.tensors = named_tensors(leaves)
        neutral = data.neutral if config.kl_weight else []
        held = min(2 * config.neutral_batch_size, len(neutral) // 2)
        self.held_neutral, self.neutral = neutral[:held] or neutral, neutral[held:]
        self.per_epoch = math.ceil(len(data.train) / config.batch_size)
        self.steps = min(config.max_steps, config.epochs * self.per_epoch)
        self.optimiser = _optimiser(leaves, trained, config)
        self.report: Callable[[Mapping[str, Any]], None] = lambda row: None

    def run(self, checkpoint: Checkpoint | None, every: int, progress: bool) -> WeightDelta:
        state = checkpoint.load(self.leaves, self.optimiser) if checkpoint else None
        state = state or State(best=self._values())
        with Bar(
            total=self.steps, initial=state.step, desc=f"tuning {self.config.direction}", unit="step",
            disable=not progress,
        ) as bar:  # fmt: skip
            while not state.done:
                losses = self._step(state)
                bar.update()
                bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
                if checkpoint and (state.done or state.step % every == 0):
                    checkpoint.save(state, self.leaves, self.optimiser)
        return self._delta(state)

    def _step(self, state: State) -> dict[str, float]:
        """One step of the optimiser, with the validation that follows it."""
        rows, neutral = self._batch(state.step)
        with _memory_advice(state.step + 1, rows, self.config):
            return self._learn(state, rows, neutral)

    def _learn(self, state: State, rows: list[Row], neutral: list[Row]) -> dict[str, float]:
        config, number = self.config, state.step + 1
        for leaf in self.leaves.values():
            leaf.forget_gradient()
        progress, seed = number / self.steps, f"{config.seed}-steer-{number}"
        hooks = self.steer.drawn(self.model, seed, progress) if self.steer else []
        self.objective.at(state.step, self.steps)
        losses = self.objective.gradients(rows, neutral, hooks)
        for leaf in self.leaves.values():
            leaf.take_gradient()
        norm = nn.utils.clip_grad_norm_(self.tensors.values(), config.max_grad_norm)
        if not math.isfinite(losses["total"]) or not torch.isfinite(norm):
            self._stop(state, f"step {number}", losses, rows, neutral)
        if state.best_loss == math.inf:
            state.best = self._values()  # with these the losses are finite; after the step they may not be
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * _rate(state.step, self.steps, config.warmup)
        self.optimiser.step()
        for leaf in self.leaves.values():
            leaf.write()
        state.step = number
        self._keep(state, _history_row(number, "train", losses))
        state.done = number == self.steps
        if state.done or number % config.validate_every == 0:
            self._validate(state)
        return losses

    def _keep(self, state: State, row: dict[str, Any]) -> None:
        state.history.append(row)
        self.report(row)

    def _batch(self, step: int) -> tuple[list[Row], list[Row]]:
        """The rows of a step, which depend on the seed and the step's number alone, so that any step can be resumed."""
        config, (epoch, batch) = self.config, divmod(step, self.per_epoch)
        order = list(range(len(self.data.train)))
        random.Random(f"{config.seed}-{epoch}").shuffle(order)
        chosen = order[batch * config.batch_size : (batch + 1) * config.batch_size]
        size = min(len(self.neutral), config.neutral_batch_size)
        neutral = random.Random(f"{config.seed}-neutral-{step}").sample(self.neutral, size)
        return [self.data.train[number] for number in chosen], neutral

    def _validate(self, state: State) -> None:
        """Losses over the held-out rows, with the KL over the same few neutral rows, which no step reads."""
        neutral = self.held_neutral
        hook_lists: list[list[FwdHook]] = self.steer.held_out(self.model) if self.steer else [[]]
        losses = self.objective.values(self.data.held_out, neutral, hook_lists)
        if not math.isfinite(losses["total"]):
            self._stop(state, f"the validation after step {state.step}", losses, self.data.held_out, neutral)
        self._keep(state, _history_row(state.step, "validation", losses))
        if losses["total"] < state.best_loss:
            state.best_loss, state.worse, state.best = losses["total"], 0, self._values()
        else:
            state.worse += 1
            state.done = state.done or state.worse >= self.config.patience

    def _values(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def _delta(self, state: State) -> WeightDelta:
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state.best[name])
        for leaf in self.leaves.values():
            leaf.write()
        now = parameters_of(self.model)
        changes = {name: (now[name].detach() - before).contiguous() for name, before in self.before.items()}
        return WeightDelta(changes, model_name(self.model), self.origin, state.history, dtype_name(self.model))

    def _stop(
        self, state: State, when: str, losses: Mapping[str, float], rows: Sequence[Row], neutral: Sequence[Row]
    ) -> None:
        wrong = [name for name, value in losses.items() if name != "total" and not math.isfinite(value)]
        # A gradient (nothing else wrong) may be of either.
        batch = [*([] if wrong == ["kl"] else rows), *(neutral if not wrong or "kl" in wrong else [])]
        prompts = "; ".join(repr(row.prompt[-60:]) for row in batch)
        raise LossNotFinite(
            f"tune: at {when} {', '.join(wrong) or 'the gradient'} is not finite, in the batch of prompts that end "
            f"{prompts}. The error's `delta` holds the last good weights. Lower learning_rate (now "
            f"{self.config.learning_rate:g}), or check these texts.",
            self._delta(state),
        )


def _optimiser(
    leaves: Mapping[str, TrainableParam], trained: Mapping[str, Mapping[str, nn.Parameter]], config: TuneConfig
) -> torch.optim.Optimizer:
    """AdamW; `peak` of each group is its learning rate before warm-up and decay."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, leaf in leaves.items():
        groups[name in trained.get("cosine", {})].extend(leaf.tensors.values())
    peaks = {True: config.learning_rate, False: config.token_learning_rate or config.learning_rate}
    return torch.optim.AdamW(
        [{"params": params, "peak": peaks[by_cosine]} for by_cosine, params in groups.items() if params],
        lr=0.0,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a fraction of the steps, then linear decay."""
    warm = max(1, round(steps * warmup))
    return (step + 1) / warm if step < warm else max(0.0, (steps - step) / max(1, steps - warm))


def _history_row(step: int, split: str, losses: Mapping[str, float]) -> dict[str, Any]:
    always = {name: losses.get(name) for name in ("total", "token", "cosine", "kl")}
    return {"step": step, "split": split, **always, **losses}


@contextmanager
def _memory_advice(step: int, rows: Sequence[Row], config: TuneConfig) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # CUDA's kind is a RuntimeError, and the CPU raises a plain one
        phrases = ("out of memory", "can't allocate memory", "not enough memory")
        if not isinstance(error, MemoryError) and not any(phrase in str(error) for phrase in phrases):
            raise
        size = config.micro_batch_size or config.batch_size
        setting = (
            f"micro_batch_size={max(1, size // 2)} (it is {size} now; the step stays the same)"
            if size > 1
            else "target_tokens, or fewer trained_layers, or lora_rank=16"
        )
        longest = max(len(row.tokens) for row in rows)
        raise MemoryError(
            f"tune: out of memory at step {step}, with rows of up to {longest} tokens. Set {setting}."
        ) from error
