"""Tiny random models of many families, as `save_pretrained` writes them. Their tokens are bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

D_MODEL, D_VOCAB, N_BLOCKS = 32, 258, 3
CONTEXT, WINDOW, ORIGINAL = 64, 6, 16
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_SIZES = {
    "vocab_size": D_VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_BLOCKS, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": CONTEXT, **_SPECIAL,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_NAMED_OTHERWISE = {"vocab_size": D_VOCAB, **_SPECIAL}


@dataclass(frozen=True)
class Family:
    """A configuration, what in it matters, and where Hugging Face's blocks write.

    Attributes:
        config: fields of the Hugging Face configuration, `model_type` among them.
        neutral: other values of single fields, each of which gives other logits.
        attention: module of a block whose output is attn_out.
        mlp: module of a block whose output is mlp_out.
        written_times: what a block multiplies both by before they join the residual stream.
        hooked: whether it may be a HookedTransformer.
        experts: whether its MLPs are mixtures of experts.
        length: tokens up to which the angles of keys stay as they are.
        remark: for the table.
    """

    config: Mapping[str, Any]
    neutral: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "self_attn"
    mlp: str = "mlp"
    written_times: float = 1.0
    hooked: bool = False
    experts: bool = False
    length: int = 24
    remark: str = ""


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 100.0, **parameters}


def _llama(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"model_type": "llama", **_GROUPED, "rope_parameters": _rope(kind, **parameters)}


_PLAIN_ROPE = {"rope_parameters": _rope("default")}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
_LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
_GEMMA = {
    **_GROUPED, "head_dim": 8, "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
_AFTER = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
_NORMED = "Norms what a block writes, so edits of it are not baked."

FAMILIES: dict[str, Family] = {
    "Llama": Family(_llama("default"), hooked=True),
    "Llama, rope llama3": Family(_llama("llama3", **_LLAMA3), _PLAIN_ROPE, hooked=True),
    "Llama, rope linear": Family(_llama("linear", factor=4.0), _PLAIN_ROPE),
    "Llama, rope dynamic": Family(
        {**_llama("dynamic", factor=4.0), "max_position_embeddings": ORIGINAL}, _PLAIN_ROPE, length=ORIGINAL - 1,
        remark="Within max_position_embeddings. Beyond, angles go by the longest text so far, as in transformers.",
    ),
    "Llama, rope yarn": Family(
        _llama("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL), _PLAIN_ROPE
    ),
    "Mistral": Family({"model_type": "mistral", **_GROUPED, "sliding_window": None}, hooked=True),
    "Mistral, sliding window": Family(
        {"model_type": "mistral", **_GROUPED, "sliding_window": WINDOW}, {"sliding_window": None}
    ),
    "Qwen2": Family({"model_type": "qwen2", **_GROUPED}, hooked=True),
    "Qwen3": Family({"model_type": "qwen3", **_GROUPED, "head_dim": 8}),
    "Gemma 2": Family(
        {"model_type": "gemma2", **_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": CONTEXT},
        **_AFTER, remark=_NORMED,
    ),
    "Gemma 3": Family(
        {"model_type": "gemma3_text", **_GEMMA}, {"sliding_window": CONTEXT}, **_AFTER, remark=_NORMED
    ),
    "Phi-2": Family(
        {"model_type": "phi", **_GROUPED, "rope_parameters": _rope("default", partial_rotary_factor=0.5)},
        {"rope_parameters": _rope("default", partial_rotary_factor=1.0)},
        remark="Parallel blocks: no resid_mid.",
    ),
    "Phi-3": Family(
        {"model_type": "phi3", **_GROUPED}, remark="q, k, v and gate, up are one matrix each, tuned together."
    ),
    "Phi-3, rope longrope": Family(
        {"model_type": "phi3", **_GROUPED, "original_max_position_embeddings": ORIGINAL,
         "rope_parameters": _rope("longrope", **_LONG)},
        _PLAIN_ROPE, length=ORIGINAL,
        remark="All rows of a batch get the angles of its longest, as in transformers; what grows past "
               "original_max_position_embeddings is generated without a cache.",
    ),
    "GPT-2": Family(
        {"model_type": "gpt2", **_NAMED_OTHERWISE, "n_embd": D_MODEL, "n_layer": N_BLOCKS, "n_head": 4,
         "n_positions": CONTEXT},
        attention="attn", remark="q, k and v are one matrix, tuned together.",
    ),
    "GPT-NeoX": Family(
        {"model_type": "gpt_neox", **_SIZES, "use_parallel_residual": True,
         "rope_parameters": _rope("default", partial_rotary_factor=0.25)},
        {"use_parallel_residual": False, "rope_parameters": _rope("default", partial_rotary_factor=1.0)},
        attention="attention", remark="Parallel blocks: no resid_mid. q, k and v are one matrix, tuned together.",
    ),
    "OPT": Family(
        {"model_type": "opt", **_NAMED_OTHERWISE, "hidden_size": D_MODEL, "num_hidden_layers": N_BLOCKS,
         "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": D_MODEL, "max_position_embeddings": CONTEXT},
        mlp="fc2",
    ),
    "BLOOM": Family(
        {"model_type": "bloom", **_NAMED_OTHERWISE, "hidden_size": D_MODEL, "n_layer": N_BLOCKS, "n_head": 4},
        attention="self_attention.dense", mlp="mlp.dense_4h_to_h",
        remark="Norms its embeddings, so an ablation of the whole stream is not baked. q, k and v are one matrix.",
    ),
    "Granite": Family(
        {"model_type": "granite", **_GROUPED, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
         "logits_scaling": 3.0, "attention_multiplier": 0.3},
        {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0, "attention_multiplier": 1.0},
        written_times=0.5, remark="attn_out and mlp_out are after residual_multiplier.",
    ),
    "Cohere": Family(
        {"model_type": "cohere", **_GROUPED, "logit_scale": 0.25}, {"logit_scale": 1.0},
        remark="Parallel blocks: no resid_mid.",
    ),
    "Mixtral": Family(
        {"model_type": "mixtral", **_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"num_experts_per_tok": 1}, experts=True, remark="Experts and routers are not tuned.",
    ),
    "Qwen2-MoE": Family(
        {"model_type": "qwen2_moe", **_GROUPED, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        {"num_experts_per_tok": 1}, experts=True, remark="Experts and routers are not tuned.",
    ),
}  # fmt: skip


def with_config(family: Family, **changes: Any) -> Family:
    """The family with other fields of its configuration."""
    return replace(family, config={**family.config, **changes})


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, which the tokenizer class of every family leaves so."""
    ids = {"<pad>": 0, "</s>": 1} | {letter: 2 + n for n, letter in enumerate(sorted(ByteLevel.alphabet()))}
    made = Tokenizer(BPE(ids, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")


def random_model(family: Family) -> Any:
    """transformers' model, whose every parameter is random: no bias is 0, and no norm is 1."""
    fields = {name: value for name, value in family.config.items() if name != "model_type"}
    config = CONFIG_MAPPING[family.config["model_type"]](**fields)
    made, noise = AutoModelForCausalLM.from_config(config, dtype=torch.float32), torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        around = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        parameter.data = around + 0.25 * torch.randn(parameter.shape, generator=noise)
    return made.eval()


def folder_of(family: Family, folder: Path) -> Path:
    """A folder that `save_pretrained` wrote."""
    random_model(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def huggingface(folder: Path) -> Any:
    """transformers' own model of a folder, to compare with."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def blocks_of(plain: Any) -> Any:
    """The blocks of transformers' model."""
    return next(part for part in plain.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == N_BLOCKS)
