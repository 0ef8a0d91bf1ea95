from .binding import ablate as ablate
from .binding import add as add
from .binding import add_preserving_norm as add_preserving_norm
from .binding import clamp as clamp
from .binding import erase as erase
from .binding import scale as scale
from .binding import steered as steered  # TODO-RENAME
from .condition_fit import FittedCondition as FittedCondition
from .condition_fit import fit_condition as fit_condition
from .conditions import Condition as Condition
from .conditions import conditional as conditional
from .edits import Edit as Edit
from .edits import FwdHook as FwdHook
from .edits import Linear as Linear
from .edits import Multiplier as Multiplier
from .edits import Positions as Positions
from .edits import Schedule as Schedule
