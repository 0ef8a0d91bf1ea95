"""The name of a row of a comparison: an arm, its direction, and the tuning seed."""

from __future__ import annotations

import re
from typing import NamedTuple

DIRECTIONS = ("toward", "away", "suppress")
"""Which way an arm goes along a behaviour's direction; an arm without one, as the untuned model, has `none`."""

# `rep_tuned_away` names a file, `rep_tuned, away` a row of a table, `rep_tuned away` a text's projections in a run.
_NAME = re.compile(rf"(?P<arm>.+?)(?:_|, | )(?P<direction>{'|'.join((*DIRECTIONS, 'out'))})(?: seed (?P<seed>\d+))?")


class ArmLabel(NamedTuple):
    """An arm, its direction and its tuning seed.

    Attributes:
        arm: its name, `rep_tuned` say.
        direction: `toward`, `away`, `suppress`, or `none`.
        seed: seed of the tuning run.

    Example:
        >>> str(ArmLabel("rep_tuned", "away"))
        'rep_tuned, away'
        >>> ArmLabel.parse("rep_tuned_away")
        ArmLabel(arm='rep_tuned', direction='away', seed=0)
        >>> ArmLabel.parse("rep_tuned, away") == ArmLabel.parse("rep_tuned away") == ArmLabel("rep_tuned", "away")
        True
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
    def parse(cls, name: str) -> ArmLabel:
        """The label of a name: a file's stem, a row's `arm, direction`, or `arm direction`.

        A name without a direction is an arm by itself. `out`, the older word for `suppress`, is read too.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            return cls(name)
        direction = "suppress" if match["direction"] == "out" else match["direction"]
        return cls(match["arm"], direction, int(match["seed"] or 0))
