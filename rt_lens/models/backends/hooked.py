"""HookedTransformer of TransformerLens 3: a faster forward pass with the same results and the same hooks.

Under `quick` a block without hooks between its input and its output runs as `lean.py` writes it. In a block with such
hooks every hook point is called, and attention alone is faster: masks and rotary angles are computed once per forward
pass instead of once per layer, keys and values go to a preallocated cache, and torch's fused attention is used. The
fused kernel never forms attention scores or patterns, so a layer with a hook on either runs TransformerLens's own code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from rt_lens.models.backends import lean
from rt_lens.models.backends.base import Backend, Slot, hooked, hooks_of, slots_in
from rt_lens.models.backends.products import product
from rt_lens.models.llama import FAMILIES, from_huggingface, to_huggingface
from rt_lens.models.parameter_names import plain_name


class CacheSlot:
    """Keys and values of one layer; keys are stored with their rotation already applied. It takes memory when used."""

    def __init__(self, batch: int, capacity: int, n_heads: int, d_head: int, like: Tensor) -> None:
        self._shape, self._like = (batch, capacity, n_heads, d_head), like
        self._keys = self._values = like.new_empty(batch, 0, n_heads, d_head)
        self.length = 0

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self._keys, self._values

    @property
    def past_keys(self) -> Float[Tensor, "batch past head d_head"]:
        return self._keys[:, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.length:
            self._keys, self._values = self._like.new_empty(self._shape), self._like.new_empty(self._shape)
        end = self.length + keys.shape[1]
        self._keys[:, self.length : end] = keys
        self._values[:, self.length : end] = values
        self.length = end
        return self._keys[:, :end], self._values[:, :end]


class KeyValueCache:
    """A preallocated key-value cache that `HookedTransformer.forward` takes as `past_kv_cache`, inside `quick`."""

    def __init__(self, model: Any, batch: int, capacity: int) -> None:
        cfg, like = model.cfg, next(model.parameters()).detach()
        heads = cfg.n_key_value_heads or cfg.n_heads
        self.batch = batch
        self.slots = [CacheSlot(batch, capacity, heads, cfg.d_head, like) for _ in range(cfg.n_layers)]
        self.mask = torch.empty(batch, 0, dtype=torch.long, device=like.device)

    def __getitem__(self, layer: int) -> CacheSlot:
        return self.slots[layer]

    def adopt(self, source: KeyValueCache, rows: Sequence[int], blocks: Iterable[int], last: int | None = None) -> None:
        """Appends what rows of another cache hold in some blocks: all tokens, or the last ones."""
        for block in blocks:
            taken = source.slots[block]
            first = 0 if last is None else taken.length - last
            self.slots[block].append(*(part[:, first : taken.length][list(rows)] for part in taken.pair))

    def branch(self, model: Any, rows: list[int], room: int) -> KeyValueCache:
        """A new cache whose row i continues row `rows[i]` of this one, with room for `room` more tokens."""
        branched = KeyValueCache(model, len(rows), self.mask.shape[1] + room)
        branched.adopt(self, rows, range(len(self.slots)))
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


def can_be_quick(model: Any) -> bool:
    """True if the faster attention covers this model: rotary embeddings and plain causal attention."""
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
    q = attn.hook_rot_q(lean.rotated(q, frame.cos, frame.sin))
    k = attn.hook_rot_k(lean.rotated(k, frame.cos, frame.sin))
    if past_kv_cache_entry is not None:
        k, v = past_kv_cache_entry.append(k, v)
    z = lean.attended(q, k, v, frame.allowed, frame.causal, 1.0 / attn.attn_scale)
    z = attn.hook_z(rearrange(z, "batch pos (head d) -> batch pos head d", head=q.shape[2]))
    output = rearrange(attn.W_O, "head d model -> model (head d)")
    return F.linear(rearrange(z, "batch pos head d -> batch pos (head d)"), output, attn.b_O)


def _block(
    backend: HookedBackend,
    index: int,
    shared: list[_Frame],
    resid_pre: Float[Tensor, "batch pos d_model"],
    shortformer_pos_embed: Tensor | None = None,
    past_kv_cache_entry: Any = None,
    attention_mask: Int[Tensor, "batch all_pos"] | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """TransformerLens's TransformerBlock.forward; where nobody listens inside of the block, without its hook points."""
    block, cached = backend.model.blocks[index], past_kv_cache_entry
    if (cached is not None and not isinstance(cached, CacheSlot)) or backend.listens(index):
        return type(block).forward(block, resid_pre, shortformer_pos_embed, cached, attention_mask)
    attn, eps = block.attn, block.ln1.eps
    residual, weights = block.hook_resid_pre(resid_pre), backend.weights(index)
    q, k, v = lean.queries_keys_values(weights, residual, eps, attn.cfg.d_head)
    past = 0 if cached is None else cached.length
    frame = _frame(attn, shared, attention_mask, (q.shape[0], q.shape[1], past))
    q, k = lean.rotated(q, frame.cos, frame.sin), lean.rotated(k, frame.cos, frame.sin)
    if cached is not None:
        k, v = cached.append(k, v)
    z = lean.attended(q, k, v, frame.allowed, frame.causal, 1.0 / attn.attn_scale)
    return block.hook_resid_post(lean.after_attention(weights, residual, z, eps))


def _matrices(block: Any) -> lean.Weights:
    """The weights of a block, which are views of its parameters where these are stored as Hugging Face stores them."""
    attn, mlp, grouped = block.attn, block.mlp, "_" if hasattr(block.attn, "_W_K") else ""
    of_keys = {name: getattr(attn, grouped + name) for name in ("W_K", "W_V", "b_K", "b_V")}
    q, k, v = (w.transpose(1, 2).flatten(0, 1) for w in (attn.W_Q, of_keys["W_K"], of_keys["W_V"]))
    q_bias, k_bias, v_bias = (b.flatten() for b in (attn.b_Q, of_keys["b_K"], of_keys["b_V"]))
    gate, up = mlp.W_gate.T, mlp.W_in.T
    in_one = not torch.is_grad_enabled()  # a view across parameters would take no part in their gradients
    return lean.Weights(
        first_norm=block.ln1.w, q=q, k=k, v=v, o=attn.W_O.flatten(0, 1).T, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias,
        o_bias=attn.b_O, second_norm=block.ln2.w, gate=gate, up=up, middle=mlp.b_in, down=mlp.W_out.T,
        down_bias=mlp.b_out, qkv=lean.joined((q, k, v), (q_bias, k_bias, v_bias)) if in_one else None,
        gate_up=lean.joined((gate, up), (None, None)) if in_one else None,
    )  # fmt: skip


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
    frame = _Frame(attn.layer_id, mask, shape, cos, lean.signed(sin), allowed, causal)
    shared[:] = [frame]
    return frame


def _causal(n_query: int, total: int, device: torch.device) -> Tensor:
    """Bool[Tensor, "n_query total"]: True where a query may attend to a key."""
    return torch.ones(n_query, total, dtype=torch.bool, device=device).tril(total - n_query)


def can_be_lean(model: Any) -> bool:
    """True if `lean.py` covers this model's blocks."""
    cfg = model.cfg
    unusual = (
        cfg.attn_only, cfg.parallel_attn_mlp, cfg.use_hook_mlp_in, cfg.use_normalization_before_and_after,
        cfg.num_experts, cfg.original_architecture in POST_NORM_ARCHITECTURES,
    )  # fmt: skip
    plain = cfg.normalization_type == "RMS" and cfg.gated_mlp and cfg.act_fn == "silu"
    return plain and can_be_quick(model) and not any(unusual)


class HookedBackend(Backend):
    """A HookedTransformer."""

    kind = "hooked"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        outer = [(block.hook_resid_pre, block.hook_resid_post) for block in model.blocks]
        self.inside = [
            [part for part in block.modules() if part is not block and part not in points]
            for block, points in zip(model.blocks, outer, strict=True)
        ]
        self.ends = list(model.unembed.modules())
        self._parts = [[part for part in inside if not isinstance(part, HookPoint)] for inside in self.inside]
        self._frames: list[_Frame] = []
        self._attentions = [partial(_attention, block.attn, self._frames) for block in model.blocks]
        self._blocks = [partial(_block, self, index, self._frames) for index in range(len(model.blocks))]
        self._hooks = [tuple(hooks for part in inside for hooks in hooks_of(part)) for inside in self.inside]
        self._held = [
            [(part._parameters, name) for part in parts for name in part._parameters] for parts in self._parts
        ]
        self._views: list[tuple[list[int], lean.Weights | None]] = [([], None) for _ in model.blocks]

    @contextmanager
    def quick(self) -> Iterator[Any]:
        model = self.model
        if not can_be_quick(model) or any("forward" in vars(block.attn) for block in model.blocks):
            yield model
            return
        self._frames.clear()
        be_lean = can_be_lean(model)
        try:
            for index, block in enumerate(model.blocks):
                if be_lean and not any("forward" in vars(part) for part in self._parts[index]):
                    vars(block)["forward"] = self._blocks[index]
                vars(block.attn)["forward"] = self._attentions[index]
            yield model
        finally:
            self._frames.clear()
            for block in model.blocks:
                vars(block.attn).pop("forward", None)
                vars(block).pop("forward", None)

    def listens(self, index: int) -> bool:
        """Whether somebody listens inside a block; asked at each new token, so the quick answer comes first."""
        return any(self._hooks[index]) and hooked(self.inside[index])

    def weights(self, index: int) -> lean.Weights:
        """A block's weights as they are now; as long as nothing wants their gradients, the views stay the same."""
        if torch.is_grad_enabled():
            return _matrices(self.model.blocks[index])
        now = [held[name].data_ptr() for held, name in self._held[index]]
        before, weights = self._views[index]
        if weights is None or now != before:
            weights = _matrices(self.model.blocks[index])
            views = all(matrix.data_ptr() in now for matrix in (weights.q, weights.k, weights.v, weights.o))
            self._views[index] = now, weights if views else None  # a copy would miss what is written into the weights
        return weights

    def residual(self, inputs: Tensor, mask: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.model.cfg.n_layers if stop is None else stop
        return self.model(inputs, attention_mask=mask, start_at_layer=start or None, stop_at_layer=stop)

    def unembed(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        flat = residual.reshape(-1, 1, residual.shape[-1])  # rows of one token each, as in a TransformerBridge
        if hooked(self.ends):
            logits = self.model.unembed(self.final_norm(flat))
        else:
            logits = product(self.final_norm(flat), self.model.W_U.T, self.model.b_U)
        cap = self.model.cfg.output_logits_soft_cap
        if cap > 0:
            logits = cap * torch.tanh(logits / cap)
        return logits.reshape(*residual.shape[:-1], logits.shape[-1])

    def final_norm(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return self.model.ln_final(residual) if self.model.cfg.normalization_type is not None else residual

    def unembedding(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.model.W_U

    def cache(self, rows: int, capacity: int) -> Any:
        if can_be_quick(self.model):
            return KeyValueCache(self.model, rows, capacity)
        return TransformerLensKeyValueCache.init_cache(self.model.cfg, self.model.cfg.device, rows)

    def extend(
        self, inputs: Tensor, mask: Tensor, cache: Any, *, start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "batch new d_model"]:
        stop = self.model.cfg.n_layers if stop is None else stop
        if start:  # TransformerLens adds to a cache's mask only with tokens
            mask = cache.append_attention_mask(mask)
        if start == stop and start:
            return inputs
        return self.model(
            inputs, attention_mask=mask, past_kv_cache=cache, start_at_layer=start or None, stop_at_layer=stop
        )

    def run_with_cache(
        self, tokens: Tensor, mask: Tensor, hook_names: Sequence[str], stop: int | None, past: Any = None
    ) -> Any:
        _, cache = self.model.run_with_cache(
            tokens, attention_mask=mask, names_filter=list(hook_names), stop_at_layer=stop, return_type=None,
            past_kv_cache=past,
        )  # fmt: skip
        return cache

    def caches(self, first: int = 0, longest: int = 0) -> bool:
        return True

    def branches(self, longest: int = 0) -> bool:
        return can_be_quick(self.model)

    def slots(self) -> dict[str, Slot]:
        return slots_in(self.model)

    def translated(self, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known, named = self.slots(), {}
        for name, change in changes.items():
            theirs = None if name in known else from_huggingface(plain_name(name), change, self.model.cfg)
            ours, moved = theirs or (name, change)
            named[ours] = moved
        return named

    def writer(self, layer: int, module: str) -> tuple[str, str]:
        owner, end = {"o": ("attn", "O"), "down": ("mlp", "out")}[module]
        return f"blocks.{layer}.{owner}.W_{end}", f"blocks.{layer}.{owner}.b_{end}"

    def embeddings(self) -> list[str]:
        return [name for name in ("embed.W_E", "pos_embed.W_pos") if name in self.slots()]

    def as_huggingface(self, name: str, parameter: Tensor) -> tuple[str, Tensor] | None:
        return to_huggingface(name, parameter)

    def huggingface(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        parameters = {name: parameter.data for name, parameter in self.model.named_parameters()}
        for name, parameter in parameters.items():
            renamed = to_huggingface(name, parameter)
            if renamed is not None:
                weights[renamed[0]] = renamed[1]
            elif parameter.any() and not name.endswith(".mlp.b_in"):
                raise ValueError(
                    f"delta must change only what {self.family} has in its files, got {name}, which is not zero. Leave "
                    "it out of the change, or keep it as a hook."
                )
        for layer in range(self.model.cfg.n_layers):  # added after the gate, b_in is a constant before W_out
            hooked, their_bias = f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp.down_proj.bias"
            if parameters[f"{hooked}.b_in"].any():
                weights[their_bias] = weights[their_bias] + parameters[f"{hooked}.b_in"] @ parameters[f"{hooked}.W_out"]
        return weights

    def source_config(self) -> Any:
        from transformers import CONFIG_MAPPING

        kept = getattr(self.model.cfg, "rt_lens_config", None)
        return None if kept is None else CONFIG_MAPPING[kept["model_type"]].from_dict(kept)

    @property
    def family(self) -> str:
        kept = getattr(self.model.cfg, "rt_lens_config", None) or {}
        return FAMILIES.get(kept.get("model_type", ""), type(self.model).__name__)
