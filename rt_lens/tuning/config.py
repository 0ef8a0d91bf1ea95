"""How to tune: the settings, checked when they are made."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from rt_lens.tuning.losses import Direction

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
MODULES = (*MATRICES, "bias", "norm")
LOSSES = ("cosine", "token", "kl")


@dataclass(frozen=True)
class TuneConfig:
    """How to tune; see Ackerman 2024 for the dual loss.

    Attributes:
        direction: `toward` the vector, `away` from it, or `suppress` (no component left, either way).
        layers: blocks whose activations the cosine loss reads.
        hook: kind of hook point of the cosine loss.
        positions: tokens that it reads: `response` (those from which the answer is predicted), `vector` (those that
            the vector was made from), or a position that `extract_vectors` knows, such as `last` (of the prompt).
        centred: subtract the untuned model's mean activation before the cosine.
        trained_layers: blocks that may change; by default from three below the first of `layers` up to the last of
            them. Or by loss, `{"cosine": [...], "token": [...]}`.
        target_modules: which of their weights: q, k, v, o, gate, up, down, bias, norm. Or by loss, as `trained_layers`: then a
            weight gets gradients only from the losses that name it. A `kl` left out trains what any other loss does.
        lora_rank: train low-rank factors of each matrix (Hu et al. 2021; scale 1); 0 trains whole matrices.
        cosine_weight: of the cosine loss; 0 leaves it out.
        token_weight: of the cross-entropy on the targets; 0 leaves it out.
        free_nats: nats above its floor within which a target position rests; 0 never rests.
        kl_weight: of the KL to the untuned model on neutral prompts; 0 leaves it out.
        learning_rate: peak of AdamW's, after a linear warm-up and before a linear decay to zero.
        token_learning_rate: for weights that the cosine loss does not train; `learning_rate` for None.
        warmup: share of the steps.
        weight_decay: of AdamW.
        max_grad_norm: gradient clipping.
        epochs: passes over the targets.
        max_steps: stop after so many steps, whatever the epochs.
        batch_size: targets per step.
        neutral_batch_size: neutral prompts per step, for the KL term.
        micro_batch_size: rows run at once; the step is the same, its memory less. All at once for None.
        precision: `bfloat16` runs the blocks in mixed precision (weights and losses stay float32, and so does the whole
            KL term: the rounding would be as large as what it measures), `auto` does so where a GPU has it, `float32`
            never.
        prefix_cache: where the untrained first blocks' output is kept: `memory`, `disk`, `auto` (by size), or `off`
            (run them at every step).
        n_targets: how many targets to have the model write.
        target_tokens: length of a target.
        target_temperature: at which targets and neutral answers are sampled; learning one's own greedy answers
            sharpens a model until it repeats itself.
        validation_share: share of topics held out for early stopping, where no validation pairs are given.
        validate_every: steps between validations.
        patience: validations without improvement before stopping.
        seed: of target selection, order and initial factors.
    """

    direction: Direction = "away"
    layers: Sequence[int] = (20, 21, 22, 23, 24)
    hook: str = "resid_post"
    positions: str = "response"
    centred: bool = True
    trained_layers: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    target_modules: Sequence[str] | Mapping[str, Sequence[str]] = MATRICES
    lora_rank: int = 0
    cosine_weight: float = 14.0
    token_weight: float = 1.0
    free_nats: float = 0.0
    kl_weight: float = 1.0
    learning_rate: float = 1e-4
    token_learning_rate: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    epochs: int = 1
    max_steps: int = 10
    batch_size: int = 4
    neutral_batch_size: int = 2
    micro_batch_size: int | None = None
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    prefix_cache: Literal["auto", "memory", "disk", "off"] = "auto"
    n_targets: int = 40
    target_tokens: int = 24
    target_temperature: float = 0.7
    validation_share: float = 0.2
    validate_every: int = 5
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", whole_numbers("layers", self.layers))
        for name in ("trained_layers", "target_modules"):
            object.__setattr__(self, name, _frozen(name, getattr(self, name)))
        object.__setattr__(self, "seed", _whole("seed", self.seed))
        _check_words(self)
        _check_numbers(self)

    def weight(self, loss: str) -> float:
        """The weight of a loss: `cosine`, `token` or `kl`."""
        return float(getattr(self, f"{loss}_weight"))

    def blocks_of(self, loss: str) -> tuple[int, ...]:
        """The blocks that a loss trains; none if it has no weight."""
        if self.weight(loss) == 0:
            return ()
        if not isinstance(self.trained_layers, Mapping):
            return self.trained_layers or tuple(range(max(0, min(self.layers) - 3), max(self.layers) + 1))  # type: ignore[return-value]
        return tuple(self.trained_layers.get(loss) or self._of_others("blocks_of"))

    def target_modules_of(self, loss: str) -> tuple[str, ...]:
        """The kinds of weights that a loss trains; none if it has no weight."""
        if self.weight(loss) == 0:
            return ()
        if not isinstance(self.target_modules, Mapping):
            return tuple(self.target_modules)
        return tuple(self.target_modules.get(loss) or self._of_others("target_modules_of"))

    def _of_others(self, which: str) -> tuple[Any, ...]:
        """What the KL term trains where it is not named: all that the losses it holds in check do."""
        each = (getattr(self, which)(loss) for loss in ("cosine", "token"))
        return tuple(dict.fromkeys(value for found in each for value in found))

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that are trained."""
        return tuple(sorted({block for loss in LOSSES for block in self.blocks_of(loss)}))


def _frozen(name: str, value: Any) -> Any:
    """Lists as tuples, one for all losses or one for each."""
    if value is None:
        return None
    if isinstance(value, str):
        raise ValueError(f"{name}: {value!r} came; a list is wanted, as in {name}={value.split()!r}.")
    if not isinstance(value, Mapping):
        return _words(name, value) if name.startswith("target_modules") else whole_numbers(name, value)
    if unknown := set(value) - set(LOSSES):
        raise ValueError(f"{name}: {', '.join(sorted(map(str, unknown)))} is no loss; {', '.join(LOSSES)} are.")
    return {loss: _frozen(f"{name}[{loss!r}]", each) for loss, each in value.items()}


def _words(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Iterable):
        raise ValueError(f"{name}: {value!r} came; a list is wanted, such as ['v', 'o'].")
    return tuple(value)


def whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    """A list of block indices as plain numbers, whatever kind of list and number came.

    Raises:
        ValueError: if it is no list of whole numbers, or empty.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{name}: {value!r} came; a list of blocks is wanted, such as [20, 21] or range(20, 25).")
    found = tuple(_whole(name, each) for each in value)
    if not found:
        raise ValueError(f"{name}: the list is empty. Name at least one block, such as [20, 21].")
    return found


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: {value!r} came; a whole number is wanted.") from None


def _check_words(config: TuneConfig) -> None:
    allowed = {
        "direction": ("toward", "away", "suppress"),
        "precision": ("float32", "bfloat16", "auto"),
        "prefix_cache": ("auto", "memory", "disk", "off"),
    }
    for name, words in allowed.items():
        if getattr(config, name) not in words:
            known = f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}"
            raise ValueError(f"{name}: {getattr(config, name)!r} came; {known} is wanted.")
    given = config.target_modules.values() if isinstance(config.target_modules, Mapping) else [config.target_modules]
    for kind in (kind for each in given for kind in each):
        if kind not in MODULES:
            raise ValueError(f"target_modules: {kind!r} came; {', '.join(MODULES)} are known.")
    for name in ("trained_layers", "target_modules"):
        by_loss = getattr(config, name)
        others = config.cosine_weight > 0 or config.token_weight > 0
        for loss in ("cosine", "token") if others else LOSSES:
            if isinstance(by_loss, Mapping) and config.weight(loss) > 0 and not by_loss.get(loss):
                raise ValueError(f"{name}: nothing for the {loss} loss, which has weight. Add it, or set its weight 0.")
    if not isinstance(config.target_modules, Mapping) and not config.target_modules:
        raise ValueError(f"target_modules: the list is empty. Name some of {', '.join(MODULES)}.")


def _check_numbers(config: TuneConfig) -> None:
    not_negative = ("cosine_weight", "token_weight", "kl_weight", "free_nats", "weight_decay", "target_temperature")
    positive = ("epochs", "max_steps", "batch_size", "neutral_batch_size", "n_targets", "target_tokens",
                "validate_every", "patience", "learning_rate", "max_grad_norm")  # fmt: skip
    whole = ("epochs", "max_steps", "batch_size", "neutral_batch_size", "n_targets", "target_tokens", "validate_every",
             "patience", "lora_rank", "micro_batch_size")  # fmt: skip
    for name in (*not_negative, *positive, *whole, "token_learning_rate", "warmup", "validation_share"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, Real) or (name in whole and value % 1 != 0)):
            raise ValueError(f"{name}: {value!r} came; a {'whole ' if name in whole else ''}number is wanted.")
    for name in (*not_negative, "lora_rank"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name}: {getattr(config, name)} came; 0 or more is wanted.")
    for name in (*positive, "token_learning_rate", "micro_batch_size"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}: {value} came; more than 0 is wanted.")
    for name in ("warmup", "validation_share"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)} came; a share from 0 to below 1 is wanted.")
    if config.cosine_weight == config.token_weight == config.kl_weight == 0:
        raise ValueError("cosine_weight, token_weight, kl_weight: all are 0, so there is nothing to tune. Raise one.")
