"""How a text is written, whatever it says: its length, its variety, and whether it goes round in circles.

Words are parted by white space; letters of scripts that are written without it (Chinese, Japanese, Thai, Lao, Burmese,
Khmer) count as a word each. Case does not matter.
"""

from __future__ import annotations

import re

_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_NO_SPACES}][^\w\s]*|[^\s{_NO_SPACES}]+")
_EDGES = re.compile(r"^\W+|\W+$")


def length(answer: str) -> float:
    """Words of an answer.

    Example:
        >>> length("Bread rises.")
        2.0
    """
    return float(len(_words(answer)))


def distinct(answer: str, n: int = 2) -> float:
    """Distinct-n: distinct runs of n words, as a share of all such runs (after Li et al. 2016).

    They divide by the number of words; dividing by that of runs, as most do since, makes 1 the most for every n.

    Args:
        answer: the text.
        n: words in a run.

    Returns:
        Near 0 for a loop, 1 where no run comes twice, as in a text of fewer than n words.

    Raises:
        ValueError: n below 1.

    Example:
        >>> distinct("the cat saw the cat")  # the cat, cat saw, saw the, the cat
        0.75
    """
    if n < 1:
        raise ValueError(f"n: {n} came; at least 1 word is wanted.")
    words = _words(answer)
    runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def repetition(answer: str) -> float:
    """Share of an answer's word pairs that it said before: 0 for none, near 1 for a loop.

    Example:
        >>> repetition("the cat saw the cat")
        0.25
    """
    return 1 - distinct(answer, 2)


def loops(answer: str) -> float:
    """1 for a text that ends in a loop, else 0.

    A loop is a run of one word or more that stands three times or more at the text's end with nothing in between. A
    fourth run, or a word, that was cut short by the end does not hide it, nor does punctuation around words. Nobody
    is asked whether it was meant: "no, no, no" counts.

    Example:
        >>> loops("It was late. I am sad. I am sad. I am sad. I a")
        1.0
    """
    words = [_EDGES.sub("", word) or word for word in _words(answer)]
    cut_short = any(words[-1 - run].startswith(words[-1]) for run in _circles(words[:-1]))
    return float(cut_short or bool(_circles(words)))


def _circles(words: list[str]) -> list[int]:
    """Lengths of the runs that stand three times at the end of these words."""
    return [
        run
        for run in range(1, len(words) // 3 + 1)
        if words[-run:] == words[-2 * run : -run] == words[-3 * run : -2 * run]
    ]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
