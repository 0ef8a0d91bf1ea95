"""Representation tuning: a steering vector trained into the weights. How well it works is measured elsewhere."""

from rt_lens.tuning.aims import Aim, KLThenSteer
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.loop import LossNotFinite, tune
from rt_lens.tuning.material import Material, prepare
from rt_lens.tuning.targets import Choice, Target, write_neutral, write_targets

__all__ = [
    "Aim",
    "Choice",
    "KLThenSteer",
    "LossNotFinite",
    "Material",
    "Target",
    "TuneConfig",
    "prepare",
    "tune",
    "write_neutral",
    "write_targets",
]
