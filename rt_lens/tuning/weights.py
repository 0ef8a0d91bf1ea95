"""Which weights a loss trains, and what the optimiser holds of them: whole matrices, or low-rank factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rt_lens.models.backends import backend_of, parameters_of
from rt_lens.models.forward import check_layers
from rt_lens.models.parameter_names import as_matrix, block_and_modules, from_matrix
from rt_lens.models.protocol import Model
from rt_lens.tuning.config import LOSSES, MATRICES, TuneConfig
from rt_lens.tuning.delta import check_in_memory


def trained_by(model: Model, config: TuneConfig) -> dict[str, dict[str, nn.Parameter]]:
    """Loss -> parameter name -> parameter, for the losses that have weight.

    Raises:
        ValueError: blocks outside the model, modules that it does not have, a part of a fused matrix, or the default
            modules where blocks have matrices of other kinds.
    """
    trained = {loss: _chosen(model, config, loss) for loss in LOSSES if config.weight(loss) > 0}
    by_loss = [setting for setting in (config.target_modules, config.trained_layers) if isinstance(setting, Mapping)]
    if "kl" in trained and not all(setting.get("kl") for setting in by_loss):
        # All modules in all blocks of the other losses may be more than what any of them trains.
        others = {name for loss in trained.keys() - {"kl"} for name in trained[loss]}
        trained["kl"] = {name: parameter for name, parameter in trained["kl"].items() if name in others}
    return trained


def _chosen(model: Model, config: TuneConfig, loss: str) -> dict[str, nn.Parameter]:
    blocks, targets = config.blocks_of(loss), set(config.target_modules_of(loss))
    check_layers(model, blocks)
    chosen: dict[str, nn.Parameter] = {}
    seen: set[str] = set()
    for name, parameter in parameters_of(model).items():
        block, modules = block_and_modules(name)
        if block in blocks and targets & {"gate", "up", "down"} and "expert" in name:
            raise ValueError(
                f"target_modules must be among q, k, v, o, bias and norm in a mixture of experts "
                f"({backend_of(model).family}), whose experts are not tuned, got {', '.join(sorted(targets))}. Set "
                "target_modules=('q', 'k', 'v', 'o')."
            )
        if block in blocks and not modules and parameter.ndim > 1 and config.target_modules == MATRICES:
            raise ValueError(
                f"target_modules must be named for {backend_of(model).family}, whose {name} is none of "
                f"{', '.join(MATRICES)}, got the default. Set those that are to be trained, such as ('v', 'o')."
            )
        if block not in blocks or not set(modules) & targets:
            continue
        if not set(modules) <= targets:
            raise ValueError(
                f"target_modules must name all or none of {', '.join(modules)}, which {name} holds in one matrix, got "
                f"{', '.join(sorted(targets))}."
            )
        chosen[name] = parameter
        seen.update(modules)
    missing = targets - seen if config.target_modules != MATRICES else set()  # the default takes what there is
    if missing or not chosen:
        raise ValueError(
            f"target_modules must be in the trained blocks, got {', '.join(sorted(missing or targets))}, which blocks "
            f"{list(blocks)} of this model do not have (for the {loss} loss). Leave them out, or name other "
            "trained_layers."
        )
    check_in_memory(chosen)
    _check_rank(config, targets, chosen)
    return chosen


def _check_rank(config: TuneConfig, targets: set[str], chosen: Mapping[str, nn.Parameter]) -> None:
    if config.lora_rank and (flat := sorted(targets - set(MATRICES))):
        raise ValueError(
            f"target_modules must be matrices where lora_rank is above 0, got {', '.join(flat)}. Leave them out, or "
            "set "
            "lora_rank=0."
        )
    for name, parameter in chosen.items() if config.lora_rank else ():
        out, into = as_matrix(name, parameter).shape
        if config.lora_rank >= min(out, into):
            raise ValueError(
                f"lora_rank must be less than {min(out, into)}, since {name} is {out} x {into}, got {config.lora_rank}."
            )


class FullRank:
    """A parameter trained whole, in float32, in the memory order that it is stored in."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        # Weights keep Hugging Face's layout as transposed views; AdamW would copy each of them at every step.
        self.axes = sorted(range(parameter.ndim), key=parameter.stride, reverse=True)
        self.back = [self.axes.index(axis) for axis in range(parameter.ndim)]
        self.leaf = nn.Parameter(
            parameter.detach().permute(self.axes).float().clone(memory_format=torch.contiguous_format)
        )
        self.tensors = {"whole": self.leaf}
        self.write()

    def forget_gradient(self) -> None:
        """Begins a step."""
        self.parameter.grad = self.leaf.grad = None

    def take_gradient(self) -> None:
        """Moves the gradient from the parameter to the leaf."""
        grad = self.parameter.grad
        self.leaf.grad = None if grad is None else grad.permute(self.axes).float()

    def write(self) -> None:
        """Writes the leaf's values into the model."""
        # In float32 this is the leaf's memory itself: the optimiser's step is then the model's.
        self.parameter.data = self.leaf.detach().permute(self.back).to(self.parameter.dtype)


class LowRank:
    """A matrix plus B A of a low rank (Hu et al. 2021), B starting at zero.

    The weight is linear in its factors, so their gradients follow from the weight's, G: A's is B^T G, B's is G A^T. G
    is freed as soon as they are computed, so that memory holds no more than one matrix's gradient.
    """

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, noise: torch.Generator) -> None:
        self.name, self.parameter, self.before = name, parameter, parameter.detach()
        out, into = as_matrix(name, self.before).shape
        a = (torch.rand(rank, into, generator=noise, device="cpu") * 2 - 1) / into**0.5
        self.a = nn.Parameter(a.to(parameter.device))
        self.b = nn.Parameter(torch.zeros(out, rank, device=parameter.device))
        self.tensors = {"a": self.a, "b": self.b}
        self.write()
        self.hook = parameter.register_post_accumulate_grad_hook(self._split)

    @torch.no_grad()
    def _split(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = as_matrix(self.name, parameter.grad).float()
        for factor, part in ((self.a, self.b.T @ gradient), (self.b, gradient @ self.a.T)):
            factor.grad = part if factor.grad is None else factor.grad + part
        parameter.grad = None

    def forget_gradient(self) -> None:
        """Begins a step."""
        self.parameter.grad = self.a.grad = self.b.grad = None

    def take_gradient(self) -> None:
        """Nothing to do: the hook has done it."""

    def write(self) -> None:
        """Writes the factors' product into the model."""
        change = from_matrix(self.name, self.b.detach() @ self.a.detach(), tuple(self.before.shape))
        self.parameter.data = (self.before.float() + change).to(self.before.dtype)


class Learned:
    """A tensor of an edit, which is its own leaf: the edit reads it as it is."""

    def __init__(self, tensor: nn.Parameter) -> None:
        self.leaf = tensor
        self.tensors = {"whole": tensor}

    def forget_gradient(self) -> None:
        """Begins a step."""
        self.leaf.grad = None

    def take_gradient(self) -> None:
        """Nothing to do: it lies there."""

    def write(self) -> None:
        """Nothing to do."""


TrainableParam: TypeAlias = FullRank | LowRank | Learned
"""What the optimiser holds of one parameter."""


@contextmanager
def trainable_params(
    model: Model | nn.Module, trained: Mapping[str, nn.Parameter], config: TuneConfig
) -> Iterator[dict[str, TrainableParam]]:
    """Parameter name -> leaf; only these take gradients, and afterwards memory, values and flags are as before."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    memory = {parameter: (parameter.data, parameter.grad) for parameter in trained.values()}
    leaves: dict[str, TrainableParam] = {}
    noise = torch.Generator().manual_seed(config.seed)
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in memory)
        for name, parameter in trained.items():
            leaves[name] = (
                LowRank(name, parameter, config.lora_rank, noise) if config.lora_rank else FullRank(parameter)
            )
        yield leaves
    finally:
        for leaf in leaves.values():
            if isinstance(leaf, LowRank):
                leaf.hook.remove()
        for parameter, (before, grad) in memory.items():
            parameter.data = before
            parameter.grad = grad
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
