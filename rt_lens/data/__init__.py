"""Data: contrast pairs, questions, facts, the built-in behaviours, and readers of people's own files."""

from rt_lens.common.lazy_imports import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
