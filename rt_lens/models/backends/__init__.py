"""The kinds of model behind one interface: HookedTransformer of TransformerLens 3, TransformerBridge of 3 and 4.

`backend_of(model)` gives a model's backend. No other room asks what kind a model is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from rt_lens.models.backends.base import Backend, Slot, slots_in
from rt_lens.models.backends.bridged import BridgeBackend

try:
    from transformer_lens import HookedTransformer
except ImportError:  # TransformerLens 4 has no HookedTransformer
    HookedTransformer = None  # type: ignore[assignment, misc]

_KEPT = "rt_lens_backend"


def has_hooked() -> bool:
    """Whether this release of TransformerLens has HookedTransformer."""
    return HookedTransformer is not None


def backend_of(model: Any) -> Backend:
    """The backend of a model, made at first use and kept with it.

    Raises:
        ValueError: a model of another kind.

    Example:
        >>> backend_of(model).kind in ("hooked", "bridge")
        True
    """
    kept = vars(model).get(_KEPT) if hasattr(model, "__dict__") else None
    if kept is not None and kept.model is model:
        return kept
    made: Backend
    if isinstance(model, TransformerBridge):
        made = BridgeBackend(model)
    elif has_hooked() and isinstance(model, HookedTransformer):
        from rt_lens.models.backends.hooked import HookedBackend

        made = HookedBackend(model)
    else:
        raise ValueError(
            f"model must be a HookedTransformer or a TransformerBridge, got a {type(model).__name__}. Load it with "
            "rt_lens.load_model."
        )
    vars(model)[_KEPT] = made
    return made


def slots_of(model: Any) -> dict[str, Slot]:
    """Name -> where a parameter is held; of a model of either kind, or of any other module under its own names."""
    return backend_of(model).slots() if _is_model(model) else slots_in(model)


def translated(model: Any, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Changes of parameters under a model's own names, see `Backend.translated`; of any other module as they are."""
    return backend_of(model).translated(changes) if _is_model(model) else dict(changes)


def _is_model(model: Any) -> bool:
    return isinstance(model, TransformerBridge) or (has_hooked() and isinstance(model, HookedTransformer))


def parameters_of(model: Any) -> dict[str, nn.Parameter]:
    """Name -> parameter, each once: a HookedTransformer's by its own names, a bridge's by Hugging Face's.

    Example:
        >>> sorted(parameters_of(model))[0] in ("blocks.0.attn.W_O", "model.embed_tokens.weight")
        True
    """
    parameters: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, slot in slots_of(model).items():
        if slot.parameter is not None and id(slot.parameter) not in seen:
            seen.add(id(slot.parameter))
            parameters[name] = slot.parameter
    return parameters
