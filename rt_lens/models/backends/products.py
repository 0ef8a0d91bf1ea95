"""The products of activations with weights: torch's own, or oneDNN's where torch's library is slow.

torch multiplies float32 matrices with MKL, which does not use the full width of AMD's AVX-512 units. There oneDNN,
which torch brings too, takes two thirds of the time for one to sixteen rows and a tenth less for large batches; results
differ by rounding. The choice follows from the processor alone, so that a machine repeats its own numbers.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SWITCH = "RT_LENS_ONEDNN"
"""Environment variable: 1 takes oneDNN on any processor that it runs on, 0 never takes it."""


@cache
def _operator() -> Any:
    """oneDNN's product; None where torch does not have it in this form, or torch's own is as fast."""
    wanted = os.environ.get(SWITCH)
    if wanted == "0" or (wanted != "1" and not _slow_with_mkl()) or not torch.backends.mkldnn.is_available():
        return None
    try:
        found = torch.ops.mkldnn._linear_pointwise.default
        x, weight, bias = (torch.ones(shape, device="cpu") for shape in ((2, 3), (4, 3), (4,)))
        right = torch.equal(found(x, weight, bias, "none", [], ""), F.linear(x, weight, bias))
    except (AttributeError, RuntimeError):  # a private operator may vanish or take other arguments
        return None
    return found if right else None


def _slow_with_mkl() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AMD" in _vendor()


def _vendor() -> str:
    file = Path("/proc/cpuinfo")
    if file.is_file():
        lines = (
            line for line in file.read_text("utf-8", errors="replace").splitlines() if line.startswith("vendor_id")
        )
        return next(lines, "")
    return platform.processor()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`."""
    operator = _operator()
    if (
        operator is None
        or x.dtype != torch.float32
        or x.device.type != "cpu"
        or weight.stride(1) != 1
        or (torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, weight, bias)))
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight, bias)
    return operator(x, weight, bias, "none", [], "")
