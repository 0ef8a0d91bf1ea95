"""What a tuning run reads: target answers, and everything about them that the untuned model computes once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import pack
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformer_lens import HookedTransformer

from rt_lens.forward import quick, unembed
from rt_lens.generation import generate
from rt_lens.losses import Direction
from rt_lens.prompts import ContrastPairs
from rt_lens.tokens import chat_text, encode, pad_id_of, tokenizer_of
from rt_lens.tuning.config import TuneConfig
from rt_lens.vectors import SteeringVectors


@dataclass(frozen=True)
class Target:
    """A prompt and the answer that the model is to learn, as texts."""

    prompt: str
    answer: str


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
    answers = _answers(model, asked, config, progress)
    plain = [chat_text(model, pair.user) for pair in chosen]
    return [Target(prompt, answer) for prompt, answer in zip(plain, answers, strict=True) if answer.strip()]


def write_neutral(model: Any, prompts: Sequence[str], config: TuneConfig) -> list[Target]:
    """The untuned model's answers to neutral prompts: where the KL term holds the tuned model to it."""
    asked = [chat_text(model, prompt) for prompt in prompts]
    answers = _answers(model, asked, config, progress=False)
    return [Target(prompt, answer) for prompt, answer in zip(asked, answers, strict=True) if answer.strip()]


def _answers(model: Any, texts: Sequence[str], config: TuneConfig, progress: bool) -> list[str]:
    return generate(
        model, texts, chat=False, max_new_tokens=config.target_tokens, temperature=config.target_temperature,
        seed=config.seed, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One target as tokens, with what the untuned model computed for it.

    Attributes:
        tokens: Int[Tensor, "pos"], prompt and answer.
        reads: Bool[Tensor, "pos"], positions whose next token belongs to the answer.
        prefix: residual before the first trained block; None where the model cannot start there.
        reference: the untuned model's final residual (a bridge's: logits) at the positions read; for the KL term only.
    """

    tokens: Int[Tensor, "pos"]
    reads: Bool[Tensor, "pos"]
    prefix: Float[Tensor, "pos d_model"] | None = None
    reference: Float[Tensor, "read width"] | None = None


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, where a causal model needs no mask.

    Attributes:
        tokens: Int[Tensor, "row pos"].
        reads: Bool[Tensor, "row pos"].
        prefix: Float[Tensor, "row pos d_model"] or None.
        reference: Float[Tensor, "read width"], of all rows in order, or None.
    """

    tokens: Int[Tensor, "row pos"]
    reads: Bool[Tensor, "row pos"]
    prefix: Float[Tensor, "row pos d_model"] | None
    reference: Float[Tensor, "read width"] | None

    @classmethod
    def of(cls, rows: Sequence[Row], pad_id: int) -> Batch:
        prefixes = [row.prefix for row in rows if row.prefix is not None]
        references = [row.reference for row in rows if row.reference is not None]
        return cls(
            pad_sequence([row.tokens for row in rows], batch_first=True, padding_value=pad_id),
            pad_sequence([row.reads for row in rows], batch_first=True),
            pad_sequence(prefixes, batch_first=True) if prefixes else None,
            pack(references, "* width")[0] if references else None,
        )


@dataclass(frozen=True)
class Material:
    """All that a tuning run reads; runs that differ in weights of the losses, steps or seed can share it.

    Attributes:
        train: rows to learn from.
        held_out: rows for early stopping.
        neutral: rows for the KL term.
        centres: hook name -> the untuned model's mean activation over the training rows' positions read.
        first_block: the block that `prefix` stands before.
    """

    train: list[Row]
    held_out: list[Row]
    neutral: list[Row]
    centres: dict[str, Float[Tensor, "d_model"]]
    first_block: int


@torch.no_grad()
def prepare(
    model: Any,
    vectors: SteeringVectors,
    train: ContrastPairs | Sequence[Target],
    config: TuneConfig,
    *,
    validation: ContrastPairs | Sequence[Target] | None = None,
    neutral: Sequence[str] | Sequence[Target] = (),
    progress: bool = False,
) -> Material:
    """Writes targets where pairs came, and runs the untuned model once over all that stays constant while tuning.

    Args:
        model: the untuned model.
        vectors: whose hook points are read.
        train: pairs or targets to learn from.
        config: its `direction`, `layers`, `trained_layers`, `hook`, and number and length of targets are used.
        validation: held-out pairs or targets; by default a share of the training topics.
        neutral: prompts or targets for the KL term.
        progress: show bars.

    Raises:
        ValueError: if there is nothing to train or validate on.
    """
    targets, held_out = _targets(model, train, validation, config, progress)
    anchors = _anchors(model, neutral, config)
    first = min(config.blocks) if isinstance(model, HookedTransformer) else 0
    names = list(vectors.at_layers(config.layers, config.hook))
    rows, sums, count = [], {name: torch.zeros(vectors.d_model, device=model.cfg.device) for name in names}, 0
    for batch_rows, found in _untuned_pass(model, targets, first, names):
        rows += batch_rows
        count += sum(int(row.reads.sum()) for row in batch_rows)
        for name in names:
            sums[name] += found[name].sum(0)
    return Material(
        train=rows,
        held_out=[row for batch_rows, _ in _untuned_pass(model, held_out, first, []) for row in batch_rows],
        neutral=[
            row for batch_rows, _ in _untuned_pass(model, anchors, first, [], reference=True) for row in batch_rows
        ],
        centres={name: summed / count for name, summed in sums.items()},
        first_block=first,
    )


def _untuned_pass(
    model: Any, targets: Sequence[Target], first: int, names: Sequence[str], *, reference: bool = False, size: int = 16
) -> Iterator[tuple[list[Row], dict[str, Tensor]]]:
    """Batches of rows with their prefix (and reference), and the activations at `names`, at the positions read."""
    pad_id = pad_id_of(model)
    for start in range(0, len(targets), size):
        rows = [_row(model, target) for target in targets[start : start + size]]
        batch = Batch.of(rows, pad_id)
        if first > 0:
            with quick(model):
                prefix = model(batch.tokens, attention_mask=torch.ones_like(batch.tokens), stop_at_layer=first)
            rows = [replace(row, prefix=prefix[i, : len(row.tokens)]) for i, row in enumerate(rows)]
            batch = replace(batch, prefix=prefix)
        found, final = read(model, batch, names, first, final=reference)
        if reference:
            assert final is not None
            parts = final.split([int(row.reads.sum()) for row in rows])
            rows = [replace(row, reference=part) for row, part in zip(rows, parts, strict=True)]
        yield rows, found


def read(
    model: Any, batch: Batch, names: Sequence[str], first: int, *, final: bool
) -> tuple[dict[str, Float[Tensor, "read d_model"]], Float[Tensor, "read width"] | None]:
    """Activations at hook points and, if wanted, the final residual (a bridge: logits), at the positions read.

    A HookedTransformer starts at block `first` where the batch has a prefix, and stops where nothing more is read.
    """
    if not names and not final:
        return {}, None
    found: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        found[_alias(hook.name, names)] = activation[batch.reads]

    everything = torch.ones_like(batch.tokens)
    with quick(model), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        if not isinstance(model, HookedTransformer):
            output = model(batch.tokens, attention_mask=everything)
        else:
            start, given = (None, batch.tokens) if batch.prefix is None else (first, batch.prefix)
            stop = model.cfg.n_layers if final else 1 + max(int(name.split(".")[1]) for name in names)
            output = model(given, start_at_layer=start, stop_at_layer=stop, attention_mask=everything)
    return found, output[batch.reads] if final else None


def logits_of(model: Any, final: Float[Tensor, "read width"]) -> Float[Tensor, "read d_vocab"]:
    """Logits of what `read` gave as final."""
    return unembed(model, final) if isinstance(model, HookedTransformer) else final


def _alias(name: str | None, wanted: Collection[str]) -> str:
    """The asked-for name of a hook point: a bridge calls hooks by its canonical name, with the same block number."""
    if name is not None and name in wanted:
        return name
    block = f"blocks.{str(name).split('.')[1]}."
    return next(alias for alias in wanted if alias.startswith(block))


def _row(model: Any, target: Target) -> Row:
    prompt = encode(model, target.prompt)
    answer = tokenizer_of(model).encode(target.answer, add_special_tokens=False)  # it follows, so no start token
    tokens = torch.tensor(prompt + answer, device=model.cfg.device)
    reads = torch.zeros_like(tokens, dtype=torch.bool)
    reads[len(prompt) - 1 : -1] = True
    return Row(tokens, reads)


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
