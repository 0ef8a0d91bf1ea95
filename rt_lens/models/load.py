"""Loads a model and its tokenizer from a name, a folder or a file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from rt_lens.models.backends import backend_of, has_hooked
from rt_lens.models.backends.bridge_folder import bridge_from_folder
from rt_lens.models.hub import hub_folder
from rt_lens.models.llama import NotLlamaStyle
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder, gguf_folder
from rt_lens.models.tokenizers import give_tokenizer, read_tokenizer

Backend = Literal["auto", "hooked", "bridge"]


def load_model(
    name_or_path: str | Path = DEFAULT_MODEL,
    *,
    backend: Backend = "auto",
    device: str | None = None,
    dtype: str | torch.dtype = "float32",
    device_map: str | Mapping[str, str | int] | None = None,
    offload_folder: str | Path | None = None,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    accept_terms: bool = False,
) -> Any:
    """Loads a language model with TransformerLens hook points, its tokenizer and its chat template.

    Weights are unprocessed (nothing folded, nothing centred), so they equal Hugging Face's. Padding is on the left, and
    `model.to_tokens` does not prepend a second BOS token. Hub names are downloaded (or read from the local cache when
    offline) and loaded like a local folder.

    Args:
        name_or_path: a bundled model (`rt-lens models` lists them), a local Hugging Face folder, a local `.gguf` file,
            or a name on the model hub; TransformerLens's short names work too.
        backend: `hooked` for a HookedTransformer (TransformerLens 3), `bridge` for a TransformerBridge, `auto` for a
            HookedTransformer where there is one and rt_lens's conversion covers the architecture, else for a bridge.
        device: torch device; by default CUDA if there is one, else the CPU.
        dtype: `float32`, `bfloat16`, `float16`, or the torch dtype.
        device_map: instead of `device`, where each part goes, as transformers takes it (`auto`, `balanced`, or module
            name -> device); the model is then a bridge. Steering and reading work as ever; what is on the disk is not
            tuned, baked or exported. Parts on the disk need TransformerLens 4.
        offload_folder: folder for the parts that `device_map` puts on the disk.
        trust_remote_code: run custom code shipped with the repository; it has your full permissions, so enable it only
            for authors you trust.
        chat_template_kwargs: variables for the chat template besides the messages, such as {"enable_thinking": False}.
        accept_terms: accept the terms of use of a bundled model that has some; it is fetched only then. Its name in the
            environment variable RT_LENS_ACCEPT_TERMS does the same. The cache keeps the answer.

    Returns:
        A HookedTransformer or TransformerBridge in evaluation mode.

    Raises:
        ValueError: an unknown name, backend or dtype; terms of use that you have not accepted; an architecture that
            `hooked` does not cover; quantised weights; a repository with code of its own that you did not trust; or a
            bridge whose logits differ from transformers' logits.
        FileNotFoundError: a bundled model that is not installed and cannot be fetched.

    Example:
        >>> model = load_model("smollm2-135m-instruct")
        >>> model.cfg.n_layers, model.cfg.d_model
        (30, 576)
        >>> "blocks.21.hook_resid_post" in model.hook_dict
        True
    """
    if backend not in ("auto", "hooked", "bridge"):
        raise ValueError(f"backend must be 'auto', 'hooked' or 'bridge', got {backend!r}.")
    if device_map is not None and (device is not None or backend == "hooked"):
        other = f"device={device!r}" if device is not None else "backend='hooked'"
        raise ValueError(f"device_map must come without a device and with a bridge, got {other} too. Leave it out.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"device": device, "dtype": _dtype(dtype), "trust_remote_code": trust_remote_code}
    if offload_folder is not None and (device_map is None or has_hooked()):
        raise ValueError(
            "offload_folder must come with a device_map and transformer-lens 4, got "
            f"device_map={device_map!r} and transformer-lens {version('transformer-lens')}. Leave it out."
        )
    if device_map is not None:
        backend = "bridge"
        settings |= {"device_map": device_map, "offload_folder": offload_folder}
    folder, name = _local_folder(name_or_path, accept_terms), Path(str(name_or_path)).name
    if folder is None:
        folder = hub_folder(str(name_or_path), with_code=trust_remote_code)
        model = _from_folder(folder, str(name_or_path), backend, settings)
        model.cfg.model_name = name  # not that of the snapshot
    else:
        model = _from_folder(folder, folder.name, backend, settings)
    model.cfg.rt_lens_name = name
    model.cfg.rt_lens_chat_template_kwargs = dict(chat_template_kwargs or {})
    return model.eval()


@dataclass
class TokenizerOnly:
    """A tokenizer with what chat templates read of a model's configuration: enough to read texts, without weights."""

    tokenizer: Any
    cfg: Any


def load_tokenizer(
    name_or_path: str | Path = DEFAULT_MODEL, *, chat_template_kwargs: Mapping[str, Any] | None = None,
    accept_terms: bool = False, trust_remote_code: bool = False,
) -> TokenizerOnly:  # fmt: skip
    """The tokenizer of a model without its weights, to look at texts.

    Args:
        name_or_path: as in `load_model`.
        chat_template_kwargs: keywords for the chat template besides the messages.
        accept_terms: as in `load_model`.
        trust_remote_code: as in `load_model`.

    Example:
        >>> reader = rtl.models.load_tokenizer()
        >>> len(reader.tokenizer.encode("It rained."))
        4
    """
    folder = _local_folder(name_or_path, accept_terms)
    tokenizer = read_tokenizer(folder or Path(name_or_path), trust_remote_code=trust_remote_code)
    return TokenizerOnly(tokenizer, SimpleNamespace(rt_lens_chat_template_kwargs=dict(chat_template_kwargs or {})))


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    kind = kinds.get(str(dtype).removeprefix("torch."))
    if kind is None:
        raise ValueError(f"dtype must be one of {', '.join(kinds)}, got {dtype!r}.")
    return kind


def _local_folder(name_or_path: str | Path, accept_terms: bool) -> Path | None:
    """The Hugging Face folder of a bundled model, a GGUF file or a folder; None for a name on the hub."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name.lower() in BUNDLED_MODELS:
        return bundled_folder(BUNDLED_MODELS[name.lower()], accept_terms=accept_terms)
    if path.is_dir():
        if not (path / "config.json").is_file():
            _refuse_adapter(path)
            raise ValueError(
                f"model must be a folder with a config.json, got {name}, which has none. Give a folder that "
                "save_pretrained wrote."
            )
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model must be an existing .gguf file, got {name}. Check the path.")
        return gguf_folder(path)
    if path.is_file():
        raise ValueError(f"model must be a folder or a .gguf file, got the file {name}. Give the folder that it is in.")
    if path.is_absolute() or name.startswith("."):
        raise ValueError(
            f"model must be a Hugging Face folder, a .gguf file or a name, got {name}, which does not exist. "
            "Check the path."
        )
    return None


def _refuse_adapter(folder: Path) -> None:
    """Raises a ValueError for the folder of a LoRA adapter, which says how to merge it into a model."""
    if not (folder / "adapter_config.json").is_file():
        return
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    raise ValueError(
        f"model: {folder.name} must be the folder of a whole model, got a LoRA adapter of {base}. Merge the two with "
        "peft (PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(new_folder)), and give the "
        "new folder."
    )


def _from_folder(folder: Path, name: str, backend: Backend, settings: Mapping[str, Any]) -> Any:
    trusted: bool = settings["trust_remote_code"]
    _refuse_quantised(folder, name)
    model: Any = None
    if backend == "hooked" or (backend == "auto" and has_hooked()):
        model = _hooked(folder, name, backend, settings)
    if model is None:
        model = bridge_from_folder(folder, name, **settings)
    give_tokenizer(model, read_tokenizer(folder, trust_remote_code=trusted))
    return _with_origin(model, folder, trusted)


def _refuse_quantised(folder: Path, name: str) -> None:
    """Raises a ValueError for quantised weights: they cannot be tuned, and no edit of weights fits them."""
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if stored:
        raise ValueError(
            f"model: {name} must have weights that are not quantised, got quantization_config with quant_method "
            f"{stored.get('quant_method')!r}. Use the model that it was quantised from."
        )


def _hooked(folder: Path, name: str, backend: Backend, settings: Mapping[str, Any]) -> Any:
    """The folder as a HookedTransformer; None if it needs a bridge and may be one."""
    if not has_hooked():
        raise ValueError(
            f"backend must be 'auto' or 'bridge' with transformer-lens {version('transformer-lens')}, got 'hooked'. "
            "HookedTransformer is in transformer-lens 3: pip install 'transformer-lens<4'."
        )
    from rt_lens.models.backends.hooked_folder import hooked_from_folder

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*HookedTransformer is deprecated.*")
            return hooked_from_folder(folder, **settings)
    except NotLlamaStyle as refusal:
        if backend == "hooked":
            raise ValueError(f"backend 'hooked' cannot load {name}: {refusal}. Use backend='bridge'.") from None
        return None


def _with_origin(model: Any, folder: Path, trust_remote_code: bool) -> Any:
    """Keeps Hugging Face's configuration and generation settings on `model.cfg`, for exports and end tokens."""
    from transformers import AutoConfig, GenerationConfig

    config: Any = backend_of(model).source_config()
    if config is None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model.cfg.rt_lens_config = config.to_dict()
    generation = None
    with suppress(OSError, ValueError):  # many folders have no such file
        generation = GenerationConfig.from_pretrained(folder)
    generation = generation or GenerationConfig.from_model_config(config)
    model.cfg.rt_lens_generation = generation.to_diff_dict()
    return model
