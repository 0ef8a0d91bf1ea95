"""Interventions on a model: hooks, weight deltas, both, or none. Also comparisons, sweeps, searches and inspection."""

from rt_lens.common.lazy_imports import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
