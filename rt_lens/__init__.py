"""Find a behaviour's direction in a language model, steer with it, tune it into the weights, see what changed.

The names here are imported when they are first used (PEP 562); `__init__.pyi` lists them. The rest is in the
subpackages: `rt_lens.data`, `vectors`, `steering`, `tuning`, `evaluation`, `arms`, `results`, `plots`.
"""

from importlib.metadata import PackageNotFoundError, version

from rt_lens.common.lazy_imports import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)

try:
    __version__ = version("rt_lens")
except PackageNotFoundError:
    __version__ = "source"
