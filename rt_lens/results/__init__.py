"""A run's results: files on disk, tables for a paper, and what changed between two runs. It meets no model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
