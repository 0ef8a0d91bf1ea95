"""Steering: operators bound to hook points, and generation under whatever hooks the model carries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from rt_lens.forward import KeyValueCache, can_be_quick, quick, unembed
from rt_lens.operators import Add
from rt_lens.tokens import chat_text, encode, has_chat_template, pad, pad_id_of, tokenizer_of
from rt_lens.vectors import SteeringVectors

FwdHook = tuple[str, Callable[..., Tensor]]


def add(
    vectors: SteeringVectors,
    layers: Iterable[int] | None = None,
    multiplier: float | Float[Tensor, "batch"] = 1.0,
    *,
    hook: str = "resid_post",
) -> list[FwdHook]:
    """Hooks that add `multiplier` times a block's vector to its activations at every position.

    Args:
        vectors: the directions.
        layers: block indices; all blocks that have a vector for None.
        multiplier: in units of the vector's own length; negative steers the other way. A tensor with one number per
            row makes one batch a dose-response.
        hook: kind of hook point.

    Returns:
        `(hook name, function)` pairs for `model.hooks(fwd_hooks=...)`; lists add up.

    Raises:
        ValueError: if a layer has no vector, or the multiplier is not finite.

    Example:
        >>> with model.hooks(fwd_hooks=add(vectors, layers=[18], multiplier=2.0)):
        ...     print(generate(model, ["Tell me about your weekend."]))
    """
    if not torch.isfinite(torch.as_tensor(multiplier)).all():
        raise ValueError(f"multiplier: {multiplier} came; finite numbers are wanted.")
    return [(name, _bound(Add(vector, multiplier))) for name, vector in vectors.at_layers(layers, hook).items()]


def _bound(operator: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """An operator as TransformerLens calls it."""

    def edit(activation: Tensor, hook: Any) -> Tensor:
        return operator(activation)

    return edit


def as_chat(model: Any, prompts: Sequence[str], *, system: str = "") -> list[str]:
    """User messages through the chat template; left as they are if there is none, or they went through already."""
    if not has_chat_template(model):
        return list(prompts)
    special = tuple(str(token) for token in tokenizer_of(model).all_special_tokens)
    return [text if text.startswith(special) else chat_text(model, text, system=system) for text in prompts]


def generate(
    model: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> list[str]:
    """Answers to prompts, in batches, with a key-value cache, under whatever hooks the model carries.

    The batch size changes nothing: padding is on the left with its mask and positions, and each prompt draws from a
    random stream of its own, by its number in the list. Prompts that fit one batch are its rows in order.

    Args:
        model: HookedTransformer or TransformerBridge.
        prompts: user messages, put through the chat template; texts that begin with a special token are taken as they
            are.
        max_new_tokens: at most so many tokens each; a row ends at the tokenizer's end-of-text.
        temperature: 0 for the most likely token, else softmax temperature.
        seed: of the sampling.
        batch_size: prompts per batch.
        progress: show a bar.

    Returns:
        The new text of each prompt, in order.

    Raises:
        ValueError: if there is no prompt, a number is out of range, or the texts exceed the model's context.
    """
    if max_new_tokens < 1 or not temperature >= 0 or batch_size < 1:  # `not >=` catches NaN too
        came = f"max_new_tokens {max_new_tokens}, temperature {temperature}, batch_size {batch_size}"
        raise ValueError(f"generate: {came} came; at least 1, 0 and 1 are wanted.")
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts: a list of at least one text is wanted. Put a single text in brackets.")
    tokenizer = tokenizer_of(model)
    encoded = [encode(model, text) for text in as_chat(model, prompts)]
    order = list(range(len(encoded)))
    if len(order) > batch_size:  # prompts that fit one batch stay in order, so that hooks may act by row
        order.sort(key=lambda i: -len(encoded[i]))
    answers = [""] * len(encoded)
    with tqdm(total=len(order), desc="generating", unit="answer", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            new = generate_tokens(model, [encoded[i] for i in rows], max_new_tokens, temperature, seed, rows)
            for row, ids in zip(rows, new, strict=True):
                answers[row] = tokenizer.decode(ids, skip_special_tokens=True)
            bar.update(len(rows))
    return answers


@torch.no_grad()
def generate_tokens(
    model: Any,
    encoded: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    streams: Sequence[int] | None = None,
) -> list[list[int]]:
    """New token ids for one batch, whose rows stay in order (so that hooks may act by row).

    Args:
        model: HookedTransformer or TransformerBridge.
        encoded: token ids of each prompt.
        max_new_tokens: at most so many new tokens a row.
        temperature: 0 for greedy.
        seed: of the sampling.
        streams: number of each row's random stream; its place in the batch by default.
    """
    longest = max(len(ids) for ids in encoded)
    if longest + max_new_tokens > model.cfg.n_ctx:
        raise ValueError(
            f"prompts: {longest} tokens and {max_new_tokens} new ones exceed the context of "
            f"{model.cfg.n_ctx}. Shorten the prompt or max_new_tokens."
        )
    shared = _shared_beginning(model, encoded)
    batch = pad([ids[shared:] for ids in encoded], pad_id_of(model)).to(model.cfg.device)
    draws = _draws(seed, streams if streams is not None else range(len(encoded)), max_new_tokens)
    ends = _end_ids(model)
    done = torch.zeros(len(encoded), dtype=torch.bool)
    columns: list[Int[Tensor, "batch"]] = []
    step = _stepper(model, encoded[0][:shared], len(encoded), longest + max_new_tokens)
    tokens, mask = batch.tokens, batch.mask
    for place in range(max_new_tokens):
        logits = step(tokens, mask)
        chosen = _choose(logits, temperature, draws[:, place])
        columns.append(chosen.cpu())
        done |= torch.isin(columns[-1], ends)
        if done.all():
            break
        tokens, mask = chosen[:, None], torch.ones_like(chosen)[:, None]
    return [_until_end(row, ends) for row in torch.stack(columns, 1).tolist()]


def _shared_beginning(model: Any, encoded: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share (a template's system text, say) and can be run once for the batch.

    None under hooks: they may act by row, and would meet a single one.
    """
    if not can_be_quick(model) or len(encoded) == 1 or any(point._forward_hooks for point in model.hook_points()):
        return 0
    most = min(len(ids) for ids in encoded) - 1  # each row needs a token of its own to go on from
    columns = itertools.islice(zip(*encoded, strict=False), most)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _stepper(
    model: Any, shared: Sequence[int], rows: int, longest: int
) -> Callable[[Tensor, Tensor], Float[Tensor, "batch d_vocab"]]:
    """A function that takes new tokens with their mask and gives the logits after them, keeping a key-value cache.

    Args:
        model: HookedTransformer or TransformerBridge.
        shared: token ids that every row begins with, run here once.
        rows: of the batch.
        longest: most tokens that a row will hold.
    """
    if not isinstance(model, HookedTransformer):
        return _bridge_stepper(model)
    cache: Any
    if can_be_quick(model):
        cache = KeyValueCache(model, rows, longest)
    else:
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, rows)

    def step(tokens: Tensor, mask: Tensor, into: Any = cache) -> Tensor:
        with quick(model):
            residual = model(tokens, attention_mask=mask, past_kv_cache=into, stop_at_layer=model.cfg.n_layers)
            return unembed(model, residual[:, -1])

    if shared:
        beginning = torch.tensor([list(shared)], device=model.cfg.device)
        once = KeyValueCache(model, 1, len(shared))
        step(beginning, torch.ones_like(beginning), once)
        cache.start_from(once)
    return step


def _bridge_stepper(model: Any) -> Callable[[Tensor, Tensor], Float[Tensor, "batch d_vocab"]]:
    state: dict[str, Any] = {"cache": None, "mask": None}

    def step(tokens: Tensor, mask: Tensor) -> Tensor:
        state["mask"] = mask if state["mask"] is None else torch.cat([state["mask"], mask], dim=1)
        past = {} if state["cache"] is None else {"past_key_values": state["cache"]}
        logits, state["cache"] = model(
            tokens, attention_mask=state["mask"], return_type="logits_and_cache", use_cache=True, **past
        )
        return logits[:, -1]

    return step


def _draws(seed: int, streams: Iterable[int], n: int) -> Float[Tensor, "batch n"]:
    """Uniform numbers, a stream for each prompt, so that a batch draws what singles draw."""
    rows = [torch.rand(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + stream)) for stream in streams]
    return torch.stack(rows)


def _choose(logits: Float[Tensor, "batch d_vocab"], temperature: float, draw: Float[Tensor, "batch"]) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    return torch.searchsorted(cumulative, draw.to(cumulative)[:, None] * cumulative[:, -1:]).squeeze(1)


def _end_ids(model: Any) -> Int[Tensor, "n"]:
    """Ids that end an answer: the tokenizer's end-of-text, and the end of a chat turn where that is another token."""
    tokenizer = tokenizer_of(model)
    marks = {tokenizer.eos_token_id}
    vocabulary = tokenizer.get_vocab()
    marks |= {vocabulary.get(turn) for turn in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")}
    return torch.tensor(sorted(mark for mark in marks if mark is not None), dtype=torch.long)


def _until_end(ids: list[int], ends: Tensor) -> list[int]:
    stops = set(ends.tolist())
    return ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]
