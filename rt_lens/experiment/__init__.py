"""The arms from one TOML file: untuned, steered, token-tuned, rep-tuned, in both directions."""

from rt_lens.common.lazy_imports import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
