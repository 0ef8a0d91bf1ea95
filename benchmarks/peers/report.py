"""Tables of measurements: medians, ranges, ratios, equality of the work, and the share of the machine's bounds.

Runs nothing; `bench.py` gives it the numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peers.bounds import Machine, Phase
from peers.bounds import seconds as least_seconds
from peers.equality import Equality, worst
from peers.tools import OWN, REFERENCE, TOOLS

NOT_DONE = "–"


@dataclass(frozen=True)
class Measure:
    """What a table is about.

    Attributes:
        title: its heading.
        task: the worker's task.
        amount: of units that one run does: tokens, steps, or 1.
        unit: `s`, `s per step` or `tokens/s`.
        prepared: whether the preparation is left out.
    """

    title: str
    task: str
    amount: int = 1
    unit: str = "s"
    prepared: bool = True

    def value(self, seconds: float) -> str:
        """Seconds of one run, in the measure's unit."""
        number = self.amount / seconds if self.unit == "tokens/s" else seconds / self.amount
        return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


@dataclass
class Runs:
    """What one tool did of one measure.

    Attributes:
        seconds: by round.
        checks: its results against the reference's, by round.
        peak_mib: the highest peak of resident memory.
        failure: why it could not do it; empty if it could.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    checks: list[Equality] = field(default_factory=list)
    peak_mib: float = 0.0
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds.values())

    @property
    def equal(self) -> bool:
        return bool(self.seconds) and worst(self.checks).equal


def speed_ratios(ours: Runs, theirs: Runs) -> list[float]:
    """How many times as fast as theirs ours is, in each of the rounds that both have."""
    common = ours.seconds.keys() & theirs.seconds.keys()
    return [theirs.seconds[number] / ours.seconds[number] for number in sorted(common)]


def shown_ratio(ours: Runs, theirs: Runs) -> str:
    """Their median, with the lowest and the highest where they differ."""
    ratios = speed_ratios(ours, theirs)
    ends = [f"{end:.2f}" for end in (min(ratios), max(ratios))]
    return f"{statistics.median(ratios):.2f}" + (f" [{', '.join(ends)}]" if ends[0] != ends[1] else "")


def fastest_peer(runs: Mapping[str, Runs]) -> str | None:
    """The peer with the lowest median among those whose work is equal."""
    peers = {name: run.median for name, run in runs.items() if name != OWN and run.equal}
    return min(peers, key=lambda name: peers[name]) if peers else None


def table(measure: Measure, runs: Mapping[str, Runs]) -> list[str]:
    """The lines of a measure's table. A tool whose work differs is not ranked, and one without the task has a dash."""
    fastest = fastest_peer(runs)
    label = TOOLS[fastest].label if fastest else "none"
    lines = [
        f"| tool | {measure.unit}, median [range] | n | speed, median [range] (plain Hugging Face = 1) | speed (the "
        f"fastest peer, {label}, = 1) | peak memory, MiB | work equal to plain Hugging Face's |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [_row(name, measure, runs, fastest) for name in TOOLS if name in runs]


def _row(name: str, measure: Measure, runs: Mapping[str, Runs], fastest: str | None) -> str:
    run, label = runs[name], TOOLS[name].label
    if not run.seconds:
        return _cells([label, NOT_DONE, "0", NOT_DONE, NOT_DONE, NOT_DONE, run.failure or "has no such task"])
    check = worst(run.checks)
    ratios = [
        shown_ratio(run, runs[other]) if check.equal and other in runs and runs[other].seconds else "not ranked"
        for other in (REFERENCE, fastest or "")
    ]
    work = "reference" if name == REFERENCE else f"{'yes' if check.equal else '**no**'}: {check.text}"
    times = f"{measure.value(run.median)} {_range(measure, list(run.seconds.values()))}"
    return _cells([label, times, str(len(run.seconds)), *ratios, f"{run.peak_mib:.0f}", work])


def _range(measure: Measure, seconds: Sequence[float]) -> str:
    ends = sorted((min(seconds), max(seconds)), reverse=measure.unit == "tokens/s")
    return f"[{', '.join(map(measure.value, ends))}]"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def bound_line(measure: Measure, phases: Sequence[Phase], machine: Machine, run: Runs | None) -> str:
    """What a measure needs, the least time for it on this machine, and the share that rt_lens reaches."""
    flop, read = sum(phase.flop for phase in phases), sum(phase.bytes for phase in phases)
    least = least_seconds(phases, machine) * (measure.amount if measure.unit == "s per step" else 1)
    amounts = [f"{flop / 1e9:.3g} GFLOP"] + ([f"{read / 1e9:.3g} GB of memory traffic"] if read else [])
    per = " per step" if measure.unit == "s per step" else ""
    line = f"Needs {' and '.join(amounts)}{per}, so at best {measure.value(least)} {measure.unit} at the rates above"
    if run is None or not run.seconds:
        return f"{line}."
    return f"{line}; rt_lens reaches {least / run.median:.0%} of that bound."


def document(
    facts: Sequence[str],
    measures: Mapping[str, Measure],
    runs: Mapping[str, Mapping[str, Runs]],
    needed: Mapping[str, Sequence[Phase]],
    machine: Machine,
) -> str:
    """The whole of RESULTS.md."""
    lines = [
        "# rt_lens and its peers on the same work",
        "",
        "Written by `make bench` or `make bench-quick`; [README.md](README.md) says what each tool does. Machines "
        "differ and drift, so compare only ratios of this one run.",
        "",
        *[f"- {fact}" for fact in facts],
        f"- the machine's own best in this run: {machine.square / 1e9:.0f} GFLOP/s (float32 product of 2048 x 2048 x "
        f"2048), {machine.model_like / 1e9:.0f} GFLOP/s (1600 x 576 x 1536), {machine.stream / 1e9:.1f} GB/s (reading)",
    ]
    for name, measure in measures.items():
        if name not in runs:
            continue
        lines += ["", f"## {measure.title}", "", *table(measure, runs[name])]
        if name in needed:
            lines += ["", bound_line(measure, needed[name], machine, runs[name].get(OWN))]
    return "\n".join(lines) + "\n"
