"""Files of sweeps and searches that an older rt_lens wrote: read, and compared by what they say."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rt_lens.models.context import token_context
from rt_lens.models.forward import logits_where
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import batches
from rt_lens.tuning.config import modern

_OF_MEASURE = {"measure", "code"}


def older_sweep(path: Path) -> dict[str, Any] | None:
    """Settings, by today's names, and finished layers of a sweep's file of schema 1 or 2; None for any other file.

    What such a file says of its measure cannot be compared, and is left out.
    """
    stored = _read(path)
    try:
        settings = dict(stored["settings"])
        if settings["schema"] in (1, 2) and settings["kind"] == "sweep":
            erasers = _known("erasers", settings.get("code", {}).get("vectors"))
            settings |= {
                "vectors": settings["vectors"] | erasers, "prompts": settings["prompts_sha256"],
                "steer": {"is": settings["steer"]},
            }  # fmt: skip
            parts = dict(stored["layers"])
            return {"settings": settings, "parts": parts | _known("unsteered", stored["baseline"])}
    except (KeyError, TypeError, ValueError):
        pass
    return None


def older_search(path: Path) -> dict[str, Any] | None:
    """Settings, by today's names, and finished candidates of a block search's older file; None for any other file.

    What such a file says of its measure cannot be compared, and is left out.
    """
    stored = _read(path)
    try:
        if "schema" not in stored:
            parts = {re.sub(r"blocks (\d+)-\1\b", r"blocks \1", key): row for key, row in stored["rows"].items()}
            settings = modern(stored["settings"])
            return {"settings": {name: settings[name] for name in settings.keys() - _OF_MEASURE}, "parts": parts}
    except (KeyError, TypeError, ValueError):
        pass
    return None


def check_older(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any], model: Model) -> None:
    """Refuses an older file whose settings differ, as far as both say; warns that it says less than a new one.

    Raises:
        ValueError: names what differs.
    """
    differing = [name for name in ours if name in theirs and not _same(theirs[name], ours[name])]
    if "fingerprint" in theirs and not _same_logits(theirs["fingerprint"], model):
        differing.append("weights or hooks of the model (its logits)")
    if differing:
        raise ValueError(
            f"path must be a file with the same settings, got {path} with other {', '.join(differing)}. Choose a "
            "different name, or remove the file."
        )
    warnings.warn(
        f"path: {path} was written by an older rt_lens, and its measure cannot be compared with this one. Remove the "
        "file if the measure has changed.",
        stacklevel=5,
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}


def _known(key: str, part: Any) -> dict[str, Any]:
    return {} if part is None else {key: part}


def _same(theirs: Any, ours: Any) -> bool:
    ours = json.loads(json.dumps(ours))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(ours[key] == value for key, value in theirs.items() if key in ours)
    return bool(theirs == ours)


def _same_logits(stored: Any, model: Model) -> bool:
    """Files of schema 1 hold a few logits after a fixed text in place of checksums."""
    theirs, ours = np.asarray(stored, dtype=float), np.asarray(fingerprint(model))
    return theirs.shape == ours.shape and np.allclose(theirs, ours, rtol=0, atol=0.01)


@torch.no_grad()
def fingerprint(model: Model) -> list[float]:
    """Some logits after a fixed text, with whatever hooks the model has."""
    (batch,) = batches(model, ["The weather in the hills was"], 1)
    last = torch.zeros_like(batch.mask, dtype=torch.bool)
    last[:, -1] = True
    with token_context(batch.mask):
        (logits,) = logits_where(model, batch.tokens, batch.mask, last)
    return logits[0, :: max(1, logits.shape[1] // 16)].float().tolist()
