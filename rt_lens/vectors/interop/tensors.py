"""Plain files of tensors by layer, and steering-vectors' own object."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from rt_lens.vectors.interop.gguf import from_gguf
from rt_lens.vectors.interop.naming import (
    HOOK_NAME,
    Naming,
    RefusedError,
    float32,
    must_exist,
    no_offset,
    reading,
    shown,
    unknown,
)
from rt_lens.vectors.interop.servers import read_vllm
from rt_lens.vectors.steering_vectors import SteeringVectors, hook_names

# What steering-vectors hooks by layer type: the output of Hugging Face's module of that name.
_LAYER_TYPES = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}


def import_vectors(
    source: Any, *, hook: str = "resid_post", model: str = "unknown", behaviour: str = "unknown", offset: int = 0
) -> SteeringVectors:
    """Steering vectors from another tool's file or object, in float32.

    - `.gguf`: a control vector, as `load_gguf` reads it.
    - `.safetensors`: ours, as `SteeringVectors.load` reads it, else tensors named by layer numbers or hook names.
    - `.pt`, `.pth`: a dict from layer number (int or text) or hook name to a tensor, or one tensor `[layer, d_model]`.
    - `.npz`: arrays named so, or a single array `[layer, d_model]` of any other name.
    - `.json`: steering vectors for vLLM-Lens, as `save_vllm` writes them, multiplied by their scale.
    - a steering-vectors `SteeringVector`: its layer i is block i, and its layer type decides the hook point:
      `decoder_block` is `hook_resid_post`, `self_attn` is `hook_attn_out`, `mlp` is `hook_mlp_out`. (In models that
      norm a part's output once more, as Gemma 2 does, the last two are before that norm there and after it here.)

    Args:
        source: path of a file, or the object.
        hook: kind of hook point that plain layer numbers mean. For `z` each layer's tensor is `[head, d_head]`.
        model: name of the model, where the file does not name it.
        behaviour: what the vectors point towards, where the file does not name it.
        offset: added to layer numbers. 0 where layer 0 is the first block's output. -1 for tools that count as Hugging
            Face's `hidden_states` do, whose 0 is the embedding: that one becomes `blocks.0.hook_resid_pre`. (Their
            last is after the model's final norm.)

    Returns:
        The vectors, by hook name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another kind, truncated, holds Python classes, or anything but finite rows of one
            width under layer numbers or hook names.

    Example:
        >>> import torch
        >>> torch.save({18: torch.randn(576), 21: torch.randn(576)}, "mood.pt")  # steering_vector.layer_activations
        >>> imported = import_vectors("mood.pt", model="SmolLM2-135M-Instruct", behaviour="mood")
        >>> imported.hook_names, imported.provenance.behaviour, imported.provenance.method
        (['blocks.18.hook_resid_post', 'blocks.21.hook_resid_post'], 'mood', 'unknown')
    """
    if not HOOK_NAME.fullmatch(hook_names([0], hook)[0]) or hook == "any":
        raise ValueError(f"hook must be a kind such as resid_post, attn_out, mlp_out or z, got {shown(hook)}.")
    provenance = unknown(model, behaviour)
    if not isinstance(source, str | os.PathLike):
        return SteeringVectors(_from_object(source, hook, offset), provenance)
    path = Path(source)
    ending = path.suffix.lower()
    if ending not in {".gguf", ".safetensors", *_READERS}:
        raise ValueError(
            f"source must be a file that ends in .gguf, .safetensors, .pt, .pth, .npz or .json, got {path}, which ends "
            f"in {ending!r}. Save it as one of these first."
        )
    if ending == ".gguf":
        if hook != "resid_post":
            raise ValueError(
                f"hook must be resid_post for a GGUF control vector, which is always there, got {hook}. Leave hook out."
            )
        return from_gguf(path, model, behaviour, offset)
    must_exist(path)
    if ending == ".safetensors" and _is_ours(path):
        no_offset(path, offset)
        return SteeringVectors.load(path)
    return SteeringVectors(_READERS[ending](path, Naming(str(path), hook, offset)), provenance)


def _read_safetensors(path: Path, naming: Naming) -> dict[str, Tensor]:
    with reading(path, "safetensors"), safe_open(path, framework="pt") as stored:
        names = list(stored.keys())
        naming.count(len(names))
        naming({name: stored.get_slice(name).get_shape() for name in names})  # before a whole model is read by mistake
        return naming.read_tensors({name: stored.get_tensor(name) for name in names})


def _read_torch(path: Path, naming: Naming) -> dict[str, Tensor]:
    with reading(path, "torch"):
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            pickled = re.search(r"GLOBAL ([\w.]{1,60})", str(error))
            if not pickled:
                raise
            raise RefusedError(
                f"source must hold tensors only, got {path} with Python objects ({pickled[1]}), which may run code and "
                "are never unpickled here. Save a plain dict of tensors instead: "
                "torch.save(vector.layer_activations, path)."
            ) from None
        if isinstance(stored, Tensor) and not stored.is_nested and stored.ndim > 1:
            naming.count(len(stored))
            stored = dict(enumerate(stored))
        if not isinstance(stored, dict):
            kind = f"a tensor of shape {tuple(stored.shape)!s:.60}" if isinstance(stored, Tensor) else type(stored)
            raise RefusedError(
                f"{path} must hold a dict from layer to tensor, or one tensor [layer, d_model], got {kind}."
            )
        return naming.read_tensors(stored)


def _read_npz(path: Path, naming: Naming) -> dict[str, Tensor]:
    with reading(path, "npz"), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        naming.count(len(archive.infolist()))
        if len(members) < len(archive.infolist()):
            raise RefusedError(f"{path} must hold one entry per name, got two entries of one name.")
        shapes = {}
        for key, info in members.items():
            with archive.open(info) as stream:
                if np.lib.format.read_magic(stream) != (1, 0):  # later ones allow headers of gigabytes
                    raise RefusedError(f"{shown(key)} in {path} must be an array of plain numbers, got another format.")
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            if dtype.kind != "f":
                raise RefusedError(
                    f"{shown(key)} in {path} must be an array of floating numbers, got {dtype}. "
                    "Save it with array.astype('float32')."
                )
            shapes[key] = shape

        def entry(key: str) -> Tensor:
            with archive.open(members[key]) as stream:
                return float32(np.lib.format.read_array(stream, allow_pickle=False))

        only = next(iter(shapes))
        if len(shapes) == 1 and len(shapes[only]) > 1 and not naming.knows(only):
            naming.count(shapes[only][0])
            naming(dict.fromkeys(range(shapes[only][0]), shapes[only][1:]))
            return naming.read_tensors(dict(enumerate(entry(only))))
        return naming.read(shapes, entry)


_READERS: dict[str, Callable[[Path, Naming], dict[str, Tensor]]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".npz": _read_npz,
    ".json": read_vllm,
}


def _from_object(source: Any, hook: str, offset: int) -> dict[str, Tensor]:
    """The vectors of a steering-vectors SteeringVector, recognised by its two attributes."""
    tensors, kind = getattr(source, "layer_activations", None), getattr(source, "layer_type", None)
    if not isinstance(tensors, dict) or not isinstance(kind, str):
        raise ValueError(
            f"source must be the path of a file or a SteeringVector of steering-vectors, got a {type(source).__name__}."
        )
    if kind not in _LAYER_TYPES:
        raise ValueError(
            f"source must be a vector of layer_type {', '.join(_LAYER_TYPES)}, got {shown(kind)}, for which "
            "TransformerLens has no hook point (it has none behind a norm's own weights). Train it with one of these."
        )
    if hook not in ("resid_post", _LAYER_TYPES[kind]):
        raise ValueError(f"hook must be {_LAYER_TYPES[kind]} for layer_type {kind!r}, got {hook}. Leave hook out.")
    return Naming("source", _LAYER_TYPES[kind], offset).read_tensors(tensors)


def _is_ours(path: Path) -> bool:
    with reading(path, "safetensors"), safe_open(path, framework="pt") as stored:
        return "rt_lens" in (stored.metadata() or {})
