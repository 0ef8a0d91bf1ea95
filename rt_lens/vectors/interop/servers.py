"""Steering vectors for programs that serve or measure a model: vLLM-Lens's JSON, and lm-eval's `steered` model."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rt_lens.common.files import write_atomically
from rt_lens.vectors.interop.naming import Naming, RefusedError, reading, shown
from rt_lens.vectors.steering_vectors import SteeringVectors, layer_of

_DTYPES = {"float32": np.float32, "float16": np.float16, "float64": np.float64, "int16": np.int16}


def save_vllm(vectors: SteeringVectors, path: str | Path, *, multiplier: float = 1.0) -> Path:
    """Writes what vLLM-Lens takes as `apply_steering_vectors`: a list of one entry for all layers.

    vLLM-Lens adds `scale * activations` to the output of each of `layer_indices`, blocks counted from 0, at every
    token. Over HTTP the file's text is the value: `extra_body={"vllm_xargs": {"apply_steering_vectors": text}}`.

    Args:
        vectors: at `hook_resid_post`.
        path: JSON file to write, in one rename.
        multiplier: how strongly to steer, in the vectors' own lengths.

    Raises:
        ValueError: if a vector is at another hook point or has an eraser.

    Example:
        >>> path = save_vllm(vectors.select([18, 21]), "mood.json", multiplier=2.0)
        >>> torch.equal(import_vectors(path)["blocks.21.hook_resid_post"], 2 * vectors["blocks.21.hook_resid_post"])
        True
    """
    rows = _residual(vectors, "vLLM-Lens")
    stacked = torch.stack(list(rows.values())).float().contiguous()
    tensor = {
        "data": base64.b64encode(stacked.numpy().astype("<f4").tobytes()).decode("ascii"),
        "dtype": "float32", "original_dtype": "torch.float32", "shape": list(stacked.shape),
    }  # fmt: skip
    entry = {"activations": tensor, "layer_indices": list(rows), "scale": float(multiplier), "norm_match": False}
    write_atomically(Path(path), (json.dumps([entry]) + "\n").encode())
    return Path(path)


def read_vllm(path: Path, naming: Naming) -> dict[str, Tensor]:
    """Vectors of a file for vLLM-Lens, multiplied by their scale; entries for one layer add up."""
    with reading(path, "JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content if isinstance(content, list) else [content]
        naming.count(len(entries))
        summed: dict[int, Tensor] = {}
        for entry in entries:
            for layer, row in _entry(entry, path).items():
                summed[layer] = summed[layer] + row if layer in summed else row
        return naming.read_tensors(summed)


def _entry(entry: Any, path: Path) -> dict[int, Tensor]:
    if not isinstance(entry, Mapping) or not {"activations", "layer_indices"} <= set(entry):
        raise RefusedError(f"{path} must hold entries with activations and layer_indices, got {shown(entry)}.")
    if entry.get("norm_match") or entry.get("position_indices") is not None:
        raise RefusedError(
            f"{path} must hold vectors that are added at every token, got norm_match or position_indices. Remove them, "
            "and steer with add_preserving_norm or positions=[...] here."
        )
    rows, layers = _tensor(entry["activations"], path), entry["layer_indices"]
    if rows.ndim != 2 or not isinstance(layers, list) or len(layers) != len(rows):
        raise RefusedError(
            f"{path} must have one row of activations for each of layer_indices, got shape {tuple(rows.shape)} for "
            f"{shown(layers)}."
        )
    if len({*map(str, layers)}) < len(layers) or any(type(layer) is not int for layer in layers):
        raise RefusedError(f"{path} must have different whole numbers as layer_indices, got {shown(layers)}.")
    return {layer: float(entry.get("scale", 1.0)) * row for layer, row in zip(layers, rows, strict=True)}


def _tensor(stored: Any, path: Path) -> Tensor:
    """A tensor as vLLM-Lens writes it: bytes in base64, compressed or not."""
    shape, dtype = stored["shape"], _DTYPES.get(str(stored["dtype"]))
    if dtype is None or any(type(size) is not int or size < 1 for size in shape):
        raise RefusedError(f"{path} must hold floating numbers, got {shown(stored['dtype'])} of shape {shown(shape)}.")
    data, size = base64.b64decode(stored["data"], validate=True), math.prod(shape) * np.dtype(dtype).itemsize
    if stored.get("compression") == "zstd":
        data = _decompressed(data, size, path)
    array = np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).reshape(shape)
    tensor = torch.from_numpy(array.astype(dtype))
    return tensor.view(torch.bfloat16).float() if stored.get("original_dtype") == "torch.bfloat16" else tensor.float()


def _decompressed(data: bytes, size: int, path: Path) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise RefusedError(
            f"{path} is compressed with zstd, which needs a package: pip install zstandard. rt_lens writes such files "
            "uncompressed."
        ) from None
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)


def save_lm_eval(
    vectors: SteeringVectors, path: str | Path, *, multiplier: float = 1.0, blocks: str = "layers"
) -> Path:
    """Writes a file for lm-eval's `steered` model.

    `lm_eval --model steered --model_args pretrained=MODEL,steer_path=FILE` runs tasks on it. The vectors are added to
    the output of Hugging Face's blocks at every token, as `add` does here.

    Args:
        vectors: at `hook_resid_post`.
        path: .pt file to write, in one rename; it holds tensors and numbers alone.
        multiplier: how strongly to steer, in the vectors' own lengths.
        blocks: what Hugging Face's base model calls its list of blocks: `layers`, in GPT-2 `h`.

    Raises:
        ValueError: if a vector is at another hook point or has an eraser, or the path ends otherwise.

    Example:
        >>> save_lm_eval(vectors.select([21]), "mood.pt", multiplier=-2.0)
        PosixPath('mood.pt')
    """
    path = Path(path)
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"path must end in .pt, which lm-eval reads, got {path}. Rename it.")
    entries = {
        f"{blocks}.{layer}": {
            "action": "add", "steering_vector": vector.float().clone(), "steering_coefficient": float(multiplier),
            "bias": None, "head_index": None,
        }
        for layer, vector in _residual(vectors, "lm-eval").items()
    }  # fmt: skip
    stored = io.BytesIO()
    torch.save(entries, stored)
    write_atomically(path, stored.getvalue())
    return path


def _residual(vectors: SteeringVectors, program: str) -> dict[int, Tensor]:
    """Layer -> vector of the residual stream after it."""
    if vectors.erasers:
        raise ValueError(
            f"vectors must have no erasers, which {program} cannot hold, got those of LEACE. Use 1 * vectors to drop "
            "them."
        )
    others = [name for name in vectors.vectors if not name.endswith(".hook_resid_post")]
    if others:
        raise ValueError(f"vectors must be at hook_resid_post for {program}, got {others[0]}. Extract them there.")
    return {layer_of(name): vector for name, vector in vectors.vectors.items()}
