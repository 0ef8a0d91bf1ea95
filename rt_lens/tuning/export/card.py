"""Model cards: what was changed, how it was measured or that it was not, how to use it. Text in, Markdown out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from huggingface_hub import ModelCardData

from rt_lens.models.forward import model_name
from rt_lens.models.parameter_names import block_and_modules
from rt_lens.models.protocol import Model
from rt_lens.models.registry import BUNDLED_MODELS
from rt_lens.tuning.delta import WeightDelta

_NEEDED = ("arm", "direction", "n", "mean", "low", "high")
# Title, column of the value, of its interval's ends, and of its n; a row that lacks one of them has a dash.
_MEASURES = (
    ("perplexity", "perplexity", "n_texts"),
    ("KL (nats)", "kl", "n_texts"),
    ("facts correct", "facts", "n_facts"),
    ("repetition", "repetition", "n"),
)
_PACKAGES = ("rt_lens", "torch", "transformer-lens", "transformers", "peft")


def check_measured(measured: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """The rows, if every one has what a number needs beside it.

    Raises:
        ValueError: names the column that a row lacks.
    """
    rows = list(measured or [])
    if measured is not None and not rows:
        raise ValueError("measured must be at least one row, got none. Give results['summary'], or leave it out.")
    for row in rows:
        missing = [column for column in _NEEDED if row.get(column) is None]
        missing += [] if row.get("seeds") or row.get("seed") is not None else ["seeds"]
        if missing:
            raise ValueError(
                f"measured must have the columns {', '.join(missing)} in every row, got a row with "
                f"{', '.join(map(str, row))}. Give the rows of results['summary'], with n, interval and seeds."
            )
    return rows


def base_of(model: Model) -> str:
    """The base model's name on the model hub where the registry knows it, else the name it was loaded by."""
    known = BUNDLED_MODELS.get(model_name(model).lower())
    return known.source.partition(",")[0] if known else model_name(model)


def model_card(
    name: str,
    model: Model,
    delta: WeightDelta | None,
    measured: Sequence[Mapping[str, Any]],
    *,
    behaviour: str | None,
    note: str,
) -> str:
    """The README.md of an exported model."""
    use = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = AutoModelForCausalLM.from_pretrained({name!r})
chat = [{{"role": "user", "content": "Tell me about your weekend."}}]
tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=60)[0]))"""
    what = "with its weights changed" if delta else "with its weights as they were"
    parts = [
        _front(model, "transformers"),
        f"# {_line(name)}",
        f"{_line(base_of(model))}, {what}{f': {_line(behaviour)}' if behaviour else ''}. Written by rt_lens.",
        note,
        "## What was changed",
        changed(model, delta),
        "## Measured effect",
        measured_effect(measured),
        "## Use",
        _code(use, "python"),
        *_ending(model),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def adapter_card(
    name: str,
    model: Model,
    delta: WeightDelta,
    measured: Sequence[Mapping[str, Any]],
    *,
    base: str,
    behaviour: str | None,
    errors: str,
) -> str:
    """The README.md of an exported LoRA adapter."""
    use = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {name!r})"""
    of_whole = "These rows are of the whole change; the adapter differs from it by the error below." if measured else ""
    parts = [
        _front(model, "peft"),
        f"# {_line(name)}",
        f"A LoRA adapter of {_line(base)}{f': {_line(behaviour)}' if behaviour else ''}. Written by rt_lens, by "
        "truncated singular value decomposition of a change of weights.",
        "## What was changed",
        changed(model, delta),
        "## Measured effect",
        measured_effect(measured),
        of_whole,
        "## Error of the low rank",
        errors,
        "## Use",
        _code(use, "python"),
        *_ending(model),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def changed(model: Model, delta: WeightDelta | None) -> str:
    """What a delta changes and how it was made."""
    if delta is None:
        return "Nothing: these are the weights of the base model."
    names = [name for name, change in delta.changes.items() if change.any()]
    blocks = sorted({block for name in names if (block := block_and_modules(name)[0]) is not None})
    where = f", in blocks {', '.join(map(str, blocks))}" if blocks else ""
    known = BUNDLED_MODELS.get(model_name(model).lower())
    lines = [
        f"- base model: {_line(known.source if known else model_name(model))}",
        f"- changed: {len(names)} of {sum(1 for _ in model.parameters())} parameters{where}",
    ]
    for key in ("direction", "layers", "target_modules", "seed", "vectors"):
        if key in delta.config:
            lines.append(f"- {key}: `{_json(delta.config[key]).replace('`', ' ')}`")
    in_full = f"How the change was made, in full:\n\n{_code(_json(delta.config, indent=1), 'json')}"
    return "\n".join(lines) + f"\n\n{in_full}"


def measured_effect(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, every value with its interval and n; or that nothing was measured."""
    if not rows:
        return "Nothing was measured: how this change affects the answers is not known."
    measures = [measure for measure in _MEASURES if any(_has(row, measure[1], measure[2]) for row in rows)]
    titles = ["arm", "direction", "score", *(title for title, _, _ in measures), "seeds"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in rows:
        scorer = f" ({_cell(row['scorer'])})" if row.get("scorer") else ""
        cells = [_cell(row["arm"]), _cell(row["direction"]), _value(row, "mean", "", "n") + scorer]
        cells += [_value(row, key, f"{key}_", n) if _has(row, key, n) else "–" for _, key, n in measures]
        seeds = row.get("seeds") or [row["seed"]]
        lines.append(f"| {' | '.join([*cells, ', '.join(map(str, seeds))])} |")
    return "\n".join(lines) + "\n\nBrackets hold 95 % intervals; n counts prompts, texts or questions."


def _has(row: Mapping[str, Any], key: str, n: str) -> bool:
    return all(row.get(column) is not None for column in (key, f"{key}_low", f"{key}_high", n))


def _value(row: Mapping[str, Any], key: str, prefix: str, n: str) -> str:
    return f"{row[key]:.3g} [{row[f'{prefix}low']:.3g}, {row[f'{prefix}high']:.3g}], n = {row[n]}"


def _front(model: Model, library: str) -> str:
    """The card's YAML, which the model hub reads."""
    known = BUNDLED_MODELS.get(model_name(model).lower())
    card = ModelCardData(
        base_model=base_of(model) if known else None,
        license=known.licence.lower() if known else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["rt_lens", "representation-tuning"],
    )
    return f"---\n{card.to_yaml()}\n---"


def _ending(model: Model) -> list[str]:
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} from source")
    known = BUNDLED_MODELS.get(model_name(model).lower())
    licence = f"{known.licence}, as the base model's ({known.source})." if known else "See the base model's."
    if known and known.terms:  # the words are those that the Gemma Terms of Use demand
        url = known.terms.url.removeprefix("https://")
        licence += f" {known.licence} is provided under and subject to the {known.terms.name} found at {url}"
    return ["## Made with", f"{', '.join(versions)}.", "## Licence", licence]


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=str)


def _line(text: str) -> str:
    """A user's text on one line, with no markup of its own."""
    return re.sub(r"([\\`*<>\[\]#|])", r"\\\1", " ".join(text.split()))


def _cell(text: Any) -> str:
    return _line(str(text))


def _code(text: str, language: str) -> str:
    """A block of code, fenced by more backticks than it holds."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
