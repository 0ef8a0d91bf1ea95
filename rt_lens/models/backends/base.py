"""The interface of a backend: what rt_lens asks of a model, whichever kind it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint


@dataclass(frozen=True)
class Slot:
    """Where a module holds a parameter.

    Attributes:
        module: the module.
        name: the parameter's name in it.
    """

    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter | None:
        return self.module._parameters[self.name]

    def hold(self, parameter: nn.Parameter | None) -> None:
        self.module._parameters[self.name] = parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape; of a bias that is not there, the shape that it would have."""
        if self.parameter is not None:
            return tuple(self.parameter.shape)
        return (int(self.module.out_features),)  # type: ignore[arg-type]

    @property
    def input_first(self) -> bool:
        """Whether it is a matrix that is stored as [in, out]."""
        return input_first(self.module) and self.name == "weight"


def input_first(module: nn.Module) -> bool:
    """Whether a module is a Conv1D of transformers (GPT-2), whose matrix is stored as [in, out]."""
    return type(module).__name__ == "Conv1D"


def slots_in(module: nn.Module) -> dict[str, Slot]:
    """Every parameter's name -> where it is held, and the biases that projections could have."""
    slots = {}
    for prefix, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None or (name == "bias" and hasattr(part, "out_features")):
                slots[f"{prefix}.{name}" if prefix else name] = Slot(part, name)
    return slots


class Backend(ABC):
    """One model, of one kind.

    Attributes:
        model: the model.
    """

    kind: str
    """Its name in `load_model(backend=...)`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __deepcopy__(self, memo: Any) -> None:
        """A copied model gets a backend of its own."""
        return None

    @abstractmethod
    def quick(self) -> AbstractContextManager[Any]:
        """Context manager under which the model runs faster; hooks, weights and results stay the same."""

    @abstractmethod
    def residual(
        self, inputs: Tensor, mask: Int[Tensor, "batch pos"], *, start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that enters block `stop` (by default: that leaves the last block).

        Args:
            inputs: tokens, Int[Tensor, "batch pos"]; with `start` the residual stream that enters that block.
            mask: 1 for real tokens; padding is not counted in positions.
            start: the block to go on from; the blocks before it do not run.
            stop: the block to stop before.
        """

    @abstractmethod
    def unembed(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits of chosen residuals: the final norm, the unembedding, and what the family does to logits."""

    @abstractmethod
    def cache(self, rows: int, capacity: int) -> Any:
        """An empty key-value cache for at most `capacity` tokens a row.

        Where `branches` is true, `branch(model, rows, room)` makes a new cache whose row i continues row `rows[i]` of
        this one. Where `shares` is true, `adopt(source, rows, blocks, last)` appends to row i what row `rows[i]` of
        another cache holds in some blocks: all of it, or its last tokens. Its `mask` is the mask of all tokens so far.
        """

    @abstractmethod
    def extend(
        self, inputs: Tensor, mask: Int[Tensor, "batch new"], cache: Any, *, start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "batch new d_model"]:
        """The residual stream that enters block `stop` at new tokens, which are added to the cache.

        Args:
            inputs: tokens, Int[Tensor, "batch new"]; with `start` the residual stream that enters that block.
            mask: 1 for real tokens, of the new ones.
            cache: of the tokens before them, in the blocks that run.
            start: the block to go on from; the blocks before it do not run, and the cache gets nothing there.
            stop: the block to stop before. Defaults to after the last one.
        """

    def next_logits(
        self, tokens: Int[Tensor, "batch new"], mask: Int[Tensor, "batch new"], cache: Any
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits after new tokens, which are added to the cache; without a cache the tokens are the whole text."""
        with self.quick():
            final = self.residual(tokens, mask) if cache is None else self.extend(tokens, mask, cache)
            return self.unembed(final[:, -1])

    def logits(
        self, inputs: Tensor, mask: Int[Tensor, "batch pos"], where: Tensor, size: int, start: int = 0
    ) -> Iterator[Float[Tensor, "chosen d_vocab"]]:
        """Logits at chosen positions (True in `where`), in chunks of `size`; no others are computed.

        Args:
            inputs: tokens, or with `start` the residual stream that enters that block.
            mask: 1 for real tokens.
            where: Bool[Tensor, "batch pos"].
            size: positions per chunk.
            start: the block to go on from.
        """
        with self.quick():
            final = self.residual(inputs, mask, start=start)[where]
            yield from (self.unembed(part) for part in final.split(size))

    @abstractmethod
    def run_with_cache(
        self, tokens: Tensor, mask: Tensor, hook_names: Sequence[str], stop: int | None, past: Any = None
    ) -> Any:
        """TransformerLens's `run_with_cache` at these hook points, which stops before block `stop`.

        Args:
            tokens: Int[Tensor, "batch new"].
            mask: of these tokens.
            hook_names: where to read.
            stop: the first block that need not run; None runs everything.
            past: a key-value cache that these tokens are added to.
        """

    @abstractmethod
    def caches(self, first: int = 0, longest: int = 0) -> bool:
        """Whether decoding with a key-value cache gives the logits that it gives without.

        Args:
            first: tokens of the longest row in the first pass.
            longest: tokens of the longest row in the last one.
        """

    @abstractmethod
    def branches(self, longest: int = 0) -> bool:
        """Whether a cache may be branched, of rows of at most this many tokens in the end."""

    def shares(self, longest: int = 0) -> bool:
        """Whether rows of at most this many tokens may start from a prefix that ran once, with padding after it."""
        return self.branches(longest)

    @abstractmethod
    def unembedding(self) -> Float[Tensor, "d_model d_vocab"]:
        """The matrix that reads logits off the normalised residual stream."""

    @abstractmethod
    def final_norm(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The norm before the unembedding."""

    @abstractmethod
    def slots(self) -> dict[str, Slot]:
        """Name -> where a parameter is held, in the names that deltas have on this kind of model.

        Tied parameters have several; a projection without a bias has one for it, which is empty.
        """

    @abstractmethod
    def translated(self, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Changes of parameters under this model's names and in its layout.

        Args:
            changes: under the names of either kind of model, or those that older versions of rt_lens gave.

        Returns:
            What has no counterpart keeps its name.
        """

    @abstractmethod
    def writer(self, layer: int, module: str) -> tuple[str, str]:
        """Names of the weight and the bias with which a block's attention (`o`) or MLP (`down`) writes.

        Raises:
            ValueError: if there is no one such matrix.
        """

    @abstractmethod
    def embeddings(self) -> list[str]:
        """Names of the embedding of tokens and, if it is learned, of positions."""

    @abstractmethod
    def as_huggingface(self, name: str, parameter: Tensor) -> tuple[str, Tensor] | None:
        """A parameter, or a change of one, under Hugging Face's name and in its layout; None if it has none there."""

    @abstractmethod
    def huggingface(self) -> dict[str, Tensor]:
        """The model's weights as they are now, by Hugging Face's names and in its layout.

        Raises:
            ValueError: something that is not zero has no form there.
        """

    @abstractmethod
    def source_config(self) -> Any:
        """A copy of the Hugging Face configuration that the model was made from; None if there is none."""

    @property
    @abstractmethod
    def family(self) -> str:
        """The name of the class of transformers that holds such models."""


_OF_LIBRARIES = ("transformer_lens.", "transformers.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def users_hooks(module: nn.Module, kinds: Sequence[str] = _HOOKS) -> list[Any]:
    """The hooks of a module, in order, without those with which the libraries themselves work."""
    point = isinstance(module, HookPoint)
    hooks = [hook for kind in kinds for hook in getattr(module, kind).values()]
    return [hook for hook in hooks if point or not getattr(hook, "__module__", "").startswith(_OF_LIBRARIES)]


def hooks_of(module: nn.Module) -> list[Any]:
    """The dictionaries of a module's hooks, of the user's and the libraries' own."""
    return [getattr(module, kind) for kind in _HOOKS]


def hooked(modules: Sequence[nn.Module]) -> bool:
    """Whether any of these modules has a hook of the user's."""
    return any(users_hooks(module) for module in modules if any(hooks_of(module)))


def positions_of(mask: Int[Tensor, "batch pos"], new: int | None = None) -> Int[Tensor, "batch new"]:
    """The position of each token among the real tokens of its row; of the last `new` columns, by default of all."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return positions if new is None else positions[:, positions.shape[1] - new :]


def allowed_error(dtype: torch.dtype) -> float:
    """Relative error of logits, in norm, that rounding may explain; correct families stay below half of it."""
    return {torch.float16: 0.02, torch.bfloat16: 0.05}.get(dtype, 1e-3)
