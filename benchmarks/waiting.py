"""How torch's threads should wait, on a quiet machine and on a busy one: `python benchmarks/waiting.py [ROUNDS]`.

After each operation the threads of libgomp, torch's OpenMP runtime, look for more work before they sleep: 300,000 times
by default, GOMP_SPINCOUNT times, or never with OMP_WAIT_POLICY=PASSIVE. Looking saves the time to wake up, and takes a
core from others. Both variables are read once, so each measurement has a fresh process; policies and loads alternate.
Without other work on the machine the first table is of a quiet one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "spin 100000": {"GOMP_SPINCOUNT": "100000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 3000": {"GOMP_SPINCOUNT": "3000"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
LOADS = ("quiet", "one core busy")
BUSY = "import time\nend = time.monotonic() + 300\nwhile time.monotonic() < end: pass"
SHAPES = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
"""Matrices of a block of SmolLM2-135M."""
BUDGET = 1.5
"""Seconds for each task, besides a first call."""


def seconds(work: Callable[[], object]) -> float:
    """Median time of the calls that fit in the budget, at least one, after a first one."""
    work()
    times: list[float] = []
    while sum(times) < BUDGET:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure() -> dict[str, float]:
    """Times in this process, in seconds."""
    import torch

    import rt_lens as rtl
    from rt_lens.data.builtin import neutral_prompts
    from rt_lens.models.generation import as_chat, generate_tokens
    from rt_lens.models.tokens.batches import encode
    from rt_lens.tuning.tuning_data import prepare_data

    blocks = [[torch.randn(shape) / shape[0] ** 0.5 for shape in SHAPES] for _ in range(30)]

    def products(rows: int) -> None:
        h, inner = torch.ones(rows, 576), torch.ones(rows, 1536)
        for block in blocks:
            for matrix in block:
                (h if len(matrix) == 576 else inner) @ matrix

    model, pairs = rtl.load_model(), rtl.load_pairs("mood")
    vectors = rtl.extract_vectors(model, pairs.sample(4))
    encoded = [encode(model, text) for text in as_chat(model, pairs.topics[:16])]
    config = rtl.TuneConfig(n_targets=4, max_steps=2, validate_every=99)
    data = prepare_data(model, vectors, pairs.sample(24), config, neutral=neutral_prompts()[:2])

    def steered(batch: int) -> None:
        with model.hooks(fwd_hooks=rtl.add(vectors, [18], 1.0)):
            generate_tokens(model, encoded[:batch], 12)

    with torch.no_grad():
        times = {f"products, {rows} rows": seconds(lambda r=rows: products(r)) for rows in (1, 16, 1600)}  # type: ignore[misc]
    times["steered generation, 1 x 12"] = seconds(lambda: steered(1))
    times["steered generation, 16 x 12"] = seconds(lambda: steered(16))
    times["tune, 2 steps"] = seconds(lambda: rtl.tune(model, vectors, data, config, progress=False))
    return times


@contextmanager
def load(kind: str) -> Iterator[None]:
    if kind == "quiet":
        yield
        return
    with subprocess.Popen([sys.executable, "-c", BUSY]) as busy:
        try:
            yield
        finally:
            busy.kill()


def fresh(policy: dict[str, str]) -> dict[str, float]:
    """Times in a fresh process of a policy."""
    without = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, __file__, "measure"],
        env=without | policy,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(rounds: int) -> None:
    results: dict[tuple[str, str], list[dict[str, float]]] = {(kind, name): [] for kind in LOADS for name in POLICIES}
    for n in range(rounds):
        for kind in LOADS:
            names = list(POLICIES)
            for name in names[n % len(names) :] + names[: n % len(names)]:
                with load(kind):
                    results[kind, name].append(fresh(POLICIES[name]))
                print(f"round {n + 1} of {rounds}: {kind}, {name}", file=sys.stderr)
    for kind in LOADS:
        print(f"\n{kind}: median of {rounds} processes (range), ratio to the default")
        for task in results[kind, "default"][0]:
            default = statistics.median(times[task] for times in results[kind, "default"])
            for name in POLICIES:
                times = [1e3 * times[task] for times in results[kind, name]]
                middle = statistics.median(times)
                print(
                    f"{task:30s} {name:12s} {middle:8.1f} ms  ({min(times):.1f} to {max(times):.1f})  "
                    f"{middle / 1e3 / default:5.2f}"
                )


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        print(json.dumps(measure()))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 5)
