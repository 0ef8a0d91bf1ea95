"""Long work off the page: one thread runs it, piece after piece, and any tab may look how far its own is, or end it."""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

from rt_lens.common.progress import Step, watched
from rt_lens.models.protocol import Model

_KEPT = 64
_A_LOOK = 0.3  # seconds
_log = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "stopped", "failed"]


_TURNS: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()


def turn_of(model: Model | None) -> AbstractContextManager[Any]:
    """One lock for each model, which two dashboards may share; nothing to wait for without one."""
    return nullcontext() if model is None else _TURNS.setdefault(model, threading.Lock())


class Stopped(Exception):
    """Raised inside a job whose reader has pressed Stop."""


@dataclass
class Job:
    """One piece of long work of one tab. The worker's thread writes, the pages' callbacks read.

    Attributes:
        name: what it does, in a few words.
        key: how a tab names it.
        state: waiting, running, done, stopped or failed.
        error: what went wrong, in a sentence for the reader.
        shown: slot of the page -> what it shows by now.
        versions: slot -> how often that has changed.
        steps: stage -> how far its bar is.
        stop: set once the reader wants no more.
        looked: set when the tab fetches something.
    """

    name: str
    key: str
    work: Callable[[Job], Any] = field(repr=False)
    state: State = "waiting"
    error: str = ""
    shown: dict[str, Any] = field(default_factory=dict, repr=False)
    versions: dict[str, int] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event, repr=False)
    looked: threading.Event = field(default_factory=threading.Event, repr=False)

    def show(self, slot: str, content: Any) -> None:
        """Puts something in a slot of the page, at the tab's next look."""
        self.shown[slot] = content
        self.versions[slot] = self.versions.get(slot, 0) + 1

    def let_look(self) -> None:
        """Waits a moment for the tab to fetch what is shown, before work that leaves it no core to draw it with."""
        self.looked.clear()
        self.looked.wait(_A_LOOK)

    def watch(self, step: Step | None) -> None:
        """What the bars of the work tell; raises once the reader wants no more."""
        if self.stop.is_set():
            raise Stopped
        if step is not None:
            self.steps[step.stage] = step

    @property
    def ended(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    @property
    def unfinished(self) -> list[Step]:
        """The bars on their way, the outermost first."""
        return [step for step in list(self.steps.values()) if step.total is None or step.done < step.total]


class Jobs:
    """A queue and the one thread that works it off: a model's hooks and weights are for one user at a time."""

    def __init__(self, turn: AbstractContextManager[Any]) -> None:
        """`turn` is held while a job runs; see `turn_of`."""
        self._turn = turn
        self._jobs: dict[str, Job] = {}
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._work_off, name="rt_lens dashboard", daemon=True)
        self._thread.start()

    def start(self, name: str, work: Callable[[Job], Any]) -> str:
        """Queues the work; the key under which its tab finds it again.

        Args:
            name: what it does, in a few words ("answering").
            work: is given its Job, to show things on the way.
        """
        job = Job(name, f"{next(self._numbers)}-{secrets.token_hex(4)}", work)
        self._jobs[job.key] = job
        for key in [key for key, old in list(self._jobs.items()) if old.ended][:-_KEPT]:
            self._jobs.pop(key, None)
        self._queue.put(job)
        return job.key

    def get(self, key: str | None) -> Job | None:
        """The job; None if there is none of this key, as after a restart of the server."""
        return self._jobs.get(key or "")

    def stop(self, key: str | None) -> None:
        job = self.get(key)
        if job is not None:
            job.stop.set()
            if job.state == "waiting":
                job.state = "stopped"

    def close(self) -> None:
        """Stops all work, and returns once the model is nobody's; nothing can be started any more."""
        for key in list(self._jobs):
            self.stop(key)
        self._queue.put(None)
        self._thread.join()

    def before(self, job: Job) -> list[Job]:
        """The jobs that come before this one."""
        ahead = itertools.takewhile(lambda other: other is not job, list(self._jobs.values()))
        return [other for other in ahead if not other.ended]

    def _work_off(self) -> None:
        while (job := self._queue.get()) is not None:
            if job.state == "waiting":
                self._run(job)

    def _run(self, job: Job) -> None:
        job.state = "running"
        try:
            with self._turn, watched(job.watch):
                job.watch(None)  # it may have been stopped while another dashboard had its turn
                job.work(job)
            job.state = "done"
        except Stopped:
            job.state = "stopped"
        except (ValueError, OSError, ArithmeticError, ImportError, MemoryError) as refusal:  # said to rt_lens's users
            job.error, job.state = str(refusal), "failed"
        except BaseException as fault:  # whatever it is, the next job must find its worker
            _log.exception("the job %r failed", job.name)
            told = f"{type(fault).__name__}: {fault}"
            job.error, job.state = f"{told} (unexpected; the terminal of the dashboard says more)", "failed"


def told(job: Job, ahead: list[Job]) -> str:
    """How far it is, in a line."""
    if job.state == "waiting":
        return f"Waiting for {len(ahead)} before it." if ahead else "Starting."
    if job.state == "running":
        steps = [f"{step.stage}: {step.done} of {step.total or '?'} {_several(step.unit)}" for step in job.unfinished]
        return f"{job.name[:1].upper()}{job.name[1:]} …" + (f" {'; '.join(steps)}" if steps else "")
    return {"done": "Done.", "stopped": "Stopped.", "failed": ""}[job.state]


def _several(unit: str) -> str:
    return f"{unit}{'es' if unit.endswith(('ch', 's', 'x')) else 's'}"
