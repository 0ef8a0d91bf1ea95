"""Whether two tools did the same work: their results compared, with how far off they are. Knows no tool and no time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

COSINE, LENGTH, LOSS, LOGIT = 1e-5, 1e-3, 1e-4, 1e-3


@dataclass(frozen=True)
class Equality:
    """Whether a result equals the reference's, and in words how far off it is."""

    equal: bool
    text: str


def compare(result: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Equality:
    """Compares results by what they hold: `vectors`, `tokens`, `losses` or `differences`.

    Raises:
        ValueError: for a result of another kind.
    """
    (name,) = reference
    checks = {"vectors": vectors, "tokens": tokens, "losses": losses, "differences": differences}
    if name not in checks:
        raise ValueError(f"reference must hold one of {', '.join(checks)}, got {name}.")
    ours, theirs = result.get(name), reference[name]
    if ours is None or ours.shape != theirs.shape:
        shape = None if ours is None else tuple(ours.shape)
        return Equality(False, f"shape {shape}, not {tuple(theirs.shape)}")
    return checks[name](ours, theirs)


def vectors(ours: Tensor, theirs: Tensor) -> Equality:
    """Vectors [layer, d_model]: cosines of at least 1 - COSINE, lengths within LENGTH."""
    ours, theirs = ours.double(), theirs.double()
    off = 1 - F.cosine_similarity(ours, theirs, dim=-1)
    lengths = (ours.norm(dim=-1) / theirs.norm(dim=-1) - 1).abs()
    wrong = ~((off <= COSINE) & (lengths <= LENGTH))  # not the opposite comparisons: NaN is wrong too
    worst = f"1 - cos at most {float(off.max()):.0e}, lengths within {float(lengths.max()):.0e}"
    if not wrong.any():
        return Equality(True, worst)
    return Equality(False, f"{int(wrong.sum())} of {len(wrong)} layers differ: {worst}")


def tokens(ours: Tensor, theirs: Tensor) -> Equality:
    """Token ids [row, token]: all the same."""
    same = (ours == theirs).all(-1)
    return Equality(bool(same.all()), f"{int(same.sum())} of {len(same)} rows the same")


def losses(ours: Tensor, theirs: Tensor) -> Equality:
    """Losses [step]: equal to four digits at every step."""
    off = float(((ours.double() - theirs.double()) / theirs.double()).abs().max())
    return Equality(off <= LOSS, f"losses within {off:.0e} of the reference's")


def differences(ours: Tensor, theirs: Tensor) -> Equality:
    """Logit differences: within LOGIT."""
    off = float((ours.double() - theirs.double()).abs().max())
    return Equality(off <= LOGIT, f"logit differences within {off:.0e}")


def worst(checks: list[Equality]) -> Equality:
    """The first unequal one of several rounds, else the last."""
    return next((check for check in checks if not check.equal), checks[-1])
