"""A change of weights as a LoRA adapter of low rank, with the error that the low rank makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rt_lens.models.protocol import Model
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.export.card import adapter_card, base_of, check_measured
from rt_lens.tuning.export.folder import check_free, whole_folder
from rt_lens.tuning.export.weights import changes_as_huggingface, source_config

_EXACT = 1e-5
_WORST_SHOWN = 10


@dataclass(frozen=True)
class Adapter:
    """An adapter that was written, and how far it is from the change that it stands for.

    Attributes:
        path: its folder.
        rank: the largest rank of a module.
        relative_error: Frobenius norm of what is lost over that of the change, over all matrices.
        modules: one row per matrix: module, rows, columns, change_rank (of the change, numerically), rank (kept), kept
            (fraction of the squared norm), relative_error.

    Example:
        >>> adapter = export_peft(model, "mood_lora", delta, rank=2)
        >>> adapter.rank, adapter.relative_error < 1, "relative_error" in adapter.modules
        (2, True, True)
    """

    path: Path
    rank: int
    relative_error: float
    modules: pd.DataFrame = field(repr=False)

    def __str__(self) -> str:
        return (
            f"{len(self.modules)} matrices at rank {self.rank} or less, relative error {self.relative_error:.2g} "
            f"(worst {self.modules['relative_error'].max():.2g}), {self.modules['kept'].min():.1%} or more of each "
            "one's squared norm kept"
        )


@torch.no_grad()
def export_peft(
    model: Model,
    path: str | Path,
    delta: WeightDelta,
    rank: int | None,
    *,
    base: str | None = None,
    measured: Sequence[Mapping[str, Any]] | None = None,
    behaviour: str | None = None,
) -> Adapter:
    """Writes a LoRA adapter that `peft.PeftModel.from_pretrained(base_model, path)` opens.

    Each changed matrix C, [out, in], becomes B A of its largest singular values: the nearest matrix of that rank
    (Eckart and Young 1936), as a LoRA (Hu et al. 2021) with alpha = rank, scale 1. A matrix whose change is exact at a
    lower rank gets that one.

    Args:
        model: the model that the delta was made on; it stays as it is.
        path: a folder that does not exist yet, or an empty one. It appears whole or not at all.
        delta: the change; only attention and MLP matrices.
        rank: largest rank of a matrix. Defaults to the smallest that is exact to a relative error of 1e-5, per matrix.
        base: name or folder of the base model, written into the adapter; by default its name on the model hub where
            rt_lens knows it, else the name it was loaded by.
        measured: rows on the card, as for `export_hf`; they are of the whole change.
        behaviour: what the change is about, in a few words, for the card.

    Returns:
        The folder, and the error of each matrix and of all.

    Raises:
        ValueError: something is at `path`, rank below 1, nothing is changed, or something that LoRA cannot hold
            (norms, biases, embeddings); names it.
        OSError: if the disk is full.

    Example:
        >>> adapter = export_peft(model, "mood_away_lora", delta, rank=16)
        >>> print(adapter)
        7 matrices at rank 16 or less, relative error ...
    """
    path, rows = Path(path), check_measured(measured)
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be 1 or more, or None for exact, got {rank}.")
    base = base or base_of(model)
    skeleton = _skeleton(model, base)
    changes = _matrices(model, delta, skeleton)
    check_free(path, sum(4 * sum(each.shape) * min(*each.shape, rank or each.numel()) for each in changes.values()))
    factors, table = {}, []
    for module, change in changes.items():
        up, down, row = _truncated(change, rank)
        factors[module] = (up, down)
        table.append({"module": module, **row})
    modules = pd.DataFrame(table)
    lost, whole = (modules["lost"] ** 2).sum() ** 0.5, (modules["norm"] ** 2).sum() ** 0.5
    adapter = Adapter(path, int(modules["rank"].max()), float(lost / whole), modules.drop(columns=["lost", "norm"]))
    with whole_folder(path) as folder:
        _write(skeleton, factors, folder)
        errors = f"{str(adapter)[0].upper()}{str(adapter)[1:]}.\n\n{_worst(adapter)}"
        text = adapter_card(path.name, model, delta, rows, base=base, behaviour=behaviour, errors=errors)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return adapter


def _skeleton(model: Model, base: str) -> Any:
    """The base model as transformers has it, without memory for its weights: it knows its modules' names and kinds."""
    from transformers import AutoModelForCausalLM

    config = source_config(model)
    config._name_or_path = base  # which peft writes into the adapter
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _matrices(model: Model, delta: WeightDelta, skeleton: nn.Module) -> dict[str, Tensor]:
    """Module -> change of its matrix, [out, in]; refuses by name what LoRA cannot hold."""
    modules = dict(skeleton.named_modules())
    matrices, others = {}, []
    for name, change in changes_as_huggingface(model, delta).items():
        module, _, kind = name.rpartition(".")
        linear = isinstance(modules.get(module), nn.Linear | Conv1D)
        if kind == "weight" and linear and not module.endswith("lm_head"):
            matrices[module] = change.T if isinstance(modules[module], Conv1D) else change
        else:
            others.append(name)
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        raise ValueError(
            "delta must change attention and MLP matrices only, which is what LoRA holds; it cannot hold "
            f"{', '.join(others[:4])}{more}. Use export_hf."
        )
    if not matrices:
        raise ValueError("delta must change something, got no change at all, so there is no adapter to write.")
    return matrices


def _truncated(
    change: Float[Tensor, "out in"], rank: int | None
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"], dict[str, float]]:
    """Factors of the nearest matrix of a rank, and what they lose."""
    wide = change.double().cpu() if change.shape[0] <= change.shape[1] else change.double().cpu().T
    squares, left = torch.linalg.eigh(wide @ wide.T)  # several times faster than an SVD, and exact enough in float64
    squares, left = squares.clamp(min=0).flip(0), left.flip(1)
    norm = float(wide.norm())
    exact = int((squares.flip(0).cumsum(0).flip(0) > (_EXACT * norm) ** 2).sum())  # of this singular value and the rest
    kept = min(exact, rank or exact)
    first, second = left[:, :kept].float(), (left[:, :kept].T @ wide).float()
    up, down = (first, second) if wide.shape == change.shape else (second.T, first.T)
    lost = float((change.double().cpu() - up.double() @ down.double()).norm())  # with the rounding of the factors
    threshold = float(squares[0]) * (max(change.shape) * torch.finfo(torch.float32).eps) ** 2  # as matrix_rank has it
    numeric = int((squares > threshold).sum())
    row = {
        "rows": change.shape[0], "columns": change.shape[1], "change_rank": numeric, "rank": kept,
        "kept": 1 - (lost / norm) ** 2, "relative_error": lost / norm, "lost": lost, "norm": norm,
    }  # fmt: skip
    return up.contiguous(), down.contiguous(), row


def _write(skeleton: Any, factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> None:
    """Peft's own writer, over a model without weights."""
    from peft import LoraConfig, get_peft_model

    ranks = {module: down.shape[0] for module, (_, down) in factors.items()}
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=list(ranks),
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in skeleton.modules()),  # GPT-2
    )
    adapted = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    state = {}
    for module, (up, down) in factors.items():
        state[f"base_model.model.{module}.lora_A.default.weight"] = down
        state[f"base_model.model.{module}.lora_B.default.weight"] = up
    # Not "auto", which asks the model hub whether the vocabulary was resized.
    adapted.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)


def _worst(adapter: Adapter) -> str:
    """The matrices with the largest errors, as a Markdown table."""
    worst = adapter.modules.sort_values("relative_error", ascending=False, kind="stable").head(_WORST_SHOWN)
    lines = ["| module | rank of the change | rank | squared norm kept | relative error |", "|---|---|---|---|---|"]
    for row in worst.to_dict("records"):
        numbers = f"{row['change_rank']} | {row['rank']} | {row['kept']:.2%} | {row['relative_error']:.2g}"
        lines.append(f"| {row['module']} | {numbers} |")
    return "\n".join(lines)
