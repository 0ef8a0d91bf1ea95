"""Contrast pairs in, steering vectors out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.common.inputs import text_list
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.models.activations import check_hook_names, read_activations
from rt_lens.models.forward import check_layers, dtype_name, model_name
from rt_lens.models.positions import OF_A_PAIR, Named, Position, Row, numbers_in, position_of, rows_of
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import ChatText
from rt_lens.vectors.methods import METHODS, Method, covariate_direction, fit_eraser, fit_transport, winsorise
from rt_lens.vectors.operators import Transport
from rt_lens.vectors.steering_vectors import Eraser, Provenance, SteeringVectors, hook_names, layer_of


def package_version() -> str:
    """Version of rt_lens, or `source` where it is not installed."""
    try:
        return version("rt_lens")
    except PackageNotFoundError:
        return "source"


@dataclass(frozen=True)
class Sides:
    """Activations of the two sides of contrast pairs at one position.

    Attributes:
        positive: hook name -> Float[Tensor, "pair *heads d"].
        negative: the same of the other side.
        words: what the position means.
        tokens: the tokens read in the first pair's positive side.
        alike: whether the sides of every pair are the same, token by token, up to what is read: activations then differ
            by rounding only.
        prompts_sha256: checksum of the texts as the model read them.
    """

    positive: dict[str, Float[Tensor, "pair *heads d"]]
    negative: dict[str, Float[Tensor, "pair *heads d"]]
    words: str
    tokens: tuple[str, ...]
    alike: bool
    prompts_sha256: str = ""


def extract_vectors(
    model: Model,
    pairs: ContrastPairs,
    *,
    method: str | Method = "mean_diff",
    position: str | int | Position = "last",
    layers: Iterable[int] | None = None,
    hook: str = "resid_post",
    norm: Literal["keep", "unit"] = "keep",
    winsorised: float = 0.0,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> SteeringVectors:
    """Steering vectors of contrast pairs, one for each block (at `attn.hook_z`, one for each head).

    Args:
        model: HookedTransformer or TransformerBridge.
        pairs: the vectors capture whatever differs between the two sides.
        method: `mean_diff`, `pca`, `pca_centred`, `logistic`, `mass_mean`, `random`, `leace` (with its erasers), or a
            function from the two sides' activations to a direction. All built-in methods are scaled to the norm of the
            mean difference.
        position: the token that is read: `last`, `first`, `mean`, `mean prompt`, `mean response`, `mean last 5`,
            `mean "some words"`, a token index, or a function; `rt_lens.models.positions` defines the words.
        layers: block indices. Defaults to all.
        hook: kind of hook point: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, or `z` by head.
        norm: `keep` leaves the method's norm, `unit` gives length 1.
        winsorised: fraction of the pairs' differences clipped at each tail, per dimension.
        batch_size: texts per forward pass; it changes nothing but speed.
        seed: seed for the method `random`; kept in the provenance.
        progress: show a bar.

    Returns:
        Vectors keyed by hook name. Built-in methods give the mean difference's norm (unless norm="unit"), so a
        multiplier of 1 adds one mean-difference norm.

    Raises:
        ValueError: unknown method, position, layer or hook point, sides that are the same, or a position that a text
            does not have.

    Example:
        >>> vectors = extract_vectors(model, load_pairs("mood").sample(8), layers=[18, 21])
        >>> vectors.hook_names
        ['blocks.18.hook_resid_post', 'blocks.21.hook_resid_post']
        >>> vectors.provenance.method, vectors.provenance.position_tokens  # what was read, in the first pair
        ('mean_diff', ...)
    """
    find, label = method_of(method, seed)
    if norm not in ("keep", "unit"):
        raise ValueError(f"norm must be 'keep' or 'unit', got {norm!r}.")
    if not 0 <= winsorised < 0.5:
        raise ValueError(f"winsorised must be at least 0 and below 0.5, got {winsorised}. Try 0.02.")
    names = hook_names(check_layers(model, layers), hook)
    read_at = position_of(position)
    (sides,) = read_sides(
        model, pairs, names, [read_at], batch_size=batch_size, progress=progress
    )  # fmt: skip
    return vectors_of(sides, find, provenance_of(model, pairs, sides, label, seed), winsorised, norm == "unit")


def extract_transport(
    model: Model,
    pairs: ContrastPairs,
    *,
    toward: Literal["positive", "negative"] = "positive",
    position: str | int | Position = "last",
    layers: Iterable[int] | None = None,
    hook: str = "resid_post",
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, Transport]:
    """Maps of each coordinate from one side's activations to the other's, for `rtl.steering.transport` (Linear-AcT).

    Args:
        model: HookedTransformer or TransformerBridge.
        pairs: contrast pairs.
        toward: the side that is moved to; the other is moved from.
        position: the token that is read, as for `extract_vectors`.
        layers: block indices. Defaults to all.
        hook: kind of hook point, as for `extract_vectors`.
        batch_size: texts per forward pass; it changes nothing but speed.
        progress: show a bar.

    Returns:
        Hook name -> Transport.

    Raises:
        ValueError: as `extract_vectors`.

    Example:
        >>> maps = extract_transport(model, train.sample(8), layers=[21])
        >>> maps["blocks.21.hook_resid_post"].omega.shape
        torch.Size([576])
    """
    if toward not in ("positive", "negative"):
        raise ValueError(f"toward must be 'positive' or 'negative', got {toward!r}.")
    names = hook_names(check_layers(model, layers), hook)
    (sides,) = read_sides(model, pairs, names, [position_of(position)], batch_size=batch_size, progress=progress)
    _refuse_alike(sides, pairs.name)
    source, target = (
        (sides.negative, sides.positive) if toward == "positive" else (sides.positive, sides.negative)
    )  # fmt: skip
    return {name: _transport(source[name].float(), target[name].float()) for name in names}


def _transport(source: Float[Tensor, "pair *heads d"], target: Float[Tensor, "pair *heads d"]) -> Transport:
    omega, beta = fit_transport(source.flatten(1), target.flatten(1))
    return Transport(omega.reshape(source.shape[1:]), beta.reshape(source.shape[1:]))


def extract_offsets(
    model: Model,
    pairs: ContrastPairs,
    last: int = 22,
    *,
    method: str | Method = "mean_diff",
    layers: Iterable[int] | None = None,
    hook: str = "resid_post",
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> dict[int, SteeringVectors]:
    """Steering vectors at each of the last tokens separately, from one reading (Ackerman 2024 uses 22).

    Keeps all activations in memory: 8 bytes x pairs x `last` x blocks x d_model.

    Returns:
        Token index from the end (-1, -2, ...) -> vectors, without those at which the two sides are the same.

    Raises:
        ValueError: as `extract_vectors`; also if a text is shorter than `last`.

    Example:
        >>> by_token = extract_offsets(model, train.sample(4), last=3, layers=[21])
        >>> list(by_token), by_token[-2].provenance.position
        ([-1, -2, -3], ...token 2 from the end of the chat prompt...)
    """
    find, label = method_of(method, seed)
    if last < 1:
        raise ValueError(f"last must be a number of tokens of at least 1, got {last}.")
    names = hook_names(check_layers(model, layers), hook)
    positions = [position_of(-number) for number in range(1, last + 1)]
    read = read_sides(model, pairs, names, positions, batch_size=batch_size, progress=progress)
    return {
        -number: vectors_of(sides, find, provenance_of(model, pairs, sides, label, seed))
        for number, sides in enumerate(read, start=1)
        if not sides.alike
    }


def covariate_vectors(
    model: Model,
    texts: Iterable[str],
    values: Sequence[float] | Literal["length"] = "length",
    *,
    name: str = "",
    position: str | int | Position = "last",
    layers: Iterable[int] | None = None,
    hook: str = "resid_post",
    batch_size: int = 32,
) -> SteeringVectors:
    """How activations move with a number of each text: a nuisance to project out with `vectors.without(...)`.

    Args:
        model: HookedTransformer or TransformerBridge.
        texts: through the chat template already, for example `pairs.texts(model).positive`.
        values: one number for each text (1 where the answer letter is A, 0 where it is B), or `length` in tokens.
        name: what the numbers are; `length` by default where they are that.
        position: as for `extract_vectors`.
        layers: block indices. Defaults to all.
        hook: kind of hook point.
        batch_size: texts per forward pass.

    Raises:
        ValueError: if the values are not as many as the texts, or all the same.

    Example:
        >>> length = covariate_vectors(model, train.texts(model).positive, layers=[21])
        >>> without_length = vectors.select([21]).without(length)
        >>> abs(without_length.cosine(length)["blocks.21.hook_resid_post"]) < 1e-4
        True
    """
    names = hook_names(check_layers(model, layers), hook)
    check_hook_names(model, names)
    read_at = position_of(position)
    if isinstance(values, str) and values != "length":
        raise ValueError(f"values must be 'length' or one number for each text, got {values!r}.")
    texts = text_list(texts, "texts", blank=True)
    numbers = [len(encode(model, text)) for text in texts] if isinstance(values, str) else list(values)
    if len(numbers) != len(texts):
        raise ValueError(f"values must be one number for each text, got {len(numbers)} for {len(texts)} texts.")
    reads = [[numbers_in(row, read_at, f"text {i}")] for i, row in enumerate(rows_of(model, texts))]
    activations = read_activations(model, texts, names, reads, batch_size=batch_size)
    y = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    slope = partial(covariate_direction, values=y)
    slopes = {hook_name: _by_head(lambda head: slope, h[:, 0]) for hook_name, h in activations.items()}
    provenance = Provenance(
        model_name(model), name or ("length" if isinstance(values, str) else "covariate"), "covariate", read_at.meaning,
        "none", len(texts), "", 0, package_version(), dtype=dtype_name(model),
    )  # fmt: skip
    return SteeringVectors(slopes, provenance)


def read_sides(
    model: Model,
    pairs: ContrastPairs,
    names: Sequence[str],
    positions: Sequence[Named],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Sides]:
    """Activations of both sides of the pairs at several positions, from one run of each text."""
    check_hook_names(model, names)
    texts = pairs.texts(model)
    both = texts.positive + texts.negative
    prefills = [pair.sides[side][2] for side in (0, 1) for pair in pairs.pairs]
    ends = [
        text.answer_at if isinstance(text, ChatText) else len(text) - len(prefill)
        for text, prefill in zip(both, prefills, strict=True)
    ]
    rows = rows_of(model, both, ends)
    n = len(pairs)
    reads = [
        [numbers_in(row, at, f"text {i % n} of the {'positive' if i < n else 'negative'} side") for at in positions]
        for i, row in enumerate(rows)
    ]
    activations = read_activations(
        model, both, names, reads, batch_size=batch_size, progress=progress
    )  # fmt: skip
    prompts = hashlib.sha256("\0".join(both).encode()).hexdigest()
    return [
        Sides(
            {name: h[:n, read] for name, h in activations.items()},
            {name: h[n:, read] for name, h in activations.items()},
            f"{position.meaning}{OF_A_PAIR}",
            tuple(rows[0].labels[number] for number in reads[0][read]),
            all(_seen(rows[i], reads[i][read]) == _seen(rows[n + i], reads[n + i][read]) for i in range(n)),
            prompts,
        )
        for read, position in enumerate(positions)
    ]


def _seen(row: Row, numbers: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    """What a causal model has seen at the tokens read, and which these are."""
    return row.ids[: max(numbers) + 1], sorted(numbers)


def vectors_of(
    sides: Sides,
    find: Callable[[str, int], Method],
    provenance: Provenance,
    winsorised: float = 0.0,
    unit: bool = False,
) -> SteeringVectors:
    """One method's vectors of activations read before."""
    _refuse_alike(sides, provenance.behaviour)
    vectors, erasers = {}, {}
    for name, positive in sides.positive.items():
        negative = sides.negative[name]
        try:
            if winsorised:
                positive = negative + _by_head(lambda head: partial(winsorise, share=winsorised), positive - negative)
            vectors[name] = _by_head(partial(find, name), positive, negative)
            if provenance.method == "leace":
                erasers[name] = Eraser(*_parts_by_head(positive, negative))
        except ValueError as error:
            raise ValueError(
                f"pairs {provenance.behaviour!r}, {sides.words}, at {name}: {error} Or leave this layer out with "
                "layers=."
            ) from None
    if winsorised:
        provenance = replace(provenance, method=f"{provenance.method}, winsorised {winsorised:g}")
    extracted = SteeringVectors(vectors, provenance, erasers)
    return replace(extracted.unit(), erasers=erasers) if unit else extracted


def _refuse_alike(sides: Sides, behaviour: str) -> None:
    if sides.alike:
        raise ValueError(
            f"pairs must differ between their sides, but in {behaviour!r} the two sides are the same, token by token, "
            f"up to the {sides.words}, so there is no direction. Give pairs whose sides differ, or read later tokens."
        )


def _by_head(of: Callable[[int], Callable[..., Tensor]], *activations: Float[Tensor, "text *heads d"]) -> Tensor:
    """One head's function of activations [text, d], for every head where there are heads, which stay the axis "
    "before d."""
    if activations[0].ndim == 2:
        return of(0)(*activations)
    heads = range(activations[0].shape[1])
    return torch.stack([of(head)(*(h[:, head] for h in activations)) for head in heads], dim=-2)


def _parts_by_head(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if positive.ndim == 2:
        return fit_eraser(positive, negative)
    parts = [fit_eraser(positive[:, head], negative[:, head]) for head in range(positive.shape[1])]
    left, right, centre = (torch.stack(part) for part in zip(*parts, strict=True))
    return left, right, centre


def method_of(method: str | Method, seed: int) -> tuple[Callable[[str, int], Method], str]:
    """A function from hook name and head to method, and its name; `random` draws anew at each block and head."""
    if callable(method):
        return (lambda name, head: method), getattr(method, "__name__", repr(method))
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, or a function, got {method!r}.")
    return (lambda name, head: METHODS[method](1_000_000 * seed + 1000 * layer_of(name) + head)), method


def provenance_of(model: Model, pairs: ContrastPairs, sides: Sides, method: str, seed: int) -> Provenance:
    """What the vectors of these sides are and how they were made."""
    return Provenance(
        model=model_name(model),
        behaviour=pairs.name,
        method=method,
        position=sides.words,
        processing="none",
        n_pairs=len(pairs),
        data_sha256=pairs.sha256,
        seed=seed,
        version=package_version(),
        position_tokens=sides.tokens,
        prompts_sha256=sides.prompts_sha256,
        dtype=dtype_name(model),
    )
