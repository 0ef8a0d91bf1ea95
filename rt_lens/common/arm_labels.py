"""The name of a row of a comparison: an arm, its direction, and the tuning seed."""

from __future__ import annotations

import re
from typing import NamedTuple

DIRECTIONS = ("toward", "away", "suppress")
"""The directions of an arm along a behaviour; an arm without one, such as the untuned model, has `none`."""

_OLD_NAMES = {"out": "suppress"}
_STEM = re.compile(rf"(?P<arm>.+)_(?P<direction>{'|'.join((*DIRECTIONS, *_OLD_NAMES))})(?: seed (?P<seed>\d+))?")


class ArmLabel(NamedTuple):
    """An arm, its direction and its tuning seed.

    Attributes:
        arm: its name, for example `rep_tuned`.
        direction: `toward`, `away`, `suppress`, or `none`.
        seed: of the tuning run.

    Example:
        >>> str(ArmLabel("rep_tuned", "away"))
        'rep_tuned, away'
        >>> ArmLabel.parse("rep_tuned_away")
        ArmLabel(arm='rep_tuned', direction='away', seed=0)
        >>> ArmLabel("rep_tuned", "away").stem
        'rep_tuned_away'
    """

    arm: str
    direction: str = "none"
    seed: int = 0

    def __str__(self) -> str:
        return self.arm if self.direction == "none" else f"{self.arm}, {self.direction}"

    @property
    def stem(self) -> str:
        """The name of its file, without the ending."""
        return self.arm if self.direction == "none" else f"{self.arm}_{self.direction}"

    @classmethod
    def parse(cls, stem: str) -> ArmLabel:
        """The label of a file's name; a name without a direction is an arm's name alone.

        `out`, the earlier name of `suppress`, is read too.
        """
        match = _STEM.fullmatch(stem)
        if match is None:
            return cls(stem)
        direction = _OLD_NAMES.get(match["direction"], match["direction"])
        return cls(match["arm"], direction, int(match["seed"] or 0))
