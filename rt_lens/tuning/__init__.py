"""Representation tuning: a steering vector trained into the weights. How well it works is measured elsewhere."""

from rt_lens.common.lazy_imports import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
