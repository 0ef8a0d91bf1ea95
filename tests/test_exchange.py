"""Other tools' files: the same numbers at the same blocks, both ways, and no faith in what a stranger's file says."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file

from rt_lens.models.load import load_model
from rt_lens.steering.binding import add
from rt_lens.vectors.interop.gguf import load_gguf, save_gguf
from rt_lens.vectors.interop.tensors import import_vectors
from rt_lens.vectors.steering_vectors import Eraser, SteeringVectors, hook_names

FOREIGN = Path(__file__).parent / "foreign"
POST = "blocks.{}.hook_resid_post"
LAYER_TYPES = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}


@pytest.fixture
def later_vectors(provenance):
    noise = torch.Generator().manual_seed(3)
    names = hook_names([10, 1, 2])
    return SteeringVectors({name: torch.randn(32, generator=noise) for name in names}, provenance)


@pytest.fixture(scope="module")
def foreign_model():
    return load_model(str(FOREIGN / "model"))


def write_gguf(path, rows, architecture="controlvector", **keys):
    """A control vector as another tool writes it."""
    writer = GGUFWriter(path, architecture)
    for key, text in keys.items():
        writer.add_string(key.replace("__", "."), text)
    for name, row in rows.items():
        writer.add_tensor(name, np.asarray(row))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def row(value=1.0, width=4):
    return np.full(width, value, dtype=np.float32)


def ones(width=4):
    return torch.ones(width)


def logits_under(model, hooks, tokens):
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return model(tokens)


# What the other tools wrote themselves, and what their models then did


def test_repengs_file_holds_repengs_directions_bit_for_bit():
    vectors, kept = load_gguf(FOREIGN / "repeng.gguf"), load_file(FOREIGN / "repeng.safetensors")
    assert vectors.hook_names == hook_names([1, 2, 3])
    for layer in (1, 2, 3):
        assert torch.equal(vectors[POST.format(layer)], kept[f"direction.{layer}"])
    assert vectors.provenance.model == "llama"  # repeng's hint
    assert (vectors.provenance.behaviour, vectors.provenance.n_pairs) == ("unknown", 0)


@pytest.mark.parametrize("layers", [[1], [2], [3], [1, 2, 3]])
def test_adding_repengs_vector_gives_the_logits_of_repengs_controlled_model(foreign_model, layers):
    vectors, kept = load_gguf(FOREIGN / "repeng.gguf"), load_file(FOREIGN / "repeng.safetensors")
    theirs, coefficient = kept["logits." + "_".join(map(str, layers))], kept["coefficient"].item()
    ours = logits_under(foreign_model, add(vectors, layers, coefficient), kept["input_ids"])
    assert (ours - theirs).abs().max() < 1e-4
    assert (kept["logits.plain"] - theirs).abs().max() > 0.5


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_block_too_early_or_too_late_gives_other_logits(foreign_model, layer):
    vectors, kept = load_gguf(FOREIGN / "repeng.gguf"), load_file(FOREIGN / "repeng.safetensors")
    for wrong in {layer - 1, layer + 1} - {4}:
        moved = SteeringVectors({POST.format(wrong): vectors[POST.format(layer)]}, vectors.provenance)
        hooks = add(moved, multiplier=kept["coefficient"].item())
        assert (logits_under(foreign_model, hooks, kept["input_ids"]) - kept[f"logits.{layer}"]).abs().max() > 0.3


@pytest.mark.parametrize("kind", LAYER_TYPES)
@pytest.mark.parametrize("layer", range(4))
def test_adding_steering_vectors_gives_the_logits_under_its_own_patch(foreign_model, kind, layer):
    kept = load_file(FOREIGN / "steering_vectors.safetensors")
    activations = torch.load(FOREIGN / f"steering_vectors_{kind}.pt", weights_only=True)
    theirs = kept[f"logits.{kind}.{layer}"]
    as_object = import_vectors(SimpleNamespace(layer_activations=activations, layer_type=kind))
    as_file = import_vectors(FOREIGN / f"steering_vectors_{kind}.pt", hook=LAYER_TYPES[kind])
    for vectors in (as_object, as_file):
        hooks = add(vectors, [layer], kept["multiplier"].item(), hook=LAYER_TYPES[kind])
        assert (logits_under(foreign_model, hooks, kept["input_ids"]) - theirs).abs().max() < 1e-4
    assert (kept["logits.plain"] - theirs).abs().max() > 0.5


# GGUF, out and in


def test_a_gguf_file_keeps_every_bit_and_the_provenance(tmp_path, later_vectors):
    strange = dataclasses.replace(
        later_vectors.provenance, behaviour='quotes " and ümläuts „ß“\n', seed=-3, position_tokens=("a", "é")
    )
    vectors = SteeringVectors(later_vectors.vectors, strange)
    assert save_gguf(vectors, tmp_path / "new" / "v.gguf") == tmp_path / "new" / "v.gguf"
    for loaded in (load_gguf(tmp_path / "new" / "v.gguf"), import_vectors(str(tmp_path / "new" / "v.gguf"))):
        assert loaded.provenance == strange
        assert loaded.hook_names == hook_names([1, 2, 10])
        assert all(torch.equal(loaded[name], vectors[name]) for name in vectors.hook_names)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["v.gguf"]


def test_a_gguf_file_is_what_repeng_and_llama_cpp_look_for(tmp_path, later_vectors):
    reader = GGUFReader(save_gguf(later_vectors, tmp_path / "v.gguf"))
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "tiny"
    assert reader.get_field("controlvector.layer_count").contents() == 3
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2", "direction.10"]
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    assert [tensor.shape.tolist() for tensor in reader.tensors] == [[32]] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_saved_where_float32_holds_them(tmp_path, provenance, dtype):
    exact = torch.tensor([1.5, -0.25, 3.0]).to(dtype)
    save_gguf(SteeringVectors({POST.format(1): exact}, provenance), tmp_path / "v.gguf")
    assert torch.equal(load_gguf(tmp_path / "v.gguf")[POST.format(1)].to(dtype), exact)


def test_a_vector_that_float32_would_round_is_refused(tmp_path, provenance):
    vectors = SteeringVectors({POST.format(1): torch.tensor([0.1], dtype=torch.float64)}, provenance)
    with pytest.raises(
        ValueError,
        match=r"vectors would lose precision when stored as float32.*blocks\.1.*torch\.float64.*vector\.float\(\)",
    ):
        save_gguf(vectors, tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


def test_a_vector_with_gradients_and_a_slice_can_be_saved(tmp_path, provenance):
    matrix = torch.arange(1.0, 13.0).reshape(3, 4).requires_grad_()
    save_gguf(SteeringVectors({POST.format(1): matrix[:, 1]}, provenance), tmp_path / "v.gguf")
    assert load_gguf(tmp_path / "v.gguf")[POST.format(1)].tolist() == [2.0, 6.0, 10.0]


@pytest.mark.parametrize(
    ("layers", "fix"),
    [([0, 1, 2], r"vectors\.select\(range\(1, 3\)\)"), ([0, 2, 5], r"select\(\[2, 5\]\)"), ([0], "a later block")],
)
def test_block_0_is_refused_with_a_fix(tmp_path, provenance, layers, fix):
    vectors = SteeringVectors({POST.format(layer): ones() for layer in layers}, provenance)
    with pytest.raises(ValueError, match=rf"vectors must not include layer 0, which llama\.cpp cannot steer.*{fix}"):
        save_gguf(vectors, tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["blocks.1.hook_mlp_out", "blocks.1.hook_resid_pre", "hook_embed"])
def test_another_hook_point_is_refused_with_a_fix(tmp_path, provenance, name):
    vectors = SteeringVectors({POST.format(1): ones(), name: ones()}, provenance)
    with pytest.raises(
        ValueError,
        match=rf"vectors must have one row per block, at hook_resid_post, got {name}\. Use vectors\.select\(layers\)",
    ):
        save_gguf(vectors, tmp_path / "v.gguf")


def test_erasers_are_refused_with_a_fix(tmp_path, later_vectors):
    eraser = Eraser(*(torch.ones(32) for _ in range(3)))
    vectors = SteeringVectors(later_vectors.vectors, later_vectors.provenance, {POST.format(1): eraser})
    with pytest.raises(ValueError, match=r"vectors must have no erasers.*Use 1 \* vectors to drop them"):
        save_gguf(vectors, tmp_path / "v.gguf")
    save_gguf(1 * vectors, tmp_path / "v.gguf")


def test_a_failure_before_the_rename_leaves_the_old_gguf_file(tmp_path, later_vectors, monkeypatch):
    path = save_gguf(later_vectors, tmp_path / "v.gguf")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no"):
            save_gguf(later_vectors.select([1]), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_foreign_gguf_may_steer_block_0_and_names_what_it_knows(tmp_path):
    path = write_gguf(tmp_path / "v.gguf", {"direction.2": row(2.0), "direction.0": row(0.5)})
    vectors = import_vectors(path, model="a", behaviour="joy")
    assert vectors.hook_names == hook_names([0, 2])
    assert vectors[POST.format(2)].tolist() == [2.0] * 4
    assert (vectors.provenance.model, vectors.provenance.behaviour) == ("a", "joy")
    assert (vectors.provenance.method, vectors.provenance.data_sha256) == ("unknown", "unknown")
    hinted = write_gguf(tmp_path / "h.gguf", {"direction.1": row()}, controlvector__model_hint="mistral")
    assert load_gguf(hinted).provenance.model == "mistral"
    assert import_vectors(hinted, model="mine").provenance.model == "mine"
    assert import_vectors(hinted, offset=2).hook_names == hook_names([3])


def test_a_foreign_gguf_in_another_float_type_is_read_as_float32(tmp_path):
    rows = {"direction.1": row(0.5).astype(np.float16), "direction.2": row(0.25).astype(np.float64)}
    vectors = load_gguf(write_gguf(tmp_path / "v.gguf", rows))
    assert {vector.dtype for vector in vectors.vectors.values()} == {torch.float32}
    assert vectors[POST.format(2)].tolist() == [0.25] * 4


def test_our_own_gguf_and_hook_names_take_no_offset_and_gguf_no_hook(tmp_path, later_vectors):
    path = save_gguf(later_vectors, tmp_path / "v.gguf")
    with pytest.raises(
        ValueError, match=r"offset must be 0 for .*v\.gguf, which names hook points and not layers, got 1"
    ):
        import_vectors(path, offset=1)
    with pytest.raises(ValueError, match=r"hook must be resid_post for a GGUF control vector, .*got mlp_out"):
        import_vectors(path, hook="mlp_out")
    with pytest.raises(ValueError, match=r"offset must be 0 .*got 1"):
        import_vectors(later_vectors.save(tmp_path / "v.safetensors"), offset=1)
    torch.save({POST.format(1): ones()}, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=r"offset must be 0 .*got -1"):
        import_vectors(tmp_path / "v.pt", offset=-1)


@pytest.mark.parametrize("share", [0.0, 0.002, 0.02, 0.1, 0.3, 0.6, 0.99])
def test_a_truncated_gguf_is_refused_by_name(tmp_path, later_vectors, share):
    path = save_gguf(later_vectors, tmp_path / "v.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ValueError, match=r"source must be a whole GGUF file, got .*v\.gguf, which is truncated.*Save it again"
    ):
        load_gguf(path)


def test_a_gguf_is_refused_or_read_whole_at_whatever_byte_it_is_cut(tmp_path, provenance):
    path = save_gguf(SteeringVectors({POST.format(1): ones()}, provenance), tmp_path / "v.gguf")
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        if len(content) - length <= 16:  # the padding behind the last row
            assert load_gguf(path)[POST.format(1)].tolist() == [1.0] * 4
        else:
            with pytest.raises(
                ValueError, match=r"v\.gguf, which is truncated or of another kind \((ValueError|IndexError)"
            ):
                load_gguf(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"direction.x": row()}, r"must hold direction\.1, .*got 'direction\.x' of type F32"),
        ({"direction.1": row(), "token_embd.weight": row()}, r"got 'token_embd\.weight'"),
        ({"direction.../../etc/passwd": row()}, r"got 'direction\.\.\./\.\./etc/passwd'"),
        ({"direction.1": np.ones(4, np.int32)}, r"got 'direction\.1' of type I32"),
        ({"direction.01": row()}, r"got 'direction\.01'"),
        ({"direction.-1": row()}, r"number its layers from 0, got -1, which counts from the end"),
        ({"direction.999999999": row()}, r"999999999 .* must be a block in 0\.\.1023, got block 999999999"),
        ({"direction.1": np.ones((2, 3), np.float32)}, r"1 in .* must have shape \[d_model\], got \(3, 2\)"),
        (
            {"direction.1": row(), "direction.2": row(width=5)},
            r"must hold vectors of one width, .*got \(4,\) for 1 and \(5,\) for 2",
        ),
        ({"direction.1": row(float("nan"))}, r"1 in .* must be finite"),
        ({"direction.1": row(float("inf"))}, r"1 in .* must be finite"),
        ({"direction.1": np.full(4, 1e300)}, r"1 in .* must be finite"),
        ({}, r"must hold 1 to 4096 entries, .*got 0"),
    ],
)
def test_a_gguf_that_is_no_control_vector_is_refused(tmp_path, rows, message):
    path = write_gguf(tmp_path / "v.gguf", rows)
    with pytest.raises(ValueError, match=rf"{message}"):
        load_gguf(path)


def test_a_gguf_model_is_refused_by_its_architecture(tmp_path):
    path = write_gguf(tmp_path / "v.gguf", {"direction.1": row()}, architecture="llama")
    with pytest.raises(ValueError, match=r"path must be a GGUF control vector, got .*'llama'.*load_model"):
        load_gguf(path)


@pytest.mark.parametrize(
    "stored",
    [
        "no json",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps({"schema": 9, "kind": "steering_vectors"}),
        json.dumps({"schema": 1}),
        json.dumps({"schema": 1, "kind": "steering_vectors", "model": "but nothing else"}),
    ],
    ids=["text", "list", "empty", "deep", "schema", "kind", "fields"],
)
def test_a_gguf_with_a_strange_provenance_is_refused(tmp_path, stored):
    path = write_gguf(tmp_path / "v.gguf", {"direction.1": row()}, rt_lens__provenance=stored)
    with pytest.raises(ValueError, match=r"path must be a file with a provenance of schema 1, got .*v\.gguf"):
        load_gguf(path)


def gguf_head(n_tensors, n_keys):
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys)


def gguf_text(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        gguf_head(2**62, 0),
        gguf_head(0, 2**62),
        gguf_head(0, 1) + struct.pack("<Q", 2**63) + b"key",
        gguf_head(0, 1) + gguf_text(b"a") + struct.pack("<IIQ", 9, 0, 2**60),  # an endless array of bytes
        gguf_head(0, 1) + gguf_text(b"a") + struct.pack("<IIQ", 9, 8, 2**60),
        gguf_head(0, 1) + gguf_text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000,
        gguf_head(1, 0) + gguf_text(b"direction.1") + struct.pack("<IQIQ", 1, 2**40, 0, 0) + bytes(64),
        gguf_head(1, 0) + gguf_text(b"direction.1") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0) + bytes(64),
        gguf_head(1, 0) + gguf_text(b"direction.1") + struct.pack("<IQIQ", 1, 4, 0, 2**63) + bytes(64),
        gguf_head(1, 0) + gguf_text(b"direction.1") + struct.pack("<I", 2**31) + bytes(64),
        gguf_head(1, 0) + gguf_text(b"direction.1") + struct.pack("<IQIQ", 1, 4, 77, 0) + bytes(64),
        gguf_head(1, 0) + gguf_text(b"\xff\xfe") + struct.pack("<IQIQ", 1, 4, 0, 0) + bytes(64),
        b"GGUF" + struct.pack("<I", 99) + bytes(64),
        b"not a gguf file at all",
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_hostile_gguf_is_refused_at_once(tmp_path, content):
    (tmp_path / "v.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"source must be a whole GGUF file, got .*v\.gguf"):
        load_gguf(tmp_path / "v.gguf")


# Plain files of tensors


def save_as(path, entries):
    """The same entries under each ending."""
    if path.suffix == ".safetensors":
        save_file({str(key): torch.as_tensor(value) for key, value in entries.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{str(key): np.asarray(value) for key, value in entries.items()})
    else:
        torch.save({key: torch.as_tensor(value) for key, value in entries.items()}, path)
    return path


ENDINGS = ["safetensors", "pt", "pth", "npz"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_layer_numbers_become_hook_names(tmp_path, ending):
    path = save_as(tmp_path / f"v.{ending}", {10: row(10.0), 2: row(2.0), "3": row(3.0)})
    vectors = import_vectors(path, model="m", behaviour="b")
    assert vectors.hook_names == hook_names([2, 3, 10])
    assert vectors[POST.format(10)].tolist() == [10.0] * 4
    assert (vectors.provenance.model, vectors.provenance.behaviour) == ("m", "b")
    assert import_vectors(str(path), hook="mlp_out", offset=1).hook_names == hook_names([3, 4, 11], "mlp_out")


@pytest.mark.parametrize("ending", ENDINGS)
def test_hook_names_stay_what_they_are(tmp_path, ending):
    names = ["blocks.0.hook_resid_mid", "blocks.2.hook_mlp_out", "blocks.11.hook_resid_post"]
    entries = {name: row(number + 1.0) for number, name in enumerate(names)}
    entries["blocks.12.attn.hook_z"] = np.arange(6.0).reshape(2, 3)
    vectors = import_vectors(save_as(tmp_path / f"v.{ending}", entries))
    assert vectors.hook_names == list(entries)
    assert vectors["blocks.2.hook_mlp_out"].tolist() == [2.0] * 4
    assert vectors.vectors["blocks.12.attn.hook_z"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_layers_heads_are_read_at_hook_z_and_nowhere_else(tmp_path, ending):
    path = save_as(tmp_path / f"v.{ending}", {1: np.ones((2, 3), np.float32)})
    assert import_vectors(path, hook="z").vectors["blocks.1.attn.hook_z"].shape == (2, 3)
    with pytest.raises(ValueError, match=r"1.* in .* must have shape \[d_model\], got \(2, 3\)"):
        import_vectors(path)
    flat = save_as(tmp_path / f"w.{ending}", {1: row()})
    with pytest.raises(ValueError, match=r"1.* in .* must have shape \[head, d_head\], got \(4,\)"):
        import_vectors(flat, hook="z")


def test_one_matrix_is_a_row_per_layer(tmp_path):
    matrix = torch.arange(1.0, 13.0).reshape(3, 4)
    torch.save(matrix, tmp_path / "v.pt")
    np.savez(tmp_path / "v.npz", vectors=matrix.numpy())
    np.savez_compressed(tmp_path / "z.npz", matrix.numpy())
    for name in ("v.pt", "v.npz", "z.npz"):
        vectors = import_vectors(tmp_path / name)
        assert vectors.hook_names == hook_names(range(3))
        assert vectors[POST.format(1)].tolist() == [5.0, 6.0, 7.0, 8.0]
    torch.save(torch.ones(3, 2, 5), tmp_path / "heads.pt")
    assert import_vectors(tmp_path / "heads.pt", hook="z").vectors["blocks.2.attn.hook_z"].shape == (2, 5)


def test_counting_the_embedding_as_0_moves_every_layer_and_keeps_the_embedding(tmp_path):
    torch.save(torch.arange(1.0, 13.0).reshape(3, 4), tmp_path / "v.pt")
    vectors = import_vectors(tmp_path / "v.pt", offset=-1)
    assert set(vectors.hook_names) == {"blocks.0.hook_resid_pre", *hook_names([0, 1])}
    assert vectors["blocks.0.hook_resid_pre"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert vectors[POST.format(0)].tolist() == [5.0, 6.0, 7.0, 8.0]
    with pytest.raises(ValueError, match=r"0 in .* must be a block in 0\.\.1023, got block -1 \(offset -1\)"):
        import_vectors(tmp_path / "v.pt", offset=-1, hook="mlp_out")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_float_type_comes_as_float32_with_its_values(tmp_path, ending, dtype):
    vectors = import_vectors(save_as(tmp_path / f"v.{ending}", {1: np.array([0.1, -2.5], dtype)}))
    assert vectors[POST.format(1)].dtype == torch.float32
    assert torch.equal(vectors[POST.format(1)], torch.from_numpy(np.array([0.1, -2.5], dtype)).float())


def test_parameters_and_views_come_as_own_copies(tmp_path):
    torch.save({1: torch.nn.Parameter(ones()), 2: torch.ones(1).expand(4)}, tmp_path / "v.pt")
    vectors = import_vectors(tmp_path / "v.pt")
    assert not vectors[POST.format(1)].requires_grad
    assert vectors[POST.format(2)].is_contiguous()
    original = ones()
    imported = import_vectors(SimpleNamespace(layer_activations={1: original}, layer_type="decoder_block"))
    original.mul_(5)
    assert imported[POST.format(1)].tolist() == [1.0] * 4


def test_our_own_safetensors_is_read_as_such(tmp_path, tiny_vectors):
    vectors = import_vectors(tiny_vectors.save(tmp_path / "v.safetensors"), model="not this")
    assert vectors.provenance == tiny_vectors.provenance
    assert all(torch.equal(vectors[name], tiny_vectors[name]) for name in tiny_vectors.hook_names)


def test_rows_of_zeros_stay(tmp_path, provenance):
    torch.save(torch.eye(3), tmp_path / "v.pt")
    assert import_vectors(tmp_path / "v.pt").hook_names == hook_names(range(3))
    vectors = SteeringVectors({POST.format(1): ones(), POST.format(2): 0 * ones()}, provenance)
    assert load_gguf(save_gguf(vectors, tmp_path / "v.gguf"))[POST.format(2)].tolist() == [0.0] * 4


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"../../etc/passwd": row()}, r"by layer number or hook name, got '\.\./\.\./etc/passwd'\. Rename"),
        ({"blocks/1/hook_resid_post": row()}, r"must name its entries by layer number or hook name"),
        ({"blocks.1.hook_resid_post\n": row()}, r"must name its entries by layer number or hook name"),
        ({"model.layers.3": row()}, r"by layer number or hook name, got 'model\.layers\.3'"),
        ({"\u0661": row()}, r"by layer number or hook name"),
        ({"01": row()}, r"by layer number or hook name"),
        ({"1.0": row()}, r"by layer number or hook name"),
        ({"hook_embed": row()}, r"by layer number or hook name"),
        ({"model_" + "a" * 500: row()}, r"by layer number or hook name, got 'model_a{50,60}"),
        ({-1: row()}, r"number its layers from 0, got -1, which counts from the end"),
        ({999_999_999: row()}, r"999999999.* must be a block in 0\.\.1023, got block 999999999"),
        ({10**9: row()}, r"by layer number or hook name, got '?1000000000"),
        ({"blocks.99999.hook_resid_post": row()}, r"got block 99999 "),
        ({"3": row(), "blocks.3.hook_resid_post": row()}, r"which are both blocks\.3\.hook_resid_post"),
        ({1: np.ones((2, 3), np.float32), 2: row()}, r"1.* in .* must have shape \[d_model\], got \(2, 3\)"),
        ({1: np.float32(1.0)}, r"1.* must have shape \[d_model\], got \(\)"),
        ({1: np.ones(0, np.float32)}, r"1.* must have shape \[d_model\], got \(0,\)"),
        ({1: row(), 2: row(width=5)}, r"must hold vectors of one width, .*got \(4,\) for '?1'? and \(5,\) for '?2'?"),
        ({1: np.arange(4)}, r"1.* in .* must be .*floating numbers, got .*int64"),
        ({1: np.ones(4, bool)}, r"1.* in .* must be .*floating numbers, got .*bool"),
        ({1: np.ones(4, np.complex64)}, r"1.* in .* must be .*floating numbers, got .*complex64"),
        ({1: row(), 2: row(float("nan"))}, r"2.* in .* must be finite"),
        ({1: row(-float("inf"))}, r"1.* in .* must be finite"),
        ({1: np.full(4, 1e300)}, r"1.* in .* must be finite"),
        ({layer: row() for layer in range(5000)}, r"must hold 1 to 4096 entries, .*got 5000"),
    ],
)
def test_entries_that_are_no_vectors_are_refused(tmp_path, ending, entries, message):
    path = save_as(tmp_path / f"v.{ending}", entries)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        import_vectors(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_file_is_refused_by_name(tmp_path, ending, share):
    path = save_as(tmp_path / f"v.{ending}", {layer: row(width=64) for layer in range(5)})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ValueError, match=rf"source must be a whole \w+ file, got .*v\.{ending}, which is truncated .*Save it again"
    ):
        import_vectors(path)


@pytest.mark.parametrize("ending", ["gguf", *ENDINGS])
def test_a_file_of_another_kind_and_an_absent_one_are_refused_by_name(tmp_path, ending):
    (tmp_path / f"v.{ending}").write_bytes(b"hello \x1b[31m there, this is a text and nothing else\n" * 9)
    with pytest.raises(ValueError, match=rf"source must be a whole \w+ file, got .*v\.{ending}") as caught:
        import_vectors(tmp_path / f"v.{ending}")
    assert "\x1b" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=rf"source must be an existing file, got .*w\.{ending}"):
        import_vectors(tmp_path / f"w.{ending}")
    with pytest.raises(FileNotFoundError, match=r"source must be an existing file"):
        import_vectors(tmp_path / f"w.{ending}" / f"x.{ending}")


@pytest.mark.parametrize("name", ["v.bin", "v", "v.pkl", "v.npy", "gguf"])
def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"source must be a file that ends in \.gguf, .*, \.npz or \.json, got .* ends in '.*'",
    ):
        import_vectors(tmp_path / name)


@pytest.mark.parametrize("hook", ["../x", "resid/post", "a.b.hook_c", "any", "", "Resid"])
def test_a_hook_that_is_no_kind_of_hook_point_is_refused(hook):
    with pytest.raises(ValueError, match=r"hook must be a kind such as resid_post, attn_out, mlp_out or z, got '.*'"):
        import_vectors(FOREIGN / "steering_vectors_mlp.pt", hook=hook)


# Pickles


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class Vector:
    """A class as other tools pickle it."""

    def __init__(self):
        self.layer_activations = {1: ones()}


@pytest.mark.parametrize("wrapped", [lambda it: it, lambda it: {1: it}], ids=["bare", "in_a_dict"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path, wrapped):
    mark = tmp_path / "mark"
    torch.save(wrapped(Touches(mark)), tmp_path / "v.pt")
    with pytest.raises(
        ValueError,
        match=r"source must hold tensors only, got .*v\.pt with Python objects \(\S+\).*torch\.save\(vector\.layer_act",
    ):
        import_vectors(tmp_path / "v.pt")
    (tmp_path / "w.pt").write_bytes(pickle.dumps(wrapped(Touches(mark))))
    with pytest.raises(ValueError, match=r"source must .*w\.pt(, which is truncated| with Python objects)"):
        import_vectors(tmp_path / "w.pt")
    assert not mark.exists()
    torch.load(tmp_path / "v.pt", weights_only=False)
    assert mark.exists()  # there was something to refuse


def test_a_pickled_class_is_refused_with_a_fix(tmp_path):
    torch.save(Vector(), tmp_path / "v.pt")
    with pytest.raises(
        ValueError, match=r"Python objects \(.*Vector\).*torch\.save\(vector\.layer_activations, path\)"
    ):
        import_vectors(tmp_path / "v.pt")


def test_object_arrays_are_refused_and_not_unpickled(tmp_path):
    mark = tmp_path / "mark"
    np.savez(tmp_path / "v.npz", **{"1": np.array([Touches(mark)], dtype=object)})
    with pytest.raises(ValueError, match=r"'1' in .* must be an array of floating numbers, got object"):
        import_vectors(tmp_path / "v.npz")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            ones(),
            r"must hold a dict from layer to tensor, or one tensor \[layer, d_model\], got a tensor of shape \(4,\)",
        ),
        (torch.ones(2, 2, 2), r"0 in .* must have shape \[d_model\], got \(2, 2\)"),
        (torch.ones(5000, 1), r"got 5000"),
        (torch.ones(1, 1).expand(10**12, 1), r"got 1000000000000"),
        (torch.ones(0, 4), r"must hold 1 to 4096 entries, .*got 0"),
        ({}, r"must hold 1 to 4096 entries, .*got 0"),
        ([ones()], r"got <class 'list'>"),
        ({1: {"a": ones()}}, r"1 in .* must be a plain tensor of floating numbers, got <class 'dict'>"),
        ({1: [1.0, 2.0]}, r"1 in .* must be a plain tensor of floating numbers, got <class 'list'>"),
        ({True: ones()}, r"by layer number or hook name, got True"),
        ({1.0: ones()}, r"by layer number or hook name, got 1\.0"),
        ({None: ones()}, r"by layer number or hook name, got None"),
        ({(1, 2): ones()}, r"by layer number or hook name, got \(1, 2\)"),
        ({1: ones(), "1": ones()}, r"got 1 and '1', which are both blocks\.1"),
        ({1: torch.ones(4, device="meta")}, r"1 in .* must be a plain tensor of floating numbers"),
        ({1: ones().to_sparse()}, r"1 in .* got a torch\.sparse_coo tensor"),
        ({1: torch.ones(1).expand(10**12)}, r"must hold at most 134217728 numbers"),
    ],
)
def test_a_torch_file_of_anything_else_is_refused(tmp_path, stored, message):
    torch.save(stored, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        import_vectors(tmp_path / "v.pt")


@pytest.mark.parametrize(
    "make",
    [lambda: torch.nested.nested_tensor([ones()]), lambda: torch.quantize_per_tensor(ones(), 0.1, 0, torch.qint8)],
    ids=["nested", "quantised"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_of_a_strange_kind_is_refused(tmp_path, make):
    torch.save({1: make()}, tmp_path / "v.pt")
    with pytest.raises(
        ValueError, match=r"1 in .* must be a plain tensor of floating numbers, got a torch\.strided tensor of "
    ):
        import_vectors(tmp_path / "v.pt")


# npz archives


def npy(header, version=(1, 0), content=b""):
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text + content


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"), "must hold at most"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,)}"), "a whole npz file, .*truncated"),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4,)}", content=bytes(3)),
            "a whole npz file, .*truncated",
        ),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4,)}", (2, 0), bytes(16)),
            "must be an array of plain numbers",
        ),
        (
            npy("{'descr': '|O', 'fortran_order': False, 'shape': (4,)}"),
            "must be an array of floating numbers, got object",
        ),
        (npy("__import__('os').abort()"), "a whole npz file, .*truncated"),
        (b"no array", "a whole npz file, .*truncated"),
        (b"", "a whole npz file, .*truncated"),
    ],
)
def test_a_hostile_array_is_refused(tmp_path, member, message):
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("1.npy", member)
    with pytest.raises(ValueError, match=rf"{message}"):
        import_vectors(tmp_path / "v.npz")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10**12, 4), "got 1000000000000"),
        ((2, 10**12), "must hold at most"),
        ((0, 4), "must hold 1 to 4096 entries, .*got 0"),
        ((2, 0), r"0 in .* must have shape \[d_model\], got \(0,\)"),
        ((2, 2, 2), r"0 in .* must have shape \[d_model\], got \(2, 2\)"),
    ],
)
def test_a_hostile_matrix_is_refused(tmp_path, shape, message):
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("arr_0.npy", npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}"))
    with pytest.raises(ValueError, match=rf"{message}"):
        import_vectors(tmp_path / "v.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_without_arrays_or_with_two_of_one_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "v.npz", "w"):
        pass
    with pytest.raises(ValueError, match=r"must hold 1 to 4096 entries, .*got 0"):
        import_vectors(tmp_path / "v.npz")
    np.savez(tmp_path / "w.npz", **{"1": row()})
    with zipfile.ZipFile(tmp_path / "w.npz", "a") as archive:
        archive.writestr("1.npy", archive.read("1.npy"))
    with pytest.raises(ValueError, match=r"got two entries of one name"):
        import_vectors(tmp_path / "w.npz")


# Objects


@pytest.mark.parametrize("kind", ["input_layernorm", "post_attention_layernorm", "other"])
def test_a_layer_type_without_a_hook_point_is_refused(kind):
    vector = SimpleNamespace(layer_activations={1: ones()}, layer_type=kind)
    with pytest.raises(
        ValueError, match=rf"source must be a vector of layer_type decoder_block, .*got '{kind}'.*no hook point"
    ):
        import_vectors(vector)


def test_an_objects_layer_type_and_a_hook_that_contradicts_it_are_refused():
    vector = SimpleNamespace(layer_activations={1: ones()}, layer_type="mlp")
    assert import_vectors(vector, hook="mlp_out").hook_names == ["blocks.1.hook_mlp_out"]
    with pytest.raises(ValueError, match=r"hook must be mlp_out for layer_type 'mlp', got attn_out. Leave hook out"):
        import_vectors(vector, hook="attn_out")


@pytest.mark.parametrize(
    "source", [None, 3, {1: torch.ones(4)}, SimpleNamespace(layer_activations=3, layer_type="mlp")]
)
def test_an_object_of_another_kind_is_refused(source):
    with pytest.raises(
        ValueError, match=r"source must be the path of a file or a SteeringVector of steering-vectors, got a \w+"
    ):
        import_vectors(source)
    with pytest.raises(ValueError, match=r"source must number its layers from 0, got -1"):
        import_vectors(SimpleNamespace(layer_activations={-1: ones()}, layer_type="mlp"))
