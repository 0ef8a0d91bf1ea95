"""Losses of a tuning run elsewhere: every row of the history, under its name, and the run ended whatever happens."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
from small_tuning import NEUTRAL, TARGETS

import rt_lens as rtl
from rt_lens.experiment.config import load_experiment
from rt_lens.tuning.loop import LossNotFinite
from rt_lens.tuning.tracking import TRACKERS, check_installed, trackers_named

CONFIG = rtl.TuneConfig(
    layers=[1], trained_layers=[1], direction="away", max_steps=4, epochs=9, batch_size=4, validate_every=2, seed=3
)


class Listener:
    def __init__(self):
        self.begun, self.rows, self.ended = [], [], 0

    def start(self, name, settings):
        self.begun.append((name, settings["learning_rate"]))

    def log(self, values, step):
        self.rows.append((step, dict(values)))

    def finish(self):
        self.ended += 1


def tuned(model, vectors, **others):
    return rtl.tune(model, vectors, TARGETS, CONFIG, validation=TARGETS, neutral=NEUTRAL, progress=False, **others)


def logged(history):
    """The rows that a tracker gets."""
    return [
        (row["step"], {f"{row['split']}/{loss}": value for loss, value in row.items()
                       if loss not in ("step", "split") and value is not None})
        for row in history
    ]  # fmt: skip


def test_a_tracker_gets_every_row_of_the_history(tiny, tiny_vectors):
    listener = Listener()
    delta = tuned(tiny, tiny_vectors, report_to=listener)
    assert listener.rows == logged(delta.history)
    assert len(listener.rows) == 6  # four steps and two validations
    assert listener.begun == [("tiny away seed 3", CONFIG.learning_rate)]
    assert listener.ended == 1
    plain = tuned(tiny, tiny_vectors)
    assert plain.history == delta.history


def test_runs_inside_reporting_report_there_under_its_name_and_outside_no_more(tiny, tiny_vectors):
    listener, other = Listener(), Listener()
    with rtl.tuning.reporting(listener, name="mood: rep_tuned, away"):
        tuned(tiny, tiny_vectors)
        tuned(tiny, tiny_vectors, report_to=[other])
    tuned(tiny, tiny_vectors)
    assert [name for name, _ in listener.begun] == ["mood: rep_tuned, away"]
    assert len(other.begun) == 1


def test_a_run_that_fails_is_ended_and_reports_no_infinity(tiny, tiny_vectors):
    from dataclasses import replace

    listener, hot = Listener(), replace(CONFIG, learning_rate=1e30, max_grad_norm=1e30)
    with pytest.raises(LossNotFinite):
        rtl.tune(
            tiny, tiny_vectors, TARGETS, hot, validation=TARGETS, neutral=NEUTRAL, report_to=listener, progress=False
        )
    assert listener.ended == 1
    assert all(math.isfinite(value) for _, values in listener.rows for value in values.values())


def test_tensorboards_files_hold_the_losses(tiny, tiny_vectors, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    delta = tuned(tiny, tiny_vectors, report_to="tensorboard")
    (folder,) = Path("runs/tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    expected = {(tag, step): value for step, values in logged(delta.history) for tag, value in values.items()}
    assert found == pytest.approx(expected, rel=1e-6)


def records_of(data: bytes):
    """The records of W&B's file: a header of 7 bytes, then LevelDB's log of blocks of 32 KiB."""
    at, part = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def test_wandb_keeps_the_losses_offline(tiny, tiny_vectors, tmp_path, monkeypatch):
    from wandb.proto import wandb_internal_pb2

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    delta = tuned(tiny, tiny_vectors, report_to="wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = {}
    for data in records_of(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        found |= {(key, int(items["_step"])): float(value) for key, value in items.items() if key[0] != "_"}
    expected = {(tag, step): value for step, values in logged(delta.history) for tag, value in values.items()}
    assert found == pytest.approx(expected)


@pytest.mark.usefixtures("as_a_user")
def test_what_is_no_tracker_is_refused_before_any_work(tiny, tiny_vectors, monkeypatch):
    with pytest.raises(ValueError, match="report_to must be 'wandb', 'tensorboard', 'trackio', or an object"):
        tuned(tiny, tiny_vectors, report_to="wnb")
    with pytest.raises(ValueError, match=r"report_to must be .* got 3"):
        trackers_named([3])
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    with pytest.raises(
        ImportError, match="report_to='trackio' needs trackio, which is not installed. Run: pip install"
    ):
        check_installed(["trackio"])


def test_a_file_names_its_trackers_and_a_wrong_one_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "mood"\n[report]\nto = ["wandb"]\n', encoding="utf-8")
    assert load_experiment(path).report.to == ("wandb",)
    path.write_text('extends = "mood"\n[report]\nto = ["wnb"]\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"report.to must be some of wandb, tensorboard, trackio, got 'wnb'"):
        load_experiment(path)
    assert set(TRACKERS) == {"wandb", "tensorboard", "trackio"}
