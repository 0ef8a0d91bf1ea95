"""One model, one request at a time: the others wait, and too many are turned away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rt_lens.arms.intervention import Intervention, applied
from rt_lens.models.generation import NewToken, generate
from rt_lens.models.protocol import Model


class Busy(Exception):
    """Raised where as many requests wait as may."""


class _Gone(Exception):
    """Ends a generation whose client has gone."""


class Worker:
    """Runs requests in turn, in a thread of their own, under the arm that each names."""

    def __init__(self, model: Model, arms: Mapping[str, Intervention], most_waiting: int) -> None:
        self.model, self.arms, self.most = model, dict(arms), most_waiting
        self.waiting = 0
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rt_lens-endpoint")

    async def tokens(
        self, arm: str, prompts: Sequence[str], settings: Mapping[str, Any]
    ) -> AsyncGenerator[NewToken, None]:
        """The tokens of all responses as they come; closing it ends the generation.

        Raises:
            Busy: if too many requests wait already.
            ValueError: as `generate`.
        """
        if self.waiting > self.most:
            raise Busy
        self.waiting += 1
        try:
            async with self._turn:
                async for new in self._run(self.arms[arm], prompts, settings):
                    yield new
        finally:
            self.waiting -= 1

    async def _run(
        self, arm: Intervention, prompts: Sequence[str], settings: Mapping[str, Any]
    ) -> AsyncGenerator[NewToken, None]:
        loop, came, gone = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()

        def tell(what: Any) -> None:
            loop.call_soon_threadsafe(came.put_nowait, what)

        def on_token(new: NewToken) -> None:
            if gone.is_set():
                raise _Gone
            tell(new)

        def work() -> None:
            try:
                with applied(self.model, arm):
                    generate(self.model, prompts, on_token=on_token, **settings)
            except _Gone:
                pass
            except Exception as error:  # for the client, and not for this thread
                tell(error)
            finally:
                tell(None)

        done = loop.run_in_executor(self._thread, work)
        try:
            while (what := await came.get()) is not None:
                if isinstance(what, Exception):
                    raise what
                yield what
        finally:
            gone.set()
            await asyncio.shield(done)  # the model is as it was before another request has it

    def close(self) -> None:
        """Waits for the generation that runs."""
        self._thread.shutdown(wait=True)
