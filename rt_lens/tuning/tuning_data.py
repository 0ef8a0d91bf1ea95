"""What a tuning run reads: targets as tokens, and everything about them that the untuned model computes once."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import pack
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.models.backends import backend_of
from rt_lens.models.checksums import parameters_sha256
from rt_lens.models.context import token_context
from rt_lens.models.forward import model_name
from rt_lens.models.positions import numbers_in, position_of, rows_of
from rt_lens.models.protocol import Model, TextModel
from rt_lens.models.tokens.batches import encode, pad_id_of
from rt_lens.models.tokens.chats import answered, end_ids, end_of_answer, tokenizer_of
from rt_lens.steering.edits import FwdHook
from rt_lens.tuning.activation_store import ActivationStore
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.direction_targets import DirectionTarget, ResolvedTarget, SteerWhileTuning, resolve_targets
from rt_lens.tuning.losses import Direction
from rt_lens.tuning.targets import Choice, Target, TokenTarget, neutral_list, write_neutral, write_targets
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of


@dataclass(frozen=True)
class Row:
    """One target as tokens, with what the untuned model computed for it.

    Attributes:
        prompt: for messages.
        tokens: Int[Tensor, "pos"], prompt and answer.
        predicts: Bool[Tensor, "pos"], positions whose next token is the target's.
        choices: Int[Tensor, "read k"], tokens that have a share at each of these positions.
        shares: Float[Tensor, "read k"].
        places: name of a position -> Bool[Tensor, "pos"], where a cosine is read.
        prefix: residual before the first trained block; None where the model is to run from the beginning.
        reference: the untuned model's final residual at the positions read; for the KL term only.
        contrast: the same answer after a positive and after a negative persona; for the loss `lorra` only.
        rejected: the answer not to give; for the preference loss only.
        aims: hook name -> Float[Tensor, "read d_model"], where a loss wants the activations (`with_references`).
        likelihood: log-likelihood of the answer under the untuned model; for the preference loss only.
    """

    prompt: str
    tokens: Int[Tensor, "pos"]
    predicts: Bool[Tensor, "pos"]
    choices: Int[Tensor, "read k"]
    shares: Float[Tensor, "read k"]
    places: dict[str, Bool[Tensor, "pos"]] = field(default_factory=dict)
    prefix: Float[Tensor, "pos d_model"] | None = None
    reference: Float[Tensor, "read width"] | None = None
    contrast: tuple[Row, Row] | None = None
    rejected: Row | None = None
    aims: dict[str, Float[Tensor, "read d_model"]] = field(default_factory=dict)
    likelihood: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, where a causal model needs no mask. Attributes as of a Row, with an axis `row`."""

    tokens: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"]
    predicts: Bool[Tensor, "row pos"]
    choices: Int[Tensor, "read k"]
    shares: Float[Tensor, "read k"]
    places: dict[str, Bool[Tensor, "row pos"]]
    prefix: Float[Tensor, "row pos d_model"] | None
    reference: Float[Tensor, "read width"] | None
    aims: dict[str, Float[Tensor, "read d_model"]]
    likelihood: Float[Tensor, "row"]

    @classmethod
    def of(cls, rows: Sequence[Row], pad_id: int, device: Any) -> Batch:
        prefixes = [row.prefix for row in rows if row.prefix is not None]
        references = [row.reference for row in rows if row.reference is not None]
        tokens = pad_sequence([row.tokens for row in rows], batch_first=True, padding_value=pad_id)
        ones = [torch.ones_like(row.tokens) for row in rows]
        k = max(row.choices.shape[1] for row in rows)
        return cls(
            tokens.to(device),
            pad_sequence(ones, batch_first=True).to(device),
            pad_sequence([row.predicts for row in rows], batch_first=True).to(device),
            torch.cat([_filled(row.choices, k) for row in rows]).to(device),
            torch.cat([_filled(row.shares, k) for row in rows]).to(device),
            {
                name: pad_sequence([row.places[name] for row in rows], batch_first=True).to(device)
                for name in rows[0].places
            },
            pad_sequence(prefixes, batch_first=True).to(device) if prefixes else None,
            pack(references, "* width")[0].to(device) if references else None,
            {name: torch.cat([row.aims[name] for row in rows]).to(device) for name in rows[0].aims},
            torch.tensor([row.likelihood for row in rows], device=device),
        )


def _filled(values: Tensor, k: int) -> Tensor:
    """The values with columns of zeros up to k: a token with share 0."""
    return torch.nn.functional.pad(values, (0, k - values.shape[1]))


@dataclass(frozen=True)
class TuningData:
    """All that a tuning run reads; runs that differ in weights of the losses, modules, steps or seed can share it.

    Attributes:
        train: rows to learn from.
        held_out: rows for early stopping.
        neutral: rows for the KL term.
        centres: position and hook name -> the untuned model's mean activation there, over the training rows.
        first_block: the block that `prefix` stands before; 0 if the model runs from the beginning.
        model: name of the model that it was prepared with.
        direction: that the model wrote the targets for; None if they were given.
        weights: checksum of the model's weights, which all of this was computed from; empty if nobody checks it.

    Example:
        >>> data = prepare_data(model, vectors, train.sample(4), config, neutral=neutral)
        >>> len(data.neutral), data.first_block, data.direction  # config trains block 21 only
        (2, 21, 'away')
    """

    train: list[Row]
    held_out: list[Row]
    neutral: list[Row]
    centres: dict[tuple[str, str], Float[Tensor, "d_model"]]
    first_block: int
    model: str
    direction: Direction | None
    weights: str = ""


@torch.no_grad()
def prepare_data(
    model: Model,
    vectors: SteeringVectors | Sequence[DirectionTarget],
    train: ContrastPairs | Sequence[TokenTarget],
    config: TuneConfig,
    *,
    validation: ContrastPairs | Sequence[TokenTarget] | None = None,
    neutral: Iterable[str] | Iterable[Target] = (),
    steer: SteerWhileTuning | None = None,
    progress: bool = False,
    weights: str | None = None,
) -> TuningData:
    """Writes targets where pairs are given, and runs the untuned model once over all that stays constant while tuning.

    Everything before the first trained block is constant: its residual is computed once and stored, so that each step
    starts from it.

    Args:
        model: the untuned model.
        vectors: whose hook points are read.
        train: pairs, targets or choices to learn from.
        config: its layers, hook, positions, trained layers, prefix cache, and number and length of targets are used.
        validation: held-out pairs or targets; by default a fraction of the training topics.
        neutral: prompts or targets for the KL term.
        steer: steering that the losses are computed under; the stored prefix ends before its layers.
        progress: show bars.
        weights: checksum of the model's weights, where it is known already. If None, it is computed.

    Raises:
        ValueError: if there is nothing to train or validate on, or a position that a text does not have.

    Example:
        >>> import dataclasses
        >>> data = prepare_data(model, vectors, train.sample(4), config, neutral=neutral)
        >>> deltas = [
        ...     tune(model, vectors, data, dataclasses.replace(config, cosine_weight=weight), progress=False)
        ...     for weight in (1.0, 14.0)
        ... ]
        >>> [delta.config["cosine_weight"] for delta in deltas]
        [1.0, 14.0]
    """
    resolved, neutral = resolve_targets(model, vectors, config), neutral_list(neutral)
    _check_texts(train, validation, config, {target.direction for target in resolved})
    targets, held_out = _targets(model, train, validation, config, progress)
    neutral_targets = _neutral_targets(model, neutral, config)
    first = _first_block(model, config, steer)
    positions = sorted({target.positions for target in resolved})
    rows = _rows(model, targets, positions, first, config)
    return TuningData(
        train=_with_others(model, rows, targets, first, config),
        held_out=_with_others(model, _rows(model, held_out, positions, first, config), held_out, first, config),
        neutral=_rows(model, neutral_targets, [], first, config, reference=True),
        centres=_centres(model, rows, resolved, first, config),
        first_block=first,
        model=model_name(model),
        direction=config.direction if isinstance(train, ContrastPairs) else None,
        weights=parameters_sha256(model) if weights is None else weights,
    )


def trained_tokens(data: TuningData, config: TuneConfig, history: Sequence[Mapping[str, Any]]) -> int:
    """Response tokens that a run has read in training steps: steps x targets of a step x mean tokens of a target."""
    rows = [*data.train, *(row.rejected for row in data.train if row.rejected is not None)]
    tokens = sum(int(row.predicts.sum()) for row in rows) / len(data.train)
    steps = max(row["step"] for row in history if row["split"] == "train")
    return round(steps * config.batch_size * tokens)


def unmixed(model: Model) -> AbstractContextManager[Any]:
    """Runs the model in its weights' own precision: both sides of the KL do, and mixed precision changes neither.

    In bfloat16 a row's logits depend on the rows beside it: an untouched model would be 0.0005 nats from itself.
    """
    return torch.autocast(torch.device(model.cfg.device).type, enabled=False)


def _first_block(model: Model, config: TuneConfig, steer: SteerWhileTuning | None) -> int:
    """The first block that training or steering changes anything in; 0 without a prefix cache."""
    if config.prefix_cache == "off":
        return 0
    return min([*config.blocks, *(steer.layers if steer else ())])


def _rows(
    model: Model, targets: Sequence[TokenTarget], positions: Sequence[str], first: int, config: TuneConfig,
    *, reference: bool = False,
) -> list[Row]:  # fmt: skip
    """The targets as rows, with prefix and reference in stores."""
    rows = [_row(model, target, positions) for target in targets]
    storage = "memory" if config.prefix_cache == "off" else config.prefix_cache
    prefixes = ActivationStore([len(row.tokens) for row in rows] if first else [], model.cfg, storage)
    read_at = [int(row.predicts.sum()) for row in rows]
    finals = ActivationStore(read_at if reference else [], model.cfg, storage)
    computed: list[Row] = []
    for batch_rows, batch in in_batches_of(model, rows):
        if first:
            with backend_of(model).quick(), unmixed(model):
                prefix = backend_of(model).residual(batch.tokens, batch.mask, stop=first)
            batch_rows = [
                replace(row, prefix=prefixes.put(prefix[i, : len(row.tokens)])) for i, row in enumerate(batch_rows)
            ]
            batch = replace(batch, prefix=prefix)
        if reference:
            with unmixed(model):
                _, final = read(model, batch, [], first, final=True)
            assert final is not None
            parts = final.split([int(row.predicts.sum()) for row in batch_rows])
            batch_rows = [replace(row, reference=finals.put(p)) for row, p in zip(batch_rows, parts, strict=True)]
        computed += batch_rows
    return computed


def _with_others(
    model: Model, rows: Sequence[Row], targets: Sequence[TokenTarget], first: int, config: TuneConfig
) -> list[Row]:
    """The rows with the answers that a loss sets beside them: rejected ones, or the same under personas."""
    rows = list(rows)
    if config.token_weight and config.token_loss == "preference":
        others = _rows(model, [_rejected(target) for target in targets], [], first, config)
        rows = [replace(row, rejected=other) for row, other in zip(rows, others, strict=True)]
    if config.cosine_weight and config.residual_loss == "lorra":
        rows = [replace(row, contrast=_contrast(model, row, t)) for row, t in zip(rows, targets, strict=True)]
    return rows


def _rejected(target: TokenTarget) -> Target:
    if not isinstance(target, Target) or not target.rejected:
        raise ValueError(
            "train must have targets with an answer to reject where token_loss is 'preference', got one without for "
            f"prompt {target.prompt[-60:]!r}. Pair answers with `rtl.tuning.preferences`."
        )
    return replace(target, answer=target.rejected)


def _contrast(model: Model, row: Row, target: TokenTarget) -> tuple[Row, Row]:
    if not isinstance(target, Target) or target.contrast is None:
        raise ValueError(
            "train must have targets that were written under personas where residual_loss is 'lorra', got one without "
            f"for prompt {target.prompt[-60:]!r}. Give ContrastPairs, or targets with a `contrast`."
        )
    positive, negative = (_row(model, replace(target, prompt=prompt), []) for prompt in target.contrast)
    if not torch.equal(positive.choices, row.choices) or not torch.equal(negative.choices, row.choices):
        raise ValueError(
            f"train must have answers of the same tokens after every prompt, got {target.answer[:60]!r}, whose first "
            "token joins the prompt's last in one of them. Leave this target out."
        )
    return positive, negative


def in_batches_of(model: Model, rows: Sequence[Row], size: int = 16) -> Iterator[tuple[list[Row], Batch]]:
    for start in range(0, len(rows), size):
        batch_rows = list(rows[start : start + size])
        yield batch_rows, Batch.of(batch_rows, pad_id_of(model), model.cfg.device)


def _centres(
    model: Model, rows: Sequence[Row], targets: Sequence[ResolvedTarget], first: int, config: TuneConfig
) -> dict[tuple[str, str], Tensor]:
    """Mean activations of the untuned model, over the positions of the training rows that are read."""
    keys = list(dict.fromkeys((target.positions, name) for target in targets for name in target.names))
    keys = [(position, name) for position, name in keys if first <= layer_of(name)]
    if not config.centred or not keys:
        return {}
    sums: dict[tuple[str, str], Tensor] = {}
    counts: dict[str, int] = {}
    names = list(dict.fromkeys(name for _, name in keys))
    for _, batch in in_batches_of(model, rows):
        activations, _ = read(model, batch, names, first, final=False)
        for position, mask in batch.places.items():
            counts[position] = counts.get(position, 0) + int(mask.sum())
        for key in keys:
            position, name = key
            part = activations[name][batch.places[position]].float().sum(0)
            sums[key] = sums[key] + part if key in sums else part
    return {key: summed / counts[key[0]] for key, summed in sums.items()}


def read(
    model: Model, batch: Batch, names: Sequence[str], first: int, *, final: bool, hooks: Sequence[FwdHook] = ()
) -> tuple[dict[str, Float[Tensor, "row pos d_model"]], Float[Tensor, "read width"] | None]:
    """Activations at hook points, and with `final` the final residual where tokens are predicted.

    The model starts at block `first` where the batch has a prefix, and stops where nothing more is read.

    Args:
        hooks: edits to run under; `names` are read after them.
    """
    if not names and not final:
        return {}, None
    activations: dict[str, Tensor] = {}

    def storing(name: str) -> FwdHook:  # under this name: a bridge calls its hook points by others
        def store(activation: Tensor, hook: Any) -> None:
            activations[name] = activation

        return name, store

    backend = backend_of(model)
    everything = torch.ones_like(batch.mask)
    reading = model.hooks(fwd_hooks=[*hooks, *map(storing, names)])
    with backend.quick(), reading, token_context(batch.mask) if hooks else nullcontext():
        start, inputs = (0, batch.tokens) if batch.prefix is None else (first, batch.prefix)
        stop = None if final else 1 + max(layer_of(name) for name in names)
        output = backend.residual(inputs, everything, start=start, stop=stop)
    return activations, output[batch.predicts] if final else None


def logits_of(model: Model, final: Float[Tensor, "read width"]) -> Float[Tensor, "read d_vocab"]:
    """Logits of what `read` gave as final."""
    return backend_of(model).unembed(final)


def _row(model: TextModel, target: TokenTarget, positions: Sequence[str]) -> Row:
    prompt = encode(model, target.prompt) if target.prompt else []
    if isinstance(target, Choice):
        tokens, start = torch.tensor(prompt, device="cpu"), len(prompt) - 1
        choices = torch.tensor([[_single(model, target.prompt, option) for option in target.options]], device="cpu")
        shares = torch.tensor([target.shares], dtype=torch.float32, device="cpu")
    else:
        tokens, start = torch.tensor(prompt + _answer_ids(model, target, prompt), device="cpu"), max(len(prompt) - 1, 0)
        choices = tokens[start + 1 :, None]
        shares = torch.ones(choices.shape, device="cpu")
    end = start + len(choices)
    if end <= start:
        raise ValueError(f"train must have an answer for every target, got none for prompt {target.prompt[:60]!r}.")
    predicts = torch.zeros(len(tokens), dtype=torch.bool, device="cpu")
    predicts[start:end] = True
    masks = {
        position: predicts if position == "response" else _mask(model, target, position, tokens)
        for position in positions
    }
    return Row(target.prompt, tokens, predicts, choices, shares, masks)


def _answer_ids(model: TextModel, target: Target, prompt: list[int]) -> list[int]:
    """The tokens that a target's answer adds to its prompt, as the template writes a whole answer, with its end."""
    whole = answered(model, target.prompt, target.answer)
    if not whole.startswith(target.prompt):  # a template that opens a thought, which the answer then stands in
        whole = target.prompt + target.answer
    ids = encode(model, whole)
    answer = ids[len(prompt) :]
    if ids[: len(prompt)] != prompt or not target.prompt:  # they join over the edge; or there is no start token
        rest = whole[len(target.prompt) :]
        answer = tokenizer_of(model).encode(rest, add_special_tokens=False)
    end = end_of_answer(model) if target.ended else None
    return answer if end is None or not answer or answer[-1] in end_ids(model) else [*answer, end]


def _single(model: TextModel, prompt: str, option: str) -> int:
    # In its context, since some tokenizers give " A" alone an additional token for its beginning.
    before, after = encode(model, prompt), encode(model, answered(model, prompt, option))
    if len(after) != len(before) + 1 or after[:-1] != before:
        n = max(len(after) - len(before), 0)
        raise ValueError(
            f"options must be one token each, got {option!r}, which is {n} tokens of this model after "
            f"{prompt[-20:]!r}. Give a shorter one, or check its leading space."
        )
    return int(after[-1])


def _mask(model: TextModel, target: TokenTarget, position: str, tokens: Int[Tensor, "pos"]) -> Bool[Tensor, "pos"]:
    """Where a position of `extract_vectors` lies in a target: its prompt is the text that the model is given."""
    mask = torch.zeros(len(tokens), dtype=torch.bool, device="cpu")
    start = len(encode(model, target.prompt)) if target.prompt else 0
    if position == "mean response":
        mask[start:] = True
    elif position == "mean":
        mask[:] = True
    else:
        (row,) = rows_of(model, [target.prompt])
        mask[numbers_in(row, position_of(position), f"the prompt {target.prompt[-40:]!r}")] = True
    if not mask.any():
        raise ValueError(
            f"positions must name a token of every target, but {position!r} names none in the one with prompt "
            f"{target.prompt[:60]!r}."
        )
    return mask


def _check_texts(train: Any, validation: Any, config: TuneConfig, directions: set[Direction]) -> None:
    """Refuses what is no text to learn from, and targets written for a direction that no DirectionTarget has."""
    for name, texts in (("train", train), ("validation", validation)):
        if texts is None or isinstance(texts, ContrastPairs):
            continue
        if not isinstance(texts, Sequence) or not all(isinstance(text, Target | Choice) for text in texts):
            raise ValueError(
                f"{name} must be ContrastPairs, or a list of Target and Choice, got a {type(texts).__name__} of others."
            )
    if isinstance(train, ContrastPairs) and config.token_weight and config.direction not in directions:
        raise ValueError(
            f"direction must be that of a DirectionTarget ({', '.join(sorted(directions))}), since the model writes "
            "its "
            f"targets for it, got {config.direction!r}. Set the TuneConfig's direction, or give targets."
        )


def _targets(
    model: Model, train: Any, validation: Any, config: TuneConfig, progress: bool
) -> tuple[list[TokenTarget], list[TokenTarget]]:
    if isinstance(train, ContrastPairs):
        if validation is None:
            train, validation = train.split(1 - config.validation_share, seed=config.seed)
        train = write_targets(model, train, config.direction, config, progress=progress)
    elif validation is None:
        train, validation = _parted(train, config)
    if isinstance(validation, ContrastPairs):
        few = replace(config, n_targets=max(4, round(config.n_targets * config.validation_share)))
        validation = write_targets(model, validation, config.direction, few)
    if not train or not validation:
        raise ValueError(
            f"train must have targets to learn from and to validate on, got {len(train)} and {len(validation)}. Give "
            "more prompts, or `validation`."
        )
    return list(train), list(validation)


def _parted(targets: Sequence[TokenTarget], config: TuneConfig) -> tuple[list[TokenTarget], list[TokenTarget]]:
    """A seeded fraction of the prompts held out, with all their targets."""
    prompts = list(dict.fromkeys(target.prompt for target in targets))
    random.Random(config.seed).shuffle(prompts)
    held = set(prompts[: min(max(1, round(len(prompts) * config.validation_share)), len(prompts) - 1)])
    return [t for t in targets if t.prompt not in held], [t for t in targets if t.prompt in held]


def _neutral_targets(model: Model, neutral: Sequence[str] | Sequence[Target], config: TuneConfig) -> list[Target]:
    """Targets for the KL term: those given, or the untuned model's answers to the prompts given."""
    if config.kl_weight == 0:
        return []
    prompts = [entry for entry in neutral if isinstance(entry, str)]
    given = [entry for entry in neutral if isinstance(entry, Target)]
    return given + (write_neutral(model, prompts, config) if prompts else [])
