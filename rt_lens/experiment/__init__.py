"""The four arms from one TOML file: untuned, steered, token-tuned, rep-tuned, in both directions."""

from rt_lens.experiment.config import Experiment, load_experiment
from rt_lens.experiment.run import check_writable, run_experiment

__all__ = ["Experiment", "check_writable", "load_experiment", "run_experiment"]
