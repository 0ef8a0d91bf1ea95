"""The model interface of rt_lens: what HookedTransformer and TransformerBridge have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class HasTokenizer(Protocol):
    """The part of a model that `tokens/` needs: its tokenizer.

    Attributes:
        tokenizer: Hugging Face's.
    """

    tokenizer: Any


@runtime_checkable
class TextModel(HasTokenizer, Protocol):
    """A model's tokenizer with its configuration, which names the device and the generation settings.

    Attributes:
        cfg: its configuration.
    """

    cfg: Any


@runtime_checkable
class Model(Protocol):
    """A language model with TransformerLens hook points: a HookedTransformer or a TransformerBridge.

    Attributes:
        cfg: its configuration (`n_layers`, `d_model`, `n_ctx`, `d_vocab`, `device`, ...).
        tokenizer: Hugging Face's.
        hook_dict: hook name -> hook point.
    """

    cfg: Any
    tokenizer: Any

    # For type checkers only: a TransformerBridge gathers its hook points anew each time it is asked for them, which a
    # runtime check would do at every call.
    if TYPE_CHECKING:

        @property
        def hook_dict(self) -> Mapping[str, Any]: ...

        @property
        def blocks(self) -> Any: ...

        @property
        def ln_final(self) -> Any: ...

        @property
        def W_U(self) -> Any: ...

        @property
        def hooks(self) -> Callable[..., AbstractContextManager[Any]]: ...

        @property
        def run_with_cache(self) -> Callable[..., Any]: ...

        @property
        def to_tokens(self) -> Callable[..., Tensor]: ...

        @property
        def __call__(self) -> Callable[..., Any]: ...

        def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

        def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...

        def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

        def parameters(self) -> Iterator[nn.Parameter]: ...

        def modules(self) -> Iterator[nn.Module]: ...
