"""Shared models and data. Shapes and types of every rt_lens call are checked while the tests run."""

# ruff: noqa: E402
from __future__ import annotations

import os

# Several workers (and the notebooks' kernels that they start) share the cores instead of fighting for them. Only they
# may set this: what starts them would hand its own number down.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))  # before torch is imported

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float, as for mypy
install_import_hook("rt_lens", f"{__name__}.typechecker")  # before the first import of rt_lens

from rt_lens.common.threads import wait_gently

wait_gently()  # before torch is imported

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import plotly
import plotly.graph_objects
import plotly.io
import pytest
import torch
from chat_server import Requests, make_judge, serving
from tiny_models import tiny_model
from transformers import AutoTokenizer

import rt_lens
from rt_lens.data.contrast_pairs import ContrastPairs
from rt_lens.evaluation.endpoint import EndpointJudge
from rt_lens.models.backends import has_hooked
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder
from rt_lens.vectors.steering_vectors import Provenance, SteeringVectors

FIRST = ("test_notebooks.py", "test_readme.py", "test_docstrings.py")
"""The longest files, so that two workers end together; the others stay in their order."""

OF_HOOKED = re.compile(r'"hooked"|\bresid_mid\b|\b_?[Wb]_(?:E|Q|K|V|O|U|in|out|gate|pos)\b')
BOTH_NAMES = {"test_architectures.py", "test_bridges.py", "test_parameter_names.py", "test_steering_grid.py"}
"""Files of which each test says itself what it is for."""

MODEL_FIXTURES = {"model", "bridge", "tiny", "make_tiny"}
MODEL_FILES = {
    "test_architectures.py", "test_bridges.py", "test_docstrings.py", "test_experiment.py", "test_export.py",
    "test_imports.py", "test_model_cache.py", "test_model_folders.py", "test_models.py", "test_parameter_names.py",
    "test_readme.py",
}  # fmt: skip
SEEN_ELSEWHERE = {"test_browser.py", "test_forward.py", "test_notebooks.py"}
"""What `make test-tl4` runs: all that touches a model, but for pages and notebooks, which call the same functions."""

SLOW_FIXTURES = {"model", "bridge", "page", "site", "browser", "at_hand"}
SLOW_FILES = {
    "test_architectures.py", "test_baking.py", "test_bridges.py", "test_browser.py", "test_choices.py",
    "test_compare.py",
    "test_conditions.py", "test_dashboard.py", "test_dashboard_command.py", "test_dashboard_tuning_compare.py",
    "test_dashboard_vectors_steering.py", "test_docstrings.py", "test_endpoint.py", "test_experiment.py",
    "test_export.py", "test_gemma.py", "test_harness.py", "test_honesty.py", "test_imports.py", "test_model_cache.py",
    "test_model_folders.py", "test_models.py", "test_notebooks.py", "test_plan.py", "test_printing.py",
    "test_readme.py", "test_replies.py", "test_statistics_coverage.py", "test_statistics_comparisons.py",
    "test_sweeping.py", "test_texts.py", "test_trust.py", "test_tuning_aims.py", "test_tuning_checkpoint.py",
    "test_tuning_exact.py", "test_tuning_faults.py", "test_tuning_search.py", "test_tuning_weights.py",
}  # fmt: skip
"""What `make check` leaves to `make test`: the real model, browsers, servers, processes, simulations."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what is slow, puts the longest files first, and leaves out what TransformerLens 4 has not."""
    order = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(FIRST)))
    for item in items:
        if item.path.name in SLOW_FILES or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    if not has_hooked():  # the rest runs on TransformerLens 3, and needs no model
        left_out = [item for item in items if _of_hooked_alone(item) or not _touches_models(item)]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def _of_hooked_alone(item: pytest.Item) -> bool:
    """Whether a test is marked so, loads a HookedTransformer, names its parameters, or is the case of one.

    A bridge's case of it remains, and test_architectures.py has the same of bridges by Hugging Face's names.
    """
    function, case = getattr(item, "function", None), getattr(item, "callspec", None)
    text = "" if function is None or item.path.name in BOTH_NAMES else inspect.getsource(function)
    cases = [] if case is None else list(map(str, case.params.values()))
    named = any(OF_HOOKED.search(each) for each in (text, *cases))
    return item.get_closest_marker("hooked") is not None or named or "hooked" in cases


def _touches_models(item: pytest.Item) -> bool:
    name, fixtures = item.path.name, set(getattr(item, "fixturenames", ()))
    return name not in SEEN_ELSEWHERE and (name in MODEL_FILES or bool(MODEL_FIXTURES & fixtures))


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """What a test or an example draws without a seed does not depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(str(bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL])))
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@pytest.fixture
def tokenizer(shared_tokenizer: Any) -> Any:
    """The embedded model's tokenizer; a copy, whose attributes a test may set.

    What is below them in Rust is shared, since copying it takes longer than most tests: who changes that copies deeply.
    """
    own = copy.copy(shared_tokenizer)
    vars(own).update({name: copy.copy(held) for name, held in vars(own).items() if isinstance(held, dict | list)})
    return own


@pytest.fixture
def make_tiny(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Builds random two-block Llama-style models; keywords change the configuration, see `tiny_model`."""
    return lambda **changes: tiny_model(tokenizer, tmp_path_factory.mktemp("tiny"), **changes)


@pytest.fixture
def tiny(make_tiny: Callable[..., Any]) -> Any:
    return make_tiny()


@pytest.fixture
def provenance() -> Provenance:
    return Provenance("tiny", "mood", "mean_diff", "last", "none", 12, "0" * 64, 0, "0.1.0")


@pytest.fixture
def tiny_vectors(provenance: Provenance) -> SteeringVectors:
    noise = torch.Generator().manual_seed(2)
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    return SteeringVectors({name: torch.randn(32, generator=noise) for name in names}, provenance)


@pytest.fixture(scope="session")
def model() -> Any:
    """The embedded model itself. Shared: a test leaves it as it was."""
    return rt_lens.load_model()


@pytest.fixture(scope="session")
def bridge() -> Any:
    """The same as a TransformerBridge. Shared: a test leaves it as it was."""
    return rt_lens.load_model(backend="bridge")


@pytest.fixture(scope="session")
def pairs() -> ContrastPairs:
    return rt_lens.load_pairs("mood")


@pytest.fixture
def hooks_on() -> Callable[[Any], dict[str, int]]:
    """Counts the hooks on a model's hook points, torch's and TransformerLens's own lists."""

    def count(model: Any) -> dict[str, int]:
        last_names = {id(point): (name, point) for name, point in model.hook_dict.items()}  # a bridge has several
        return {
            name: n
            for name, point in last_names.values()
            if (
                n := len(point.fwd_hooks)
                + len(point.bwd_hooks)
                + len(point._forward_hooks)
                + len(point._backward_hooks)
            )
        }

    return count


@pytest.fixture
def as_a_user() -> Iterator[None]:
    """Without the tests' shape checker, which would speak before the messages that a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def only_returned(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    """A figure that is shown, or a file that is written, fails the test."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a figure function showed or wrote")

    for effect in ("show", "write_html", "write_image", "write_json"):
        monkeypatch.setattr(plotly.graph_objects.Figure, effect, forbidden)
        monkeypatch.setattr(plotly.io, effect, forbidden)
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.fixture
def serve() -> Iterator[Callable[..., Requests]]:
    """Starts servers that reply by a rule."""
    with ExitStack() as servers:
        yield lambda rule, **settings: servers.enter_context(serving(rule, **settings))


@pytest.fixture
def judge(tmp_path: Path) -> Callable[..., EndpointJudge]:
    """Makes judges of the same cache."""
    return partial(make_judge, tmp_path)
