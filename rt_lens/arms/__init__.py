"""Interventions on a model: hooks, weight deltas, both, or none. Also comparisons, sweeps, searches and inspection."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
