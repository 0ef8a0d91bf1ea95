"""`rt-lens dashboard` as a user starts it: a run without its model, faults in one line, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from small_runs import make_board, write_run

from rt_lens.apps.cli import main

ROOT = Path(__file__).parent.parent


def command(*arguments: str) -> subprocess.Popen[str]:
    # Without the hub: a run's model that is not on this machine must not be looked for elsewhere.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "rt_lens.apps.cli", "dashboard", *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_run_whose_model_is_not_here_is_shown_all_the_same_and_ctrl_c_ends_it(tmp_path):
    run = write_run(tmp_path / "run", make_board(0))
    with command(str(run)) as started:
        assert started.stdout is not None and started.stderr is not None
        said = started.stdout.readline()
        assert said.startswith("Serving http://127.0.0.1:") and "Ctrl-C" in said
        with urllib.request.urlopen(said.split()[1].rstrip("."), timeout=30) as page:
            assert page.status == 200 and b"rt_lens" in page.read()
        started.send_signal(signal.SIGINT)
        assert started.wait(timeout=30) == 0
        assert "The run's model is not available" in started.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--vectors", "a/x.safetensors", "--vectors", "b/x.safetensors"], "two of which have one name"),
        (["no/such/run"], "no/such/run"),
        (["--vectors", "no_such.safetensors"], "no_such.safetensors"),
        (["--behaviour", "no_such.toml"], "no_such.toml"),
    ],
)
def test_faults_are_one_line(arguments, wanted, monkeypatch, capsys, as_a_user, tmp_path, tiny_vectors):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        tiny_vectors.save(Path(folder) / "x.safetensors")
    monkeypatch.setattr(sys, "argv", ["rt-lens", "dashboard", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert wanted in errors and len(errors.strip().splitlines()) == 1
