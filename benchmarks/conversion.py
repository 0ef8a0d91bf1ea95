"""Time to convert a GGUF file, with one reader and table of names or many: `python benchmarks/conversion.py FILE`.

A large vocabulary such as Gemma 3's is where it matters. A machine drifts, so compare only figures of one call.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rt_lens.models import sources


def timed(owner: Any, name: str, label: str, seconds: dict[str, float]) -> None:
    """Adds up, under a label, how long the calls of a function take."""
    function: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - start

    setattr(owner, name, measured)


@contextmanager
def one_each(file: Path) -> Iterator[gguf.GGUFReader]:
    yield gguf.GGUFReader(file)


def main(file: Path) -> None:
    stages: dict[str, float] = {}
    for owner, label in (
        (AutoTokenizer, "tokenizer"),
        (AutoConfig, "configuration"),
        (AutoModelForCausalLM, "weights"),
    ):
        timed(owner, "from_pretrained", label, stages)
    timed(sources, "refuse_what_has_no_place", "check of the tensors' names", stages)
    timed(sources, "_write_weights", "writing", stages)
    shared, results = sources.read_once, {}
    for name, reading in (("one each", one_each), ("one shared", shared)):
        stages.clear()
        sources.read_once = reading
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            sources._convert(file, Path(folder) / "converted", "")
            results[name] = time.perf_counter() - start
        print(f"{name}: {results[name]:.1f} s")
        stages["the rest, mostly reading the file"] = results[name] - sum(stages.values())
        for stage, seconds in stages.items():
            print(f"    {stage:36s} {seconds:6.1f} s")
    print(f"ratio {results['one each'] / results['one shared']:.1f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
