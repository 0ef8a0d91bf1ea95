"""Bars of long work. A terminal shows them; whoever watches is told of each step, and may end the work by raising."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Step:
    """How far a bar is.

    Attributes:
        stage: what is being done ("tuning away").
        done: units done.
        total: units in all, if that is known.
        unit: what is counted ("layer").
        values: numbers of the latest step ("token" -> 1.93), as the bar shows them.
    """

    stage: str
    done: int
    total: int | None
    unit: str
    values: Mapping[str, Any] = field(default_factory=dict)


Watcher = Callable[[Step | None], None]
_watcher: ContextVar[Watcher | None] = ContextVar("rt_lens_watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Work inside the block tells `watcher` of each step; what the watcher raises ends the work, hooks and all.

    Args:
        watcher: called with a Step whenever a bar begins or moves, and with None between tokens, for a chance to raise.

    Example:
        >>> with watched(print):
        ...     validate_vectors(model, train, held_out)
    """
    before = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(before)


def breathe() -> None:
    """A place inside long work, between two steps of a bar, where it may be ended."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(None)


class Bar(tqdm):
    """tqdm, telling whoever watches. It does so also while the terminal's bar is switched off."""

    def __init__(
        self, iterable: Iterable[Any] | None = None, *, desc: str, total: int | None = None, unit: str = "it",
        initial: int = 0, disable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(iterable, desc=desc, total=total, unit=unit, initial=initial, disable=disable)
        self._stage, self._unit, self._done = desc, unit, initial
        self._values: dict[str, Any] = {}
        self._counts = False
        self._all = total if total is not None else len(iterable) if hasattr(iterable, "__len__") else None  # type: ignore[arg-type]
        self._tell()

    def __iter__(self) -> Iterator[Any]:
        self._counts = True
        for item in super().__iter__():  # which calls update now and then, for many items at once
            yield item
            self._done += 1
            self._tell()
        self._end()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if kind is None:
            self._end()

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if not self._counts:
            self._done += int(n or 0)
            self._tell()
        return shown

    def set_postfix(self, ordered_dict: Any = None, refresh: bool | None = True, **values: Any) -> None:
        super().set_postfix(ordered_dict, refresh, **values)
        self._values = {**dict(ordered_dict or {}), **values}
        self._tell()

    def _end(self) -> None:
        """Work that stopped before its last step, as a tuning out of patience does, has ended all the same."""
        if self._all != self._done:
            self._all = self._done
            self._tell()

    def _tell(self) -> None:
        watcher = _watcher.get()
        if watcher is not None:
            watcher(Step(self._stage, self._done, self._all, self._unit, self._values))
