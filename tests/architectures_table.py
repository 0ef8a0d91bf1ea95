"""Writes docs/architectures.md: `python tests/architectures_table.py` runs the checks of test_architectures.py.

Each release of TransformerLens has a part of its own; a run writes that of the installed one and leaves the others.
"""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from architecture_checks import (
    KINDS,
    REFUSALS,
    Baking,
    Case,
    adapted,
    baking,
    cached,
    cases,
    exported,
    gradients,
    logits,
    message_of,
    opened,
    outcome,
)
from families import FAMILIES

FILE = Path(__file__).parent.parent / "docs" / "architectures.md"
TITLE = f"TransformerLens {version('transformer-lens').split('.')[0]}"
COLUMNS = ("logits", "cached", "tuned", "gradients", "addition baked", "ablation baked", "bake exported", "exported",
           "LoRA", "remark")  # fmt: skip
_CLASSES = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}
_INTRODUCTION = """# Which models

`python tests/architectures_table.py` wrote this page from the checks that `tests/test_architectures.py` makes on a tiny
random model of each family: three blocks, the same weights in rt_lens and in transformers, float32. A row says what
holds of the family as a HookedTransformer or as a TransformerBridge (`load_model(..., backend=...)`). Of every row that
loads it also holds, to 1e-4, that `generate` gives transformers' greedy tokens for prompts of unlike length, that
activations after each block are transformers' hidden states, and that `add` at `resid_post`, `attn_out` and `mlp_out`
does what a torch hook on transformers' module does.

- **logits**, **cached**: the largest difference from transformers' logits is below this, for one row and for rows
  padded on the left; and for a prompt, then token by token, then rows that branch off.
- **tuned**: what `target_modules` may name. **gradients**: a step's largest difference from the gradients of the same
  loss over transformers' model, as a fraction of the largest gradient.
- **addition baked**: at which hook points `bake` folds an `add` into the weights exactly. **ablation baked**: whether
  it does so with an `ablate` of the whole residual stream. Elsewhere it refuses. **bake exported**: whether
  `export_hf` writes a baked addition at `attn_out` (as a Llama with biases, where the family has no place for them).
- **exported**, **LoRA**: `export_hf` and `export_peft` of a tuned change; transformers and peft open them and give the
  tuned logits.
"""


def below(difference: float) -> str:
    """The power of ten that a difference is below, so that the last digits of a machine do not show."""
    return "0" if difference == 0 else f"{10.0 ** math.ceil(math.log10(difference)):.0e}"


def yes_or_no(result: Any) -> str:
    return "no" if isinstance(result, ValueError) else "yes"


def baking_cells(found: Baking) -> dict[str, str]:
    """What of an edit goes into the weights, and out into files."""
    exact = [kind for kind in KINDS if not isinstance(found.additions[kind], ValueError)]
    as_llama = " (as Llama)" if found.exported_as == "LlamaForCausalLM" else ""
    return {
        "addition baked": "everywhere" if len(exact) == len(KINDS) else ", ".join(exact) or "no",
        "ablation baked": yes_or_no(found.ablation),
        "bake exported": "" if found.export is None else yes_or_no(found.export) + as_llama,
    }


def cells_of(case: Case, folder: Path) -> dict[str, str]:
    """A row of the table, from the checks."""
    adapter = outcome(adapted, case, folder / "adapter")
    return {
        "logits": below(max(logits(case, 24), logits(case, 24, 15, 3))),
        "cached": below(cached(case)),
        "tuned": "attention" if case.family.experts else "all",
        "gradients": below(gradients(case)),
        **baking_cells(baking(case, folder / "baked")),
        "exported": yes_or_no(outcome(exported, case, case.low_rank, folder / "exported")),
        "LoRA": yes_or_no(adapter),
        "remark": case.family.remark,
    }


def written() -> dict[str, str]:
    """Release of TransformerLens -> its part of the page."""
    if not FILE.exists():
        return {}
    parts = re.split(r"^## ", FILE.read_text(encoding="utf-8"), flags=re.M)[1:]
    return {" ".join(part.split()[:2]): part for part in parts}


def committed() -> tuple[dict[tuple[str, str], dict[str, str]], dict[str, str]]:
    """(Family, kind of model) -> column -> cell, of the installed release; and title of a refusal -> its message."""
    kinds = {name: kind for kind, name in _CLASSES.items()}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    messages: dict[str, str] = {}
    for line in written()[TITLE].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(COLUMNS) + 2 and cells[1] in kinds:
            rows[cells[0], kinds[cells[1]]] = dict(zip(COLUMNS, cells[2:], strict=True))
        elif match := re.match(r"- \*(.+)\*: (.+)$", line):
            messages[match[1]] = match[2]
    return rows, messages


def _part() -> str:
    libraries = f"transformer-lens {version('transformer-lens')}, transformers {version('transformers')}"
    head = ["family", "as", *COLUMNS]
    lines = [f"{TITLE} ({libraries})", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, kind in cases():
        with tempfile.TemporaryDirectory() as place:
            case = outcome(opened, name, kind, Path(place) / "tiny")
            refused = dict.fromkeys(COLUMNS, "") | {"logits": "refused", "remark": FAMILIES[name].remark}
            row = refused if isinstance(case, ValueError) else cells_of(case, Path(place))
        print(name, kind, row, flush=True)
        lines.append(f"| {' | '.join([name, _CLASSES[kind], *(row[column] for column in COLUMNS)])} |")
    lines += ["", "What is refused, and how:", ""]
    for title in REFUSALS:
        with tempfile.TemporaryDirectory() as place:
            lines.append(f"- *{title}*: {message_of(title, Path(place))}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the part of the installed release."""
    warnings.simplefilter("ignore")
    parts = {**written(), TITLE: _part()}
    FILE.parent.mkdir(exist_ok=True)
    text = "\n".join([_INTRODUCTION, *(f"## {parts[title].strip()}\n" for title in sorted(parts))])
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
