"""Losses of a tuning run, step by step, to Weights & Biases, TensorBoard, trackio, or a tracker of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias, runtime_checkable

PROJECT = "rt_lens"


@runtime_checkable
class Tracker(Protocol):
    """What receives the losses.

    Example:
        >>> class Listener:
        ...     def start(self, name, settings):
        ...         self.name, self.rows = name, []
        ...
        ...     def log(self, values, step):
        ...         self.rows.append((step, values))
        ...
        ...     def finish(self):
        ...         pass
        >>> listener = Listener()
        >>> tuned = tune(model, vectors, train.sample(4), config, neutral=neutral, report_to=listener, progress=False)
        >>> listener.rows[0][0], sorted(listener.rows[0][1])[:2]
        (1, ['train/cosine', 'train/kl'])
    """

    def start(self, name: str, settings: Mapping[str, Any]) -> None:
        """Begins a run of this name, with the settings of the tuning."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The losses of a step, `train/cosine` say, or of the validation after it."""

    def finish(self) -> None:
        """Ends the run, also one that failed."""


TrackerLike: TypeAlias = str | Tracker
"""A tracker, or the name of one: `wandb`, `tensorboard`, `trackio`."""

_reported: ContextVar[tuple[Sequence[TrackerLike], str]] = ContextVar("rt_lens_report_to", default=((), ""))


@contextmanager
def reporting(report_to: TrackerLike | Sequence[TrackerLike], name: str = "") -> Iterator[None]:
    """Context manager: the tuning runs inside it report there, unless they name a tracker themselves.

    Args:
        report_to: as of `tune`.
        name: of the runs. Defaults to model, direction and seed.

    Example:
        >>> with rtl.tuning.reporting([], name="a run"):
        ...     tuned = tune(model, vectors, train.sample(4), config, neutral=neutral, progress=False)
    """
    before = _reported.set((trackers_named(report_to), name))
    try:
        yield
    finally:
        _reported.reset(before)


def name_given(name: str) -> str:
    """The name that `reporting` gives a run, or this one."""
    return _reported.get()[1] or name


def trackers_named(report_to: TrackerLike | Sequence[TrackerLike] | None) -> tuple[TrackerLike, ...]:
    """Names and trackers as a tuple; None gives those of `reporting`.

    Raises:
        ValueError: for an unknown name, or something that is no tracker.
    """
    if report_to is None:
        return tuple(_reported.get()[0])
    listed = (report_to,) if isinstance(report_to, str | Tracker) else tuple(report_to)
    for each in listed:
        if not (isinstance(each, Tracker) or each in TRACKERS):
            known = ", ".join(map(repr, TRACKERS))
            raise ValueError(
                f"report_to must be {known}, or an object with start, log and finish, got {each!r}. Name one of these."
            )
    return listed


def check_installed(report_to: Sequence[TrackerLike]) -> None:
    """Raises ImportError for a tracker whose package is not installed, before any work."""
    for each in report_to:
        if isinstance(each, str):
            TRACKERS[each]()


@contextmanager
def tracked(
    report_to: Sequence[TrackerLike], name: str, settings: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Context manager that opens a run with each tracker, and gives the function that reports a row of a history."""
    trackers = [TRACKERS[each]() if isinstance(each, str) else each for each in report_to]
    with ExitStack() as finished:
        for tracker in trackers:
            tracker.start(name, settings)
            finished.callback(tracker.finish)

        def report(row: Mapping[str, Any]) -> None:
            values = {
                f"{row['split']}/{loss}": float(value)
                for loss, value in row.items()
                if loss not in ("step", "split") and value is not None and math.isfinite(value)
            }
            for tracker in trackers:
                tracker.log(values, row["step"])

        yield report


class _Wandb:
    def __init__(self) -> None:
        self._wandb = _installed("wandb")

    def start(self, name: str, settings: Mapping[str, Any]) -> None:
        self._run = self._wandb.init(project=PROJECT, name=name, config=dict(settings), reinit="create_new")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self) -> None:
        self._trackio = _installed("trackio")

    def start(self, name: str, settings: Mapping[str, Any]) -> None:
        self._trackio.init(project=PROJECT, name=name, config=dict(settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def finish(self) -> None:
        self._trackio.finish()


class _TensorBoard:
    def __init__(self) -> None:
        _installed("tensorboard")

    def start(self, name: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(f"runs/tensorboard/{name.replace(' ', '_')}")
        self._writer.add_text("settings", "\n\n".join(f"{key}: {value}" for key, value in settings.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def _installed(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise ImportError(
            f"report_to={name!r} needs {name}, which is not installed. Run: pip install {name}."
        ) from None


TRACKERS: dict[str, Callable[[], Tracker]] = {"wandb": _Wandb, "tensorboard": _TensorBoard, "trackio": _Trackio}
"""Name -> tracker."""
