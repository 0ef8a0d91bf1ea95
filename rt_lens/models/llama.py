"""Llama-style models: which configurations HookedTransformer's maths covers, and each parameter's two names.

If a configuration field is not covered, `refuse_what_is_not_covered` raises an error that names the field.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# TransformerLens's parameter -> Hugging Face's name, and the rearrangement to its shape there. `b_in` is missing, since
# TransformerLens adds it after the gate and Hugging Face before it.
_OUTSIDE = {
    "embed.W_E": "model.embed_tokens.weight",
    "unembed.W_U": "lm_head.weight",
    "ln_final.w": "model.norm.weight",
}
_INSIDE = {
    "ln1.w": ("input_layernorm.weight", "m -> m"),
    "ln2.w": ("post_attention_layernorm.weight", "m -> m"),
    **{f"attn.W_{x.upper()}": (f"self_attn.{x}_proj.weight", "n m h -> (n h) m") for x in "qkv"},
    **{f"attn.b_{x.upper()}": (f"self_attn.{x}_proj.bias", "n h -> (n h)") for x in "qkv"},
    "attn.W_O": ("self_attn.o_proj.weight", "n h m -> m (n h)"),
    "attn.b_O": ("self_attn.o_proj.bias", "m -> m"),
    "mlp.W_gate": ("mlp.gate_proj.weight", "m i -> i m"),
    "mlp.W_in": ("mlp.up_proj.weight", "m i -> i m"),
    "mlp.W_out": ("mlp.down_proj.weight", "i m -> m i"),
    "mlp.b_out": ("mlp.down_proj.bias", "m -> m"),
}


class NotLlamaStyle(ValueError):
    """The configuration has a field that this mapping does not cover; the message names it."""


def refuse_what_is_not_covered(config: dict[str, Any]) -> None:
    """Raises NotLlamaStyle, with the field's name, if a configuration needs maths that is not covered."""
    rope = config["rope_parameters"]
    uncovered = {
        "rope_type": rope.get("rope_type") not in ("default", "llama3"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "sliding_window": slides(config),
        "hidden_act": config["hidden_act"] not in ("silu", "gelu", "relu", "gelu_new"),
        "quantization_config": config.get("quantization_config") is not None,
        **{field: True for field in config if field.endswith("_multiplier")},
    }
    for field, present in uncovered.items():
        if present:
            value = rope.get(field, config.get(field))
            raise NotLlamaStyle(f"{field} {value!r} of this configuration is not covered by HookedTransformer")


def slides(config: dict[str, Any]) -> bool:
    """Whether blocks of a configuration attend to fewer tokens than its context holds."""
    window, may_slide = config.get("sliding_window"), config["model_type"] != "qwen2" or config["use_sliding_window"]
    return may_slide and window is not None and window < config["max_position_embeddings"]


def read_config(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """A folder's configuration as Hugging Face reads it, with missing fields filled in and older spellings replaced.

    Args:
        folder: with a `config.json`.
        trust_remote_code: run the folder's own Python code, if it names any.

    Raises:
        NotLlamaStyle: if the architecture is none of those covered.
    """
    from transformers import AutoConfig

    family = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if family not in FAMILIES:
        raise NotLlamaStyle(f"model_type {family!r} is none of {', '.join(FAMILIES)}")
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).to_dict()


def to_huggingface(name: str, parameter: Float[Tensor, "..."]) -> tuple[str, Float[Tensor, "..."]] | None:
    """A TransformerLens parameter under Hugging Face's name and in its layout: as in its files.

    A linear map of the parameter, and a view of its memory where strides allow; it also maps differences of weights.

    Args:
        name: as `named_parameters` gives it.
        parameter: in the shape that it has in a HookedTransformer.

    Returns:
        Name and tensor, matrices as [out, in]; None for a parameter that Llama-style models lack.

    Example:
        >>> name, matrix = to_huggingface("blocks.0.mlp.W_in", model.blocks[0].mlp.W_in)
        >>> name
        'model.layers.0.mlp.up_proj.weight'
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name], parameter.T if name == "unembed.W_U" else parameter
    layer, _, inside = name.removeprefix("blocks.").partition(".")
    counterpart = _INSIDE.get(inside.replace("._", ".", 1))
    if counterpart is None:
        return None
    theirs, layout = counterpart
    return f"model.layers.{layer}.{theirs}", rearrange(parameter, layout)


def from_huggingface(name: str, parameter: Float[Tensor, "..."], cfg: Any) -> tuple[str, Float[Tensor, "..."]] | None:
    """A Hugging Face parameter under TransformerLens's name and in its layout: `to_huggingface` undone.

    Args:
        name: as in Hugging Face's files.
        parameter: in the shape that it has there; differences of weights are mapped as well.
        cfg: configuration of the HookedTransformer.

    Returns:
        Name and tensor; None for a parameter that Llama-style HookedTransformers lack.

    Example:
        >>> name, matrix = to_huggingface("blocks.0.attn.W_Q", model.blocks[0].attn.W_Q)
        >>> from_huggingface(name, matrix, model.cfg)[0]
        'blocks.0.attn.W_Q'
    """
    for ours, theirs in _OUTSIDE.items():
        if name == theirs:
            return ours, parameter.T if ours == "unembed.W_U" else parameter
    layer, _, inside = name.removeprefix("model.layers.").partition(".")
    for ours, (theirs, layout) in _INSIDE.items():
        if inside == theirs:
            before, after = layout.split(" -> ")
            of_keys = ours[-1] in "KV" and ours.startswith("attn.")
            grouped = of_keys and cfg.n_key_value_heads is not None
            sizes = {"n": cfg.n_key_value_heads if grouped else cfg.n_heads} if "(n h)" in after else {}
            owner, _, kind = ours.rpartition(".")
            return f"blocks.{layer}.{owner}.{'_' if grouped else ''}{kind}", rearrange(
                parameter, f"{after} -> {before}", **sizes
            )
    return None
