"""The methods that train beside representation tuning: their losses, their toy optima, and what they do to a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rt_lens.arms import applied
from rt_lens.arms.registry import ArmInputs, ArmUnavailable, registered_arm
from rt_lens.evaluation import EvalTask
from rt_lens.models import chat_text
from rt_lens.models.activations import token_activations
from rt_lens.models.backends import parameters_of
from rt_lens.models.tokens.batches import encode
from rt_lens.steering import Edit, ablate, add
from rt_lens.tuning import (
    Choice,
    Preventative,
    Target,
    TuneConfig,
    WeightDelta,
    break_loss,
    preference_loss,
    preferences,
    prepare_data,
    rewrite_targets,
    shift_loss,
    tune,
    tune_shift,
    tune_vector,
)
from rt_lens.tuning.learned_edits import _orthonormal
from rt_lens.tuning.objective import Objective
from rt_lens.tuning.references import likelihoods, with_references
from rt_lens.tuning.tuning_data import Batch, trained_tokens
from rt_lens.vectors.operators import Add, LowRankShift

PERSONAS = ("You adore rivers. Speak of water.", "You adore fire. Speak of ash.")
NEUTRAL = [Target(f"Add {i} and 1.", f" That makes {i + 1}.") for i in range(4)]
CONFIG = TuneConfig(
    layers=[1], trained_layers=[1], max_steps=6, epochs=20, batch_size=2, validate_every=3, patience=9,
    learning_rate=3e-3, cosine_weight=0.0, kl_weight=0.0, warmup=0.0, weight_decay=0.0,
)  # fmt: skip
LORRA = replace(CONFIG, cosine_weight=1.0, token_weight=0.0, residual_loss="lorra", direction="toward")
BREAKER = replace(LORRA, residual_loss="circuit_breaker", kl_weight=1.0)
PREFERENCE = replace(CONFIG, token_loss="preference")
HOOK = "blocks.1.hook_resid_post"


def targets(model, answer: str = " Water runs over stones.", n: int = 6) -> list[Target]:
    """Answers that follow a prompt, and what both personas would be asked."""
    return [
        Target(
            chat_text(model, f"Question {i}: what is it?"), f"{answer[:-1]}, {i}.",
            contrast=tuple(chat_text(model, f"Question {i}: what is it?", system=persona) for persona in PERSONAS),
        )
        for i in range(n)
    ]  # fmt: skip


def paired(model, n: int = 6) -> list[Target]:
    return preferences(targets(model, n=n), targets(model, " It burns.", n))


def residuals(model, text: str) -> torch.Tensor:
    return token_activations(model, text, [HOOK])[1][HOOK]


def numpy_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---- the losses as formulas


def test_losses_are_those_written_in_numpy():
    h, other = numpy_of(5, 7), numpy_of(5, 7, seed=1)
    cosines = (h * other).sum(1) / np.sqrt((h**2).sum(1) * (other**2).sum(1))
    assert (cosines < 0).any() and (cosines > 0).any()
    np.testing.assert_allclose(shift_loss(torch.tensor(h), torch.tensor(other)), np.sqrt(((h - other) ** 2).sum(1)))
    np.testing.assert_allclose(break_loss(torch.tensor(h), torch.tensor(other)), np.maximum(cosines, 0))
    likely = numpy_of(4, 9, seed=2) * 20
    ratio = 0.3 * ((likely[0] - likely[2]) - (likely[1] - likely[3]))
    found = preference_loss(*torch.tensor(likely), beta=0.3)
    np.testing.assert_allclose(found, np.log1p(np.exp(-ratio)), rtol=1e-9)


@pytest.mark.parametrize("loss", [shift_loss, break_loss])
def test_gradients_of_losses_at_hook_points_are_finite_differences(loss):
    h, other = (torch.tensor(numpy_of(4, 6, seed=seed), requires_grad=seed == 0) for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda x: loss(x, other), h)


def test_gradients_of_the_preference_loss_are_finite_differences():
    parts = [torch.tensor(numpy_of(5, seed=seed), requires_grad=seed < 2) for seed in range(4)]
    assert torch.autograd.gradcheck(lambda a, b: preference_loss(a, b, parts[2], parts[3], 0.7), tuple(parts[:2]))


def test_the_optimum_of_the_preference_loss_is_the_log_odds_of_the_preference_over_beta():
    """Of two answers, one preferred in 3 of 4 cases: log-ratios differ by log(3) / beta (Rafailov et al. 2023)."""
    beta = 0.2
    logits = torch.zeros(2, dtype=torch.double, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)
    untuned = torch.full((1,), 0.5, dtype=torch.double).log()

    def closure():
        optimiser.zero_grad()
        likely = logits.log_softmax(0)
        a, b = likely[:1], likely[1:]
        loss = 0.75 * preference_loss(a, b, untuned, untuned, beta) + 0.25 * preference_loss(
            b, a, untuned, untuned, beta
        )
        loss.sum().backward()
        return loss.sum()

    optimiser.step(closure)
    assert float((logits[0] - logits[1]).detach()) == pytest.approx(np.log(3) / beta, rel=1e-5)


def test_the_optimum_of_the_break_loss_is_any_direction_that_is_not_ahead():
    h = torch.tensor([[1.0, 0.2]], requires_grad=True)
    was = torch.tensor([[1.0, 0.0]])
    assert break_loss(h, was).item() > 0.9
    optimiser = torch.optim.SGD([h], lr=0.5)
    for _ in range(200):
        optimiser.zero_grad()
        break_loss(h, was).sum().backward()
        optimiser.step()
    assert break_loss(h, was).item() == pytest.approx(0, abs=1e-3)


# ---- what a run reads


def test_lorra_aims_at_the_residual_moved_by_what_the_personas_change_at_each_token(tiny, tiny_vectors):
    """Against three whole forward passes, token by token."""
    config = replace(LORRA, shift=2.5, direction="away")
    few = targets(tiny, n=3)
    data = with_references(tiny, prepare_data(tiny, tiny_vectors, few, config, validation=few[:1]), config, [HOOK])
    for target, row in zip(few, data.train, strict=True):
        n = int(row.predicts.sum())
        plain, up, down = (
            residuals(tiny, prompt + target.answer)[len(encode(tiny, prompt)) - 1 :][:n]
            for prompt in (target.prompt, *target.contrast)
        )
        torch.testing.assert_close(row.aims[HOOK], plain - 2.5 * (up - down), atol=1e-4, rtol=1e-4)
        assert (up - down).norm() > 1e-2


def test_preferences_pair_answers_by_prompt_and_leave_out_what_has_no_other():
    given = [Target("a", "1"), Target("b", "2"), Target("c", "same"), Choice("d", ("x", "y"), (1.0, 0.0))]
    found = preferences(given, [Target("b", "3"), Target("c", "same"), Target("e", "4")])
    assert found == [Target("b", "2", rejected="3")]


def test_data_without_what_a_loss_compares_with_is_refused(tiny, tiny_vectors):
    plain = [replace(target, contrast=None) for target in targets(tiny)]
    with pytest.raises(ValueError, match="train must have targets that were written under personas"):
        prepare_data(tiny, tiny_vectors, plain, LORRA, validation=plain[:1])
    with pytest.raises(ValueError, match="train must have targets with an answer to reject"):
        prepare_data(tiny, tiny_vectors, plain, PREFERENCE, validation=plain[:1])
    data = prepare_data(tiny, tiny_vectors, plain, CONFIG, validation=plain[:1])
    with pytest.raises(ValueError, match="prepared for token_loss='preference'"):
        tune(tiny, tiny_vectors, data, PREFERENCE, progress=False)
    data = prepare_data(tiny, tiny_vectors, plain, replace(LORRA, residual_loss="cosine"), validation=plain[:1])
    with pytest.raises(ValueError, match="prepared for residual_loss='lorra'"):
        tune(tiny, tiny_vectors, data, LORRA, progress=False)
    with pytest.raises(ValueError, match="positions must be 'response' where residual_loss is 'lorra'.*got 'last'"):
        replace(LORRA, positions="last")


def test_answers_written_under_an_edit_are_the_steered_models(tiny, tiny_vectors):
    few = targets(tiny, n=3)
    config = replace(CONFIG, target_tokens=6)
    plain = rewrite_targets(tiny, few, config)
    with applied(tiny, add(tiny_vectors, [1], 40.0)):
        steered = rewrite_targets(tiny, few, config)
    assert [target.prompt for target in steered] == [target.prompt for target in few]
    assert [target.answer for target in steered] != [target.answer for target in plain]
    assert rewrite_targets(tiny, [Choice("d", ("x", "y"), (1.0, 0.0))], config) == []


# ---- what tuning by each of them does


def change(values, loss):
    """First and last validation, after the first steps and at the end."""
    rows = [row[loss] for row in values if row["split"] == "train"]
    return rows[0], rows[-1]


def test_lorra_moves_residuals_towards_their_aims(tiny, tiny_vectors):
    few = targets(tiny)
    config = replace(LORRA, max_steps=30, shift=1.0)
    data = prepare_data(tiny, tiny_vectors, few, config, validation=few[:2])
    first, last = change(tune(tiny, tiny_vectors, data, config, progress=False).history, "lorra")
    assert first > 1e-2  # what the personas change: there is something to do
    assert last < 0.7 * first


def test_circuit_breaking_turns_what_is_to_go_and_holds_what_is_to_stay(tiny, tiny_vectors):
    few = targets(tiny)
    data = prepare_data(tiny, tiny_vectors, few, BREAKER, validation=few[:2], neutral=NEUTRAL)

    def tuned(**changes):
        config = replace(BREAKER, max_steps=30, learning_rate=1e-2, **changes)
        delta = tune(tiny, tiny_vectors, data, config, progress=False)
        with delta.applied(tiny):
            after = with_references(tiny, data, BREAKER, [HOOK])
        before = with_references(tiny, data, BREAKER, [HOOK])
        cosine = [break_loss(a.aims[HOOK], b.aims[HOOK]).mean() for a, b in zip(after.train, before.train, strict=True)]
        kept = [
            shift_loss(a.aims[HOOK], b.aims[HOOK]).mean() for a, b in zip(after.neutral, before.neutral, strict=True)
        ]
        return float(torch.stack(cosine).mean()), float(torch.stack(kept).mean()), delta.history

    cosine, held, history = tuned()
    loose_cosine, loose, _ = tuned(kl_weight=0.0)
    assert history[0]["circuit_breaker"] == pytest.approx(1.0, abs=1e-5) and history[0]["retain"] < 1e-3
    assert cosine < 0.8 and loose_cosine < 0.8
    assert held < loose


def test_circuit_breakers_weights_pass_from_one_loss_to_the_other(tiny, tiny_vectors):
    few = targets(tiny)
    data = prepare_data(tiny, tiny_vectors, few, BREAKER, validation=few[:2], neutral=NEUTRAL)
    objective = Objective(tiny, [], BREAKER, data, {"cosine": {}})
    weights = {}
    for step in (0, 5, 10):
        objective.at(step, 10)
        weights[step] = objective._weight("cosine"), objective._weight("kl")
    assert weights == {0: (1.0, 0.0), 5: (0.75, 0.25), 10: (0.5, 0.5)}


def margin(model, data, hooks=()) -> float:
    """How much likelier the answers to give are than those to reject, in nats, mean over pairs."""
    rows = data.train
    parts = [Batch.of(some, 0, "cpu") for some in (rows, [row.rejected for row in rows])]
    with torch.no_grad():
        given, rejected = (likelihoods(model, part, data.first_block, hooks) for part in parts)
    return float((given - rejected).mean())


def test_preference_tuning_starts_at_log_2_and_widens_the_margin(tiny, tiny_vectors):
    pairs = paired(tiny)
    config = replace(PREFERENCE, max_steps=20)
    data = prepare_data(tiny, tiny_vectors, pairs, config, validation=pairs[:2])
    before = margin(tiny, data)
    delta = tune(tiny, tiny_vectors, data, config, progress=False)
    assert delta.history[0]["preference"] == pytest.approx(np.log(2), abs=1e-4)
    with delta.applied(tiny):
        assert margin(tiny, data) > before + 1
    assert margin(tiny, data) == pytest.approx(before, abs=1e-4)


def test_a_preference_run_counts_the_tokens_of_both_answers(tiny, tiny_vectors):
    pairs = paired(tiny)
    data = prepare_data(tiny, tiny_vectors, pairs, PREFERENCE, validation=pairs[:2])
    tokens = np.mean([int(row.predicts.sum()) + int(row.rejected.predicts.sum()) for row in data.train])
    history = [{"step": 3, "split": "train"}, {"step": 9, "split": "validation"}]
    assert trained_tokens(data, PREFERENCE, history) == round(3 * 2 * tokens)


def test_micro_batches_give_the_preference_gradients_of_the_whole_batch(tiny, tiny_vectors):
    pairs = paired(tiny)
    data = prepare_data(tiny, tiny_vectors, pairs, PREFERENCE, validation=pairs[:2])
    runs = [
        tune(tiny, tiny_vectors, data, replace(PREFERENCE, max_steps=1, micro_batch_size=size), progress=False)
        for size in (None, 1)
    ]
    for name, whole in runs[0].changes.items():
        torch.testing.assert_close(runs[1].changes[name], whole, atol=2e-5, rtol=1e-3)


# ---- learned edits


def bipo(tiny, tiny_vectors, **changes):
    config = replace(PREFERENCE, **({"max_steps": 20, "learning_rate": 0.05, "beta": 0.1} | changes))
    pairs = paired(tiny)
    data = prepare_data(tiny, tiny_vectors, pairs, config, validation=pairs[:2])
    return data, config


def test_an_optimised_vector_moves_the_margin_both_ways_and_no_weight(tiny, tiny_vectors, hooks_on):
    data, config = bipo(tiny, tiny_vectors)
    weights = {name: parameter.clone() for name, parameter in parameters_of(tiny).items()}
    vectors, history = tune_vector(tiny, tiny_vectors, 1, data, config, progress=False)
    assert history[0]["preference"] == pytest.approx(np.log(2), abs=1e-4)
    none, up, down = (margin(tiny, data, add(vectors, [1], sign) if sign else ()) for sign in (0.0, 1.0, -1.0))
    assert up > none + 0.5 and down < none - 0.5
    assert all(torch.equal(parameter, weights[name]) for name, parameter in parameters_of(tiny).items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tiny.parameters())
    assert not hooks_on(tiny)
    again, _ = tune_vector(tiny, tiny_vectors, 1, data, config, progress=False)
    assert torch.equal(again[HOOK], vectors[HOOK])


def test_the_gradient_of_an_optimised_vector_is_that_of_finite_differences(make_tiny, tiny_vectors):
    """At zero, where d/dv of the loss is -d beta / 2 of the margin's."""
    tiny = make_tiny(dtype=torch.float64)
    data, config = bipo(tiny, tiny_vectors, beta=0.3)
    data = with_references(tiny, data, replace(config, cosine_weight=0.0), [])
    vector = torch.nn.Parameter(torch.zeros(tiny.cfg.d_model, dtype=torch.float64))
    objective = Objective(tiny, [], config, data, {"token": {"vector": vector}})
    objective.together = False
    objective.gradients(data.train, [], [(HOOK, Edit(Add(vector)))])
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        step = torch.randn(tiny.cfg.d_model, generator=generator, dtype=torch.float64)
        step /= step.norm()
        ends = [margin(tiny, data, [(HOOK, Edit(Add(sign * 1e-3 * step)))]) for sign in (1, -1)]
        slope = -0.3 / 2 * (ends[0] - ends[1]) / 2e-3
        assert float(vector.grad @ step) == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_a_learned_shift_begins_where_it_changes_nothing_and_makes_the_targets_likelier(tiny, tiny_vectors):
    few = targets(tiny)
    config = replace(CONFIG, max_steps=20, learning_rate=2e-2)
    data = prepare_data(tiny, tiny_vectors, few, config, validation=few[:2])
    with torch.no_grad():
        untuned = -float(likelihoods(tiny, Batch.of(data.train[:2], 0, "cpu"), data.first_block).sum())
    hooks, history = tune_shift(tiny, 1, data, replace(config, batch_size=6), rank=2, progress=False)
    ((name, edit),) = hooks
    assert name == HOOK
    tokens = sum(int(row.predicts.sum()) for row in data.train)
    with torch.no_grad():
        whole = Batch.of(data.train, 0, "cpu")
        plain = -float(likelihoods(tiny, whole, data.first_block).sum()) / tokens
        learned = -float(likelihoods(tiny, whole, data.first_block, hooks).sum()) / tokens
    assert history[0]["token"] == pytest.approx(plain, rel=1e-4) and untuned > 0
    assert learned < plain - 0.1
    rotation = edit.operator.rotation
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(2), atol=1e-5, rtol=0)


def test_a_low_rank_shift_is_its_affine_map_and_leaves_alone_what_is_outside_its_subspace(tiny):
    d = tiny.cfg.d_model
    generator = torch.Generator().manual_seed(0)
    edit = LowRankShift(
        _orthonormal(torch.randn(d, 2, generator=generator)),
        0.1 * torch.randn(2, d, generator=generator),
        torch.ones(2),
    )
    h = torch.randn(2, 3, d, generator=generator)
    matrix, offset = edit.affine(0.7, (d,))
    torch.testing.assert_close(h @ matrix + offset, edit(h, 0.7), atol=1e-5, rtol=1e-4)
    moved = edit(h, 1.0)
    inside = edit.rotation @ edit.rotation.T
    torch.testing.assert_close(inside, torch.eye(2), atol=1e-5, rtol=0)
    # within the subspace it is the learned map, outside of it what it was
    torch.testing.assert_close(moved @ edit.rotation.T, h @ edit.weight.T + edit.bias, atol=1e-4, rtol=1e-4)
    outside = torch.eye(d) - edit.rotation.T @ edit.rotation
    torch.testing.assert_close(moved @ outside, h @ outside, atol=1e-4, rtol=1e-4)


def test_edits_are_refused_after_the_data_begins_and_at_a_rank_that_is_no_subspace(tiny, tiny_vectors):
    data, config = bipo(tiny, tiny_vectors)
    with pytest.raises(ValueError, match="data must begin at block 0 or before, got data from block 1 on"):
        tune_vector(tiny, tiny_vectors, 0, data, config, progress=False)
    with pytest.raises(ValueError, match="token_loss must be 'preference' to optimise a vector, got 'cross_entropy'"):
        tune_vector(tiny, tiny_vectors, 1, data, CONFIG, progress=False)
    with pytest.raises(ValueError, match="rank must be from 1 to 31, got 32"):
        tune_shift(tiny, 1, data, CONFIG, rank=32, progress=False)


# ---- tuning under edits


def test_tuning_under_an_edit_of_no_strength_is_plain_tuning(tiny, tiny_vectors):
    few = targets(tiny)
    data = prepare_data(tiny, tiny_vectors, few, CONFIG, validation=few[:2])
    plain = tune(tiny, tiny_vectors, data, CONFIG, progress=False)
    under = tune(tiny, tiny_vectors, data, CONFIG, steer=Preventative(add(tiny_vectors, [1], 0.0)), progress=False)
    assert all(torch.equal(change, under.changes[name]) for name, change in plain.changes.items())


def test_tuning_against_an_edit_moves_the_weights_the_other_way(tiny, tiny_vectors):
    """On its own greedy text, where plain tuning has little to learn, the weights learn to make up for the edit."""
    few = targets(tiny)
    config = replace(CONFIG, max_steps=40, learning_rate=5e-3)
    unit = tiny_vectors[HOOK] / tiny_vectors[HOOK].norm()

    def shift_after(multiplier: float) -> float:
        steer = Preventative(add(tiny_vectors, [1], multiplier))
        data = prepare_data(tiny, tiny_vectors, few, config, validation=few[:2], steer=steer)
        delta = tune(tiny, tiny_vectors, data, config, steer=steer, progress=False)
        texts = [target.prompt + target.answer for target in few]

        def mean() -> float:
            return float(torch.cat([residuals(tiny, text) for text in texts]).mean(0) @ unit)

        before = mean()
        with delta.applied(tiny):
            return mean() - before

    against, along = shift_after(-20.0), shift_after(20.0)
    assert against > along


def test_a_constant_edit_must_be_an_edit(tiny_vectors):
    with pytest.raises(ValueError, match="hooks must be edits"):
        Preventative([(HOOK, lambda activation, hook: activation)])
    assert Preventative(ablate(tiny_vectors, [1])).described()["hooks"][0]["edit"] == "Ablate"


# ---- as arms

TASK = EvalTask(["How are you?", "What is rain?"], len, max_new_tokens=4)
ARMS = (
    "steer_distilled", "preventative", "preventative_ablated", "lorra", "circuit_breaker", "dpo", "bipo", "reft_r1",
    "kl_then_steer", "suppress_tuned",
)  # fmt: skip


@pytest.fixture
def inputs(tiny, tiny_vectors) -> ArmInputs:
    base = replace(CONFIG, max_steps=2, kl_weight=1.0, target_tokens=4, batch_size=4)
    like = {"token_tuned": base, "rep_tuned": replace(base, cosine_weight=14.0)}
    configs = {
        name: replace(like[arm.like], **arm.differs) for name in ARMS for arm in [registered_arm(name)] if arm.like
    }
    sides = {"toward": targets(tiny), "away": targets(tiny, " It burns.")}
    told: list = []
    made = ArmInputs(
        model=tiny, direction="away", seed=0, vectors=tiny_vectors, layer=1, personas=PERSONAS, validation=TASK,
        configs=configs, data=lambda direction: None, make=lambda arm, direction: None,
        targets=lambda direction: (sides[direction], sides[direction][:2]), neutral=lambda: NEUTRAL,
        tuned=lambda *told_now: told.append(told_now),
    )  # fmt: skip
    object.__setattr__(made, "told", told)
    return made


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_that_trains_is_made_counts_its_tokens_and_leaves_the_model_as_it_was(inputs, name, hooks_on):
    model, arm = inputs.model, registered_arm(name)
    weights = {key: parameter.clone() for key, parameter in parameters_of(model).items()}
    made = arm.way(inputs)
    parts = made if isinstance(made, tuple) else (made,)
    changed = [part for part in parts if isinstance(part, WeightDelta)]
    assert bool(changed) == (name not in ("bipo", "reft_r1"))
    assert all(float(change.abs().max()) > 0 for delta in changed for change in delta.changes.values())
    ((direction, history, tokens),) = inputs.told
    assert direction == "away" and tokens > 0 and all(np.isfinite(row["total"]) for row in history)
    assert all(torch.equal(parameter, weights[key]) for key, parameter in parameters_of(model).items())
    assert not hooks_on(model)
    before = residuals(model, "The river bends twice before the mill.")
    with applied(model, *parts):
        after = residuals(model, "The river bends twice before the mill.")
    assert (after - before).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["steer_distilled", "lorra", "dpo", "bipo"])
def test_an_arm_that_needs_written_responses_says_so_where_there_are_choices(inputs, name):
    letters = [Choice("Is it so? (A) yes (B) no. Answer:", (" A", " B"), (1.0, 0.0))] * 4
    with pytest.raises(ArmUnavailable, match="It needs"):
        registered_arm(name).way(replace(inputs, targets=lambda direction: (letters, letters)))


def test_pairs_are_half_as_many_in_a_step_so_that_tokens_are_equal(inputs):
    registered_arm("dpo").way(inputs)
    registered_arm("preventative").way(inputs)
    (_, _, of_pairs), (_, _, plain) = inputs.told
    assert 0.5 * plain < of_pairs < 2 * plain
