"""A condition is decided by each prompt's own activations, once, and guards edits of that row or token and no other."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean

import pytest
import torch

import rt_lens as rtl
from rt_lens.evaluation.scorers import vader
from rt_lens.models.context import token_context
from rt_lens.models.generation import as_chat, generate, generate_tokens
from rt_lens.models.tokens.batches import encode, pad
from rt_lens.steering.binding import ablate, add, steered
from rt_lens.steering.condition_fit import FittedCondition, _threshold, fit_condition
from rt_lens.steering.conditions import Condition, conditional
from rt_lens.vectors.steering_vectors import SteeringVectors

PRE, POST = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
TEXTS = ["Rain?", "a", "The weather in the hills was fine.", "Name a tree."]


@pytest.fixture
def direction() -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(6))


@pytest.fixture
def prompts(tiny) -> list[list[int]]:
    return [encode(tiny, text) for text in TEXTS]


@torch.no_grad()
def scores_of(tiny, prompts: list[list[int]], direction: torch.Tensor) -> list[torch.Tensor]:
    """Projection of each token of each prompt, by hand."""
    unit = direction / direction.norm()
    return [tiny.run_with_cache(torch.tensor([ids]))[1][PRE][0] @ unit for ids in prompts]


def between(numbers: list[float]) -> float:
    """A threshold in the widest gap of the middle third of the numbers."""
    ordered = sorted(numbers)
    third = (len(ordered) - 1) // 3
    middle = ordered[third : len(ordered) - third]
    low, high = max(pairwise(middle), key=lambda pair: pair[1] - pair[0])
    assert high - low > 1e-3
    return (low + high) / 2


@torch.no_grad()
def change_at(tiny, prompts: list[list[int]], hooks: list, side: str) -> list[torch.Tensor]:
    """How much each real token changes at the second block."""
    batch = pad(prompts, 0, side)
    found = []
    for each in ([], hooks):
        with tiny.hooks(fwd_hooks=each), token_context(batch.mask):
            found.append(tiny.run_with_cache(batch.tokens, attention_mask=batch.mask)[1][POST])
    change = (found[1] - found[0]).abs().amax(-1)
    return [change[row][batch.mask[row].bool()] for row in range(len(prompts))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", ["last", "mean"])
def test_a_whole_row_changes_if_its_own_prompt_passes_and_not_a_bit_if_not(
    tiny, tiny_vectors, prompts, direction, position, side
):
    scores = scores_of(tiny, prompts, direction)
    read = [float(of_row[-1] if position == "last" else of_row.mean()) for of_row in scores]
    condition = Condition(PRE, 7.0 * direction, between(read), position=position)
    changes = change_at(tiny, prompts, conditional(add(tiny_vectors, [1]), condition), side)
    for score, change in zip(read, changes, strict=True):
        assert (change.min() > 0.1) if score >= condition.threshold else (change.max() == 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_by_token_exactly_the_tokens_that_pass_change(tiny, tiny_vectors, prompts, direction, side):
    scores = scores_of(tiny, prompts, direction)
    condition = Condition(PRE, direction, between(torch.cat(scores).tolist()), by="token")
    changes = change_at(tiny, prompts, conditional(add(tiny_vectors, [1]), condition), side)
    for of_row, change in zip(scores, changes, strict=True):
        assert torch.equal(change > 0.1, of_row >= condition.threshold)
        assert (change[of_row < condition.threshold] == 0).all()


def test_an_edit_at_the_conditions_own_hook_point_comes_after_the_reading(tiny, tiny_vectors, prompts, direction):
    read = [float(of_row[-1]) for of_row in scores_of(tiny, prompts, direction)]
    condition = Condition(PRE, direction, between(read))
    away = SteeringVectors({PRE: -100.0 * direction}, tiny_vectors.provenance)  # it would not pass after the edit
    changes = change_at(tiny, prompts, conditional(add(away), condition), "left")
    assert [bool(change.max() > 0) for change in changes] == [score >= condition.threshold for score in read]


def test_a_condition_and_places_both_have_to_hold(tiny, tiny_vectors, prompts, direction):
    read = [float(of_row[-1]) for of_row in scores_of(tiny, prompts, direction)]
    condition = Condition(PRE, direction, between(read))
    changes = change_at(tiny, prompts, conditional(add(tiny_vectors, [1], positions="last"), condition), "left")
    for score, change in zip(read, changes, strict=True):
        assert (change[:-1] == 0).all()
        assert bool(change[-1] > 0.1) == (score >= condition.threshold)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_the_verdict_on_a_prompt_holds_for_its_whole_answer(
    tiny, tiny_vectors, prompts, direction, use_cache, together
):
    read = [float(of_row[-1]) for of_row in scores_of(tiny, prompts, direction)]
    condition = Condition(PRE, direction, between(read))
    plain = generate_tokens(tiny, prompts, 8)
    with steered(tiny, add(tiny_vectors, [1], 5.0)):
        always = generate_tokens(tiny, prompts, 8)
    with steered(tiny, conditional(add(tiny_vectors, [1], 5.0), condition)):
        if together:
            found = generate_tokens(tiny, prompts, 8, use_cache=use_cache)
        else:
            found = [generate_tokens(tiny, [ids], 8, use_cache=use_cache)[0] for ids in prompts]
    holds = [score >= condition.threshold for score in read]
    assert found == [always[row] if held else plain[row] for row, held in enumerate(holds)]
    assert all(a != b for a, b in zip(always, plain, strict=True))
    assert sum(holds) == 2


def test_one_condition_guards_several_edits_and_two_conditions_their_own(tiny, tiny_vectors, prompts, direction):
    read = [float(of_row[-1]) for of_row in scores_of(tiny, prompts, direction)]
    high = Condition(PRE, direction, between(read))
    low = Condition(PRE, -direction, -between(read))
    mlp = SteeringVectors({"blocks.1.hook_mlp_out": 5.0 * direction}, tiny_vectors.provenance)
    up, down = add(tiny_vectors, [1], 5.0) + add(mlp, hook="mlp_out"), ablate(tiny_vectors, [1])
    with steered(tiny, conditional(up, high), conditional(down, low)):
        found = generate_tokens(tiny, prompts, 6)
    apart = {}
    for name, hooks in (("up", up), ("down", down)):
        with steered(tiny, hooks):
            apart[name] = generate_tokens(tiny, prompts, 6)
    assert found == [apart["up" if s >= high.threshold else "down"][row] for row, s in enumerate(read)]
    assert apart["up"] != apart["down"]


def test_whole_prompts_need_nobody_to_say_so(tiny, tiny_vectors, prompts, direction):
    for ids in prompts:
        score = float(scores_of(tiny, [ids], direction)[0][-1])
        for threshold, acts in ((score - 0.01, True), (score + 0.01, False)):
            if len(ids) == 1:
                continue
            hooks = conditional(add(tiny_vectors, [1]), Condition(PRE, direction, threshold))
            with torch.no_grad():
                plain = tiny(torch.tensor([ids]))
                with tiny.hooks(fwd_hooks=hooks):
                    assert torch.equal(tiny(torch.tensor([ids])), plain) != acts


# What is refused


def test_an_edit_before_the_condition_is_read_is_refused(tiny_vectors, direction):
    with pytest.raises(
        ValueError,
        match=rf"condition must be read before its edits, got {POST}, which is after the edit at {PRE}\. Read it at",
    ):
        conditional(add(tiny_vectors), Condition(POST, direction, 0.0))
    mlp = SteeringVectors({"blocks.1.hook_mlp_out": direction}, tiny_vectors.provenance)
    with pytest.raises(
        ValueError,
        match=r"condition must be read before its edits, got blocks\.1\.hook_resid_post, which is after the edit",
    ):
        conditional(add(mlp, hook="mlp_out"), Condition(POST, direction, 0.0))
    assert len(conditional(add(mlp, hook="mlp_out"), Condition(PRE, direction, 0.0))) == 2


def test_foreign_hooks_and_edits_that_have_a_condition_are_refused(tiny_vectors, direction):
    condition = Condition(PRE, direction, 0.0)
    with pytest.raises(ValueError, match=rf"hooks must be edits of rt_lens without a condition, got .* at {POST}"):
        conditional([(POST, lambda h, hook: h)], condition)
    guarded = conditional(add(tiny_vectors, [1]), condition)
    for hooks in (guarded, guarded[1:]):
        with pytest.raises(ValueError, match=r"hooks must be edits of rt_lens without a condition, got "):
            conditional(hooks, condition)


@torch.no_grad()
def test_edits_without_their_reader_are_refused(tiny, tiny_vectors, direction, hooks_on):
    hooks = conditional(add(tiny_vectors, [1]), Condition(PRE, direction, 0.0))
    with (
        pytest.raises(
            ValueError,
            match=rf"condition must be read .*{PRE} was not read in this forward pass\. Attach the whole list",
        ),
        steered(tiny, hooks[1:]),
    ):
        tiny(torch.tensor([[5, 6]]))
    assert not hooks_on(tiny)


@torch.no_grad()
def test_a_pass_that_may_be_in_the_middle_of_an_answer_is_refused(tiny, tiny_vectors, direction):
    hooks = conditional(add(tiny_vectors, [1]), Condition(PRE, direction, 0.0))
    with (
        pytest.raises(
            ValueError, match=r"condition must be read on whole prompts, but this forward pass has one token"
        ),
        steered(tiny, hooks),
    ):
        tiny(torch.tensor([[5]]))
    mask = torch.ones(1, 6, dtype=torch.long)
    with (
        pytest.raises(ValueError, match=r"a row's prompt is not in this forward pass\. Run prompts whole"),
        steered(tiny, hooks),
        token_context(mask, new=2, lengths=torch.tensor([4])),
    ):
        tiny(torch.tensor([[5, 6]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"by": "row"},
            r"by must be 'example' or 'token' and position 'last' or 'mean', got by='row' and position='last'",
        ),
        ({"position": "first"}, r"got by='example' and position='first'"),
        (
            {"direction": torch.zeros(32)},
            r"condition must have a direction other than zero .*length 0 and threshold 0\.5",
        ),
        ({"threshold": float("nan")}, r"condition must have .*got a direction of length .* and threshold nan"),
    ],
)
def test_a_condition_that_can_never_be_decided_is_refused(changes, message, direction, as_a_user):
    with pytest.raises(ValueError, match=message):
        Condition(**{"hook_name": PRE, "direction": direction, "threshold": 0.5, **changes})


# Fitting


@pytest.mark.parametrize(
    ("yes", "no", "threshold"),
    [
        ([3.0, 5.0], [0.0, 1.0], 2.0),
        ([3.0, 5.0, -9.0], [0.0, 1.0, 2.0], 2.5),  # one of three is given up
        ([10.0], [0.0, 1.0, 2.0, 3.0, 4.0], 7.0),  # kinds count alike, however many there are of each
    ],
)
def test_the_threshold_is_midway_between_two_prompts_where_both_kinds_are_told_apart_best(yes, no, threshold):
    assert _threshold(torch.tensor(yes), torch.tensor(no)) == threshold


SUMS = [
    "What is 17 + 25?", "Compute 90 - 14.", "What is 6 times 7?", "How much is 45 plus 18?", "What is 31 + 12?",
    "Compute 88 - 13.", "What is 9 times 8?", "How much is 52 plus 39?", "What is 23 + 64?", "Compute 75 - 16.",
    "What is 12 times 5?", "How much is 27 plus 36?", "What is 4 + 19?", "Compute 60 - 41.", "What is 3 times 33?",
    "How much is 70 plus 5?", "What is 58 + 21?", "Compute 92 - 9.", "What is 14 times 2?", "How much is 29 plus 63?",
    "What is 81 + 10?", "Compute 55 - 36.", "What is 20 times 4?", "How much is 34 plus 66?",
]  # fmt: skip
NEW_SUMS = [
    "What is 12 + 30?", "Compute 76 - 7.", "What is 5 times 11?", "How much is 40 plus 17?", "What is 9 + 38?",
    "Compute 51 - 26.", "What is 8 times 9?", "How much is 3 plus 95?",
]  # fmt: skip


@pytest.fixture(scope="module")
def topics(pairs) -> tuple[list[str], list[str]]:
    """Small talk to fit on and to keep."""
    train, test = pairs.split(0.5, seed=0)
    return train.topics[:24], test.topics[:12]


@pytest.fixture(scope="module")
def small_talk(model, topics) -> FittedCondition:
    return fit_condition(model, positive=topics[0], negative=SUMS, layer=12)


def test_small_talk_is_told_from_arithmetic_on_prompts_that_were_not_fitted(small_talk):
    for errors in (small_talk.misses, small_talk.false_alarms):
        assert errors.n == 12
        assert errors.low <= errors.mean <= errors.high < 0.4
        assert errors.mean <= 1 / 12
    assert small_talk.hook_name == "blocks.12.hook_resid_post"
    assert small_talk.direction.norm() > 0


def test_two_kinds_of_prompt_that_do_not_differ_are_not_told_apart(model, topics):
    fits = [
        fit_condition(model, positive=topics[0][:12], negative=topics[0][12:], layer=12, seed=seed) for seed in range(4)
    ]
    assert sum(found.misses.mean + found.false_alarms.mean for found in fits) / 4 > 0.5


def test_a_prompt_given_twice_counts_once(model, topics):
    once, twice = (fit_condition(model, topics[0][:8] * n, SUMS[:8] * n, layer=10) for n in (1, 2))
    assert once.misses == twice.misses and once.misses.n == 4
    assert torch.equal(once.direction, twice.direction)


def test_by_token_the_rates_are_of_tokens(model, topics):
    found = fit_condition(model, topics[0][:8], SUMS[:8], layer=10, by="token")
    assert found.misses.n == found.false_alarms.n == 4
    # Both kinds begin with the template's own tokens, which no threshold can tell apart.
    assert found.misses.mean + found.false_alarms.mean > 0.2


def test_a_fit_is_repeated_by_its_seed_and_may_use_vectors(model, topics, pairs, provenance):
    chats, sums = topics[0][:8], SUMS[:8]
    first, again = (fit_condition(model, chats, sums, layer=10, seed=3) for _ in range(2))
    assert torch.equal(first.direction, again.direction)
    assert (first.threshold, first.misses, first.seed) == (again.threshold, again.misses, 3)
    other = fit_condition(model, chats, sums, layer=10, seed=4)
    assert not torch.equal(first.direction, other.direction)
    vectors = SteeringVectors({"blocks.10.hook_resid_post": first.direction}, provenance)
    given = fit_condition(model, chats, sums, layer=10, seed=3, vectors=vectors)
    assert torch.equal(given.direction, first.direction)
    assert given.threshold == pytest.approx(first.threshold)


def test_what_is_read_while_fitting_is_what_is_read_while_acting(model, topics):
    """The threshold between two prompts' own scores parts them in a batch of answers, too."""
    chats, sums = topics[0][:4], SUMS[:4]
    for position in ("last", "mean"):
        fitted = fit_condition(model, chats, sums, layer=8, position=position)
        gate = conditional([], fitted)[0][1]
        texts = [encode(model, text) for text in as_chat(model, chats + sums)]
        with steered(model, [(fitted.hook_name, gate)]):
            generate_tokens(model, texts, 1)
        opened = gate.open_at(len(texts), gate._open.shape[1])[:, -1]
        unit = fitted.direction / fitted.direction.norm()
        for row, ids in enumerate(texts):
            with torch.no_grad():
                _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=fitted.hook_name)
            scores = cache[fitted.hook_name][0] @ unit
            score = scores[-1] if position == "last" else scores.mean()
            assert bool(opened[row]) == bool(score >= fitted.threshold)
        assert 0 < opened.sum() < len(texts)


def test_mood_moves_in_small_talk_and_arithmetic_in_the_same_batch_stays_token_for_token(
    model, pairs, topics, small_talk
):
    train, _ = pairs.split(0.5, seed=0)
    mood = rtl.extract_vectors(model, train.sample(48), layers=[18])
    talk = topics[1]
    assert not set(talk) & set(topics[0]) and not set(NEW_SUMS) & set(SUMS)
    mixed = [prompt for both in zip(talk, NEW_SUMS, strict=False) for prompt in both] + talk[len(NEW_SUMS) :]

    def answers(*hooks):
        with steered(model, *hooks):
            return dict(zip(mixed, generate(model, mixed, max_new_tokens=24), strict=True))

    plain = answers()
    moods = {0: mean(vader(plain[prompt]) for prompt in talk)}
    for multiplier in (3.0, -3.0):
        found = answers(conditional(add(mood, [18], multiplier), small_talk))
        assert {prompt: found[prompt] for prompt in NEW_SUMS} == {prompt: plain[prompt] for prompt in NEW_SUMS}
        assert sum(found[prompt] != plain[prompt] for prompt in talk) >= 9
        moods[multiplier] = mean(vader(found[prompt]) for prompt in talk)
    assert moods[3.0] > moods[0] + 0.15
    assert moods[-3.0] < moods[0] - 0.15
    always = answers(add(mood, [18], -3.0))
    assert sum(always[prompt] != plain[prompt] for prompt in NEW_SUMS) >= 5  # the condition kept them from this


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positive": TEXTS[:3]}, r"positive must be at least 4 different prompts, .*got 3"),
        ({"negative": []}, r"negative must be a list of at least one text, got an empty one"),
        ({"positive": "How was your day?"}, r"positive must be .*got a str"),
        ({"positive": [*TEXTS, None]}, r"positive must be a list of texts, got None"),
        ({"by": "row"}, r"got by='row' and position='last'"),
        ({"position": "first"}, r"got by='example' and position='first'"),
        ({"layer": 2}, r"layers.*2.*blocks 0\.\.1"),
        ({"hook": "resid_pots"}, r"hook.*blocks\.1\.hook_resid_pots.*hook_resid_post"),
        (
            {"hook": "z"},
            r"hook must be a point with one activation per token, .*got blocks\.1\.attn\.hook_z.*Use hook='attn_out'",
        ),
    ],
)
def test_a_fit_that_cannot_be_is_refused_by_name(tiny, changes, message, as_a_user):
    given = {"positive": TEXTS, "negative": SUMS[:4], "layer": 1, **changes}
    with pytest.raises(ValueError, match=message):
        fit_condition(tiny, **given)


def test_a_fit_on_vectors_of_another_model_or_block_is_refused(tiny, tiny_vectors, provenance):
    wide = SteeringVectors({POST: torch.ones(48)}, provenance)
    with pytest.raises(ValueError, match=r"d_model 48 .*this model has 32"):
        fit_condition(tiny, TEXTS, SUMS[:4], layer=1, vectors=wide)
    with pytest.raises(ValueError, match=r"layers contains 0, but these vectors are of blocks 1\.\.1"):
        fit_condition(tiny, TEXTS, SUMS[:4], layer=0, vectors=wide)
    zero = SteeringVectors({POST: torch.zeros(32)}, provenance)
    with pytest.raises(ValueError, match=r"zero"):
        fit_condition(tiny, TEXTS, SUMS[:4], layer=1, vectors=zero)


def test_a_verdict_is_not_kept_for_a_pass_that_does_not_read(tiny, tiny_vectors, direction):
    hooks = conditional(add(tiny_vectors, [0, 1], 3.0), Condition(PRE, direction, -1e6))
    tokens = torch.tensor([[5, 6, 7]])
    with tiny.hooks(fwd_hooks=hooks):
        tiny(tokens)
    with (
        pytest.raises(ValueError, match="was not read in this forward pass"),
        tiny.hooks(fwd_hooks=hooks[1:]),
    ):
        tiny(tokens)
