"""A run's results: files on disk, tables for a paper, and what changed between two runs. It meets no model."""

from rt_lens.common.lazy_imports import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
