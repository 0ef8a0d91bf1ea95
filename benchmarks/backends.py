"""One model as a HookedTransformer and as a TransformerBridge: the same work in turns, and the ratio of the times.

    python benchmarks/backends.py               # needs transformer-lens 3, which has both
    python benchmarks/backends.py --rounds 7

A ratio is the bridge's time over the HookedTransformer's, per round; below 1 the bridge is faster. A machine drifts, so
only ratios of one call say anything.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import rt_lens as rtl
from rt_lens.models.forward import logits_where
from rt_lens.models.tokens.batches import encode, pad, pad_id_of
from rt_lens.steering.binding import add
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.loop import tune
from rt_lens.tuning.tuning_data import prepare_data

PROMPTS = [f"Write a few words about number {number}, and why it is nice." for number in range(16)]


def jobs(model: Any) -> dict[str, Callable[[], Any]]:
    """Name -> a piece of work with one model."""
    pairs = rtl.load_pairs("mood")
    vectors = rtl.extract_vectors(model, pairs.sample(32), progress=False)
    steering = add(vectors, layers=[21], multiplier=2.0)
    config = TuneConfig(direction="away", layers=[21], max_steps=4, n_targets=16, target_tokens=64, epochs=1)
    data = prepare_data(model, vectors, pairs, config, neutral=["Name three metals."] * 8, progress=False)
    batch = pad([encode(model, prompt) for prompt in PROMPTS], pad_id_of(model))
    where = torch.zeros_like(batch.tokens, dtype=torch.bool)
    where[:, -1] = True

    def steered(prompts: list[str], tokens: int) -> None:
        with model.hooks(fwd_hooks=steering):
            rtl.generate(model, prompts, max_new_tokens=tokens)

    def sweep() -> None:
        for layer in range(15, 22):
            with model.hooks(fwd_hooks=add(vectors, layers=[layer], multiplier=2.0)):
                list(logits_where(model, batch.tokens, batch.mask, where))

    return {
        "extract 64 texts": lambda: rtl.extract_vectors(model, pairs.sample(32), progress=False),
        "steered decoding, 1 x 24": lambda: steered(PROMPTS[:1], 24),
        "steered decoding, 16 x 24": lambda: steered(PROMPTS, 24),
        "tuning, 4 steps": lambda: tune(model, vectors, data, config, progress=False),
        "sweep, 7 layers x 16": sweep,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    kinds = {kind: jobs(rtl.load_model(backend=kind)) for kind in ("hooked", "bridge")}
    print(f"{torch.get_num_threads()} threads, n = {rounds} rounds, median [range]")
    for name in kinds["hooked"]:
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind in kinds:
                start = time.perf_counter()
                kinds[kind][name]()
                seconds[kind].append(time.perf_counter() - start)
        ratios = [bridge / hooked for bridge, hooked in zip(seconds["bridge"], seconds["hooked"], strict=True)]
        print(
            f"{name:<28} hooked {statistics.median(seconds['hooked']):6.2f} s   bridge / hooked "
            f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
            flush=True,
        )


if __name__ == "__main__":
    main()
