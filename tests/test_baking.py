"""A baked model computes without hooks what the hooks did; what has no exact fold is refused, with the way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import rt_lens as rtl
from rt_lens.models.backends import parameters_of
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import chat_text
from rt_lens.steering.binding import ablate, add, add_preserving_norm, cap, clamp, erase, rotate, scale, transport
from rt_lens.steering.conditions import Condition, conditional
from rt_lens.steering.edits import Edit, FwdHook
from rt_lens.tuning.delta import WeightDelta
from rt_lens.vectors.operators import Ablate, Add, Clamp, Scale, Transport
from rt_lens.vectors.steering_vectors import Eraser, SteeringVectors, hook_names

TEXT = "The weather in the hills was"
KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
Vectors = Callable[..., SteeringVectors]


@pytest.fixture
def vectors(provenance: Any) -> Vectors:
    """Random vectors at one kind of hook point of both blocks, with erasers."""

    def at(hook: str, layers: Sequence[int] = (0, 1), seed: int = 0) -> SteeringVectors:
        noise, shape = torch.Generator().manual_seed(seed), (4, 8) if hook == "z" else (32,)
        names = hook_names(layers, hook)
        found = {name: torch.randn(shape, generator=noise) for name in names}
        erasers = {}
        for name in names:
            left, right, centre = (torch.randn(shape, generator=noise) for _ in range(3))
            left = left + right * (1 - (left * right).sum(-1, keepdim=True)) / (right * right).sum(-1, keepdim=True)
            erasers[name] = Eraser(left, right, centre)
        return SteeringVectors(found, provenance, erasers)

    return at


@torch.no_grad()
def logits(model: Any, hooks: Sequence[FwdHook] = ()) -> torch.Tensor:
    with model.hooks(fwd_hooks=list(hooks)):
        return model(torch.tensor([encode(model, TEXT)]))


def check_baked(model: Any, hooks: Sequence[FwdHook], *, atol: float = 1e-5) -> WeightDelta:
    """Baked is hooked, and hooked is not plain; the model stays as it is."""
    before = {name: parameter.detach().clone() for name, parameter in parameters_of(model).items()}
    plain, hooked = logits(model), logits(model, hooks)
    assert (hooked - plain).abs().max() > 0.01, "the edit does nothing"
    delta = rtl.bake(model, hooks)
    assert torch.equal(logits(model), plain)
    with delta.applied(model):
        torch.testing.assert_close(logits(model), hooked, atol=atol, rtol=0)
    assert torch.equal(logits(model), plain)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters_of(model).items())
    return delta


def changed(delta: WeightDelta) -> set[str]:
    return {name for name, change in delta.changes.items() if change.any()}


# One kind of edit at a time


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
@pytest.mark.parametrize("hook", KINDS)
def test_adding_is_baked_at_every_kind_of_hook_point(tiny, vectors, hook, layers):
    check_baked(tiny, add(vectors(hook), layers, 1.5, hook=hook))


def test_adding_goes_into_one_bias_each_and_before_the_first_block_into_the_embedding(tiny, vectors):
    def where(hook: str, layer: int) -> set[str]:
        return changed(rtl.bake(tiny, add(vectors(hook), [layer], hook=hook)))

    assert where("resid_pre", 0) == {"embed.W_E"}
    assert where("resid_pre", 1) == where("resid_post", 0) == where("mlp_out", 0) == {"blocks.0.mlp.b_out"}
    assert where("resid_mid", 1) == where("attn_out", 1) == where("z", 1) == {"blocks.1.attn.b_O"}


@pytest.mark.parametrize("hook", ["attn_out", "mlp_out", "z"])
@pytest.mark.parametrize(
    "edit", ["ablate", "ablate two", "clamp", "scale", "scale dimensions", "erase", "rotate", "transport"]
)
def test_every_affine_edit_is_baked_where_a_block_writes(tiny, vectors, hook, edit):
    names, noise = hook_names([0, 1], hook), torch.Generator().manual_seed(3)
    shape = (4, 1) if hook == "z" else (32,)
    hooks = {
        "ablate": lambda: ablate(vectors(hook), hook=hook),
        "ablate two": lambda: ablate([vectors(hook), vectors(hook, seed=1)], hook=hook),
        "clamp": lambda: clamp(vectors(hook), value=1.5, hook=hook),
        "scale": lambda: scale(dict.fromkeys(names, -0.6), 1.5),
        "scale dimensions": lambda: scale({name: torch.randn(shape, generator=noise) for name in names}),
        "erase": lambda: erase(vectors(hook), hook=hook),
        "rotate": lambda: rotate(vectors(hook), vectors(hook, seed=1), angle=50.0, hook=hook),
        "transport": lambda: transport({name: Transport(1 + v, v) for name, v in vectors(hook).vectors.items()}, 0.5),
    }[edit]()
    check_baked(tiny, hooks)


def test_a_cap_has_no_fold_in_weights(tiny, vectors):
    hooks = cap(vectors("mlp_out"), dict.fromkeys(hook_names([0, 1], "mlp_out"), 0.0))
    with pytest.raises(ValueError, match="Cap"):
        rtl.bake(tiny, hooks)


@pytest.mark.parametrize("edit", [add, ablate, clamp])
@pytest.mark.parametrize("heads", [[2], [3, 0]])
def test_edits_of_some_heads_are_baked_and_leave_the_others(tiny, vectors, edit, heads):
    kwargs = {"hook": "z", **({"value": 3.0} if edit is clamp else {})}
    some, every = (edit(vectors("z"), [1], **kwargs, **which) for which in ({"heads": heads}, {}))
    delta = check_baked(tiny, some)
    assert (logits(tiny, some) - logits(tiny, every)).abs().max() > 0.01
    if edit is not add:
        rest = [head for head in range(4) if head not in heads]
        change = delta.changes["blocks.1.attn.W_O"]
        assert not change[rest].any() and all(change[head].any() for head in heads)


@pytest.mark.parametrize("hook", ["attn_out", "mlp_out", "z"])
def test_half_an_ablation_is_baked(tiny, vectors, hook):
    ((name, edit),) = ablate(vectors(hook), [1], hook=hook)
    check_baked(tiny, [(name, Edit(edit.operator, 0.5))])


@pytest.mark.hooked  # at resid_mid, too
def test_a_multiplier_of_0_bakes_to_a_difference_of_nothing_but_zeros(tiny, vectors):
    for hook in KINDS:
        delta = rtl.bake(tiny, add(vectors(hook), multiplier=0.0, hook=hook))
        assert delta.changes and not changed(delta)
        assert changed(rtl.bake(tiny, add(vectors(hook), multiplier=1.0, hook=hook)))


@pytest.mark.parametrize("hook", ["resid_post", "mlp_out"])
def test_a_bias_that_was_there_stays_beneath_what_is_added(tiny, vectors, hook):
    bias = tiny.blocks[1].mlp.b_out.detach().clone()
    assert bias.abs().min() > 0
    delta = rtl.bake(tiny, add(vectors(hook), [1], 2.0, hook=hook))
    with delta.applied(tiny):
        (vector,) = vectors(hook).at_layers([1], hook).values()
        torch.testing.assert_close(tiny.blocks[1].mlp.b_out.detach(), bias + 2 * vector)


# Several in one list


def test_edits_of_several_hook_points_are_baked_in_the_order_of_the_model_not_of_the_list(tiny, vectors):
    late = add(vectors("resid_mid"), [1], 2.0, hook="resid_mid")
    early = ablate(vectors("resid_mid"), [1], hook="resid_mid")
    early = [("blocks.1.hook_attn_out", edit) for _, edit in early]  # the direction that is added later
    check_baked(tiny, late + early)
    assert torch.equal(logits(tiny, late + early), logits(tiny, early + late))
    gone = rtl.bake(tiny, [("blocks.1.hook_attn_out", edit) for _, edit in [*late, *early]])
    assert (gone.changes["blocks.1.attn.b_O"] - rtl.bake(tiny, late + early).changes["blocks.1.attn.b_O"]).norm() > 1


def test_many_edits_everywhere_are_baked_together(tiny, vectors):
    together = [
        *add(vectors("resid_post"), hook="resid_post"),
        *clamp(vectors("mlp_out"), value=2.0, hook="mlp_out"),
        *add(vectors("resid_mid"), [0], -1.0, hook="resid_mid"),
        *ablate(vectors("attn_out"), [1], hook="attn_out"),
        *scale({"blocks.1.attn.hook_z": torch.tensor([[0.5], [-1.0], [0.0], [2.0]])}),
        *add(vectors("z"), hook="z", heads=[1, 2]),
        *erase(vectors("attn_out", seed=4), [0], hook="attn_out"),
        *add(vectors("resid_pre"), hook="resid_pre"),
    ]
    check_baked(tiny, together)
    check_baked(tiny, together[::-1])


@pytest.mark.parametrize("hook", ["attn_out", "mlp_out", "z"])
def test_edits_at_one_hook_point_are_baked_in_the_order_of_the_list(tiny, vectors, hook):
    here = vectors(hook)
    edits = [
        add(here, [1], 2.0, hook=hook),
        ablate(here, [1], hook=hook),
        clamp(vectors(hook, seed=1), [1], 2.0, hook=hook),
    ]
    there = [each for edit in edits for each in edit]
    check_baked(tiny, there)
    check_baked(tiny, there[::-1])
    assert (logits(tiny, there) - logits(tiny, there[::-1])).abs().max() > 0.01


def test_lists_of_additions_add_up_to_one(tiny, vectors):
    once, twice = (add(vectors("resid_post"), [0], multiplier) for multiplier in (1.0, 0.5))
    change = rtl.bake(tiny, twice + twice).changes["blocks.0.mlp.b_out"]
    torch.testing.assert_close(change, rtl.bake(tiny, once).changes["blocks.0.mlp.b_out"], atol=1e-6, rtol=0)


# The whole residual stream


def everywhere(tiny: Any, vectors: Vectors, seed: int = 0) -> SteeringVectors:
    return vectors("resid_post", seed=seed).everywhere(tiny, 1)


def erasing_everywhere(tiny: Any, vectors: Vectors, layers: Sequence[int]) -> list[FwdHook]:
    one, every = vectors("resid_post"), everywhere(tiny, vectors)
    (eraser, _) = one.erasers.values()
    erasers = dict.fromkeys(every.hook_names, eraser)
    return erase(SteeringVectors(every.vectors, one.provenance, erasers), layers, hook="any")


@pytest.mark.parametrize("layers", [[0], [0, 1], [1, 0]])
@pytest.mark.parametrize("edit", ["ablate", "ablate two", "clamp", "erase"])
def test_projections_are_baked_from_the_first_block_to_any(tiny, vectors, edit, layers):
    hooks = {
        "ablate": lambda: ablate(everywhere(tiny, vectors), layers, hook="any"),
        "ablate two": lambda: ablate(
            [everywhere(tiny, vectors), everywhere(tiny, vectors, seed=1)], layers, hook="any"
        ),
        "clamp": lambda: clamp(everywhere(tiny, vectors), layers, 3.0, hook="any"),
        "erase": lambda: erasing_everywhere(tiny, vectors, layers),
    }[edit]()
    delta = check_baked(tiny, hooks)
    written = {
        f"blocks.{layer}.{part}" for layer in layers for part in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")
    }
    assert changed(delta) == {"embed.W_E", *written}


def test_what_is_ablated_up_to_a_block_may_be_written_after_it(tiny, vectors):
    every = everywhere(tiny, vectors)
    direction = every["blocks.0.hook_resid_pre"] / every["blocks.0.hook_resid_pre"].norm()
    tokens = torch.tensor([encode(tiny, TEXT)])
    with rtl.bake(tiny, ablate(every, [0], hook="any")).applied(tiny):
        _, found = tiny.run_with_cache(tokens)
    for name in ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post"):
        assert (found[name] @ direction).abs().max() < 1e-5
    assert (found["blocks.1.hook_resid_post"] @ direction).abs().max() > 0.01


def test_the_order_of_the_list_does_not_matter_across_hook_points(tiny, vectors):
    check_baked(tiny, ablate(everywhere(tiny, vectors), hook="any")[::-1])


def test_a_model_with_learned_positions_and_plain_layernorm_is_baked(make_tiny, vectors):
    gpt = make_tiny(
        positional_embedding_type="standard", normalization_type="LN", final_rms=False, gated_mlp=False, act_fn="gelu"
    )
    delta = check_baked(gpt, ablate(everywhere(gpt, vectors), hook="any"))
    assert delta.changes["pos_embed.W_pos"].any()
    check_baked(gpt, clamp(everywhere(gpt, vectors), value=3.0, hook="any"))
    check_baked(gpt, add(vectors("resid_pre"), [0], hook="resid_pre"))


@pytest.mark.hooked
def test_a_model_of_attention_only_is_baked(make_tiny, vectors):
    attention = make_tiny(attn_only=True, act_fn=None, gated_mlp=False)
    check_baked(attention, add(vectors("resid_post"), [0, 1]))
    check_baked(attention, ablate(everywhere(attention, vectors), hook="any"))


@pytest.mark.parametrize("edit", ["add", "ablate", "clamp", "each block's own"])
def test_in_double_precision_the_fold_is_exact_so_that_all_the_rest_is_rounding(make_tiny, vectors, edit):
    def double(single: SteeringVectors) -> SteeringVectors:
        return SteeringVectors({name: vector.double() for name, vector in single.vectors.items()}, single.provenance)

    exact = make_tiny(dtype=torch.float64)
    hooks = {
        "add": lambda: add(double(vectors("resid_post")), multiplier=2.0),
        "ablate": lambda: ablate(double(everywhere(exact, vectors)), hook="any"),
        "clamp": lambda: clamp(double(everywhere(exact, vectors)), value=3.0, hook="any"),
        "each block's own": lambda: [
            edit
            for hook in ("z", "attn_out", "mlp_out")
            for edit in (
                *clamp(double(vectors(hook)), value=2.0, hook=hook),
                *ablate(double(vectors(hook, seed=1)), hook=hook),
                *add(double(vectors(hook, seed=2)), hook=hook),
            )
        ],
    }[edit]()
    check_baked(exact, hooks, atol=1e-12)


def test_a_model_in_half_precision_is_baked_as_well_as_it_computes(make_tiny, vectors):
    half = make_tiny(dtype=torch.bfloat16)
    for hooks in (ablate(everywhere(half, vectors), hook="any"), add(vectors("resid_post"), [0], 2.0)):
        delta = rtl.bake(half, hooks)
        assert {change.dtype for change in delta.changes.values()} == {torch.bfloat16}
        plain, hooked = logits(half), logits(half, hooks)
        with delta.applied(half):
            baked = logits(half)
        assert (baked - hooked).float().std() < 0.1 * (hooked - plain).float().std()


# What is made


def test_a_baked_model_needs_no_hook_and_its_delta_says_what_it_is(tiny, vectors, hooks_on):
    delta = rtl.bake(tiny, add(vectors("resid_post"), [1], 2.0) + ablate(vectors("z"), [0], hook="z"))
    with delta.applied(tiny):
        assert not hooks_on(tiny)
    assert delta.config == {
        "baked": ["blocks.1.hook_resid_post: Add, multiplier 2", "blocks.0.attn.hook_z: Ablate, multiplier 1"]
    }
    assert delta.model == "tiny" and delta.history == []


def test_a_baked_edit_that_was_saved_and_loaded_gives_the_same(tiny, vectors, tmp_path):
    hooks = ablate(everywhere(tiny, vectors), hook="any")
    delta = rtl.bake(tiny, hooks)
    loaded = WeightDelta.load(delta.save(tmp_path / "ablated.safetensors"))
    assert loaded.config == delta.config
    with delta.applied(tiny):
        wanted = logits(tiny)
    with loaded.applied(tiny):
        assert torch.equal(logits(tiny), wanted)
    assert (logits(tiny) - wanted).abs().max() > 0.01


def test_an_edit_is_baked_on_top_of_another_as_the_refusal_of_both_in_one_list_says(tiny, vectors):
    first = add(vectors("resid_post"), [0], 2.0) + clamp(vectors("mlp_out"), [1], 2.0, hook="mlp_out")
    second = ablate(everywhere(tiny, vectors), hook="any")
    both, plain = logits(tiny, first + second), logits(tiny)
    with pytest.raises(
        ValueError, match=r"other edits are in the same list\. Bake those first, and this one on the changed model"
    ):
        rtl.bake(tiny, first + second)
    with (others := rtl.bake(tiny, first)).applied(tiny):
        delta = rtl.bake(tiny, second)
    with others.applied(tiny), delta.applied(tiny):
        torch.testing.assert_close(logits(tiny), both, atol=1e-5, rtol=0)
    assert torch.equal(logits(tiny), plain)
    assert (both - logits(tiny, first)).abs().max() > 0.01 and (both - logits(tiny, second)).abs().max() > 0.01


# What has no exact fold


def refused(model: Any, hooks: Sequence[FwdHook], message: str) -> None:
    before = {name: parameter.detach().clone() for name, parameter in parameters_of(model).items()}
    with pytest.raises(ValueError, match=message):
        rtl.bake(model, hooks)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters_of(model).items())


def test_adding_with_the_norm_kept_is_refused(tiny, vectors):
    message = r"hooks: AddPreservingNorm at blocks\.1\.hook_resid_post has no exact fold: it is not .*Keep the hook\."
    refused(tiny, add_preserving_norm(vectors("resid_post"), [1]), message)


@pytest.mark.parametrize(
    "limits",
    [
        {"positions": "last"},
        {"positions": "generated"},
        {"positions": [0, -1]},
        {"positions": torch.tensor([True, False])},
        {"schedule": rtl.steering.Linear(1.0, 0.0, 8)},
        {"multiplier": torch.tensor([1.0, 2.0])},
    ],
    ids=lambda limits: next(iter(limits)),
)
def test_edits_that_do_not_act_on_every_token_alike_are_refused(tiny, vectors, limits):
    message = (
        r"hooks: Add at blocks\.1\.hook_resid_post has no exact fold: .*every token alike\. Use positions='all', one"
    )
    refused(tiny, add(vectors("resid_post"), [1], **limits), message)
    rtl.bake(tiny, add(vectors("resid_post"), [1]))  # the mend


def test_conditions_are_refused_with_and_without_their_reader(tiny, vectors):
    condition = Condition("blocks.0.hook_resid_post", torch.ones(32), 0.0)
    hooks = conditional(add(vectors("resid_post"), [1]), condition)
    refused(
        tiny,
        hooks,
        r"hooks must be edits of rt_lens, got a condition .* at blocks\.0\.hook_resid_post.*Keep the hook\.",
    )
    refused(tiny, hooks[1:], r"hooks: Add at blocks\.1.* every token alike\. .* no condition, or keep the hook\.")


def test_functions_of_ones_own_are_refused(tiny):
    message = r"hooks must be edits of rt_lens, got .*another function at blocks\.1\.hook_mlp_out, .*Keep the hook\."
    refused(tiny, [("blocks.1.hook_mlp_out", lambda activation, hook: activation)], message)


@pytest.mark.parametrize("hook", ["resid_pre", "resid_mid", "resid_post"])
@pytest.mark.parametrize("edit", ["ablate", "clamp", "scale", "erase"])
def test_one_point_of_the_residual_stream_is_refused_for_all_but_adding(tiny, vectors, edit, hook):
    (name,) = hook_names([1], hook)
    hooks = {
        "ablate": lambda: ablate(vectors(hook), [1], hook=hook),
        "clamp": lambda: clamp(vectors(hook), [1], hook=hook),
        "scale": lambda: scale({name: 0.5}),
        "erase": lambda: erase(vectors(hook), [1], hook=hook),
    }[edit]()
    message = rf"hooks: {edit.title()} at {name} has no exact fold: in the residual stream .*Use `vectors\.everywhere\("
    refused(tiny, hooks, message)


def test_a_gap_or_a_late_start_in_the_residual_stream_is_refused(tiny, vectors):
    hooks = ablate(everywhere(tiny, vectors), hook="any")
    rtl.bake(tiny, hooks)
    for some in (hooks[1:], hooks[:2] + hooks[3:], ablate(everywhere(tiny, vectors), [1], hook="any")):
        refused(
            tiny, some, r"must act at every point from blocks\.0\.hook_resid_pre on, since .*Use `vectors\.everywhere"
        )


def test_different_directions_along_the_residual_stream_are_refused(tiny, vectors):
    hooks, others = (ablate(everywhere(tiny, vectors, seed), hook="any") for seed in (0, 1))
    message = r"Ablate at blocks\.0\.hook_resid_pre .*the one at blocks\.1\.hook_resid_mid differs .*Use one direction"
    refused(tiny, hooks[:4] + others[4:], message)


def test_what_does_more_at_each_point_of_the_residual_stream_is_refused(tiny, vectors):
    every = everywhere(tiny, vectors)
    message = r"it is not idempotent, and the stream passes it at every block\. Keep the hooks\."
    refused(tiny, scale(dict.fromkeys(every.hook_names, 0.1)), message)
    refused(tiny, [(name, Edit(edit.operator, 0.5)) for name, edit in ablate(every, hook="any")], message)
    refused(tiny, ablate(every, hook="any") + ablate(everywhere(tiny, vectors, 1), hook="any"), message)  # slanted
    other = add(everywhere(tiny, vectors, 1), hook="any")
    refused(tiny, ablate(every, hook="any") + other, message)


def test_mixed_lists_are_refused(tiny, vectors):
    for other in (ablate(vectors("z"), [0], hook="z"), add(vectors("mlp_out"), [1], hook="mlp_out")):
        message = (
            r"Ablate at blocks\.0\.hook_resid_pre .*other edits are in the same list\. Bake those first, .*`with oth"
        )
        refused(tiny, ablate(everywhere(tiny, vectors), hook="any") + other, message)


def test_other_hook_points_are_refused_with_those_that_can_be_folded(tiny, vectors):
    can = r"has no exact fold: edits can be folded at resid_pre, .*mlp_out, z of a block\. Keep the hook\."
    for name, operator in [
        ("blocks.0.mlp.hook_post", Scale(0.5)), ("blocks.0.attn.hook_q", Add(torch.ones(4, 8))),
        ("hook_embed", Add(torch.ones(32))), ("ln_final.hook_normalized", Add(torch.ones(32))),
        ("blocks.0.ln1.hook_normalized", Ablate(torch.ones(1, 32))),
    ]:  # fmt: skip
        refused(tiny, [(name, Edit(operator))], rf"hooks: {type(operator).__name__} at {name} {can}")


def test_hook_points_that_are_not_there_are_refused_with_the_nearest(tiny):
    message = r"blocks\.7\.hook_resid_post.*2 blocks.*(Near|Did you mean).*blocks\.\d\.hook_resid"
    refused(tiny, [("blocks.7.hook_resid_post", Edit(Add(torch.ones(32))))], message)


def test_vectors_and_heads_of_another_model_are_refused_as_the_hooks_would(tiny, vectors):
    post = "blocks.0.hook_resid_post"
    for operator in (Add(torch.ones(48)), Clamp(torch.ones(48), 1.0), Ablate(torch.ones(2, 48))):
        for name in (post, "blocks.0.hook_mlp_out"):
            message = r"d_model 48; these activations have 32\. Extract vectors from this model first\."
            refused(tiny, [(name, Edit(operator))], message)
    refused(
        tiny,
        [("blocks.0.hook_mlp_out", Edit(Scale(torch.ones(4, 1))))],
        r"alpha must fit activations of 32, got shape \(4, 1\)",
    )
    refused(
        tiny,
        [(post, Edit(Add(torch.ones(32)), heads=(0,)))],
        r"heads must be None where activations have no heads, .*Use hook='z'",
    )
    for heads in ([4], [-1]):
        refused(tiny, add(vectors("z"), hook="z", heads=heads), r"heads must be in 0\.\.3, got \[")


def test_an_empty_list_is_refused(tiny):
    refused(tiny, [], r"hooks must be at least one edit, .*got an empty list")


NO_FOLD = (
    r"hooks have no exact fold into tiny .*a norm, a multiplier or a parallel path lies in between\. Keep the hooks\."
)


@pytest.mark.hooked
@pytest.mark.parametrize(
    "changes",
    [{"use_normalization_before_and_after": True}, {"original_architecture": "Olmo2ForCausalLM"}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_norm_after_the_weights_is_refused(make_tiny, vectors, changes):
    refused(make_tiny(**changes), add(vectors("resid_post"), [1]), NO_FOLD)


@pytest.mark.hooked
def test_what_another_layout_does_alike_is_folded_and_the_rest_is_refused(make_tiny, vectors):
    """An embedding that is normed takes no constant; a block that writes both parts at once takes one at its end."""
    normed = make_tiny(post_embedding_ln=True)
    refused(normed, add(vectors("resid_pre"), [0], hook="resid_pre"), NO_FOLD)
    check_baked(normed, add(vectors("resid_post"), [1]))
    check_baked(make_tiny(parallel_attn_mlp=True), add(vectors("resid_post"), [0]))


def test_a_mixture_of_experts_has_no_bias_to_fold_into(make_tiny, vectors):
    experts = make_tiny(num_experts=2, experts_per_token=1)
    message = r"model must have the parameter blocks\.1\.mlp\.b_out, into which an edit is folded\. Keep the hooks\."
    refused(experts, add(vectors("resid_post"), [1]), message)
    check_baked(experts, add(vectors("resid_mid"), [1], hook="resid_mid"))


def test_a_bridge_is_baked_as_a_hooked_transformer_is(model, bridge, provenance):
    noise = torch.Generator().manual_seed(0)
    names = hook_names([17, 18], "resid_post")
    vectors = SteeringVectors({name: torch.randn(576, generator=noise) for name in names}, provenance)
    tokens = model.to_tokens("How was your day? It was")
    for hooks in (add(vectors), ablate(vectors.select([18]).everywhere(model, 18), hook="any")):
        of_hooked, of_bridge = rtl.bake(model, hooks), rtl.bake(bridge, hooks)
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            hooked = model(tokens)
        for delta in (of_hooked, of_bridge):  # each on either
            for kind in (model, bridge):
                with torch.no_grad(), delta.applied(kind):
                    assert (kind(tokens) - hooked).abs().max() < 1e-3


# The embedded model


@pytest.fixture(scope="module")
def mood(model: Any, pairs: Any) -> SteeringVectors:
    return rtl.extract_vectors(model, pairs.sample(8))


@pytest.mark.parametrize("edit", ["add", "ablate"])
@torch.no_grad()
def test_baked_is_hooked_on_20_prompts(model, pairs, mood, edit, record_property):
    hooks = add(mood, [18], 2.0) if edit == "add" else ablate(mood.everywhere(model, 18), hook="any")
    prompts = [torch.tensor([encode(model, chat_text(model, topic))]) for topic in pairs.topics[:20]]
    assert len(prompts) == 20

    def last_tokens() -> torch.Tensor:
        return torch.cat([model(prompt)[:, -1] for prompt in prompts])

    plain = last_tokens()
    with model.hooks(fwd_hooks=hooks):
        hooked = last_tokens()
    with rtl.bake(model, hooks).applied(model):
        baked = last_tokens()
    record_property("largest difference", float((baked - hooked).abs().max()))
    assert (hooked - plain).abs().amax(-1).min() > 0.5  # on every prompt
    torch.testing.assert_close(baked, hooked, atol=1e-4, rtol=0)
