"""Random two-block Llama-style models: HookedTransformers, or with TransformerLens 4 the bridges of such a Llama."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rt_lens.models.backends import has_hooked
from rt_lens.models.backends.bridge_folder import bridge_from_folder

DEFAULT_KIND = "hooked" if has_hooked() else "bridge"
"""What `load_model` makes of a Llama."""

_SIZES = {
    "n_layers": 2, "d_model": 32, "d_head": 8, "n_heads": 4, "n_key_value_heads": 2, "d_mlp": 64, "d_vocab": 49152,
    "n_ctx": 256, "model_name": "tiny", "dtype": torch.float32, "seed": 0, "device": "cpu",
}  # fmt: skip
_HUGGING_FACES = {
    "n_layers": "num_hidden_layers", "d_model": "hidden_size", "d_head": "head_dim", "n_heads": "num_attention_heads",
    "n_key_value_heads": "num_key_value_heads", "d_mlp": "intermediate_size", "d_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
}  # fmt: skip


def tiny_model(tokenizer: Any, folder: Path, **changes: Any) -> Any:
    """A model of HookedTransformer's configuration with these changes; as a bridge, sizes and type alone can change."""
    model = (_hooked if has_hooked() else _bridge)({**_SIZES, **changes}, folder)
    model.tokenizer = tokenizer
    model.cfg.tokenizer_prepends_bos = False
    return model.eval()


def _hooked(settings: dict[str, Any], folder: Path) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.config import HookedTransformerConfig

    llama = {
        "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "final_rms": True, "rotary_dim": 8,
        "positional_embedding_type": "rotary", "rotary_adjacent_pairs": False, "default_prepend_bos": False,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*HookedTransformer is deprecated.*")
        model = HookedTransformer(HookedTransformerConfig(**{**llama, **settings}))
    noise = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # else biases are zero and norms are one, and hide mistakes
        if name.rsplit(".", 1)[-1].lstrip("_").startswith(("b_", "w", "b")) and parameter.ndim < 3:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
    return model


def _bridge(settings: dict[str, Any], folder: Path) -> Any:
    """Of a Llama with a bias in every projection."""
    unknown = settings.keys() - _SIZES.keys()
    assert not unknown, f"mark this test as `hooked`: a Llama has no {', '.join(sorted(unknown))}"
    config = LlamaConfig(
        **{theirs: settings[ours] for ours, theirs in _HUGGING_FACES.items()}, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(settings["seed"])
    made, noise = LlamaForCausalLM(config), torch.Generator().manual_seed(settings["seed"] + 1)
    for name, parameter in made.named_parameters():
        wide = "embed_tokens" not in name and parameter.ndim > 1
        scale = 0.8 / parameter.shape[-1] ** 0.5 if wide else 0.1 if parameter.ndim < 2 else 0.8
        parameter.data = float("norm" in name) + scale * torch.randn(parameter.shape, generator=noise)
    made.to(settings["dtype"]).save_pretrained(folder)
    model = bridge_from_folder(folder, "tiny", device=settings["device"], dtype=settings["dtype"])
    model.cfg.model_name, model.cfg.default_prepend_bos = settings["model_name"], False
    return model
