"""The Hugging Face model inside a TransformerBridge, without what the bridge put into it, on the same parameters.

A bridge wraps each part of a Hugging Face model in one of its own, with hook points. Where nobody listens to those,
Hugging Face's own parts compute the same, faster. Fused projections (query, key and value in one matrix, say), which a
bridge copies apart, become one again: the stored matrix is the one that is read and trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import JointGateUpMLPBridge, JointQKVAttentionBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from rt_lens.models.backends.base import input_first


class Rows(nn.Module):
    """Some outputs of a fused projection, in place of a bridge's copy of them. It has no parameters of its own."""

    def __init__(self, whole: nn.Module, rows: Int[Tensor, "out"]) -> None:
        super().__init__()
        self._whole = (whole,)  # in a tuple, so that it is not registered a second time
        first, n = int(rows[0]), len(rows)
        in_a_row = torch.equal(rows, torch.arange(first, first + n, device="cpu"))
        self.rows: Any = slice(first, first + n) if in_a_row else rows
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Float[Tensor, "out into"]:
        whole: Any = self._whole[0]
        return (whole.weight.T if input_first(whole) else whole.weight)[self.rows]

    @property
    def bias(self) -> Float[Tensor, "out"] | None:
        whole: Any = self._whole[0]
        return None if whole.bias is None else whole.bias[self.rows]

    def forward(self, inputs: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        return F.linear(inputs, self.weight, self.bias)

    def apart(self) -> nn.Linear:
        """A projection with a copy of these outputs' numbers, as TransformerLens makes it."""
        made = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None)
        made.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone())
        return made


def join_fused(bridge: Any) -> None:
    """Lets a bridge's copies of the parts of fused projections read the stored matrix instead."""
    for component, parts in _fused(bridge):
        if all(isinstance(part.original_component, Rows) for part in parts):
            continue
        whole, rows = _whole_of(component, parts)
        for part, its_rows in zip(parts, rows, strict=True):
            part.set_original_component(Rows(whole, its_rows))


def separate_fused(bridge: Any) -> None:
    """Undoes `join_fused`: TransformerLens's own processing of weights writes into copies."""
    for _, parts in _fused(bridge):
        for part in parts:
            if isinstance(part.original_component, Rows):
                part.set_original_component(part.original_component.apart())


def fused_parts(bridge: Any) -> Iterator[tuple[Any, nn.Module, dict[str, Any]]]:
    """Each component with a fused projection, that projection, and part (`q`, `gate`, ...) -> its outputs there."""
    for component, parts in _fused(bridge):
        rows = {part.name: part.original_component for part in parts}
        if all(isinstance(part, Rows) for part in rows.values()):
            yield component, next(iter(rows.values()))._whole[0], {name: part.rows for name, part in rows.items()}


def _fused(bridge: Any) -> Iterator[tuple[Any, list[Any]]]:
    for module in bridge.modules():
        if isinstance(module, JointQKVAttentionBridge):
            yield module, [module.q, module.k, module.v]
        elif isinstance(module, JointGateUpMLPBridge):
            yield module, [module.gate, getattr(module, "in")]


def _whole_of(component: Any, parts: list[Any]) -> tuple[nn.Module, list[Int[Tensor, "out"]]]:
    """The fused projection of a component, and which of its outputs each part has.

    The bridge's own function splits a matrix whose numbers are the numbers of its rows, and so tells which go where.
    """
    split = component.split_qkv_matrix if len(parts) == 3 else component.split_gate_up_matrix
    out = sum(part.original_component.out_features for part in parts)
    for name, child in component.original_component._modules.items():
        whole = unwrapped(child)
        if not isinstance(getattr(whole, "weight", None), Tensor) or whole.weight.ndim != 2:
            continue
        has = whole.weight.shape[1 if input_first(whole) else 0]
        if has != out:
            continue
        numbered = copy.copy(whole)
        count = torch.arange(has, dtype=torch.float32, device="cpu")
        rows = count[:, None].expand(has, whole.weight.shape[0 if input_first(whole) else 1])
        numbered.__dict__["_parameters"] = {
            "weight": nn.Parameter((rows.T if input_first(whole) else rows).contiguous(), requires_grad=False),
            "bias": None if whole.bias is None else nn.Parameter(count.clone(), requires_grad=False),
        }
        owner = copy.copy(component.original_component)
        owner.__dict__["_modules"] = {**component.original_component._modules, name: numbered}
        return whole, [part.weight[:, 0].detach().round().long() for part in split(owner)]
    raise ValueError(f"model must have one fused projection in {component.name}, got none. Use another family.")


def unwrapped(module: Any) -> Any:
    """A module without the bridge's component around it."""
    while isinstance(module, GeneralizedComponent):
        module = module.original_component
    return module


def plain_copy(root: nn.Module, attention: str | None = None) -> tuple[Any, dict[int, Any]]:
    """A Hugging Face model's tree of modules without the bridge's components, on the same parameters and buffers.

    Args:
        root: the model inside the bridge.
        attention: transformers' name of an implementation of attention for the copy; None for the model's own.

    Returns:
        The copy, and id of a module of the model -> its copy.
    """
    copies: dict[int, Any] = {}
    configs: dict[int, Any] = {}

    def configured(config: Any) -> Any:
        if id(config) not in configs:
            configs[id(config)] = copy.deepcopy(config)
            configs[id(config)]._attn_implementation = attention
        return configs[id(config)]

    def copied(module: Any) -> Any:
        module = unwrapped(module)
        if module is None or id(module) in copies:
            return copies.get(id(module))
        made = copies[id(module)] = copy.copy(module)
        made.__dict__["_modules"] = {name: copied(child) for name, child in module._modules.items()}
        if attention is not None and hasattr(made.__dict__.get("config"), "_attn_implementation"):
            made.__dict__["config"] = configured(made.__dict__["config"])
        return made

    return copied(root), copies
