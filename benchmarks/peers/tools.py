"""The tools, and a running worker process of each. Knows no task."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

BENCHMARKS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Tool:
    """A tool that takes part.

    Attributes:
        label: its name in tables.
        module: its worker in `peers`.
        shares: whether it runs in rt_lens's own environment; else in the peers'.
    """

    label: str
    module: str
    shares: bool = True


TOOLS = {
    "huggingface": Tool("Hugging Face, plain", "peers.huggingface"),
    "huggingface_best": Tool("Hugging Face, best known use", "peers.huggingface_best"),
    "transformerlens": Tool("TransformerLens", "peers.transformerlens"),
    "nnsight": Tool("nnsight", "peers.nnsight", shares=False),
    "repeng": Tool("repeng", "peers.repeng", shares=False),
    "steering_vectors": Tool("steering-vectors", "peers.steering_vectors", shares=False),
    "rt_lens": Tool("rt_lens", "peers.rt_lens"),
}
REFERENCE, OWN = "huggingface", "rt_lens"


class Refused(RuntimeError):
    """A tool could not do a task; the message is the tool's own."""


def environment() -> dict[str, str]:
    """Environment variables of all processes: this tree's code, no network; threads wait as torch's default has it."""
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent)]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # or each start would compile this tree again
    return variables


class Worker:
    """A running worker, which answers one request at a time."""

    def __init__(self, tool: Tool, python: str, log: IO[str]) -> None:
        self.tool = tool
        self.process = subprocess.Popen(
            [python, "-m", tool.module], cwd=BENCHMARKS, env=environment(), encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        self.about = self._answer()

    def ask(self, task: str, inputs: Path, out: Path) -> dict[str, Any]:
        """Runs a task; returns its times, peak of memory and result's file.

        Raises:
            Refused: the task failed in the tool.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"task": task, "inputs": str(inputs), "out": str(out)}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Refused(f"{self.tool.label} has ended (exit code {self.process.wait()}).") from None
        answer = self._answer()
        if "error" in answer:
            raise Refused(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Refused(f"{self.tool.label} ended without an answer (exit code {self.process.wait()}).")
        answer: dict[str, Any] = json.loads(line)
        return answer


def first_vector(tool: Tool, python: str, inputs: Path, out: Path, log: IO[str]) -> Mapping[str, Any]:
    """Starts a new process that makes one set of vectors and ends; its wall time in seconds.

    Raises:
        Refused: it failed.
    """
    command = [python, "-m", tool.module, "--first", str(inputs), str(out)]
    start = time.perf_counter()
    ended = subprocess.run(
        command, cwd=BENCHMARKS, env=environment(), encoding="utf-8", stdout=subprocess.PIPE, stderr=log
    )
    seconds = time.perf_counter() - start
    if ended.returncode:
        raise Refused(f"{tool.label} ended with exit code {ended.returncode}.")
    return {"before": 0.0, "seconds": seconds, **json.loads(ended.stdout)}
