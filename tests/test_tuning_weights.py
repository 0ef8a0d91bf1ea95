"""Which weights are trained, by kind, and how: whole in float32, or as low-rank factors whose gradients are right."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import rt_lens as rtl
from rt_lens.models.backends import parameters_of
from rt_lens.models.parameter_names import block_and_modules
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder
from rt_lens.tuning.config import MATRICES, MODULES, TuneConfig
from rt_lens.tuning.loop import tune
from rt_lens.tuning.targets import Target
from rt_lens.tuning.weights import trainable_params, trained_by

TARGETS = [Target(f"Question {i}: what is it?", f" It is the thing number {i}, I think.") for i in range(4)]
CONFIG = TuneConfig(layers=[1], trained_layers=[1], max_steps=2, epochs=9, batch_size=4, kl_weight=0.0,
                    learning_rate=1e-3, validate_every=99)  # fmt: skip
BY_KIND = {
    "q": {"attn.W_Q"}, "k": {"attn._W_K"}, "v": {"attn._W_V"}, "o": {"attn.W_O"}, "gate": {"mlp.W_gate"},
    "up": {"mlp.W_in"}, "down": {"mlp.W_out"}, "norm": {"ln1.w", "ln2.w"},
    "bias": {"attn.b_Q", "attn._b_K", "attn._b_V", "attn.b_O", "mlp.b_in", "mlp.b_out"},
}  # fmt: skip
RUN = {"validation": TARGETS, "progress": False}


def changed(model, vectors, **settings: Any) -> dict[str, torch.Tensor]:
    """What a short run changes."""
    return tune(model, vectors, TARGETS, replace(CONFIG, **settings), **RUN).changes


def short(name: str) -> str:
    return name.replace("._original_component", "")


@pytest.mark.hooked
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("heads", [2, None], ids=["grouped", "ungrouped"])
def test_each_kind_alone_changes_its_parameters_and_nothing_else(make_tiny, tiny_vectors, kind, heads):
    changes = changed(make_tiny(n_key_value_heads=heads), tiny_vectors, target_modules=[kind])
    names = BY_KIND[kind] if heads else {name.replace("._", ".") for name in BY_KIND[kind]}
    assert set(changes) == {f"blocks.1.{name}" for name in names}
    assert all(change.abs().max() > 0 for change in changes.values())


@pytest.mark.hooked
def test_the_kinds_together_are_all_of_a_block(make_tiny, tiny_vectors):
    for settings in ({}, {"n_key_value_heads": None}, {"normalization_type": "LN", "final_rms": False}):
        model = make_tiny(**settings)
        changes = changed(model, tiny_vectors, target_modules=MODULES)
        assert set(changes) == {name for name, _ in parameters_of(model).items() if name.startswith("blocks.1.")}


@pytest.mark.hooked
def test_layer_norms_have_a_bias_that_is_one_and_a_weight_that_is_a_norm(make_tiny, tiny_vectors):
    model = make_tiny(normalization_type="LN", final_rms=False)
    assert set(changed(model, tiny_vectors, target_modules=["norm"])) == {"blocks.1.ln1.w", "blocks.1.ln2.w"}
    assert {"blocks.1.ln1.b", "blocks.1.ln2.b"} < set(changed(model, tiny_vectors, target_modules=["bias"]))


@pytest.mark.hooked
@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"attn_only": True}, {"gate", "up", "down"}),
        ({"gated_mlp": False, "act_fn": "gelu"}, {"gate"}),
    ],
)
def test_the_default_kinds_take_what_a_model_has_and_others_are_refused(make_tiny, tiny_vectors, settings, missing):
    model = make_tiny(**settings)
    wanted = set(MATRICES) - missing
    assert set(changed(model, tiny_vectors)) == {f"blocks.1.{name}" for kind in wanted for name in BY_KIND[kind]}
    names = ", ".join(sorted(missing))
    message = rf"target_modules must be .*got {names}, which blocks \[1\] .*\(for the cosine loss\)\. Leave them out"
    with pytest.raises(ValueError, match=message):
        changed(model, tiny_vectors, target_modules=["q", *missing])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["query"]}, r"target_modules must be among q, k, v, o, gate, .*got 'query'"),
        ({"target_modules": "q k"}, r"target_modules must be a list, got 'q k'\. Try target_modules=\['q', 'k'\]"),
        ({"target_modules": []}, r"target_modules must be some of q, k, .*got an empty list"),
        ({"target_modules": {"cosines": ["q"]}}, r"target_modules must have the keys cosine, token, kl, got cosines"),
        ({"target_modules": {"cosine": "v", "token": ["q"]}}, r"target_modules\['cosine'\] must be a list, got 'v'"),
        ({"target_modules": {"cosine": ["v"]}}, r"target_modules must have an entry for the token loss, .*or set"),
        ({"trained_layers": {"token": [1]}}, r"trained_layers must have an entry for the cosine loss"),
        ({"trained_layers": {"cosine": [1]}, "token_weight": 0.0, "cosine_weight": 0.0, "kl_weight": 1.0},
         r"trained_layers must have an entry for the kl loss"),
        ({"lora_rank": -1}, r"lora_rank must be 0 or more, got -1"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("as_a_user")
def test_wrong_kinds_and_layers_are_named_when_the_settings_are_made(settings, says):
    with pytest.raises(ValueError, match=says):
        replace(CONFIG, **settings)


def test_a_fused_matrix_is_trained_whole_or_not_at_all():
    model = nn.Module()
    model.cfg = SimpleNamespace(n_layers=1)
    for attribute in ("tokenizer", "hook_dict", "blocks", "ln_final", "W_U", "hooks", "run_with_cache", "to_tokens"):
        setattr(model, attribute, object())  # what a Model has besides
    model.h = nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": nn.Linear(4, 12, bias=False)})})])
    config = TuneConfig(layers=[0], trained_layers=[0], token_weight=0.0, kl_weight=0.0)
    assert set(trained_by(model, replace(config, target_modules=["q", "k", "v"]))["cosine"]) == {
        "h.0.attn.c_attn.weight"
    }
    for kinds in (["q"], ["q", "v"]):
        with pytest.raises(
            ValueError,
            match=r"target_modules must name all or none of q, k, v, which .*h\.0\.attn\.c_attn\.weight holds",
        ):
            trained_by(model, replace(config, target_modules=kinds))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_bridge_trains_its_matrices(bridge, pairs, lora_rank):
    vectors = rtl.extract_vectors(bridge, pairs.sample(2), layers=[29])
    settings = {"layers": [29], "trained_layers": [29], "max_steps": 1, "lora_rank": lora_rank}
    changes = changed(bridge, vectors, target_modules=["v", "o", "down"], **settings)
    ends = ("self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight")
    assert {short(name) for name in changes} == {f"model.layers.29.{end}" for end in ends}
    assert all(change.abs().max() > 0 for change in changes.values())
    if lora_rank:
        assert all(numerical_rank(change) == lora_rank for change in changes.values())


def test_a_bridges_norms_are_trained_and_biases_that_it_has_not_refused(bridge, pairs):
    vectors = rtl.extract_vectors(bridge, pairs.sample(2), layers=[29])
    settings = {"layers": [29], "trained_layers": [29], "max_steps": 1}
    changes = changed(bridge, vectors, target_modules=["norm"], **settings)
    ends = ("input_layernorm", "post_attention_layernorm")
    assert {short(name) for name in changes} == {f"model.layers.29.{end}.weight" for end in ends}
    with pytest.raises(ValueError, match=r"target_modules must be .*got bias, which blocks \[29\]"):
        changed(bridge, vectors, target_modules=["bias"], **settings)


@pytest.fixture(scope="module", params=["gpt2", "phi3"])
def fused(request, tmp_path_factory) -> Any:
    """A tiny bridge of a family whose files hold several matrices in one."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "phi3": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 2},
    }[request.param]  # fmt: skip
    torch.manual_seed(0)
    config = CONFIG_MAPPING[request.param](**sizes, vocab_size=49152, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL]) / name, folder)
    return rtl.load_model(folder, backend="bridge")


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_fused_matrices_are_trained_as_they_are_stored_and_not_in_part(fused, tiny_vectors, lora_rank):
    changes = changed(fused, tiny_vectors, lora_rank=lora_rank)
    kinds = [kind for name in changes for kind in block_and_modules(name)[1]]
    gated = any("gate" in name for name in changes)
    assert sorted(kinds) == sorted(kind for kind in MATRICES if gated or kind != "gate")
    assert len(changes) == 4
    assert all(change.abs().max() > 0 for change in changes.values())
    with pytest.raises(ValueError, match=r"target_modules must name all or none of q, k, v, which .* holds in one"):
        changed(fused, tiny_vectors, target_modules=["v"], lora_rank=lora_rank)


def test_a_bridges_norms_and_biases_are_trained(fused, tiny_vectors):
    norms = changed(fused, tiny_vectors, target_modules=["norm"])
    assert len(norms) == 2
    assert all(change.abs().max() > 0 for change in norms.values())
    if not any("c_fc" in name for name, _ in parameters_of(fused).items()):
        with pytest.raises(ValueError, match=r"target_modules must be .*got bias, which blocks \[1\]"):
            changed(fused, tiny_vectors, target_modules=["bias"])
        return
    biases = changed(fused, tiny_vectors, target_modules=["bias"])
    assert len(biases) == 6  # of GPT-2's q, k and v together, o, two norms, and two matrices of the MLP
    assert all(change.abs().max() > 0 for change in biases.values())


# The change of a matrix, out x in with all heads together, as each parameter holds it.
LAYOUTS = {
    "attn.W_Q": "(head d_head) d_model -> head d_model d_head",
    "attn._W_K": "(head d_head) d_model -> head d_model d_head",
    "attn._W_V": "(head d_head) d_model -> head d_model d_head",
    "attn.W_O": "d_model (head d_head) -> head d_head d_model",
    "mlp.W_gate": "out into -> into out",
    "mlp.W_in": "out into -> into out",
    "mlp.W_out": "out into -> into out",
}
SIZES = {"attn": {"d_head": 8}, "mlp": {}}


def numerical_rank(matrix: torch.Tensor) -> int:
    """Rank up to what rounding of the weights in float32 adds."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values > 1e-3 * values[0]).sum()) if values[0] > 0 else 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_factors_gradients_are_those_through_w_plus_b_a(tiny, name):
    """By torch through the weight built by hand, with B at random, so that both factors have gradients."""
    full, layout = f"blocks.1.{name}", LAYOUTS[name]
    (kind,) = block_and_modules(full)[1]
    config = replace(CONFIG, target_modules=[kind], lora_rank=3)
    tokens = torch.tensor([tiny.tokenizer.encode(TARGETS[0].prompt + TARGETS[0].answer)])
    before = parameters_of(tiny)[full].detach().clone()
    with trainable_params(tiny, trained_by(tiny, config)["cosine"], config) as leaves:
        leaf = leaves[full]
        noise = torch.Generator().manual_seed(4)
        leaf.b.data = 0.1 * torch.randn(leaf.b.shape, generator=noise)
        leaf.write()
        a, b = (factor.detach().clone().requires_grad_() for factor in (leaf.a, leaf.b))
        tiny(tokens, return_type="loss").backward()
        leaf.take_gradient()
        found = (leaf.a.grad, leaf.b.grad)
        assert parameters_of(tiny)[full].grad is None  # let go as soon as it is split
    weight = before + rearrange(b @ a, layout, **SIZES[name.split(".")[0]])
    loss = torch.func.functional_call(tiny, {full: weight}, (tokens,), {"return_type": "loss"})
    expected = torch.autograd.grad(loss, (a, b))
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-4
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("rank", [1, 3])
def test_every_change_has_the_rank_asked_for(tiny, tiny_vectors, rank):
    changes = changed(tiny, tiny_vectors, lora_rank=rank, max_steps=8)
    assert {name.removeprefix("blocks.1.") for name in changes} == set(LAYOUTS)
    for name, change in changes.items():
        matrix = rearrange(change, " -> ".join(LAYOUTS[name.removeprefix("blocks.1.")].split(" -> ")[::-1]))
        assert 1 <= numerical_rank(matrix) <= rank
    whole = changed(tiny, tiny_vectors, max_steps=8)
    assert numerical_rank(whole["blocks.1.mlp.W_in"]) > 3


def test_the_first_step_moves_b_alone(tiny, tiny_vectors):
    """B begins at zero, so A has no gradient: the first change lies in the rows of A as it began."""
    config = replace(CONFIG, lora_rank=3, max_steps=1)
    name = "blocks.1.mlp.W_in"
    with trainable_params(tiny, trained_by(tiny, config)["cosine"], config) as leaves:
        rows = leaves[name].a.detach().clone()
        assert not leaves[name].b.detach().any()
        assert torch.equal(parameters_of(tiny)[name], leaves[name].before)
    change = tune(tiny, tiny_vectors, TARGETS, config, **RUN).changes[name].T
    inside = change @ torch.linalg.pinv(rows) @ rows
    assert change.abs().max() > 1e-4
    assert (change - inside).abs().max() < 1e-3 * change.abs().max()
    more = tune(tiny, tiny_vectors, TARGETS, replace(config, max_steps=8, learning_rate=0.01), **RUN).changes[name].T
    assert (more - more @ torch.linalg.pinv(rows) @ rows).abs().max() > 0.01 * more.abs().max()


def test_same_seed_same_bits_and_another_seed_other_factors(tiny, tiny_vectors):
    first, again, other = (changed(tiny, tiny_vectors, lora_rank=2, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("kinds", [MATRICES, {"cosine": ["v"], "token": ["down"]}], ids=["shared", "separate"])
def test_hooks_gradients_flags_and_memory_are_as_before(tiny, tiny_vectors, lora_rank, kinds):
    parameters = list(tiny.parameters())
    parameters[0].requires_grad_(False)
    before = [(p.data_ptr(), p.requires_grad, p.detach().clone()) for p in parameters]
    assert changed(tiny, tiny_vectors, lora_rank=lora_rank, target_modules=kinds)
    for parameter, (place, flag, values) in zip(parameters, before, strict=True):
        assert (parameter.data_ptr(), parameter.requires_grad) == (place, flag)
        assert torch.equal(parameter, values)
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks


def test_low_rank_factors_of_separate_losses_get_only_their_own(tiny, tiny_vectors):
    """The same as whole matrices: one loss's factors do not change with the other's weight."""
    kinds = {"cosine": ["v", "o"], "token": ["down"]}
    light, heavy = (
        changed(tiny, tiny_vectors, lora_rank=2, target_modules=kinds, token_weight=weight, max_steps=1,
                max_grad_norm=1e9,
                weight_decay=0.0)
        for weight in (0.1, 10.0)
    )  # fmt: skip
    assert set(light) == {f"blocks.1.{name}" for name in ("attn._W_V", "attn.W_O", "mlp.W_out")}
    assert torch.equal(light["blocks.1.attn._W_V"], heavy["blocks.1.attn._W_V"])
    assert torch.equal(light["blocks.1.attn.W_O"], heavy["blocks.1.attn.W_O"])
    assert light["blocks.1.attn.W_O"].abs().max() > 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora_rank": 16}, r"lora_rank must be less than 16, since blocks\.1\.attn\._W_K is 16 x 32, got 16"),
        (
            {"lora_rank": 2, "target_modules": ["q", "norm", "bias"]},
            r"target_modules must be matrices .*got bias, norm\. .*lora_rank=0",
        ),
    ],
)
def test_what_has_no_low_rank_factors_is_refused_and_the_model_stays(tiny, tiny_vectors, settings, says):
    before = [parameter.detach().clone() for parameter in tiny.parameters()]
    with pytest.raises(ValueError, match=says):
        changed(tiny, tiny_vectors, **settings)
    assert all(torch.equal(now, then) for now, then in zip(tiny.parameters(), before, strict=True))
    assert not any(parameter._post_accumulate_grad_hooks for parameter in tiny.parameters())


def test_a_bfloat16_model_moves_by_steps_that_bfloat16_would_round_away(make_tiny, tiny_vectors):
    """Each step is below half of what separates two bfloat16 numbers here; float32 masters add the steps up."""
    model = make_tiny(dtype=torch.bfloat16)
    name = "blocks.1.mlp.W_in"
    weight = parameters_of(model)[name].detach()
    large = weight.abs() > 2**-4  # neighbours are at least 2 ** -11 apart, so half of it is 2.4e-4
    settings = {
        "target_modules": ["up"], "learning_rate": 1e-4, "weight_decay": 0.0, "warmup": 0.0, "token_weight": 0.0,
        "cosine_weight": 1.0,
    }  # fmt: skip
    one = changed(model, tiny_vectors, **settings, max_steps=1)[name]
    assert one.dtype == torch.bfloat16
    assert large.float().mean() > 0.2
    assert not one[large].any()
    many = changed(model, tiny_vectors, **settings, max_steps=60, epochs=60, validate_every=60)[name]
    assert (many[large] != 0).float().mean() > 0.5
    assert parameters_of(model)[name].dtype == torch.bfloat16
