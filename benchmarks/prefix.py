"""Time per step and peak memory of tuning with and without the frozen-prefix cache, and whether the weights agree.

Each mode runs in a process of its own, on the same targets.

    python benchmarks/prefix.py --steps 10
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import rt_lens as rtl
from rt_lens.data.builtin import neutral_prompts
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.targets import write_neutral, write_targets
from rt_lens.tuning.tuning_data import prepare_data

MODES = ("off", "memory", "disk")


def one_mode(mode: str, steps: int, out: Path) -> None:
    """Tunes in this process, and prints time and memory."""
    pairs, _, _ = rtl.load_pairs("mood").split(0.4, 0.2)
    model = rtl.load_model()
    config = rtl.TuneConfig(max_steps=steps, epochs=steps, n_targets=24, validate_every=steps, prefix_cache=mode)  # type: ignore[arg-type]
    vectors = rtl.extract_vectors(model, pairs.sample(32), layers=config.layers)
    targets = write_targets(model, pairs, "away", config)
    neutral = write_neutral(model, neutral_prompts()[:8], config)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    tuning_data = prepare_data(model, vectors, targets, config, neutral=neutral)
    prepare_seconds = time.perf_counter() - start
    rtl.tune(model, vectors, tuning_data, replace(config, max_steps=1), progress=False)  # warm
    start = time.perf_counter()
    delta = rtl.tune(model, vectors, tuning_data, config, progress=False)
    seconds = (time.perf_counter() - start) / steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    delta.save(out)
    rows = (*tuning_data.train, *tuning_data.held_out, *tuning_data.neutral)
    prefix_size = sum(row.prefix.numel() * 4 for row in rows if row.prefix is not None)
    print(
        f"{mode:>7}: prepare {prepare_seconds:5.1f} s, {seconds:6.3f} s a step (validation's share in it), peak "
        f"{peak / 1024:6.0f} MiB ({(peak - loaded) / 1024:+.0f} above loading the model and writing the targets), "
        f"prefix {prefix_size / 2**20:.1f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.mode:
        one_mode(arguments.mode, arguments.steps, arguments.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {mode: Path(folder) / f"{mode}.safetensors" for mode in MODES}
        for mode, file in files.items():
            command = [sys.executable, __file__, "--mode", mode, "--steps", str(arguments.steps), "--out", str(file)]
            subprocess.run(command, check=True)
        plain = WeightDelta.load(files["off"])
        size = sum(float(change.norm()) ** 2 for change in plain.changes.values()) ** 0.5
        for mode in MODES[1:]:
            other = WeightDelta.load(files[mode])
            largest = max(float((plain.changes[name] - other.changes[name]).abs().max()) for name in plain.changes)
            distance = sum(float((plain.changes[n] - other.changes[n]).norm()) ** 2 for n in plain.changes) ** 0.5
            print(f"{mode} against off: largest difference of a weight {largest:.1e}, relative {distance / size:.1e}")


if __name__ == "__main__":
    main()
