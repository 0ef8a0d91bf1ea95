"""A batch of answers is what singles would have been, and what the tokens decoded by hand are."""

from __future__ import annotations

import copy

import pytest
import torch
from llama_folder import spelling_tokenizer

from rt_lens.models.context import current_context
from rt_lens.models.generation import NewToken, Sampling, as_chat, generate, generate_tokens, stream
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import chat_text
from rt_lens.steering.binding import add
from rt_lens.vectors.reading import token_projections
from rt_lens.vectors.steering_vectors import SteeringVectors

PROMPTS = [
    "Rain?",
    "Tell me, at some length and with all the detail that you like, about your last weekend.",
    "Name a tree.",
]
POST = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


# Chats


def test_a_chat_is_not_wrapped_twice(tiny):
    once = as_chat(tiny, PROMPTS, system="Be kind.")
    assert once == [chat_text(tiny, prompt, system="Be kind.") for prompt in PROMPTS]
    assert as_chat(tiny, once) == once
    assert as_chat(tiny, [once[0], PROMPTS[1]]) == [once[0], chat_text(tiny, PROMPTS[1])]
    assert generate(tiny, once, max_new_tokens=5) == generate(tiny, as_chat(tiny, once), max_new_tokens=5)


def test_without_a_template_prompts_are_taken_as_they_are(tiny):
    tiny.tokenizer.chat_template = None
    assert as_chat(tiny, PROMPTS) == PROMPTS


def test_the_model_sees_one_start_token(tiny):
    from tokenizers.processors import TemplateProcessing

    tiny.tokenizer = copy.deepcopy(tiny.tokenizer)
    start = tiny.tokenizer.convert_tokens_to_ids("<|im_start|>")
    tiny.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    seen = []
    with tiny.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(x.clone()))]):
        generate(tiny, ["Rain?"], max_new_tokens=1)
    ids = torch.cdist(seen[0][0], tiny.embed.W_E.detach()).argmin(-1).tolist()
    assert ids == tiny.tokenizer.encode(chat_text(tiny, "Rain?"), add_special_tokens=False)
    assert ids[0] == start != ids[1]


# Generating


def by_row(logits: torch.Tensor) -> torch.Tensor:
    """The logits of the last token of each row, whichever way round the model has them: a view."""
    return logits.view(-1, logits.shape[-1])


@torch.no_grad()
def by_hand(model, prompt: str, n: int) -> list[int]:
    """Greedy decoding with plain TransformerLens, one whole forward pass for each token, no padding, no cache."""
    ids = encode(model, chat_text(model, prompt))
    new: list[int] = []
    for _ in range(n):
        new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return new


def test_greedy_answers_equal_decoding_by_hand(tiny):
    encoded = [encode(tiny, chat_text(tiny, prompt)) for prompt in PROMPTS]
    new = generate_tokens(tiny, encoded, 8)
    assert len({len(ids) for ids in encoded}) == 3
    assert len({tuple(ids) for ids in new}) == 3
    for prompt, ids in zip(PROMPTS, new, strict=True):
        assert ids == by_hand(tiny, prompt, 8)
    assert generate(tiny, PROMPTS, max_new_tokens=8) == [tiny.tokenizer.decode(ids) for ids in new]


def test_greedy_answers_of_the_real_model_equal_decoding_by_hand(model):
    encoded = [encode(model, chat_text(model, prompt)) for prompt in PROMPTS]
    for prompt, ids in zip(PROMPTS, generate_tokens(model, encoded, 4), strict=True):
        assert ids == by_hand(model, prompt, 4)[: len(ids)]
        assert len(ids) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("changes", [{}, pytest.param({"rotary_adjacent_pairs": True}, marks=pytest.mark.hooked)])
def test_a_batch_gives_token_for_token_what_singles_give(make_tiny, temperature, changes):
    tiny = make_tiny(**changes)  # the second kind runs without the fast attention
    encoded = [encode(tiny, chat_text(tiny, prompt)) for prompt in PROMPTS]
    batch = generate_tokens(tiny, encoded, 10, Sampling(temperature, seed=5))
    for row, ids in enumerate(encoded):
        assert generate_tokens(tiny, [ids], 10, Sampling(temperature, seed=5), rows=[row]) == [batch[row]]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_batch_size_changes_nothing(tiny, temperature):
    prompts = [*PROMPTS, "Count to ten.", "Where do swallows go in winter, and why do they come back?", "Sing."]
    together = generate(tiny, prompts, max_new_tokens=6, temperature=temperature, seed=1)
    for batch_size in (1, 2, 4):
        apart = generate(tiny, prompts, max_new_tokens=6, temperature=temperature, seed=1, batch_size=batch_size)
        assert apart == together
    assert len(set(together)) >= 3


def test_a_seed_repeats_its_text_and_another_gives_another(tiny):
    first = generate(tiny, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)
    torch.manual_seed(99)  # nobody else's random numbers matter
    assert generate(tiny, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1) == first
    assert generate(tiny, PROMPTS, max_new_tokens=8, temperature=1.0, seed=2) != first


def test_generating_draws_nothing_from_the_global_stream(tiny):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    generate(tiny, PROMPTS, max_new_tokens=3, temperature=1.0)
    assert torch.equal(torch.rand(3), expected)


def test_greedy_ignores_the_seed_and_the_same_prompt_twice_samples_twice(tiny):
    assert generate(tiny, PROMPTS, max_new_tokens=4, seed=1) == generate(tiny, PROMPTS, max_new_tokens=4, seed=2)
    twice = generate(tiny, [PROMPTS[0]] * 2, max_new_tokens=8, temperature=1.0)
    assert twice[0] != twice[1]


def test_samples_follow_the_models_distribution(tiny):
    with torch.no_grad():
        tiny.unembed.b_U[:] = -1e4
        tiny.unembed.b_U[1000:1004] = torch.tensor([0.0, 1.0, 2.0, 3.0])
        tiny.unembed.W_U[:] = 0
    ids = encode(tiny, "Rain")
    for temperature in (1.0, 2.0):
        drawn = torch.tensor(generate_tokens(tiny, [ids] * 24, 40, Sampling(temperature))).flatten() - 1000
        expected = torch.softmax(torch.arange(4.0) / temperature, 0)
        assert drawn.numel() == 24 * 40
        torch.testing.assert_close(torch.bincount(drawn, minlength=4) / drawn.numel(), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("n", [1, 7])
def test_no_more_tokens_come_than_were_asked_for(tiny, n):
    new = generate_tokens(tiny, [encode(tiny, prompt) for prompt in PROMPTS], n)
    assert [len(ids) for ids in new] == [n] * 3


@pytest.mark.parametrize(
    ("eos", "mark"), [(None, "<|im_end|>"), ("<|endoftext|>", "<|endoftext|>"), ("<|endoftext|>", "<|im_end|>")]
)
def test_a_row_ends_at_the_end_of_text_or_of_its_turn_and_the_others_go_on(tiny, eos, mark):
    tiny.tokenizer.eos_token = eos or tiny.tokenizer.eos_token
    end = tiny.tokenizer.convert_tokens_to_ids(mark)
    encoded = [encode(tiny, prompt) for prompt in PROMPTS]
    free = generate_tokens(tiny, encoded, 6)
    calls = []

    def end_row_1_at_its_third_token(module, args, logits):
        calls.append(1)
        if len(calls) == 3:
            by_row(logits)[1, end] = 1e4
        return logits

    attached = tiny.unembed.register_forward_hook(end_row_1_at_its_third_token)
    new = generate_tokens(tiny, encoded, 6)
    attached.remove()
    assert [len(ids) for ids in free] == [6, 6, 6]
    assert new == [free[0], free[1][:2], free[2]]


def test_generation_stops_when_all_rows_have_ended(tiny):
    calls = []

    def end_all_at_the_second_token(module, args, logits):
        calls.append(1)
        if len(calls) == 2:
            logits[..., tiny.tokenizer.eos_token_id] = 1e4
        return logits

    attached = tiny.unembed.register_forward_hook(end_all_at_the_second_token)
    new = generate_tokens(tiny, [encode(tiny, prompt) for prompt in PROMPTS], 50)
    attached.remove()
    assert [len(ids) for ids in new] == [1, 1, 1]
    assert len(calls) == 2


def test_generation_runs_under_the_hooks_that_the_model_carries(tiny, tiny_vectors):
    plain = generate(tiny, PROMPTS, max_new_tokens=6)
    with tiny.hooks(fwd_hooks=add(tiny_vectors, multiplier=0.0)):
        assert generate(tiny, PROMPTS, max_new_tokens=6) == plain
    with tiny.hooks(fwd_hooks=add(tiny_vectors, [1], 5.0)):
        steered = generate(tiny, PROMPTS, max_new_tokens=6)
        assert generate(tiny, PROMPTS, max_new_tokens=6, batch_size=1) == steered
    assert all(a != b for a, b in zip(steered, plain, strict=True))
    assert generate(tiny, PROMPTS, max_new_tokens=6) == plain


def test_hooks_that_act_by_row_act_on_the_prompt_of_that_number(tiny, tiny_vectors):
    doses = torch.tensor([4.0, 0.0, -4.0])
    with tiny.hooks(fwd_hooks=add(tiny_vectors, [1], doses)):
        together = generate(tiny, PROMPTS, max_new_tokens=6)
    for number, dose in enumerate(doses.tolist()):
        with tiny.hooks(fwd_hooks=add(tiny_vectors, [1], dose)):
            assert generate(tiny, [PROMPTS[number]], max_new_tokens=6) == [together[number]]


def test_generation_leaves_nothing_and_keeps_the_users_hooks(tiny, hooks_on):
    calls = []
    tiny.add_perma_hook(POST[0], lambda x, hook: calls.append(hook.name))
    before = hooks_on(tiny)
    generate(tiny, PROMPTS, max_new_tokens=3)
    assert len(calls) == 3
    assert hooks_on(tiny) == before
    assert not any("forward" in vars(block.attn) for block in tiny.blocks)


def test_an_exception_while_generating_leaves_nothing(tiny, hooks_on):
    def fail(x, hook):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), tiny.hooks(fwd_hooks=[(POST[1], fail)]):
        generate(tiny, PROMPTS)
    assert not hooks_on(tiny)
    assert not any("forward" in vars(block.attn) for block in tiny.blocks)


@pytest.mark.hooked  # a bridge's own attention has both, its cache and its patterns
def test_hooked_patterns_are_refused_with_the_mend(tiny):
    with (
        tiny.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda x, hook: x)]),
        pytest.raises(ValueError, match=r"hooks must leave attention scores and patterns alone.*Hook hook_z instead"),
    ):
        generate(tiny, PROMPTS)


def test_a_text_may_fill_the_context_and_no_more(tiny):
    ids = [1000] * 250
    assert len(generate_tokens(tiny, [ids, ids[:3]], 6)[0]) == 6
    with pytest.raises(ValueError, match=r"must fit the model's context of 256 tokens, got 250 \+ 7\. Shorten"):
        generate_tokens(tiny, [ids, ids[:3]], 7)
    with pytest.raises(ValueError, match=r"must fit the model's context of 256 tokens, got \d+ \+ 40\. Shorten"):
        generate(tiny, ["word " * 300])


@pytest.mark.parametrize("prompts", ["Rain?", "", []])
def test_one_string_and_an_empty_list_are_refused_with_the_mend(tiny, prompts):
    with pytest.raises(ValueError, match=r"prompts must be a list of at least one text, got (a str|an empty one)\."):
        generate(tiny, prompts)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"batch_size": 0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_a_number_out_of_range_is_refused_by_name(tiny, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"must be at least .*got .*{name}={value}"):
        generate(tiny, PROMPTS, **wrong)


def test_a_model_without_a_tokenizer_is_refused(tiny):
    tiny.tokenizer = None
    with pytest.raises(ValueError, match=r"model must have a tokenizer .*Set model\.tokenizer"):
        generate(tiny, PROMPTS)


# Sampling


@torch.no_grad()
def always_these_logits(tiny, wanted: dict[int, float]) -> None:
    tiny.unembed.W_U[:] = 0
    tiny.unembed.b_U[:] = -1e4
    for token, logit in wanted.items():
        tiny.unembed.b_U[token] = logit


@pytest.mark.parametrize(
    ("limits", "stay"),
    [
        ({"top_k": 1}, [3]),
        ({"top_k": 2}, [2, 3]),
        ({"top_k": 50}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [3]),  # the first always stays
        ({"top_p": 0.64}, [3]),  # it has 0.644
        ({"top_p": 0.65}, [2, 3]),
        ({"top_p": 0.9}, [1, 2, 3]),  # the first two have 0.881
        ({"top_k": 2, "top_p": 0.9}, [2, 3]),
        ({"top_k": 3, "top_p": 0.7}, [2, 3]),
    ],
)
def test_samples_come_from_the_tokens_that_stay_in_their_own_proportions(limits, stay):
    draws = (torch.arange(4000) + 0.5) / 4000
    drawn = Sampling(1.0, **limits).choose(torch.arange(4.0).repeat(4000, 1), draws)
    expected = torch.zeros(4)
    expected[stay] = torch.softmax(torch.tensor(stay, dtype=torch.float32), 0)
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 4000, expected, atol=1e-3, rtol=0)


def test_the_limits_reach_the_sampling(tiny):
    always_these_logits(tiny, {1000 + i: float(i) for i in range(4)})
    encoded = [encode(tiny, "Rain")] * 12
    for limits, stay in (({"top_k": 2}, {1002, 1003}), ({"top_p": 0.9}, {1001, 1002, 1003})):
        drawn = generate_tokens(tiny, encoded, 30, Sampling(1.0, **limits))
        assert {token for row in drawn for token in row} == stay
    words = [tiny.tokenizer.decode([token]) for token in (1002, 1003)]
    (answer,) = generate(tiny, ["Rain"], max_new_tokens=20, temperature=1.0, top_k=2)
    assert answer.replace(words[0], "").replace(words[1], "") == "" != answer


def test_one_token_to_choose_from_is_greedy(tiny):
    greedy = generate(tiny, PROMPTS, max_new_tokens=8)
    for limits in ({"top_k": 1}, {"top_p": 1e-9}):
        assert generate(tiny, PROMPTS, max_new_tokens=8, temperature=1.5, seed=4, **limits) == greedy
    assert generate(tiny, PROMPTS, max_new_tokens=8, temperature=1.5, seed=4) != greedy


def test_limits_that_leave_every_token_change_nothing(tiny):
    free = generate(tiny, PROMPTS, max_new_tokens=8, temperature=1.5, seed=4)
    for limits in ({"top_k": 10**6}, {"top_p": 1.0}, {"top_k": 0}):
        assert generate(tiny, PROMPTS, max_new_tokens=8, temperature=1.5, seed=4, **limits) == free


def test_every_draw_gives_a_token_that_stays():
    logits = torch.tensor([[2.0, -1e9, 1.0, 3.0, 3.0]]).repeat(4, 1)
    draws = torch.tensor([0.0, 0.4, 0.7, 1 - 2**-24])  # the ends of what torch.rand gives
    assert Sampling(1.0, top_k=2).choose(logits, draws).tolist() == [3, 3, 4, 4]
    assert Sampling(1.0, top_p=0.3).choose(logits, draws).tolist() == [3, 3, 3, 3]  # of equals, the first
    assert Sampling(1.0).choose(logits, draws).tolist() == [0, 3, 4, 4]
    assert Sampling(0.0).choose(logits, draws).tolist() == [3, 3, 3, 3]


# Without a cache


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("changes", [{}, pytest.param({"rotary_adjacent_pairs": True}, marks=pytest.mark.hooked)])
def test_the_cache_changes_nothing(make_tiny, temperature, changes):
    tiny = make_tiny(**changes)
    settings = {"max_new_tokens": 8, "temperature": temperature, "seed": 3}
    cached = generate(tiny, PROMPTS, **settings)
    assert generate(tiny, PROMPTS, **settings, use_cache=False) == cached
    assert generate(tiny, PROMPTS, **settings, use_cache=False, batch_size=1) == cached
    assert len(set(cached)) == 3


def test_without_a_cache_attention_patterns_can_be_hooked(tiny):
    cached, shapes = generate(tiny, PROMPTS, max_new_tokens=4), []
    look = ("blocks.0.attn.hook_pattern", lambda pattern, hook: shapes.append(tuple(pattern.shape)))
    with tiny.hooks(fwd_hooks=[look]):
        assert generate(tiny, PROMPTS, max_new_tokens=4, use_cache=False) == cached
    longest = max(len(encode(tiny, chat_text(tiny, prompt))) for prompt in PROMPTS)
    assert shapes == [(3, 4, longest + step, longest + step) for step in range(4)]
    blind = [(f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: 0 * pattern) for layer in (0, 1)]
    with tiny.hooks(fwd_hooks=blind):
        assert generate(tiny, PROMPTS, max_new_tokens=4, use_cache=False) != cached


# Streaming


def say(tiny, ids: list[int]):
    """Makes the model's next tokens these, one after the other, in every row."""
    steps = iter(ids)

    def force(module, args, logits):
        logits[..., next(steps)] = 1e4
        return logits

    return tiny.unembed.register_forward_hook(force)


def test_streamed_pieces_together_are_the_answer(tiny):
    for prompt in PROMPTS:
        pieces = list(stream(tiny, prompt, max_new_tokens=8, temperature=0.9, top_k=40, top_p=0.95, seed=3))
        whole = generate(tiny, [prompt], max_new_tokens=8, temperature=0.9, top_k=40, top_p=0.95, seed=3)
        assert "".join(pieces) == whole[0]
        assert len(pieces) > 3


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_character_of_several_tokens_is_streamed_once_it_is_whole(tiny, cut):
    text = "Ça va? 日本は🦩 👍🏽 fine"
    ids = tiny.tokenizer.encode(text, add_special_tokens=False)
    emoji = len(tiny.tokenizer.encode("Ça va? 日本は🦩", add_special_tokens=False))
    assert tiny.tokenizer.decode(ids[: emoji - 1]).endswith("\ufffd")
    ids = ids[: emoji - cut] if cut else [*ids, tiny.tokenizer.eos_token_id]
    n = len(ids)
    forced = say(tiny, ids)
    pieces = list(stream(tiny, PROMPTS[0], max_new_tokens=n))
    forced.remove()
    forced = say(tiny, ids)
    (whole,) = generate(tiny, PROMPTS[:1], max_new_tokens=n)
    forced.remove()
    assert "".join(pieces) == whole
    assert whole == text if not cut else whole.endswith("\ufffd")
    assert not any("\ufffd" in piece for piece in pieces[:-1] + (pieces[-1:] if not cut else []))
    assert len(pieces) > 5
    assert all(pieces)


def test_streaming_ends_at_the_end_of_text_and_runs_under_the_hooks(tiny, tiny_vectors, hooks_on):
    ids = tiny.tokenizer.encode("One two three", add_special_tokens=False)
    forced = say(tiny, [*ids, tiny.tokenizer.eos_token_id])
    assert "".join(stream(tiny, PROMPTS[0], max_new_tokens=40)) == "One two three"
    forced.remove()
    plain = generate(tiny, PROMPTS[:1], max_new_tokens=6)
    with tiny.hooks(fwd_hooks=add(tiny_vectors, [1], 5.0)):
        steered = "".join(stream(tiny, PROMPTS[0], max_new_tokens=6))
        assert [steered] == generate(tiny, PROMPTS[:1], max_new_tokens=6)
    assert [steered] != plain
    assert not hooks_on(tiny)


def test_a_stream_that_is_left_half_way_leaves_nothing(tiny, hooks_on):
    pieces = stream(tiny, PROMPTS[0], max_new_tokens=40)
    next(pieces)
    assert current_context() is None
    assert not hooks_on(tiny)
    assert not any("forward" in vars(block.attn) for block in tiny.blocks)
    other = generate(tiny, PROMPTS[1:2], max_new_tokens=3)
    next(pieces)
    pieces.close()
    assert generate(tiny, PROMPTS[1:2], max_new_tokens=3) == other


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 2.0}, {"top_k": -1}])
def test_a_stream_refuses_numbers_out_of_range(tiny, wrong):
    ((_, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"must be at least .*got .*{value}"):
        next(stream(tiny, PROMPTS[0], **wrong))


# Being told


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("traced", [False, True])
def test_each_new_token_is_told_with_its_row_its_place_and_its_text(tiny, tiny_vectors, batch_size, traced):
    told: list[NewToken] = []
    trace = tiny_vectors if traced else None
    answers = generate(
        tiny, PROMPTS, max_new_tokens=5, temperature=0.7, batch_size=batch_size, trace=trace, on_token=told.append
    )
    assert answers == generate(tiny, PROMPTS, max_new_tokens=5, temperature=0.7)
    for row, answer in enumerate(answers):
        mine = [new for new in told if new.row == row]
        assert [new.index for new in mine] == list(range(5))
        assert tiny.tokenizer.decode([new.token for new in mine]) == answer
        assert "".join(new.text for new in mine) == answer
        assert all(list(new.projections) == (POST if traced else []) for new in mine)
    if batch_size == 64:
        assert [(new.index, new.row) for new in told] == [(place, row) for place in range(5) for row in range(3)]


def test_tokens_are_told_as_soon_as_they_are_there(tiny):
    passes, when = [], []
    with tiny.hooks(fwd_hooks=[("hook_embed", lambda h, hook: passes.append(h.shape[1]))]):
        generate(tiny, PROMPTS[:1], max_new_tokens=4, on_token=lambda new: when.append((new.index, len(passes))))
    assert when == [(place, place + 1) for place in range(4)]


@pytest.mark.parametrize("traced", [False, True])
def test_rows_that_have_ended_are_told_no_more(tiny, tiny_vectors, traced):
    encoded = [encode(tiny, prompt) for prompt in PROMPTS]
    told: list[NewToken] = []
    calls = []

    def end(module, args, logits):
        calls.append(1)
        if len(calls) == 3:
            by_row(logits)[1, tiny.tokenizer.eos_token_id] = 1e4
        if len(calls) == 5:
            by_row(logits)[[0, 2], tiny.tokenizer.eos_token_id] = 1e4
        return logits

    attached = tiny.unembed.register_forward_hook(end)
    trace = tiny_vectors if traced else None
    new = generate_tokens(tiny, encoded, 9, rows=[4, 5, 6], trace=trace, on_token=told.append)
    attached.remove()
    assert [len(ids) for ids in new] == [4, 2, 4]
    assert [[t.token for t in told if t.row == row] for row in (4, 5, 6)] == new
    assert len(calls) == 5  # nothing is run for a token that ends its row


def test_a_callback_that_fails_leaves_nothing(tiny, tiny_vectors, hooks_on):
    def fail(new):
        assert hooks_on(tiny)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        generate(tiny, PROMPTS, trace=tiny_vectors, on_token=fail)
    assert not hooks_on(tiny)
    assert current_context() is None


@pytest.mark.parametrize("use_cache", [True, False])
def test_traced_projections_are_those_of_the_whole_text_under_the_same_hooks(tiny, tiny_vectors, provenance, use_cache):
    doses = torch.tensor([4.0, 0.0, -4.0])
    encoded = [encode(tiny, prompt) for prompt in PROMPTS]
    told: list[NewToken] = []
    with tiny.hooks(fwd_hooks=add(tiny_vectors, [0], doses)):
        new = generate_tokens(tiny, encoded, 6, trace=tiny_vectors, on_token=told.append, use_cache=use_cache)
    assert len(told) == 18
    for row, ids in enumerate(encoded):
        with torch.no_grad(), tiny.hooks(fwd_hooks=add(tiny_vectors, [0], float(doses[row]))):
            _, cache = tiny.run_with_cache(torch.tensor([ids + new[row]]))
        for token in (token for token in told if token.row == row):
            for name in POST:
                unit = tiny_vectors[name] / tiny_vectors[name].norm()
                expected = float(cache[name][0, len(ids) + token.index] @ unit)
                assert token.projections[name] == pytest.approx(expected, abs=1e-4)
    moved = [token.projections[POST[0]] for token in told]
    assert max(moved) - min(moved) > 20  # the hooks are seen


def test_traced_projections_of_the_real_model_are_token_projections_of_the_text(model, provenance):
    noise = torch.Generator().manual_seed(0)
    names = [f"blocks.{layer}.hook_resid_post" for layer in (4, 18, 29)]
    vectors = SteeringVectors({name: torch.randn(576, generator=noise) for name in names}, provenance)
    texts = as_chat(model, PROMPTS)
    told: list[NewToken] = []
    with model.hooks(fwd_hooks=add(vectors, [18], 0.3)):
        answers = generate(model, texts, max_new_tokens=5, trace=vectors, on_token=told.append)
        for row, text in enumerate(texts):
            mine = [token for token in told if token.row == row]
            ids = encode(model, text + answers[row])
            assert ids == encode(model, text) + [token.token for token in mine]
            assert len(mine) > 1
            _, expected = token_projections(model, vectors, text + answers[row])
            found = torch.tensor([[token.projections[name] for token in mine] for name in names])
            torch.testing.assert_close(found, expected[:, -len(mine) :], atol=1e-3, rtol=0)
    assert answers != generate(model, texts, max_new_tokens=5)


def test_a_trace_that_cannot_be_is_refused(tiny, tiny_vectors, provenance):
    with pytest.raises(ValueError, match=r"trace must come with on_token, got on_token=None\. Give a function"):
        generate(tiny, PROMPTS, trace=tiny_vectors)
    wide = SteeringVectors({POST[0]: torch.ones(48)}, provenance)
    with pytest.raises(ValueError, match="extracted from a model with d_model 48"):
        generate(tiny, PROMPTS, trace=wide, on_token=print)
    heads = SteeringVectors({"blocks.0.attn.hook_z": torch.ones(4, 8)}, provenance)
    with pytest.raises(
        ValueError, match=r"trace must be vectors with one direction per hook point, got vectors per head"
    ):
        generate(tiny, PROMPTS, trace=heads, on_token=print)


# Rows by their number


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_multiplier_is_its_prompts_whatever_the_batches(tiny, tiny_vectors, batch_size, temperature):
    prompts, doses = [*PROMPTS, "Why?", "What is a river, and where does it go?"], [4.0, 0.0, -4.0, 2.0, -6.0]
    settings = {"max_new_tokens": 5, "temperature": temperature, "seed": 2}
    with tiny.hooks(fwd_hooks=add(tiny_vectors, [1], torch.tensor(doses))):
        found = generate(tiny, prompts, batch_size=batch_size, **settings)
    for row, dose in enumerate(doses):
        with tiny.hooks(fwd_hooks=add(tiny_vectors, [1], dose)):
            assert found[row] == generate(tiny, prompts, **settings)[row]
    plain = generate(tiny, prompts, **settings)
    assert found[1] == plain[1]
    assert all(found[row] != plain[row] for row in (0, 2, 4))


def test_more_prompts_than_multipliers_are_refused(tiny, tiny_vectors):
    with (
        pytest.raises(
            ValueError, match="multiplier must be one number, or one for each of the 3 rows of the batch, got 2 numbers"
        ),
        tiny.hooks(fwd_hooks=add(tiny_vectors, [1], torch.ones(2))),
    ):
        generate(tiny, PROMPTS, batch_size=2)


def test_texts_can_be_taken_as_they_are(tiny, monkeypatch):
    plain = generate(tiny, PROMPTS, chat=False, max_new_tokens=4)
    assert plain != generate(tiny, PROMPTS, max_new_tokens=4)
    ids = generate_tokens(tiny, [encode(tiny, prompt) for prompt in PROMPTS], 4)
    assert plain == [tiny.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("cut", [None, "by the limit", "by its end"])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_texts_that_are_told_are_together_the_answer(tiny, tiny_vectors, kind, cut, traced):
    """Spaces are kept, and a letter of several tokens comes with the last of them."""
    if kind == "sentencepiece":
        tiny.tokenizer = spelling_tokenizer()
    tokenizer = tiny.tokenizer
    ids = tokenizer.encode("It was  a sunny day 日本🦩", add_special_tokens=False)
    unbroken = len(tokenizer.encode("It was  a sunny day", add_special_tokens=False))
    ids = ids[: -1 if cut else None]
    ids = ids if cut == "by the limit" else [*ids, tokenizer.eos_token_id]
    told: dict[str, list[NewToken]] = {"told": []}
    forced = say(tiny, [*ids, 0])  # a trace runs the last token too
    (answer,) = generate(
        tiny, [PROMPTS[0]], chat=False, max_new_tokens=len(ids), on_token=told["told"].append,
        trace=tiny_vectors if traced else None,
    )  # fmt: skip
    forced.remove()
    new = told["told"]
    assert "".join(each.text for each in new) == answer
    assert [each.token for each in new] == [token for token in ids if token != tokenizer.eos_token_id]
    assert [each.index for each in new] == list(range(len(new)))
    if cut is None:
        assert answer == "It was  a sunny day 日本🦩" and not any("\ufffd" in each.text for each in new)
        assert new[-1].text == "🦩" and "" in [each.text for each in new[unbroken:]]
    else:
        assert answer.startswith("It was  a sunny day 日本\ufffd") and new[-1].text.endswith("\ufffd")
    if traced:
        assert all(set(each.projections) == set(POST) for each in new)
        assert len({each.projections[POST[0]] for each in new}) > 3
    forced = say(tiny, ids)
    assert "".join(stream(tiny, tokenizer.bos_token + PROMPTS[0], max_new_tokens=len(ids))) == answer
    forced.remove()
