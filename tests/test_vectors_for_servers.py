"""Steering vectors for vLLM-Lens and lm-eval: there and back, and with the numbers of our own hooks."""

from __future__ import annotations

import base64
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import rt_lens as rtl
from rt_lens.apps.cli import app
from rt_lens.evaluation.lm_eval_bridge import harness_model
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder
from rt_lens.vectors import import_vectors, save_lm_eval, save_vllm
from rt_lens.vectors.steering_vectors import SteeringVectors

PAIRS = [("The weather was", " wonderful."), ("I feel", " sad today."), ("Paris is the capital of", " France.")]


def test_vllms_file_goes_there_and_back(tmp_path, tiny_vectors):
    path = save_vllm(tiny_vectors, tmp_path / "mood.json", multiplier=-2.0)
    back = import_vectors(path, behaviour="mood")
    assert back.hook_names == tiny_vectors.hook_names
    for name, vector in tiny_vectors.vectors.items():
        assert torch.equal(back[name], -2.0 * vector)


def as_vllm_reads_it(entry):
    """Decoded as vLLM-Lens decodes it."""
    stored = entry["activations"]
    array = np.frombuffer(base64.b64decode(stored["data"]), dtype=stored["dtype"]).reshape(stored["shape"])
    return torch.from_numpy(array.copy())


def test_vllms_file_holds_what_vllm_lens_reads(tmp_path, tiny_vectors):
    (entry,) = json.loads(save_vllm(tiny_vectors, tmp_path / "mood.json", multiplier=3.0).read_text())
    assert set(entry) == {"activations", "layer_indices", "scale", "norm_match"}
    assert (entry["layer_indices"], entry["scale"], entry["norm_match"]) == ([0, 1], 3.0, False)
    assert torch.equal(as_vllm_reads_it(entry), torch.stack(list(tiny_vectors.vectors.values())))


def vllm_entry(rows, layers, **others):
    stored = {"data": base64.b64encode(np.asarray(rows).tobytes()).decode(), "dtype": str(np.asarray(rows).dtype),
              "original_dtype": "torch.float32", "shape": list(np.asarray(rows).shape)}  # fmt: skip
    return {"activations": stored | others.pop("stored", {}), "layer_indices": layers, **others}


def test_what_vllm_lens_writes_itself_is_read_in_half_precision_and_summed_by_layer(tmp_path):
    path, rows = tmp_path / "v.json", torch.randn(2, 8)
    half = rows.bfloat16()
    stored = {"dtype": "int16", "original_dtype": "torch.bfloat16"}
    entry = vllm_entry(half.view(torch.int16).numpy(), [3, 5], scale=2.0, stored=stored)
    path.write_text(json.dumps([entry, vllm_entry(np.ones((1, 8), np.float32), [5])]))
    back = import_vectors(path)
    assert torch.equal(back["blocks.3.hook_resid_post"], 2 * half[0].float())
    assert torch.equal(back["blocks.5.hook_resid_post"], 2 * half[1].float() + 1)


ONES = np.ones((2, 8), np.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([vllm_entry(ONES, [3, 3])], "different whole numbers as layer_indices"),
        ([vllm_entry(ONES, [3])], r"one row of activations for each of layer_indices, got shape \(2, 8\)"),
        ([vllm_entry(ONES, [3, 4], norm_match=True)], "vectors that are added at every token, got norm_match"),
        ([vllm_entry(ONES, [3, 4], position_indices=[0])], "position_indices"),
        ([vllm_entry(ONES * np.nan, [3, 4])], "must be finite"),
        ([vllm_entry(ONES, [3, 4], stored={"dtype": "object"})], "must hold floating numbers, got 'object'"),
        ([vllm_entry(ONES, [3, 4], stored={"shape": [2, 10**9]})], "truncated or of another kind"),
        ([vllm_entry(ONES, [3, 4], stored={"data": "!!"})], "truncated or of another kind"),
        ([{"layers": [3]}], "must hold entries with activations and layer_indices"),
        ({"a": 1}, "must hold entries with activations and layer_indices"),
        ([], "must hold 1 to 4096 entries"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    path = tmp_path / "v.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        import_vectors(path)


def test_a_compressed_file_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "v.json"
    path.write_text(json.dumps([vllm_entry(ONES, [3, 4], stored={"compression": "zstd"})]))
    with pytest.raises(ValueError, match="is compressed with zstd, which needs a package: pip install zstandard"):
        import_vectors(path)


def test_what_these_programs_cannot_hold_is_refused(tmp_path, tiny_vectors, provenance):
    others = SteeringVectors({"blocks.0.hook_mlp_out": torch.ones(32)}, provenance)
    for save, name in ((save_vllm, "v.json"), (save_lm_eval, "v.pt")):
        with pytest.raises(ValueError, match="vectors must be at hook_resid_post for .*, got blocks.0.hook_mlp_out"):
            save(others, tmp_path / name)
    with pytest.raises(ValueError, match=r"path must end in \.pt"):
        save_lm_eval(tiny_vectors, tmp_path / "v.bin")
    assert not list(tmp_path.iterdir())


def test_lm_evals_steered_model_gives_the_log_likelihoods_of_our_hooks(tmp_path, model, pairs):
    pytest.importorskip("lm_eval")
    from lm_eval.models.hf_steered import SteeredModel

    vectors = rtl.extract_vectors(model, pairs.sample(8), layers=[15, 21])
    path = save_lm_eval(vectors, tmp_path / "mood.pt", multiplier=1.5)
    assert set(torch.load(path, weights_only=True)) == {"layers.15", "layers.21"}
    folder = str(bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL]))
    theirs = SteeredModel(pretrained=folder, steer_path=str(path), device="cpu", dtype="float32", batch_size=3)
    requests = [SimpleNamespace(args=each) for each in PAIRS]
    expected = [total for total, _ in theirs.loglikelihood(requests)]
    with model.hooks(fwd_hooks=rtl.add(vectors, [15, 21], 1.5)):
        found = [total for total, _ in harness_model(model).loglikelihood(requests)]
    plain = [total for total, _ in harness_model(model).loglikelihood(requests)]
    assert found == pytest.approx(expected, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(found, plain, strict=True)) > 0.1


def test_the_command_writes_both(tmp_path, tiny_vectors):
    file = tmp_path / "v.safetensors"
    tiny_vectors.save(file)
    names = ["--vllm", tmp_path / "v.json", "--lm-eval", tmp_path / "v.pt", "--multiplier", 2]
    result = CliRunner().invoke(app, [str(part) for part in ("vectors", file, *names)])
    assert result.exit_code == 0, result.output
    assert torch.equal(import_vectors(tmp_path / "v.json")[tiny_vectors.hook_names[0]],
                       2 * tiny_vectors[tiny_vectors.hook_names[0]])  # fmt: skip
    assert "lm_eval --model steered" in result.output
