"""Measuring whatever model is handed over: what it writes, which options it prefers, how it predicts texts.

Knows nothing of steering or tuning; callers wrap the model in a context.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
