"""The names of a package, imported when they are first used, with the garbage collector at rest meanwhile.

TransformerLens brings some thousands of modules. While they load, their objects only ever grow in number, and the
collector walks over all of them again and again: a quarter of the time to import, and as much again afterwards.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lazy_loader


def attach_stub(package: str, file: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """What `lazy_loader.attach_stub` returns (`__getattr__`, `__dir__`, `__all__`), importing under `collector_rests`.

    Args:
        package: `__name__` of the package.
        file: its `__file__`; the stub lies beside it, with the ending `.pyi`.
    """
    imported, names, public = lazy_loader.attach_stub(package, file)

    def __getattr__(name: str) -> object:
        with collector_rests():
            return imported(name)

    return __getattr__, names, public


@contextmanager
def collector_rests() -> Iterator[None]:
    """Collects no garbage within the block, and counts what was imported in it as old, which is walked over least.

    Leaves a collector alone that is off already, and one whose user has frozen objects.
    """
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            # Together they move every object to the oldest generation, without a walk; nothing stays frozen.
            gc.freeze()
            gc.unfreeze()
        gc.enable()
