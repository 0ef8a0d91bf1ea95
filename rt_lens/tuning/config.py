"""How to tune: the settings, checked when they are made."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from rt_lens.tuning.losses import Direction, check_direction

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
MODULES = (*MATRICES, "bias", "norm")
LOSSES = ("cosine", "token", "kl")

_OLD_NAMES = {"kinds": "target_modules", "token_rest": "free_nats"}
_OLD_VALUES = {"direction": {"out": "suppress"}}
_NESTED = ("of", "sum_of", "vectors")  # where a delta's configuration holds others, and a run's its targets


def modern(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a file under today's names and values, with a warning for each one that is old.

    It takes a TuneConfig's table of a TOML file, the configuration of a WeightDelta, and the run of a checkpoint.

    Args:
        settings: as the file holds them; they stay as they are.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as hints:
        ...     warnings.simplefilter("always")
        ...     modern({"direction": "out", "kinds": ["v", "o"], "max_steps": 5})
        {'direction': 'suppress', 'target_modules': ['v', 'o'], 'max_steps': 5}
        >>> print(hints[0].message)
        direction 'out' is now 'suppress'; the old name still works.
    """
    renamed: dict[str, Any] = {}
    for key, value in settings.items():
        name = _OLD_NAMES.get(key, key)
        if name != key:
            warnings.warn(f"{key!r} is now {name!r}; the old name still works.", stacklevel=2)
        new = _OLD_VALUES.get(name, {}).get(value) if isinstance(value, str) else None
        if new is not None:
            warnings.warn(f"{name} {value!r} is now {new!r}; the old name still works.", stacklevel=2)
        if name in _NESTED and isinstance(value, Mapping):
            value = modern(value)
        elif name in _NESTED and isinstance(value, list):
            value = [modern(entry) if isinstance(entry, Mapping) else entry for entry in value]
        renamed[name] = value if new is None else new
    return renamed


@dataclass(frozen=True)
class TuneConfig:
    """How to tune; see Ackerman 2024 for the dual loss.

    Attributes:
        direction: `toward` the vector, `away` from it, or `suppress` (no component left, either way).
        layers: Blocks whose activations enter the cosine loss.
        hook: Kind of hook point at which the cosine loss is computed.
        positions: Token positions at which the cosine loss is computed: `response` (those that predict the response,
            one before each of its tokens), `vector` (those that the vector was extracted from), or a position of
            `extract_vectors`, such as `last` (the last token of the target's prompt) or `mean response`;
            `rt_lens.models.positions` defines the words.
        centred: Whether to subtract the untuned model's mean activation before the cosine.
        trained_layers: Blocks to train. Defaults to those from three below the first of `layers` up to the last of
            them. Or a mapping by loss, `{"cosine": [...], "token": [...]}`.
        target_modules: Which of their weights to train: q, k, v, o, gate, up, down, bias, norm. Or a mapping by loss,
            as for `trained_layers`: then a weight gets gradients only from the losses that name it. If `kl` is left
            out, it trains whatever any other loss trains.
        lora_rank: Rank of the low-rank factors of each matrix (Hu et al. 2021; scale 1); 0 trains whole matrices.
        cosine_weight: Weight of the loss at the hook points; 0 disables it.
        residual_loss: What that loss is: `cosine` to the vector; `lorra`, the distance to the untuned residual moved by
            `shift` times the difference that the personas make at the same token (Zou et al. 2023); `circuit_breaker`,
            the cosine to the untuned residual on targets that are to go (Zou et al. 2024), while on neutral prompts the
            distance to the untuned residual takes the place of the KL.
        shift: Multiplier of the persona difference in `lorra`.
        token_weight: Weight of the loss on the targets' tokens; 0 disables it.
        token_loss: What that loss is: `cross_entropy`, or `preference` for the answer over the one rejected, both
            relative to the untuned model (DPO, Rafailov et al. 2023).
        beta: Scale of the log-ratios in `preference`.
        free_nats: A target token whose loss is within this many nats of its minimum is not trained on; 0 trains on all.
        kl_weight: Weight of the KL to the untuned model on neutral prompts; 0 disables it.
        learning_rate: Peak AdamW learning rate (linear warm-up, then linear decay to zero).
        token_learning_rate: Peak learning rate of weights that the cosine loss does not train. Defaults to
            `learning_rate`.
        warmup: Fraction of the steps used for warm-up.
        weight_decay: AdamW weight decay.
        max_grad_norm: Norm to which the gradient is clipped.
        epochs: Passes over the targets.
        max_steps: Maximum number of steps, even if epochs are left.
        batch_size: Targets per step.
        neutral_batch_size: Neutral prompts per step, for the KL term.
        micro_batch_size: Gradient accumulation: rows per forward and backward pass; less memory, same step. Defaults
            to all rows at once.
        precision: `bfloat16` runs the blocks in mixed precision (weights and losses stay float32, and so does the whole
            KL term: the rounding would be as large as what it measures), `auto` does so where a GPU supports it,
            `float32` never.
        prefix_cache: Where to cache the activations that enter the first trained block: `memory`, `disk`, `auto` (by
            size), or `off` (run the blocks before it at every step).
        n_targets: Number of target responses to generate.
        target_tokens: Maximum length of a target, in tokens.
        target_temperature: Sampling temperature of targets and neutral responses; learning its own greedy responses
            sharpens a model until it repeats itself.
        validation_share: Fraction of topics held out for early stopping, if no validation pairs are given.
        validate_every: Steps between validations.
        patience: Validations without improvement before stopping.
        seed: Seed for the selection and sampling of targets, the validation split, batch order and initial low-rank
            factors.

    Example:
        >>> config = TuneConfig(direction="away", layers=range(20, 23), target_modules=["v", "o"], lora_rank=8)
        >>> config.layers, config.blocks  # where the cosine is read, and which blocks may change
        ((20, 21, 22), (17, 18, 19, 20, 21, 22))
        >>> TuneConfig(direction="out")
        Traceback (most recent call last):
        ValueError: direction must be 'toward', 'away' or 'suppress', got 'out', the old name of 'suppress'.
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
    residual_loss: Literal["cosine", "lorra", "circuit_breaker"] = "cosine"
    shift: float = 1.0
    token_weight: float = 1.0
    token_loss: Literal["cross_entropy", "preference"] = "cross_entropy"
    beta: float = 0.1
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
        _check_names(self)
        _check_numbers(self)

    def weight(self, loss: str) -> float:
        """The weight of a loss: `cosine` (whatever `residual_loss` is), `token` or `kl`."""
        return float(getattr(self, f"{loss}_weight"))

    def loss_name(self, loss: str) -> str:
        """What `cosine`, `token` and `kl` are in a history: their own names, or those of the losses in their place."""
        names: dict[str, str] = {"cosine": self.residual_loss}
        if self.residual_loss == "circuit_breaker":
            names["kl"] = "retain"
        if self.token_loss == "preference":
            names["token"] = "preference"
        return names.get(loss, loss)

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
        """What the KL term trains where it is not named: all that the other losses train."""
        by_loss = (getattr(self, which)(loss) for loss in ("cosine", "token"))
        return tuple(dict.fromkeys(value for values in by_loss for value in values))

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that are trained."""
        return tuple(sorted({block for loss in LOSSES for block in self.blocks_of(loss)}))


def _frozen(name: str, value: Any) -> Any:
    """Lists as tuples, one for all losses or one for each."""
    if value is None:
        return None
    if isinstance(value, str):
        raise ValueError(f"{name} must be a list, got {value!r}. Try {name}={value.split()!r}.")
    if not isinstance(value, Mapping):
        return _module_names(name, value) if name.startswith("target_modules") else whole_numbers(name, value)
    if unknown := set(value) - set(LOSSES):
        raise ValueError(f"{name} must have the keys {', '.join(LOSSES)}, got {', '.join(sorted(map(str, unknown)))}.")
    return {loss: _frozen(f"{name}[{loss!r}]", of_loss) for loss, of_loss in value.items()}


def _module_names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list such as ['v', 'o'], got {value!r}.")
    return tuple(value)


def whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    """A list of block indices as plain numbers, from any kind of list and of whole number.

    Raises:
        ValueError: if it is no list of whole numbers, or empty.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list of blocks such as [20, 21] or range(20, 25), got {value!r}.")
    blocks = tuple(_whole(name, block) for block in value)
    if not blocks:
        raise ValueError(f"{name} must name at least one block, such as [20, 21], got an empty list.")
    return blocks


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}.") from None


def _check_names(config: TuneConfig) -> None:
    check_direction(config.direction)
    allowed = {
        "precision": ("float32", "bfloat16", "auto"),
        "prefix_cache": ("auto", "memory", "disk", "off"),
        "residual_loss": ("cosine", "lorra", "circuit_breaker"),
        "token_loss": ("cross_entropy", "preference"),
    }
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            known = f"{', '.join(map(repr, values[:-1]))} or {values[-1]!r}"
            raise ValueError(f"{name} must be {known}, got {getattr(config, name)!r}.")
    lists = config.target_modules.values() if isinstance(config.target_modules, Mapping) else [config.target_modules]
    for module in (module for modules in lists for module in modules):
        if module not in MODULES:
            raise ValueError(f"target_modules must be among {', '.join(MODULES)}, got {module!r}.")
    for name in ("trained_layers", "target_modules"):
        by_loss = getattr(config, name)
        others = config.cosine_weight > 0 or config.token_weight > 0
        for loss in ("cosine", "token") if others else LOSSES:
            if isinstance(by_loss, Mapping) and config.weight(loss) > 0 and not by_loss.get(loss):
                raise ValueError(
                    f"{name} must have an entry for the {loss} loss, which has weight, got none. Add it, or set "
                    f"{loss}_weight=0."
                )
    if not isinstance(config.target_modules, Mapping) and not config.target_modules:
        raise ValueError(f"target_modules must be some of {', '.join(MODULES)}, got an empty list.")


def _check_numbers(config: TuneConfig) -> None:
    not_negative = ("cosine_weight", "token_weight", "kl_weight", "free_nats", "weight_decay", "target_temperature")
    positive = ("epochs", "max_steps", "batch_size", "neutral_batch_size", "n_targets", "target_tokens",
                "validate_every", "patience", "learning_rate", "max_grad_norm", "shift", "beta")  # fmt: skip
    whole = ("epochs", "max_steps", "batch_size", "neutral_batch_size", "n_targets", "target_tokens", "validate_every",
             "patience", "lora_rank", "micro_batch_size")  # fmt: skip
    for name in (*not_negative, *positive, *whole, "token_learning_rate", "warmup", "validation_share"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, Real) or (name in whole and value % 1 != 0)):
            raise ValueError(f"{name} must be a {'whole ' if name in whole else ''}number, got {value!r}.")
    for name in (*not_negative, "lora_rank"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be 0 or more, got {getattr(config, name)}.")
    for name in (*positive, "token_learning_rate", "micro_batch_size"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be more than 0, got {value}.")
    for name in ("warmup", "validation_share"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}.")
    if config.residual_loss != "cosine" and config.cosine_weight and config.positions != "response":
        raise ValueError(
            f"positions must be 'response' where residual_loss is {config.residual_loss!r}, which is read where the "
            f"response is predicted, got {config.positions!r}. Leave it out."
        )
    if config.cosine_weight == config.token_weight == config.kl_weight == 0:
        raise ValueError(
            "cosine_weight, token_weight or kl_weight must be above 0, got 0 for all, so there is nothing to tune."
        )
