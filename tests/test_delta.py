"""Deltas: their arithmetic, and that what is put on comes off bit for bit, whatever happens in between."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rt_lens as rtl
from rt_lens.models.backends import has_hooked, parameters_of
from rt_lens.tuning.delta import WeightDelta

OWN = ("blocks.0.attn.W_Q", "blocks.1.mlp.W_out", "blocks.1.mlp.b_out")
THEIRS = tuple(f"model.layers.{name}" for name in ("0.self_attn.q_proj.weight", "1.mlp.down_proj.weight",
               "1.mlp.down_proj.bias"))  # fmt: skip
NAMES = OWN if has_hooked() else THEIRS


def delta_of(model, names=NAMES, seed=0, **config) -> WeightDelta:
    noise = torch.Generator().manual_seed(seed)
    parameters = parameters_of(model)
    changes = {name: torch.randn(parameters[name].shape, generator=noise) for name in names}
    return WeightDelta(changes, "tiny", {"seed": seed, **config}, [{"step": 1}])


def bits(model) -> dict[str, tuple[int, bytes]]:
    """Where each parameter lies in memory, and what is there."""
    return {name: (p.data_ptr(), p.detach().numpy().tobytes()) for name, p in parameters_of(model).items()}


def values(model) -> dict[str, bytes]:
    return {name: there for name, (_, there) in bits(model).items()}


def same(a: WeightDelta, b: WeightDelta) -> bool:
    return a.changes.keys() == b.changes.keys() and all(torch.equal(a.changes[n], b.changes[n]) for n in a.changes)


# --- arithmetic


def test_a_sum_commutes_and_does_what_both_do(tiny):
    a, b = delta_of(tiny, NAMES[:2], 0), delta_of(tiny, NAMES[1:], 1)
    assert same(a + b, b + a)
    assert set((a + b).changes) == set(NAMES)
    assert torch.equal((a + b).changes[NAMES[0]], a.changes[NAMES[0]])
    assert torch.equal((a + b).changes[NAMES[1]], a.changes[NAMES[1]] + b.changes[NAMES[1]])
    assert torch.equal((a + b).changes[NAMES[2]], b.changes[NAMES[2]])


def test_a_difference_is_the_sum_with_the_negative_also_for_what_only_the_other_changes(tiny):
    a, b = delta_of(tiny, NAMES[:2], 0), delta_of(tiny, NAMES[1:], 1)
    assert same(a - b, a + (-b))
    assert torch.equal((a - b).changes[NAMES[2]], -b.changes[NAMES[2]])
    negative = -a
    assert same(-negative, a)


def test_a_delta_minus_itself_is_zero_everywhere_and_leaves_the_model_bit_for_bit(tiny):
    with torch.no_grad():
        tiny.blocks[1].mlp.b_out[:3] = -0.0  # -0.0 + 0.0 would be 0.0, which has other bits
    a, before = delta_of(tiny), values(tiny)
    with a.applied(tiny):
        assert values(tiny) != before
    for nothing in (a - a, a + -a, 0 * a, a * -0.0):
        assert set(nothing.changes) == set(NAMES)
        assert not any(change.any() for change in nothing.changes.values())
        with nothing.applied(tiny):
            assert values(tiny) == before


def test_a_factor_is_a_dial(tiny):
    a = delta_of(tiny)
    assert same(a * 1.0, a)
    assert same(0.5 * a, a * 0.5)
    assert same(0.5 * a + 0.5 * a, a)  # halves are exact in binary
    assert same(a * np.float64(2), a + a)
    weight = tiny.W_Q[0].clone()
    with (0.5 * a).applied(tiny):
        assert torch.allclose(tiny.W_Q[0] - weight, 0.5 * a.changes[NAMES[0]], atol=1e-6)
        assert (tiny.W_Q[0] - weight).abs().max() > 0.1


@given(st.floats(-8, 8), st.floats(-8, 8))
def test_factors_distribute_over_sums(x, y):
    a, b = (WeightDelta({"w": torch.tensor([1.0, -2.0]) * k}, "tiny", {}, []) for k in (1.0, 3.0))
    left, right = (x + y) * (a + b), x * a + y * a + x * b + y * b
    assert torch.allclose(left.changes["w"], right.changes["w"], atol=1e-4)


def test_a_result_says_what_it_was_made_of_and_has_no_history(tiny, tmp_path):
    a, b = delta_of(tiny, direction="away"), delta_of(tiny, seed=1, direction="toward")
    made = 0.5 * (a - b)
    assert made.config == {
        "times": 0.5,
        "of": {"sum_of": [{"seed": 0, "direction": "away"}, {"times": -1.0, "of": {"seed": 1, "direction": "toward"}}]},
    }
    assert a.history
    assert made.history == []
    assert made.model == "tiny"
    loaded = WeightDelta.load(made.save(tmp_path / "made.safetensors"))
    assert json.loads(json.dumps(loaded.config)) == made.config
    assert same(loaded, made)


def test_the_operands_stay_as_they_were(tiny):
    a, b = delta_of(tiny), delta_of(tiny, seed=1)
    before = {name: change.clone() for name, change in a.changes.items()}
    _ = a + b, a - b, -a, 3 * a
    assert all(torch.equal(a.changes[name], before[name]) for name in before)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf, "0.5", None, True, torch.tensor(2.0)])
def test_a_factor_that_is_no_finite_number_is_refused(tiny, as_a_user, factor):
    with pytest.raises(ValueError, match="factor must be a finite number, got "):
        delta_of(tiny) * factor


def test_deltas_that_do_not_belong_together_are_refused_by_name(tiny, as_a_user):
    a = delta_of(tiny)
    other = WeightDelta(a.changes, "SmolLM2", {}, [])
    narrow = WeightDelta({NAMES[2]: torch.ones(7)}, "tiny", {}, [])
    for join in (lambda x, y: x + y, lambda x, y: x - y):
        with pytest.raises(ValueError, match="deltas must be of one model, got tiny and SmolLM2"):
            join(a, other)
        with pytest.raises(ValueError, match=r"got \(32,\) and \(7,\) for blocks\.1\.mlp\.b_out"):
            join(a, narrow)
        with pytest.raises(ValueError, match="delta must be a WeightDelta, got int"):
            join(a, 3)
    assert set((a + WeightDelta(a.changes, "Tiny", {}, [])).changes) == set(NAMES)  # capitals are no other model


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_change_that_is_not_finite_is_refused_by_its_parameters_name(wrong):
    with pytest.raises(ValueError, match=r"NaN or infinite values in the change of b\.w"):
        WeightDelta({"a.w": torch.ones(2), "b.w": torch.tensor([1.0, wrong])}, "tiny", {}, [])
    with pytest.raises(ValueError, match=r"the change of a\.w"):
        WeightDelta({"a.w": torch.full((2,), 3e38)}, "tiny", {}, []) * 10


# --- on and off


def test_apply_puts_on_and_its_undo_restores_the_very_memory(tiny):
    a, before = delta_of(tiny), bits(tiny)
    undo = a.apply(tiny)
    now = bits(tiny)
    assert {name for name in before if now[name] != before[name]} == set(NAMES)
    undo()
    assert bits(tiny) == before
    undo()
    assert bits(tiny) == before


def test_apply_gives_what_applied_gives(tiny):
    a = delta_of(tiny)
    with a.applied(tiny):
        inside = values(tiny)
    undo = a.apply(tiny)
    assert values(tiny) == inside
    undo()


@pytest.mark.parametrize("what", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_the_weights_come_back_whatever_ends_the_block(tiny, what):
    before, inside = bits(tiny), {}
    with pytest.raises(what), delta_of(tiny).applied(tiny):  # noqa: PT012
        inside |= bits(tiny)
        raise what
    assert inside != before
    assert bits(tiny) == before


class InterruptedOnce(nn.Parameter):
    """A parameter at whose first change of memory somebody presses Ctrl-C."""

    pressed = False

    @property
    def data(self):
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, memory):
        if not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt
        Tensor.data.__set__(self, memory)


@pytest.mark.parametrize("enter", [lambda delta, model: delta.apply(model), lambda d, m: d.applied(m).__enter__()])
def test_ctrl_c_between_two_parameters_takes_the_first_off_again(tiny, enter):
    tiny.blocks[1].mlp.b_out = InterruptedOnce(tiny.blocks[1].mlp.b_out.data)
    before = bits(tiny)
    with pytest.raises(KeyboardInterrupt):
        enter(delta_of(tiny), tiny)
    assert bits(tiny) == before


def test_nested_deltas_add_up_and_come_off_one_by_one(tiny):
    a, b, before = delta_of(tiny), delta_of(tiny, seed=1), bits(tiny)
    with (a + b).applied(tiny):
        together = tiny.W_Q[0].clone()
    with a.applied(tiny):
        first = bits(tiny)
        with b.applied(tiny):
            assert torch.allclose(tiny.W_Q[0], together, atol=1e-6)
        assert bits(tiny) == first
        with a.applied(tiny):  # the same one twice
            assert bits(tiny) != first
        assert bits(tiny) == first
    assert bits(tiny) == before


def test_undoing_the_earlier_of_two_is_refused_and_changes_nothing(tiny):
    before = bits(tiny)
    undo_a, undo_b = delta_of(tiny).apply(tiny), delta_of(tiny, NAMES[1:], seed=1).apply(tiny)
    both = bits(tiny)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.W_out was replaced .* Undo the later one first"):
        undo_a()
    assert bits(tiny) == both
    undo_b()
    undo_a()
    assert bits(tiny) == before


def test_deltas_of_different_parameters_come_off_in_any_order(tiny):
    before = bits(tiny)
    undo_a, undo_b = delta_of(tiny, NAMES[:1]).apply(tiny), delta_of(tiny, NAMES[1:]).apply(tiny)
    undo_a()
    assert bits(tiny)[NAMES[0]] == before[NAMES[0]]
    assert bits(tiny)[NAMES[1]] != before[NAMES[1]]
    undo_b()
    assert bits(tiny) == before


def test_a_second_undo_does_not_take_off_what_was_put_on_later(tiny):
    undo = delta_of(tiny).apply(tiny)
    undo()
    with delta_of(tiny, seed=1).applied(tiny):
        later = bits(tiny)
        undo()
        assert bits(tiny) == later


def test_something_elses_weights_are_not_overwritten_by_the_undo(tiny):
    undo = delta_of(tiny).apply(tiny)
    theirs = torch.zeros_like(tiny.blocks[1].mlp.b_out)
    tiny.blocks[1].mlp.b_out.data = theirs
    there = bits(tiny)
    with pytest.raises(ValueError, match="Undo the later one first"):
        undo()
    assert bits(tiny) == there


@pytest.mark.parametrize("changes", [{"blocks.9.attn.W_Q": (4, 32, 8)}, {"blocks.1.mlp.b_out": (31,)}])
def test_what_does_not_fit_is_refused_before_anything_changes(tiny, changes):
    before = bits(tiny)
    wrong = {name: torch.ones(shape) for name, shape in changes.items()}
    delta = WeightDelta({NAMES[0]: torch.ones_like(tiny.W_Q[0]), **wrong}, "tiny", {}, [])
    with pytest.raises(ValueError, match=f"delta must fit the model, got .* for {next(iter(changes))} "):
        delta.apply(tiny)
    with pytest.raises(ValueError, match="this model has"), delta.applied(tiny):
        pytest.fail("the block ran")
    assert bits(tiny) == before


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_works_without_gradients_and_leaves_parameters_that_take_them(tiny, mode):
    before, tokens = bits(tiny), torch.arange(5)[None]
    with mode():
        plain = tiny(tokens)
        undo = delta_of(tiny).apply(tiny)
        assert not torch.allclose(tiny(tokens), plain)
    tiny(tokens).sum().backward()  # an inference tensor as a weight would refuse this
    assert all(parameters_of(tiny)[name].grad is not None for name in NAMES)
    with mode():
        undo()
        assert torch.equal(tiny(tokens), plain)
    assert bits(tiny) == before


def test_the_memory_layout_stays_that_of_the_weight(tiny):
    tiny.blocks[1].mlp.W_out.data = tiny.blocks[1].mlp.W_out.data.T.contiguous().T
    layout = tiny.blocks[1].mlp.W_out.stride()
    with delta_of(tiny).applied(tiny):
        assert tiny.blocks[1].mlp.W_out.stride() == layout == (1, 64)


def test_half_precision_stays_half_precision(make_tiny):
    half = make_tiny(dtype=torch.bfloat16)
    delta = WeightDelta({NAMES[2]: torch.ones(32)}, "tiny", {}, [])
    before = half.blocks[1].mlp.b_out.detach().clone()
    with delta.applied(half):
        assert half.blocks[1].mlp.b_out.dtype == torch.bfloat16
        assert torch.equal(half.blocks[1].mlp.b_out, before + 1)


def test_of_tied_embeddings_only_the_named_one_changes(model):
    shared = model.embed.W_E.data_ptr()
    assert model.unembed.W_U.data_ptr() == shared
    delta = WeightDelta({"embed.W_E": torch.ones_like(model.embed.W_E)}, "smollm2-135m-instruct", {}, [])
    corner = model.unembed.W_U[:4, :4].clone()
    with delta.applied(model):
        assert torch.allclose(model.embed.W_E[:4, :4], corner.T + 1)
        assert torch.equal(model.unembed.W_U[:4, :4], corner)
    assert model.embed.W_E.data_ptr() == model.unembed.W_U.data_ptr() == shared


def test_half_a_baked_vector_steers_half_as_far(tiny, tiny_vectors):
    tokens = torch.arange(6)[None]
    delta = rtl.bake(tiny, rtl.add(tiny_vectors, [1], 3.0))
    with rtl.applied(tiny, rtl.add(tiny_vectors, [1], 1.5)), torch.no_grad():
        steered = tiny(tokens)
    with (0.5 * delta).applied(tiny), torch.no_grad():
        assert torch.allclose(tiny(tokens), steered, atol=1e-5)
    with delta.applied(tiny), torch.no_grad():
        assert not torch.allclose(tiny(tokens), steered, atol=1e-2)


def test_a_file_with_the_names_of_before_is_read_with_a_hint(tmp_path):
    """Deltas were written with `kinds`, `token_rest` and the direction `out`."""
    old = {"direction": "out", "kinds": ["v", "o"], "token_rest": 0.3, "layers": [20]}
    path = WeightDelta({"blocks.0.attn.W_V": torch.ones(2)}, "tiny", old, []).save(tmp_path / "old.safetensors")
    with pytest.warns(UserWarning, match="'kinds' is now 'target_modules'; the old name still works"):
        delta = WeightDelta.load(path)
    assert delta.config == {"direction": "suppress", "target_modules": ["v", "o"], "free_nats": 0.3, "layers": [20]}
