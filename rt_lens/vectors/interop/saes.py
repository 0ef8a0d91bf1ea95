"""Directions of a sparse autoencoder as steering vectors: rows of the decoder in a SAELens folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rt_lens.vectors.interop.naming import HOOK_NAME, Naming, RefusedError, must_exist, reading, shown, unknown
from rt_lens.vectors.steering_vectors import SteeringVectors


def load_sae_feature(folder: str | Path, feature: int, *, behaviour: str | None = None) -> SteeringVectors:
    """The direction that a feature of a sparse autoencoder writes, at the hook point that it was trained on.

    Args:
        folder: a local SAELens folder, with `cfg.json` and `sae_weights.safetensors`.
        feature: index of the feature, a row of `W_dec`.
        behaviour: what the feature stands for. Defaults to `feature N`.

    Returns:
        One vector, of the length that the decoder has: a multiplier is then an activation of the feature.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: a folder of another kind, a hook point that is none here, or a feature that is not there.

    Example:
        >>> import json, pathlib, torch
        >>> from safetensors.torch import save_file
        >>> sae = pathlib.Path("sae")
        >>> sae.mkdir()
        >>> _ = (sae / "cfg.json").write_text(json.dumps({"hook_name": "blocks.21.hook_resid_post"}))
        >>> save_file({"W_dec": torch.randn(64, 576)}, sae / "sae_weights.safetensors")
        >>> load_sae_feature(sae, 7).hook_names
        ['blocks.21.hook_resid_post']
    """
    cfg, weights = Path(folder) / "cfg.json", Path(folder) / "sae_weights.safetensors"
    must_exist(cfg)
    must_exist(weights)
    with reading(cfg, "SAELens"):
        content = json.loads(cfg.read_text(encoding="utf-8"))
        hook_name = _from_cfg(content, "hook_name_out") or _from_cfg(
            content, "hook_name"
        )  # a transcoder writes elsewhere
        model = str(_from_cfg(content, "model_name") or "unknown")
        if not isinstance(hook_name, str) or not HOOK_NAME.fullmatch(hook_name):
            raise RefusedError(
                f"{cfg} must name a hook point of TransformerLens as hook_name, got {shown(hook_name)}. Write it there."
            )
    with reading(weights, "safetensors"), safe_open(weights, framework="pt") as stored:
        if "W_dec" not in stored.keys():  # noqa: SIM118 - it is no dict
            raise RefusedError(f"{weights} must hold the decoder W_dec, got {', '.join(sorted(stored.keys())):.80}.")
        decoder = stored.get_slice("W_dec")
        n = decoder.get_shape()[0]
        if type(feature) is not int or not 0 <= feature < n:
            raise RefusedError(f"feature must be from 0 to {n - 1}, got {feature}. W_dec has {n} rows.")
        row = decoder[feature : feature + 1][0]
    vectors = Naming(str(weights), "resid_post", 0).read_tensors({hook_name: row})
    return SteeringVectors(vectors, unknown(model, behaviour or f"feature {feature}"))


def _from_cfg(content: Any, key: str) -> Any:
    """A setting, which newer versions of SAELens keep under `metadata`."""
    if not isinstance(content, Mapping):
        return None
    metadata = content.get("metadata")
    return content.get(key) or (metadata.get(key) if isinstance(metadata, Mapping) else None)
