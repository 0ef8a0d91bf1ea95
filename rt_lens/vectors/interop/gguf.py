"""GGUF control vectors, as repeng and llama.cpp keep them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from rt_lens.common.files import write_atomically
from rt_lens.vectors.interop.naming import (
    LAYER,
    Naming,
    RefusedError,
    float32,
    must_exist,
    no_offset,
    reading,
    shown,
    unknown,
)
from rt_lens.vectors.steering_vectors import Provenance, SteeringVectors

_ARCHITECTURE = "controlvector"
_OURS = "rt_lens.provenance"
_SCHEMA = 1
_GGUF_FLOATS = {GGMLQuantizationType.F16, GGMLQuantizationType.F32, GGMLQuantizationType.F64}


def save_gguf(vectors: SteeringVectors, path: str | Path) -> Path:
    """Writes a GGUF control vector, as repeng and llama.cpp read it.

    `direction.N` is the vector at `blocks.N.hook_resid_post`, in float32, blocks counted from 0: repeng adds it to the
    output of Hugging Face's `model.layers[N]`, llama.cpp to `l_out-N`, behind the block's last residual sum. (llama.cpp
    keeps `direction.N` at row N - 1 of its buffer and reads block N from row N - 1, so the two ones cancel.) llama.cpp
    has no row for block 0 and refuses the whole file over one. Half precision is widened, which loses nothing.

    Args:
        vectors: at `hook_resid_post` of blocks from 1 on.
        path: file to write, in one rename; its folder is made.

    Returns:
        The path.

    Raises:
        ValueError: if a vector is at another hook point or layer 0, would lose precision in float32, or has an eraser.

    Example:
        >>> save_gguf(vectors.select(range(1, 30)), "mood.gguf")  # llama-cli --control-vector-scaled mood.gguf:2
        PosixPath('mood.gguf')
    """
    if vectors.erasers:
        raise ValueError(
            "vectors must have no erasers, which a control vector cannot hold, got those of LEACE. Use 1 * vectors to "
            "drop them, or vectors.save(path) to keep them."
        )
    rows = {}
    for name, vector in vectors.vectors.items():
        block = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", name)
        if not block or vector.ndim != 1:
            shape = "" if vector.ndim == 1 else f" of shape {tuple(vector.shape)}"
            raise ValueError(
                f"vectors must have one row per block, at hook_resid_post, got {name}{shape}. "
                "Use vectors.select(layers) to keep those only, or vectors.save(path) to keep all."
            )
        row = vector.detach().cpu().to(torch.float32)
        if not torch.equal(row.to(vector.dtype), vector.detach().cpu()):
            raise ValueError(
                f"vectors would lose precision when stored as float32, the only type that llama.cpp reads: {name} is "
                f"{vector.dtype}. Round it first: vector.float()."
            )
        rows[int(block[1])] = row.numpy()
    if 0 in rows:
        later = sorted(set(rows) - {0})
        gapless = later == list(range(1, len(later) + 1))
        selected = f"range(1, {len(later) + 1})" if gapless else str(later)
        fix = f"Save the other blocks: vectors.select({selected})." if later else "Use a vector of a later block."
        raise ValueError(f"vectors must not include layer 0, which llama.cpp cannot steer. {fix}")
    stored = {"schema": _SCHEMA, "kind": "steering_vectors", **vectors.provenance.to_json()}
    with TemporaryDirectory() as folder:  # the writer only knows paths
        written = Path(folder) / "vectors.gguf"
        writer = GGUFWriter(written, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", vectors.provenance.model or "unknown")
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(rows))
        writer.add_string(_OURS, json.dumps(stored))
        for layer in sorted(rows):
            writer.add_tensor(f"direction.{layer}", rows[layer])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = written.read_bytes()
    return write_atomically(Path(path), content)


def load_gguf(path: str | Path) -> SteeringVectors:
    """Reads a GGUF control vector: `direction.N` becomes `blocks.N.hook_resid_post`, in float32 (see `save_gguf`).

    A file that `save_gguf` wrote keeps its provenance. For any other file what it does not name is "unknown"; its model
    hint becomes `model`.

    N is the block that a file's tool steers, which need not be the block that it read: repeng reads its last block
    after the model's final norm, and llama.cpp's cvector-generator writes what it read at block N - 1 as `direction.N`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is truncated, no control vector, or holds anything but finite rows of one width.

    Example:
        >>> _ = save_gguf(vectors.select([18, 21]), "happy.gguf")
        >>> loaded = load_gguf("happy.gguf")
        >>> loaded.hook_names, loaded.provenance == vectors.provenance
        (['blocks.18.hook_resid_post', 'blocks.21.hook_resid_post'], True)
        >>> with model.hooks(fwd_hooks=add(loaded, multiplier=1.5)):
        ...     answers = generate(model, ["How was your day?"], max_new_tokens=4)
    """
    return from_gguf(Path(path), "unknown", "unknown", 0)


class _BoundedReader(GGUFReader):
    """The gguf package's reader, stopped at the file's end, where by itself it reads nothing and counts on."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("the file ends earlier than its tables say")
        return super()._get(offset, dtype, count, override_order)


def from_gguf(path: Path, model: str, behaviour: str, offset: int) -> SteeringVectors:
    must_exist(path)
    with reading(path, "GGUF"):
        reader = _BoundedReader(path)
        architecture = _text(reader, "general.architecture")
        if architecture not in (None, _ARCHITECTURE):
            raise RefusedError(
                f"path must be a GGUF control vector, got {path} of architecture {shown(architecture)}. Open a model "
                "with load_model."
            )
        rows = {}
        for tensor in reader.tensors:
            kind, _, layer = tensor.name.partition(".")
            if kind != "direction" or not LAYER.fullmatch(layer) or tensor.tensor_type not in _GGUF_FLOATS:
                raise RefusedError(
                    f"{path} must hold direction.1, direction.2, ... of floating numbers only, got "
                    f"{shown(tensor.name)} of type {tensor.tensor_type.name}."
                )
            rows[int(layer)] = tensor
        ours = _text(reader, _OURS)
        if ours is not None:
            no_offset(path, offset)
        naming = Naming(str(path), "resid_post", offset)
        shapes = {layer: tensor.shape.tolist() for layer, tensor in rows.items()}
        vectors = naming.read(shapes, lambda layer: float32(rows[layer].data))
        hint = _text(reader, f"{_ARCHITECTURE}.model_hint")
    if ours is None:
        return SteeringVectors(vectors, unknown(hint if hint and model == "unknown" else model, behaviour))
    try:
        stored = json.loads(ours)
        if (stored.pop("kind"), stored.pop("schema")) != ("steering_vectors", _SCHEMA):
            raise KeyError("kind")
        provenance = Provenance.from_json(stored)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise ValueError(
            f"path must be a file with a provenance of schema {_SCHEMA}, got {path}. Save it again with save_gguf."
        ) from None
    return SteeringVectors(vectors, provenance)


def _text(reader: GGUFReader, key: str) -> str | None:
    """A text among a GGUF file's keys; None if it is absent or no text."""
    field = reader.get_field(key)
    content = field.contents() if field is not None else None
    return content if isinstance(content, str) else None
