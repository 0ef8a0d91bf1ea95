"""A worker process: it reads one task per line and answers with one line of JSON. Knows no tool.

A line is `{"task": ..., "inputs": path, "out": path}`. The answer has the seconds of the task, those of what had to
come before it, the peak of resident memory, and the file with the result.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save_file

from peers.inputs import Inputs

REPEATS, SHORT = 5, 5.0
"""A task that takes fewer seconds than SHORT runs so many times, and its median counts: a stray process weighs less."""


@dataclass(frozen=True)
class Task:
    """A piece of work.

    Attributes:
        run: function of the model, the inputs and what `before` returned; returns the result's tensors by name. Timed.
        before: preparation that several runs could share. Timed separately.
        after: puts the model back into its first state. Not timed.
    """

    run: Callable[..., dict[str, torch.Tensor]]
    before: Callable[[Any, Inputs], Any] | None = None
    after: Callable[[Any, Inputs], None] | None = None

    def timed(self, model: Any, inputs: Inputs) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """Runs once, or several times if it is short; returns the times in seconds and the result."""
        start = time.perf_counter()
        prepared = [self.before(model, inputs)] if self.before else []
        before, times = time.perf_counter() - start, []
        while not times or (len(times) < REPEATS and max(times) < SHORT):
            start = time.perf_counter()
            result = self.run(model, inputs, *prepared)
            times.append(time.perf_counter() - start)
            if self.after:
                self.after(model, inputs)
        return {"before": before, "seconds": statistics.median(times)}, result


def serve(package: str, load: Callable[[str], Any], tasks: Mapping[str, Task]) -> None:
    """Answers requests until the input ends; with `--first INPUTS OUT` it makes vectors from a few pairs and exits.

    Args:
        package: distribution whose version is reported.
        load: makes the tool's model from a Hugging Face folder.
        tasks: name -> task; it must contain `extract`.
    """
    answers = _private_stdout()
    if sys.argv[1:2] == ["--first"]:
        inputs = Inputs.read(sys.argv[2]).first()
        save_file(tasks["extract"].run(load(inputs.model), inputs), sys.argv[3])
        _answer(answers, {"peak_mib": peak_mib()})
        return
    _answer(answers, {"tasks": sorted(tasks), "versions": _versions(package), "threads": torch.get_num_threads()})
    folder, model = "", None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            inputs = Inputs.read(request["inputs"])
            if inputs.model != folder:
                model = None  # the old one goes before the new one comes
                folder, model = inputs.model, load(inputs.model)
            _answer(answers, _done(tasks[request["task"]], model, inputs, request["out"]))
        except Exception as error:
            traceback.print_exc()
            _answer(answers, {"error": f"{type(error).__name__}: {error}"})


def _done(task: Task, model: Any, inputs: Inputs, out: str) -> dict[str, Any]:
    gc.collect()
    _forget_peak()
    seconds, result = task.timed(model, inputs)
    peak = peak_mib()
    save_file({name: tensor.detach().contiguous() for name, tensor in result.items()}, out)
    return {**seconds, "peak_mib": peak, "out": out}


def peak_mib() -> float:
    """Peak of resident memory since it was last reset, in MiB; since the start where the system cannot reset it."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _forget_peak() -> None:
    """Sets the peak to what is resident now, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


def _versions(package: str) -> dict[str, str]:
    return {name: version(name) for name in dict.fromkeys((package, "torch", "transformers"))}


def _private_stdout() -> TextIO:
    """The stream for answers; whatever a library prints goes to the standard error instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
