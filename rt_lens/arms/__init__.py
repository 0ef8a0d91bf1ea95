"""Arms: what acts on a model, and what compares: interventions, sweeps, searches, resistance, what changed inside."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
