"""A model's parameters, or a change of them, in Hugging Face's names, layout and configuration. It writes nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import JointQKVAttentionBridge
from transformers import CONFIG_MAPPING, LlamaConfig, PretrainedConfig

from rt_lens.models.forward import model_name
from rt_lens.models.llama import FAMILIES, NotLlamaStyle, refuse_what_is_not_covered, to_huggingface
from rt_lens.models.parameter_names import plain_name
from rt_lens.models.protocol import Model
from rt_lens.tuning.delta import WeightDelta

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a Hugging Face folder holds of a model.

    Attributes:
        config: its configuration; the class of it decides what the folder is opened as.
        weights: Hugging Face's name -> tensor, views of the model's memory where they can be.
        generation: its generation settings, if there were any.
        note: what differs from the source's format, for the card; empty if nothing does.
    """

    config: PretrainedConfig
    weights: dict[str, Tensor]
    generation: dict[str, Any] | None
    note: str

    @property
    def n_bytes(self) -> int:
        """Size of the weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights.values())


@torch.no_grad()
def as_huggingface(model: Model, delta: WeightDelta | None) -> HuggingFaceModel:
    """The model under a change, as Hugging Face's; the model itself stays as it is.

    Raises:
        ValueError: if the model has no form in Hugging Face's files, or the change has no place in them.
    """
    if isinstance(model, TransformerBridge):
        exported = _of_bridge(model, delta)
    else:
        config = source_config(model)
        with changed_by(model, delta):
            parameters = {name: parameter.data for name, parameter in model.named_parameters()}
        exported = _of_hooked(model, config, parameters)
    exported.config.architectures = [_class_name(model, exported.config)]
    exported.config.dtype = next(iter(model.parameters())).dtype
    return exported


def changed_by(model: Model, delta: WeightDelta | None) -> AbstractContextManager[Any]:
    """The model with a change of its weights, or as it is."""
    return nullcontext(model) if delta is None else delta.applied(model)


def source_config(model: Model) -> PretrainedConfig:
    """A copy of the Hugging Face configuration that the model was made from.

    Raises:
        ValueError: if there is none, or a HookedTransformer is of a family whose weights have no way back.
    """
    config: Any
    if isinstance(model, TransformerBridge):
        config = copy.deepcopy(model.original_model.config)
    else:
        kept = getattr(model.cfg, "rt_lens_config", None)
        if kept is None or kept["model_type"] not in FAMILIES:
            family = "no configuration" if kept is None else f"family {kept['model_type']}"
            raise ValueError(
                f"model must be of a family with a way back to Hugging Face's files ({', '.join(FAMILIES)}), got "
                f"{type(model).__name__} {model_name(model)} with {family}. Load it with load_model(..., "
                "backend='bridge'), and make the change on that."
            )
        config = CONFIG_MAPPING[kept["model_type"]].from_dict(kept)
    config._name_or_path = ""  # where the source was on this machine
    return config


@torch.no_grad()
def changes_as_huggingface(model: Model, delta: WeightDelta) -> dict[str, Tensor]:
    """The differences that are not zero, by Hugging Face's names and in its layout.

    What has no place in Hugging Face's files keeps the name that it has here.
    """
    with delta.applied(model):
        pass  # it fits: names and shapes are the model's
    changes = {}
    for name, change in delta.changes.items():
        if change.any():
            renamed = None if isinstance(model, TransformerBridge) else to_huggingface(name, change)
            their_name, tensor = renamed or (plain_name(name), change)
            changes[their_name] = tensor
    return changes


def _class_name(model: Model, config: PretrainedConfig) -> str:
    return type(model.original_model).__name__ if isinstance(model, TransformerBridge) else FAMILIES[config.model_type]


def _of_hooked(model: Model, config: PretrainedConfig, parameters: Mapping[str, Tensor]) -> HuggingFaceModel:
    weights: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        renamed = to_huggingface(name, parameter)
        if renamed is not None:
            weights[renamed[0]] = renamed[1]
        elif parameter.any() and not name.endswith(".mlp.b_in"):
            raise ValueError(
                f"delta must change only what {FAMILIES[config.model_type]} has in its files, got {name}, which is not "
                "zero. Leave it out of the change, or keep it as a hook."
            )
    for layer in range(model.cfg.n_layers):  # added after the gate, b_in is a constant before W_out
        hooked, their_bias = f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp.down_proj.bias"
        if parameters[f"{hooked}.b_in"].any():
            weights[their_bias] = weights[their_bias] + parameters[f"{hooked}.b_in"] @ parameters[f"{hooked}.W_out"]
    if config.tie_word_embeddings and torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
        del weights["lm_head.weight"]
    else:
        config.tie_word_embeddings = False
    config, note = _with_biases(model, config, weights)
    settings = model.cfg.rt_lens_generation
    came_without = settings is None or settings.get("_from_model_config")  # they follow from the configuration
    return HuggingFaceModel(config, weights, None if came_without else settings, note)


def _with_biases(model: Model, config: PretrainedConfig, weights: dict[str, Tensor]) -> tuple[PretrainedConfig, str]:
    """A configuration that has a place for every bias that is not zero; `weights` then has what it asks for."""
    biases = [name for name, tensor in weights.items() if name.endswith(".bias") and tensor.any()]
    kinds, note = {name.split(".", 3)[3].removesuffix(".bias") for name in biases}, ""
    if kinds - _biased(config):
        kinds |= _biased(config)
        config = _as_llama(model, config, bool(kinds.intersection(_ATTENTION)), bool(kinds.intersection(_MLP)))
        note = (
            "The change has biases that the base model's format has no place for, so it is written as LlamaForCausalLM "
            "with biases; what it computes is the same."
        )
    for layer in range(model.cfg.n_layers):
        for kind in (*_ATTENTION, *_MLP):
            name = f"model.layers.{layer}.{kind}"
            if kind not in _biased(config):
                weights.pop(f"{name}.bias", None)
            elif f"{name}.bias" not in weights:
                weights[f"{name}.bias"] = torch.zeros_like(weights[f"{name}.weight"][:, 0])
    return config, note


def _biased(config: PretrainedConfig) -> set[str]:
    """Which projections have a bias under a configuration."""
    if config.model_type == "qwen2":
        return set(_ATTENTION[:3])
    attention, mlp = getattr(config, "attention_bias", False), getattr(config, "mlp_bias", False)
    return {*(_ATTENTION if attention else ()), *(_MLP if mlp else ())}


def _as_llama(model: Model, config: PretrainedConfig, attention: bool, mlp: bool) -> LlamaConfig:
    """The same maths as a Llama's, with biases: the other families are that, once no window slides."""
    source = config.to_dict()
    try:
        refuse_what_is_not_covered(source)
    except NotLlamaStyle as refusal:
        raise ValueError(
            f"delta must change only what {FAMILIES[config.model_type]} has in its files, got biases, and as a Llama "
            "it "
            f"cannot be written ({refusal}). Leave the biases out, or keep the hooks."
        ) from None
    shared = {field: source[field] for field in LlamaConfig().to_dict().keys() & source.keys()}
    settings = {"model_type": "llama", "head_dim": model.cfg.d_head, "attention_bias": attention, "mlp_bias": mlp}
    return LlamaConfig.from_dict(shared | settings)


def _of_bridge(model: TransformerBridge, delta: WeightDelta | None) -> HuggingFaceModel:
    original, config = model.original_model, source_config(model)
    with torch.device("meta"):
        plain = type(original)(copy.deepcopy(config))
    repeated = plain.state_dict().keys() & dict(plain.named_parameters(remove_duplicate=False)).keys()
    in_file = (plain.state_dict().keys() - repeated) | dict(plain.named_parameters()).keys()  # tied ones once
    modules = original.named_modules()
    joint = {plain_name(name): part for name, part in modules if isinstance(part, JointQKVAttentionBridge)}
    with changed_by(model, delta):
        state = {plain_name(name): tensor for name, tensor in original.state_dict().items()}
        for name, attention in joint.items():
            state |= _joined(name, attention)
    for name, change in (delta.changes if delta else {}).items():
        inside = any(plain_name(name).startswith(f"{attention}.") for attention in joint)
        if change.any() and plain_name(name) not in in_file and not inside:
            raise ValueError(
                f"delta must change only what {type(original).__name__} has in its files, got {plain_name(name)}. "
                "Leave it out of the change, or keep it as a hook."
            )
    weights = {name: state[name] for name in sorted(in_file)}
    generation = getattr(original, "generation_config", None)
    return HuggingFaceModel(config, weights, generation and generation.to_diff_dict(), "")


def _joined(name: str, attention: JointQKVAttentionBridge) -> dict[str, Tensor]:
    """The one projection of query, key and value that a bridge has split in three, which are what it computes with."""
    parts: list[nn.Linear] = [getattr(attention, letter).original_component for letter in "qkv"]
    default = JointQKVAttentionBridge._default_split_qkv_matrix
    if getattr(attention.split_qkv_matrix, "__func__", None) is not default:  # bound to the block it was copied from
        apart = attention.split_qkv_matrix(attention.original_component)
        if all(torch.equal(now.weight, before.weight) for now, before in zip(parts, apart, strict=True)):
            return {}
        raise ValueError(
            f"delta must not change query, key or value in {name}, which keeps them in one matrix of an order of its "
            "own. Train other target_modules, such as o, up and down."
        )
    target = f"{name}.{attention.submodules['qkv'].name}"
    joined = {f"{target}.weight": torch.cat([part.weight.data for part in parts]).T}  # GPT-2's layout is [in, out]
    if parts[0].bias is not None:
        joined[f"{target}.bias"] = torch.cat([part.bias.data for part in parts])
    return joined
