"""The four arms from one TOML file: untuned, steered, token-tuned, rep-tuned, in both directions."""

from rt_lens.experiment.config import Experiment, load_experiment
from rt_lens.experiment.plan import plan_of
from rt_lens.experiment.protocols import Protocol, parts, protocol_of
from rt_lens.experiment.run import check_writable, run_experiment

__all__ = [
    "Experiment",
    "Protocol",
    "check_writable",
    "load_experiment",
    "parts",
    "plan_of",
    "protocol_of",
    "run_experiment",
]
