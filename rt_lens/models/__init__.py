"""Loads and runs models: tokens, positions, activations and generation. Only this subpackage builds models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
