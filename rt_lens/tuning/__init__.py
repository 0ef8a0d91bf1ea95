"""Representation tuning: a steering vector trained into the weights. How well it works is measured elsewhere."""

from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.loop import tune
from rt_lens.tuning.material import Material, Target, prepare, write_neutral, write_targets

__all__ = ["Material", "Target", "TuneConfig", "prepare", "tune", "write_neutral", "write_targets"]
