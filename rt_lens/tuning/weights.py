"""Which weights a loss trains, and what the optimiser holds of them: whole matrices, or low-rank factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rt_lens.models.forward import check_layers
from rt_lens.models.parameter_names import as_matrix, block_and_modules, from_matrix
from rt_lens.models.protocol import Model
from rt_lens.tuning.config import LOSSES, MATRICES, TuneConfig

parts_of = block_and_modules  # TODO-RENAME


def trained_by(model: Model, config: TuneConfig) -> dict[str, dict[str, nn.Parameter]]:
    """Loss -> parameter name -> parameter, for the losses that have weight.

    Raises:
        ValueError: blocks outside the model, kinds that it has not, or a fused matrix of which a part is wanted.
    """
    found = {loss: _chosen(model, config, loss) for loss in LOSSES if config.weight(loss) > 0}
    by_loss = [each for each in (config.target_modules, config.trained_layers) if isinstance(each, Mapping)]
    if "kl" in found and not all(each.get("kl") for each in by_loss):
        # All kinds in all blocks of the other losses may be more than what any of them trains.
        others = {name for loss in found.keys() - {"kl"} for name in found[loss]}
        found["kl"] = {name: parameter for name, parameter in found["kl"].items() if name in others}
    return found


def _chosen(model: Model, config: TuneConfig, loss: str) -> dict[str, nn.Parameter]:
    blocks, kinds = config.blocks_of(loss), set(config.target_modules_of(loss))
    check_layers(model, blocks)
    found: dict[str, nn.Parameter] = {}
    seen: set[str] = set()
    placed = {name: block_and_modules(name) for name, _ in model.named_parameters()}
    apart = {(block, parts[0]) for block, parts in placed.values() if len(parts) == 1}
    for name, parameter in model.named_parameters():
        block, parts = placed[name]
        if block not in blocks or not set(parts) & kinds:
            continue
        # A bridge cuts most fused matrices up and runs the pieces: the whole is there still, and moves nothing.
        if len(parts) > 1 and all((block, part) in apart for part in parts):
            continue
        if not set(parts) <= kinds:
            raise ValueError(
                f"target_modules: {name} holds {', '.join(parts)} in one matrix, so they are trained together or not at all. "
                "Name them all, or none."
            )
        found[name] = parameter
        seen.update(parts)
    missing = kinds - seen if config.target_modules != MATRICES else set()  # the default takes what there is
    if missing or not found:
        raise ValueError(
            f"target_modules: {', '.join(sorted(missing or kinds))} not found in blocks {list(blocks)} of this model (for the "
            f"{loss} loss). Leave it out, or name other trained_layers."
        )
    if config.lora_rank and (flat := sorted(kinds - set(MATRICES))):
        raise ValueError(
            f"target_modules: {', '.join(flat)} has no low-rank factors. Leave it out, or set lora_rank=0."
        )
    for name, parameter in found.items() if config.lora_rank else ():
        out, into = as_matrix(name, parameter).shape
        if config.lora_rank >= min(out, into):
            raise ValueError(
                f"lora_rank: {config.lora_rank} came; {name} is {out} x {into}, so less than {min(out, into)} is "
                "wanted."
            )
    return found


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
        """Gives the leaf the gradient that the parameter has gathered."""
        grad = self.parameter.grad
        self.leaf.grad = None if grad is None else grad.permute(self.axes).float()

    def write(self) -> None:
        """Puts the leaf's values into the model."""
        # In float32 this is the leaf's own memory: the optimiser's step is then the model's.
        self.parameter.data = self.leaf.detach().permute(self.back).to(self.parameter.dtype)


class LowRank:
    """A matrix plus B A of a low rank (Hu et al. 2021), B starting at zero.

    The weight is linear in its factors, so their gradients follow from its own, G: A's is B^T G, B's is G A^T. It is
    let go as soon as they are taken, so that no more than one matrix's gradient is held.
    """

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, noise: torch.Generator) -> None:
        self.name, self.parameter, self.before = name, parameter, parameter.detach()
        out, into = as_matrix(name, self.before).shape
        a = (torch.rand(rank, into, generator=noise) * 2 - 1) / into**0.5
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
        """Nothing left to do: the hook has."""

    def write(self) -> None:
        """Puts the factors' product into the model."""
        change = from_matrix(self.name, self.b.detach() @ self.a.detach(), tuple(self.before.shape))
        self.parameter.data = (self.before.float() + change).to(self.before.dtype)


TrainableParam: TypeAlias = FullRank | LowRank
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
        for parameter, (kept, grad) in memory.items():
            parameter.data = kept
            parameter.grad = grad
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
