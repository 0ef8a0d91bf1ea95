"""Work that is not done: beginnings that run once, blocks below a change that run once; the numbers stay the same."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from rt_lens.arms.comparison import compare_arms
from rt_lens.arms.sweeping import sweep
from rt_lens.evaluation.tasks import EvalTask, LogitDifference
from rt_lens.models import activations as reading
from rt_lens.models import generation
from rt_lens.models.activations import read_activations
from rt_lens.models.backends import backend_of, slots_of
from rt_lens.models.forward import logits_where
from rt_lens.models.generation import Sampling, as_chat, generate, generate_tokens
from rt_lens.models.prompts import SHORTEST, SharedBelow, beginnings, last_logits, run_prompts
from rt_lens.models.tokens.batches import encode, pad
from rt_lens.steering.binding import ablate, add, steered
from rt_lens.steering.conditions import Condition, conditional
from rt_lens.steering.edits import Linear
from rt_lens.tuning.delta import WeightDelta

PROMPTS = ["Hello.", "Tell me about rivers and lakes, please.", "Why?", "Name a tree."]


@pytest.fixture
def prompts(tiny) -> list[list[int]]:
    return [encode(tiny, text) for text in as_chat(tiny, PROMPTS)]


@pytest.fixture
def passes(tiny, monkeypatch) -> list[tuple[int, int, int, int]]:
    """Rows, tokens, first block and last block of each cached pass."""
    backend, seen = backend_of(tiny), []
    extend = backend.extend

    def noted(inputs, mask, cache, *, start=0, stop=None):
        seen.append((*inputs.shape[:2], start, tiny.cfg.n_layers if stop is None else stop))
        return extend(inputs, mask, cache, start=start, stop=stop)

    monkeypatch.setattr(backend, "extend", noted)
    return seen


@torch.no_grad()
def alone(model, prompts: list[list[int]]) -> torch.Tensor:
    """Last logits of each prompt by TransformerLens alone; only for hooks that act on every row alike."""
    return torch.stack([model(torch.tensor([ids]))[0, -1] for ids in prompts])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


# A beginning that prompts share


def test_a_shared_beginning_runs_once(tiny, prompts, passes):
    close(last_logits(tiny, prompts), alone(tiny, prompts))
    (one, n, *_), (rows, rest, *_) = passes
    assert (one, rows) == (1, len(PROMPTS)) and n >= 8
    assert n + rest == max(len(ids) for ids in prompts)
    assert len({tuple(ids[:n]) for ids in prompts}) == 1


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_it_runs_once_under_edits_that_treat_rows_alike(tiny, tiny_vectors, prompts, passes, positions):
    hooks = [*add(tiny_vectors, [0], 3.0, positions=positions), *ablate(tiny_vectors, [1], positions=positions)]
    expected = last_logits(tiny, prompts)
    with steered(tiny, hooks):
        found = torch.stack([last_logits(tiny, [ids])[0] for ids in prompts])
        passes.clear()
        close(last_logits(tiny, prompts), found)
    assert [rows for rows, *_ in passes] == [1, len(PROMPTS)]
    if positions == "generated":
        close(found, expected)
    else:
        assert (found - expected).abs().max() > 0.01


def test_it_runs_once_for_each_multiplier(tiny, tiny_vectors, prompts, passes):
    by_row = torch.tensor([-2.0, 3.0]).repeat_interleave(len(prompts))
    expected = []
    for multiplier in (-2.0, 3.0):
        with steered(tiny, add(tiny_vectors, [0], multiplier)):
            expected.append(alone(tiny, prompts))
    passes.clear()
    with steered(tiny, add(tiny_vectors, [0], by_row)):
        close(last_logits(tiny, prompts * 2), torch.cat(expected))
    assert [rows for rows, *_ in passes] == [2, 2 * len(PROMPTS)]
    assert (expected[0] - expected[1]).abs().max() > 0.01


def test_hooks_that_may_tell_rows_apart_see_whole_prompts(tiny, tiny_vectors, prompts, passes):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(6))
    condition = Condition("blocks.0.hook_resid_post", direction, 0.0)
    mask = torch.ones(len(prompts), 64, dtype=torch.bool)
    for hooks in (
        [("blocks.0.hook_resid_post", lambda h, hook: None)],
        conditional(add(tiny_vectors, [1]), condition),
        add(tiny_vectors, [0], positions=[0]),
        add(tiny_vectors, [0], positions=mask),
    ):
        passes.clear()
        with steered(tiny, hooks):
            last_logits(tiny, prompts)
        assert [shape[:2] for shape in passes] == [(len(prompts), max(len(ids) for ids in prompts))]


def test_a_hook_of_plain_torch_sees_whole_prompts(tiny, prompts, passes):
    handle = tiny.blocks[0].attn.register_forward_hook(lambda *_: None)
    last_logits(tiny, prompts)
    handle.remove()
    assert len(passes) == 1


def test_answers_are_those_of_prompts_one_by_one(tiny, tiny_vectors):
    seen = set()
    for hooks in ([], add(tiny_vectors, [0], 4.0), add(tiny_vectors, [0], 4.0, schedule=Linear(1.0, 0.0, 3))):
        with steered(tiny, hooks):
            together = generate(tiny, PROMPTS, max_new_tokens=8)
            assert together == [generate(tiny, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
            seen |= set(together)
    assert len(seen) > 2


def brute_force(encoded: list[tuple[int, ...]], depth: int = 0) -> int:
    """Most tokens that one beginning for each text can save."""
    if len(encoded) < 2:
        return 0
    shortest, n = min(map(len, encoded)), depth
    while n < shortest and len({ids[n] for ids in encoded}) == 1:
        n += 1
    own = min(n, shortest - 1) * (len(encoded) - 1) if min(n, shortest - 1) >= SHORTEST else 0
    parts: dict[object, list[tuple[int, ...]]] = {}
    for ids in encoded:
        parts.setdefault(ids[n] if n < len(ids) else "ended", []).append(ids)
    return own if len(parts) == 1 else max(own, sum(brute_force(part, n) for part in parts.values()))


def test_beginnings_save_as_many_tokens_as_any_could():
    draw, savings = random.Random(0), set()
    for _ in range(400):
        encoded = [tuple(draw.choices((0, 1), k=draw.randint(1, 9))) for _ in range(draw.randint(1, 9))]
        lengths = beginnings(encoded)
        assert all(n == 0 or SHORTEST <= n < len(ids) for n, ids in zip(lengths, encoded, strict=True))
        saved = sum(lengths) - sum(len(ids) for ids in {ids[:n] for ids, n in zip(encoded, lengths, strict=True)})
        assert saved == brute_force(encoded)
        savings.add(saved)
    assert len(savings) > 5


@pytest.mark.parametrize("hook", ["hook_resid_post", "attn.hook_z"])
@pytest.mark.parametrize("edited", [False, True])
def test_activations_after_shared_beginnings_are_those_of_texts_alone(tiny, tiny_vectors, monkeypatch, hook, edited):
    personas = ["You are a happy and cheerful assistant.", "You are a sad and gloomy assistant, always."]
    texts = [f"{persona} {prompt}" for persona, prompt in itertools.product(personas, PROMPTS)]
    lengths = [len(encode(tiny, text)) for text in texts]
    reads = [[[n - 1], [0, 3, n - 2], list(range(n))] for n in lengths]
    names = [f"blocks.{layer}.{hook}" for layer in (0, 1)]
    with steered(tiny, add(tiny_vectors, [0], 2.0) if edited else []):
        shared = read_activations(tiny, texts, names, reads, batch_size=3)
        monkeypatch.setattr(reading, "WORTHWHILE", 1.0)
        whole = read_activations(tiny, texts, names, reads, batch_size=3)
    backend = backend_of(tiny)
    for name in names:
        close(shared[name], whole[name])
        assert not torch.equal(shared[name], whole[name])  # they are computed in another way
    assert backend.shares(64)


# Blocks below a change


@pytest.mark.parametrize("use_rows", [False, True])
def test_blocks_below_a_hook_read_the_prompts_once(tiny, tiny_vectors, prompts, passes, use_rows):
    multipliers = (1.0, -3.0, 2.0)
    expected = []
    for multiplier in multipliers:
        with steered(tiny, add(tiny_vectors, [1], multiplier)):
            expected.append(last_logits(tiny, prompts))
    passes.clear()
    with SharedBelow(tiny):
        for multiplier, plain in zip(multipliers, expected, strict=True):
            strength = torch.full((len(prompts),), multiplier) if use_rows else multiplier
            with steered(tiny, add(tiny_vectors, [1], strength)):
                close(last_logits(tiny, prompts), plain)
    below = [shape for shape in passes if shape[2:] == (0, 1)]
    assert len(below) == 2 and len([shape for shape in passes if shape[2:] == (1, 2)]) == 6
    assert len(passes) == 8
    assert (expected[0] - expected[1]).abs().max() > 0.01


def test_prompts_that_repeat_in_a_batch_are_read_once(tiny, tiny_vectors, prompts, passes):
    by_row = torch.tensor([1.0, 2.0, -4.0]).repeat_interleave(len(prompts))
    with steered(tiny, add(tiny_vectors, [1], by_row)):
        expected = generate_tokens(tiny, prompts * 3, 6)
        passes.clear()
        with SharedBelow(tiny):
            assert generate_tokens(tiny, prompts * 3, 6) == expected
    assert [shape[0] for shape in passes if shape[2:] == (0, 1)] == [1, len(prompts)]


def test_what_is_kept_rises_with_the_floor(tiny, tiny_vectors, prompts, passes):
    with SharedBelow(tiny) as shared:
        for layer in (0, 1, 1):
            shared.floor = layer
            with steered(tiny, add(tiny_vectors, [layer], 2.0)):
                found = last_logits(tiny, prompts)
        passes_of_last = passes[-2:]
    with steered(tiny, add(tiny_vectors, [1], 2.0)):
        close(found, last_logits(tiny, prompts))
    assert [shape[2:] for shape in passes_of_last] == [(1, 2), (1, 2)]


def test_weights_of_another_block_are_seen(tiny, prompts):
    name = next(name for name, slot in slots_of(tiny).items() if ".1." in name and len(slot.shape) > 1)
    first = next(name for name, slot in slots_of(tiny).items() if ".0." in name and len(slot.shape) > 1)
    slots = slots_of(tiny)
    deltas = [
        WeightDelta(
            {each: torch.randn(slots[each].shape, generator=torch.Generator().manual_seed(seed))}, "tiny", {}, []
        )
        for seed, each in enumerate((name, name, first, name))
    ]
    plain = []
    for delta in deltas:
        with delta.applied(tiny):
            plain.append(last_logits(tiny, prompts))
    with SharedBelow(tiny):
        for delta, expected in zip(deltas, plain, strict=True):
            with delta.applied(tiny):
                close(last_logits(tiny, prompts), expected)
    assert (plain[0] - plain[1]).abs().max() > 0.01


def test_whole_texts_go_on_from_what_is_kept(tiny, tiny_vectors, prompts):
    batch = pad(prompts, 0)
    where = batch.mask.bool()
    with steered(tiny, add(tiny_vectors, [1], 2.0)):
        (expected,) = logits_where(tiny, batch.tokens, batch.mask, where, size=10_000)
        with SharedBelow(tiny):
            for _ in range(2):
                (found,) = logits_where(tiny, batch.tokens, batch.mask, where, size=10_000)
                close(found, expected)


@pytest.mark.parametrize(("memory", "times"), [(2**31, 1), (0, 3)])
def test_the_oldest_goes_beyond_the_memory(tiny, tiny_vectors, prompts, passes, monkeypatch, memory, times):
    monkeypatch.setattr("rt_lens.models.prompts.MOST_MEMORY", memory)
    with steered(tiny, add(tiny_vectors, [1], 2.0)):
        expected = last_logits(tiny, prompts)
        passes.clear()
        with SharedBelow(tiny) as shared:
            for _ in range(3):
                close(last_logits(tiny, prompts), expected)
    assert len([shape for shape in passes if shape[2:] == (0, 1)]) == 2 * times
    assert bool(shared._kept) == bool(memory)


def test_sweeps_and_arms_give_the_numbers_of_plain_runs(tiny, tiny_vectors):
    task = LogitDifference(PROMPTS, " happy", " sad")
    swept = sweep(tiny, tiny_vectors, task, layers=[1, 0], multipliers=[-2, 1], progress=False).table
    for (layer, multiplier), cell in swept.groupby(["layer", "multiplier"]):
        with steered(tiny, add(tiny_vectors, [int(layer)], float(multiplier))):
            expected = [LogitDifference([prompt], " happy", " sad")(tiny)[0] for prompt in PROMPTS]
        assert cell["score"].tolist() == pytest.approx(expected, abs=1e-4)
    arms = {"untuned": None, "one": add(tiny_vectors, [1], 5.0), "two": add(tiny_vectors, [0], 5.0)}
    scores = compare_arms(tiny, arms, EvalTask(PROMPTS, len, 6), texts=["It rained all day."], progress=False)
    for arm, hooks in arms.items():
        with steered(tiny, hooks or []):
            expected = [len(generate(tiny, [prompt], max_new_tokens=6)[0]) for prompt in PROMPTS]
        assert scores.scores[scores.scores["arm"] == arm]["score"].tolist() == expected


def test_the_beginning_of_a_single_prompt_is_its_own(tiny, prompts, passes):
    run_prompts(tiny, prompts[:1])
    assert len(passes) == 1


def test_gradients_go_through_the_plain_pass(tiny, tiny_vectors, prompts):
    batch = pad(prompts, 0)
    with SharedBelow(tiny) as shared, steered(tiny, add(tiny_vectors, [1], 2.0)):
        for _ in range(2):
            (logits,) = logits_where(tiny, batch.tokens, batch.mask, batch.mask.bool(), size=10_000)
            logits.sum().backward()
    assert not shared._kept


def test_a_model_made_in_inference_mode_is_shared_too(make_tiny, tiny_vectors, prompts):
    with torch.inference_mode():
        model = make_tiny()
        with steered(model, add(tiny_vectors, [1], 2.0)):
            expected = last_logits(model, prompts)
            with SharedBelow(model):
                close(last_logits(model, prompts), expected)


def test_texts_that_fill_the_context_are_read(make_tiny):
    model, long, short = make_tiny(n_ctx=48), [7 * i % 100 + 5 for i in range(30)], [3, 1, 4, 1, 5]
    encoded = [[*first, *range(start, start + 48 - len(first))] for first in (long, short) for start in (90, 500)]
    assert beginnings(encoded) == [30, 30, 5, 5]  # in one batch they would have 30 + 43 columns
    parts = list(reading._parts(model, encoded, ["blocks.1.hook_resid_post"], [[[47]]] * 4, 32))
    assert sum(part.finished for part in parts) == 4


def test_bad_batches_of_a_logit_difference_are_refused_by_name(tiny):
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        LogitDifference(PROMPTS, " happy", " sad", batch_size=0)(tiny)


# Rows that have ended


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["plain", "by row", "condition", "unknown"])
def test_rows_that_have_ended_leave_the_batch_and_change_no_other(tiny, tiny_vectors, monkeypatch, temperature, kind):
    texts = [*PROMPTS, "Sing.", "Count to ten, then go back to one.", "How do bees find their way home?"]
    encoded = [encode(tiny, text) for text in texts]
    direction = torch.randn(32, generator=torch.Generator().manual_seed(6))
    hooks = {
        "plain": [],
        "by row": add(tiny_vectors, [0], torch.linspace(-2, 2, len(texts))),
        "condition": conditional(add(tiny_vectors, [1], 4.0), Condition("blocks.0.hook_resid_post", direction, 0.0)),
        "unknown": [("blocks.0.hook_resid_post", lambda h, hook: h + torch.ones(len(texts), 1, 1))],
    }[kind]
    backend, rows = backend_of(tiny), []
    next_logits = backend.next_logits

    def noted(tokens, mask, cache):
        rows.append(len(tokens))
        return next_logits(tokens, mask, cache)

    monkeypatch.setattr(backend, "next_logits", noted)
    sampling = Sampling(temperature, seed=3)
    with steered(tiny, hooks):
        whole = generate_tokens(tiny, encoded, 12, sampling)
        ends = {ids[2] for ids in whole[:3]}  # so that three rows end at their third token, if not before
        expected = [ids[: next((i for i, token in enumerate(ids) if token in ends), 12)] for ids in whole]
        monkeypatch.setattr(generation, "_ends", lambda model: torch.tensor(sorted(ends)))
        rows.clear()
        assert generate_tokens(tiny, encoded, 12, sampling) == expected
    if all(len(ids) < 12 for ids in expected):
        assert len(rows) < 11  # all ended
    assert (min(rows) < len(texts)) == (kind != "unknown")
