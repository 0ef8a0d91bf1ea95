"""Llama-style Hugging Face folders to HookedTransformers with Hugging Face's numbers and memory layout, and back.

If HookedTransformer's maths does not cover a configuration field, `hooked_config` raises an error that names the field
instead of loading a model that is nearly right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformer_lens import HookedTransformer
from transformer_lens.config import HookedTransformerConfig

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
_INDEX = "model.safetensors.index.json"
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


def hooked_config(config: dict[str, Any], *, device: str, dtype: torch.dtype) -> HookedTransformerConfig:
    """The HookedTransformer configuration of a Llama-style Hugging Face configuration.

    Args:
        config: Hugging Face's configuration as a dictionary, with the defaults of its class (`read_config`).
        device: torch device.
        dtype: type of the weights.

    Raises:
        NotLlamaStyle: if a field needs maths that is not covered.
    """
    family = config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    d_head = config.get("head_dim") or config["hidden_size"] // heads
    rope = config["rope_parameters"]
    refuse_what_is_not_covered(config)
    scaled = rope["rope_type"] == "llama3"
    ntk = {
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_low_freq_factor": rope.get("low_freq_factor"),
        "NTK_by_parts_high_freq_factor": rope.get("high_freq_factor"),
        "NTK_by_parts_factor": rope.get("factor"),
        "NTK_original_ctx_len": rope.get("original_max_position_embeddings"),
    }
    return HookedTransformerConfig(
        model_name=Path(str(config.get("_name_or_path") or family)).name,
        original_architecture=FAMILIES[family],
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
        rotary_base=rope["rope_theta"],
        default_prepend_bos=False,
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        init_weights=False,
        device=device,
        dtype=dtype,
        **(ntk if scaled else {}),
    )


def refuse_what_is_not_covered(config: dict[str, Any]) -> None:
    """Raises NotLlamaStyle, with the field's name, if a configuration needs maths that is not covered."""
    rope, window, length = config["rope_parameters"], config.get("sliding_window"), config["max_position_embeddings"]
    may_slide = config["model_type"] != "qwen2" or config["use_sliding_window"]
    uncovered = {
        "rope_type": rope.get("rope_type") not in ("default", "llama3"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "sliding_window": may_slide and window is not None and window < length,
        "hidden_act": config["hidden_act"] not in ("silu", "gelu", "relu", "gelu_new"),
        "quantization_config": config.get("quantization_config") is not None,
        **{field: True for field in config if field.endswith("_multiplier")},
    }
    for field, present in uncovered.items():
        if present:
            value = rope.get(field, config.get(field))
            raise NotLlamaStyle(f"{field} {value!r} of this configuration is not covered by HookedTransformer")


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


def hooked_from_folder(
    folder: Path, *, device: str, dtype: torch.dtype, trust_remote_code: bool = False
) -> HookedTransformer:
    """Builds the HookedTransformer of a Llama-style folder (`config.json` and safetensors), unprocessed.

    The parameters keep the memory layout of Hugging Face's matrices, transposed as views, so TransformerLens's forward
    pass copies no weight. Each weight is read directly to the device, which holds the weights once.

    Raises:
        NotLlamaStyle: if the configuration is not covered, the MLPs have biases before their product, or the folder
            has no safetensors.
        ValueError: if weights are missing, superfluous or of another shape.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    cfg = hooked_config(config, device=device, dtype=dtype)
    biased = {"llama": "QKVO" if config.get("attention_bias") else "", "mistral": "", "qwen2": "QKV"}
    weights = _read_weights(folder, device, dtype)
    letters = biased[config["model_type"]] + ("M" if config.get("mlp_bias") else "")
    state = _to_transformer_lens(weights, cfg, letters, folder.name)
    if weights:
        raise ValueError(
            f"model: {folder.name} must hold only weights that its config.json describes, got "
            f"{', '.join(sorted(weights)[:4])} too. Correct the configuration, or save the model again with "
            "save_pretrained."
        )
    return _assembled(cfg, state)


class _WithoutMemory(TorchFunctionMode):
    """Mode in which new parameters have shapes and no memory; computed tensors (rotary angles) stay real."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _assembled(cfg: HookedTransformerConfig, state: dict[str, Tensor]) -> HookedTransformer:
    """A HookedTransformer whose parameters are the tensors of `state`; it allocates no further memory of their size."""
    device, cfg.device = cfg.device, "cpu"
    with _WithoutMemory():
        model = HookedTransformer(cfg, move_to_device=False)
    model.cfg.device = device
    buffers = {
        name: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)  # only empty ones
        for name, tensor in model.state_dict().items()
        if name.endswith(_BUFFERS)
    }
    model.load_state_dict(state | buffers, assign=True)
    return model


def _read_weights(folder: Path, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights from the files that Hugging Face reads: model.safetensors, else the shards of its index."""
    files = [folder / "model.safetensors"]
    if not files[0].is_file() and (folder / _INDEX).is_file():
        shards = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(shards))]
    elif not files[0].is_file():
        raise NotLlamaStyle(f"the folder has neither model.safetensors nor {_INDEX}")
    weights: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"model: {folder.name} must hold every shard of its index, got none called {file.name}. Download it "
                "again."
            )
        with safe_open(file, framework="pt", device=device) as stored:
            weights.update({name: stored.get_tensor(name).to(dtype) for name in stored.keys()})  # noqa: SIM118
    return weights


def _to_transformer_lens(
    weights: dict[str, Tensor], cfg: HookedTransformerConfig, biased: str, folder: str
) -> dict[str, Tensor]:
    """TransformerLens's parameters as views of Hugging Face's; removes those that it uses from `weights`.

    Args:
        biased: which of the attention's matrices Q, K, V and O have a bias, and M if those of the MLP do.
    """

    def take(name: str, *shape: int) -> Tensor:
        if name not in weights:
            raise ValueError(
                f"model: {folder} must hold the weight {name}, got none. Download the folder again, or save it with "
                "save_pretrained."
            )
        if weights[name].shape != shape:
            raise ValueError(
                f"model: {name} of {folder} must have the shape {shape} that its config.json describes, got "
                f"{tuple(weights[name].shape)}. Correct the config.json."
            )
        return weights.pop(name)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=cfg.dtype, device=cfg.device)

    d_model, d_head, heads, d_mlp = cfg.d_model, cfg.d_head, cfg.n_heads, cfg.d_mlp
    assert d_mlp is not None
    kv_heads, grouped = cfg.n_key_value_heads or heads, "_" if cfg.n_key_value_heads else ""
    embedding = take("model.embed_tokens.weight", cfg.d_vocab, d_model)
    state = {
        "embed.W_E": embedding,
        "unembed.W_U": _unembedding(embedding, weights, cfg, take).T,
        "unembed.b_U": zeros(cfg.d_vocab),
        "ln_final.w": take("model.norm.weight", d_model),
    }
    for layer in range(cfg.n_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        for letter, kind, n in (("Q", "q_proj", heads), ("K", "k_proj", kv_heads), ("V", "v_proj", kv_heads)):
            applied, stem = "" if letter == "Q" else grouped, f"{theirs}.self_attn.{kind}"
            matrix = take(f"{stem}.weight", n * d_head, d_model)
            bias = take(f"{stem}.bias", n * d_head) if letter in biased else zeros(n * d_head)
            state[f"{ours}.attn.{applied}W_{letter}"] = rearrange(matrix, "(n h) m -> n m h", n=n)
            state[f"{ours}.attn.{applied}b_{letter}"] = rearrange(bias, "(n h) -> n h", n=n)
        output = take(f"{theirs}.self_attn.o_proj.weight", d_model, heads * d_head)
        state[f"{ours}.attn.W_O"] = rearrange(output, "m (n h) -> n h m", n=heads)
        state[f"{ours}.attn.b_O"] = (
            take(f"{theirs}.self_attn.o_proj.bias", d_model) if "O" in biased else zeros(d_model)
        )
        state[f"{ours}.mlp.W_in"] = take(f"{theirs}.mlp.up_proj.weight", d_mlp, d_model).T
        state[f"{ours}.mlp.W_gate"] = take(f"{theirs}.mlp.gate_proj.weight", d_mlp, d_model).T
        state[f"{ours}.mlp.W_out"] = take(f"{theirs}.mlp.down_proj.weight", d_model, d_mlp).T
        state[f"{ours}.mlp.b_in"] = zeros(d_mlp)
        for kind in ("gate_proj", "up_proj") if "M" in biased else ():
            if take(f"{theirs}.mlp.{kind}.bias", d_mlp).any():
                raise NotLlamaStyle(
                    f"mlp_bias True with a {kind}.bias other than 0 is not covered by HookedTransformer"
                )
        state[f"{ours}.mlp.b_out"] = take(f"{theirs}.mlp.down_proj.bias", d_model) if "M" in biased else zeros(d_model)
        state[f"{ours}.ln1.w"] = take(f"{theirs}.input_layernorm.weight", d_model)
        state[f"{ours}.ln2.w"] = take(f"{theirs}.post_attention_layernorm.weight", d_model)
        weights.pop(f"{theirs}.self_attn.rotary_emb.inv_freq", None)
    return state


def _unembedding(
    embedding: Tensor, weights: dict[str, Tensor], cfg: HookedTransformerConfig, take: Callable[..., Tensor]
) -> Tensor:
    """The unembedding as Hugging Face reads it: a tied one that is stored with other numbers is not tied."""
    if cfg.tie_word_embeddings and "lm_head.weight" not in weights:
        return embedding
    stored = take("lm_head.weight", cfg.d_vocab, cfg.d_model)
    cfg.tie_word_embeddings = cfg.tie_word_embeddings and torch.equal(stored, embedding)
    return embedding if cfg.tie_word_embeddings else stored


def to_huggingface(name: str, parameter: Float[Tensor, "..."]) -> tuple[str, Float[Tensor, "..."]] | None:
    """A TransformerLens parameter under Hugging Face's name and in its layout: the inverse of `hooked_from_folder`.

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
