"""A model's parameters, or a change of them, in Hugging Face's names, layout and configuration. It writes nothing."""

from __future__ import annotations

import copy
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from rt_lens.models.backends import backend_of
from rt_lens.models.forward import model_name
from rt_lens.models.llama import FAMILIES, slides
from rt_lens.models.protocol import Model
from rt_lens.tuning.delta import WeightDelta, fitting

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
    config = source_config(model)
    with changed_by(model, delta):
        weights = backend_of(model).huggingface()
    exported = _with_places(model, config, weights)
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
    backend = backend_of(model)
    config: Any = backend.source_config()
    if config is None or (backend.kind == "hooked" and config.model_type not in FAMILIES):
        family = "no configuration" if config is None else f"family {config.model_type}"
        raise ValueError(
            f"model must be of a family with a way back to Hugging Face's files ({', '.join(FAMILIES)}), got "
            f"{type(model).__name__} {model_name(model)} with {family}. Load it with load_model(..., "
            "backend='bridge'), and make the change on that."
        )
    config._name_or_path = ""  # where the source was on this machine
    return config


@torch.no_grad()
def changes_as_huggingface(model: Model, delta: WeightDelta) -> dict[str, Tensor]:
    """The differences that are not zero, by Hugging Face's names and in its layout.

    What has no place in Hugging Face's files keeps the name that it has here.
    """
    backend = backend_of(model)
    named = {name: change for name, change in fitting(delta, model).items() if change.any()}
    return dict(backend.as_huggingface(name, change) or (name, change) for name, change in named.items())


def _with_places(model: Model, config: PretrainedConfig, weights: dict[str, Tensor]) -> HuggingFaceModel:
    """The weights with a configuration that has a place for each of them that is not zero."""
    skeleton, note = _skeleton(config), ""
    for name, first in _tied(skeleton).items():
        if name in weights and not torch.equal(weights[name], weights[first]):
            config.tie_word_embeddings = False
            skeleton = _skeleton(config)
    places = _in_files(skeleton).keys() | _tied(skeleton).keys()
    without = [name for name, tensor in weights.items() if name not in places and tensor.any()]
    projections = all(re.fullmatch(r"model\.layers\.\d+\.\w+\.\w+\.bias", name) for name in without)
    if without and projections and config.model_type in FAMILIES:
        config = _as_llama(model, config, {name.split(".", 3)[3].removesuffix(".bias") for name in without})
        skeleton, without = _skeleton(config), []
        note = (
            "The change has biases that the base model's format has no place for, so it is written as LlamaForCausalLM "
            "with biases; what it computes is the same."
        )
    if without:
        raise ValueError(
            f"delta must change only what {type(skeleton).__name__} has in its files, got {without[0]}, which is not "
            "zero. Leave it out of the change, or keep it as a hook."
        )
    settings = getattr(model.cfg, "rt_lens_generation", None)
    came_without = settings is None or settings.get("_from_model_config")  # they follow from the configuration
    placed = {
        name: weights[name] if name in weights else _zeros(model, shape) for name, shape in _in_files(skeleton).items()
    }
    config.architectures = [type(skeleton).__name__]
    return HuggingFaceModel(config, placed, None if came_without else settings, note)


def _skeleton(config: PretrainedConfig) -> Any:
    """transformers' model of a configuration, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def _tied(skeleton: Any) -> dict[str, str]:
    """Name of a tied parameter -> the name under which it is in files."""
    first: dict[int, str] = {}
    named = list(skeleton.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        first.setdefault(id(parameter), name)
    return {name: first[id(parameter)] for name, parameter in named if first[id(parameter)] != name}


def _in_files(skeleton: Any) -> dict[str, torch.Size]:
    """Name -> shape of what a folder of this model holds; what is tied, once."""
    tied = _tied(skeleton)
    return {name: tensor.shape for name, tensor in skeleton.state_dict().items() if name not in tied}


def _zeros(model: Model, shape: torch.Size) -> Tensor:
    like = next(iter(model.parameters()))
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _as_llama(model: Model, config: PretrainedConfig, biased: set[str]) -> LlamaConfig:
    """The same maths as a Llama's, with biases: the other families are that, once no window slides."""
    source = config.to_dict()
    if slides(source):
        raise ValueError(
            f"delta must change only what {FAMILIES[config.model_type]} has in its files, got biases, and as a Llama "
            f"it cannot be written (sliding_window {source['sliding_window']}). Leave the biases out, or keep the "
            "hooks."
        )
    biased = biased | _biased(config)
    shared = {field: source[field] for field in LlamaConfig().to_dict().keys() & source.keys()}
    attention, mlp = bool(biased.intersection(_ATTENTION)), bool(biased.intersection(_MLP))
    settings = {"model_type": "llama", "head_dim": model.cfg.d_head, "attention_bias": attention, "mlp_bias": mlp}
    return LlamaConfig.from_dict(shared | settings)


def _biased(config: PretrainedConfig) -> set[str]:
    """Which projections have a bias under a configuration."""
    if config.model_type == "qwen2":
        return set(_ATTENTION[:3])
    attention, mlp = getattr(config, "attention_bias", False), getattr(config, "mlp_bias", False)
    return {*(_ATTENTION if attention else ()), *(_MLP if mlp else ())}
