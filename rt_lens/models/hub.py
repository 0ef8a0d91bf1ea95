"""Names on the model hub: looked up, fetched (or found in the local cache) as folders. Nothing here builds a model."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from rt_lens.models.registry import BUNDLED_MODELS

_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def official_name(name: str) -> str:
    """The name on the model hub that TransformerLens's short names (`gpt2-small`) stand for; others as they are."""
    from transformer_lens.supported_models import MODEL_ALIASES

    wanted = name.lower()
    known = (official for official, aliases in MODEL_ALIASES.items() if wanted in {alias.lower() for alias in aliases})
    return next(known, name)


def hub_folder(name: str, *, with_code: bool = False) -> Path:
    """The folder of a model of the hub: its newest snapshot, or while offline the one in the local cache.

    Args:
        name: as the hub, or TransformerLens, has it.
        with_code: fetch the repository's own Python code too.

    Raises:
        ValueError: the hub does not give it, or it has no safetensors.
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
            f"{', '.join(sorted(file.name for file in folder.iterdir())[:6]) or 'nothing'}. Give another name, or "
            "convert it to a folder with transformers' save_pretrained."
        )
    return folder


def hub_token() -> str | None:
    """The user's own token, for models that ask for one."""
    return os.environ.get("HF_TOKEN") or None


def _unknown(name: str, error: Exception) -> str:
    near = get_close_matches(name.lower(), BUNDLED_MODELS, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Bundled: {', '.join(BUNDLED_MODELS)}."
    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return (
        f"model must be a bundled model, a Hugging Face folder, a .gguf file or a name on the model hub, got {name!r}, "
        f"which the hub does not give ({reason}). {hint} Hub names need a connection."
    )
