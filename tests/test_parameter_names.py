"""One table of names for four styles of parameter, for tuning, the table of weight changes, baking and export."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from rt_lens.arms.inspection import weight_changes
from rt_lens.models.backends import backend_of, parameters_of, slots_of
from rt_lens.models.backends.bridge_folder import bridge_from_folder
from rt_lens.models.parameter_names import (
    as_matrix,
    block_and_modules,
    from_matrix,
    module_label,
    plain_name,
    reads_from_stream,
    writes_to_stream,
    written_by_read,
)
from rt_lens.tuning.delta import WeightDelta
from rt_lens.vectors.steering_vectors import SteeringVectors

HOOKED = [
    ("blocks.11.attn.W_Q", 11, ("q",)),
    ("blocks.0.attn._W_K", 0, ("k",)),
    ("blocks.0.attn._W_V", 0, ("v",)),
    ("blocks.0.attn._b_V", 0, ("bias",)),
    ("blocks.2.attn.W_O", 2, ("o",)),
    ("blocks.2.mlp.W_gate", 2, ("gate",)),
    ("blocks.2.mlp.W_in", 2, ("up",)),
    ("blocks.2.mlp.W_out", 2, ("down",)),
    ("blocks.3.attn.q_norm.w", 3, ("norm",)),
    ("blocks.3.ln1_post.w", 3, ("norm",)),
    ("blocks.3.ln1.b", 3, ("bias",)),
    ("embed.W_E", None, ("embed",)),
    ("pos_embed.W_pos", None, ("embed",)),
    ("ln_final.w", None, ("norm",)),
    ("ln_final.b", None, ("bias",)),
    ("unembed.b_U", None, ("bias",)),
    ("unembed.W_U", None, ()),
]
GPT2 = [
    ("transformer.h.4.attn.c_attn.weight", 4, ("q", "k", "v")),
    ("transformer.h.4.attn.c_proj.weight", 4, ("o",)),
    ("transformer.h.4.mlp.c_fc.weight", 4, ("up",)),
    ("transformer.h.4.mlp.c_proj.weight", 4, ("down",)),
    ("transformer.h.4.ln_1.weight", 4, ("norm",)),
    ("transformer.h.4.ln_1.bias", 4, ("bias",)),
    ("transformer.h.4.mlp.c_fc.bias", 4, ("bias",)),
    ("transformer.wte.weight", None, ("embed",)),
    ("transformer.wpe.weight", None, ("embed",)),
    ("transformer.ln_f.weight", None, ("norm",)),
]
NEOX = [
    ("gpt_neox.layers.2.attention.o.weight", 2, ("o",)),
    ("gpt_neox.layers.2.attention.dense.weight", 2, ("o",)),
    ("gpt_neox.layers.2.attention.query_key_value.weight", 2, ("q", "k", "v")),
    ("gpt_neox.layers.2.mlp.dense_h_to_4h.weight", 2, ("up",)),
    ("gpt_neox.layers.2.mlp.dense_4h_to_h.weight", 2, ("down",)),
    ("gpt_neox.layers.2.post_attention_layernorm.weight", 2, ("norm",)),
    ("gpt_neox.embed_in.weight", None, ("embed",)),
    ("gpt_neox.final_layer_norm.weight", None, ("norm",)),
]
BRIDGE = [
    ("transformer.h.4._original_component.attn.q._original_component.weight", 4, ("q",)),
    ("transformer.h.4._original_component.attn.qkv._original_component.bias", 4, ("bias",)),
    ("model.layers.2._original_component.mlp.gate._original_component.weight", 2, ("gate",)),
    ("model.layers.2._original_component.mlp.in._original_component.weight", 2, ("up",)),
    ("model.layers.2._original_component.mlp._original_component.gate_up_proj.weight", 2, ("gate", "up")),
    ("model.layers.2._original_component.input_layernorm._original_component.weight", 2, ("norm",)),
    ("model.embed_tokens._original_component.weight", None, ("embed",)),
    ("lm_head._original_component.weight", None, ()),
]


@pytest.mark.parametrize(("name", "block", "modules"), [*HOOKED, *GPT2, *NEOX, *BRIDGE])
def test_a_name_of_any_style_tells_block_and_modules(name, block, modules):
    assert block_and_modules(name) == (block, modules)
    assert module_label(name) == ("+".join(modules) or "other")


def test_what_writes_to_the_stream_and_what_reads_from_it_do_not_overlap():
    writers = {name for name, _, _ in [*HOOKED, *GPT2, *NEOX, *BRIDGE] if writes_to_stream(name)}
    readers = {name for name, _, _ in [*HOOKED, *GPT2, *NEOX, *BRIDGE] if reads_from_stream(name)}
    assert not writers & readers
    assert {"blocks.2.attn.W_O", "transformer.h.4.mlp.c_proj.weight", "gpt_neox.embed_in.weight"} < writers
    assert {"blocks.2.mlp.W_in", "transformer.h.4.attn.c_attn.weight"} < readers


@pytest.mark.parametrize(
    ("bias", "writes"),
    [
        ("blocks.0.attn.b_O", True), ("blocks.0.mlp.b_out", True), ("blocks.0.mlp.b_in", False),
        ("blocks.0.attn._b_V", False), ("blocks.0.ln1.b", False), ("transformer.h.0.mlp.c_proj.bias", True),
        ("gpt_neox.layers.0.attention.dense.bias", True), ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.0.mlp.down_proj.bias", True), ("transformer.h.0.ln_1.bias", False),
    ],
)  # fmt: skip
def test_a_bias_writes_where_its_weight_does(bias, writes):
    assert writes_to_stream(bias) is writes
    assert not reads_from_stream(bias)


@pytest.mark.parametrize("name", ["blocks.0.attn.W_Q", "blocks.0.attn._W_K", "blocks.0.attn.W_O", "blocks.0.mlp.W_in"])
def test_a_matrix_becomes_the_weight_again(tiny, name):
    weight = dict(tiny.named_parameters())[name].detach()
    matrix = as_matrix(name, weight)
    assert matrix.ndim == 2
    assert torch.equal(from_matrix(name, matrix, tuple(weight.shape)), weight)


def test_the_outputs_of_a_block_are_parameters_of_the_model(tiny):
    names = parameters_of(tiny)
    for module in ("o", "down"):
        weight, bias = backend_of(tiny).writer(1, module)
        assert {weight, bias} < set(names)
        assert block_and_modules(weight) == (1, (module,))


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox"])
def small_bridge(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=100, n_positions=32)
        GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        neox = GPTNeoXConfig(
            num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=64, vocab_size=100,
            max_position_embeddings=32,
        )  # fmt: skip
        GPTNeoXForCausalLM(neox).save_pretrained(folder)
    return bridge_from_folder(folder, request.param, device="cpu", dtype=torch.float32)


def test_the_table_of_weight_changes_calls_the_weights_what_tune_calls_them(small_bridge, provenance):
    """Before, GPT-2's and NeoX's weights were `other` in the table, and had no alignment."""
    weights = {
        name: parameter for name, parameter in parameters_of(small_bridge).items() if block_and_modules(name)[0] == 1
    }  # fmt: skip
    noise = torch.Generator().manual_seed(0)
    changes = {name: torch.randn(weight.shape, generator=noise) for name, weight in weights.items()}
    table = weight_changes(small_bridge, WeightDelta(changes, "small", {}, []), progress=False).set_index("parameter")
    assert set(table["kind"]) == {"q+k+v", "o", "up", "down", "bias", "norm"}
    assert (table["layer"] == 1).all()
    assert table.loc[table["kind"].isin(["q+k+v", "o", "up", "down"]), "rank_limit"].eq(16).all()


def test_a_change_along_the_vector_is_aligned_whichever_way_round_the_weight_is_stored(small_bridge, provenance):
    """GPT-2's Conv1D keeps [in, out], where NeoX's linear layers keep [out, in]."""
    vectors = SteeringVectors({"blocks.1.hook_resid_post": torch.randn(16)}, provenance)
    unit = vectors["blocks.1.hook_resid_post"] / vectors["blocks.1.hook_resid_post"].norm()
    for name, weight in parameters_of(small_bridge).items():
        block, modules = block_and_modules(name)
        if block != 1 or modules not in (("down",), ("up",)):
            continue
        flipped = slots_of(small_bridge)[name].input_first
        assert flipped == ("c_" in plain_name(name))
        other = torch.randn(64)
        matrix = torch.outer(unit, other) if modules == ("down",) else torch.outer(other, unit)  # [write, read]
        change = matrix.T.contiguous() if flipped else matrix
        assert change.shape == weight.shape
        assert torch.equal(written_by_read(name, change, input_first=flipped), matrix)
        row = weight_changes(small_bridge, WeightDelta({name: change}, "small", {}, []), vectors, progress=False)
        assert row["alignment"].item() == pytest.approx(1.0, abs=1e-5)
        assert not math.isclose(row["chance"].item(), 1.0)
