"""Faster forward passes with the same results and the same hooks. Knows no steering and no tuning.

`quick(model)` replaces the attention of a HookedTransformer by one that computes masks and rotary angles once per
forward pass instead of once per layer, uses torch's fused attention, and appends to a preallocated key-value cache.
Every hook point is still called. The fused kernel never forms attention scores or patterns, so a layer with a hook on
either runs TransformerLens's own code. Models of another kind run unchanged.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from rt_lens.models.protocol import Model


class CacheSlot:
    """Keys and values of one layer; keys are stored with their rotation already applied."""

    def __init__(self, batch: int, capacity: int, n_heads: int, d_head: int, like: Tensor) -> None:
        self._keys = like.new_empty(batch, capacity, n_heads, d_head)
        self._values = torch.empty_like(self._keys)
        self.length = 0

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self._keys, self._values

    @property
    def past_keys(self) -> Float[Tensor, "batch past head d_head"]:
        return self._keys[:, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + keys.shape[1]
        self._keys[:, self.length : end] = keys
        self._values[:, self.length : end] = values
        self.length = end
        return self._keys[:, :end], self._values[:, :end]


class KeyValueCache:
    """A preallocated key-value cache that `HookedTransformer.forward` takes as `past_kv_cache`, inside `quick`."""

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        cfg, like = model.cfg, next(model.parameters()).detach()
        heads = cfg.n_key_value_heads or cfg.n_heads
        self.batch = batch
        self.slots = [CacheSlot(batch, capacity, heads, cfg.d_head, like) for _ in range(cfg.n_layers)]
        self.mask = torch.empty(batch, 0, dtype=torch.long, device=like.device)

    def __getitem__(self, layer: int) -> CacheSlot:
        return self.slots[layer]

    def start_from(self, prefix: KeyValueCache) -> None:
        """Starts every row with the keys and values of one row: the prefix that all prompts share."""
        for slot, shared in zip(self.slots, prefix.slots, strict=True):
            slot.append(*(part[:, : shared.length].expand(self.batch, -1, -1, -1) for part in shared.pair))
        self.mask = prefix.mask.expand(self.batch, -1)

    def branch(self, model: Model, rows: list[int], room: int) -> KeyValueCache:
        """A new cache whose row i continues row `rows[i]` of this one, with room for `room` more tokens."""
        branched = KeyValueCache(model, len(rows), self.mask.shape[1] + room)
        for slot, source in zip(branched.slots, self.slots, strict=True):
            slot.append(*(part[rows, : source.length] for part in source.pair))
        branched.mask = self.mask[rows]
        return branched

    def append_attention_mask(self, mask: Int[Tensor, "batch new"]) -> Int[Tensor, "batch pos"]:
        self.mask = torch.cat([self.mask, mask], dim=1)
        return self.mask


@dataclass
class _Frame:
    """What all layers of one forward pass share: its mask, rotary angles, and which positions may attend to which."""

    layer: int
    made_for: Tensor | None
    shape: tuple[int, int, int]
    cos: Tensor
    sin: Tensor
    allowed: Tensor | None
    causal: bool


def can_be_quick(model: Model | torch.nn.Module) -> bool:
    """True if `quick` covers this model: a HookedTransformer with rotary embeddings and plain causal attention."""
    if not isinstance(model, HookedTransformer):
        return False
    cfg = model.cfg
    unusual = (
        cfg.use_attn_result, cfg.use_split_qkv_input, cfg.use_attn_in, cfg.ungroup_grouped_query_attention,
        cfg.use_local_attn, cfg.use_qk_norm, cfg.load_in_4bit, cfg.scale_attn_by_inverse_layer_idx,
        cfg.use_dynamic_ntk_rope, cfg.use_logn_attn, cfg.use_attention_sinks, cfg.rotary_adjacent_pairs,
        cfg.attn_scores_soft_cap > 0, cfg.clip_qkv is not None, cfg.n_devices > 1,
    )  # fmt: skip
    attention = model.blocks[0].attn
    plain = cfg.positional_embedding_type == "rotary" and cfg.attention_dir == "causal" and attention.q_norm is None
    return plain and cfg.rotary_dim == cfg.d_head and not any(unusual)


@contextmanager
def quick(model: Any) -> Iterator[Any]:
    """Context manager under which the model's attention runs faster; hooks, weights and results stay the same.

    Blocks may be nested. On exit, and on any exception, the model is as before.

    Example:
        >>> tokens = model.to_tokens("Rain is wet.")
        >>> with quick(model):
        ...     logits = model(tokens)
        >>> (logits - model(tokens)).abs().max().item() < 1e-3
        True
    """
    if not can_be_quick(model) or any("forward" in vars(block.attn) for block in model.blocks):
        yield model
        return
    shared: list[_Frame] = []
    try:
        for block in model.blocks:
            block.attn.forward = partial(_attention, block.attn, shared)
        yield model
    finally:
        for block in model.blocks:
            vars(block.attn).pop("forward", None)


def _attention(
    attn: Any,
    shared: list[_Frame],
    query_input: Float[Tensor, "batch pos d_model"],
    key_input: Float[Tensor, "batch pos d_model"],
    value_input: Float[Tensor, "batch pos d_model"],
    past_kv_cache_entry: Any = None,
    additive_attention_mask: Tensor | None = None,
    attention_mask: Int[Tensor, "batch all_pos"] | None = None,
    position_bias: Tensor | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """TransformerLens's AbstractAttention.forward with the same hook points, on torch's fused attention."""
    foreign_cache = past_kv_cache_entry is not None and not isinstance(past_kv_cache_entry, CacheSlot)
    watched = attn.hook_attn_scores._forward_hooks or attn.hook_pattern._forward_hooks
    watched = watched or attn.hook_attn_scores._backward_hooks or attn.hook_pattern._backward_hooks
    if isinstance(past_kv_cache_entry, CacheSlot) and watched:
        raise ValueError(
            "hooks must leave attention scores and patterns alone while a cache is used, got one at "
            f"blocks.{attn.layer_id}.attn. Hook hook_z instead, or generate with use_cache=False."
        )
    if foreign_cache or watched or additive_attention_mask is not None or position_bias is not None:
        return type(attn).forward(
            attn, query_input, key_input, value_input, past_kv_cache_entry, additive_attention_mask, attention_mask,
            position_bias,
        )  # fmt: skip
    q, k, v = attn.calculate_qkv_matrices(query_input, key_input, value_input)
    past = past_kv_cache_entry.length if past_kv_cache_entry is not None else 0
    frame = _frame(attn, shared, attention_mask, (q.shape[0], q.shape[1], past))
    q = attn.hook_rot_q(_rotate(q, frame.cos, frame.sin))
    k = attn.hook_rot_k(_rotate(k, frame.cos, frame.sin))
    if past_kv_cache_entry is not None:
        k, v = past_kv_cache_entry.append(k, v)
    q, k, v = (rearrange(x, "batch pos head d -> batch head pos d") for x in (q, k, v))
    z = F.scaled_dot_product_attention(
        q, k, v, attn_mask=frame.allowed, is_causal=frame.causal, scale=1.0 / attn.attn_scale,
        enable_gqa=k.shape[1] != q.shape[1],
    )  # fmt: skip
    z = attn.hook_z(rearrange(z, "batch head pos d -> batch pos head d"))
    output = rearrange(attn.W_O, "head d model -> model (head d)")
    return F.linear(rearrange(z, "batch pos head d -> batch pos (head d)"), output, attn.b_O)


def _rotate(x: Float[Tensor, "batch pos head d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "batch pos head d"]:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _frame(attn: Any, shared: list[_Frame], mask: Tensor | None, shape: tuple[int, int, int]) -> _Frame:
    """The values that all layers of this forward pass share, computed at its first layer."""
    # A layer that does not follow the last one starts another pass, before which the mask may have been overwritten.
    if shared and shared[0].layer < attn.layer_id and shared[0].made_for is mask and shared[0].shape == shape:
        shared[0].layer = attn.layer_id
        return shared[0]
    _, n_query, past = shape
    total, device = past + n_query, attn.rotary_cos.device
    if total > attn.rotary_cos.shape[0]:
        attn._extend_rotary_embeddings(min(attn.cfg.n_ctx, max(total, 2 * attn.rotary_cos.shape[0])))
        if total > attn.rotary_cos.shape[0]:
            raise ValueError(
                f"tokens must fit this model's context of {attn.cfg.n_ctx} positions, got {total}. Shorten the texts."
            )
    if mask is None or bool(mask.all()):
        positions = torch.arange(past, total, device=device)[None]
        allowed = None if past == 0 or n_query == 1 else _causal(n_query, total, device)[None, None]
        causal = past == 0 and n_query > 1
    else:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        # Padding attends to itself: the softmax of a row that attends to nothing is NaN.
        itself = torch.arange(past, total, device=device)[:, None] == torch.arange(total, device=device)[None, :]
        allowed = ((_causal(n_query, total, device) & mask.bool()[:, None, :]) | itself)[:, None]
        causal = False
    cos, sin = (angles[positions][:, :, None] for angles in (attn.rotary_cos, attn.rotary_sin))
    frame = _Frame(attn.layer_id, mask, shape, cos, sin, allowed, causal)
    shared[:] = [frame]
    return frame


def _causal(n_query: int, total: int, device: torch.device) -> Tensor:
    """Bool[Tensor, "n_query total"]: True where a query may attend to a key."""
    return torch.ones(n_query, total, dtype=torch.bool, device=device).tril(total - n_query)


def final_residual(
    model: Model, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after the last block of a HookedTransformer; the unembedding does not run."""
    return model(tokens, attention_mask=mask, stop_at_layer=model.cfg.n_layers)


def unembed(model: Any, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
    """Logits of chosen residuals of a HookedTransformer: its final norm, unembedding and soft cap."""
    flat = residual.reshape(1, -1, residual.shape[-1])
    logits = model.unembed(model.ln_final(flat) if model.cfg.normalization_type is not None else flat)
    cap = model.cfg.output_logits_soft_cap
    if cap > 0:
        logits = cap * torch.tanh(logits / cap)
    return logits.reshape(*residual.shape[:-1], -1)


def logits_where(
    model: Model, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], where: Tensor, *, size: int = 128
) -> Iterator[Float[Tensor, "chosen d_vocab"]]:
    """Logits at chosen positions, in chunks; a HookedTransformer computes no others.

    A TransformerBridge computes the logits of all rows at each column that any row chooses.

    Chunks of 128 positions let a large vocabulary's logits reuse the same memory, which halves the time of the
    operations on them.

    Args:
        model: HookedTransformer or TransformerBridge.
        tokens: Int[Tensor, "batch pos"].
        mask: 1 for real tokens.
        where: Bool[Tensor, "batch pos"], True at the chosen positions.
        size: positions per chunk.

    Example:
        >>> import torch
        >>> tokens = model.to_tokens("The capital of France is")
        >>> where = torch.zeros_like(tokens, dtype=torch.bool)
        >>> where[:, -1] = True
        >>> (logits,) = logits_where(model, tokens, torch.ones_like(tokens), where)
        >>> logits.shape
        torch.Size([1, 49152])
        >>> model.tokenizer.decode(logits[0].argmax())
        ' Paris'
    """
    if isinstance(model, HookedTransformer):
        with quick(model):
            final = final_residual(model, tokens, mask)[where]
        yield from (unembed(model, part) for part in final.split(size))
    else:
        yield from bridge_logits(model, tokens, mask, where).split(size)


def bridge_logits(
    model: Model, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], where: Tensor
) -> Float[Tensor, "chosen d_vocab"]:
    """Logits of a TransformerBridge at chosen positions; only the columns of these are held in memory.

    Args:
        model: TransformerBridge.
        tokens: Int[Tensor, "batch pos"].
        mask: 1 for real tokens.
        where: Bool[Tensor, "batch pos"], True at the chosen positions; the model runs even if there is none.
    """
    columns = where.any(0).nonzero()[:, 0]
    if len(columns) == where.shape[1] or not keeps_logits(model):
        return model(tokens, attention_mask=mask)[where]
    kept = columns if len(columns) else 1
    return model(tokens, attention_mask=mask, logits_to_keep=kept)[where[:, columns] if len(columns) else where[:, -1:]]


def keeps_logits(model: Any) -> bool:
    """Whether a TransformerBridge can compute the logits of some positions only; hooks on logits need all of them."""
    unembed = getattr(model, "unembed", None)
    points = [part for part in unembed.modules() if isinstance(part, HookPoint)] if unembed is not None else []
    hooked = any(point._forward_hooks or point._backward_hooks for point in points)
    return not hooked and "logits_to_keep" in inspect.signature(model.original_model.forward).parameters


def cache_error(model: Model) -> float:
    """Relative error of a TransformerBridge's logits with a key-value cache against those without.

    Measured once per model, on two rows of which one is padded, with the model's hooks off, and kept on `model.cfg`.
    Infinite if the cache cannot be used at all.
    """
    known = getattr(model.cfg, "rt_lens_cache_error", None)
    if known is None:
        with _without_hooks(model):
            known = model.cfg.rt_lens_cache_error = _measured_cache_error(model)
    return known


def allowed_error(dtype: torch.dtype) -> float:
    """Relative error of logits, in norm, that rounding may explain; correct families stay below half of it."""
    return {torch.float16: 0.02, torch.bfloat16: 0.05}.get(dtype, 1e-3)


def caches_rightly(model: Model) -> bool:
    """Whether decoding gives the same logits with a key-value cache as without one, up to rounding."""
    return cache_error(model) < allowed_error(next(model.parameters()).dtype)


@torch.no_grad()
def _measured_cache_error(model: Model, n: int = 8, steps: int = 4) -> float:
    tokens = torch.linspace(0, model.cfg.d_vocab - 1, 2 * (n + steps)).long().view(2, -1).to(model.cfg.device)
    mask = torch.ones_like(tokens)
    mask[1, : n // 2] = 0
    whole = model(tokens, attention_mask=mask)[:, n - 1 :].double()
    steps_with_cache: list[Tensor] = []
    state: dict[str, Any] = {}
    try:
        for end in range(n, n + steps + 1):
            new = tokens[:, : n if end == n else end][:, 0 if end == n else -1 :]
            logits, state["past_key_values"] = model(
                new, attention_mask=mask[:, :end], return_type="logits_and_cache", use_cache=True, **state
            )
            steps_with_cache.append(logits[:, -1].double())
    except Exception:  # any error of a family's own code that has no such cache
        return math.inf
    error = float((torch.stack(steps_with_cache, 1) - whole).norm() / whole.norm())
    return error if math.isfinite(error) else math.inf


@contextmanager
def _without_hooks(model: Model) -> Iterator[None]:
    """Context manager under which no hook runs: an edit by row, say, would meet rows that are not its own."""
    points = [part for part in model.modules() if isinstance(part, HookPoint)]
    kept = [(point._forward_hooks, point._backward_hooks) for point in points]
    try:
        for point in points:
            point._forward_hooks, point._backward_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for point, (forward, backward) in zip(points, kept, strict=True):
            point._forward_hooks, point._backward_hooks = forward, backward


def finest_dtype(device: Any) -> torch.dtype:
    """The most exact dtype of a device: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def check_layers(model: Model, layers: Iterable[int] | None) -> list[int]:
    """The block indices as a list. If None, all blocks.

    Raises:
        ValueError: if an index is outside the model, or the list is empty.
    """
    n = model.cfg.n_layers
    chosen = list(range(n)) if layers is None else list(layers)
    for layer in chosen:
        if not 0 <= layer < n:
            raise ValueError(
                f"layers contains {layer}, but this model has blocks 0..{n - 1} ({model_name(model)}). "
                f"Try layers=range({n // 2}, {max(n // 2 + 1, 3 * n // 4)})."
            )
    if not chosen:
        raise ValueError("layers must name at least one block, got an empty list. Leave layers out for all blocks.")
    return chosen


def unknown_hook(argument: str, hook_name: str, model: Model) -> str:
    """The message that refuses a hook name which the model does not have, with the nearest ones that it has."""
    near = get_close_matches(hook_name, model.hook_dict, n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else "model.hook_dict lists them."
    n_blocks = model.cfg.n_layers
    return f"{argument} contains {hook_name!r}, which is not in this model ({n_blocks} blocks). {hint}"


def dtype_name(model: Model) -> str:
    """The dtype of the model's weights, in the form that `load_model` takes."""
    return str(model.cfg.dtype).removeprefix("torch.")


def model_name(model: Model) -> str:
    """The name under which the model was loaded."""
    return getattr(model.cfg, "rt_lens_name", None) or model.cfg.model_name
