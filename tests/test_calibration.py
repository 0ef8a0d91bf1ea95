"""Strengths of interventions, and the strength of a given damage."""

from __future__ import annotations

import math

import pytest
import torch

from rt_lens.arms import KLMeter, applied, calibrate, scaled
from rt_lens.data.builtin import neutral_paragraphs
from rt_lens.steering import ablate, add
from rt_lens.tuning import WeightDelta
from rt_lens.vectors import extract_vectors

TEXTS = ["The river bends twice before the mill.", "A prime number has two divisors.", "Copper is a good conductor."]
OTHERS = ["Rice grows in flooded fields.", "The train leaves at noon from the second platform."]
BUDGETS = [0.003, 0.01, 0.03, 0.1]


@pytest.fixture
def delta(tiny):
    noise = torch.Generator().manual_seed(3)
    names = [name for name, weight in tiny.named_parameters() if ".mlp." in name and weight.ndim == 2][:2]
    changes = {name: 0.05 * torch.randn(tiny.get_parameter(name).shape, generator=noise) for name in names}
    return WeightDelta(changes, tiny.cfg.model_name, {}, [])


def test_scaled_edits_have_scaled_multipliers_and_all_else_as_it_was(tiny_vectors):
    by_row = torch.tensor([1.0, -2.0])
    hooks = add(tiny_vectors, multiplier=-2.0, positions="generated") + add(tiny_vectors, [1], by_row)
    first, second, third = (edit for _, edit in scaled(hooks, 0.5))
    assert first.multiplier == second.multiplier == -1.0 and first.positions == "generated"
    assert third.multiplier.tolist() == [0.5, -1.0]
    assert hooks[0][1].multiplier == -2.0  # those given are left alone


def test_scaled_deltas_and_tuples_scale_everything(tiny_vectors, delta):
    half, (_, edit), none = (
        scaled(delta, 0.5),
        *scaled(add(tiny_vectors, [1]), 3.0),
        scaled(None, 3.0),
    )
    assert all(torch.equal(half.changes[name], 0.5 * change) for name, change in delta.changes.items())
    assert edit.multiplier == 3.0 and none is None
    both = scaled((delta, add(tiny_vectors, [1])), 2.0)
    assert torch.equal(*(d.changes[next(iter(delta.changes))] for d in (both[0], 2.0 * delta)))
    assert both[1][0][1].multiplier == 2.0


@pytest.mark.usefixtures("as_a_user")
def test_what_has_no_strength_is_refused(tiny_vectors):
    with pytest.raises(
        ValueError, match="intervention must consist of edits, .*, got a function at blocks.1.hook_resid"
    ):
        scaled([("blocks.1.hook_resid_post", lambda activation, hook: activation)], 2.0)
    with pytest.raises(ValueError, match="strength must be a finite number, got nan"):
        scaled(add(tiny_vectors), math.nan)


def test_the_meter_gives_the_mean_kl_of_all_tokens(tiny, tiny_vectors):
    hooks, total, n = add(tiny_vectors, [1], 1.5), 0.0, 0
    for text in TEXTS:
        tokens = torch.tensor([tiny.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            untuned = tiny(tokens)[0, :-1].double().log_softmax(-1)
            with applied(tiny, hooks):
                steered = tiny(tokens)[0, :-1].double().log_softmax(-1)
        total += float((untuned.exp() * (untuned - steered)).sum())
        n += tokens.shape[1] - 1
    measured = KLMeter(tiny, TEXTS)(hooks)
    assert measured.mean == pytest.approx(total / n, rel=1e-4) and measured.n == len(TEXTS)
    assert measured.mean > 1e-3


@pytest.mark.parametrize("kind", ["hooks", "delta", "both"])
def test_the_strength_found_does_the_damage_asked_for(tiny, tiny_vectors, delta, kind, hooks_on):
    hooks = add(tiny_vectors, [0, 1], 1.0)
    intervention = {"hooks": hooks, "delta": delta, "both": (delta, hooks)}[kind]
    before = {name: weight.clone() for name, weight in tiny.named_parameters()}
    meter, others = KLMeter(tiny, TEXTS), KLMeter(tiny, OTHERS)
    found = calibrate(intervention, meter, BUDGETS, held_out=others)
    for budget, result in zip(BUDGETS, found, strict=True):
        assert result.reached and not result.reason
        assert result.kl.mean == pytest.approx(budget, rel=0.03)
        again = KLMeter(tiny, TEXTS)(result.intervention)  # by another meter, so nothing is remembered
        assert again.mean == pytest.approx(result.kl.mean, rel=1e-5)
        assert result.held_out.n == len(OTHERS) and result.held_out.mean > 0
    strengths = [result.strength for result in found]
    assert strengths == sorted(strengths) and strengths[0] < strengths[-1]
    assert len(found[-1].evaluations) <= 5 * len(BUDGETS)
    assert not hooks_on(tiny)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.named_parameters())


def test_a_negative_dose_keeps_its_sign(tiny, tiny_vectors):
    (found,) = calibrate(add(tiny_vectors, [1], -1.0), KLMeter(tiny, TEXTS), 0.01)
    (_, edit), *_ = found.intervention
    assert edit.multiplier == -found.strength < 0


def test_a_budget_out_of_reach_is_a_gap_with_its_reason(tiny, tiny_vectors, delta):
    meter, nothing = KLMeter(tiny, TEXTS), 0.0 * delta
    (found,) = calibrate(nothing, meter, [0.01])
    assert not found.reached and found.intervention is None and found.kl is None
    assert found.reason == "KL is at most 0 up to 64 times its strength."
    near, far = calibrate(add(tiny_vectors, [1], 1.0), meter, [0.01, 1e6])
    assert near.reached and not far.reached and "up to 64 times" in far.reason


def test_an_ablation_has_a_strength_too(tiny, tiny_vectors):
    (found,) = calibrate(ablate(tiny_vectors, [1]), KLMeter(tiny, TEXTS), 1e-4)
    assert found.reached and found.kl.mean == pytest.approx(1e-4, rel=0.03)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("name", "arguments"), [("kl", (0.0, 0.03)), ("kl", ([0.01, -1.0], 0.03)), ("tolerance", (0.01, 0.0))]
)
def test_budgets_and_tolerance_are_above_0(tiny, tiny_vectors, name, arguments):
    with pytest.raises(ValueError, match=f"{name} must be above 0, got"):
        calibrate(add(tiny_vectors), KLMeter(tiny, TEXTS), arguments[0], tolerance=arguments[1])


@pytest.mark.slow
def test_on_the_real_model_the_budget_holds_on_other_texts(model, pairs):
    """The issue's figure: within 10 % on texts that the calibration has not seen."""
    vectors = extract_vectors(model, pairs.sample(16), layers=[21])
    paragraphs = neutral_paragraphs()
    meter, others = KLMeter(model, paragraphs[0::2]), KLMeter(model, paragraphs[1::2])
    (found,) = calibrate(add(vectors, [21], -1.0), meter, 0.01, held_out=others)
    assert found.held_out.mean == pytest.approx(0.01, rel=0.1)
