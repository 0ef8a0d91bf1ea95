"""Models: the only room that builds one. A name, a folder or a file goes in; a model with its tokenizer comes out."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from transformer_lens import HookedTransformer

from rt_lens.models.llama import (
    FAMILIES,
    NotLlamaStyle,
    hooked_from_folder,
    keep_huggingface_layout,
    refuse_what_is_not_covered,
    to_huggingface,
)
from rt_lens.models.registry import DEFAULT_MODEL, EMBEDDED_MODELS, EmbeddedModel
from rt_lens.models.sources import cache_home, embedded_folder, gguf_folder

__all__ = [
    "DEFAULT_MODEL",
    "EMBEDDED_MODELS",
    "FAMILIES",
    "EmbeddedModel",
    "NotLlamaStyle",
    "cache_home",
    "describe",
    "load_model",
    "refuse_what_is_not_covered",
    "to_huggingface",
]

Backend = Literal["auto", "hooked", "bridge"]


def load_model(
    name_or_path: str | Path = DEFAULT_MODEL,
    *,
    backend: Backend = "auto",
    device: str | None = None,
    dtype: str | torch.dtype = "float32",
) -> Any:
    """Loads a language model with TransformerLens hook points, its tokenizer and its chat template.

    Weights are unprocessed (nothing folded, nothing centred), so they are Hugging Face's numbers. Padding is on the
    left, and text given to `model.to_tokens` gets no second start token.

    Args:
        name_or_path: an embedded model (`rt-lens models` lists them), a local Hugging Face folder, a local `.gguf`
            file, a name that HookedTransformer knows, or any other name on the model hub.
        backend: `hooked` for a HookedTransformer, `bridge` for a TransformerBridge, `auto` for a HookedTransformer
            wherever its maths covers the architecture.
        device: torch device; by default CUDA if there is one, else the CPU.
        dtype: `float32`, `bfloat16`, `float16`, or the torch type.

    Returns:
        A HookedTransformer or TransformerBridge in evaluation mode.

    Raises:
        ValueError: unknown name, backend or dtype, or `hooked` asked for what it does not cover.
        FileNotFoundError: an embedded model that is not installed and cannot be fetched.

    Example:
        >>> model = load_model("smollm2-135m-instruct")
        >>> model.cfg.n_layers
        30
    """
    if backend not in ("auto", "hooked", "bridge"):
        raise ValueError(f"backend: {backend!r} came; 'auto', 'hooked' or 'bridge' is wanted.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = _dtype(dtype)
    folder = _local_folder(name_or_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*HookedTransformer is deprecated.*")
        if folder is None:
            model = _from_hub(str(name_or_path), backend, device, kind)
        else:
            model = _from_folder(folder, backend, device, kind)
    model.cfg.rt_lens_name = Path(str(name_or_path)).name
    return model.eval()


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    kind = kinds.get(str(dtype).removeprefix("torch."))
    if kind is None:
        raise ValueError(f"dtype: {dtype!r} came; one of {', '.join(kinds)} is wanted.")
    return kind


def _local_folder(name_or_path: str | Path) -> Path | None:
    """The Hugging Face folder of an embedded model, a GGUF file or a folder; None for a name on the hub."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name.lower() in EMBEDDED_MODELS:
        return embedded_folder(EMBEDDED_MODELS[name.lower()])
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model: the folder {name} has no config.json. Give a folder that save_pretrained wrote.")
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model: there is no file {name}. Give the path of a .gguf file.")
        return gguf_folder(path)
    if path.is_file():
        raise ValueError(f"model: {name} is a file, but no .gguf. Give the folder it is in, or a .gguf file.")
    if path.is_absolute() or name.startswith("."):
        raise ValueError(f"model: there is nothing at {name}. Give a Hugging Face folder, a .gguf file or a name.")
    return None


def _from_folder(folder: Path, backend: Backend, device: str, dtype: torch.dtype) -> Any:
    if backend != "bridge":
        try:
            model = hooked_from_folder(folder, device=device, dtype=dtype)
        except NotLlamaStyle as refusal:
            if backend == "hooked":
                raise ValueError(
                    f"backend: 'hooked' cannot load {folder.name}: {refusal}. Use backend='bridge'."
                ) from None
        else:
            return _with_origin(_with_tokenizer(model, _tokenizer(str(folder))), str(folder))
    return _bridge(str(folder), device, dtype)


def _from_hub(name: str, backend: Backend, device: str, dtype: torch.dtype) -> Any:
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        official: str | None = get_official_model_name(name)
    except ValueError:
        official = None
    try:
        if backend != "bridge" and official is not None:
            model = HookedTransformer.from_pretrained_no_processing(name, device=device, dtype=dtype)
            return _with_origin(_with_tokenizer(keep_huggingface_layout(model), _tokenizer(official)), official)
        if backend == "bridge" and official is not None:
            return _bridge(official, device, dtype)
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        return _from_folder(Path(snapshot_download(name, allow_patterns=patterns)), backend, device, dtype)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(("backend:", "model:")):
            raise
        raise ValueError(_unknown(name, error)) from error


def _unknown(name: str, error: Exception) -> str:
    near = get_close_matches(name.lower(), EMBEDDED_MODELS, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Embedded: {', '.join(EMBEDDED_MODELS)}."
    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return (
        f"model: {name!r} is no embedded model, no local folder or .gguf file, and the model hub did not give it "
        f"({reason}). {hint} Else give a Hugging Face folder, a .gguf file, or a hub name while online."
    )


def _bridge(name: str, device: str, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(name, device=device, dtype=dtype)
    return _with_tokenizer(bridge, _tokenizer(name))


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, token=os.environ.get("HF_TOKEN") or None)


def _with_tokenizer(model: Any, tokenizer: Any) -> Any:
    # Past set_tokenizer and the bridge's setter: both rebuild the tokenizer to add a start token to every text,
    # which chat templates already write.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if isinstance(model, HookedTransformer):
        model.tokenizer = tokenizer
    else:
        model._tokenizer = tokenizer
    model.cfg.default_prepend_bos = False
    model.cfg.tokenizer_prepends_bos = tokenizer.encode("a")[0] == tokenizer.bos_token_id
    return model


def _with_origin(model: HookedTransformer, name: str) -> HookedTransformer:
    """Keeps Hugging Face's configuration and generation settings on `model.cfg`, for `export_hf`."""
    from transformers import AutoConfig, GenerationConfig

    cfg: Any = model.cfg
    cfg.rt_lens_config = cfg.rt_lens_generation = None
    with suppress(OSError, ValueError):  # some official names are weights alone
        cfg.rt_lens_config = AutoConfig.from_pretrained(name).to_dict()
        cfg.rt_lens_generation = GenerationConfig.from_pretrained(name).to_diff_dict()
    return model


def describe(name: str) -> dict[str, Any]:
    """What the registry knows of an embedded model, and where it was found: a row of `rt-lens models`."""
    model = EMBEDDED_MODELS[name]
    folder = cache_home() / "models" / f"{model.name}-{model.sha256[:12]}"
    manifest = folder / "rt_lens_manifest.json"
    converted = manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")).get("sha256") == model.sha256
    return {
        "name": model.name,
        "parameters": f"{model.parameters / 1e6:.0f} M",
        "file": f"{model.size / 1e6:.0f} MB",
        "licence": model.licence,
        "source": model.source,
        "cached": str(folder) if converted else "not yet",
    }
