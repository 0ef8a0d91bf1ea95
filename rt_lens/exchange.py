"""Steering vectors in other tools' files, in and out: GGUF control vectors and plain files of tensors.

No model is known here. A file may come from a stranger: nothing in it is run, made a Python object, or used as a path.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors import safe_open
from torch import Tensor

from rt_lens.vectors import Provenance, SteeringVectors, hook_names, write_atomically

_ARCHITECTURE = "controlvector"
_OURS = "rt_lens.provenance"
_SCHEMA = 1

# Bounds on what a file may claim, well above any model, so that a hostile one cannot fill the memory.
_MOST_LAYERS = 1024
_MOST_ENTRIES = 4096
_MOST_NUMBERS = 1 << 27

_LAYER = re.compile(r"0|-?[1-9][0-9]{0,8}")
_HOOK_NAME = re.compile(r"blocks\.(0|[1-9][0-9]{0,8})\.(?:[a-z0-9_]+\.)?hook_[a-z0-9_]+")
_PER_HEAD = (".hook_q", ".hook_k", ".hook_v", ".hook_z")
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_GGUF_FLOATS = {GGMLQuantizationType.F16, GGMLQuantizationType.F32, GGMLQuantizationType.F64}
# What steering-vectors hooks by layer type: the output of Hugging Face's module of that name.
_LAYER_TYPES = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}


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
        ValueError: if a vector is at another hook point or block 0, or loses digits in float32, or there are erasers.

    Example:
        >>> save_gguf(vectors.select(range(1, 30)), "mood.gguf")  # llama-cli --control-vector-scaled mood.gguf:2
    """
    if vectors.erasers:
        raise ValueError(
            "vectors: LEACE's erasers came, which a control vector has no place for. Use 1 * vectors to drop them, or "
            "vectors.save(path) to keep them."
        )
    rows = {}
    for name, vector in vectors.vectors.items():
        found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", name)
        if not found or vector.ndim != 1:
            what = name if vector.ndim == 1 else f"{name} of shape {tuple(vector.shape)}"
            raise ValueError(
                f"vectors: {what} came; a control vector is one row per block, at hook_resid_post. "
                "Use vectors.select(layers) to keep those only, or vectors.save(path) to keep all."
            )
        row = vector.detach().cpu().to(torch.float32)
        if not torch.equal(row.to(vector.dtype), vector.detach().cpu()):
            raise ValueError(
                f"vectors: {name} is {vector.dtype} and loses digits in float32, the only type that llama.cpp reads. "
                "Round it first: vector.float()."
            )
        rows[int(found[1])] = row.numpy()
    if 0 in rows:
        others = sorted(set(rows) - {0})
        gapless = others == list(range(1, len(others) + 1))
        kept = f"range(1, {len(others) + 1})" if gapless else str(others)
        mend = f"Save the other blocks: vectors.select({kept})." if others else "Use a vector of a later block."
        raise ValueError(f"vectors: block 0 came; llama.cpp cannot steer it and refuses the file. {mend}")
    stored = {"schema": _SCHEMA, "kind": "steering_vectors", **asdict(vectors.provenance)}
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

    A file that `save_gguf` wrote keeps its provenance. Any other says "unknown" for what it does not tell; its model
    hint becomes `model`.

    N is the block that a file's tool steers, which need not be the block that it read: repeng reads its last block
    after the model's final norm, and llama.cpp's cvector-generator writes what it read at block N - 1 as `direction.N`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is truncated, no control vector, or holds anything but finite rows of one width.

    Example:
        >>> with model.hooks(fwd_hooks=add(load_gguf("happy.gguf"), multiplier=1.5)): ...
    """
    return _from_gguf(Path(path), "unknown", "unknown", 0)


def import_vectors(
    source: Any, *, hook: str = "resid_post", model: str = "unknown", behaviour: str = "unknown", offset: int = 0
) -> SteeringVectors:
    """Steering vectors from another tool's file or object, in float32.

    - `.gguf`: a control vector, as `load_gguf` reads it.
    - `.safetensors`: ours, as `SteeringVectors.load` reads it, else tensors named by layer numbers or hook names.
    - `.pt`, `.pth`: a dict from layer number (int or text) or hook name to a tensor, or one tensor `[layer, d_model]`.
    - `.npz`: arrays named so, or a single array `[layer, d_model]` of any other name.
    - a steering-vectors `SteeringVector`: its layer i is block i, and its layer type says the hook point:
      `decoder_block` is `hook_resid_post`, `self_attn` is `hook_attn_out`, `mlp` is `hook_mlp_out`. (In models that
      norm a part's output once more, as Gemma 2 does, the last two are before that norm there and after it here.)

    Args:
        source: path of a file, or the object.
        hook: kind of hook point that plain layer numbers mean. For `z` each layer's tensor is `[head, d_head]`.
        model: name of the model, where the file does not tell.
        behaviour: what the vectors point towards, where the file does not tell.
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
        >>> torch.save(steering_vector.layer_activations, "mood.pt")  # in steering-vectors' environment
        >>> vectors = import_vectors("mood.pt", model="SmolLM2-135M-Instruct", behaviour="mood")
    """
    if not _HOOK_NAME.fullmatch(hook_names([0], hook)[0]) or hook == "any":
        raise ValueError(f"hook: {_shown(hook)} came; a kind such as resid_post, attn_out, mlp_out or z is wanted.")
    provenance = _unknown(model, behaviour)
    if not isinstance(source, str | os.PathLike):
        return SteeringVectors(_from_object(source, hook, offset), provenance)
    path = Path(source)
    ending = path.suffix.lower()
    if ending not in {".gguf", ".safetensors", *_READERS}:
        raise ValueError(
            f"source: {path} ends in {ending!r}; .gguf, .safetensors, .pt, .pth or .npz is wanted. "
            "Save it as one of these first."
        )
    if ending == ".gguf":
        if hook != "resid_post":
            raise ValueError(f"hook: {hook} came; a GGUF control vector is at resid_post always. Leave hook out.")
        return _from_gguf(path, model, behaviour, offset)
    _must_exist(path)
    if ending == ".safetensors" and _is_ours(path):
        _no_offset(path, offset)
        return SteeringVectors.load(path)
    return SteeringVectors(_READERS[ending](path, _Naming(str(path), hook, offset)), provenance)


class _RefusedError(ValueError):
    """A fault that we found, which `_reading` lets through as it is."""


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever a parser trips over in a damaged or hostile file comes out as one ValueError."""
    try:
        yield
    except _RefusedError:
        raise
    except Exception as error:  # parsers raise anything from KeyError to RecursionError
        why = f"{type(error).__name__}: {str(error)!r:.120}"
        raise ValueError(f"vectors: {path} is truncated or no {kind} file ({why}). Make it again.") from None


@dataclass(frozen=True)
class _Naming:
    """Hook names for a foreign file's entries. Names and shapes are judged before any entry is read.

    Attributes:
        origin: the file or object, for messages.
        hook: kind of hook point that plain layer numbers mean.
        offset: added to layer numbers.
    """

    origin: str
    hook: str
    offset: int

    def count(self, n: int) -> None:
        if not 1 <= n <= _MOST_ENTRIES:
            raise _RefusedError(
                f"vectors: {self.origin} holds {n} entries; 1 to {_MOST_ENTRIES} are wanted, one for each layer."
            )

    def __call__(self, shapes: Mapping[Any, Sequence[int]]) -> dict[str, Any]:
        """Hook name -> the file's own key, in the blocks' order."""
        self.count(len(shapes))
        places: dict[tuple[int, str], Any] = {}
        widths: dict[str, tuple[Any, tuple[int, ...]]] = {}
        for key, shape in shapes.items():
            place = self._place(key)
            if place in places:
                raise _RefusedError(
                    f"vectors: {_shown(places[place])} and {_shown(key)} in {self.origin} are both {place[1]}."
                )
            places[place] = key
            per_head = place[1].endswith(_PER_HEAD)
            if len(shape) != 1 + per_head or not all(shape):
                wanted = "[head, d_head]" if per_head else "[d_model]"
                raise _RefusedError(
                    f"vectors: {_shown(key)} in {self.origin} has shape {tuple(shape)!s:.60}; {wanted} is wanted."
                )
            first, before = widths.setdefault(place[1].split(".", 2)[2], (key, tuple(shape)))
            if before != tuple(shape):
                raise _RefusedError(
                    f"vectors: widths differ in {self.origin}: {_shown(first)} has {before}, {_shown(key)} has "
                    f"{tuple(shape)}. One model's vectors have one width."
                )
        if sum(math.prod(shape) for shape in shapes.values()) > _MOST_NUMBERS:
            raise _RefusedError(f"vectors: {self.origin} claims more than {_MOST_NUMBERS} numbers, beyond any model.")
        return {place[1]: places[place] for place in sorted(places)}

    def knows(self, key: Any) -> bool:
        """Whether a key is a layer number or a hook name at all."""
        text = str(key) if type(key) is int else key  # bool is an int too, but no layer
        return isinstance(text, str) and bool(_LAYER.fullmatch(text) or _HOOK_NAME.fullmatch(text))

    def _place(self, key: Any) -> tuple[int, str]:
        """Block and hook name of a file's key."""
        if not self.knows(key):
            raise _RefusedError(
                f"vectors: {_shown(key)} in {self.origin} is no layer number and no hook name. "
                "Rename the entries to 0, 1, 2, ... or blocks.0.hook_resid_post, ..."
            )
        if named := _HOOK_NAME.fullmatch(str(key)):
            _no_offset(self.origin, self.offset)
            layer, name = int(named[1]), named[0]
        elif int(key) < 0:
            raise _RefusedError(
                f"vectors: layer {key} in {self.origin} counts from the model's end, which is not known here. "
                "Number the layers from 0."
            )
        else:
            layer = int(key) + self.offset
            name = hook_names([layer], self.hook)[0]
            if layer == -1 and self.hook == "resid_post":  # the embedding's output is what goes into block 0
                return 0, "blocks.0.hook_resid_pre"
        if not 0 <= layer < _MOST_LAYERS:
            raise _RefusedError(
                f"vectors: {_shown(key)} in {self.origin} means block {layer} (offset {self.offset}); "
                f"0..{_MOST_LAYERS - 1} is wanted."
            )
        return layer, name

    def read(self, shapes: Mapping[Any, Sequence[int]], entry: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """The vectors, each a float32 copy of its own."""
        vectors = {}
        for name, key in self(shapes).items():
            vectors[name] = entry(key).detach().to("cpu", torch.float32, copy=True).contiguous()
            if not torch.isfinite(vectors[name]).all():
                raise _RefusedError(f"vectors: {_shown(key)} in {self.origin} holds NaN or infinite values.")
        return vectors

    def read_tensors(self, tensors: Mapping[Any, Any]) -> dict[str, Tensor]:
        """The same for a dict of tensors."""
        self.count(len(tensors))
        for key, value in tensors.items():
            dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
            if not dense or value.is_meta or value.dtype not in _FLOATS:
                came = f"a {value.layout} tensor of {value.dtype}" if isinstance(value, Tensor) else type(value)
                raise _RefusedError(
                    f"vectors: {_shown(key)} in {self.origin} is {came}; a plain tensor of floating numbers is wanted."
                )
        return self.read({key: value.shape for key, value in tensors.items()}, tensors.__getitem__)


def _read_safetensors(path: Path, naming: _Naming) -> dict[str, Tensor]:
    with _reading(path, "safetensors"), safe_open(path, framework="pt") as stored:
        names = list(stored.keys())
        naming.count(len(names))
        naming({name: stored.get_slice(name).get_shape() for name in names})  # before a whole model is read by mistake
        return naming.read_tensors({name: stored.get_tensor(name) for name in names})


def _read_torch(path: Path, naming: _Naming) -> dict[str, Tensor]:
    with _reading(path, "torch"):
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            named = re.search(r"GLOBAL ([\w.]{1,60})", str(error))
            if not named:
                raise
            raise _RefusedError(
                f"vectors: {path} holds Python objects ({named[1]}), which may run code and are never unpickled here. "
                "Save a plain dict of tensors instead: torch.save(vector.layer_activations, path)."
            ) from None
        if isinstance(stored, Tensor) and not stored.is_nested and stored.ndim > 1:
            naming.count(len(stored))
            stored = dict(enumerate(stored))
        if not isinstance(stored, dict):
            came = f"a tensor of shape {tuple(stored.shape)!s:.60}" if isinstance(stored, Tensor) else type(stored)
            raise _RefusedError(
                f"vectors: {path} holds {came}; a dict from layer to tensor, or one tensor [layer, d_model], is wanted."
            )
        return naming.read_tensors(stored)


def _read_npz(path: Path, naming: _Naming) -> dict[str, Tensor]:
    with _reading(path, "npz"), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        naming.count(len(archive.infolist()))
        if len(members) < len(archive.infolist()):
            raise _RefusedError(f"vectors: {path} holds two entries of one name.")
        shapes = {}
        for key, info in members.items():
            with archive.open(info) as stream:
                if np.lib.format.read_magic(stream) != (1, 0):  # later ones allow headers of gigabytes
                    raise _RefusedError(f"vectors: {_shown(key)} in {path} is no array of plain numbers.")
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            if dtype.kind != "f":
                raise _RefusedError(
                    f"vectors: {_shown(key)} in {path} is an array of {dtype}; floating numbers are wanted. "
                    "Save with array.astype('float32')."
                )
            shapes[key] = shape

        def entry(key: str) -> Tensor:
            with archive.open(members[key]) as stream:
                return _float32(np.lib.format.read_array(stream, allow_pickle=False))

        only = next(iter(shapes))
        if len(shapes) == 1 and len(shapes[only]) > 1 and not naming.knows(only):
            naming.count(shapes[only][0])
            naming(dict.fromkeys(range(shapes[only][0]), shapes[only][1:]))
            return naming.read_tensors(dict(enumerate(entry(only))))
        return naming.read(shapes, entry)


_READERS: dict[str, Callable[[Path, _Naming], dict[str, Tensor]]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".npz": _read_npz,
}


def _from_object(source: Any, hook: str, offset: int) -> dict[str, Tensor]:
    """The vectors of a steering-vectors SteeringVector, known by its two attributes."""
    tensors, kind = getattr(source, "layer_activations", None), getattr(source, "layer_type", None)
    if not isinstance(tensors, dict) or not isinstance(kind, str):
        raise ValueError(
            f"source: a {type(source).__name__} came; the path of a file, or a SteeringVector of steering-vectors, "
            "is wanted."
        )
    if kind not in _LAYER_TYPES:
        raise ValueError(
            f"source: a vector of layer_type {_shown(kind)} came, for which TransformerLens has no hook point (it has "
            f"none behind a norm's own weights). Train it with one of {', '.join(_LAYER_TYPES)}."
        )
    if hook not in ("resid_post", _LAYER_TYPES[kind]):
        raise ValueError(f"hook: {hook} came; layer_type {kind!r} means {_LAYER_TYPES[kind]}. Leave hook out.")
    return _Naming("source", _LAYER_TYPES[kind], offset).read_tensors(tensors)


class _BoundedReader(GGUFReader):
    """The gguf package's reader, stopped at the file's end: by itself it reads nothing there and counts on."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("the file ends earlier than its tables say")
        return super()._get(offset, dtype, count, override_order)


def _from_gguf(path: Path, model: str, behaviour: str, offset: int) -> SteeringVectors:
    _must_exist(path)
    with _reading(path, "GGUF"):
        reader = _BoundedReader(path)
        architecture = _text(reader, "general.architecture")
        if architecture not in (None, _ARCHITECTURE):
            raise _RefusedError(
                f"vectors: {path} holds a GGUF of architecture {_shown(architecture)}; a control vector is wanted. "
                "A model is opened with load_model."
            )
        rows = {}
        for tensor in reader.tensors:
            kind, _, layer = tensor.name.partition(".")
            if kind != "direction" or not _LAYER.fullmatch(layer) or tensor.tensor_type not in _GGUF_FLOATS:
                raise _RefusedError(
                    f"vectors: {path} holds {_shown(tensor.name)} of type {tensor.tensor_type.name}; a control vector "
                    "has direction.1, direction.2, ... of floating numbers only."
                )
            rows[int(layer)] = tensor
        ours = _text(reader, _OURS)
        if ours is not None:
            _no_offset(path, offset)
        naming = _Naming(str(path), "resid_post", offset)
        shapes = {layer: tensor.shape.tolist() for layer, tensor in rows.items()}
        vectors = naming.read(shapes, lambda layer: _float32(rows[layer].data))
        hint = _text(reader, f"{_ARCHITECTURE}.model_hint")
    if ours is None:
        return SteeringVectors(vectors, _unknown(hint if hint and model == "unknown" else model, behaviour))
    try:
        stored = json.loads(ours)
        if (stored.pop("kind"), stored.pop("schema")) != ("steering_vectors", _SCHEMA):
            raise KeyError("kind")
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
        provenance = Provenance(**fields)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise ValueError(f"vectors: the provenance in {path} is not of schema {_SCHEMA}. Make it again.") from None
    return SteeringVectors(vectors, provenance)


def _float32(array: Any) -> Tensor:
    """A tensor of its own, in this machine's byte order."""
    with np.errstate(over="ignore"):  # infinite numbers are refused later, by name
        return torch.from_numpy(array.astype(np.float32))


def _text(reader: GGUFReader, key: str) -> str | None:
    """A text among a GGUF file's keys; None if it is absent or no text."""
    field = reader.get_field(key)
    content = field.contents() if field is not None else None
    return content if isinstance(content, str) else None


def _is_ours(path: Path) -> bool:
    with _reading(path, "safetensors"), safe_open(path, framework="pt") as stored:
        return "rt_lens" in (stored.metadata() or {})


def _no_offset(origin: str | Path, offset: int) -> None:
    if offset:
        raise _RefusedError(f"offset: {offset} came, but {origin} names hook points and no layers. Leave it out.")


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"vectors: there is no file {path}.")


def _unknown(model: str, behaviour: str) -> Provenance:
    """Provenance of what another tool made."""
    return Provenance(model, behaviour, "unknown", "unknown", "unknown", 0, "unknown", 0, "unknown")


def _shown(name: Any) -> str:
    """A name from a file, short and with nothing in it that a terminal obeys."""
    return f"{name!r:.60}"
