"""Text to tokens: one start token, masks that say what is real, batches that lose and reorder nothing."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_folder import spelling_tokenizer
from tokenizers.processors import TemplateProcessing

from rt_lens.models.tokens.batches import batches, encode, pad, pad_id_of
from rt_lens.models.tokens.chats import chat_text, has_chat_template, tokenizer_of
from rt_lens.models.tokens.texts import Pieces, text_of, token_text, token_texts

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
    with pytest.raises(ValueError, match=r"model must have a tokenizer .*Set model\.tokenizer"):
        tokenizer_of(SimpleNamespace(tokenizer=None))


# Chats


def test_a_chat_ends_where_the_assistant_writes(stand_in):
    assert has_chat_template(stand_in)
    text = chat_text(stand_in, "Hello?", system="Be kind.", prefill="Well")
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
    assert chat_text(stand_in, "Hello?", system="Be kind.", prefill="Well") == "Be kind.\n\nHello?\n\nWell"
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
    with pytest.raises(ValueError, match=r"texts must have at least one token each, got an empty list"):
        pad([], 0)
    with pytest.raises(ValueError, match=r"texts must have at least one token each, got none at index 1"):
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
        ("one string", 4, r"texts must be a list of at least one text, got a str\. Wrap it in a list"),
        (["a"], 0, r"batch_size must be a whole number of at least 1, got 0"),
        (["a", "b c d e", "", "f"], 2, r"texts must have at least one token each, got none at index 2"),
    ],
)
def test_what_cannot_be_batched_is_refused(stand_in, texts, batch_size, message):
    with pytest.raises(ValueError, match=message):
        list(batches(stand_in, texts, batch_size))


def test_an_empty_text_is_refused_before_any_batch_is_run(stand_in):
    with pytest.raises(ValueError, match="at index 2"):
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


# Text


@pytest.fixture(scope="module")
def sentencepiece():
    """What this room needs of a model with a tokenizer of Llama-2's kind: space marks, and letters in bytes."""
    return SimpleNamespace(tokenizer=spelling_tokenizer())


def by_bytes(model, text: str) -> list[int]:
    """The text's tokens with every byte that is no ASCII as a token of its own."""
    vocabulary = model.tokenizer.get_vocab()
    return [vocabulary[f"<0x{byte:02X}>"] if byte > 127 else vocabulary[chr(byte)] for byte in text.encode()]


def test_a_tokens_text_keeps_the_space_before_its_word(stand_in, sentencepiece):
    text = "The sun is a star, and  so it goes."
    for model in (stand_in, sentencepiece):
        texts = token_texts(model, encode(model, text))
        assert "".join(texts) == model.tokenizer.decode(encode(model, text))
        assert " sun" in texts or " s" in texts
    assert token_texts(sentencepiece, encode(sentencepiece, text))[:3] == ["<s>", " T", "he"]
    assert token_texts(stand_in, encode(stand_in, "<|im_start|>user\nHi"))[:2] == ["<|im_start|>", "user"]


def test_the_last_token_of_a_letter_has_it_and_the_others_show_their_bytes(stand_in, sentencepiece):
    ids = stand_in.tokenizer.encode("go 🦩!", add_special_tokens=False)
    assert token_texts(stand_in, ids) == ["go", " <0xF0><0x9F>", "<0xA6>", "🦩", "!"]
    assert token_texts(sentencepiece, by_bytes(sentencepiece, "a日b")) == ["a", "<0xE6>", "<0x97>", "日", "b"]
    cut = by_bytes(sentencepiece, "日")[:2]
    assert token_texts(sentencepiece, [*cut, *by_bytes(sentencepiece, "b")]) == ["<0xE6>", "<0x97>", "b"]
    assert token_texts(stand_in, stand_in.tokenizer.encode("x\ufffd y"))[1:] == ["<0xEF><0xBF><0xBD>", " y"]


def test_a_token_alone_keeps_its_space_too_and_all_of_a_vocabulary_can_be_read(stand_in, sentencepiece):
    vocabulary = sentencepiece.tokenizer.get_vocab()
    assert token_text(sentencepiece, vocabulary["▁the"]) == " the"
    assert token_text(sentencepiece, vocabulary["▁"]) == " "
    assert token_text(sentencepiece, vocabulary["<0xE6>"]) == "<0xE6>"
    assert token_text(sentencepiece, vocabulary["<0x0A>"]) == "\n"
    assert token_text(sentencepiece, vocabulary["<s>"]) == "<s>"
    assert token_text(stand_in, stand_in.tokenizer.encode("a the")[-1]) == " the"
    assert token_text(stand_in, 10**6) == "<token 1000000>"
    for model in (stand_in, sentencepiece):
        texts = [token_text(model, token) for token in range(0, len(model.tokenizer), 1 + len(model.tokenizer) // 3000)]
        assert all(texts) and not any("\ufffd" in text for text in texts)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_together_are_the_text_and_labels_never_a_broken_letter(data, shared_tokenizer, sentencepiece):
    model = data.draw(st.sampled_from([SimpleNamespace(tokenizer=shared_tokenizer), sentencepiece]))
    some = st.integers(0, 600) | st.sampled_from(
        model.tokenizer.encode("Ça va? 日本は🦩 👍🏽 it was", add_special_tokens=False)
    )
    ids = data.draw(st.lists(some, min_size=1, max_size=14))
    for special in (False, True):
        pieces = Pieces(model, special=special)
        text = "".join([*map(pieces, ids), pieces.rest])
        assert text == text_of(model, ids, special=special)
        whole = model.tokenizer.decode(ids, skip_special_tokens=not special)
        assert text == whole or ("\ufffd" in whole and model is sentencepiece)
    labels = token_texts(model, ids)
    assert len(labels) == len(ids) and not any("\ufffd" in label for label in labels)
    if "\ufffd" not in "".join(map(Pieces(model, special=True), ids)) and all("<0x" not in label for label in labels):
        assert "".join(labels) == model.tokenizer.decode(ids)


def test_a_broken_letter_spoils_no_whole_one_before_it(sentencepiece):
    """Hugging Face's decoder gives U+FFFD for every byte of a run that ends within a letter."""
    ids = by_bytes(sentencepiece, "é日")[:-1]
    assert sentencepiece.tokenizer.decode(ids) == "\ufffd" * 4
    assert text_of(sentencepiece, ids) == "é\ufffd\ufffd"


def test_a_token_late_in_a_long_text_costs_no_more_than_an_early_one(sentencepiece):
    """Told by what is decoded: a few tokens at a time, however long the text."""
    lengths = []
    tokenizer = SimpleNamespace(
        decode=lambda ids, **how: lengths.append(len(ids)) or sentencepiece.tokenizer.decode(ids, **how)
    )
    token_texts(SimpleNamespace(tokenizer=tokenizer), encode(sentencepiece, "The sun is a star. " * 20))
    assert max(lengths) <= 3 < len(lengths) / 20
