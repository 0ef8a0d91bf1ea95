"""Models: loading them, running them fast, their tokens, activations and answers. The only room that builds one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
