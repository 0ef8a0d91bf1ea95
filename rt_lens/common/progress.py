"""Progress bars. A terminal shows them; a watcher receives each step, and can stop the work by raising."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Step:
    """The state of a bar.

    Attributes:
        stage: the work in progress ("tuning away").
        done: units done.
        total: units in all, if known.
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
    """Context manager that reports each step of the work inside it; an exception of the watcher stops the work.

    Args:
        watcher: called with a Step when a bar starts or moves, and with None between tokens, so that it can raise.

    Example:
        >>> steps = []
        >>> with watched(steps.append):
        ...     for _ in Bar(range(3), desc="counting", disable=True):
        ...         pass
        >>> [(step.stage, step.done, step.total) for step in steps]
        [('counting', 0, 3), ('counting', 1, 3), ('counting', 2, 3), ('counting', 3, 3)]
    """
    before = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(before)


def breathe() -> None:
    """A point between two steps of a bar at which the watcher can stop the work."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(None)


class Bar(tqdm):
    """A tqdm bar that also reports to the watcher, even if the terminal's bar is disabled."""

    def __init__(
        self, iterable: Iterable[Any] | None = None, *, desc: str, total: int | None = None, unit: str = "it",
        initial: int = 0, disable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(iterable, desc=desc, total=total, unit=unit, initial=initial, disable=disable)
        self._stage, self._unit, self._done = desc, unit, initial
        self._values: dict[str, Any] = {}
        self._iterates = False
        self._total = total if total is not None else len(iterable) if hasattr(iterable, "__len__") else None  # type: ignore[arg-type]
        self._report()

    def __iter__(self) -> Iterator[Any]:
        self._iterates = True
        for item in super().__iter__():  # calls update now and then, for many items at once
            yield item
            self._done += 1
            self._report()
        self._end()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if kind is None:
            self._end()

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if not self._iterates:
            self._done += int(n or 0)
            self._report()
        return shown

    def set_postfix(self, ordered_dict: Any = None, refresh: bool | None = True, **values: Any) -> None:
        super().set_postfix(ordered_dict, refresh, **values)
        self._values = {**dict(ordered_dict or {}), **values}
        self._report()

    def _end(self) -> None:
        """Work that stops before its last step, such as early stopping, is complete at that step."""
        if self._total != self._done:
            self._total = self._done
            self._report()

    def _report(self) -> None:
        watcher = _watcher.get()
        if watcher is not None:
            watcher(Step(self._stage, self._done, self._total, self._unit, self._values))
