"""What tuning is to reach: several directions, shares of a few tokens, and answers kept while steered."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_tuning import answer_of

import rt_lens as rtl
from rt_lens.models.divergence import kl_divergence
from rt_lens.models.tokens.batches import encode
from rt_lens.tuning import direction_targets as aims
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.direction_targets import DirectionTarget, KLThenSteer, resolve_targets
from rt_lens.tuning.loop import tune
from rt_lens.tuning.objective import Objective
from rt_lens.tuning.targets import Choice, Target
from rt_lens.tuning.tuning_data import prepare_data
from rt_lens.tuning.weights import trainable_params, trained_by
from rt_lens.vectors.reading import token_projections
from rt_lens.vectors.steering_vectors import SteeringVectors

TARGETS = [Target(f"Question {i}: what is it?", f" It is the thing number {i}, I think.") for i in range(4)]
NEUTRAL = [Target(f"Add {i} and 1.", f" That makes {i + 1}, I would say.") for i in range(6)]
HELD_OUT = [Target("Name three metals.", " Iron, copper and tin."), Target("What is a week?", " Seven days in a row.")]
THINGS = ("iron", "a week", "the sea", "music", "a red house", "bread")
WAYS = (
    ("What is", "It is certainly"),
    ("Tell me about", "There is much to say about"),
    ("Do you like", "I have never seen"),
    ("Where can I find", "You can look for"),
)
CHOICES = [
    Choice("Is water wet? (A) yes (B) no. Answer:", (" A", " B"), (1.0, 0.0)),
    Choice("Red or blue or green? Answer:", (" A", " B", " C"), (0.2, 0.3, 0.5)),
    Choice("Tea or coffee? Answer:", (" A", " B"), (0.5, 0.5)),
]
CONFIG = TuneConfig(layers=[0, 1], trained_layers=[0, 1], cosine_weight=1.0, kl_weight=0.0, batch_size=4, epochs=99,
                    learning_rate=1e-3, validate_every=99)  # fmt: skip


@pytest.fixture
def others(provenance) -> SteeringVectors:
    noise = torch.Generator().manual_seed(9)
    return SteeringVectors(
        {f"blocks.{i}.hook_resid_post": torch.randn(32, generator=noise) for i in (0, 1)}, provenance
    )


def found_by(model, vectors, targets, config):
    """Losses and gradients of one step over all targets."""
    material = prepare_data(model, vectors, targets, config, validation=targets[:1])
    trained = trained_by(model, config)
    union = {name: parameter for group in trained.values() for name, parameter in group.items()}
    with trainable_params(model, union, config):
        objective = Objective(model, resolve_targets(model, vectors, config), config, material, trained)
        losses = objective.gradients(material.train, [], [])
        return losses, {name: p.grad.clone() for name, p in union.items() if p.grad is not None}


# Several directions


def test_several_aims_have_the_weighted_mean_of_their_losses_and_gradients(tiny, tiny_vectors, others):
    """Of unlike directions, layers and positions; weights count beside each other only."""
    config = replace(CONFIG, token_weight=0.0)
    first = DirectionTarget(tiny_vectors, 1.0, "away", layers=[0, 1])
    second = DirectionTarget(others, 3.0, "toward", layers=[1], positions="mean last 3")
    third = DirectionTarget(tiny_vectors, 4.0, "suppress", layers=[0], positions="last")
    singles = [found_by(tiny, [aim], TARGETS, config) for aim in (first, second, third)]
    losses, grads = found_by(tiny, [first, second, third], TARGETS, config)
    shares = (1 / 8, 3 / 8, 4 / 8)
    assert losses["cosine"] == pytest.approx(
        sum(share * each["cosine"] for share, (each, _) in zip(shares, singles, strict=True)), rel=1e-5
    )
    for name, grad in grads.items():
        parts = [share * each[name] for share, (_, each) in zip(shares, singles, strict=True) if name in each]
        assert (grad - sum(parts)).abs().max() < 1e-5 * max(float(part.abs().max()) for part in parts) + 1e-9
    assert len({round(each["cosine"], 4) for each, _ in singles}) == 3


def test_one_aim_takes_from_the_settings_what_it_does_not_say(tiny, tiny_vectors):
    plain, grads = found_by(tiny, tiny_vectors, TARGETS, CONFIG)
    as_aim, same = found_by(tiny, [DirectionTarget(tiny_vectors, 7.0)], TARGETS, CONFIG)
    assert plain == as_aim
    assert all(torch.equal(grads[name], same[name]) for name in grads)


def test_toward_one_vector_and_away_from_another_moves_both(tiny, tiny_vectors, others):
    config = replace(CONFIG, token_weight=0.0, max_steps=15, learning_rate=3e-3)
    delta = tune(
        tiny,
        [DirectionTarget(tiny_vectors, direction="toward"), DirectionTarget(others, direction="away")], TARGETS, config,
        validation=TARGETS, progress=False,
    )  # fmt: skip
    text = TARGETS[0].prompt + TARGETS[0].answer

    def projections() -> list[float]:
        return [float(token_projections(tiny, vectors, text)[1][1].mean()) for vectors in (tiny_vectors, others)]

    before = projections()
    with delta.applied(tiny):
        after = projections()
    assert after[0] - before[0] > 0.05
    assert before[1] - after[1] > 0.05
    assert [told["direction"] for told in delta.config["vectors"]] == ["toward", "away"]


@pytest.mark.usefixtures("as_a_user")
def test_aims_that_make_no_sense_are_refused(tiny, tiny_vectors, provenance):
    zero = SteeringVectors({"blocks.1.hook_resid_post": torch.zeros(32)}, provenance)
    for given, says in (
        ([], r"vectors must be SteeringVectors, or a list of at least one DirectionTarget"),
        ([tiny_vectors], r"a list of at least one DirectionTarget"),
        ([DirectionTarget(tiny_vectors, 0.0)], r"weight must be above 0 for every DirectionTarget, got \[0\.0\]"),
        ([DirectionTarget(tiny_vectors, layers=[7])], r"layers contains 7, but these vectors are of blocks 0\.\.1"),
        (
            [DirectionTarget(zero, layers=[1])],
            r"vectors must have a direction to tune, got all zeros at blocks\.1\.hook_resid_post",
        ),
        ([DirectionTarget(tiny_vectors, positions="frist")], r"position.*'frist'"),
        ([DirectionTarget(tiny_vectors, direction="up")], r"direction must be .*got 'up'"),
    ):
        with pytest.raises(ValueError, match=says):
            tune(tiny, given, TARGETS, CONFIG, validation=TARGETS, progress=False)


# Choices


def test_choices_hard_and_soft_beside_texts_give_the_loss_by_hand(tiny, tiny_vectors):
    """The mean over all positions read: one of each choice, as many as it has tokens of each answer."""
    losses, _ = found_by(tiny, tiny_vectors, [*CHOICES, *TARGETS[:2]], replace(CONFIG, cosine_weight=0.0))
    each = []
    with torch.no_grad():
        for choice in CHOICES:
            likely = tiny(torch.tensor([encode(tiny, choice.prompt)]))[0, -1].log_softmax(-1)
            ids = [tiny.tokenizer.encode(option)[0] for option in choice.options]
            each.append(-sum(share * float(likely[i]) for share, i in zip(choice.shares, ids, strict=True)))
        for target in TARGETS[:2]:
            prompt, answer = encode(tiny, target.prompt), answer_of(tiny, target)
            likely = tiny(torch.tensor([prompt + answer]))[0].log_softmax(-1)
            each += [-float(likely[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
    assert losses["token"] == pytest.approx(sum(each) / len(each), rel=1e-5)


@pytest.mark.hooked  # how far this very model goes in a few steps
def test_a_hard_choice_is_learnt_and_a_soft_one_ends_even(tiny, tiny_vectors):
    """Among the options: a tiny model's logits cannot make one of 49,152 tokens likely."""
    config = replace(CONFIG, cosine_weight=0.0, max_steps=60, learning_rate=3e-3, batch_size=2)
    wanted = [CHOICES[0], CHOICES[2]]

    def among_options(choice) -> list[float]:
        with torch.no_grad():
            logits = tiny(torch.tensor([encode(tiny, choice.prompt)]))[0, -1]
        return logits[[tiny.tokenizer.encode(option)[0] for option in choice.options]].softmax(-1).tolist()

    assert all(among_options(choice) != pytest.approx(choice.shares, abs=0.15) for choice in wanted)
    delta = tune(tiny, tiny_vectors, wanted, config, validation=wanted, progress=False)
    assert delta.history[0]["token"] - delta.history[-1]["token"] > 2
    with delta.applied(tiny):
        assert all(among_options(choice) == pytest.approx(choice.shares, abs=0.05) for choice in wanted)


def test_a_choice_within_its_rest_gives_no_gradient(tiny, tiny_vectors):
    """The model's own log-probabilities are far from the floor, so a rest of less and of more than that differ."""
    config = replace(CONFIG, cosine_weight=0.0)
    soft = CHOICES[2:]
    free, _ = found_by(tiny, tiny_vectors, soft, config)
    above = free["token"] - math.log(2)
    assert above > 0.5
    for rest, moves in ((above - 0.1, True), (above + 0.1, False)):
        losses, grads = found_by(tiny, tiny_vectors, soft, replace(config, free_nats=rest))
        assert any(grad.any() for grad in grads.values()) is moves
        assert losses["token"] == pytest.approx(math.log(2) + max(above, rest), rel=1e-5)


def test_a_cosine_is_read_at_a_choices_last_token(tiny, tiny_vectors):
    config = replace(CONFIG, token_weight=0.0)
    response, last = (
        found_by(tiny, tiny_vectors, CHOICES, replace(config, positions=p))[0] for p in ("response", "last")
    )
    assert response["cosine"] == last["cosine"]
    with pytest.raises(
        ValueError,
        match=r"positions must name a token .*'mean response' names none in the one with prompt 'Is wat",
    ):
        prepare_data(tiny, tiny_vectors, CHOICES, replace(config, positions="mean response"), validation=TARGETS)


@pytest.mark.parametrize(
    ("options", "shares", "says"),
    [
        ((" A",), (1.0,), r"options and shares must be two or more of each"),
        ((" A", " B"), (1.0,), r"options and shares must be two or more of each"),
        ((" A", " B"), (0.6, 0.6), r"shares must be non-negative and sum to 1, got \(0\.6, 0\.6\)"),
        ((" A", " B"), (1.5, -0.5), r"shares must be .*got \(1\.5, -0\.5\)"),
    ],
)
def test_choices_that_make_no_sense_are_refused(options, shares, says):
    with pytest.raises(ValueError, match=says):
        Choice("Which?", options, shares)


def test_an_option_of_several_tokens_is_refused_by_name(tiny, tiny_vectors):
    choice = Choice("Which?", (" A", " quintessential whales"), (0.5, 0.5))
    with pytest.raises(
        ValueError,
        match=r"options must be one token each, got ' quintessential whales', which is \d tokens .*'Which\?'",
    ):
        tune(tiny, tiny_vectors, [choice], CONFIG, validation=TARGETS, progress=False)


# KL, then steer

STEERED = replace(CONFIG, cosine_weight=0.0, token_weight=0.0, kl_weight=1.0, neutral_batch_size=4)


def multipliers(steer: KLThenSteer, model, n: int, seed: int) -> list[float | None]:
    """The multiplier of each of n steps, None for a step without steering."""
    drawn = [steer.drawn(model, f"{seed}-steer-{step}") for step in range(1, n + 1)]
    return [hooks[0][1].multiplier if hooks else None for hooks in drawn]


@pytest.mark.parametrize(("share", "strength"), [(0.125, 1.5), (0.6, 4.0), (1.0, 0.5)])
def test_steering_is_drawn_as_often_and_as_strongly_as_said(tiny, tiny_vectors, share, strength):
    steer = KLThenSteer([tiny_vectors], layers=[1], share=share, strength=strength)
    drawn = multipliers(steer, tiny, 2000, seed=0)
    values = torch.tensor([value for value in drawn if value is not None])
    sd = math.sqrt(share * (1 - share) / 2000)
    assert abs(len(values) / 2000 - share) <= 4 * sd
    assert values.abs().max() <= strength
    # U(-s, s): mean 0, standard deviation s / sqrt(3), a quarter in each quarter of it.
    assert values.mean().abs() < 4 * strength / math.sqrt(3 * len(values))
    quarters = torch.histc(values, 4, -strength, strength) / len(values)
    assert (quarters - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / len(values))
    assert multipliers(steer, tiny, 50, seed=0) == drawn[:50]
    assert multipliers(steer, tiny, 50, seed=1) != drawn[:50]


def test_a_ramp_grows_the_multipliers_and_leaves_the_rest_as_drawn(tiny, tiny_vectors):
    plain, ramped = (KLThenSteer([tiny_vectors], [1], 2.0, share=1.0, ramp=ramp) for ramp in (0.0, 0.5))
    for progress, factor in ((0.1, 0.2), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        ((_, before),), ((_, after),) = (steer.drawn(tiny, "two", progress) for steer in (plain, ramped))
        assert abs(before.multiplier) > 0.1
        assert after.multiplier == pytest.approx(factor * before.multiplier)
    assert ramped.held_out(tiny)[0][0][1].multiplier == plain.held_out(tiny)[0][0][1].multiplier == 1.0
    assert ("ramp" in plain.described(), ramped.described()["ramp"]) == (False, 0.5)


def test_every_direction_is_drawn_and_held_out_steers_each_both_ways(tiny, tiny_vectors, others):
    steer = KLThenSteer([tiny_vectors, others], layers=[0, 1], share=1.0, strength=2.0)
    which = [steer.drawn(tiny, str(step))[1][1].operator.vector[0] for step in range(200)]
    counts = [
        sum(value == vectors["blocks.1.hook_resid_post"][0] for value in which) for vectors in (tiny_vectors, others)
    ]
    assert sum(counts) == 200
    assert min(counts) > 60
    found = [(name, edit.multiplier, edit.operator.vector) for hooks in steer.held_out(tiny) for name, edit in hooks]
    expected = [
        (name, sign * 1.0, vectors[name])
        for vectors in (tiny_vectors, others)
        for sign in (1, -1)
        for name in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    ]
    for (name, multiplier, direction), wanted in zip(found, expected, strict=True):
        assert (name, multiplier) == wanted[:2]
        assert torch.equal(direction, wanted[2])


def log_probabilities(model, target, hooks=()) -> torch.Tensor:
    """At the positions that predict the answer."""
    prompt, answer = encode(model, target.prompt), answer_of(model, target)
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([prompt + answer]), fwd_hooks=list(hooks))
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def kl_by_hand(model, targets, untuned, hooks) -> float:
    """KL(steered || untuned), over all positions."""
    each = [
        kl_divergence(before, log_probabilities(model, t, hooks)) for t, before in zip(targets, untuned, strict=True)
    ]
    return float(torch.cat(each).mean())


def test_a_tuning_run_goes_along_its_ramp(tiny, tiny_vectors):
    """The first of ten steps is steered by a tenth of what it would be without a ramp."""
    steer = KLThenSteer([tiny_vectors], [0], 3.0, share=1.0, ramp=1.0)
    config = replace(STEERED, max_steps=10, neutral_batch_size=len(NEUTRAL))
    both = [*NEUTRAL, *NEUTRAL]  # the first half is kept for the validations
    untuned = [log_probabilities(tiny, target) for target in NEUTRAL]
    delta = tune(tiny, tiny_vectors, TARGETS, config, validation=TARGETS, neutral=both, steer=steer, progress=False)
    at = {
        progress: kl_by_hand(tiny, NEUTRAL, untuned, steer.drawn(tiny, "0-steer-1", progress)) for progress in (0.1, 1)
    }
    assert at[1] > 5 * at[0.1]
    assert delta.history[0]["kl"] == pytest.approx(at[0.1], rel=1e-4)


@pytest.mark.parametrize(("at", "trained"), [(0, [1]), (1, [0, 1])])
def test_the_kl_is_that_under_steering_by_hand_wherever_the_steering_is(tiny, tiny_vectors, at, trained):
    """Also below the first trained block: the remembered prefix then ends before the steering."""
    steer = KLThenSteer([tiny_vectors], layers=[at], share=1.0, strength=3.0)
    config = replace(STEERED, layers=[1], trained_layers=trained, max_steps=1, neutral_batch_size=len(NEUTRAL))
    both = [*NEUTRAL, *NEUTRAL]  # the first half is kept for the validations
    material = prepare_data(tiny, tiny_vectors, TARGETS, config, validation=TARGETS, neutral=both, steer=steer)
    assert material.first_block == 0
    untuned = [log_probabilities(tiny, target) for target in NEUTRAL]
    delta = tune(tiny, tiny_vectors, material, config, steer=steer, progress=False)
    expected = kl_by_hand(tiny, NEUTRAL, untuned, steer.drawn(tiny, f"{config.seed}-steer-1"))
    assert expected > 0.01
    assert delta.history[0]["kl"] == pytest.approx(expected, rel=1e-4)
    without = prepare_data(tiny, tiny_vectors, TARGETS, config, validation=TARGETS, neutral=NEUTRAL)
    if trained == [1]:
        with pytest.raises(ValueError, match=r"train must be data prepared .*got data for blocks from 1 on"):
            tune(tiny, tiny_vectors, without, config, steer=steer, progress=False)


def test_cosine_and_token_loss_are_those_under_steering_too(tiny, tiny_vectors, others):
    """By a plain forward pass with the step's hooks; the activation is read after what is added to it."""
    steer = KLThenSteer([others], layers=[1], share=1.0, strength=3.0)
    config = replace(CONFIG, layers=[1], direction="suppress", centred=False, max_steps=1, batch_size=len(TARGETS))
    delta = tune(tiny, tiny_vectors, TARGETS, config, validation=TARGETS, steer=steer, progress=False)
    plain = tune(tiny, tiny_vectors, TARGETS, config, validation=TARGETS, progress=False)
    name, tokens, cosines = "blocks.1.hook_resid_post", [], []
    for target in TARGETS:
        prompt, answer = encode(tiny, target.prompt), answer_of(tiny, target)
        with torch.no_grad(), tiny.hooks(fwd_hooks=steer.drawn(tiny, "0-steer-1")):
            logits, cache = tiny.run_with_cache(torch.tensor([prompt + answer]))
        predicting = slice(len(prompt) - 1, -1)
        tokens.append(torch.nn.functional.cross_entropy(logits[0, predicting], torch.tensor(answer), reduction="none"))
        cosines.append(torch.cosine_similarity(cache[name][0, predicting], tiny_vectors[name][None]).abs())
    for loss, expected in (("token", tokens), ("cosine", cosines)):
        assert delta.history[0][loss] == pytest.approx(float(torch.cat(expected).mean()), rel=1e-4)
        assert abs(delta.history[0][loss] - plain.history[0][loss]) > 1e-3


def test_tuning_lowers_the_kl_under_steering_on_held_out_texts_and_there_was_some(tiny, tiny_vectors, hooks_on):
    neutral = [Target(f"{question} {of}?", f" {answer} {of}.") for of in THINGS for question, answer in WAYS]
    steer = KLThenSteer([tiny_vectors], layers=[0], share=1.0, strength=2.0)
    config = replace(STEERED, max_steps=60, validate_every=10, learning_rate=3e-3)
    untuned = [log_probabilities(tiny, target) for target in HELD_OUT]
    both = [steer.hooks(tiny, 0, multiplier, 0) for multiplier in (1.0, -1.0)]
    before = [kl_by_hand(tiny, HELD_OUT, untuned, hooks) for hooks in both]
    delta = tune(tiny, tiny_vectors, TARGETS, config, validation=TARGETS, neutral=neutral, steer=steer, progress=False)
    assert not hooks_on(tiny)
    with delta.applied(tiny):
        after = [kl_by_hand(tiny, HELD_OUT, untuned, hooks) for hooks in both]
        unsteered = kl_by_hand(tiny, HELD_OUT, untuned, [])
    assert min(before) > 0.2
    assert sum(after) < 0.5 * sum(before)
    assert unsteered < sum(before) / 2
    assert delta.config["steer"]["strength"] == 2.0
    assert delta.config["steer"]["directions"][0]["behaviour"] == "mood"


def test_same_seed_same_bits_under_steering_and_another_seed_others(tiny, tiny_vectors):
    steer = KLThenSteer([tiny_vectors], layers=[0], share=0.5, strength=2.0)
    deltas = [
        tune(tiny, tiny_vectors, TARGETS, replace(STEERED, max_steps=6, seed=seed), validation=TARGETS,
             neutral=NEUTRAL, steer=steer, progress=False).changes["blocks.1.mlp.W_in"]
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert torch.equal(deltas[0], deltas[1])
    assert not torch.equal(deltas[0], deltas[2])


def test_directions_from_pairs_are_taken_again_from_the_model_as_it_is_by_then(model, pairs, hooks_on, monkeypatch):
    """What the loop extracts in each step differs, since the weights moved; the model ends as it was."""
    taken = []
    extract = aims.extract_vectors

    def listening(model, pairs, **settings):
        vectors = extract(model, pairs, **settings)
        taken.append((len(pairs), vectors["blocks.29.hook_resid_post"]))
        return vectors

    monkeypatch.setattr(aims, "extract_vectors", listening)
    steer = KLThenSteer([pairs], layers=[29], share=1.0, strength=1.0, n_pairs=2)
    vectors = rtl.extract_vectors(model, pairs.sample(2), layers=[29])
    before = model.blocks[29].mlp.W_out.detach().clone()
    config = replace(STEERED, layers=[29], trained_layers=[29], target_modules=["down"],
                     neutral_batch_size=1, max_steps=2,
                     validate_every=1)  # fmt: skip
    tune(model, vectors, TARGETS[:2], config, validation=TARGETS[:1], neutral=NEUTRAL[:1], steer=steer, progress=False)
    assert [n for n, _ in taken] == [2] * 6  # in each of two steps once, and both ways in each of two validations
    first, again = taken[1][1], taken[4][1]  # of the two validations, which draw the same pairs
    assert torch.equal(taken[1][1], taken[2][1])
    assert 0 < (first - again).norm() < 0.5 * first.norm()
    assert torch.equal(model.blocks[29].mlp.W_out, before)
    assert not hooks_on(model)


def test_steering_at_layers_that_are_not_there_is_refused_before_any_work(tiny, tiny_vectors):
    steer = KLThenSteer([tiny_vectors], layers=[7])
    with pytest.raises(ValueError, match=r"layers.*7.*blocks 0\.\.1"):
        tune(tiny, tiny_vectors, TARGETS, STEERED, neutral=NEUTRAL, steer=steer, progress=False)


def test_steering_by_another_models_vectors_is_refused(tiny, tiny_vectors, provenance):
    wide = SteeringVectors({"blocks.1.hook_resid_post": torch.ones(64)}, provenance)
    with pytest.raises(ValueError, match="extracted from a model with d_model 64"):
        tune(tiny, tiny_vectors, TARGETS, STEERED, neutral=NEUTRAL, steer=KLThenSteer([wide], [1]), progress=False)


@pytest.mark.parametrize(
    "settings",
    [{"strength": 0.0}, {"share": 0.0}, {"share": 1.5}, {"n_pairs": 0}, {"ramp": 2.0}],
    ids=lambda s: next(iter(s)),
)
def test_steering_settings_are_checked_when_they_are_made(tiny_vectors, settings):
    with pytest.raises(ValueError, match=r"strength must be above 0, share above 0 .*got strength="):
        KLThenSteer([tiny_vectors], [1], **settings)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("directions", [[], ["mood"]])
def test_steering_wants_directions(directions):
    with pytest.raises(ValueError, match="directions must be a list of at least one SteeringVectors or ContrastPairs"):
        KLThenSteer(directions, [1])


def test_the_vectors_own_position_is_found_again_in_a_target(model, pairs):
    """Vectors as `extract_vectors` makes them: what their provenance says is read in the targets' prompts."""
    for position, wanted in (("last", [-1]), ("mean last 3", [-3, -2, -1])):
        vectors = rtl.extract_vectors(model, pairs.sample(2), position=position, layers=[2])
        config = TuneConfig(layers=[2], trained_layers=[2], positions="vector", kl_weight=0.0)
        target = Target(rtl.models.generation.as_chat(model, ["How are you?"])[0], " Well, thank you.")
        row = prepare_data(model, vectors, [target], config, validation=[target]).train[0]
        n_prompt = len(model.tokenizer.encode(target.prompt, add_special_tokens=False))
        ((name, mask),) = row.places.items()
        assert name == position
        assert mask.nonzero()[:, 0].tolist() == [n_prompt + number for number in wanted]
