"""How cost grows, in rt_lens and in plain Hugging Face, next to the machine's bound: it writes `benchmarks/GROWTH.md`.

    python benchmarks/growth.py                                # all curves; 12 GB of memory, 6 of disk
    python benchmarks/growth.py --curves pairs rows --points 4 # only the first four points of two curves

The table is written after each point, so an interrupted run keeps what it has measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.torch import load_file
from scipy import stats

import rt_lens as rtl
from peers import bounds
from peers.bounds import Machine, Phase, Shape
from peers.equality import compare, worst
from peers.inputs import Inputs
from peers.points import CURVES, Curve, Material
from peers.report import Measure, Runs, shown_ratio
from peers.tools import BENCHMARKS, OWN, REFERENCE, TOOLS, Refused, Worker, environment

COMPARED = (REFERENCE, OWN)
LONG = 60.0
"""Seconds of both tools together, above which a point is measured once and without a warm-up."""
SECONDS = Measure("", "")


@dataclass
class Point:
    """One point of a curve: its size, what it needs, and the runs of both tools."""

    size: float
    phases: Sequence[Phase]
    runs: dict[str, Runs] = field(default_factory=lambda: {name: Runs() for name in COMPARED})


class Exponent(NamedTuple):
    """Slope of log seconds against log size, with its 95 % interval."""

    slope: float
    low: float
    high: float


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> Exponent | None:
    """How cost grows: 1 is in proportion. None for fewer than three points."""
    if len(sizes) < 3:
        return None
    line = stats.linregress(np.log(sizes), np.log(seconds))
    margin = float(stats.t.ppf(0.975, len(sizes) - 2) * line.stderr)
    return Exponent(float(line.slope), float(line.slope) - margin, float(line.slope) + margin)


def phases_of(curve: Curve, inputs: Inputs, rows: list[list[int]]) -> list[Phase]:
    """What a point needs at least."""
    shape = Shape.read(inputs.model)
    if curve.task == "extract":
        return bounds.extraction(shape, rows, inputs.layers)
    return bounds.decoding(shape, rows, inputs.new_tokens)


def rows_of(curve: Curve, inputs: Inputs, material: Material) -> list[list[int]]:
    """Token ids of what a point reads."""
    texts = [*inputs.positive, *inputs.negative] if curve.task == "extract" else inputs.prompts
    ids: list[list[int]] = material.model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def table(curve: Curve, points: Sequence[Point], machine: Machine) -> list[str]:
    """The lines of a curve's table, with its exponents."""
    lines = [
        f"## {curve.title}",
        "",
        f"| {curve.quantity} | n | plain Hugging Face, s | rt_lens, s | rt_lens's speed (plain = 1) | least, s | "
        "rt_lens's share of the bound | peak, plain, MiB | peak, rt_lens, MiB | same work |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(point, machine) for point in points),
        "",
    ]
    return [*lines, *(_exponent_line(name, points) for name in COMPARED), ""]


def _row(point: Point, machine: Machine) -> str:
    theirs, ours = point.runs[REFERENCE], point.runs[OWN]
    least, check = bounds.seconds(point.phases, machine), worst(ours.checks)
    cells = [
        f"{point.size:.4g}", str(len(ours.seconds)), SECONDS.value(theirs.median), SECONDS.value(ours.median),
        shown_ratio(ours, theirs), SECONDS.value(least), f"{least / ours.median:.0%}",
        f"{theirs.peak_mib:.0f}", f"{ours.peak_mib:.0f}", f"{'yes' if check.equal else '**no**'}: {check.text}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _exponent_line(name: str, points: Sequence[Point]) -> str:
    fit = exponent([point.size for point in points], [point.runs[name].median for point in points])
    numbers = "needs three points" if fit is None else f"{fit.slope:.2f} [{fit.low:.2f}, {fit.high:.2f}]"
    return f"- exponent, {TOOLS[name].label}: {numbers}"


def measure(
    curve: Curve, inputs: Inputs, workers: Mapping[str, Worker], material: Material, n_rounds: int
) -> Point:  # fmt: skip
    """One point in both tools, in turn. The first round warms up and does not count, unless it is long."""
    rows = rows_of(curve, inputs, material)
    point = Point(curve.size(inputs, rows), phases_of(curve, inputs, rows))
    path = inputs.write(material.folder / "point.json")
    for number in range(n_rounds + 1):
        answers = {
            name: worker.ask(curve.task, path, material.folder / f"{name}.safetensors")
            for name, worker in workers.items()
        }
        long = sum(answer["seconds"] for answer in answers.values()) > LONG
        if number or long:
            reference = load_file(answers[REFERENCE]["out"])
            for name, answer in answers.items():
                runs = point.runs[name]
                runs.seconds[number] = answer["seconds"]
                runs.checks.append(compare(load_file(answer["out"]), reference))
                runs.peak_mib = max(runs.peak_mib, answer["peak_mib"])
        if long:
            break
    return point


def document(points: Mapping[str, Sequence[Point]], machine: Machine, n_rounds: int) -> str:
    """The whole of GROWTH.md."""
    head = [
        "# How cost grows",
        "",
        f"Written by `python benchmarks/growth.py`: medians of n rounds in turn ({n_rounds} after a warm-up; one "
        f"without it where a round takes over {LONG:.0f} s), ratios with their range; float32 on the CPU. An exponent "
        "is the slope of log seconds against log size (95 % interval); 1 is in proportion.",
        "",
        f"The least time is what {machine.flops / 1e9:.0f} GFLOP/s and {machine.stream / 1e9:.1f} GB/s allow, the best "
        "rates of the same run. Peaks are of the whole process, weights included.",
        "",
    ]
    return "\n".join([*head, *(line for name in points for line in table(CURVES[name], points[name], machine))])


@dataclass
class Run:
    """The points measured so far, and the machine's rates beside them."""

    material: Material
    workers: Mapping[str, Worker]
    n_rounds: int
    points: dict[str, list[Point]] = field(default_factory=dict)
    machines: list[Machine] = field(default_factory=list)

    def curve(self, name: str, n_points: int | None, out: Path) -> None:
        """Measures a curve's first points, and writes all tables after each of them."""
        for inputs in CURVES[name].made(self.material, n_points):
            point = measure(CURVES[name], inputs, self.workers, self.material, self.n_rounds)
            self.points.setdefault(name, []).append(point)
            self.machines.append(bounds.measured())
            out.write_text(document(self.points, bounds.best(self.machines), self.n_rounds), encoding="utf-8")
            print(f"{name}, {point.size:.4g}: written to {out.name}", file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--points", type=int, help="only the first points of each curve, which are the smallest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "GROWTH.md")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        log = stack.enter_context((folder / "log.txt").open("w", encoding="utf-8"))
        command = [sys.executable, "-m", "peers.write_inputs", temporary, "--size", "quick"]
        subprocess.run(command, check=True, cwd=BENCHMARKS, env=environment(), stdout=subprocess.DEVNULL)
        material = Material(rtl.load_model(), Inputs.read(folder / "quick.json"), folder)
        workers = {name: Worker(TOOLS[name], sys.executable, log) for name in COMPARED}
        for worker in workers.values():
            stack.callback(worker.close)
        run = Run(material, workers, arguments.rounds)
        for name in arguments.curves:
            try:
                run.curve(name, arguments.points, arguments.out)
            except Refused as refusal:
                print(f"{name}: ends here, {refusal}", file=sys.stderr)
    print(arguments.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
