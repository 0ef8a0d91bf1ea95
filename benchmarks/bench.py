"""rt_lens and its peers on the same work, in turns: `make bench`, `make bench-quick`, or

    python benchmarks/bench.py --peers ~/.cache/rt_lens/peers/bin/python --rounds 3
    python benchmarks/bench.py --quick --tools huggingface rt_lens --tasks extract tune

Each tool is one worker process; only one of them works at a time. A round runs every task once in every tool, and a
tool's result is compared with plain Hugging Face's. After each task `benchmarks/RESULTS.md` is written anew.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file

from peers import bounds, report
from peers.equality import compare
from peers.inputs import Inputs
from peers.recipe import load_tokenizer
from peers.report import Measure, Runs
from peers.tools import BENCHMARKS, OWN, REFERENCE, TOOLS, Refused, Tool, Worker, environment, first_vector

TASKS = ("extract", "generate_one", "generate_batch", "tune", "sweep_1", "sweep_4", "first")
LONG, COMPARED = ("sweep_4",), (REFERENCE, "huggingface_best", OWN)
"""Four times the work of sweep_1: only these tools do it, and a quick run leaves it out."""


def measures_of(inputs: Inputs) -> dict[str, Measure]:
    """Name -> measure, in the order of the tables."""
    n, steps = len(inputs.prompts), inputs.tuning_steps
    new, grid = inputs.new_tokens, f"{len(inputs.sweep_layers)} layers x {len(inputs.sweep_prompts)} prompts"
    learn = f"{len(inputs.tuning_tokens)} rows of {len(inputs.tuning_tokens[0])} tokens, ten blocks, {steps} steps"
    return {
        "extract": Measure(
            f"Extraction: {2 * len(inputs.pairs)} texts, {len(inputs.layers)} mean-difference vectors", "extract"
        ),
        "generate_one": Measure(f"Steered generation, 1 x {new} tokens", "generate_one", new, "tokens/s"),
        "generate_batch": Measure(f"Steered generation, {n} x {new} tokens", "generate_batch", n * new, "tokens/s"),
        "tune": Measure(f"Tuning, {learn}: prepared data", "tune", steps, "s per step"),
        "tune_all": Measure(f"Tuning, {learn}: preparation included", "tune", steps, "s per step", prepared=False),
        "sweep_1": Measure(f"Sweep, {grid}, 1 multiplier", "sweep_1"),
        "sweep_4": Measure(f"Sweep, {grid}, 4 multipliers", "sweep_4"),
        "first": Measure("From starting Python to the first vectors, 16 pairs", "first"),
    }


class Bench:
    """A run of the benchmark: its workers, and what they have done so far."""

    def __init__(self, folder: Path, inputs: Path, python_of: Callable[[Tool], str], log: IO[str]) -> None:
        self.folder, self.path, self.python_of, self.log = folder, inputs, python_of, log
        self.inputs = Inputs.read(inputs)
        self.measures = measures_of(self.inputs)
        self.workers: dict[str, Worker] = {}
        self.runs: dict[str, dict[str, Runs]] = {}
        self.machines = [bounds.measured()]

    def start(self, names: Sequence[str], tasks: Sequence[str]) -> None:
        """Starts the workers, and lets each do its tasks once on a little work."""
        for name in names:
            self.workers[name] = worker = Worker(TOOLS[name], self.python_of(TOOLS[name]), self.log)
            for task in tasks:
                if task in worker.about["tasks"]:
                    self._tell(f"warming up {name}, {task}")
                    try:
                        worker.ask(task, self.folder / "warm.json", self.folder / "warm.safetensors")
                    except Refused as refusal:
                        self._tell(f"{name}: {refusal}")

    def stop(self) -> None:
        """Ends the workers."""
        for worker in self.workers.values():
            worker.close()

    def round(self, number: int, tasks: Sequence[str], path: Path) -> None:
        """Every task once in every tool, the reference first; the tables are written after each task."""
        for task in tasks:
            for name in (name for name in self.workers if task not in LONG or name in COMPARED):
                self._tell(f"round {number + 1}, {task}, {name}")
                self._run(number, task, name)
            self.write(path)
        self.machines.append(bounds.measured())

    def _run(self, number: int, task: str, name: str) -> None:
        out, worker = self.folder / f"{name}-{task}.safetensors", self.workers[name]
        measures = [key for key, measure in self.measures.items() if measure.task == task]
        rows = [self.runs.setdefault(key, {}).setdefault(name, Runs()) for key in measures]
        if task != "first" and task not in worker.about["tasks"]:
            return
        try:
            if task == "first":
                answer = first_vector(worker.tool, self.python_of(worker.tool), self.path, out, self.log)
            else:
                answer = worker.ask(task, self.path, out)
        except Refused as refusal:
            for runs in rows:
                runs.failure = f"failed: {refusal}"
            return
        check = compare(load_file(out), load_file(self.folder / f"{REFERENCE}-{task}.safetensors"))
        for key, runs in zip(measures, rows, strict=True):
            before = 0.0 if self.measures[key].prepared else answer["before"]
            runs.seconds[number] = answer["seconds"] + before
            runs.checks.append(check)
            runs.peak_mib = max(runs.peak_mib, answer["peak_mib"])

    def write(self, path: Path) -> None:
        """Writes the tables of what has been done."""
        tokenizer, shape = load_tokenizer(self.inputs.model), bounds.Shape.read(self.inputs.model)
        needed = bounds.needs(self.inputs, shape, lambda texts: tokenizer(list(texts))["input_ids"])
        machine = bounds.best(self.machines)
        facts = facts_of({name: worker.about for name, worker in self.workers.items()})
        path.write_text(report.document(facts, self.measures, self.runs, needed, machine), encoding="utf-8")

    def _tell(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def facts_of(about: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the numbers depend on, without names of machines."""
    versions = {
        package: sorted({tool["versions"][package] for tool in about.values()}) for package in ("torch", "transformers")
    }
    own = [
        f"{name} {version}"
        for tool in about.values()
        for name, version in tool["versions"].items()
        if name not in versions
    ]
    same = ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in versions.items())
    differ = (
        " (**different versions: not comparable**)" if any(len(numbers) > 1 for numbers in versions.values()) else ""
    )
    policy = environment().get("OMP_WAIT_POLICY", "torch's default")
    threads = sorted({str(tool["threads"]) for tool in about.values()})
    return [
        "n rounds, task by task and tool by tool in turn, after warming up; one process works at a time",
        f"{os.cpu_count()} cores with {torch.backends.cpu.get_cpu_capability()}, "
        f"{' or '.join(threads)} threads, their wait policy {policy}, float32",
        f"{same}{differ}; {', '.join(dict.fromkeys(own))}; Python {sys.version.split()[0]}",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="", help="Python of the environment with nnsight, repeng, steering-vectors")
    parser.add_argument("--quick", action="store_true", help="less work, one round")
    parser.add_argument("--rounds", type=int, help="default 3, quick 1")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, help="default all; plain Hugging Face always takes part")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default all, quick all but sweep_4")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "RESULTS.md")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    arguments.tasks = arguments.tasks or [task for task in TASKS if not (arguments.quick and task in LONG)]
    arguments.tools = [name for name in TOOLS if name == REFERENCE or name in (arguments.tools or TOOLS)]
    apart = [name for name in arguments.tools if not TOOLS[name].shares]
    if apart and not Path(arguments.peers).is_file():
        needing = ", ".join(apart)
        parser.error(f"--peers must be the Python that has {needing}, got {arguments.peers!r}. Run make bench.")
    return arguments


def main() -> None:
    arguments = parse()
    size = "quick" if arguments.quick else "full"
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        log = stack.enter_context((folder / "log.txt").open("w", encoding="utf-8"))
        command = [sys.executable, "-m", "peers.write_inputs", temporary, "--size", size]
        subprocess.run(command, check=True, cwd=BENCHMARKS, env=environment(), stdout=subprocess.DEVNULL)
        bench = Bench(
            folder, folder / f"{size}.json", lambda tool: sys.executable if tool.shares else arguments.peers, log
        )
        stack.callback(bench.stop)
        bench.start(arguments.tools, arguments.tasks)
        for number in range(arguments.rounds):
            bench.round(number, arguments.tasks, arguments.out)
        bench.write(arguments.out)
    print(arguments.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
