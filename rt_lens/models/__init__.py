"""Loads and runs models: tokens, positions, activations and generation. Only this subpackage builds models."""

from rt_lens.common.lazy_imports import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
