"""TransformerBridge of TransformerLens 3 and 4: Hugging Face's own blocks wherever nobody listens inside one.

A bridge runs a Hugging Face model whose parts it has wrapped, which costs time in every part and computes attention
without fused kernels. Under `quick` a block without hooks between its input and its output runs as Hugging Face wrote
it, on the same parameters; a block with such hooks runs as the bridge wrote it. The hooks on inputs and outputs of
blocks, embedding, final norm and unembedding are called in both.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rt_lens.models.backends import lean
from rt_lens.models.backends.base import Backend, Slot, allowed_error, hooked, positions_of, slots_in
from rt_lens.models.backends.plain import fused_parts, join_fused, plain_copy, unwrapped
from rt_lens.models.llama import FAMILIES, to_huggingface
from rt_lens.models.parameter_names import plain_name

_FORKS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")
"""Settings of TransformerLens under which a block has hook points that Hugging Face's does not compute."""
_LEAN = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
"""Layers of transformers that `lean.py` covers."""
_WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size")
"""Fields of transformers' configurations that limit how far back some layers attend."""


@dataclass
class _Span:
    """Which blocks run: those before `start` give `residual` instead, and block `stop` and later ones do not run.

    Attributes:
        plain: whether blocks may run as Hugging Face wrote them.
    """

    start: int = 0
    residual: Tensor | None = None
    stop: int | None = None
    plain: bool = True


class BridgeCache:
    """transformers' key-value cache, with the mask of the tokens in it."""

    def __init__(self, state: Any, mask: Int[Tensor, "batch pos"]) -> None:
        self.state, self.mask = state, mask

    def adopt(self, source: BridgeCache, rows: Sequence[int], blocks: Iterable[int], last: int | None = None) -> None:
        """Appends what rows of another cache hold in some blocks: all tokens, or the last ones."""
        for block in blocks:
            taken = source.state.layers[block]
            first = 0 if last is None else taken.keys.shape[-2] - last
            keys, values = (part[..., first:, :][list(rows)] for part in (taken.keys, taken.values))
            self.state.update(keys, values, block)

    def branch(self, model: Any, rows: list[int], room: int) -> BridgeCache:
        """A new cache whose row i continues row `rows[i]` of this one."""
        state = copy.deepcopy(self.state)
        state.batch_select_indices(torch.tensor(rows, device="cpu"))  # layers may be on several devices
        return BridgeCache(state, self.mask[rows])


def _is_covered(layer: Any) -> bool:
    """Whether `lean.py` covers a decoder layer: transformers' own, with plain projections."""
    own = type(layer).__name__ in _LEAN and type(layer).__module__.startswith("transformers.models.")
    return own and all(
        type(part) is nn.Linear for name, part in layer.named_modules() if name.rsplit(".", 1)[-1].endswith("_proj")
    )


def _is_replaced(layer: Any) -> bool:
    """Whether somebody else runs a part of a layer, as accelerate does where its weights are elsewhere."""
    return any("forward" in vars(part) for part in layer.modules())


def _weights(layer: Any) -> lean.Weights:
    """The weights of a decoder layer."""
    attn, mlp = layer.self_attn, layer.mlp
    return lean.Weights(
        first_norm=layer.input_layernorm.weight, second_norm=layer.post_attention_layernorm.weight,
        q=attn.q_proj.weight, k=attn.k_proj.weight, v=attn.v_proj.weight, o=attn.o_proj.weight,
        gate=mlp.gate_proj.weight, up=mlp.up_proj.weight, down=mlp.down_proj.weight,
        q_bias=attn.q_proj.bias, k_bias=attn.k_proj.bias, v_bias=attn.v_proj.bias, o_bias=attn.o_proj.bias,
        gate_bias=mlp.gate_proj.bias, up_bias=mlp.up_proj.bias, down_bias=mlp.down_proj.bias,
    )  # fmt: skip


class BridgeBackend(Backend):
    """A TransformerBridge."""

    kind = "bridge"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        join_fused(model)
        self.original: Any = model.original_model
        attention = "sdpa" if getattr(self.original, "_supports_sdpa", False) else None
        self.plain, self._copies = plain_copy(self.original, attention)
        self.blocks = [self._copies[id(unwrapped(block))] for block in model.blocks]
        outer = [(block.hook_in, block.hook_out) for block in model.blocks]
        self.inside = [
            [part for part in block.modules() if part is not block and part not in points]
            for block, points in zip(model.blocks, outer, strict=True)
        ]
        plain_maths = getattr(self.original.config, "hidden_act", None) == "silu" and attention == "sdpa"
        self.lean = plain_maths and all(_is_covered(block) for block in self.blocks)
        self._angles: tuple[Tensor, Tensor, Tensor] | None = None
        self.takes = inspect.signature(self.original.forward).parameters
        self.cache_errors: dict[bool, float] = {}
        self._span = _Span()
        self._tuples: bool | None = None

    @property
    def family(self) -> str:
        return type(self.original).__name__

    @contextmanager
    def quick(self) -> Iterator[Any]:
        blocks = self.model.blocks
        if any("forward" in vars(block) for block in blocks):
            yield self.model
            return
        try:
            for index, block in enumerate(blocks):
                vars(block)["forward"] = partial(self._run_block, index, block)
            yield self.model
        finally:
            for block in blocks:
                vars(block).pop("forward", None)

    def _run_block(self, index: int, block: Any, *args: Any, **kwargs: Any) -> Any:
        span = self._span
        if index < span.start:
            return (span.residual, None, None) if self._tuples else span.residual
        output = (
            self._run_plain(index, block, args, kwargs)
            if span.plain and self._may_be_plain(index)
            else type(block).forward(block, *args, **kwargs)
        )
        if index + 1 == span.stop:
            raise StopAtLayerException(output[0] if isinstance(output, tuple) else output)
        return output

    def _may_be_plain(self, index: int) -> bool:
        model = self.model
        processed = getattr(model, "compatibility_mode", False) or any(
            getattr(model.cfg, name, False) for name in _FORKS
        )
        return not processed and not hooked(self.inside[index])

    def _run_plain(self, index: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(block, "_stop_at_layer_idx", None) is not None:
            block._check_stop_at_layer(*args, **kwargs)
        if args:
            args = (block.hook_in(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = block.hook_in(kwargs["hidden_states"])
        lean_here = self.lean and not self.original.training and not _is_replaced(self.blocks[index])
        output = self._lean(index, *args, **kwargs) if lean_here else self.blocks[index](*args, **kwargs)
        if isinstance(output, tuple):
            return (block.hook_out(output[0]), *output[1:])
        return block.hook_out(output)

    def _lean(
        self, index: int, hidden_states: Tensor, attention_mask: Tensor | None = None, *,
        position_embeddings: tuple[Tensor, Tensor], past_key_values: Any = None, **others: Any,
    ) -> Tensor:  # fmt: skip
        """A decoder layer of Llama, Mistral or Qwen2 as `lean.py` writes it."""
        attention, eps = self.blocks[index].self_attn, self.blocks[index].input_layernorm.variance_epsilon
        weights = _weights(self.blocks[index])
        q, k, v = lean.queries_keys_values(weights, hidden_states, eps, attention.head_dim)
        if self._angles is None or self._angles[0] is not position_embeddings[1]:  # one table for all layers of a pass
            cos, sin = (angles.unsqueeze(2) for angles in position_embeddings)
            self._angles = position_embeddings[1], cos, lean.signed(sin)
        cos, sin = self._angles[1:]
        q, k = lean.rotated(q, cos, sin), lean.rotated(k, cos, sin)
        if past_key_values is not None:
            held = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), attention.layer_idx)
            k, v = (part.transpose(1, 2) for part in held)
        causal = attention_mask is None and hidden_states.shape[1] > 1
        z = lean.attended(q, k, v, attention_mask, causal, attention.scaling)
        return lean.after_attention(weights, hidden_states, z, eps)

    @contextmanager
    def _over(self, span: _Span) -> Iterator[None]:
        before, self._span = self._span, span
        try:
            with self.quick():
                yield
        finally:
            self._span = before

    def _call(self, inputs: Tensor, mask: Tensor | None, **settings: Any) -> Any:
        """Hugging Face's forward pass, by tokens or by the residual stream."""
        named = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        if "position_ids" in self.takes and mask is not None:
            settings["position_ids"] = positions_of(mask, inputs.shape[1])
        return self.original(**{named: inputs}, attention_mask=mask, **{"use_cache": False, **settings})

    def residual(self, inputs: Tensor, mask: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.model.cfg.n_layers if stop is None else stop
        if stop == start:
            return inputs if start else self._embedded(inputs, mask)
        self._learn_outputs(start)
        with self._over(_Span(start, inputs if start else None, stop)):
            return self._stopped(inputs, mask)

    def _stopped(self, inputs: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        try:
            self._call(inputs, mask, **settings)
        except StopAtLayerException as stopped:
            return stopped.layer_output
        raise RuntimeError(f"{self.family} must run its blocks in order, got a forward pass that left some out.")

    @contextmanager
    def _first_block(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Context manager under which this runs in place of the first block."""
        block = self.model.blocks[0]
        with self.quick():
            kept, vars(block)["forward"] = vars(block)["forward"], forward
            try:
                yield
            finally:
                vars(block)["forward"] = kept

    def _embedded(self, tokens: Tensor, mask: Tensor) -> Tensor:
        def stop(*args: Any, **kwargs: Any) -> Any:
            raise StopAtLayerException(args[0] if args else kwargs["hidden_states"])

        with self._first_block(stop):
            return self._stopped(tokens, mask)

    @torch.no_grad()
    def _learn_outputs(self, start: int) -> None:
        """Whether the blocks of this family give tuples, which is needed only where some do not run."""
        if not start or self._tuples is not None:
            return
        seen: list[Any] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            seen.append(self.blocks[0](*args, **kwargs))
            raise StopAtLayerException(args[0] if args else kwargs["hidden_states"])

        tokens = torch.zeros(1, 1, dtype=torch.long, device=self.model.cfg.device)
        with _without_hooks(self.model), self._first_block(note):  # nobody asked for this pass
            self._stopped(tokens, torch.ones_like(tokens))
        self._tuples = isinstance(seen[0], tuple)

    def unembed(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        n = self.model.cfg.n_layers
        self._learn_outputs(n)
        flat = residual.reshape(-1, 1, residual.shape[-1])  # rows of one token each: no masks, no positions
        with self._over(_Span(n, flat)):
            logits = self._call(flat, torch.ones(flat.shape[:2], dtype=torch.long, device=flat.device)).logits
        return logits.reshape(*residual.shape[:-1], logits.shape[-1])

    def final_norm(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return self.model.ln_final(residual)

    def unembedding(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.model.W_U

    def cache(self, rows: int, capacity: int) -> BridgeCache:
        state = DynamicCache(config=self.original.config)
        return BridgeCache(state, torch.empty(rows, 0, dtype=torch.long, device=self.model.cfg.device))

    def extend(
        self, inputs: Tensor, mask: Tensor, cache: Any, *, start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "batch new d_model"]:
        stop = self.model.cfg.n_layers if stop is None else stop
        cache.mask = torch.cat([cache.mask, mask], dim=1)
        if start == stop and start:
            return inputs
        self._learn_outputs(start)
        with self._over(_Span(start, inputs if start else None, stop)):
            return self._stopped(inputs, cache.mask, past_key_values=cache.state, use_cache=True)

    def next_logits(self, tokens: Tensor, mask: Tensor, cache: Any) -> Float[Tensor, "batch d_vocab"]:
        settings: dict[str, Any] = {"logits_to_keep": 1} if self._keeps_logits() else {}
        if cache is not None:
            cache.mask = mask = torch.cat([cache.mask, mask], dim=1)
            settings |= {"past_key_values": cache.state, "use_cache": True}
        with self.quick():
            return self._call(tokens, mask, **settings).logits[:, -1]

    def logits(self, inputs: Tensor, mask: Tensor, where: Tensor, size: int, start: int = 0) -> Iterator[Tensor]:
        if self._keeps_logits():
            yield from super().logits(inputs, mask, where, size, start)
            return
        self._learn_outputs(start)
        with self._over(_Span(start, inputs if start else None)):  # hooks on logits, and models that keep all
            yield from self._call(inputs, mask).logits[where].split(size)

    def _keeps_logits(self) -> bool:
        """Whether the model can compute the logits of some positions only; hooks on logits need all of them."""
        ends = [part for name in ("ln_final", "unembed") if hasattr(self.model, name) for part in
                getattr(self.model, name).modules()]  # fmt: skip
        return "logits_to_keep" in self.takes and not hooked(ends)

    def run_with_cache(
        self, tokens: Tensor, mask: Tensor, hook_names: Sequence[str], stop: int | None, past: Any = None
    ) -> Any:
        # The bridge's own stop has no "after the last block", and runs the unembedding.
        settings: dict[str, Any] = {}
        if past is not None:
            past.mask = mask = torch.cat([past.mask, mask], dim=1)
            settings |= {"past_key_values": past.state, "use_cache": True}
        if "position_ids" in self.takes:
            settings["position_ids"] = positions_of(mask, tokens.shape[1])
        if stop is None and self._keeps_logits():
            settings["logits_to_keep"] = 1
        with self._over(_Span(stop=stop)):
            _, cache = self.model.run_with_cache(
                tokens, attention_mask=mask, names_filter=list(hook_names), return_type=None, **settings
            )
        return cache

    def caches(self, first: int = 0, longest: int = 0) -> bool:
        if _turns_anew(self.original.config.get_text_config(), first, longest):
            return False
        plain = all(self._may_be_plain(index) for index in range(len(self.blocks)))
        if plain not in self.cache_errors:
            with _without_hooks(self.model):  # an edit by row, say, would meet rows that are not its own
                self.cache_errors[plain] = self._measured_cache_error(plain)
        return self.cache_errors[plain] < allowed_error(next(self.original.parameters()).dtype)

    def branches(self, longest: int = 0) -> bool:
        return self.caches(0, longest)

    def shares(self, longest: int = 0) -> bool:
        layers = self.cache(1, 1).state.layers
        whole = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        return whole and self.branches(longest) and longest <= _window(self.original.config.get_text_config())

    @torch.no_grad()
    def _measured_cache_error(self, plain: bool, n: int = 8, steps: int = 4) -> float:
        """Relative error of logits with a key-value cache, on two rows of which one is padded; infinite if it fails.

        Args:
            plain: of Hugging Face's blocks, or of the bridge's, which run where there are hooks inside of them.
            n: tokens of the prompt.
            steps: tokens after it.
        """
        cfg = self.model.cfg
        tokens = torch.linspace(0, cfg.d_vocab - 1, 2 * (n + steps), device="cpu").long().view(2, -1).to(cfg.device)
        mask = torch.ones_like(tokens)
        mask[1, : n // 2] = 0
        with_cache: list[Tensor] = []
        cache = self.cache(2, n + steps)
        with self._over(_Span(plain=plain)), suppress(Exception):  # any error of a family that has no such cache
            whole = self._call(tokens, mask).logits[:, n - 1 :].double()
            for end in range(n, n + steps + 1):
                new = slice(0 if end == n else end - 1, end)
                with_cache.append(self.next_logits(tokens[:, new], mask[:, new], cache).double())
            error = float((torch.stack(with_cache, 1) - whole).norm() / whole.norm())
            return error if math.isfinite(error) else math.inf
        return math.inf

    def slots(self) -> dict[str, Slot]:
        return slots_in(self.plain)

    def translated(self, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = self.slots()
        if changes.keys() <= known.keys():
            return dict(changes)
        older = self._older_names()
        named: dict[str, Tensor] = {}
        fused = {name: rows for name, rows in self._rows_by_older_name().items() if name not in known}
        for name, change in changes.items():
            plain = older.get(plain_name(name), plain_name(name))
            if plain in fused:
                whole, rows = fused[plain]
                slot = known[whole]
                joined = named.setdefault(whole, change.new_zeros(slot.shape))
                (joined.T if slot.input_first else joined)[rows] = change
                continue
            theirs = to_huggingface(name, change) if plain not in known and self.family in FAMILIES.values() else None
            if theirs is None and plain not in known and not change.any():
                continue  # a bias of TransformerLens's that is zero, and that Hugging Face does not have
            ours, moved = theirs or (plain, change)
            named[ours] = moved
        return named

    def _older_names(self) -> dict[str, str]:
        """The bridge's own name of a parameter -> Hugging Face's, where they differ."""
        slots = self.slots()
        names = {id(slot.parameter): name for name, slot in slots.items()}
        own = {plain_name(name): parameter for name, parameter in self.model.named_parameters()}
        return {name: names[id(parameter)] for name, parameter in own.items() if name not in slots}

    def _rows_by_older_name(self) -> dict[str, tuple[str, Any]]:
        """The names that fused projections' parts had as parameters of their own -> the whole's name, and its rows."""
        names = {id(module): name for name, module in self.plain.named_modules()}
        parts = {}
        for component, whole, rows in fused_parts(self.model):
            owner = names[id(self._copies[id(unwrapped(component))])]
            stored = names[id(self._copies[id(whole)])]
            for part, its_rows in rows.items():
                for kind in ("weight", "bias"):
                    parts[f"{owner}.{part}.{kind}"] = (f"{stored}.{kind}", its_rows)
        return parts

    def writer(self, layer: int, module: str) -> tuple[str, str]:
        block = self.model.blocks[layer]
        owner, inner = {"o": ("attn", "o"), "down": ("mlp", "out")}[module]
        projection = getattr(getattr(block, owner, None), inner, None)
        made = self._copies.get(id(unwrapped(projection)))
        for name, part in self.plain.named_modules():
            if made is not None and part is made:
                return f"{name}.weight", f"{name}.bias"
        raise ValueError(
            f"model must write the output of block {layer}'s {owner} with one matrix, but {self.family} has several or "
            "none. Keep the hooks."
        )

    def embeddings(self) -> list[str]:
        tables = [self._copies.get(id(unwrapped(getattr(self.model, part, None)))) for part in ("embed", "pos_embed")]
        found = [table for table in tables if isinstance(getattr(table, "weight", None), nn.Parameter)]
        return [f"{name}.weight" for table in found for name, part in self.plain.named_modules() if part is table]

    def as_huggingface(self, name: str, parameter: Tensor) -> tuple[str, Tensor] | None:
        return name, parameter

    def huggingface(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.plain.state_dict().items()}

    def source_config(self) -> Any:
        return copy.deepcopy(self.original.config)


def _window(config: Any) -> float:
    """The fewest columns that a layer attends to. Padding within a row takes some of them."""
    named = (getattr(config, name, None) for name in _WINDOWS)
    return min((size for size in named if isinstance(size, int)), default=math.inf)


def _turns_anew(config: Any, first: int, longest: int) -> bool:
    """Whether a text that grows from `first` to `longest` tokens is rotated by other angles than its keys were.

    Two kinds of rope have angles that depend on the longest row of the forward pass.
    """
    parameters = getattr(config, "rope_parameters", None) or {}  # of all layers, or by kind of layer
    ropes = [part for part in (parameters, *parameters.values()) if isinstance(part, dict)]
    return any(
        (rope.get("rope_type") == "dynamic" and longest > config.max_position_embeddings)
        or (rope.get("rope_type") == "longrope" and first <= rope["original_max_position_embeddings"] < longest)
        for rope in ropes
    )


@contextmanager
def _without_hooks(model: Any) -> Iterator[None]:
    """Context manager under which no hook of the user runs."""
    parts = [part for part in model.modules() if hooked([part])]
    kept = [(part._forward_hooks, part._forward_pre_hooks, part._backward_hooks) for part in parts]
    try:
        for part in parts:
            part._forward_hooks, part._forward_pre_hooks, part._backward_hooks = (OrderedDict() for _ in range(3))
        yield
    finally:
        for part, hooks in zip(parts, kept, strict=True):
            part._forward_hooks, part._forward_pre_hooks, part._backward_hooks = hooks
