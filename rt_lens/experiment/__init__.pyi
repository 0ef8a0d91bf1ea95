from .config import Experiment as Experiment
from .config import load_experiment as load_experiment
from .plan import Plan as Plan
from .plan import plan_of as plan_of
from .protocols import Protocol as Protocol
from .run import run_experiment as run_experiment
