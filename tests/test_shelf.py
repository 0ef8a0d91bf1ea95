"""The shelf: the same rows from memory and from disk, and nothing left on the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from full_disk import full_disk

from rt_lens.tuning import activation_store as shelf
from rt_lens.tuning.activation_store import ActivationStore

LIKE = SimpleNamespace(d_model=8, dtype=torch.float32, device="cpu")


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files."""
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
    return tmp_path / "disk"


def rows(lengths: list[int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(length, 8, generator=noise).to(dtype) for length in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[3, 1, 5], [0, 2, 0], [7]])
def test_memory_and_disk_give_the_rows_that_were_put(lengths, dtype, disk):
    like = SimpleNamespace(d_model=8, dtype=dtype, device="cpu")
    wanted = rows(lengths, dtype)
    for where, on_disk in (("memory", False), ("disk", True)):
        kept = ActivationStore(lengths, like, where)
        found = [kept.put(row.clone()) for row in wanted]
        assert kept.on_disk is on_disk
        assert all(torch.equal(mine, row) for mine, row in zip(found, wanted, strict=True))
        assert {row.dtype for row in found} == {dtype}
    assert not list(disk.iterdir())


def test_rows_lie_end_to_end_in_one_block_and_outlive_the_shelf():
    for where in ("memory", "disk"):
        kept = ActivationStore([2, 3], LIKE, where)
        first, second = (kept.put(row) for row in rows([2, 3]))
        del kept
        assert second.data_ptr() - first.data_ptr() == first.numel() * 4
        assert torch.equal(torch.cat([first, second]), torch.cat(rows([2, 3])))


@pytest.mark.parametrize("where", ["auto", "memory", "disk"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_keep_takes_no_room(where, lengths, disk):
    kept = ActivationStore(lengths, LIKE, where)
    assert [kept.put(torch.ones(0, 8)).shape for _ in lengths] == [(0, 8)] * len(lengths)
    assert not list(disk.iterdir())


def test_auto_takes_the_disk_above_the_size(monkeypatch):
    monkeypatch.setattr(shelf, "IN_MEMORY", 10 * 8 * 4)
    assert [ActivationStore([n], LIKE, "auto").on_disk for n in (9, 10, 11)] == [False, False, True]
    half = SimpleNamespace(d_model=8, dtype=torch.bfloat16, device="cpu")
    assert [ActivationStore([n], half, "auto").on_disk for n in (20, 21)] == [False, True]
    assert ActivationStore([11], LIKE, "memory").on_disk is False


def test_a_disk_without_room_is_refused_before_anything_is_written(disk):
    with full_disk(1_000_000), pytest.raises(OSError, match=r"prefix_cache needs 3 MB, which .*File too large"):
        ActivationStore([100_000], LIKE, "disk")
    assert not list(disk.iterdir())
    assert ActivationStore([100_000], LIKE, "disk").on_disk  # and there was room without the limit


def test_the_disk_shelf_is_not_in_the_processs_own_memory(tmp_path):
    """512 MB are put there, while the process may have 200 MB of its own more."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from rt_lens.tuning.activation_store import ActivationStore
def own():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) / 1024
like = SimpleNamespace(d_model=1024, dtype=torch.float32, device="cpu")
grew = []
for where in ("disk", "memory"):
    before, kept = own(), ActivationStore([1024] * 64, like, where)
    last = [kept.put(torch.full((1024, 1024), float(n))) for n in range(64)][-1]
    assert last.mean() == 63
    grew.append(own() - before)
print(*grew)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read as Linux tells it")
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parents[1])], capture_output=True, text=True, check=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "disk")},
    )  # fmt: skip
    on_disk, in_memory = map(float, done.stdout.split())
    assert in_memory > 200
    assert on_disk < 50


def test_a_killed_process_leaves_no_file(tmp_path):
    code = """
import os, sys, time, torch
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from rt_lens.tuning.activation_store import ActivationStore
kept = ActivationStore([1000] * 10, SimpleNamespace(d_model=64, dtype=torch.float32, device="cpu"), "disk")
row = kept.put(torch.ones(1000, 64))
mapped = any(os.environ["TMPDIR"] in line for line in open("/proc/self/maps"))
print("there" if mapped and row.sum() == 64_000 else "not there", flush=True)
time.sleep(60)
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("mappings are read as Linux tells them")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parents[1])], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "disk")},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not list((tmp_path / "disk").iterdir())
