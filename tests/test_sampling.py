"""What ends a response, and what is chosen: as Hugging Face's generate does it, and by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import rt_lens as rtl
from rt_lens.models.generation import NewToken, generate_tokens
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sampling import Sampling, StopAt
from rt_lens.models.sources import bundled_folder
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import chat_text, empty_thought, without_thought

PROMPTS = ["Rain?", "Tell me, with all the detail that you like, about your last weekend.", "Name a tree."]
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not "
    "enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


@torch.no_grad()
def by_hand(model, prompt: str, n: int, penalty: float = 1.0, least: int = 0, ends=()) -> list[int]:
    """Greedy decoding by whole passes, one prompt at a time."""
    ids, new = encode(model, chat_text(model, prompt)), list[int]()
    for _ in range(n):
        logits = model(torch.tensor([ids + new]))[0, -1]
        for token in {*ids, *new}:
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        if len(new) < least:
            logits[list(ends)] = -torch.inf
        new.append(int(logits.argmax()))
        if new[-1] in ends:
            return new[:-1]
    return new


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_repetition_penalty_is_hugging_faces_in_a_batch_of_unlike_prompts(tiny, penalty):
    encoded = [encode(tiny, chat_text(tiny, prompt)) for prompt in PROMPTS]
    new = generate_tokens(tiny, encoded, 12, Sampling(repetition_penalty=penalty))
    assert new == [by_hand(tiny, prompt, 12, penalty)[: len(ids)] for prompt, ids in zip(PROMPTS, new, strict=True)]
    assert penalty < 1 or new != generate_tokens(tiny, encoded, 12)  # tiny models repeat themselves anyway


def test_the_bundled_model_answers_as_under_hugging_faces_generate(model):
    theirs = AutoModelForCausalLM.from_pretrained(bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL])).eval()
    ids = torch.tensor([encode(model, chat_text(model, PROMPTS[1]))])
    settings = {"repetition_penalty": 1.3, "min_new_tokens": 10}
    whole = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, **settings)
    expected = model.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert rtl.generate(model, PROMPTS[1:2], max_new_tokens=16, **settings) == [expected]
    assert rtl.generate(model, PROMPTS[1:2], max_new_tokens=16) != [expected]


def test_ends_may_be_ones_own_and_come_no_sooner_than_said(tiny):
    plain = by_hand(tiny, PROMPTS[0], 12)
    end = next(token for number, token in enumerate(plain) if number >= 2 and token not in plain[:number])
    at = plain.index(end)
    assert tiny.tokenizer.decode(plain[:at]) == rtl.generate(tiny, PROMPTS[:1], max_new_tokens=12, eos_token_id=end)[0]
    for ends in (end, [end]):
        later = rtl.generate(tiny, PROMPTS[:1], max_new_tokens=12, eos_token_id=ends, min_new_tokens=at + 3)[0]
        assert later == tiny.tokenizer.decode(by_hand(tiny, PROMPTS[0], 12, least=at + 3, ends=(end,)))
    assert len(by_hand(tiny, PROMPTS[0], 12, least=at + 3, ends=(end,))) >= at + 3


def test_a_response_ends_before_a_string_to_stop_at_for_each_row_alone(model):
    whole = rtl.generate(model, PROMPTS, max_new_tokens=20)
    stop = [whole[1][9:15], " zzz"]
    expected = [text[: text.find(stop[0])] if stop[0] in text else text for text in whole]
    assert expected[1] == whole[1][:9]
    assert any(text == before for text, before in zip(whole, expected, strict=True))
    assert rtl.generate(model, PROMPTS, max_new_tokens=20, stop=stop) == expected
    assert rtl.generate(model, PROMPTS[1:2], max_new_tokens=20, stop=stop[0]) == expected[1:2]
    assert "".join(rtl.stream(model, PROMPTS[1], max_new_tokens=20, stop=stop)) == expected[1]
    told: list[NewToken] = []
    rtl.generate(model, PROMPTS, max_new_tokens=20, stop=stop, on_token=told.append)
    for row, text in enumerate(expected):
        assert "".join(new.text for new in told if new.row == row) == text
        indices = [new.index for new in told if new.row == row]
        assert indices == list(range(len(indices)))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("text", ["one END two", "EEND", "ENENEND!", "no ending EN", "", "STOEND", "a\nSTOP"])
def test_the_text_before_a_stop_is_the_same_in_whatever_pieces_it_comes(text, size):
    until = StopAt(["END", "STOP"])
    given = "".join(until(text[at : at + size]) for at in range(0, len(text), size))
    ends = [at for at in (text.find("END"), text.find("STOP")) if at >= 0]
    assert until.hit == bool(ends)
    assert given + until.rest == (text[: min(ends)] if ends else text)


def test_several_responses_stand_side_by_side_and_differ(model):
    texts = rtl.generate(model, PROMPTS[:2], max_new_tokens=8, temperature=1.0, num_return_sequences=3, seed=4)
    assert len(texts) == 6
    assert len(set(texts[:3])) > 1
    doubled = [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    assert texts == rtl.generate(model, doubled, max_new_tokens=8, temperature=1.0, seed=4)
    with pytest.raises(ValueError, match=r"num_return_sequences must be .* got 3 with temperature=0"):
        rtl.generate(model, PROMPTS, num_return_sequences=3)


def test_thoughts_are_kept_hidden_or_skipped(tokenizer):
    plain, thinking = (copy.deepcopy(tokenizer) for _ in range(2))
    thinking.chat_template = THINKS
    reader = rtl.models.load_tokenizer()
    for own, expected in ((plain, ""), (thinking, "<think>\n\n</think>\n\n")):
        reader.tokenizer = own
        assert empty_thought(reader, chat_text(reader, "Hi!")) == expected
    assert empty_thought(reader, "<|im_start|>assistant\n<think>\n") == "\n</think>\n\n"
    reader.cfg.rt_lens_chat_template_kwargs = {"enable_thinking": False}  # the template skips them itself
    assert empty_thought(reader, chat_text(reader, "Hi!")) == ""
    answers = {
        ("", "<think>Hm.</think>\n\nHello."): "Hello.",
        ("<think>\n", "Hm. </think> Hello."): "Hello.",
        ("", "<think>Hm, and on and on"): "",
        ("", "Hello. </think>"): "Hello. </think>",
        ("", "Hello."): "Hello.",
    }
    assert {given: without_thought(*given) for given in answers} == answers


def test_a_thinking_models_responses_in_all_three_ways(tiny):
    tiny.tokenizer = copy.deepcopy(tiny.tokenizer)
    tiny.tokenizer.chat_template = THINKS.replace(
        "'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}", 1
    )
    opened = chat_text(tiny, "Hi!")
    assert opened.endswith("<think>\n")
    with pytest.warns(UserWarning, match=r"1 of 1 responses begin with a thought.*thinking='skip' or 'hide'"):
        (kept,) = rtl.generate(tiny, ["Hi!"], max_new_tokens=5)
    assert kept
    assert rtl.generate(tiny, ["Hi!"], max_new_tokens=5, thinking="hide") == [""]  # this thought does not end
    skipped = rtl.generate(tiny, ["Hi!"], max_new_tokens=5, thinking="skip")
    assert skipped == rtl.generate(tiny, [opened + "\n</think>\n\n"], max_new_tokens=5)
    assert "".join(rtl.stream(tiny, "Hi!", max_new_tokens=5, thinking="skip")) == skipped[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 .*got repetition_penalty=0.0"),
        ({"min_new_tokens": -1}, "min_new_tokens at least 0, got .*min_new_tokens=-1"),
        ({"stop": [""]}, r"stop must be strings, none of them empty, got \[''\]"),
        ({"eos_token_id": 10**9}, r"eos_token_id must be token ids from 0 to \d+, got 1000000000"),
        ({"eos_token_id": []}, r"eos_token_id must be token ids .*, got \[\]"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1"),
        ({"thinking": "loud"}, "thinking must be 'keep', 'hide' or 'skip', got 'loud'"),
    ],
)
def test_settings_are_checked_before_any_work(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        rtl.generate(tiny, ["Hi!"], **settings)


def test_end_tokens_that_the_model_has_no_row_for_are_left_out_and_stops_end_rows_without_any(tiny, monkeypatch):
    plain = rtl.generate(tiny, PROMPTS, max_new_tokens=12)
    stop = plain[0][4:7]
    monkeypatch.setattr("rt_lens.models.generation.end_ids", lambda model: (10**6,))
    expected = [
        text[: text.find(stop)] if stop in text else text for text in rtl.generate(tiny, PROMPTS, max_new_tokens=12)
    ]
    assert rtl.generate(tiny, PROMPTS * 3, max_new_tokens=12, stop=stop) == expected * 3
