"""GGUF files: one reader for all of transformers' readings, and the settings that transformers ignores.

These settings are read here, or refused by name; no weights are converted here. llama.cpp stores Llama 3's scaling of
rotary angles in a tensor of factors, `rope_freqs.weight`, and other scalings as `*.rope.scaling.*`. transformers reads
neither, drops tensors that its model has no parameter for, and fills weights that the file lacks with random numbers.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_SCALING = "rope.scaling."
# Settings of the maths that transformers' reader ignores for some architectures -> the configuration's field.
_MATHS = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.clamp_kqv": "clip_qkv",
}
_WITHOUT_EFFECT = {"finetuned"}
_DEFAULTS = {"attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "alpha": 0.0}
_READING = threading.Lock()


@contextmanager
def read_once(file: Path) -> Iterator[gguf.GGUFReader]:
    """Makes transformers share one reader of a GGUF file inside the block, and one table of names; yields the reader.

    By itself transformers makes four readers: for the tokenizer, twice for the configuration, and for the weights. Each
    takes 10 s for a vocabulary of 262,144 tokens. It makes gguf's table of tensor names anew for every module of the
    model, which takes 10 s for 30 blocks.

    Raises:
        ValueError: the file is damaged, or no GGUF file.
    """
    try:
        reader = _QuickReader(file)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(
            f"model must be a whole GGUF file, got {file.name}, which cannot be read ({error}). Fetch it again."
        ) from None
    with _READING:  # other threads wait, since the package is changed for all of them
        read, names = gguf.GGUFReader.__init__, gguf.get_tensor_name_map

        def share(self: gguf.GGUFReader, path: Any, *args: Any, **kwargs: Any) -> None:
            if type(self) is gguf.GGUFReader and Path(path).samefile(file):
                vars(self).update(vars(reader))
            else:
                read(self, path, *args, **kwargs)

        gguf.GGUFReader.__init__ = share  # type: ignore[method-assign]
        gguf.get_tensor_name_map = cache(names)
        try:
            yield reader
        finally:
            gguf.GGUFReader.__init__ = read  # type: ignore[method-assign]
            gguf.get_tensor_name_map = names


class _QuickReader(gguf.GGUFReader):
    """gguf's reader, four times as fast: it makes a plain array for each token, where gguf makes views of a memmap."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        kind = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
        return np.frombuffer(self.data, kind, int(count), int(offset))


def check_maths(reader: Any, config: Any) -> None:
    """Raises a ValueError for a file with a setting that its configuration lacks.

    Raises:
        ValueError: names the field.
    """
    for key, field in _MATHS.items():
        value = _value(reader, key)
        if value is None or not value or value == getattr(config, field, None):
            continue
        if field == "sliding_window" and value >= config.max_position_embeddings:
            continue
        raise ValueError(
            f"model: {_architecture(reader)}.{key} must be {getattr(config, field, None)} in a GGUF file, got {value}, "
            "which transformers' reader of this architecture ignores. Use the model's Hugging Face folder."
        )


def scaled_rope(reader: Any, config: Any) -> dict[str, Any] | None:
    """Hugging Face's rotary parameters of a file that scales rotary angles; None for a file that does not.

    Raises:
        ValueError: names the field that Hugging Face's parameters cannot express.
    """
    plain = getattr(config, "rope_parameters", None) or {}
    scaling = {key.split(_SCALING, 1)[1]: _field(reader, key) for key in reader.fields if _SCALING in key}
    if (old := _value(reader, "rope.scale_linear")) not in (None, 1.0):
        scaling |= {"type": "linear", "factor": old}
    kind = scaling.pop("type", "none")
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith("rope_f")}
    scaled: dict[str, Any] | None = None
    if kind in ("linear", "yarn") and not tensors:
        scaled = _by_metadata(reader, kind, scaling, config)
    elif kind == "none" and tensors.keys() <= {"rope_freqs.weight"}:
        for tensor in tensors.values():
            scaled = _by_factors(torch.tensor(tensor.data.astype("float64"), device="cpu").flatten(), config)
    elif kind in ("none", "longrope") and tensors.keys() == {"rope_factors_long.weight", "rope_factors_short.weight"}:
        scaled = _long(reader, scaling, tensors, config)
    else:
        _refuse(reader, f"{_SCALING}type", f"{kind!r} with {', '.join(sorted(tensors)) or 'no tensor of factors'}")
    if scaled is not None and not isinstance(plain.get("rope_theta"), int | float):
        _refuse(reader, f"{_SCALING}type", f"{scaled['rope_type']!r} for {type(config).__name__}")
    return None if scaled is None else {"rope_theta": plain["rope_theta"], **_partial(plain), **scaled}


def refuse_what_has_no_place(reader: Any, model: Any, loading: Mapping[str, Any]) -> None:
    """Raises a ValueError for a file with tensors that are no parameters of the model, or without some of its weights.

    Args:
        reader: of the file.
        model: transformers' model of it.
        loading: transformers' report of the loading: `missing_keys` and others.

    Raises:
        ValueError: names the first of them.
    """
    from transformers import modeling_gguf_pytorch_utils as conversion

    architecture = _architecture(reader)
    processor = conversion.TENSOR_PROCESSORS.get(architecture, conversion.TensorProcessor)(
        config=model.config.to_dict()
    )
    placed = conversion.get_gguf_hf_weights_map(model, processor)
    joined = [pattern for pattern in vars(type(processor)).values() if isinstance(pattern, re.Pattern)]
    left = [
        tensor.name
        for tensor in reader.tensors
        if tensor.name not in placed
        and not tensor.name.startswith(("rope_freqs.", "rope_factors_"))  # handled as rotary parameters
        and not any(pattern.match(tensor.name) for pattern in joined)
    ]
    if left:
        raise ValueError(
            f"model: the tensors of a GGUF file must all be parameters of {type(model).__name__}, got "
            f"{', '.join(left[:4])}{' and more' if len(left) > 4 else ''}, which transformers' reader drops. Use the "
            "model's Hugging Face folder."
        )
    lacking = set(loading["missing_keys"]) - _tied(model)
    if lacking:
        raise ValueError(
            f"model: the GGUF file must hold every weight of {type(model).__name__}, got none for "
            f"{', '.join(sorted(lacking)[:4])}. Use another file, or the model's Hugging Face folder."
        )


def _tied(model: Any) -> set[str]:
    """Weights that share another's memory, so a file may lack them."""
    return {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()


def _partial(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {"partial_rotary_factor": plain["partial_rotary_factor"]} if "partial_rotary_factor" in plain else {}


def _by_metadata(reader: Any, kind: str, scaling: dict[str, Any], config: Any) -> dict[str, Any]:
    """Position interpolation or YaRN, from the settings `rope.scaling.*`."""
    if "factor" not in scaling:
        _refuse(reader, f"{_SCALING}factor", "none")
    parameters = {"rope_type": kind, "factor": float(scaling.pop("factor"))}
    length = scaling.pop("original_context_length", None)
    if kind == "yarn":
        original = int(length or config.max_position_embeddings / parameters["factor"])
        parameters["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if (beta := scaling.pop(f"yarn_{name}", None)) is not None:
                parameters[name] = float(beta)
    _refuse_rest(reader, scaling)
    return parameters


def _long(reader: Any, scaling: dict[str, Any], tensors: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Phi-3's two sets of factors, for texts up to the original length and beyond."""
    length, attention = scaling.pop("original_context_length", None), scaling.pop("attn_factor", None)
    if length is None:
        _refuse(reader, f"{_SCALING}original_context_length", "none")
    _refuse_rest(reader, scaling)
    short, long = (
        torch.tensor(tensors[f"rope_factors_{kind}.weight"].data.astype("float64"), device="cpu").flatten().tolist()
        for kind in ("short", "long")
    )
    parameters: dict[str, Any] = {
        "rope_type": "longrope", "short_factor": short, "long_factor": long,
        "factor": config.max_position_embeddings / int(length), "original_max_position_embeddings": int(length),
    }  # fmt: skip
    return parameters if attention is None else parameters | {"attention_factor": float(attention)}


def _by_factors(factors: Float[Tensor, "frequency"], config: Any) -> dict[str, Any] | None:
    """Rotary parameters from the divisors of the frequencies: Llama 3's if they give these factors, else one by one."""
    if torch.allclose(factors, torch.ones_like(factors)):
        return None
    base = config.rope_parameters["rope_theta"]
    turns = base ** -(torch.arange(len(factors), dtype=torch.float64, device="cpu") / len(factors)) / (2 * math.pi)
    for high, length in _lengths(factors, turns):
        parameters = {
            "rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }  # fmt: skip
        if torch.allclose(_llama3_factors(parameters, turns), factors, rtol=1e-4):
            return parameters
    listed = factors.tolist()
    return {
        "rope_type": "longrope", "short_factor": listed, "long_factor": listed, "factor": 1.0, "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }  # fmt: skip


def _lengths(factors: Float[Tensor, "frequency"], turns: Float[Tensor, "frequency"]) -> list[tuple[float, int]]:
    """High factors and original lengths that may have produced these factors; the low factor is 1 by convention."""
    most = factors.max()
    smooth = (1 / factors - 1 / most) / (1 - 1 / most)
    between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    candidates = [(4.0, 8192)]
    if between.any():
        candidates += [(4.0, round(float(((3 * smooth + 1) / turns)[between].mean())))]
    if int(between.sum()) > 1:  # a line through them: smooth = (length * turns - 1) / (high - 1)
        x, y = turns[between], smooth[between]
        slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
        offset = float(slope * x.mean() - y.mean())
        if offset > 0:
            candidates += [(round(1 + 1 / offset, 3), round(float(slope) / offset))]
    return candidates


def _llama3_factors(parameters: Mapping[str, Any], turns: Float[Tensor, "frequency"]) -> Float[Tensor, "frequency"]:
    """Llama 3's divisor of each frequency: 1 for high frequencies, the factor for low ones, interpolated between."""
    factor, high = parameters["factor"], parameters["high_freq_factor"]
    smooth = ((parameters["original_max_position_embeddings"] * turns - 1) / (high - 1)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _refuse_rest(reader: Any, scaling: Mapping[str, Any]) -> None:
    for name, value in scaling.items():
        if name not in _WITHOUT_EFFECT and value != _DEFAULTS.get(name):
            _refuse(reader, f"{_SCALING}{name}", value)


def _refuse(reader: Any, key: str, value: Any) -> None:
    raise ValueError(
        f"model: {_architecture(reader)}.{key} must be a setting that Hugging Face's rotary parameters can express, "
        f"got {value}. Use the model's Hugging Face folder."
    )


def _architecture(reader: Any) -> str:
    return str(_field(reader, "general.architecture"))


def _value(reader: Any, key: str) -> Any:
    """A setting of the file's architecture; None if the file lacks it."""
    key = f"{_architecture(reader)}.{key}"
    return _field(reader, key) if key in reader.fields else None


def _field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()
