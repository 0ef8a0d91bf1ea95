"""Forward passes of a model of either kind, and small checks of what a model has. Knows no steering and no tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rt_lens.models.backends import backend_of
from rt_lens.models.prompts import go_on
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import TokenBatch


@contextmanager
def quick(model: Any) -> Iterator[Any]:
    """Context manager under which the model runs faster; hooks, weights and results stay the same.

    A HookedTransformer gets a faster attention, see `backends/hooked.py`; a TransformerBridge runs Hugging Face's own
    blocks where nobody listens inside one, see `backends/bridged.py`. Such contexts may be nested. On exit, and on any
    exception, the model is as before.

    Example:
        >>> tokens = model.to_tokens("Rain is wet.")
        >>> with quick(model):
        ...     logits = model(tokens)
        >>> (logits - model(tokens)).abs().max().item() < 1e-3
        True
    """
    with backend_of(model).quick():
        yield model


def logits_where(
    model: Model, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], where: Tensor, *, size: int = 128
) -> Iterator[Float[Tensor, "chosen d_vocab"]]:
    """Logits at chosen positions, in chunks; no others are computed, unless a hook on logits needs them.

    Chunks of 128 positions let a large vocabulary's logits reuse the same memory, which halves the time of the
    operations on them.

    Args:
        model: HookedTransformer or TransformerBridge.
        tokens: Int[Tensor, "batch pos"].
        mask: 1 for real tokens.
        where: Bool[Tensor, "batch pos"], True at the chosen positions.
        size: positions per chunk.

    Example:
        >>> import torch
        >>> tokens = model.to_tokens("The capital of France is")
        >>> where = torch.zeros_like(tokens, dtype=torch.bool)
        >>> where[:, -1] = True
        >>> (logits,) = logits_where(model, tokens, torch.ones_like(tokens), where)
        >>> logits.shape
        torch.Size([1, 49152])
        >>> model.tokenizer.decode(logits[0].argmax())
        ' Paris'
    """
    inputs, start = go_on(model, TokenBatch(tokens, mask, ()))
    yield from backend_of(model).logits(inputs, mask, where, size, start)


def finest_dtype(device: Any) -> torch.dtype:
    """The most exact dtype of a device: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def check_layers(model: Model, layers: Iterable[int] | None) -> list[int]:
    """The block indices as a list. If None, all blocks.

    Raises:
        ValueError: if an index is outside the model, or the list is empty.
    """
    n = model.cfg.n_layers
    chosen = list(range(n)) if layers is None else list(layers)
    for layer in chosen:
        if not 0 <= layer < n:
            raise ValueError(
                f"layers contains {layer}, but this model has blocks 0..{n - 1} ({model_name(model)}). "
                f"Try layers=range({n // 2}, {max(n // 2 + 1, 3 * n // 4)})."
            )
    if not chosen:
        raise ValueError("layers must name at least one block, got an empty list. Leave layers out for all blocks.")
    return chosen


def unknown_hook(argument: str, hook_name: str, model: Model) -> str:
    """The message that refuses a hook name which the model does not have, with the nearest ones that it has."""
    near = get_close_matches(hook_name, model.hook_dict, n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else "model.hook_dict lists them."
    n_blocks = model.cfg.n_layers
    return f"{argument} contains {hook_name!r}, which is not in this model ({n_blocks} blocks). {hint}"


def dtype_name(model: Model) -> str:
    """The dtype of the model's weights, in the form that `load_model` takes."""
    return str(model.cfg.dtype).removeprefix("torch.")


def model_name(model: Model) -> str:
    """The name under which the model was loaded."""
    return getattr(model.cfg, "rt_lens_name", None) or model.cfg.model_name
