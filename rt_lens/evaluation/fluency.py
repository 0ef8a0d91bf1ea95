"""How a text is written, whatever it says: its length, its variety, and whether it ends in a loop.

White space separates words. In scripts that are written without it (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each
letter counts as a word. Case does not matter. Nothing here knows a model.
"""

from __future__ import annotations

import re

_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_NO_SPACES}][^\w\s]*|[^\s{_NO_SPACES}]+")
_EDGES = re.compile(r"^\W+|\W+$")


def length(answer: str) -> float:
    """Number of words of a response.

    Example:
        >>> length("Bread rises.")
        2.0
    """
    return float(len(_words(answer)))


def distinct(answer: str, n: int = 2) -> float:
    """Distinct-n: the number of different n-grams of words, as a fraction of all n-grams (after Li et al. 2016).

    Li et al. divide by the number of words. Dividing by the number of n-grams, as most authors do since, makes 1 the
    maximum for every n.

    Args:
        answer: the text.
        n: words in an n-gram.

    Returns:
        Near 0 for a loop; 1 if no n-gram occurs twice, as in a text of fewer than n words.

    Raises:
        ValueError: if n is below 1.

    Example:
        >>> distinct("the cat saw the cat")  # the cat, cat saw, saw the, the cat
        0.75
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    words = _words(answer)
    n_grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(n_grams)) / len(n_grams) if n_grams else 1.0


def repetition(answer: str) -> float:
    """Fraction of a response's word pairs that repeat an earlier one: 0 for none, near 1 for a loop.

    Example:
        >>> repetition("the cat saw the cat")
        0.25
    """
    return 1 - distinct(answer, 2)


def loops(answer: str) -> float:
    """1 for a text that ends in a loop, else 0.

    A loop is one word or several that occur at least three times in a row at the end of the text. A further repeat that
    the end cuts short does not hide the loop, nor does punctuation around words. Intention does not matter: "no, no,
    no" counts.

    Example:
        >>> loops("It was late. I am sad. I am sad. I am sad. I a")
        1.0
    """
    words = [_EDGES.sub("", word) or word for word in _words(answer)]
    cut_short = any(words[-1 - period].startswith(words[-1]) for period in _periods(words[:-1]))
    return float(cut_short or bool(_periods(words)))


def _periods(words: list[str]) -> list[int]:
    """Numbers of words that repeat three times in a row at the end."""
    return [
        period
        for period in range(1, len(words) // 3 + 1)
        if words[-period:] == words[-2 * period : -period] == words[-3 * period : -2 * period]
    ]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
