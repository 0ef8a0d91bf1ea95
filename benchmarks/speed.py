"""Times of the main steps on this machine: `python benchmarks/speed.py`. Medians of interleaved rounds, in a table.

A machine drifts, so compare only figures of one call. The script prints numbers and asserts none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

import rt_lens as rtl
from rt_lens.data.builtin import neutral_prompts
from rt_lens.models.generation import as_chat, generate_tokens
from rt_lens.models.tokens.batches import encode
from rt_lens.tuning.tuning_data import prepare_data

ROUNDS = 3


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    rtl.load_model()  # converts once, on the first call on a machine
    model = rtl.load_model()
    pairs = rtl.load_pairs("mood")
    train, validation, _ = pairs.split(0.4, 0.2, seed=0)
    vectors = rtl.extract_vectors(model, train.sample(16))
    encoded = [encode(model, text) for text in as_chat(model, (train.topics * 2)[:64])]
    config = rtl.TuneConfig(n_targets=16, max_steps=4, validate_every=99)
    tuning_data = prepare_data(model, vectors, train, config, validation=validation, neutral=neutral_prompts()[:12])
    tokens = torch.randint(3, 40_000, (16, 60))
    mask = torch.ones_like(tokens)

    def forward_plain() -> None:
        with torch.no_grad():
            model(tokens, attention_mask=mask, stop_at_layer=model.cfg.n_layers)

    def steered(batch: int) -> None:
        with model.hooks(fwd_hooks=rtl.add(vectors, [18], 1.0)):
            generate_tokens(model, encoded[:batch], 24)

    steps: dict[str, Callable[[], object]] = {
        "load_model, warm": lambda: rtl.load_model(),
        "extract 32 pairs, 30 layers": lambda: rtl.extract_vectors(model, train.sample(32)),
        "steered generation, 1 x 24 tokens": lambda: steered(1),
        "steered generation, 16 x 24 tokens": lambda: steered(16),
        "steered generation, 64 x 24 tokens": lambda: steered(64),
        "TransformerLens forward, 16 x 60 tokens": forward_plain,
        "tune, 4 steps, shared data": lambda: rtl.tune(model, vectors, tuning_data, config, progress=False),
        "tune, 4 steps, tokens only": lambda: rtl.tune(
            model, vectors, tuning_data, replace(config, cosine_weight=0.0), progress=False
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, work in steps.items():
            times[name].append(seconds(work))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {ROUNDS} rounds")
    for name, rounds in times.items():
        print(f"{name:42s} {statistics.median(rounds):7.2f} s   (from {min(rounds):.2f} to {max(rounds):.2f})")


if __name__ == "__main__":
    main()
