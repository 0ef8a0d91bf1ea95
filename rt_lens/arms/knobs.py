"""What can be set about an arm, and the values that a search tries. A knob is a setting of the arm by the same name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable


@dataclass(frozen=True)
class Room:
    """What the values of knobs depend on.

    Attributes:
        n_layers: blocks of the model.
        n_personas: pairs of personas in the training part.
    """

    n_layers: int
    n_personas: int


@runtime_checkable
class Suggest(Protocol):
    """Draws values for a search; an Optuna trial's `suggest_…` have this form."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...


@dataclass(frozen=True)
class Among:
    """One of some values; a tuple is written as a list in a TOML file.

    Example:
        >>> Among((1, 3, 5)).allows(2), Among((1, 3, 5)).allows("many")
        (True, False)
    """

    values: tuple[Any, ...]

    @property
    def allowed(self) -> str:
        """What a value is, in words."""
        return f"of the kind of {', '.join(map(repr, self.values))}"

    def draw(self, trial: Suggest, name: str, room: Room) -> Any:
        """One of the values."""
        number = trial.suggest_categorical(name, tuple(range(len(self.values))))
        return self.values[number]

    def allows(self, value: Any) -> bool:
        """Whether it is of the values' kind. A search tries only these; a file may name others."""
        kinds = {_kind(other) for other in self.values}
        return _kind(value) in kinds

    def fits(self, value: Any, room: Room) -> bool:
        """Whether a model or behaviour has room for it."""
        return True


@dataclass(frozen=True)
class Between:
    """A number between two, evenly or (`log`) evenly in its logarithm.

    Example:
        >>> Between(1e-5, 1e-3, log=True).allows(0.5), Between(1e-5, 1e-3).allows(float("nan"))
        (True, False)
    """

    low: float
    high: float
    log: bool = False

    @property
    def allowed(self) -> str:
        """What a value is, in words."""
        return "a number"

    def draw(self, trial: Suggest, name: str, room: Room) -> float:
        """A number with three significant digits, as one would write it in a file."""
        return float(f"{trial.suggest_float(name, self.low, self.high, log=self.log):.3g}")

    def allows(self, value: Any) -> bool:
        """Whether it is a finite number."""
        return type(value) in (int, float) and math.isfinite(value)

    def fits(self, value: Any, room: Room) -> bool:
        """Any number does."""
        return True


@dataclass(frozen=True)
class Blocks:
    """A block at a depth between two shares of the model's, or `width` consecutive ones from there on.

    Example:
        >>> Blocks(0.5, 0.9, width=2).allows([4, 5]), Blocks(0.5, 0.9).allows([4, 5])
        (True, False)
        >>> Blocks(0.5, 0.9).fits(30, Room(n_layers=30, n_personas=8))
        False
    """

    low: float
    high: float
    width: int | None = None

    @property
    def allowed(self) -> str:
        """What a value is, in words."""
        return "the number of a block" if self.width is None else "a list of block numbers"

    def draw(self, trial: Suggest, name: str, room: Room) -> Any:
        """Number of the block, or a tuple of numbers."""
        width = min(self.width or 1, room.n_layers)
        last = room.n_layers - width
        low, high = (min(last, round(share * (room.n_layers - 1))) for share in (self.low, self.high))
        first = trial.suggest_int(name, low, high)
        return first if self.width is None else tuple(range(first, first + width))

    def allows(self, value: Any) -> bool:
        """Whether it is a block, or blocks."""
        if self.width is None:
            return type(value) is int and value >= 0
        return isinstance(value, list | tuple) and bool(value) and all(type(block) is int for block in value)

    def fits(self, value: Any, room: Room) -> bool:
        """Whether the model has these blocks."""
        return all(0 <= block < room.n_layers for block in ([value] if self.width is None else value))


@dataclass(frozen=True)
class Personas:
    """The number of a pair of personas of the training part, in the file's order.

    Example:
        >>> Personas().allows(3), Personas().fits(3, Room(n_layers=30, n_personas=2))
        (True, False)
    """

    @property
    def allowed(self) -> str:
        """What a value is, in words."""
        return "the number of a persona, from 0 on"

    def draw(self, trial: Suggest, name: str, room: Room) -> int:
        """A number; the first where there is none."""
        return trial.suggest_int(name, 0, max(0, room.n_personas - 1))

    def allows(self, value: Any) -> bool:
        """Whether it is a whole number from 0 on."""
        return type(value) is int and value >= 0

    def fits(self, value: Any, room: Room) -> bool:
        """Whether there is such a pair."""
        return value < room.n_personas


Knob: TypeAlias = Among | Between | Blocks | Personas


def _kind(value: Any) -> str:
    """`number` for whole and other numbers alike, `list` for lists and tuples."""
    if type(value) in (int, float):
        return "number"
    return "list" if isinstance(value, list | tuple) else type(value).__name__
