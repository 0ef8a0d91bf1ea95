"""Models: loading and running them; tokens, positions, activations and generation. The only room that builds one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
