"""A model and a change of its weights as a Hugging Face folder, read back before it gets its name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from rt_lens.models.protocol import Model
from rt_lens.models.tokenizers import source_tokenizer
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.export.card import check_measured, model_card
from rt_lens.tuning.export.folder import check_free, whole_folder
from rt_lens.tuning.export.weights import as_huggingface, changed_by


def export_hf(
    model: Model,
    path: str | Path,
    *,
    delta: WeightDelta | None = None,
    measured: Sequence[Mapping[str, Any]] | None = None,
    behaviour: str | None = None,
    max_shard_size: str = "5GB",
    check: bool = True,
) -> Path:
    """Writes a folder that transformers opens without rt_lens: `AutoModelForCausalLM.from_pretrained(path)`.

    Weights (safetensors, of the model's dtype), configuration, tokenizer with its chat template, generation settings,
    and a model card. Tied embeddings stay tied unless the change parts them. Biases that the source's family lacks
    (those that `bake` folds edits into) are written as a Llama with biases, which computes the same; the card says so.

    Args:
        model: HookedTransformer or TransformerBridge, from `load_model`; it stays
            as it is.
        path: a folder that does not exist yet, or an empty one. It appears whole or not at all.
        delta: the change to write into the weights; None writes the model as it is.
        measured: rows on the card, as `results["summary"]` of a run: arm, direction, n, mean, low, high, seeds (or
            seed), and where there are any perplexity, kl, facts, repetition with `_low` and `_high`.
        behaviour: what the change is about, in a few words, for the card.
        max_shard_size: weights above it are written to several files with an index.
        check: read the folder back with transformers and compare its logits, before it gets its name. Needs memory
            for the model once more.

    Returns:
        The folder.

    Raises:
        ValueError: something is at `path`, the model or the change has no form in Hugging Face's files, a row lacks a
            column; or what was read back computes something else.
        OSError: if the disk is full.

    Example:
        >>> folder = export_hf(model, "mood_away", delta=delta, behaviour="mood", check=False)
        >>> folder, (folder / "model.safetensors").exists()
        (PosixPath('mood_away'), True)
    """
    path = Path(path).expanduser()
    rows = check_measured(measured)
    exported = as_huggingface(model, delta)
    check_free(path, exported.n_bytes)
    with whole_folder(path) as folder:
        exported.config.save_pretrained(folder)
        if exported.generation is not None:
            (folder / "generation_config.json").write_text(
                json.dumps(exported.generation, indent=2) + "\n", encoding="utf-8"
            )
        source_tokenizer(model).save_pretrained(folder)
        _write_weights(exported.weights, folder, max_shard_size)
        text = model_card(path.name, model, delta, rows, behaviour=behaviour, note=exported.note)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if check:
            _check_reads_back(model, delta, folder)
    return path


def _write_weights(weights: Mapping[str, Tensor], folder: Path, max_shard_size: str) -> None:
    """The weights in one file, or in shards with their index, as Hugging Face reads them.

    Its own `save_torch_state_dict` refuses matrices that lie side by side in one memory, as a HookedTransformer's do.
    """
    plan = split_torch_state_dict_into_shards(dict(weights), max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: weights[name].contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _check_reads_back(model: Model, delta: WeightDelta | None, folder: Path) -> None:
    """The logits of sixteen tokens spread over the vocabulary, here and from the folder, but for rounding."""
    from transformers import AutoModelForCausalLM

    tokens = torch.linspace(0, model.cfg.d_vocab - 1, 16, device="cpu").long()[None].to(model.cfg.device)
    mask = torch.ones_like(tokens)
    with changed_by(model, delta):
        ours = model(tokens, attention_mask=mask)
    reread: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=ours.dtype)
    logits = reread.to(tokens.device).eval()(tokens, attention_mask=mask).logits
    error = float((logits - ours).float().norm() / ours.float().norm())
    if not error < math.sqrt(torch.finfo(ours.dtype).eps):
        raise ValueError(
            f"exported model's logits differ from the original's (relative error {error:.2g}); nothing was written. "
            "Load the model with another backend, and make the change on that."
        )
