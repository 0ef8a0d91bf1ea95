"""Files: whole or not at all, whatever stops the writing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import full_disk
from safetensors import safe_open

from rt_lens.common.files import (
    check_can_write,
    read_safetensors,
    remove_leftovers,
    together,
    write_atomically,
    write_safetensors,
)

OLD = {"w": torch.arange(6.0).view(2, 3)}
LARGE = {"w": torch.ones(100_000)}


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tensors_and_header_come_back(tmp_path):
    tensors = OLD | {"b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7), "none": torch.ones(0, 4)}
    path = write_safetensors(tmp_path / "new" / "a.safetensors", tensors, {"rt_lens": '{"seed": 0}', "note": "ü"})
    found, header = read_safetensors(path, "file")
    assert header == {"rt_lens": '{"seed": 0}', "note": "ü"}
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [found["b"].dtype, found["n"].shape, found["none"].shape] == [torch.bfloat16, (), (0, 4)]
    assert list(kept(tmp_path / "new")) == ["a.safetensors"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", OLD, {"step": "1"})
    before = kept(tmp_path)
    with full_disk(50_000), pytest.raises(OSError, match=r"a\.safetensors cannot be written.*too large"):
        write_safetensors(path, LARGE, {"step": "2"})
    assert kept(tmp_path) == before
    with full_disk(50_000), pytest.raises(OSError, match="too large"):
        write_atomically(path, bytes(100_000))
    assert kept(tmp_path) == before
    write_safetensors(path, LARGE, {"step": "2"})  # with room again, it goes
    assert read_safetensors(path, "file")[1] == {"step": "2"}


def test_whatever_else_stops_the_writing_leaves_nothing_either(tmp_path):
    shared = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_safetensors(tmp_path / "a.safetensors", {"a": shared, "b": shared}, {})
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "a.txt", 7)
    assert not kept(tmp_path)


def test_a_folder_of_that_name_is_kept_with_all_that_is_in_it(tmp_path):
    write_atomically(tmp_path / "a" / "b.txt", b"there")
    with pytest.raises(OSError, match="a"):
        write_safetensors(tmp_path / "a", OLD, {})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert kept(tmp_path / "a") == {"b.txt": b"there"}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_may_be_read_by_whom_the_umask_lets(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        paths = [write_safetensors(tmp_path / "a", OLD, {}), write_atomically(tmp_path / "b", b"")]
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in paths] == [mode, mode]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "run[1].safetensors"
    write_safetensors(path, OLD, {})
    left = tmp_path / f".{path.name}-{'0a' * 16}"
    left.mkdir()
    (left / ".tmpX1").write_bytes(b"half")
    others = [tmp_path / f".other-{'0a' * 16}", tmp_path / f".{path.name}-backup", tmp_path / f".run1-{'0a' * 16}"]
    for other in others:
        other.mkdir()
    remove_leftovers(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])
    remove_leftovers(tmp_path / "none" / "a")  # nor does a folder that is not there matter


@pytest.mark.parametrize(("name", "says"), [("folder", "got the folder"), ("file/a", "can be written, got"),
                                            ("a" * 300, "can be written, got")])  # fmt: skip
def test_a_place_that_cannot_be_written_is_told_before_anything_is(tmp_path, name, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("a file")
    with pytest.raises((ValueError, OSError), match=f"place must be .*{says}"):
        check_can_write(tmp_path / name, "place")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_without_permission_is_told(tmp_path):
    if os.name != "posix":
        pytest.skip("the permissions are Unix's")
    (tmp_path / "locked").mkdir(mode=0o555)
    as_root = os.geteuid() == 0
    if as_root:  # whom permissions do not hold
        os.seteuid(65534)
    try:
        with pytest.raises(OSError, match=r"place must be .*Permission denied.*Choose a different path"):
            check_can_write(tmp_path / "locked" / "a", "place")
    finally:
        if as_root:
            os.seteuid(0)


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", OLD, {})
    before = path.read_bytes()
    check_can_write(path, "place")
    check_can_write(tmp_path / "b.safetensors", "place")
    assert kept(tmp_path) == {"a.safetensors": before}


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    whole = write_safetensors(tmp_path / "a", LARGE, {"step": "1"}).read_bytes()
    for content in (b"", b"hello", whole[:40], whole[:-1], whole + b"more", bytes(64)):
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(ValueError, match=r"thing must be a complete .*b, which is damaged .*Write the file again"):
            read_safetensors(tmp_path / "b", "thing")
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="thing must be a file, got .* does not exist"):
            read_safetensors(missing, "thing")


def test_a_reader_keeps_the_file_that_it_opened(tmp_path):
    path = write_safetensors(tmp_path / "a", LARGE, {})
    with safe_open(path, framework="pt") as opened:
        write_safetensors(path, {"w": torch.zeros(5)}, {})
        assert torch.equal(opened.get_tensor("w"), LARGE["w"])
    assert torch.equal(read_safetensors(path, "file")[0]["w"], torch.zeros(5))


# Several together


def write_set(folder: Path, content: bytes, names: str = "abz", **settings: Any) -> None:
    """Files that take their place together; those of the set before are all but the user's `notes`."""
    before = [path.name for path in folder.iterdir() if path.name != "notes"] if folder.exists() else []
    with together(folder, lambda _: before, last="z", **settings) as aside:
        for name in names:
            (aside / name).write_bytes(content)


def test_a_set_replaces_the_one_before_whole_and_leaves_what_is_somebodys_own(tmp_path):
    folder = tmp_path / "deep" / "run"
    write_set(folder, b"1")
    (folder / "notes").write_bytes(b"mine")
    write_set(folder, b"2", "acz")
    assert kept(folder) == {"a": b"2", "c": b"2", "z": b"2", "notes": b"mine"}  # and no b of the first
    assert list(folder.parent.iterdir()) == [folder]


def break_off(folder: Path, fault: BaseException, word: str) -> None:
    with together(folder, lambda _: "abz", last="z", kept=word) as aside:
        (aside / "a").write_bytes(b"2")
        raise fault


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError("?")])
@pytest.mark.parametrize("word", ["", "out: the run was"])
def test_a_set_that_is_broken_off_leaves_the_one_before_and_is_kept_only_if_asked(tmp_path, fault, word, caplog):
    folder = tmp_path / "run"
    write_set(folder, b"1")
    with pytest.raises(type(fault)) as broken:
        break_off(folder, fault, word)
    assert kept(folder) == {"a": b"1", "b": b"1", "z": b"1"}
    if not word:
        assert list(tmp_path.iterdir()) == [folder]
        return
    (aside,) = [path for path in tmp_path.iterdir() if path != folder]
    assert kept(aside) == {"a": b"2"}
    assert f"the run was broken off. The files so far are kept in {aside}" in caplog.text
    assert str(aside) in broken.value.__notes__[0]
    caplog.clear()
    write_set(folder, b"3", kept=word)  # goes on all the same, and says what is still there
    assert str(aside) in caplog.text and kept(aside) == {"a": b"2"}
    assert kept(folder) == {"a": b"3", "b": b"3", "z": b"3"}


def test_nothing_is_kept_of_a_set_that_had_made_nothing(tmp_path, caplog):
    with pytest.raises(ValueError, match="early"), together(tmp_path / "run", lambda _: [], last="z", kept="it was"):
        raise ValueError("early")
    assert not list(tmp_path.iterdir()) and not caplog.text


@pytest.mark.parametrize("fails_at", range(6))
def test_a_move_that_fails_takes_back_all_moves_before_it(tmp_path, monkeypatch, fails_at):
    folder = tmp_path / "run"
    write_set(folder, b"1")
    replace, moves = os.replace, []

    def failing(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == fails_at + 1:
            raise OSError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="denied"):
        write_set(folder, b"2")
    assert kept(folder) == {"a": b"1", "b": b"1", "z": b"1"}
    assert list(tmp_path.iterdir()) == [folder]


def test_what_stands_for_the_set_goes_first_and_comes_last(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    write_set(folder, b"1")
    replace, seen = os.replace, []

    def looking(source: Path, target: Path) -> None:
        replace(source, target)
        seen.append((folder / "z").exists() and {path.read_bytes() for path in folder.iterdir()})

    monkeypatch.setattr(os, "replace", looking)
    write_set(folder, b"2")
    assert seen == [False] * 5 + [{b"2"}]  # never one set's z beside another's files


def test_a_folder_called_by_a_dot_and_one_whose_parent_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    write_set(Path(), b"1")
    assert kept(tmp_path / "run") == {"a": b"1", "b": b"1", "z": b"1"}
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    with together(tmp_path / "run", lambda _: "abz", last="z") as aside:
        assert aside.parent == tmp_path / "run"
        (aside / "z").write_bytes(b"2")
    assert kept(tmp_path / "run") == {"z": b"2"}


def test_a_users_folder_of_a_files_name_is_not_taken_away(tmp_path):
    (tmp_path / "run" / "a").mkdir(parents=True)
    with pytest.raises(OSError, match="must be free for a file, got a folder of that name"):
        write_set(tmp_path / "run", b"1")
    assert (tmp_path / "run" / "a").is_dir()
