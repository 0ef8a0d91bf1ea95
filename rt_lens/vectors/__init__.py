"""Vectors: finding a behaviour's direction, knowing whether to believe it, reading with it. It knows no hook."""

from rt_lens.common.lazy_imports import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
