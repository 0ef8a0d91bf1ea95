"""Names on the model hub: looked up and fetched (or found in the local cache) as folders. Builds no model."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from rt_lens.models.registry import BUNDLED_MODELS

_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def official_name(name: str) -> str:
    """The hub's name for TransformerLens's short name (`gpt2-small`); any other name unchanged."""
    from transformer_lens.supported_models import MODEL_ALIASES

    short = name.lower()
    known = (official for official, aliases in MODEL_ALIASES.items() if short in {alias.lower() for alias in aliases})
    return next(known, name)


def hub_folder(name: str, *, with_code: bool = False) -> Path:
    """The folder of a model on the hub: its newest snapshot, or offline the one in the local cache.

    Args:
        name: the hub's or TransformerLens's.
        with_code: fetch the repository's own Python code too.

    Raises:
        ValueError: the hub does not give the model, or the model has no safetensors.
    """
    from huggingface_hub import snapshot_download

    patterns = [*_FILES, "*.py"] if with_code else list(_FILES)
    try:
        folder = Path(snapshot_download(official_name(name), allow_patterns=patterns, token=hub_token()))
    except (OSError, ValueError) as error:
        raise ValueError(_unknown(name, error)) from error
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model: {name} must be on the hub with a config.json and weights in safetensors, got "
            f"{', '.join(sorted(file.name for file in folder.iterdir())[:6]) or 'nothing'}. Choose a different name, "
            "or convert it to a folder with transformers' save_pretrained."
        )
    return folder


def hub_token() -> str | None:
    """The user's token, for models that need one."""
    return os.environ.get("HF_TOKEN") or None


def _unknown(name: str, error: Exception) -> str:
    near = get_close_matches(name.lower(), BUNDLED_MODELS, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Bundled: {', '.join(BUNDLED_MODELS)}."
    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return (
        f"model must be a bundled model, a Hugging Face folder, a .gguf file or a name on the model hub, got {name!r}, "
        f"which the hub does not give ({reason}). {hint} Hub names need a connection."
    )
