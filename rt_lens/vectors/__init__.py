"""Vectors: finding a behaviour's direction, knowing whether to believe it, reading with it. It knows no hook."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
