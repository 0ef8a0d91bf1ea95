"""An edit acts on the tokens it names and on no others, whatever the padding, the batch and the key-value cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from rt_lens.models.context import current_context, token_context
from rt_lens.models.generation import Sampling, generate, generate_tokens
from rt_lens.models.tokens.batches import encode, pad, pad_id_of
from rt_lens.steering.binding import ablate, add, add_preserving_norm, clamp, scale
from rt_lens.steering.edits import Edit, Linear
from rt_lens.vectors.steering_vectors import SteeringVectors

POST = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
Z = "blocks.1.attn.hook_z"
TEXTS = ["Rain?", "a", "The weather in the hills was fine."]
ANSWERS = [" No, it", " b c", " And"]
MASK = torch.tensor([True, False, True, False, False, True])
BY_ROW = torch.tensor([[False, True, False], [True, False, False], [False, False, True]])

# Which tokens of a row with so many of prompt and in all.
MEANT = {
    "all": ("all", lambda row, prompt, n: range(n)),
    "prompt": ("prompt", lambda row, prompt, n: range(prompt)),
    "generated": ("generated", lambda row, prompt, n: range(prompt, n)),
    "last": ("last", lambda row, prompt, n: [prompt - 1]),
    "first": ([0], lambda row, prompt, n: [0]),
    "first and last": ([0, -1], lambda row, prompt, n: {0, prompt - 1}),
    "mask": (MASK, lambda row, prompt, n: [i for i in (0, 2, 5) if i < n]),
    "mask by row": (BY_ROW, lambda row, prompt, n: [[1], [0], [2]][row]),
}


@pytest.fixture
def z_vectors(provenance) -> SteeringVectors:
    return SteeringVectors({Z: torch.randn(4, 8, generator=torch.Generator().manual_seed(3))}, provenance)


@pytest.fixture
def prompts(tiny) -> list[list[int]]:
    ids = [encode(tiny, text) for text in TEXTS]
    assert len(ids[1]) == 1
    assert len({len(row) for row in ids}) == 3
    return ids


@torch.no_grad()
def activations(tiny: Any, prompts: list[list[int]], hooks: list, name: str, side: str, **said_too: Any) -> list:
    """Activations of each row's real tokens, of prompt and answer, from one padded pass."""
    texts = [ids + encode(tiny, answer) for ids, answer in zip(prompts, ANSWERS, strict=True)]
    batch = pad(texts, pad_id_of(tiny), side)
    lengths = torch.tensor([len(ids) for ids in prompts])
    with tiny.hooks(fwd_hooks=hooks), token_context(batch.mask, lengths=lengths, **said_too):
        _, cache = tiny.run_with_cache(batch.tokens, attention_mask=batch.mask)
    return [cache[name][row][batch.mask[row].bool()] for row in range(len(texts))]


def check_change(before: torch.Tensor, after: torch.Tensor, meant: Any, change: torch.Tensor) -> None:
    """The tokens that are meant have changed by so much, the others by no bit."""
    meant = sorted(set(meant))
    others = [i for i in range(len(before)) if i not in meant]
    assert torch.equal(after[others], before[others])
    difference = (after - before)[meant]
    torch.testing.assert_close(difference, change.expand_as(difference), atol=1e-4, rtol=0)
    assert change.abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MEANT)
def test_exactly_the_tokens_that_are_meant_change_on_either_side_of_the_padding(
    tiny, tiny_vectors, prompts, name, side
):
    positions, meant = MEANT[name]
    before = activations(tiny, prompts, [], POST[1], side)
    after = activations(tiny, prompts, add(tiny_vectors, [1], 2.0, positions=positions), POST[1], side)
    for row, ids in enumerate(prompts):
        chosen = meant(row, len(ids), len(before[row]))
        check_change(before[row], after[row], chosen, 2.0 * tiny_vectors[POST[1]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("operator", ["add_preserving_norm", "ablate", "clamp", "scale"])
def test_every_operator_leaves_the_other_tokens_bit_for_bit(tiny, tiny_vectors, prompts, operator, side):
    hooks = {
        "add_preserving_norm": add_preserving_norm(tiny_vectors, [1], 2.0, positions="last"),
        "ablate": ablate(tiny_vectors, [1], positions="last"),
        "clamp": clamp(tiny_vectors, [1], 5.0, positions="last"),
        "scale": scale({POST[1]: -0.5}, positions="last"),
    }[operator]
    before = activations(tiny, prompts, [], POST[1], side)
    after = activations(tiny, prompts, hooks, POST[1], side)
    for row, ids in enumerate(prompts):
        others = [i for i in range(len(before[row])) if i != len(ids) - 1]
        assert torch.equal(after[row][others], before[row][others])
        assert (after[row] - before[row])[len(ids) - 1].abs().max() > 0.05


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_the_heads_that_are_meant_change_at_the_tokens_that_are_meant(tiny, z_vectors, prompts, side):
    hooks = add(z_vectors, [1], 3.0, hook="z", heads=[0, 2], positions="last")
    before, after = (activations(tiny, prompts, each, Z, side) for each in ([], hooks))
    for row, ids in enumerate(prompts):
        check_change(before[row][:, [0, 2]], after[row][:, [0, 2]], [len(ids) - 1], 3.0 * z_vectors[Z][[0, 2]])
        assert torch.equal(after[row][:, [1, 3]], before[row][:, [1, 3]])


def test_all_heads_change_where_none_is_named(tiny, z_vectors, prompts):
    before, after = (activations(tiny, prompts, each, Z, "left") for each in ([], add(z_vectors, [1], 3.0, hook="z")))
    for row in range(3):
        check_change(before[row], after[row], range(len(before[row])), 3.0 * z_vectors[Z])


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_has_its_own_multiplier_at_the_tokens_that_are_meant(tiny, tiny_vectors, prompts, side):
    doses = torch.tensor([1.0, -2.0, 0.0])
    before = activations(tiny, prompts, [], POST[1], side)
    hooks = add(tiny_vectors, [1], doses, positions="prompt")
    after = activations(tiny, prompts, hooks, POST[1], side)
    for row, ids in enumerate(prompts[:2]):
        check_change(before[row], after[row], range(len(ids)), doses[row] * tiny_vectors[POST[1]])
    assert torch.equal(after[2], before[2])


def test_rows_are_known_by_the_numbers_that_were_said(tiny, tiny_vectors, prompts):
    doses, mask = torch.arange(1.0, 8.0), torch.eye(7, dtype=torch.bool)[:, :3]  # the mask's row 1 means token 1
    before = activations(tiny, prompts, [], POST[1], "left")
    for hooks in (add(tiny_vectors, [1], doses, positions="last"), add(tiny_vectors, [1], 1.0, positions=mask)):
        after = activations(tiny, prompts, hooks, POST[1], "left", rows=[6, 0, 2])
        dosed = isinstance(hooks[0][1].multiplier, torch.Tensor)
        for row, number in enumerate([6, 0, 2]):
            meant = [len(prompts[row]) - 1] if dosed else [number] if number < 3 else []
            check_change(before[row], after[row], meant, (doses[number] if dosed else 1.0) * tiny_vectors[POST[1]])


def test_a_ragged_batch_is_what_singles_are(tiny, tiny_vectors, prompts):
    for positions, _ in list(MEANT.values())[:-1]:
        hooks = add(tiny_vectors, [0], 2.0, positions=positions)
        together = activations(tiny, prompts, hooks, POST[1], "left")
        for row, ids in enumerate(prompts):
            text = torch.tensor([ids + encode(tiny, ANSWERS[row])])
            mask, lengths = torch.ones_like(text), torch.tensor([len(ids)])
            with torch.no_grad(), tiny.hooks(fwd_hooks=hooks), token_context(mask, lengths=lengths):
                _, alone = tiny.run_with_cache(text)
            torch.testing.assert_close(together[row], alone[POST[1]][0], atol=1e-4, rtol=1e-4)


# While answers are made


@torch.no_grad()
def say_the_same_always(tiny: Any) -> None:
    """Whatever the hooks do, the next token is 1000: so activations of two runs can be compared."""
    tiny.unembed.W_U[:] = 0
    tiny.unembed.b_U[:] = 0
    tiny.unembed.b_U[1000] = 10.0


def of_tokens(tiny: Any, prompts: list[list[int]], n: int, hooks: list, name: str, use_cache: bool) -> list:
    """Activations of each row's prompt and its new tokens but the last, which no pass has run."""
    passes: list[torch.Tensor] = []

    def keep(activation, hook):
        passes.append(activation.clone())

    with tiny.hooks(fwd_hooks=[*hooks, (name, keep)]):
        new = generate_tokens(tiny, prompts, n, Sampling(), use_cache=use_cache)
    assert new == [[1000] * n] * len(prompts)
    assert [h.shape[1] for h in passes[1:]] == (
        [1] * (n - 1) if use_cache else [passes[0].shape[1] + i for i in range(1, n)]
    )
    whole = torch.cat(passes, dim=1) if use_cache else passes[-1]
    longest = max(len(ids) for ids in prompts)
    return [whole[row, longest - len(ids) :] for row, ids in enumerate(prompts)]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", MEANT)
def test_the_same_tokens_change_while_answers_are_made(tiny, tiny_vectors, prompts, name, use_cache):
    say_the_same_always(tiny)
    positions, meant = MEANT[name]
    run = partial(of_tokens, tiny, prompts, 4, name=POST[1], use_cache=use_cache)
    before, after = run([]), run(add(tiny_vectors, [1], 2.0, positions=positions))
    for row, ids in enumerate(prompts):
        assert len(before[row]) == len(ids) + 3
        chosen = meant(row, len(ids), len(before[row]))
        check_change(before[row], after[row], chosen, 2.0 * tiny_vectors[POST[1]])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("schedule", [Linear(1.0, -1.0, 4), lambda place: [0.0, 3.0, 0.5, 0.0, 1.0][place]])
def test_a_schedule_sets_the_factor_of_each_generated_token(tiny, tiny_vectors, prompts, schedule, use_cache):
    say_the_same_always(tiny)
    run = partial(of_tokens, tiny, prompts, 6, name=POST[1], use_cache=use_cache)
    before, after = run([]), run(add(tiny_vectors, [1], 2.0, schedule=schedule))
    factors = [schedule(place) for place in range(5)]
    assert len(set(factors)) >= 3
    for row, ids in enumerate(prompts):
        wanted = torch.tensor([1.0] * len(ids) + factors)[:, None] * 2.0 * tiny_vectors[POST[1]]
        torch.testing.assert_close(after[row] - before[row], wanted, atol=1e-4, rtol=0)
        still = [len(ids) + place for place, factor in enumerate(factors) if factor == 0]
        assert still
        assert torch.equal(after[row][still], before[row][still])


def test_a_linear_schedule_goes_from_start_to_end_and_stays_there():
    assert [Linear(2.0, 0.0, 4)(place) for place in range(7)] == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0, 0.0]
    assert [Linear(2.0, 0.5, 0)(place) for place in range(2)] == [2.0, 0.5]


@pytest.mark.parametrize("use_cache", [True, False])
def test_only_named_heads_change_while_answers_are_made(tiny, z_vectors, prompts, use_cache):
    say_the_same_always(tiny)
    run = partial(of_tokens, tiny, prompts, 4, name=Z, use_cache=use_cache)
    before, after = run([]), run(add(z_vectors, [1], 2.0, hook="z", heads=[3], positions="generated"))
    for row, ids in enumerate(prompts):
        generated = range(len(ids), len(ids) + 3)
        check_change(before[row][:, 3], after[row][:, 3], generated, 2.0 * z_vectors[Z][3])
        assert torch.equal(after[row][:, :3], before[row][:, :3])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", list(MEANT)[:-1])
def test_answers_of_a_batch_are_those_of_singles_wherever_the_edit_acts(tiny, tiny_vectors, prompts, name, use_cache):
    plain = generate_tokens(tiny, prompts, 6)
    with tiny.hooks(fwd_hooks=add(tiny_vectors, [1], 4.0, positions=MEANT[name][0])):
        together = generate_tokens(tiny, prompts, 6, use_cache=use_cache)
        for row, ids in enumerate(prompts):
            assert generate_tokens(tiny, [ids], 6, use_cache=use_cache) == [together[row]]
    assert together != plain


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_masks_and_multipliers_by_row_mean_the_prompts_number_in_every_batch(tiny, tiny_vectors, batch_size):
    tiny.tokenizer.chat_template = None
    prompts = ["Rain?", "The weather in the hills was fine.", "Name a tree."]  # run longest first
    n = [len(encode(tiny, prompt)) for prompt in prompts]
    mask = torch.zeros(3, max(n), dtype=torch.bool)
    mask[1, n[1] - 1] = mask[2, : n[2]] = True
    with tiny.hooks(fwd_hooks=add(tiny_vectors, [1], torch.tensor([9.0, 5.0, -5.0]), positions=mask)):
        found = generate(tiny, prompts, max_new_tokens=4, batch_size=batch_size)
    apart = [generate(tiny, prompts[:1], max_new_tokens=4)]
    for number, dose, positions in ((1, 5.0, "last"), (2, -5.0, "prompt")):
        with tiny.hooks(fwd_hooks=add(tiny_vectors, [1], dose, positions=positions)):
            apart.append(generate(tiny, [prompts[number]], max_new_tokens=4))
    assert [[answer] for answer in found] == apart
    assert found[1:] != generate(tiny, prompts, max_new_tokens=4)[1:]


# What is said


def test_what_was_said_ends_with_its_block_and_with_an_exception():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert current_context() is None
    with token_context(mask) as outer:
        assert current_context() is outer
        assert outer.positions.tolist() == [[-1, 0, 1], [0, 1, 2]]
        assert outer.lengths.tolist() == [2, 3]
        with token_context(mask, new=1, lengths=torch.tensor([1, 2]), rows=[4, 5]) as inner:
            assert current_context() is inner
            assert inner.positions.tolist() == [[1], [2]]
            assert (inner.lengths.tolist(), inner.rows) == ([1, 2], (4, 5))
        assert current_context() is outer
        with pytest.raises(RuntimeError, match="mine"), token_context(mask):
            raise RuntimeError("mine")
        assert current_context() is outer
    assert current_context() is None


def test_generating_says_where_each_pass_is_and_nothing_afterwards(tiny, prompts):
    heard = []
    with tiny.hooks(fwd_hooks=[("hook_embed", lambda h, hook: heard.append(current_context()))]):
        generate_tokens(tiny, prompts, 3, rows=[7, 8, 9])
    lengths = [len(ids) for ids in prompts]
    assert [here.lengths.tolist() for here in heard] == [lengths] * 3
    assert [here.positions[:, -1].tolist() for here in heard] == [[n - 1 + step for n in lengths] for step in range(3)]
    assert {here.rows for here in heard} == {(7, 8, 9)}
    assert len({id(here.memory) for here in heard}) == 1
    assert current_context() is None


def test_nothing_said_means_whole_prompts_without_padding(tiny, tiny_vectors, prompts):
    tokens = torch.tensor([prompts[2]])
    hooks = add(tiny_vectors, [1], 2.0, positions=[-1])
    with torch.no_grad():
        _, before = tiny.run_with_cache(tokens)
        with tiny.hooks(fwd_hooks=hooks):
            _, after = tiny.run_with_cache(tokens)
    n = tokens.shape[1]
    check_change(before[POST[1]][0], after[POST[1]][0], [n - 1], 2.0 * tiny_vectors[POST[1]])


def test_an_edit_is_written_shortly(tiny_vectors):
    ((_, edit),) = add(tiny_vectors, [1])
    assert isinstance(edit, Edit)
    assert repr(edit) == "Edit(Add)"  # TransformerLens names each attached hook by it
