"""Representation tuning: a steering vector trained into the weights. How well it works is measured elsewhere."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
