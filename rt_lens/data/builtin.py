"""The built-in data: behaviours, prompts, plain text, facts. This module finds files and knows no models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rt_lens.data.readers import read_lines, read_toml

# An installed wheel carries the data inside the package; a checkout has it beside the package.
_FOLDERS = (Path(__file__).parent / "files", Path(__file__).parents[2] / "data")


def data_path(relative: str) -> Path:
    """Path of a built-in file.

    Raises:
        FileNotFoundError: if this installation does not have the file.

    Example:
        >>> data_path("neutral/text.txt").name
        'text.txt'
    """
    for folder in _FOLDERS:
        if (folder / relative).exists():
            return folder / relative
    raise FileNotFoundError(
        f"data must be a file of this installation ({_FOLDERS[0]}), got {relative}, which is not there. Reinstall "
        "rt_lens."
    )


def behaviours() -> list[str]:
    """Names of the built-in behaviours, in alphabetical order.

    Example:
        >>> behaviours()
        ['formality', 'honesty', 'honesty_paper', 'language', 'mood', 'refusal']
    """
    return sorted(path.stem for path in data_path("behaviours").glob("*.toml"))


def behaviour_file(name_or_path: str | Path) -> Path:
    """The TOML file of a built-in behaviour's name, or the path itself if it is a file.

    Raises:
        ValueError: if it is neither; the message suggests the nearest name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = behaviours()
    if str(name_or_path) in known:
        return data_path(f"behaviours/{name_or_path}.toml")
    near = get_close_matches(str(name_or_path), known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Built in: {', '.join(known)}."
    raise ValueError(f"behaviour must be the name of a built-in behaviour or a file, got {str(name_or_path)!r}. {hint}")


def behaviour_content(path: Path) -> dict[str, Any]:
    """A behaviour's file as a dictionary. One that `extends` a built-in behaviour holds what differs from it.

    Args:
        path: a TOML file. Tables are merged key by key; any other value replaces that of the built-in behaviour.
            A file with pairs, a model or tuning settings of its own is without the `[settings]` that a search has found
            for those of the built-in behaviour.

    Raises:
        ValueError: for a file that is not TOML, or that extends something else.

    Example:
        >>> content = behaviour_content(data_path("full/mood.toml"))
        >>> content["name"], content["scorer"], len(content["tune"]["seeds"])
        ('mood_full', {'kind': 'vader'}, 5)
    """
    content = read_toml(path)
    extended = content.pop("extends", None)
    if extended is None:
        return content
    if extended not in behaviours():
        raise ValueError(
            f"extends must be a built-in behaviour ({', '.join(behaviours())}), got {extended!r} in {path.name}. Name "
            "one, or copy its tables into this file."
        )
    base, tune = read_toml(behaviour_file(extended)), content.get("tune", {})
    if not content.keys().isdisjoint({"pairs", "model"}) or not isinstance(tune, Mapping) or tune.keys() - {"seeds"}:
        base.pop("settings", None)
    return _merged(base, content)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], value) if isinstance(value, Mapping) and isinstance(base.get(key), Mapping) else value
        for key, value in changes.items()
    }
    return {**base, **both}


def new_behaviour(name: str) -> str:
    """The content of a behaviour's file to start from: a small example that runs, with comments on what to change.

    Args:
        name: the behaviour's name in the file.

    Example:
        >>> new_behaviour("my_behaviour").splitlines()[3]
        'name = "my_behaviour"'
    """
    template = data_path("templates/behaviour.toml").read_text(encoding="utf-8")
    return template.replace("my_behaviour", name)


def neutral_paragraphs() -> list[str]:
    """The built-in expository text without mood, one string per paragraph (for perplexity and KL only).

    Example:
        >>> paragraphs = neutral_paragraphs()
        >>> len(paragraphs), paragraphs[0][:26]
        (24, 'A canal lock lets a boat p')
    """
    return _paragraphs("neutral/text.txt")


def calibration_paragraphs() -> list[str]:
    """48 more paragraphs of that kind, on other subjects (for setting strengths to a KL only).

    Example:
        >>> set(calibration_paragraphs()) & set(neutral_paragraphs())
        set()
    """
    return _paragraphs("neutral/calibration.txt")


def neutral_prompts() -> list[str]:
    """The 64 built-in neutral instructions (for the KL term of tuning only).

    Example:
        >>> len(neutral_prompts()), neutral_prompts()[0]
        (64, 'How many legs does a spider have?')
    """
    return _lines("neutral/prompts.txt")


def calibration_prompts() -> list[str]:
    """48 neutral instructions on other subjects (for setting strengths to a KL, and for reporting it, only).

    Example:
        >>> set(calibration_prompts()) & {*neutral_prompts(), *held_out_neutral_prompts()}
        set()
    """
    return _lines("neutral/calibration_prompts.txt")


def held_out_neutral_prompts() -> list[str]:
    """48 neutral questions on other subjects than `neutral_prompts` (for measuring only, never for choices).

    A KL term that preserves the model on `neutral_prompts` need not preserve it elsewhere; these questions show whether
    it does.

    Example:
        >>> set(held_out_neutral_prompts()) & set(neutral_prompts())
        set()
    """
    return _lines("neutral/held_out.txt")


def prompt_kinds() -> dict[str, list[str]]:
    """Prompts unlike the everyday talk of the mood topics: kind -> 40 prompts (for measuring only, never for choices).

    They show whether a behaviour tuned on everyday talk transfers to stories, instructions and opinions; arithmetic is
    the control, to which mood does not apply.

    Returns:
        `stories`, `instructions`, `opinions` and `arithmetic`, in this order.

    Example:
        >>> list(prompt_kinds())
        ['stories', 'instructions', 'opinions', 'arithmetic']
        >>> prompt_kinds()["arithmetic"][0]
        'What is 20 + 18?'
    """
    kinds = {kind: _lines(f"kinds/{kind}.txt") for kind in ("stories", "instructions", "opinions")}
    return {**kinds, "arithmetic": [json.loads(line)["question"] for line in _lines("kinds/arithmetic.jsonl")]}


QUESTIONS = {
    "capitals": "facts/capitals.jsonl",
    "arithmetic": "kinds/arithmetic.jsonl",
    "honesty": "honesty/questions.jsonl",
    "misconceptions": "honesty/misconceptions.jsonl",
    "instructions": "honesty/instructions.jsonl",
}
"""Built-in sets of questions: name -> file."""


def question_file(name_or_path: str | Path) -> Path:
    """The file of a built-in set of questions, or the path itself.

    Every answer of `arithmetic` has two or more digits and does not occur in its question, so repeating the question
    does not count as an answer.
    """
    known = QUESTIONS.get(str(name_or_path))
    return Path(name_or_path) if known is None else data_path(known)


def _paragraphs(relative: str) -> list[str]:
    text = data_path(relative).read_text(encoding="utf-8")
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]


def _lines(relative: str) -> list[str]:
    return [line for _, line in read_lines(data_path(relative), "data")]
