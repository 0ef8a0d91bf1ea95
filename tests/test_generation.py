"""A batch of answers is what singles would have been, and what the tokens decoded by hand are."""

from __future__ import annotations

import copy

import pytest
import torch

from rt_lens import generation
from rt_lens.generation import Sampling, as_chat, generate, generate_tokens
from rt_lens.steering import add
from rt_lens.tokens import chat_text, encode

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
@pytest.mark.parametrize("changes", [{}, {"rotary_adjacent_pairs": True}])
def test_a_batch_gives_token_for_token_what_singles_give(make_tiny, temperature, changes):
    tiny = make_tiny(**changes)  # the second kind runs without the fast attention
    encoded = [encode(tiny, chat_text(tiny, prompt)) for prompt in PROMPTS]
    batch = generate_tokens(tiny, encoded, 10, Sampling(temperature, seed=5))
    for row, ids in enumerate(encoded):
        assert generate_tokens(tiny, [ids], 10, Sampling(temperature, seed=5), rows=[row]) == [batch[row]]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_batch_size_changes_nothing(tiny, temperature):
    together = generate(tiny, PROMPTS * 2, max_new_tokens=6, temperature=temperature, seed=1)
    for batch_size in (1, 2, 4):
        apart = generate(tiny, PROMPTS * 2, max_new_tokens=6, temperature=temperature, seed=1, batch_size=batch_size)
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
            logits[0, 1, end] = 1e4
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


def test_hooked_patterns_are_refused_with_the_mend(tiny):
    with (
        tiny.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda x, hook: x)]),
        pytest.raises(ValueError, match=r"hooks: attention scores and patterns cannot.*Hook hook_z instead"),
    ):
        generate(tiny, PROMPTS)


def test_a_text_may_fill_the_context_and_no_more(tiny):
    ids = [1000] * 250
    assert len(generate_tokens(tiny, [ids, ids[:3]], 6)[0]) == 6
    with pytest.raises(ValueError, match=r"prompts: 250 tokens and 7 new ones exceed the context of 256\. Shorten"):
        generate_tokens(tiny, [ids, ids[:3]], 7)
    with pytest.raises(ValueError, match=r"prompts: \d+ tokens and 40 new ones exceed the context of 256\. Shorten"):
        generate(tiny, ["word " * 300])


@pytest.mark.parametrize("prompts", ["Rain?", "", []])
def test_one_string_and_an_empty_list_are_refused_with_the_mend(tiny, prompts):
    with pytest.raises(
        ValueError, match=r"prompts: a list of at least one text is wanted\. Put a single text in brackets"
    ):
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
    with pytest.raises(ValueError, match=rf"generate: .*{name} {value}.* came; at least .* wanted"):
        generate(tiny, PROMPTS, **wrong)


def test_a_model_without_a_tokenizer_is_refused(tiny):
    tiny.tokenizer = None
    with pytest.raises(ValueError, match=r"model: it has no tokenizer.*Set model\.tokenizer"):
        generate(tiny, PROMPTS)


def test_a_shared_beginning_is_run_once_and_changes_no_answer(tiny):
    prompts = ["Hello.", "Tell me about rivers and lakes.", "Why?"]
    encoded = [encode(tiny, text) for text in as_chat(tiny, prompts)]
    shared = generation._shared_beginning(tiny, encoded)
    assert 8 <= shared < min(len(ids) for ids in encoded)
    assert len({tuple(ids[:shared]) for ids in encoded}) == 1
    once = generate(tiny, prompts, max_new_tokens=8)
    with tiny.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda h, hook: None)]):  # hooks may act by row
        assert generation._shared_beginning(tiny, encoded) == 0
        assert generate(tiny, prompts, max_new_tokens=8) == once
