"""The arms from one TOML file: untuned, steered, token-tuned, rep-tuned, in both directions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
