"""Llama-style Hugging Face folders as HookedTransformers, with Hugging Face's numbers and memory layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformer_lens import HookedTransformer
from transformer_lens.config import HookedTransformerConfig

from rt_lens.models.llama import FAMILIES, NotLlamaStyle, read_config, refuse_what_is_not_covered

_BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
_INDEX = "model.safetensors.index.json"


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


def hooked_from_folder(
    folder: Path, *, device: str, dtype: torch.dtype, trust_remote_code: bool = False
) -> HookedTransformer:
    """Builds the HookedTransformer of a Llama-style folder (`config.json` and safetensors), unprocessed.

    The parameters keep the memory layout of Hugging Face's matrices, transposed as views, so TransformerLens's forward
    pass copies no weight; those that read the same input lie one after the other (see `lean.joined`). Each weight is
    read directly to the device, which holds the weights once.

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
    context, cfg.n_ctx = cfg.n_ctx, 1  # else every block would compute the same table of rotary angles
    with _WithoutMemory():
        model = HookedTransformer(cfg, move_to_device=False)
    model.cfg.device, model.cfg.n_ctx = device, context
    _share_rotary_tables(model, device or "cpu")
    buffers = {
        name: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)  # only empty ones
        for name, tensor in model.state_dict().items()
        if name.endswith(_BUFFERS)
    }
    model.load_state_dict(state | buffers, assign=True)
    return model


def _share_rotary_tables(model: HookedTransformer, device: str) -> None:
    """Gives all blocks one table of rotary angles, as TransformerLens computes it; who outgrows it makes its own."""
    cfg, attention = model.cfg, model.blocks[0].attn
    assert cfg.rotary_dim is not None
    rows = min(cfg.n_ctx, attention.ROTARY_INITIAL_CACHE_SIZE)
    tables = attention.calculate_sin_cos_rotary(cfg.rotary_dim, rows, base=cfg.rotary_base, dtype=cfg.dtype)
    sin, cos = (table.to(device) for table in tables)
    for block in model.blocks:
        block.attn.rotary_sin, block.attn.rotary_cos = sin, cos


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
    counts = {"Q": heads, "K": kv_heads, "V": kv_heads}
    embedding = take("model.embed_tokens.weight", cfg.d_vocab, d_model)
    state = {
        "embed.W_E": embedding,
        "unembed.W_U": _unembedding(embedding, weights, cfg, take).T,
        "unembed.b_U": zeros(cfg.d_vocab),
        "ln_final.w": take("model.norm.weight", d_model),
    }
    for layer in range(cfg.n_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        matrices, biases = [], []
        for letter, n in counts.items():
            stem = f"{theirs}.self_attn.{letter.lower()}_proj"
            matrices.append(take(f"{stem}.weight", n * d_head, d_model))
            biases.append(take(f"{stem}.bias", n * d_head) if letter in biased else zeros(n * d_head))
        for (letter, n), matrix, bias in zip(
            counts.items(), _side_by_side(matrices), _side_by_side(biases), strict=True
        ):
            applied = "" if letter == "Q" else grouped
            state[f"{ours}.attn.{applied}W_{letter}"] = rearrange(matrix, "(n h) m -> n m h", n=n)
            state[f"{ours}.attn.{applied}b_{letter}"] = rearrange(bias, "(n h) -> n h", n=n)
        output = take(f"{theirs}.self_attn.o_proj.weight", d_model, heads * d_head)
        state[f"{ours}.attn.W_O"] = rearrange(output, "m (n h) -> n h m", n=heads)
        state[f"{ours}.attn.b_O"] = (
            take(f"{theirs}.self_attn.o_proj.bias", d_model) if "O" in biased else zeros(d_model)
        )
        gate, up = _side_by_side([take(f"{theirs}.mlp.{kind}_proj.weight", d_mlp, d_model) for kind in ("gate", "up")])
        state[f"{ours}.mlp.W_in"], state[f"{ours}.mlp.W_gate"] = up.T, gate.T
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


def _side_by_side(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parts in one memory, one after the other."""
    return torch.cat(list(parts)).split([len(part) for part in parts])


def _unembedding(
    embedding: Tensor, weights: dict[str, Tensor], cfg: HookedTransformerConfig, take: Callable[..., Tensor]
) -> Tensor:
    """The unembedding as Hugging Face reads it: a tied one that is stored with other numbers is not tied."""
    if cfg.tie_word_embeddings and "lm_head.weight" not in weights:
        return embedding
    stored = take("lm_head.weight", cfg.d_vocab, cfg.d_model)
    cfg.tie_word_embeddings = cfg.tie_word_embeddings and torch.equal(stored, embedding)
    return embedding if cfg.tie_word_embeddings else stored
