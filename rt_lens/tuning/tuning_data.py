"""What a tuning run reads: targets as tokens, and everything about them that the untuned model computes once."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import pack
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformer_lens import HookedTransformer

from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.models.checksums import parameters_sha256
from rt_lens.models.context import token_context
from rt_lens.models.forward import bridge_logits, model_name, quick, unembed
from rt_lens.models.positions import numbers_in, position_of, rows_of
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode, pad_id_of
from rt_lens.models.tokens.chats import answered, end_ids, end_of_answer, tokenizer_of
from rt_lens.steering.edits import FwdHook
from rt_lens.tuning.activation_store import ActivationStore
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.direction_targets import DirectionTarget, KLThenSteer, ResolvedTarget, resolve_targets
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
        reference: the untuned model's final residual (a bridge's: logits) at the positions read; for the KL term only.
    """

    prompt: str
    tokens: Int[Tensor, "pos"]
    predicts: Bool[Tensor, "pos"]
    choices: Int[Tensor, "read k"]
    shares: Float[Tensor, "read k"]
    places: dict[str, Bool[Tensor, "pos"]] = field(default_factory=dict)
    prefix: Float[Tensor, "pos d_model"] | None = None
    reference: Float[Tensor, "read width"] | None = None


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
        )


def _filled(values: Tensor, k: int) -> Tensor:
    """With columns of zeros up to k: a token with share 0."""
    return torch.nn.functional.pad(values, (0, k - values.shape[1]))


@dataclass(frozen=True)
class TuningData:
    """All that a tuning run reads; runs that differ in weights of the losses, kinds, steps or seed can share it.

    Attributes:
        train: rows to learn from.
        held_out: rows for early stopping.
        neutral: rows for the KL term.
        centres: position and hook name -> the untuned model's mean activation there, over the training rows.
        first_block: the block that `prefix` stands before; 0 if the model runs from the beginning.
        model: name of the model that it was prepared with.
        direction: that the model wrote the targets for; None if they were given.
        weights: checksum of the model's weights, which all of this was computed from; empty if nobody checks it.
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
    steer: KLThenSteer | None = None,
    progress: bool = False,
    weights: str | None = None,
) -> TuningData:
    """Writes targets where pairs came, and runs the untuned model once over all that stays constant while tuning.

    Everything before the first trained block is constant: its residual is computed once and kept, so that each step
    starts there.

    Args:
        model: the untuned model.
        vectors: whose hook points are read.
        train: pairs, targets or choices to learn from.
        config: its layers, hook, positions, trained layers, prefix cache, and number and length of targets are used.
        validation: held-out pairs or targets; by default a share of the training topics.
        neutral: prompts or targets for the KL term.
        steer: steering that the losses are computed under; its layers are not cut off.
        progress: show bars.
        weights: checksum of the model's weights, where it is known already; read for None.

    Raises:
        ValueError: if there is nothing to train or validate on, or a position that a text has not.
    """
    readings, neutral = resolve_targets(model, vectors, config), neutral_list(neutral)
    _check_texts(train, validation, config, {reading.direction for reading in readings})
    targets, held_out = _targets(model, train, validation, config, progress)
    anchors = _anchors(model, neutral, config)
    first = _first_block(model, config, steer)
    places = sorted({reading.positions for reading in readings})
    rows = _rows(model, targets, places, first, config)
    return TuningData(
        train=rows,
        held_out=_rows(model, held_out, places, first, config),
        neutral=_rows(model, anchors, [], first, config, reference=True),
        centres=_centres(model, rows, readings, first, config),
        first_block=first,
        model=model_name(model),
        direction=config.direction if isinstance(train, ContrastPairs) else None,
        weights=parameters_sha256(model) if weights is None else weights,
    )


def unmixed(model: Model) -> AbstractContextManager[Any]:
    """Runs the model in its weights' own precision: both sides of the KL do, and mixed precision changes neither.

    In bfloat16 a row's logits depend on the rows beside it: an untouched model would be 0.0005 nats from itself.
    """
    return torch.autocast(torch.device(model.cfg.device).type, enabled=False)


def _first_block(model: Model, config: TuneConfig, steer: KLThenSteer | None) -> int:
    """The first block that training or steering changes anything in; 0 where the model cannot start later."""
    if config.prefix_cache == "off" or not isinstance(model, HookedTransformer):
        return 0
    return min([*config.blocks, *(steer.layers if steer else ())])


def _rows(
    model: Model, targets: Sequence[TokenTarget], places: Sequence[str], first: int, config: TuneConfig,
    *, reference: bool = False,
) -> list[Row]:  # fmt: skip
    """The targets as rows, with prefix and reference on shelves."""
    rows = [_row(model, target, places) for target in targets]
    where = "memory" if config.prefix_cache == "off" else config.prefix_cache
    prefixes = ActivationStore([len(row.tokens) for row in rows] if first else [], model.cfg, where)
    read_at = [int(row.predicts.sum()) for row in rows]
    finals = ActivationStore(read_at if reference and isinstance(model, HookedTransformer) else [], model.cfg, where)
    found: list[Row] = []
    for batch_rows, batch in _in_batches(model, rows):
        if first:
            with quick(model), unmixed(model):
                prefix = model(batch.tokens, attention_mask=batch.mask, stop_at_layer=first)
            batch_rows = [
                replace(row, prefix=prefixes.put(prefix[i, : len(row.tokens)])) for i, row in enumerate(batch_rows)
            ]
            batch = replace(batch, prefix=prefix)
        if reference:
            with unmixed(model):
                _, final = read(model, batch, [], first, final=True)
            assert final is not None
            parts = final.split([int(row.predicts.sum()) for row in batch_rows])
            if isinstance(model, HookedTransformer):
                parts = [finals.put(part) for part in parts]
            batch_rows = [replace(row, reference=part) for row, part in zip(batch_rows, parts, strict=True)]
        found += batch_rows
    return found


def _in_batches(model: Model, rows: Sequence[Row], size: int = 16) -> Iterator[tuple[list[Row], Batch]]:
    for start in range(0, len(rows), size):
        some = list(rows[start : start + size])
        yield some, Batch.of(some, pad_id_of(model), model.cfg.device)


def _centres(
    model: Model, rows: Sequence[Row], readings: Sequence[ResolvedTarget], first: int, config: TuneConfig
) -> dict[tuple[str, str], Tensor]:
    """Mean activations of the untuned model, over the training rows' positions read."""
    wanted = list(dict.fromkeys((reading.positions, name) for reading in readings for name in reading.names))
    wanted = [(place, name) for place, name in wanted if first <= layer_of(name)]
    if not config.centred or not wanted:
        return {}
    sums: dict[tuple[str, str], Tensor] = {}
    counts: dict[str, int] = {}
    names = list(dict.fromkeys(name for _, name in wanted))
    for _, batch in _in_batches(model, rows):
        found, _ = read(model, batch, names, first, final=False)
        for place, mask in batch.places.items():
            counts[place] = counts.get(place, 0) + int(mask.sum())
        for place, name in wanted:
            part = found[name][batch.places[place]].float().sum(0)
            sums[place, name] = sums[place, name] + part if (place, name) in sums else part
    return {key: summed / counts[key[0]] for key, summed in sums.items()}


def read(
    model: Model, batch: Batch, names: Sequence[str], first: int, *, final: bool, hooks: Sequence[FwdHook] = ()
) -> tuple[dict[str, Float[Tensor, "row pos d_model"]], Float[Tensor, "read width"] | None]:
    """Activations at hook points and, if wanted, the final residual (a bridge: logits) at the positions that predict.

    A HookedTransformer starts at block `first` where the batch has a prefix, and stops where nothing more is read.

    Args:
        hooks: edits to run under; `names` are read after them.
    """
    if not names and not final:
        return {}, None
    found: dict[str, Tensor] = {}

    def keeping(name: str) -> FwdHook:  # by the name asked for: a bridge calls its hook points by others
        def keep(activation: Tensor, hook: Any) -> None:
            found[name] = activation

        return name, keep

    everything = torch.ones_like(batch.mask)
    reading = model.hooks(fwd_hooks=[*hooks, *map(keeping, names)])
    with quick(model), reading, token_context(batch.mask) if hooks else nullcontext():
        if not isinstance(model, HookedTransformer):
            wanted = batch.predicts if final else torch.zeros_like(batch.predicts)
            logits = bridge_logits(model, batch.tokens, everything, wanted)
            return found, logits if final else None
        start, given = (None, batch.tokens) if batch.prefix is None else (first, batch.prefix)
        stop = model.cfg.n_layers if final else 1 + max(layer_of(name) for name in names)
        output = model(given, start_at_layer=start, stop_at_layer=stop, attention_mask=everything)
    return found, output[batch.predicts] if final else None


def logits_of(model: Model, final: Float[Tensor, "read width"]) -> Float[Tensor, "read d_vocab"]:
    """Logits of what `read` gave as final."""
    return unembed(model, final) if isinstance(model, HookedTransformer) else final


def _row(model: Model, target: TokenTarget, places: Sequence[str]) -> Row:
    prompt = encode(model, target.prompt) if target.prompt else []
    if isinstance(target, Choice):
        tokens, start = torch.tensor(prompt), len(prompt) - 1
        choices = torch.tensor([[_single(model, target.prompt, option) for option in target.options]])
        shares = torch.tensor([target.shares], dtype=torch.float32)
    else:
        tokens, start = torch.tensor(prompt + _answer_ids(model, target, prompt)), max(len(prompt) - 1, 0)
        choices = tokens[start + 1 :, None]
        shares = torch.ones(choices.shape)
    end = start + len(choices)
    if end <= start:
        raise ValueError(f"train: the target with prompt {target.prompt[:60]!r} has no answer. Fill it in.")
    predicts = torch.zeros(len(tokens), dtype=torch.bool)
    predicts[start:end] = True
    masks = {place: predicts if place == "response" else _mask(model, target, place, tokens) for place in places}
    return Row(target.prompt, tokens, predicts, choices, shares, masks)


def _answer_ids(model: Model, target: Target, prompt: list[int]) -> list[int]:
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


def _single(model: Model, prompt: str, option: str) -> int:
    # Where it follows: some tokenizers give " A" alone a token for its beginning more.
    before, after = encode(model, prompt), encode(model, answered(model, prompt, option))
    if len(after) != len(before) + 1 or after[:-1] != before:
        n = max(len(after) - len(before), 0)
        raise ValueError(
            f"options: {option!r} is {n} tokens of this model after {prompt[-20:]!r}; one is wanted. Give a shorter "
            "one, or mind its leading space."
        )
    return int(after[-1])


def _mask(model: Model, target: TokenTarget, place: str, tokens: Int[Tensor, "pos"]) -> Bool[Tensor, "pos"]:
    """Where a named position lies: in the answer for `mean response`, in all for `mean`, else in the prompt."""
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    start = len(encode(model, target.prompt)) if target.prompt else 0
    if place == "mean response":
        mask[start:] = True
    elif place == "mean":
        mask[:] = True
    else:
        (row,) = rows_of(model, [target.prompt])
        mask[numbers_in(row, position_of(place), f"the prompt {target.prompt[-40:]!r}")] = True
    if not mask.any():
        raise ValueError(f"positions: {place!r} names no token of the target with prompt {target.prompt[:60]!r}.")
    return mask


def _check_texts(train: Any, validation: Any, config: TuneConfig, directions: set[Direction]) -> None:
    """Refuses what is no text to learn from, and targets written one way for aims that all point another."""
    for name, given in (("train", train), ("validation", validation)):
        if given is None or isinstance(given, ContrastPairs):
            continue
        if not isinstance(given, Sequence) or not all(isinstance(each, Target | Choice) for each in given):
            raise ValueError(f"{name}: ContrastPairs, or a list of Target and Choice, is wanted.")
    if isinstance(train, ContrastPairs) and config.token_weight and config.direction not in directions:
        raise ValueError(
            f"direction: targets would be written for {config.direction!r}, and the aims point "
            f"{', '.join(sorted(directions))}. Set the TuneConfig's direction, or give targets."
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
            f"train: {len(train)} targets to learn from and {len(validation)} to validate on; both need some. Give "
            "more prompts, or `validation`."
        )
    return list(train), list(validation)


def _parted(targets: Sequence[TokenTarget], config: TuneConfig) -> tuple[list[TokenTarget], list[TokenTarget]]:
    """A seeded share of the prompts held out, with all their targets."""
    prompts = list(dict.fromkeys(target.prompt for target in targets))
    random.Random(config.seed).shuffle(prompts)
    held = set(prompts[: min(max(1, round(len(prompts) * config.validation_share)), len(prompts) - 1)])
    return [t for t in targets if t.prompt not in held], [t for t in targets if t.prompt in held]


def _anchors(model: Model, neutral: Sequence[str] | Sequence[Target], config: TuneConfig) -> list[Target]:
    """Neutral targets for the KL term: those given, or the untuned model's answers to the prompts given."""
    if config.kl_weight == 0:
        return []
    prompts = [entry for entry in neutral if isinstance(entry, str)]
    given = [entry for entry in neutral if isinstance(entry, Target)]
    return given + (write_neutral(model, prompts, config) if prompts else [])
