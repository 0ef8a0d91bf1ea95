"""Steering vectors: whole or refused, found by their names, the same after a file as before it."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import stat
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rt_lens.files import write_atomically
from rt_lens.vectors import SteeringVectors, hook_names

POST = "blocks.{}.hook_resid_post"


# Making


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_hook_name(provenance, strange):
    vector = torch.ones(4)
    vector[2] = strange
    with pytest.raises(
        ValueError, match=r"vectors: blocks\.1\.hook_resid_post holds NaN or infinite.*Extract it again"
    ):
        SteeringVectors({POST.format(0): torch.ones(4), POST.format(1): vector}, provenance)


def test_no_vector_and_unlike_widths_are_refused(provenance):
    with pytest.raises(ValueError, match=r"vectors: there is none. Give at least one hook point"):
        SteeringVectors({}, provenance)
    with pytest.raises(ValueError, match=r"vectors: shapes differ: .*blocks\.0.*\(4,\).*blocks\.1.*\(5,\)"):
        SteeringVectors({POST.format(0): torch.ones(4), POST.format(1): torch.ones(5)}, provenance)


def test_vectors_are_frozen(tiny_vectors):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_vectors.vectors = {}


# Finding


def test_hook_names_name_blocks():
    assert hook_names([0, 18]) == ["blocks.0.hook_resid_post", "blocks.18.hook_resid_post"]
    assert hook_names([3], "resid_mid") == ["blocks.3.hook_resid_mid"]


def test_a_vector_is_found_by_its_hook_name_and_a_near_one_is_suggested(tiny_vectors):
    name = POST.format(1)
    assert tiny_vectors[name] is tiny_vectors.vectors[name]
    assert tiny_vectors.hook_names == hook_names([0, 1])
    assert tiny_vectors.d_model == 32
    with pytest.raises(
        KeyError, match=r"vectors: none for 'blocks\.1\.hook_resid_pre'. Near: blocks\.1\.hook_resid_post"
    ):
        tiny_vectors["blocks.1.hook_resid_pre"]


def test_at_layers_gives_the_blocks_asked_for_in_the_order_asked(tiny_vectors):
    assert list(tiny_vectors.at_layers(None)) == hook_names([0, 1])
    assert list(tiny_vectors.at_layers([1, 0])) == hook_names([1, 0])
    assert torch.equal(tiny_vectors.at_layers(range(1, 2))[POST.format(1)], tiny_vectors[POST.format(1)])


def test_layers_are_numbers_and_not_places_in_the_file(provenance):
    vectors = SteeringVectors({POST.format(i): torch.full((4,), float(i)) for i in (10, 2)}, provenance)
    assert vectors.at_layers([2])[POST.format(2)][0] == 2
    assert vectors.at_layers([10])[POST.format(10)][0] == 10


def test_only_the_kind_of_hook_asked_for_is_given(provenance):
    names = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "ln_final.hook_normalized", "hook_embed"]
    vectors = SteeringVectors({name: torch.ones(4) for name in names}, provenance)
    assert list(vectors.at_layers(None)) == ["blocks.0.hook_resid_post"]
    assert list(vectors.at_layers([0], "resid_pre")) == ["blocks.0.hook_resid_pre"]
    with pytest.raises(ValueError, match=r"hook: no vector at hook_normalized"):
        vectors.at_layers(None, "normalized")


@pytest.mark.parametrize("layer", [2, -1, 31])
def test_a_layer_outside_is_refused_with_the_blocks_and_the_mend(tiny_vectors, layer):
    with pytest.raises(
        ValueError, match=rf"layers: {layer} is outside .* blocks 0\.\.1 \(tiny\)\. Use layers=\[1\], say"
    ):
        tiny_vectors.at_layers([0, layer])


def test_a_layer_in_a_gap_is_refused_with_the_layers_that_there_are(provenance):
    vectors = SteeringVectors({POST.format(i): torch.ones(4) for i in (0, 2, 5)}, provenance)
    with pytest.raises(ValueError, match=r"layers: 3 has no vector .*0, 2, 5.*Use layers=\[2\], say"):
        vectors.at_layers([3])


def test_no_layer_and_an_absent_kind_of_hook_are_refused(tiny_vectors):
    with pytest.raises(ValueError, match=r"layers: the list is empty. Name at least one block"):
        tiny_vectors.at_layers([])
    with pytest.raises(
        ValueError, match=r"hook: no vector at hook_mlp_out. These vectors are at blocks\.0\.hook_resid_post"
    ):
        tiny_vectors.at_layers([0], "mlp_out")


def test_the_model_they_were_made_for_fits(tiny, tiny_vectors):
    tiny_vectors.check_fits(tiny)


def test_a_model_of_another_width_is_refused_with_both_widths(tiny, provenance):
    vectors = SteeringVectors({POST.format(0): torch.ones(48)}, provenance)
    with pytest.raises(ValueError, match=r"vectors: made for d_model 48 \(tiny\), this model has 32\. Extract vectors"):
        vectors.check_fits(tiny)


def test_a_model_without_the_hook_point_is_refused_with_the_nearest(tiny, provenance):
    vectors = SteeringVectors({POST.format(7): torch.ones(32)}, provenance)
    with pytest.raises(
        ValueError, match=r"hook point blocks\.7\.hook_resid_post is not in this model \(2 blocks\).*Near.*blocks\."
    ):
        vectors.check_fits(tiny)
    bare = SimpleNamespace(cfg=tiny.cfg, hook_dict={})
    with pytest.raises(ValueError, match=r"Nearest: none"):
        vectors.check_fits(bare)


def test_select_keeps_the_blocks_asked_for_and_the_provenance(tiny_vectors):
    chosen = tiny_vectors.select([1])
    assert chosen.hook_names == hook_names([1])
    assert torch.equal(chosen[POST.format(1)], tiny_vectors[POST.format(1)])
    assert chosen.provenance == tiny_vectors.provenance
    with pytest.raises(ValueError, match=r"layers: 4 is outside"):
        tiny_vectors.select([4])


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_file_keeps_every_bit_the_order_and_the_provenance(tmp_path, provenance, dtype):
    names = [POST.format(i) for i in (10, 2)] + ["blocks.0.hook_mlp_out"]
    strange = dataclasses.replace(provenance, behaviour='quotes " and ümläuts „ß“\n', seed=-3)
    noise = torch.Generator().manual_seed(0)
    vectors = SteeringVectors({name: torch.randn(7, generator=noise).to(dtype) for name in names}, strange)
    assert vectors.save(tmp_path / "v.safetensors") == tmp_path / "v.safetensors"
    loaded = SteeringVectors.load(tmp_path / "v.safetensors")
    assert loaded.provenance == strange
    assert set(loaded.hook_names) == set(names)
    for name in names:
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], vectors[name])


def test_slices_of_one_matrix_and_one_vector_at_many_hooks_can_be_saved(tmp_path, provenance):
    matrix = torch.arange(1.0, 13.0).reshape(3, 4)
    names = hook_names(range(5))
    vectors = dict(zip(names, [matrix[0], matrix[1], matrix[2], matrix[1], matrix.T[0, :1].expand(4)], strict=True))
    SteeringVectors(vectors, provenance).save(tmp_path / "v.safetensors")
    loaded = SteeringVectors.load(str(tmp_path / "v.safetensors"))
    assert all(torch.equal(loaded[name], vectors[name]) for name in names)


def test_a_vector_that_still_has_gradients_can_be_saved(tmp_path, provenance):
    SteeringVectors({POST.format(0): torch.ones(4, requires_grad=True)}, provenance).save(tmp_path / "v.safetensors")
    assert not SteeringVectors.load(tmp_path / "v.safetensors")[POST.format(0)].requires_grad


def test_saving_makes_the_folder_and_replaces_an_old_file(tmp_path, tiny_vectors, provenance):
    path = tmp_path / "new" / "folder" / "v.safetensors"
    SteeringVectors({POST.format(9): torch.ones(4)}, provenance).save(path)
    tiny_vectors.save(path)
    assert set(SteeringVectors.load(path).hook_names) == set(tiny_vectors.hook_names)
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, tiny_vectors):
    path = tiny_vectors.save(tmp_path / "v.safetensors")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    larger = SteeringVectors({POST.format(0): torch.ones(300_000)}, tiny_vectors.provenance)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            larger.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [OSError("no"), KeyboardInterrupt()])
def test_a_failure_before_the_rename_leaves_the_old_file_and_nothing_else(tmp_path, tiny_vectors, monkeypatch, failure):
    path = tiny_vectors.save(tmp_path / "v.safetensors")
    before = path.read_bytes()

    def fail(*_):
        raise failure

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fail)
        with pytest.raises(type(failure)):
            write_atomically(path, b"other content altogether")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path, tiny_vectors):
    (tmp_path / "plain").write_bytes(b"")
    tiny_vectors.save(tmp_path / "v.safetensors")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "v.safetensors")}
    assert len(modes) == 1


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path, tiny_vectors, share):
    path = tiny_vectors.save(tmp_path / "v.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ValueError, match=r"vectors: .*v\.safetensors is truncated or no safetensors file.*Make it again"
    ):
        SteeringVectors.load(path)


def test_an_absent_file_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vectors: there is no file .*v\.safetensors"):
        SteeringVectors.load(tmp_path / "v.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        None,
        {"format": "pt"},
        {"rt_lens": json.dumps({"schema": 1, "kind": "weight_delta"})},
        {"rt_lens": json.dumps({"schema": 99, "kind": "steering_vectors"})},
        {"rt_lens": "no json"},
        {"rt_lens": "[]"},
        {"rt_lens": json.dumps({"schema": 1, "kind": "steering_vectors", "model": "but nothing else"})},
    ],
)
def test_a_safetensors_file_of_another_kind_is_refused(tmp_path, header):
    path = tmp_path / "v.safetensors"
    save_file({POST.format(0): torch.ones(4)}, path, metadata=header)
    with pytest.raises(ValueError, match=r"vectors: .*v\.safetensors is not a file of steering vectors of schema 1"):
        SteeringVectors.load(path)


def test_a_file_that_holds_nan_is_refused(tmp_path, provenance):
    path = tmp_path / "v.safetensors"
    header = {"rt_lens": json.dumps({"schema": 1, "kind": "steering_vectors", **dataclasses.asdict(provenance)})}
    save_file({POST.format(0): torch.full((4,), float("nan"))}, path, metadata=header)
    with pytest.raises(ValueError, match=r"vectors: blocks\.0\.hook_resid_post holds NaN"):
        SteeringVectors.load(path)
