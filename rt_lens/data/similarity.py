"""Pairs of sentences with a graded similarity, for asking whether vectors of sentences keep meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rt_lens.data.builtin import data_path
from rt_lens.data.readers import ROW_ENDINGS, Row, read_rows, refuse_misspelt

_NAMES = {"sentence1": "first", "sentence2": "second", "score": "similarity", "label": "similarity"}
"""Names in files of STS-B -> ours."""
_FIELDS = ("first", "second", "similarity")


@dataclass(frozen=True)
class SentencePair:
    """Two sentences and how alike they are in meaning.

    Attributes:
        first: one sentence.
        second: the other.
        similarity: larger is more alike; in the built-in pairs from 0 (another subject) to 4 (the same said otherwise).

    Example:
        >>> SentencePair("It rained all day.", "Rain fell the whole day.", 4.0).similarity
        4.0
    """

    first: str
    second: str
    similarity: float


def load_sentence_pairs(path: str | Path | None = None) -> list[SentencePair]:
    """The built-in pairs (24 sentences, each with five others of similarity 0 to 4), or those of a file.

    Args:
        path: a .jsonl, .csv or .tsv file with the columns first, second and similarity, or, as in STS-B, sentence1,
            sentence2 and score (or label).

    Raises:
        ValueError: for a row without one of them, or a similarity that is no number.

    Example:
        >>> pairs = load_sentence_pairs()
        >>> len(pairs), sorted({pair.similarity for pair in pairs})
        (120, [0.0, 1.0, 2.0, 3.0, 4.0])
    """
    path = data_path("similarity/pairs.jsonl") if path is None else Path(path)
    if path.suffix.lower() not in ROW_ENDINGS:
        raise ValueError(f"path must end in {', '.join(ROW_ENDINGS)}, got {path.name}.")
    rows = read_rows(path, "sentence pairs", [*_FIELDS, *_NAMES])
    if not rows:
        raise ValueError(f"sentence pairs: {path.name} must have at least one row, got none.")
    return [_pair(row) for row in rows]


def _pair(row: Row) -> SentencePair:
    refuse_misspelt(row, "sentence pairs", [*_FIELDS, *_NAMES])
    cells = {_NAMES.get(name, name): value for name, value in row.cells.items()}
    if missing := [name for name in _FIELDS if name not in cells]:
        raise ValueError(
            f"sentence pairs: {row.where} must have {', '.join(missing)}, which is empty there. Fill it in."
        )
    try:
        similarity = float(cells["similarity"])
    except (TypeError, ValueError):
        similarity = math.nan
    if not math.isfinite(similarity):
        raise ValueError(f"sentence pairs: {row.where}: similarity must be a number, got {cells['similarity']!r}.")
    return SentencePair(str(cells["first"]), str(cells["second"]), similarity)
