"""Text to tokens: one start token, masks that say what is real, batches that lose and reorder nothing."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from rt_lens.tokens import batches, chat_text, encode, has_chat_template, pad, pad_id_of, tokenizer_of

NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
)


@pytest.fixture
def stand_in(tokenizer):
    """What this room needs of a model: a tokenizer and a device. The tokenizer is the real one."""
    return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(device="cpu"))


@pytest.fixture
def with_start_token(stand_in):
    """The same with a tokenizer that puts a start token before every text, as Llama's does."""
    stand_in.tokenizer = copy.deepcopy(stand_in.tokenizer)
    start = stand_in.tokenizer.convert_tokens_to_ids("<|im_start|>")
    stand_in.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    return stand_in


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"model: it has no tokenizer.*Set model\.tokenizer"):
        tokenizer_of(SimpleNamespace(tokenizer=None))


# Chats


def test_a_chat_ends_where_the_assistant_writes(stand_in):
    assert has_chat_template(stand_in)
    text = chat_text(stand_in, "Hello?", system="Be kind.", opener="Well")
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nWell"
    )


def test_without_a_system_text_the_template_keeps_its_own_default(stand_in):
    text = chat_text(stand_in, "Hello?")
    assert text.endswith("<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n")
    assert "Be kind." not in text


def test_a_template_without_a_system_role_gets_the_system_text_before_the_users(stand_in):
    stand_in.tokenizer.chat_template = NO_SYSTEM
    assert chat_text(stand_in, "Hello?", system="Be kind.") == "<|im_start|>user: Be kind.\n\nHello?\nbot: "


def test_a_template_that_refuses_everything_shows_its_own_reason(stand_in):
    stand_in.tokenizer.chat_template = "{{ raise_exception('broken for ' + messages[0]['role']) }}"
    with pytest.raises(Exception, match="broken for user"):
        chat_text(stand_in, "Hello?")
    with pytest.raises(Exception, match="broken for system"):
        chat_text(stand_in, "Hello?", system="Be kind.")


def test_a_tokenizer_without_a_template_gets_plain_paragraphs(stand_in):
    stand_in.tokenizer.chat_template = None
    assert not has_chat_template(stand_in)
    assert chat_text(stand_in, "Hello?", system="Be kind.", opener="Well") == "Be kind.\n\nHello?\n\nWell"
    assert chat_text(stand_in, "Hello?") == "Hello?"


# Encoding


def test_a_chat_gets_no_second_start_token_and_plain_text_gets_its_one(with_start_token):
    start = with_start_token.tokenizer.convert_tokens_to_ids("<|im_start|>")
    chat = chat_text(with_start_token, "Hello?")
    assert with_start_token.tokenizer.encode(chat)[:2] == [start, start]  # what a careless encode would do
    assert encode(with_start_token, chat)[0] == start
    assert encode(with_start_token, chat)[1] != start
    plain = encode(with_start_token, "Hello?")
    assert plain[0] == start
    assert plain[1:] == with_start_token.tokenizer.encode("Hello?", add_special_tokens=False)


@settings(deadline=None, max_examples=40)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x17F), min_size=1, max_size=40))
def test_encoding_loses_no_character(shared_tokenizer, text):
    model = SimpleNamespace(tokenizer=shared_tokenizer)
    assert shared_tokenizer.decode(encode(model, text)) == text


# Padding


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=6))
def test_the_mask_finds_the_sequences_again_on_either_side(sequences):
    for side in ("left", "right"):
        batch = pad(sequences, 7, side)
        assert batch.tokens.shape == (len(sequences), max(map(len, sequences)))
        assert [row[keep.bool()].tolist() for row, keep in zip(batch.tokens, batch.mask, strict=True)] == sequences
        assert (batch.tokens[batch.mask == 0] == 7).all()
        assert batch.rows == tuple(range(len(sequences)))
        end = -1 if side == "left" else 0
        assert (batch.mask[:, end] == 1).all()


def test_nothing_and_an_empty_sequence_are_refused():
    with pytest.raises(ValueError, match=r"texts: the list is empty"):
        pad([], 0)
    with pytest.raises(ValueError, match=r"texts: number 1 has no tokens"):
        pad([[1], [], [2]], 0)


def test_the_pad_id_falls_back_to_the_end_of_text_and_then_to_0():
    for pad_id, end_id, expected in ((5, 6, 5), (0, 6, 0), (None, 6, 6), (None, None, 0)):
        model = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=pad_id, eos_token_id=end_id))
        assert pad_id_of(model) == expected


# Batches


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("abc xyz", min_size=1, max_size=30), min_size=1, max_size=9), st.integers(1, 10))
def test_every_text_is_in_one_batch_once_under_its_own_number_longest_first(shared_tokenizer, texts, batch_size):
    model = SimpleNamespace(tokenizer=shared_tokenizer, cfg=SimpleNamespace(device="cpu"))
    seen, widths = {}, []
    for batch in batches(model, texts, batch_size):
        assert len(batch.rows) <= batch_size
        widths.append(batch.tokens.shape[1])
        for number, tokens, keep in zip(batch.rows, batch.tokens, batch.mask, strict=True):
            assert number not in seen
            seen[number] = shared_tokenizer.decode(tokens[keep.bool()])
    assert [seen[i] for i in range(len(texts))] == texts
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(
    ("texts", "batch_size", "message"),
    [
        ([], 4, r"texts must be a list of at least one text, got an empty one"),
        ("one string", 4, r"texts must be a list of at least one text, got one string. Put a single text in brackets"),
        (["a"], 0, r"batch_size: 0 came, a whole number of at least 1 is wanted"),
        (["a", "b c d e", "", "f"], 2, r"texts: number 2 has no tokens"),
    ],
)
def test_what_cannot_be_batched_is_refused(stand_in, texts, batch_size, message):
    with pytest.raises(ValueError, match=message):
        list(batches(stand_in, texts, batch_size))


def test_an_empty_text_is_refused_before_any_batch_is_run(stand_in):
    with pytest.raises(ValueError, match="number 2"):
        next(batches(stand_in, ["a b c d", "b c d e f", ""], 1))


def test_a_batch_moves_to_a_device(stand_in):
    batch = pad([[1, 2], [3]], 0).to("meta")
    assert batch.tokens.device == batch.mask.device == torch.device("meta")
    assert batch.rows == (0, 1)


def test_the_copies_that_tests_change_leave_the_shared_tokenizer_alone(tokenizer, shared_tokenizer):
    before = (shared_tokenizer.eos_token_id, shared_tokenizer.padding_side, shared_tokenizer.chat_template)
    tokenizer.eos_token, tokenizer.padding_side, tokenizer.chat_template = "<|endoftext|>", "right", None
    assert tokenizer.eos_token_id == 0 != before[0]
    assert (shared_tokenizer.eos_token_id, shared_tokenizer.padding_side, shared_tokenizer.chat_template) == before
