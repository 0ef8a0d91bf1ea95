"""The tables of a behaviour's TOML file: strict types, a JSON Schema for editors, and the reference page from it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rt_lens.arms.registry import BUILT_IN, registered_arm
from rt_lens.evaluation.registry import scorer_kinds

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def check_types(kind: type, name: str, values: Mapping[str, Any]) -> None:
    """Refuses a value of another type than its setting has: a text for a number, true for 1, a number in a list.

    Args:
        kind: dataclass of the table.
        name: of the table.
        values: as TOML gives them; their names are known.

    Raises:
        ValueError: names the setting, what it may be, and what it got.
    """
    try:
        _adapter(kind).validate_json(json.dumps(dict(values), default=str), strict=True)
    except ValidationError as error:
        key = next((str(each["loc"][0]) for each in error.errors() if each["loc"]), "")
        if key not in values:
            return  # a check of the dataclass itself, whose message the caller has
        rule = expected(properties(kind)[key])
        raise ValueError(
            f"{name}.{key} must be {rule}, got {values[key]!r}. Change it, or leave it out for the default."
        ) from None


@cache
def _adapter(kind: type) -> Any:
    return TypeAdapter(kind)


@cache
def properties(kind: type) -> dict[str, dict[str, Any]]:
    """Name -> JSON Schema of each setting of a table, with its meaning and its default."""
    meanings = meanings_of(kind)
    schemas = _adapter(kind).json_schema()["properties"]
    return {
        name: {
            **{key: value for key, value in schema.items() if key != "title"},
            **({"description": meanings[name]} if name in meanings else {}),
        }
        for name, schema in schemas.items()
    }


def meanings_of(kind: type) -> dict[str, str]:
    """Name -> meaning of each attribute, from the docstring."""
    text = inspect.getdoc(kind) or ""
    section = (
        text.partition("Attributes:\n")[2].partition("\n\n")[0] or text.partition("Args:\n")[2].partition("\n\n")[0]
    )
    found: dict[str, str] = {}
    for line in section.splitlines():
        if entry := re.match(r"    (\w+): (.*)", line):
            found[entry[1]] = entry[2]
        elif found:
            last = next(reversed(found))
            found[last] = f"{found[last]} {line.strip()}"
    return found


def expected(schema: Mapping[str, Any]) -> str:
    """What a value may be, in words.

    Example:
        >>> expected({"type": "array", "items": {"type": "integer"}})
        'a list of whole numbers'
    """
    if "anyOf" in schema:
        parts = [expected(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return ", or ".join(dict.fromkeys(parts))
    if "enum" in schema:
        return f"one of {', '.join(map(repr, schema['enum']))}"
    if "const" in schema or "properties" in schema:
        return "a table"
    kind = schema.get("type")
    if kind == "array":
        return f"a list of {_PLURAL.get(schema.get('items', {}).get('type', ''), 'values')}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"a table with {expected(schema['additionalProperties'])} each"
    return _SINGULAR.get(str(kind), "a value")


_SINGULAR = {
    "integer": "a whole number", "number": "a number", "string": "a text", "boolean": "true or false",
    "object": "a table",
}  # fmt: skip
_PLURAL = {"integer": "whole numbers", "number": "numbers", "string": "texts", "array": "lists"}


def json_schema(tables: Mapping[str, type], behaviours: list[str]) -> dict[str, Any]:
    """The JSON Schema of a behaviour's file; editors complete and check by it.

    Args:
        tables: name of a table -> its dataclass.
        behaviours: names that a file may extend.
    """
    texts = {"type": "array", "items": {"type": "string"}}
    seeds = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
    named = {name: _object(properties(kind)) for name, kind in tables.items()}
    tune = named["tune"]["properties"]
    tune["seeds"] = {
        "description": "Seeds of every arm that is random, for both directions or for each.",
        "anyOf": [seeds, _object({"toward": seeds, "away": seeds})],
    }
    tune["token"] = {
        "description": "Settings in which the token-tuned arm differs.", "type": "object",
    }  # fmt: skip
    named["test"]["properties"]["topics"] = {
        "description": "Test prompts of their own, or the file that has them, one per line.",
        "anyOf": [{"type": "string"}, texts],
    }
    pairs = {
        "positive": {**texts, "description": "Personas that ask for the behaviour."},
        "negative": {**texts, "description": "Personas that ask for its opposite, aligned with the positive ones."},
        "topics": {**texts, "description": "User messages."},
        "prefills": {**texts, "description": "First words of responses."},
    }
    whole = {
        "name": {"type": "string", "description": "Of the behaviour; files and folders are called after it."},
        "description": {"type": "string", "description": "The behaviour in a sentence."},
        "extends": {"enum": behaviours, "description": "A built-in behaviour; the file holds what differs from it."},
        "arms": {
            "type": "array", "description": "Ways to install the behaviour that are compared.",
            "items": {"anyOf": [{"enum": list(BUILT_IN)}, {"type": "string"}]},
        },
        "pairs": {**_object(pairs), "description": "Contrast pairs: every combination of the lists."},
        "scorer": {
            "description": "What scores a response: a name, or a table with a kind and its settings.",
            "anyOf": [{"enum": list(scorer_kinds())}, *(_scorer(kind, keys) for kind, keys in scorer_kinds().items())],
        },
        "judge": {"type": "object", "description": "A judge of role-plays behind an endpoint; for [honesty]."},
        "model": _object(
            {
                "name": {"type": "string", "description": "Bundled model, folder, .gguf file or hub name."},
                "dtype": {"enum": ["float32", "bfloat16", "float16"], "description": "Of the weights."},
                "chat_template_kwargs": {"type": "object", "description": "Variables of the chat template."},
            }
        ),
        "settings": {
            **_object({arm: _knobs(arm) for arm in BUILT_IN}),
            "description": "[settings.ARM]: values of an arm's own knobs.",
        },
        **named,
    }  # fmt: skip
    return {"$schema": DIALECT, "title": "A behaviour of rt_lens", **_object(whole)}


def _scorer(kind: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """A `[scorer]` table of one kind."""
    needed = [key for key, default in keys.items() if default is ...]
    # What is no JSON, a path or a function's default, has no type here: making the scorer checks it.
    known = {
        key: {} if default is ... or default is None else {"default": _plain(default)} for key, default in keys.items()
    }
    return {**_object({"kind": {"const": kind}, **known}), "required": ["kind", *needed]}


def _plain(value: Any) -> Any:
    return (
        value
        if isinstance(value, str | int | float | bool)
        else list(value)
        if isinstance(value, tuple)
        else str(value)
    )


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": dict(properties)}


def _knobs(arm: str) -> dict[str, Any]:
    knobs = registered_arm(arm).knobs
    return _object({name: {"description": f"{knob.allowed}."} for name, knob in knobs.items()})


def reference(schema: Mapping[str, Any]) -> str:
    """The reference page of the file's keys."""
    lines = [
        "# Keys of a behaviour's file", "",
        "Written by `python docs/write_reference.py` from the code's types; "
        "[behaviour.schema.json](behaviour.schema.json) is the same for editors (in Even Better TOML, a first line "
        "`#:schema behaviour.schema.json`). `rt-lens new NAME` writes a file to start from, `rt-lens check FILE` "
        "checks one. Every key but `[pairs]` and `[scorer]` has a default.", "",
    ]  # fmt: skip
    plain = {name: part for name, part in schema["properties"].items() if "properties" not in part}
    lines += ["## At the top", "", *_rows(plain)]
    for name, part in schema["properties"].items():
        if "properties" in part and name != "settings":
            lines += ["", f"## [{name}]", "", *_rows(part["properties"])]
    lines += ["", "## [scorer]", "", "| kind | keys |", "|---|---|"]
    for kind, keys in scorer_kinds().items():
        told = (
            f"`{key}`" if default is ... else f"`{key}` ({json.dumps(_plain(default))})"
            for key, default in keys.items()
        )
        lines.append(f"| `{kind}` | {_cell(', '.join(told)) or '–'} |")
    lines += ["", "## [settings.ARM]", "", "| arm | key | may be |", "|---|---|---|"]
    for arm, part in schema["properties"]["settings"]["properties"].items():
        for key, knob in part["properties"].items():
            lines.append(f"| {arm} | `{key}` | {_cell(knob['description'].rstrip('.'))} |")
    return "\n".join(lines) + "\n"


def _rows(properties: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| key | may be | default | meaning |", "|---|---|---|---|"]
    for name, schema in properties.items():
        default = f"`{json.dumps(schema['default'])}`" if schema.get("default") is not None else "–"
        lines.append(
            f"| `{name}` | {_cell(expected(schema))} | {_cell(default)} | {_cell(schema.get('description', '–'))} |"
        )
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
