"""An arm: one model under changed weights, under hooks, under both, or as it is. It measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from rt_lens.models.protocol import Model
from rt_lens.steering.binding import steered
from rt_lens.steering.edits import FwdHook
from rt_lens.tuning.delta import WeightDelta

Intervention: TypeAlias = WeightDelta | Sequence[FwdHook] | None
"""A WeightDelta, the hooks that `add` and the like give, or None for the model as it is."""


@contextmanager
def applied(model: Model, *arms: Intervention) -> Iterator[Any]:
    """The model under these changes, the first one first; afterwards it is as before, whatever happens.

    Args:
        model: HookedTransformer or TransformerBridge.
        arms: WeightDeltas and lists of hooks; None changes nothing.

    Raises:
        ValueError: if one is something else; nothing is changed then.

    Example:
        >>> with applied(model, delta, add(vectors, [21], -2.0)):
        ...     print(generate(model, ["Tell me about your weekend."]))
    """
    for arm in arms:
        hooks = isinstance(arm, Sequence) and all(isinstance(hook, tuple) and len(hook) == 2 for hook in arm)
        if not (arm is None or isinstance(arm, WeightDelta) or hooks):
            raise ValueError(
                f"arms: a {type(arm).__name__} came; a WeightDelta, a list of hooks as `add` gives, or None is wanted."
            )
    with ExitStack() as stack:
        for arm in arms:
            if isinstance(arm, WeightDelta):
                stack.enter_context(arm.applied(model))
            elif arm is not None:
                stack.enter_context(steered(model, list(arm)))
        yield model
