"""How a token is chosen, and what ends a response. Runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rt_lens.models.protocol import HasTokenizer
from rt_lens.models.tokens.texts import Pieces


@dataclass(frozen=True)
class Sampling:
    """The sampling of a token from logits.

    Attributes:
        temperature: softmax temperature; 0 takes the most likely token.
        top_k: sample from the `top_k` most likely tokens; 0 for all.
        top_p: sample from the fewest tokens whose probabilities reach this sum.
        seed: seed for the random streams, one per prompt.
        repetition_penalty: logits of tokens that the text has already are divided by it, or multiplied where they are
            negative (Keskar et al. 2019); 1 leaves them.
        min_new_tokens: end tokens are not chosen before as many.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:  # `not >=` catches NaN too
            raise ValueError(
                "temperature and top_k must be at least 0 and top_p above 0 and at most 1, got "
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}. "
                "temperature=0 takes the most likely token."
            )
        if not self.repetition_penalty > 0 or self.min_new_tokens < 0:
            raise ValueError(
                "repetition_penalty must be above 0 and min_new_tokens at least 0, got repetition_penalty="
                f"{self.repetition_penalty}, min_new_tokens={self.min_new_tokens}. 1 and 0 change nothing."
            )

    def choose(self, logits: Float[Tensor, "batch d_vocab"], draw: Float[Tensor, "batch"]) -> Int[Tensor, "batch"]:
        """The token at which the cumulative probability passes the uniform number `draw`."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = torch.softmax(logits.double() / self.temperature, -1)
        if self.top_k or self.top_p < 1:
            ranked, tokens = probabilities.sort(descending=True, stable=True)
            # A token stays if the tokens before it have not reached top_p, so the first one always stays.
            dropped = ranked.cumsum(-1) - ranked >= self.top_p
            if self.top_k:
                dropped[:, self.top_k :] = True
            probabilities = probabilities.scatter(1, tokens, ranked.masked_fill(dropped, 0.0))
        cumulative = probabilities.cumsum(-1)
        return torch.searchsorted(cumulative, draw.to(cumulative)[:, None] * cumulative[:, -1:], right=True).squeeze(1)


def penalised(
    logits: Float[Tensor, "batch d_vocab"], seen: Bool[Tensor, "batch d_vocab"], penalty: float
) -> Float[Tensor, "batch d_vocab"]:
    """Logits under a repetition penalty: those of tokens seen before are divided by it, or multiplied if negative."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def copies(n: int, sampling: Sampling) -> int:
    """How many responses each prompt gets.

    Raises:
        ValueError: for none, or for several that would all be the same.
    """
    if n < 1 or (n > 1 and sampling.temperature == 0):
        raise ValueError(
            f"num_return_sequences must be at least 1, and 1 without a temperature, got {n} with temperature="
            f"{sampling.temperature}. Set temperature=0.7 to get responses that differ."
        )
    return n


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Strings that end a response.

    Raises:
        ValueError: if one is empty or no string.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(end, str) and end for end in stops):
        raise ValueError(f"stop must be strings, none of them empty, got {list(stops)!r}. Leave empty ones out.")
    return stops


def before(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of some strings."""
    return text[: min((at for at in (text.find(end) for end in stop) if at >= 0), default=len(text))]


class StopAt:
    """A text up to the first of some strings; what may be the beginning of one waits for what follows.

    Attributes:
        rest: the text that waits.
        hit: whether one of the strings has come.

    Example:
        >>> until = StopAt(["END"])
        >>> [until(piece) for piece in ("one ", "E", "and EN", "D two")], until.hit
        (['one ', '', 'Eand ', ''], True)
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self.rest, self.hit = tuple(stop), "", False

    def __call__(self, piece: str) -> str:
        if self.hit:
            return ""
        text = self.rest + piece
        found = [at for at in (text.find(end) for end in self._stop) if at >= 0]
        if found:
            self.hit, self.rest = True, ""
            return text[: min(found)]
        most = max((len(end) for end in self._stop), default=1) - 1
        waits = next((n for n in range(min(most, len(text)), 0, -1) if self._begins(text[-n:])), 0)
        self.rest = text[len(text) - waits :]
        return text[: len(text) - waits]

    def _begins(self, ending: str) -> bool:
        return any(end.startswith(ending) for end in self._stop)


class Watched:
    """The texts of rows as they grow, for strings that end them; without such strings it watches nothing."""

    def __init__(self, model: HasTokenizer, n: int, stop: Sequence[str]) -> None:
        self.rows = [(Pieces(model), StopAt(stop)) for _ in range(n if stop else 0)]

    def stopped(self, running: Int[Tensor, "running"], column: Int[Tensor, "running"]) -> Bool[Tensor, "running"]:
        """Whether each of these rows has ended, with its next token."""
        hit = [self.after(row, token) for row, token in zip(running.tolist(), column.tolist(), strict=True)]
        return torch.tensor(hit, dtype=torch.bool, device="cpu")

    def after(self, row: int, token: int) -> bool:
        """Whether a row has ended, with its next token."""
        if not self.rows:
            return False
        pieces, until = self.rows[row]
        until(pieces(token))
        return until.hit
