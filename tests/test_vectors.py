"""Steering vectors: whole or refused, found by their names, the same after a file as before it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import stat

import pytest
import torch
from safetensors.torch import save_file

from rt_lens.common.files import write_atomically
from rt_lens.steering.binding import add
from rt_lens.vectors.steering_vectors import Eraser, Provenance, SteeringVectors, hook_names

POST = "blocks.{}.hook_resid_post"


# Construction


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_hook_name(provenance, strange):
    vector = torch.ones(4)
    vector[2] = strange
    with pytest.raises(
        ValueError, match=r"vectors must be finite, got NaN .* at blocks\.1\.hook_resid_post\. Extract them again"
    ):
        SteeringVectors({POST.format(0): torch.ones(4), POST.format(1): vector}, provenance)


def test_no_vector_and_unlike_widths_are_refused(provenance):
    with pytest.raises(ValueError, match=r"vectors must have at least one hook point, got none"):
        SteeringVectors({}, provenance)
    with pytest.raises(
        ValueError,
        match=r"vectors must have one shape at one kind of hook point, got .*blocks\.0.*\(4,\).*blocks\.1.*\(5,\)",
    ):
        SteeringVectors({POST.format(0): torch.ones(4), POST.format(1): torch.ones(5)}, provenance)


def test_vectors_are_frozen(tiny_vectors):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_vectors.vectors = {}


# Looking up


def test_hook_names_name_blocks():
    assert hook_names([0, 18]) == ["blocks.0.hook_resid_post", "blocks.18.hook_resid_post"]
    assert hook_names([3], "resid_mid") == ["blocks.3.hook_resid_mid"]


def test_a_vector_is_found_by_its_hook_name_and_a_near_one_is_suggested(tiny_vectors):
    name = POST.format(1)
    assert tiny_vectors[name] is tiny_vectors.vectors[name]
    assert tiny_vectors.hook_names == hook_names([0, 1])
    assert tiny_vectors.d_model == 32
    with pytest.raises(
        KeyError, match=r"hook_name must be one .* got 'blocks\.1\.hook_resid_pre'. Nearest: blocks\.1\.hook_resid_post"
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
    with pytest.raises(ValueError, match=r"hook must be .*, got hook_normalized"):
        vectors.at_layers(None, "normalized")


@pytest.mark.parametrize("layer", [2, -1, 31])
def test_a_layer_outside_is_refused_with_the_blocks_and_a_fix(tiny_vectors, layer):
    with pytest.raises(
        ValueError,
        match=rf"layers contains {layer}, but these vectors are of blocks 0\.\.1 \(tiny\)\. Try layers=\[1\]",
    ):
        tiny_vectors.at_layers([0, layer])


def test_a_layer_in_a_gap_is_refused_with_the_layers_that_there_are(provenance):
    vectors = SteeringVectors({POST.format(i): torch.ones(4) for i in (0, 2, 5)}, provenance)
    with pytest.raises(ValueError, match=r"layers contains 3, but .* blocks 0, 2, 5 \(tiny\)\. Try layers=\[2\]"):
        vectors.at_layers([3])


def test_no_layer_and_an_absent_kind_of_hook_are_refused(tiny_vectors):
    with pytest.raises(ValueError, match=r"layers must name at least one block, got an empty list"):
        tiny_vectors.at_layers([])
    with pytest.raises(
        ValueError, match=r"hook must be .*, got hook_mlp_out\. These vectors are at blocks\.0\.hook_resid_post"
    ):
        tiny_vectors.at_layers([0], "mlp_out")


def test_the_model_they_were_made_for_fits(tiny, tiny_vectors):
    tiny_vectors.check_fits(tiny)


def test_a_model_of_another_width_is_refused_with_both_widths(tiny, provenance):
    vectors = SteeringVectors({POST.format(0): torch.ones(48)}, provenance)
    with pytest.raises(
        ValueError,
        match=r"vectors were extracted from a model with d_model 48 \(tiny\); this model has 32\. Extract vectors",
    ):
        vectors.check_fits(tiny)


def test_a_model_without_the_hook_point_is_refused_with_the_nearest(tiny, provenance):
    vectors = SteeringVectors({POST.format(7): torch.ones(32)}, provenance)
    with pytest.raises(
        ValueError,
        match=r"at hook points .*blocks\.7\.hook_resid_post.*2 blocks.*(Near|Did you mean).*Extract vectors",
    ):
        vectors.check_fits(tiny)


def test_select_keeps_the_blocks_asked_for_and_the_provenance(tiny_vectors):
    chosen = tiny_vectors.select([1])
    assert chosen.hook_names == hook_names([1])
    assert torch.equal(chosen[POST.format(1)], tiny_vectors[POST.format(1)])
    assert chosen.provenance == tiny_vectors.provenance
    with pytest.raises(ValueError, match=r"layers contains 4"):
        tiny_vectors.select([4])


# Arithmetic


@pytest.fixture
def other_vectors(provenance):
    noise = torch.Generator().manual_seed(7)
    theirs = dataclasses.replace(provenance, behaviour="formality", method="pca", n_pairs=8, data_sha256="1" * 64)
    return SteeringVectors({POST.format(i): torch.randn(32, generator=noise) for i in (1, 2)}, theirs)


def test_what_cancels_gives_the_baseline_back_bit_for_bit(tiny, tiny_vectors):
    tokens = tiny.to_tokens("The weather in the hills was")
    with torch.no_grad():
        baseline = tiny(tokens)
        for nothing in (tiny_vectors - tiny_vectors, 0 * tiny_vectors, tiny_vectors + -tiny_vectors):
            with tiny.hooks(fwd_hooks=add(nothing, multiplier=3.0)):
                assert torch.equal(tiny(tokens), baseline)
        with tiny.hooks(fwd_hooks=add(tiny_vectors, multiplier=3.0)):
            assert (tiny(tokens) - baseline).abs().max() > 0.1


def test_sums_and_multiples_are_those_of_the_tensors_at_shared_hook_points(tiny_vectors, other_vectors):
    mine, theirs = tiny_vectors[POST.format(1)], other_vectors[POST.format(1)]
    for found, expected in (
        (tiny_vectors + other_vectors, mine + theirs),
        (tiny_vectors - other_vectors, mine - theirs),
        (tiny_vectors - 0.5 * other_vectors, mine - 0.5 * theirs),
    ):
        assert found.hook_names == [POST.format(1)]
        torch.testing.assert_close(found[POST.format(1)], expected)
    assert torch.equal((-tiny_vectors)[POST.format(0)], -tiny_vectors[POST.format(0)])
    assert torch.equal((tiny_vectors * 2)[POST.format(0)], (2 * tiny_vectors)[POST.format(0)])


def test_a_sum_takes_the_first_ones_dtype(tiny_vectors, other_vectors):
    half = SteeringVectors({n: v.bfloat16() for n, v in other_vectors.vectors.items()}, other_vectors.provenance)
    assert (tiny_vectors + half)[POST.format(1)].dtype == torch.float32
    assert (half + tiny_vectors)[POST.format(1)].dtype == torch.bfloat16


def test_arithmetic_says_in_the_provenance_what_it_did(tiny_vectors, other_vectors):
    made = (tiny_vectors - 0.5 * other_vectors).provenance
    assert made.behaviour == "mood - (0.5 * (formality))"
    assert made.method == "mean_diff - (pca)"
    assert (made.position, made.model) == ("last", "tiny")
    assert made.n_pairs == 20
    assert made.data_sha256 == hashlib.sha256(b"0" * 64 + b"1" * 64).hexdigest()
    assert (tiny_vectors + other_vectors).provenance.behaviour == "mood + (formality)"
    assert (-tiny_vectors).provenance.behaviour == "-(mood)"
    same = (tiny_vectors - tiny_vectors).provenance
    assert (same.n_pairs, same.data_sha256, same.method) == (12, "0" * 64, "mean_diff")


def test_vectors_with_nothing_in_common_are_not_added(tiny_vectors, other_vectors, provenance):
    for combine in (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a.cosine(b)):
        with pytest.raises(ValueError, match=r"vectors must share a hook point, got blocks\.0.* and blocks\.2"):
            combine(tiny_vectors, other_vectors.select([2]))
        with pytest.raises(ValueError, match=r"got \(32,\) \(tiny\) and \(48,\) \(tiny\). Extract both from one"):
            combine(tiny_vectors, SteeringVectors({POST.format(1): torch.ones(48)}, provenance))


def test_cosines_are_of_shared_hook_points_and_of_all_heads_together(tiny_vectors, other_vectors, provenance):
    found = tiny_vectors.cosine(other_vectors)
    direct = torch.nn.functional.cosine_similarity(tiny_vectors[POST.format(1)], other_vectors[POST.format(1)], dim=0)
    assert found == {POST.format(1): pytest.approx(float(direct), abs=1e-6)}
    assert list((-2 * tiny_vectors).cosine(tiny_vectors).values()) == pytest.approx([-1, -1])
    assert tiny_vectors.cosine(0 * tiny_vectors) == dict.fromkeys(tiny_vectors.hook_names, 0)
    heads = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    first, second = (SteeringVectors({"blocks.0.attn.hook_z": part}, provenance) for part in heads)
    flat = torch.nn.functional.cosine_similarity(heads[0].flatten(), heads[1].flatten(), dim=0)
    assert first.cosine(second)["blocks.0.attn.hook_z"] == pytest.approx(float(flat), abs=1e-6)


def test_unit_vectors_have_length_1_in_each_head_and_zeros_stay(provenance):
    heads = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [0.0], [9.0], [0.1]])
    vectors = SteeringVectors({"blocks.0.attn.hook_z": heads, POST.format(0): torch.full((4,), 3.0)}, provenance)
    unit = vectors.unit()
    torch.testing.assert_close(
        unit["blocks.0.attn.hook_z"].norm(dim=-1), torch.tensor([1.0, 0.0, 1.0, 1.0]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(unit[POST.format(0)], torch.full((4,), 0.5))
    assert unit.provenance.method == "mean_diff, unit norm"


def test_one_blocks_vector_everywhere_is_at_every_point_of_the_stream(tiny, tiny_vectors):
    spread = tiny_vectors.everywhere(tiny, 1)
    assert set(spread.hook_names) == {
        f"blocks.{block}.hook_resid_{kind}" for block in (0, 1) for kind in ("pre", "mid", "post")
    }
    assert all(torch.equal(spread[name], tiny_vectors[POST.format(1)]) for name in spread.hook_names)
    assert list(spread.at_layers([1], "any")) == [f"blocks.1.hook_resid_{kind}" for kind in ("pre", "mid", "post")]
    assert list(spread.at_layers([0])) == [POST.format(0)]
    assert set(spread.at_layers(None, "any")) == set(spread.hook_names)


def test_a_selection_keeps_the_erasers_of_its_blocks(provenance):
    parts = Eraser(torch.ones(4), torch.ones(4), torch.zeros(4))
    names = hook_names([0, 1])
    vectors = SteeringVectors(dict.fromkeys(names, torch.ones(4)), provenance, dict.fromkeys(names, parts))
    assert vectors.select([1]).erasers == {names[1]: parts}


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
        ValueError, match=r"vectors must be a complete safetensors file, got .*v\.safetensors.*Write the file again"
    ):
        SteeringVectors.load(path)


def test_an_absent_file_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vectors must be a file, got .*v\.safetensors, which does not exist"):
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
    with pytest.raises(ValueError, match=r"path must be a file of steering vectors of schema 1, got .*v\.safetensors"):
        SteeringVectors.load(path)


def test_a_file_that_holds_nan_is_refused(tmp_path, provenance):
    path = tmp_path / "v.safetensors"
    header = {"rt_lens": json.dumps({"schema": 1, "kind": "steering_vectors", **dataclasses.asdict(provenance)})}
    save_file({POST.format(0): torch.full((4,), float("nan"))}, path, metadata=header)
    with pytest.raises(ValueError, match=r"vectors must be finite, got NaN .* at blocks\.0\.hook_resid_post"):
        SteeringVectors.load(path)


def test_vectors_come_back_in_the_order_of_the_forward_pass(provenance, tmp_path):
    names = [f"blocks.{layer}.hook_{kind}" for layer in (2, 10) for kind in ("attn_out", "mlp_out", "resid_post")]
    saved = SteeringVectors({name: torch.ones(4) * place for place, name in enumerate(names)}, provenance)
    saved.save(tmp_path / "v.safetensors")
    found = SteeringVectors.load(tmp_path / "v.safetensors")
    assert found.hook_names == names
    assert all(torch.equal(found[name], saved[name]) for name in names)


def test_the_models_type_is_kept_and_files_from_before_are_of_float32(tiny_vectors, tmp_path):
    halves = SteeringVectors(tiny_vectors.vectors, dataclasses.replace(tiny_vectors.provenance, dtype="bfloat16"))
    assert SteeringVectors.load(halves.save(tmp_path / "new.safetensors")).provenance.dtype == "bfloat16"
    assert halves.described()["dtype"] == "bfloat16"
    told = tiny_vectors.provenance.to_json()
    del told["dtype"]
    assert Provenance.from_json(told) == tiny_vectors.provenance
    assert Provenance.from_json(told).dtype == "float32"
    assert tiny_vectors.described().keys() == {*told, "sha256"}  # so that what was begun before goes on
