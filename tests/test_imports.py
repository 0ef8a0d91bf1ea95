"""What a fresh process imports, and how torch's threads wait in it."""

from __future__ import annotations

import gc
import importlib
import os
import re
import subprocess
import sys

import pytest

from rt_lens.common.lazy_imports import collector_rests
from rt_lens.common.threads import SPIN_COUNT

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
NOT_FOR_A_VECTOR = {
    "plotly", "kaleido", "dash", "flask", "typer", "sklearn", "scipy.stats", "statsmodels", "concept_erasure", "peft",
    "vaderSentiment", "openai", "lm_eval", "rt_lens.plots", "rt_lens.evaluation", "rt_lens.tuning", "rt_lens.apps",
}  # fmt: skip
FIRST_VECTOR = """
import rt_lens as rtl
rtl.extract_vectors(rtl.load_model(), rtl.load_pairs("mood").sample(2))
"""
COMMAND = """
import sys
from rt_lens.apps.cli import main
sys.argv = ["rt-lens", {!r}]
try:
    main()
except SystemExit:
    pass
"""


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process in which neither variable is set, unless given."""
    without = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        [sys.executable, "-c", code], env=without | environment, capture_output=True, text=True, check=True
    )


def imported(code: str) -> set[str]:
    """The modules that a process has imported after running the code."""
    return set(fresh(f"{code}\nimport sys\nprint(*sys.modules)").stdout.splitlines()[-1].split())


def test_a_first_vector_imports_no_figures_statistics_or_pages():
    modules = imported(FIRST_VECTOR)
    assert {"torch", "transformer_lens", "rt_lens.vectors.methods"} <= modules
    assert not NOT_FOR_A_VECTOR & modules


def test_the_front_door_and_help_import_no_torch_and_the_list_of_models_no_transformerlens():
    assert not {"torch", "numpy", "transformer_lens"} & imported("import rt_lens")
    assert not {"torch", "numpy", "transformer_lens"} & imported(COMMAND.format("--help"))
    assert not {"transformers", "transformer_lens"} & imported(COMMAND.format("models"))


def test_the_collector_rests_while_names_are_imported_and_works_again_after(tmp_path, monkeypatch):
    room = tmp_path / "some_room"
    room.mkdir()
    (room / "__init__.py").write_text(
        "from rt_lens.common.lazy_imports import attach_stub\n"
        "__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)\n"
    )
    (room / "__init__.pyi").write_text("from .inner import at_work as at_work, missing as missing\n")
    (room / "inner.py").write_text("import gc\nat_work = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    room = importlib.import_module("some_room")
    assert room.at_work is False
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    with pytest.raises(AttributeError):
        _ = room.missing
    assert gc.isenabled()


def test_a_users_own_collector_settings_stay():
    gc.disable()
    try:
        with collector_rests():
            assert not gc.isenabled()
        assert not gc.isenabled()
        gc.freeze()
        frozen = gc.get_freeze_count()
        gc.enable()
        with collector_rests():
            assert gc.isenabled()
        # A frozen object that dies leaves the count, so it may fall a little; thawed, it would be 0.
        assert 0 < gc.get_freeze_count() <= frozen
    finally:
        gc.unfreeze()
        gc.enable()


def test_importing_the_library_sets_no_variable():
    code = (
        "import os\nbefore = dict(os.environ)\nimport rt_lens as rtl\nrtl.load_pairs\nassert dict(os.environ) == before"
    )
    fresh(code)


@pytest.mark.skipif(sys.platform != "linux", reason="torch's wheels bring libgomp on Linux alone")
@pytest.mark.parametrize(
    ("environment", "spins"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_the_command_sets_how_torchs_threads_wait_unless_the_user_did(environment, spins):
    """As torch's OpenMP runtime itself reports."""
    report = fresh(COMMAND.format("models"), OMP_DISPLAY_ENV="VERBOSE", **environment).stderr
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", report)) == {spins}
