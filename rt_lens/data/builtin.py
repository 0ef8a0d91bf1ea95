"""The data that rt_lens ships: behaviours, prompts, plain text, facts. This room finds files and knows no models."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path

from rt_lens.data.readers import read_lines

# An installed wheel carries the data inside the package; a checkout has it beside the package.
_PLACES = (Path(__file__).parent / "files", Path(__file__).parents[2] / "data")


def data_path(relative: str) -> Path:
    """Path of a shipped file, for example `data_path("neutral/text.txt")`.

    Raises:
        FileNotFoundError: if this installation does not carry the file.
    """
    for place in _PLACES:
        if (place / relative).exists():
            return place / relative
    raise FileNotFoundError(
        f"data must be a file of this installation ({_PLACES[0]}), got {relative}, which is not there. Reinstall "
        "rt_lens."
    )


def behaviours() -> list[str]:
    """Names of the shipped behaviours, in alphabetical order."""
    return sorted(path.stem for path in data_path("behaviours").glob("*.toml"))


def behaviour_file(name_or_path: str | Path) -> Path:
    """The TOML file of a shipped behaviour's name, or the path itself when it is a file.

    Raises:
        ValueError: if it is neither; the message lists what is near.
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


def neutral_paragraphs() -> list[str]:
    """The shipped mood-neutral expository text, one string per paragraph (for perplexity and KL only)."""
    text = data_path("neutral/text.txt").read_text(encoding="utf-8")
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]


def neutral_prompts() -> list[str]:
    """The shipped neutral instructions (for the KL term of tuning only)."""
    return _lines("neutral/prompts.txt")


def held_out_neutral_prompts() -> list[str]:
    """48 neutral questions, on other subjects than `neutral_prompts` (for measuring only, never for choices).

    What a KL term holds still on `neutral_prompts` need not stay still elsewhere; here that can be seen.
    """
    return _lines("neutral/held_out.txt")


def prompt_kinds() -> dict[str, list[str]]:
    """Prompts unlike the everyday talk of the mood topics: kind -> 40 prompts (for measuring only, never for choices).

    A behaviour tuned in on everyday talk either goes over to stories, instructions and opinions or stays behind;
    arithmetic is the control, where mood has no place.

    Returns:
        `stories`, `instructions`, `opinions` and `arithmetic`, in this order.

    Example:
        >>> list(prompt_kinds())
        ['stories', 'instructions', 'opinions', 'arithmetic']
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
"""Shipped sets of questions: name -> file."""


def question_file(name_or_path: str | Path) -> Path:
    """The file of a shipped set of questions, or the path itself.

    Every answer of `arithmetic` has two or more digits and stands nowhere in its question, so that repeating the
    question is not taken for an answer.
    """
    known = QUESTIONS.get(str(name_or_path))
    return Path(name_or_path) if known is None else data_path(known)


def _lines(relative: str) -> list[str]:
    return [line for _, line in read_lines(data_path(relative), "data")]
