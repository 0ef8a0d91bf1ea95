"""Jobs in the background: one thread runs them in turn, and every tab can follow or stop its own."""

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
_FETCH_TIME = 0.3  # seconds
_log = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "stopped", "failed"]


_TURNS: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()


def turn_of(model: Model | None) -> AbstractContextManager[Any]:
    """One lock per model, which several dashboards may share; without a model there is nothing to lock."""
    return nullcontext() if model is None else _TURNS.setdefault(model, threading.Lock())


class Stopped(Exception):
    """Raised inside a job after the user has pressed Stop."""


@dataclass
class Job:
    """One job of one tab. The worker's thread writes its attributes, and the pages' callbacks read them.

    Attributes:
        name: a short description, such as "tuning away".
        key: the identifier that a tab keeps.
        state: waiting, running, done, stopped or failed.
        error: the message for the user, if it failed.
        shown: slot of the page -> its content so far.
        versions: slot -> number of changes of its content.
        steps: stage -> progress of its bar.
        stop: set after the user has pressed Stop.
        fetched: set when the tab fetches content.
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
    fetched: threading.Event = field(default_factory=threading.Event, repr=False)

    def show(self, slot: str, content: Any) -> None:
        """Fills a slot of the page, which the tab fetches with its next request."""
        self.shown[slot] = content
        self.versions[slot] = self.versions.get(slot, 0) + 1

    def wait_for_fetch(self) -> None:
        """Waits briefly for the tab to fetch the content, before work that leaves the browser no core to draw it."""
        self.fetched.clear()
        self.fetched.wait(_FETCH_TIME)

    def watch(self, step: Step | None) -> None:
        """Takes the progress of the job's bars.

        Raises:
            Stopped: if the user has pressed Stop.
        """
        if self.stop.is_set():
            raise Stopped
        if step is not None:
            self.steps[step.stage] = step

    @property
    def ended(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    @property
    def unfinished(self) -> list[Step]:
        """The bars in progress, the outermost first."""
        return [step for step in list(self.steps.values()) if step.total is None or step.done < step.total]


class Jobs:
    """A queue and one thread that runs its jobs, because hooks and weights of a model allow one user at a time."""

    def __init__(self, turn: AbstractContextManager[Any]) -> None:
        """The lock `turn` is held while a job runs; see `turn_of`."""
        self._turn = turn
        self._jobs: dict[str, Job] = {}
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._work_off, name="rt_lens dashboard", daemon=True)
        self._thread.start()

    def start(self, name: str, work: Callable[[Job], Any]) -> str:
        """Queues a job and returns its key.

        Args:
            name: a short description, such as "answering".
            work: a function of the Job, which shows intermediate results on it.
        """
        job = Job(name, f"{next(self._numbers)}-{secrets.token_hex(4)}", work)
        self._jobs[job.key] = job
        for key in [key for key, old in list(self._jobs.items()) if old.ended][:-_KEPT]:
            self._jobs.pop(key, None)
        self._queue.put(job)
        return job.key

    def get(self, key: str | None) -> Job | None:
        """The job of this key, or None, for example after a restart of the server."""
        return self._jobs.get(key or "")

    def stop(self, key: str | None) -> None:
        job = self.get(key)
        if job is not None:
            job.stop.set()
            if job.state == "waiting":
                job.state = "stopped"

    def close(self) -> None:
        """Stops all jobs and returns when the model is free; no job can start afterwards."""
        for key in list(self._jobs):
            self.stop(key)
        self._queue.put(None)
        self._thread.join()

    def before(self, job: Job) -> list[Job]:
        """The unfinished jobs that are queued before this one."""
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
                job.watch(None)  # the user may have stopped it while another dashboard held the lock
                job.work(job)
            job.state = "done"
        except Stopped:
            job.state = "stopped"
        except (ValueError, OSError, ArithmeticError, ImportError, MemoryError) as refusal:  # messages meant for users
            job.error, job.state = str(refusal), "failed"
        except BaseException as fault:  # whatever happens, the worker must go on to the next job
            _log.exception("the job %r failed", job.name)
            message = f"{type(fault).__name__}: {fault}"
            job.error, job.state = f"{message} (unexpected; see the terminal of the dashboard)", "failed"


def progress_text(job: Job, ahead: list[Job]) -> str:
    """The progress of a job in one line."""
    if job.state == "waiting":
        return f"Waiting for {len(ahead)} {'job' if len(ahead) == 1 else 'jobs'}." if ahead else "Starting."
    if job.state == "running":
        steps = [f"{step.stage}: {step.done} of {step.total or '?'} {_plural(step.unit)}" for step in job.unfinished]
        return f"{job.name[:1].upper()}{job.name[1:]} …" + (f" {'; '.join(steps)}" if steps else "")
    return {"done": "Done.", "stopped": "Stopped.", "failed": ""}[job.state]


def _plural(unit: str) -> str:
    return f"{unit}{'es' if unit.endswith(('ch', 's', 'x')) else 's'}"
