"""Chats: nothing guessed, no system text lost, answers as a template writes them, and their ends."""

from __future__ import annotations

import copy
import datetime
import warnings
from types import SimpleNamespace

import pytest
import torch
from llama_folder import llama_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers.utils import chat_template_utils

import rt_lens as rtl
from rt_lens.data.contrast_pairs import ContrastPairs, Pair
from rt_lens.data.questions import Question
from rt_lens.evaluation.answering import ask
from rt_lens.evaluation.choices import _asks, likelihoods, start_of
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import ChatText, answered, chat_text, end_ids, end_of_answer, is_chat
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.targets import Choice, Target, write_neutral, write_targets
from rt_lens.tuning.tuning_data import _row

VICUNA = (
    "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PHI = (  # takes a system role and writes nothing of it
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = PHI.replace(
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not "
    "enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}{% endif %}",
)
DATED = "{{ 'Today is ' + strftime_now('%A, %-d %b %Y at %H:%M, 100%%') + '. ' }}" + PHI


def stand_in(tokenizer, template=None, **cfg):
    """What these functions need of a model."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = template or own.chat_template
    return SimpleNamespace(tokenizer=own, cfg=SimpleNamespace(device="cpu", **cfg))


def adding(tokenizer, single):
    """A tokenizer that adds tokens to every text."""
    own = copy.deepcopy(tokenizer)
    names = [piece for piece in single.split() if piece != "$A"]
    own._tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[(name, own.convert_tokens_to_ids(name)) for name in names]
    )
    return own


@pytest.fixture(scope="module")
def llama_2():
    return stand_in(llama_tokenizer())


# What is remembered


@pytest.mark.parametrize("adds", ["<|im_start|> $A", "<|im_start|> $A <|im_end|>"])
@pytest.mark.parametrize("template", [None, VICUNA, "{{ '\n' }}" + PHI])
def test_a_chat_is_encoded_as_transformers_does_whatever_it_begins_with(tokenizer, template, adds):
    model = stand_in(adding(tokenizer, adds), template)
    text = chat_text(model, "How was your day?", system="You are cheerful.")
    messages = [
        {"role": "system", "content": "You are cheerful."},
        {"role": "user", "content": "How was your day?"},
    ]
    if template and "system" not in template and template != VICUNA:
        messages = [{"role": "user", "content": "You are cheerful.\n\nHow was your day?"}]
    theirs = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode(model, text) == theirs
    assert encode(model, str(text)) == encode(model, (text,)[0]) == theirs


def test_a_text_to_go_on_from_never_ends_with_the_end_token_that_the_tokenizer_adds(tokenizer):
    model = stand_in(adding(tokenizer, "<|im_start|> $A <|im_end|>"))
    start, end = (model.tokenizer.convert_tokens_to_ids(f"<|im_{side}|>") for side in ("start", "end"))
    plain = model.tokenizer.encode("The harbour was quiet", add_special_tokens=False)
    assert model.tokenizer.encode("The harbour was quiet") == [start, *plain, end]
    assert encode(model, "The harbour was quiet") == [start, *plain]
    assert encode(model, "") == [start]


def test_what_went_through_a_template_does_not_go_through_it_again(tokenizer, tiny):
    tiny.tokenizer.chat_template = VICUNA
    (once,) = rtl.models.generation.as_chat(tiny, ["Who are you?"])
    assert once == "USER: Who are you?\nASSISTANT:" and is_chat(tiny, once)
    assert rtl.models.generation.as_chat(tiny, [once]) == [once]
    assert (
        rtl.models.generation.as_chat(tiny, [str.__str__(once)[:]])[0].count("USER") == 2
    )  # a string of one's own is a message
    assert rtl.generate(tiny, [once], max_new_tokens=4) == rtl.generate(tiny, ["Who are you?"], max_new_tokens=4)
    asked = [Question(once, ("Bob",), ("Eve",)), Question("Who are you?", ("Bob",), ("Eve",))]
    (first,), (second,) = (tuple(_asks(tiny, 0, question, "completion")) for question in asked)
    assert first == second  # the same tokens
    assert likelihoods(tiny, asked)[0].totals == pytest.approx(likelihoods(tiny, asked)[1].totals, abs=1e-5)


def test_a_system_text_for_a_chat_that_is_written_already_is_refused(tiny):
    written = chat_text(tiny, "Who are you?")
    with pytest.raises(ValueError, match=r"system must be empty for a prompt .* got 'Be kind\.'\. Give"):
        ask(tiny, [Question(written, system="Be kind.")])
    opened = Question(written, prefill="I am")
    assert (
        ask(tiny, [opened], max_new_tokens=3)[0].text
        == ask(tiny, [Question("Who are you?", prefill="I am")], max_new_tokens=3)[0].text
    )


def test_a_chat_stays_one_when_words_are_added(tiny):
    text = chat_text(tiny, "Who are you?", prefill="I") + " am"
    assert isinstance(text, ChatText) and text.prefill == "I am" and text[text.answer_at :] == "I am"


# System texts


def test_a_template_that_passes_over_the_system_role_gets_its_text_before_the_users(tokenizer):
    model = stand_in(tokenizer, PHI)
    text = chat_text(model, "Hello?", system="Be kind.")
    assert text == "<|im_start|>user\nBe kind.\n\nHello?<|im_end|>\n<|im_start|>assistant\n"
    pairs = ContrastPairs("mood", (Pair("Be glad.", "Be sad.", "Hello?"),))
    positive, negative = (side[0] for side in pairs.texts(model))
    assert "Be glad." in positive and "Be sad." in negative


def test_a_template_that_writes_the_system_text_gets_it_once(tokenizer):
    model = stand_in(tokenizer)
    assert chat_text(model, "Hello?", system="Be kind.").count("Be kind.") == 1
    # Even where the user says the same.
    assert chat_text(model, "Be kind.", system="Be kind.").count("Be kind.") == 2


# Variables and dates


def test_variables_reach_the_template(tokenizer):
    thinking = stand_in(tokenizer, THINKING)
    answering = stand_in(tokenizer, THINKING, rt_lens_chat_template_kwargs={"enable_thinking": False})
    assert chat_text(thinking, "Hi").endswith("<think>\n")
    assert chat_text(answering, "Hi").endswith("<think>\n\n</think>\n\n")


def test_an_prefill_stands_outside_a_thought_that_the_template_opens(tokenizer):
    text = chat_text(stand_in(tokenizer, THINKING), "Hi", prefill="Well,")
    assert text.endswith("<|im_start|>assistant\nWell,") and "<think>" not in text
    options = answered(stand_in(tokenizer, THINKING), chat_text(stand_in(tokenizer, THINKING), "Hi"), "Yes")
    assert options.endswith("<|im_start|>assistant\nYes")


def test_answers_that_begin_with_a_thought_are_warned_of(tiny):
    tiny.tokenizer.chat_template = THINKING
    with pytest.warns(UserWarning, match=r"2 of 2 responses begin with a thought.*enable_thinking"):
        rtl.generate(tiny, ["Hi", "Who?"], max_new_tokens=2)
    tiny.cfg.rt_lens_chat_template_kwargs = {"enable_thinking": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rtl.generate(tiny, ["Hi", "Who?"], max_new_tokens=2)


def test_a_template_with_a_date_gives_the_same_on_every_day(tokenizer, tiny, monkeypatch):
    tiny.tokenizer.chat_template = DATED
    text = chat_text(tiny, "Hi")
    assert text.startswith("Today is Friday, 26 Jul 2024 at 12:00, 100%. ")
    tiny.tokenizer.chat_template = "\n" + DATED
    assert chat_text(tiny, "Hi") == "\n" + text
    tiny.tokenizer.chat_template = DATED
    pairs = ContrastPairs("mood", (Pair("Be glad.", "Be sad.", "Hello?"), Pair("Be glad.", "Be sad.", "Rivers?")))
    today = rtl.extract_vectors(tiny, pairs)

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 2, 3)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    theirs = tiny.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "2031" in theirs  # so there was something to hold still
    assert chat_text(tiny, "Hi") == text
    later = rtl.extract_vectors(tiny, pairs)
    assert all(torch.equal(today[name], later[name]) for name in today.hook_names)


def test_the_provenance_tells_vectors_of_other_prompts_apart(tiny):
    pairs = ContrastPairs("mood", (Pair("Be glad.", "Be sad.", "Hello?"), Pair("Be glad.", "Be sad.", "Rivers?")))
    before = rtl.extract_vectors(tiny, pairs).provenance
    tiny.tokenizer.chat_template = "{{ '<|im_start|>system\nIt is Monday.<|im_end|>\n' }}" + PHI
    after = rtl.extract_vectors(tiny, pairs).provenance
    assert before.data_sha256 == after.data_sha256 and before.prompts_sha256 != after.prompts_sha256
    assert len(before.prompts_sha256) == 64


# Answers as the template writes them


def test_the_first_word_of_an_answer_is_the_token_of_a_whole_answer(llama_2):
    tokenizer = llama_2.tokenizer
    turns = [{"role": "user", "content": "Is it true?"}, {"role": "assistant", "content": "The answer is"}]
    theirs = tokenizer.apply_chat_template(turns, continue_final_message=True, return_dict=False)
    prompt = chat_text(llama_2, "Is it true?", prefill="The answer is")
    assert encode(llama_2, prompt) == theirs
    assert tokenizer.convert_ids_to_tokens(theirs)[-3:] != ["The", "▁answer", "▁is"]  # "[/INST]The" is another text
    assert prompt[prompt.answer_at :] == "The answer is"


def test_pairs_targets_choices_and_options_are_tokenised_alike(llama_2):
    tokenizer, prompt = llama_2.tokenizer, chat_text(llama_2, "Is it true?")
    turns = [{"role": "user", "content": "Is it true?"}, {"role": "assistant", "content": "The answer is A"}]
    whole = tokenizer.apply_chat_template(turns, continue_final_message=True, return_dict=False)
    row = _row(llama_2, Target(prompt, "The answer is A"), [])
    assert row.tokens.tolist() == [*whole, tokenizer.eos_token_id]
    opened = chat_text(llama_2, "Is it true?", prefill="The answer is")
    choice = _row(llama_2, Choice(opened, (" A", " B"), (1.0, 0.0)), [])
    assert [*choice.tokens.tolist(), int(choice.choices[0, 0])] == whole
    text, gap = start_of(llama_2, Question("Is it true?", ("Yes",), ("No",)))
    assert gap == "" and answered(llama_2, text, gap + "Yes").endswith("[/INST] Yes")
    text, gap = start_of(llama_2, Question("Is it true?", ("A",), ("B",), prefill="The answer is"))
    assert encode(llama_2, answered(llama_2, text, gap + "A")) == whole
    text, gap = start_of(llama_2, Question(opened, ("A",), ("B",)))  # a chat whose answer is opened already
    assert encode(llama_2, answered(llama_2, text, gap + "A")) == whole
    pair = ContrastPairs(
        "honesty", (Pair("", "", "Is it true?", "The answer is A", negative_prefill="The answer is B"),)
    )
    assert encode(llama_2, pair.texts(llama_2).positive[0]) == whole


def test_an_prefill_that_the_template_trims_still_begins_the_answer(tokenizer):
    trimming = stand_in(tokenizer, PHI.replace("m['content']", "m['content'] | trim"))
    text = chat_text(trimming, "Hello?", prefill="Well, ")
    theirs = trimming.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Well, "}], tokenize=False,
        continue_final_message=True,
    )  # fmt: skip
    assert text == theirs and text[text.answer_at :] == "Well,"


# Ends


def test_an_answer_ends_where_the_generation_settings_say(tiny):
    vocabulary = tiny.tokenizer.get_vocab()
    tiny.cfg.rt_lens_generation = {"eos_token_id": [vocabulary["Ġdog"], vocabulary["Ġcat"]]}
    assert end_ids(tiny) == tuple(sorted((vocabulary["Ġdog"], vocabulary["Ġcat"])))
    tiny.cfg.rt_lens_generation = {"eos_token_id": vocabulary["Ġdog"]}
    assert end_ids(tiny) == (vocabulary["Ġdog"],)
    turn_end = tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")
    tiny.cfg.rt_lens_generation |= {"_from_model_config": True}  # of a folder that brings none of its own
    assert end_ids(tiny) == tuple(sorted((vocabulary["Ġdog"], turn_end)))


def test_without_generation_settings_the_tokenizer_and_its_template_say_where_an_answer_ends(tiny):
    text_end, turn_end = (tiny.tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>"))
    tiny.tokenizer.eos_token = "<|endoftext|>"
    assert end_ids(tiny) == (text_end, turn_end)
    assert end_of_answer(tiny) == turn_end  # what the template writes after an answer
    tiny.tokenizer.chat_template = None
    assert end_ids(tiny) == (text_end,)  # a token of that name is none, where no template writes it
    assert end_of_answer(tiny) == text_end


def test_a_whole_answer_is_learnt_with_its_end_and_a_cut_one_without(tiny):
    end = tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = chat_text(tiny, "How was your day?")
    words = tiny.tokenizer.encode("A happy day", add_special_tokens=False)
    for target, answer in (
        (Target(prompt, "A happy day"), [*words, end]),
        (Target(prompt, "A happy day<|im_end|>"), [*words, end]),
        (Target(prompt, "A happy day", ended=False), words),
    ):
        row = _row(tiny, target, [])
        assert row.tokens.tolist() == encode(tiny, prompt) + answer
        assert row.choices[:, 0].tolist() == answer
        assert int(row.predicts.sum()) == len(answer)


def say(model, ids):
    """Makes the model's next tokens these, one after the other, in every row."""
    steps = iter(ids)

    def force(module, args, logits):
        logits[..., next(steps)] = 1e4
        return logits

    return model.unembed.register_forward_hook(force)


@pytest.mark.parametrize(("room", "ended"), [(2, False), (3, True)])
def test_answers_that_the_model_ended_itself_keep_their_end(tiny, room, ended):
    said = [*tiny.tokenizer.encode("Fine day", add_special_tokens=False), tiny.tokenizer.eos_token_id]
    assert len(said) == 3
    pairs = ContrastPairs("mood", tuple(Pair("Be glad.", "Be sad.", f"Question {n}?") for n in range(3)))
    config = TuneConfig(n_targets=3, target_tokens=room, target_temperature=0.0)
    for write in (
        lambda: write_targets(tiny, pairs, "toward", config),
        lambda: write_neutral(tiny, ["Hi", "Who?", "Why?"], config),
    ):
        forced = say(tiny, said)
        with tiny.hooks(fwd_hooks=[("hook_embed", lambda embedded, hook: embedded)]):  # each call is one token then
            written = write()
        forced.remove()
        assert [(target.answer, target.ended) for target in written] == [("Fine day", ended)] * 3
        last = [int(_row(tiny, target, []).tokens[-1]) for target in written]
        assert last == [said[2] if ended else said[1]] * 3


def test_a_tuned_model_answers_and_stops(tiny, tiny_vectors):
    asked = ["How was your day?", "What did you do?", "Music?", "Any plans?"]
    targets = [Target(chat_text(tiny, user), "A happy day") for user in asked]
    config = TuneConfig(
        layers=[1], trained_layers=[0, 1], cosine_weight=0, kl_weight=0, learning_rate=2e-2, max_steps=60, epochs=99,
        validate_every=20, patience=9,
    )  # fmt: skip
    before = rtl.generate(tiny, asked, max_new_tokens=12)
    delta = rtl.tune(tiny, tiny_vectors, targets, config, progress=False)
    with delta.applied(tiny):
        assert rtl.generate(tiny, asked, max_new_tokens=12) == ["A happy day"] * 4
    assert "A happy day" not in before
