"""Llama-style Hugging Face folders as HookedTransformers, with the Hugging Face numbers and memory layout.

A configuration field that the maths of HookedTransformer does not cover makes `hooked_config` refuse, with the field's
name, rather than load something that is nearly right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.config import HookedTransformerConfig

_FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


class NotLlamaStyle(ValueError):
    """The configuration has something that this mapping does not cover; the message names it."""


def hooked_config(config: dict[str, Any], *, device: str, dtype: torch.dtype) -> HookedTransformerConfig:
    """The HookedTransformer configuration of a Llama-style Hugging Face configuration.

    Args:
        config: the parsed config.json.
        device: torch device.
        dtype: type of the weights.

    Raises:
        NotLlamaStyle: if a field asks for maths that is not covered.
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise NotLlamaStyle(f"model_type {family!r} is none of {', '.join(_FAMILIES)}")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    d_head = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta")}
    _refuse_what_is_not_covered(config, rope)
    scaled = rope.get("rope_type", rope.get("type", "default")) == "llama3"
    ntk = {
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_low_freq_factor": rope.get("low_freq_factor"),
        "NTK_by_parts_high_freq_factor": rope.get("high_freq_factor"),
        "NTK_by_parts_factor": rope.get("factor"),
        "NTK_original_ctx_len": rope.get("original_max_position_embeddings"),
    }
    return HookedTransformerConfig(
        model_name=Path(str(config.get("_name_or_path") or family)).name,
        original_architecture=_FAMILIES[family],
        n_layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        d_head=d_head,
        n_heads=heads,
        n_key_value_heads=None if kv_heads == heads else kv_heads,
        d_mlp=config["intermediate_size"],
        d_vocab=config["vocab_size"],
        n_ctx=config["max_position_embeddings"],
        eps=config["rms_norm_eps"],
        act_fn=config["hidden_act"],
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=d_head,
        rotary_base=rope.get("rope_theta") or 10_000.0,
        default_prepend_bos=False,
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        init_weights=False,
        device=device,
        dtype=dtype,
        **(ntk if scaled else {}),
    )


def _refuse_what_is_not_covered(config: dict[str, Any], rope: dict[str, Any]) -> None:
    layers = config.get("num_hidden_layers", 0)
    window, length = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    slides = window is not None and window < length and config.get("use_sliding_window", config["model_type"] == "mistral")
    uncovered = {
        "mlp_bias": config.get("mlp_bias", False),
        "rope_type": rope.get("rope_type", rope.get("type", "default")) not in ("default", "llama3"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0,
        "sliding_window": slides,
        "hidden_act": config.get("hidden_act") not in ("silu", "gelu", "relu", "gelu_new"),
        "layer_types": any(kind != "full_attention" for kind in (config.get("layer_types") or [])[:layers]) and slides,
        "quantization_config": config.get("quantization_config") is not None,
        "attention_multiplier or residual_multiplier": any(key.endswith("_multiplier") for key in config),
    }
    for field, present in uncovered.items():
        if present:
            raise NotLlamaStyle(f"{field} of this configuration is not covered by HookedTransformer")


def hooked_from_folder(folder: Path, *, device: str, dtype: torch.dtype) -> HookedTransformer:
    """Builds the HookedTransformer of a Llama-style folder (`config.json` and safetensors), unprocessed.

    The parameters keep the memory layout of Hugging Face's matrices, transposed as views: TransformerLens's own forward
    pass then copies no weight.

    Raises:
        NotLlamaStyle: if the configuration is not covered, or the folder has no safetensors.
        ValueError: if weights are missing, left over or of another shape.
    """
    config = json.loads((folder / "config.json").read_text())
    cfg = hooked_config(config, device=device, dtype=dtype)
    weights = _read_weights(folder, device, dtype)
    model = HookedTransformer(cfg)
    state = _to_transformer_lens(weights, cfg)
    if weights:
        raise ValueError(f"model: {folder.name} has weights that Llama has not: {', '.join(sorted(weights)[:4])}.")
    result = model.load_state_dict(state, strict=False, assign=True)
    missing = [name for name in result.missing_keys if not name.endswith(("mask", "IGNORE", "rotary_sin", "rotary_cos"))]
    if missing or result.unexpected_keys:
        raise ValueError(f"model: {folder.name} lacks {missing[:4]} or has too much {result.unexpected_keys[:4]}.")
    return model


def _read_weights(folder: Path, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise NotLlamaStyle("the folder has no safetensors file")
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt", device=device) as stored:
            weights.update({name: stored.get_tensor(name).to(dtype) for name in stored.keys()})
    return weights


def _to_transformer_lens(weights: dict[str, Tensor], cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """TransformerLens's parameters as views of Hugging Face's; takes what it uses out of `weights`."""

    def take(name: str) -> Tensor:
        if name not in weights:
            raise ValueError(f"model: the folder lacks the weight {name}.")
        return weights.pop(name)

    def bias(name: str, *shape: int) -> Tensor:
        stored = weights.pop(name, None)
        return torch.zeros(*shape, dtype=cfg.dtype, device=cfg.device) if stored is None else stored.reshape(*shape)

    d_head, heads, d_mlp = cfg.d_head, cfg.n_heads, cfg.d_mlp
    assert d_mlp is not None
    kv_heads, grouped = cfg.n_key_value_heads or heads, "_" if cfg.n_key_value_heads else ""
    embedding = take("model.embed_tokens.weight")
    unembedding = weights.pop("lm_head.weight", embedding)
    state = {
        "embed.W_E": embedding,
        "unembed.W_U": unembedding.T,
        "unembed.b_U": torch.zeros(cfg.d_vocab, dtype=cfg.dtype, device=cfg.device),
        "ln_final.w": take("model.norm.weight"),
    }
    for layer in range(cfg.n_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        for letter, kind, n in (("Q", "q_proj", heads), ("K", "k_proj", kv_heads), ("V", "v_proj", kv_heads)):
            under = "" if letter == "Q" else grouped
            matrix, name = take(f"{theirs}.self_attn.{kind}.weight"), f"{theirs}.self_attn.{kind}.bias"
            state[f"{ours}.attn.{under}W_{letter}"] = rearrange(matrix, "(n h) m -> n m h", n=n)
            state[f"{ours}.attn.{under}b_{letter}"] = bias(name, n, d_head)
        output = take(f"{theirs}.self_attn.o_proj.weight")
        state[f"{ours}.attn.W_O"] = rearrange(output, "m (n h) -> n h m", n=heads)
        state[f"{ours}.attn.b_O"] = bias(f"{theirs}.self_attn.o_proj.bias", cfg.d_model)
        for letter, kind in (("in", "up_proj"), ("gate", "gate_proj"), ("out", "down_proj")):
            state[f"{ours}.mlp.W_{letter}"] = take(f"{theirs}.mlp.{kind}.weight").T
        state[f"{ours}.mlp.b_in"] = torch.zeros(d_mlp, dtype=cfg.dtype, device=cfg.device)
        state[f"{ours}.mlp.b_out"] = torch.zeros(cfg.d_model, dtype=cfg.dtype, device=cfg.device)
        state[f"{ours}.ln1.w"] = take(f"{theirs}.input_layernorm.weight")
        state[f"{ours}.ln2.w"] = take(f"{theirs}.post_attention_layernorm.weight")
        weights.pop(f"{theirs}.self_attn.rotary_emb.inv_freq", None)
    return state


def keep_huggingface_layout(model: HookedTransformer) -> HookedTransformer:
    """Gives the matrices of any HookedTransformer the strides that make TransformerLens's transposes free."""
    for name, parameter in model.named_parameters():
        kind = name.rsplit(".", 1)[-1].lstrip("_")
        if kind in ("W_Q", "W_K", "W_V") and parameter.ndim == 3:
            stored = rearrange(parameter.data, "n m h -> n h m").contiguous()
            parameter.data = rearrange(stored, "n h m -> n m h")
        elif kind == "W_O" and parameter.ndim == 3:
            stored = rearrange(parameter.data, "n h m -> m (n h)").contiguous()
            parameter.data = rearrange(stored, "m (n h) -> n h m", n=parameter.shape[0])
        elif kind in ("W_in", "W_gate", "W_out", "W_U") and parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
    return model


def is_tied(model: nn.Module) -> bool:
    """True if the unembedding is the embedding's own memory."""
    return model.unembed.W_U.data_ptr() == model.embed.W_E.data_ptr()  # type: ignore[union-attr]
