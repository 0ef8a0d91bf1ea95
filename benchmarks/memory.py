"""Peak memory of extracting from many pairs, above the loaded weights: `python benchmarks/memory.py --n-pairs 2000`.

The operating system reports this process's peaks of resident memory. The script prints numbers and asserts none.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

import rt_lens as rtl


def peak() -> float:
    """The most resident memory so far, in MiB; Linux counts it in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def resident() -> float:
    """Resident memory now, in MiB; the peak so far where the system does not report it."""
    counts = Path("/proc/self/statm")
    return (
        int(counts.read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 2**20
        if counts.exists()
        else peak()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-pairs", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    model = rtl.load_model()
    pairs = rtl.load_pairs("mood")
    one_pair, pairs = pairs.sample(1), pairs.sample(arguments.n_pairs)
    rtl.extract_vectors(model, one_pair)  # allocates what any forward pass needs once
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
    before, peak_before = resident(), peak()
    start = time.perf_counter()
    vectors = rtl.extract_vectors(model, pairs, batch_size=arguments.batch_size, progress=True)
    seconds = time.perf_counter() - start
    activations = 2 * len(pairs) * len(vectors.hook_names) * vectors.d_model * 4 / 2**20
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batches of {arguments.batch_size} texts")
    print(f"{len(pairs)} pairs, {len(vectors.hook_names)} layers: {seconds:.0f} s")
    rows = {
        "weights": weights,
        "resident before, model loaded": before,
        "peak before": peak_before,
        "peak after": peak(),
        "peak after, above resident before": peak() - before,
        "  of which activations of all texts": activations,
    }
    for name, size in rows.items():
        print(f"{name:36s} {size:8.0f} MiB")
    if peak() == peak_before:
        print("Loading the model took more than extracting, so the last difference is an upper bound.")


if __name__ == "__main__":
    main()
