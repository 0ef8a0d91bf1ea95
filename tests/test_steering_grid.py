"""What steering does hangs on neither the backend, nor the batch, nor the key-value cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import rt_lens as rtl
from rt_lens.models.generation import generate_tokens
from rt_lens.models.tokens.batches import encode
from rt_lens.steering.binding import ablate, add, add_preserving_norm, clamp, erase, scale, steered
from rt_lens.steering.conditions import Condition, conditional
from rt_lens.steering.edits import Linear
from rt_lens.vectors.steering_vectors import SteeringVectors

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = ["<|im_start|>", CHAT.format("Rain?"), CHAT.format("Tell me about a day that you spent by the sea.")]
LAYERS = [12, 18]
POST = [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]
N = 4


@pytest.fixture(scope="module")
def backends(model, bridge) -> dict[str, Any]:
    return {"hooked": model, "bridge": bridge}


@pytest.fixture(scope="module")
def mood(model, pairs) -> SteeringVectors:
    return rtl.extract_vectors(model, pairs.sample(12), method="leace", layers=LAYERS)


@pytest.fixture(scope="module")
def formality(model) -> SteeringVectors:
    return rtl.extract_vectors(model, rtl.load_pairs("formality").sample(8), layers=LAYERS)


@pytest.fixture(scope="module")
def encoded(model) -> list[list[int]]:
    ids = [encode(model, text) for text in PROMPTS]
    assert len(ids[0]) == 1
    assert len({len(row) for row in ids}) == 3
    return ids


@pytest.fixture(scope="module")
def unsteered(model, encoded) -> list[list[int]]:
    return generate_tokens(model, encoded, N)


def answers(model: Any, encoded: list[list[int]], together: bool, use_cache: bool) -> list[list[int]]:
    """New tokens of each prompt, from one batch or from a batch each."""
    if together:
        return generate_tokens(model, encoded, N, use_cache=use_cache)
    return [generate_tokens(model, [ids], N, rows=[row], use_cache=use_cache)[0] for row, ids in enumerate(encoded)]


# Strong, so that four tokens are enough to see it, and far from ties.
EDITS: dict[str, Callable[[SteeringVectors, SteeringVectors], list]] = {
    "add": lambda mood, formality: add(mood, LAYERS, 6.0),
    "add preserving the norm": lambda mood, formality: add_preserving_norm(mood, LAYERS, -6.0),
    "ablate": lambda mood, formality: ablate(mood, LAYERS),
    "ablate a plane": lambda mood, formality: ablate([mood, formality], LAYERS),
    "clamp": lambda mood, formality: clamp(mood, LAYERS, 30.0),
    "scale": lambda mood, formality: scale({"blocks.12.hook_mlp_out": -2.0, "blocks.18.hook_attn_out": 2.0}),
    "erase": lambda mood, formality: erase(mood, LAYERS),
    "by example": lambda mood, formality: conditional(add(mood, LAYERS, -6.0), Condition(POST[0], mood[POST[0]], -0.8)),
    "by token": lambda mood, formality: conditional(
        add(mood, LAYERS, -6.0), Condition(POST[0], mood[POST[0]], 0.0, by="token")
    ),
    "at chosen tokens of each row": lambda mood, formality: (
        add(mood, [12], torch.tensor([6.0, -6.0, 6.0]), positions="last")
        + add(mood, [18], torch.tensor([6.0, -6.0, 6.0]), positions="generated", schedule=Linear(1.0, 0.5, 3))
        + add(formality, [12], 3.0, positions=[0, -1])
    ),
}
UNMOVED = {"by example": [1]}
"""Rows whose condition does not hold."""


@pytest.mark.parametrize("name", EDITS)
def test_the_same_tokens_on_both_backends_in_a_batch_or_alone_with_a_cache_or_without(
    name, backends, mood, formality, encoded, unsteered
):
    hooks = EDITS[name](mood, formality)
    found = {}
    for backend, model in backends.items():
        with steered(model, hooks):
            for together in (True, False):
                for use_cache in (True, False):
                    found[backend, together, use_cache] = answers(model, encoded, together, use_cache)
    first = found["hooked", True, True]
    assert {way: tokens for way, tokens in found.items() if tokens != first} == {}
    assert len(found) == 8
    changed = [row for row, tokens in enumerate(first) if tokens != unsteered[row]]
    assert changed
    assert not set(changed) & set(UNMOVED.get(name, []))
    assert name != "by example" or changed == [0, 2]


@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_each_choice_of_tokens_changes_the_answers_in_its_own_way(positions, model, mood, encoded, unsteered):
    with steered(model, add(mood, LAYERS, -6.0, positions=positions)):
        chosen = generate_tokens(model, encoded, N)
    with steered(model, add(mood, LAYERS, -6.0)):
        everywhere = generate_tokens(model, encoded, N)
    assert unsteered != chosen != everywhere


def test_generated_tokens_are_edited_from_the_second_choice_on(model, mood, encoded, unsteered):
    with steered(model, add(mood, LAYERS, -6.0, positions="generated")):
        chosen = generate_tokens(model, encoded, N)
    assert [row[0] for row in chosen] == [row[0] for row in unsteered]
    assert chosen != unsteered


# Hook points on both backends


@torch.no_grad()
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "attn_out", "mlp_out", "z"])
def test_an_edit_at_each_kind_of_hook_point_is_the_same_on_both_backends(kind, backends, provenance, encoded):
    noise = torch.Generator().manual_seed(0)
    name = f"blocks.12.{'attn.hook_z' if kind == 'z' else f'hook_{kind}'}"
    shape = (9, 64) if kind == "z" else (576,)
    hooks = add(SteeringVectors({name: torch.randn(*shape, generator=noise)}, provenance), hook=kind)
    if kind == "z":
        hooks = [(name, replace(edit, heads=(2, 5))) for name, edit in hooks]
    tokens = torch.tensor([encoded[1]])
    logits, changes = {}, {}
    for backend, model in backends.items():
        plain = model(tokens)
        with steered(model, hooks):
            logits[backend] = model(tokens)
        changes[backend] = (logits[backend] - plain).abs().max()
    torch.testing.assert_close(logits["bridge"], logits["hooked"], atol=1e-3, rtol=0)
    assert min(changes.values()) > 0.5


@pytest.mark.hooked  # against a HookedTransformer; test_bridges.py has what a bridge refuses
def test_what_a_bridge_cannot_do_at_resid_mid_is_refused_and_not_done_otherwise(backends, provenance, hooks_on):
    """There the hook point is what the MLP reads: an edit does not reach the residual stream."""
    name = "blocks.12.hook_resid_mid"
    vectors = SteeringVectors({name: torch.ones(576)}, provenance)
    tokens = torch.tensor([[504, 2115]])
    for hooks in (add(vectors, hook="resid_mid"), scale({name: 0.5}), add_preserving_norm(vectors, hook="resid_mid")):
        with steered(backends["hooked"], hooks):
            backends["hooked"](tokens)
        with (
            pytest.raises(
                ValueError,
                match=r"hook must be a point on the residual stream, got resid_mid of a TransformerBridge",
            ),
            steered(backends["bridge"], hooks),
        ):
            backends["bridge"](tokens)
        assert not hooks_on(backends["bridge"])


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_an_unknown_hook_point_is_refused_with_the_nearest(backend, backends, provenance, hooks_on):
    model, reached = backends[backend], []
    vectors = SteeringVectors({"blocks.31.hook_resid_post": torch.ones(576)}, provenance)
    known = ("blocks.12.hook_resid_post", lambda h, hook: None)
    with (
        pytest.raises(
            ValueError,
            match=r"'?blocks\.31\.hook_resid_post'?.*30 blocks.*"
            r"(Near: |Did you mean).*blocks\.\d+\.hook_resid_post",
        ),
        steered(model, [known], add(vectors)),
    ):
        reached.append(1)
    assert not reached
    assert not hooks_on(model)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_an_exception_in_the_block_leaves_no_hook_and_keeps_the_users_on_both_backends(
    backend, backends, mood, hooks_on
):
    model, calls = backends[backend], []
    point = model.hook_dict[POST[0]]
    try:
        point.add_hook(lambda h, hook: calls.append("mine"))
        point.add_perma_hook(lambda h, hook: calls.append("mine for good"))
        before = hooks_on(model)
        with pytest.raises(RuntimeError, match="mine"), steered(model, add(mood), ablate(mood, [18])):  # noqa: PT012
            with steered(model, add(mood, [12])):
                assert hooks_on(model) != before
            assert hooks_on(model) != before
            raise RuntimeError("mine")
        assert hooks_on(model) == before
        model(torch.tensor([[504]]))
        assert sorted(calls) == ["mine", "mine for good"]
    finally:
        model.reset_hooks(including_permanent=True)
    assert not hooks_on(model)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_vectors_of_another_model_are_refused_on_both_backends(backend, backends, tiny_vectors, hooks_on):
    model = backends[backend]
    with (
        pytest.raises(ValueError, match=r"d_model 32; these activations have 576\. Extract vectors"),
        steered(model, add(tiny_vectors)),
    ):
        generate_tokens(model, [[504]], 1)
    assert not hooks_on(model)
