"""Every example in a docstring runs, and everything public has one."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from small_runs import make_board, write_run

import rt_lens
from rt_lens.models.backends import has_hooked

PACKAGE = Path(rt_lens.__file__).parent
FACES = [*sorted(PACKAGE.rglob("__init__.pyi")), PACKAGE / "plots" / "__init__.py"]  # the one room that is not lazy
MODULES = sorted(
    module.name for module in pkgutil.walk_packages([str(PACKAGE)], "rt_lens.") if not module.name.endswith("__main__")
)
ROOMS = ("models", "data", "vectors", "steering", "tuning", "evaluation", "arms", "results", "experiment")


def public_names() -> list[tuple[str, str]]:
    """Module and name of what the front door and the rooms' faces give, once each."""
    found = {}
    for face in FACES:
        package = ".".join(face.relative_to(PACKAGE.parent).parts[:-1])
        for node in ast.parse(face.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                module = f"{package}.{node.module}" if node.level else node.module
                found |= {(module, alias.name): None for alias in node.names}
    return sorted(found)


def examples() -> list[Any]:
    """One test for each docstring of the package that holds an example."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = {}
    for name in MODULES:
        if ".backends.hooked" in name and not has_hooked():
            continue
        module = importlib.import_module(name)
        for test in finder.find(module, name, module=module):
            if test.examples:
                tests[test.name] = test
    return [pytest.param(test, id=test.name.removeprefix("rt_lens.")) for test in tests.values()]


@pytest.mark.parametrize(("module", "name"), public_names(), ids=lambda value: value.removeprefix("rt_lens."))
def test_everything_public_has_an_example(module, name):
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing) or inspect.isfunction(thing):  # aliases of types have no docstring
        assert ">>>" in (thing.__doc__ or ""), f"{module}.{name} has no example"


@pytest.fixture(scope="session")
def at_hand(model: Any) -> dict[str, Any]:
    """What an example may use without making it: a model, pairs, vectors, prompts, a small tuned change."""
    pairs = rt_lens.load_pairs("mood")
    train, validation, test = pairs.split(0.4, 0.2, seed=0)
    vectors = rt_lens.extract_vectors(model, train.sample(16))
    neutral = ["Name three metals.", "What is a prime number?"]
    config = rt_lens.TuneConfig(
        direction="away", layers=[21], trained_layers=[21], n_targets=4, target_tokens=4, max_steps=2, batch_size=4
    )
    delta = rt_lens.tune(model, vectors, train.sample(4), config, neutral=neutral, progress=False)
    return {
        "rtl": rt_lens, "plots": rt_lens.plots, "model": model, "pairs": pairs, "train": train.sample(16),
        "validation": validation.sample(8), "test": test.sample(4), "held_out": validation.sample(8),
        "vectors": vectors, "neutral": neutral, "config": config, "delta": delta,
        "prompts": ["Tell me about your weekend.", "How was your day?"],
        "texts": ["The sun came out and we laughed all day.", "It rained, and nobody called."],
    }  # fmt: skip


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: Any) -> Path:
    """The folder `runs` of examples: `mood`, and `mood_after`, in which one arm scores higher."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "mood", make_board(1, seeds=(0, 1, 2, 3, 4)))
    write_run(folder / "mood_after", make_board(13, seeds=(0, 1, 2, 3, 4), shift=1.0))
    return folder


@pytest.mark.parametrize("example", examples())
@pytest.mark.usefixtures("as_a_user")
def test_the_examples_run_and_say_what_they_print(example, at_hand, finished_runs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if '"runs/mood' in example.docstring:
        shutil.copytree(finished_runs, tmp_path / "runs")
    monkeypatch.setattr(go.Figure, "show", lambda *_, **__: None)
    names: dict[str, Any] = {}
    for room in ROOMS:
        face = importlib.import_module(f"rt_lens.{room}")
        names |= {name: getattr(face, name) for name in face.__all__}
    example.globs = {**names, **at_hand, **example.globs}
    printed: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=flags, verbose=False).run(example, out=printed.append)
    assert not printed, "".join(printed)
