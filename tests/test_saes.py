"""Features of a sparse autoencoder as steering vectors: the right row at the right hook point, or refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import rt_lens as rtl
from rt_lens.vectors import load_sae_feature


def folder_of(path, cfg, **tensors):
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, path / "sae_weights.safetensors")
    return path


@pytest.mark.parametrize("nested", [False, True])
def test_a_feature_is_its_row_of_the_decoder_where_it_was_trained(tmp_path, tiny, nested):
    decoder = torch.randn(16, tiny.cfg.d_model)
    where = {"hook_name": "blocks.1.hook_resid_pre", "model_name": "gpt2-small"}
    cfg = {"architecture": "jumprelu", "metadata": where} if nested else {**where, "d_sae": 16}
    vectors = load_sae_feature(folder_of(tmp_path / "sae", cfg, W_dec=decoder, W_enc=decoder.T.contiguous()), 7)
    assert vectors.hook_names == ["blocks.1.hook_resid_pre"]
    assert torch.equal(vectors["blocks.1.hook_resid_pre"], decoder[7])
    assert (vectors.provenance.model, vectors.provenance.behaviour) == ("gpt2-small", "feature 7")
    ids = torch.tensor([[1, 2, 3]])
    with tiny.hooks(fwd_hooks=rtl.add(vectors, [1], 4.0, hook="resid_pre")):
        _, steered = tiny.run_with_cache(ids)
    _, plain = tiny.run_with_cache(ids)
    name = "blocks.1.hook_resid_pre"
    assert torch.allclose(steered[name] - plain[name], 4.0 * decoder[7].expand(1, 3, -1), atol=1e-5)


def test_a_transcoder_writes_where_its_output_goes(tmp_path):
    cfg = {"metadata": {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}}
    assert load_sae_feature(folder_of(tmp_path / "sae", cfg, W_dec=torch.ones(4, 8)), 0).hook_names == [
        "blocks.1.hook_mlp_out"
    ]


DECODER = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("cfg", "tensors", "feature", "message"),
    [
        ({"hook_name": "blocks.1.hook_resid_pre"}, {"W_dec": DECODER}, 4, "feature must be from 0 to 3, got 4"),
        ({"hook_name": "blocks.1.hook_resid_pre"}, {"W_dec": DECODER}, -1, "feature must be from 0 to 3, got -1"),
        ({"hook_name": "../../x"}, {"W_dec": DECODER}, 0, "must name a hook point of TransformerLens as hook_name"),
        ({}, {"W_dec": DECODER}, 0, "must name a hook point of TransformerLens as hook_name, got None"),
        ([], {"W_dec": DECODER}, 0, "must name a hook point of TransformerLens as hook_name, got None"),
        ({"hook_name": "blocks.1.hook_resid_pre"}, {"W_enc": DECODER}, 0, "must hold the decoder W_dec, got W_enc"),
        ({"hook_name": "blocks.1.hook_resid_pre"}, {"W_dec": DECODER * torch.nan}, 0, "must be finite"),
    ],
)
def test_what_is_no_feature_is_refused(tmp_path, cfg, tensors, feature, message):
    with pytest.raises(ValueError, match=message):
        load_sae_feature(folder_of(tmp_path / "sae", cfg, **tensors), feature)


def test_a_missing_or_cut_off_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        load_sae_feature(tmp_path, 0)
    folder = folder_of(tmp_path / "sae", {"hook_name": "blocks.1.hook_resid_pre"}, W_dec=DECODER)
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_sae_feature(folder, 0)
