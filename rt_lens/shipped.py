"""The data that rt_lens ships: behaviours, neutral text, facts. This room finds files and knows nothing of models."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path

# An installed wheel carries the data inside the package; a checkout has it beside the package.
_PLACES = (Path(__file__).parent / "data", Path(__file__).parent.parent / "data")


def data_path(relative: str) -> Path:
    """Path of a shipped file, for example `data_path("neutral/text.txt")`.

    Raises:
        FileNotFoundError: if this installation does not carry the file.
    """
    for place in _PLACES:
        if (place / relative).exists():
            return place / relative
    raise FileNotFoundError(f"data: {relative} is not in this installation ({_PLACES[0]}). Reinstall rt_lens.")


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
    hint = f"Did you mean {near[0]!r}?" if near else f"Shipped: {', '.join(known)}."
    raise ValueError(f"behaviour: {str(name_or_path)!r} is neither a shipped behaviour nor a file. {hint}")


def neutral_paragraphs() -> list[str]:
    """The shipped mood-neutral expository text, one string per paragraph (for perplexity and KL only)."""
    return [
        paragraph.strip() for paragraph in data_path("neutral/text.txt").read_text().split("\n\n") if paragraph.strip()
    ]


def neutral_prompts() -> list[str]:
    """The shipped neutral instructions (for the KL term of tuning only)."""
    return [line for line in data_path("neutral/prompts.txt").read_text().splitlines() if line.strip()]


def capital_facts() -> list[dict]:
    """Questions on capitals: `{"question", "answers", "wrong"}` (to check that plain facts survive)."""
    lines = data_path("facts/capitals.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.strip()]
