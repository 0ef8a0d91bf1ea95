"""Measures a model as it is handed over: its responses, the options it prefers, how well it predicts texts.

This subpackage knows nothing of steering or tuning; callers apply those to the model first.
"""

from rt_lens.common.lazy_imports import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
