"""Conversations of several turns: as each template writes them, wherever a prompt may stand."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest

import rt_lens as rtl
from rt_lens.common.conversations import Conversation, as_prompt
from rt_lens.data.contrast_pairs import ContrastPairs, Pair
from rt_lens.data.questions import Question, lettered
from rt_lens.models.tokens.chats import answered, chat_text, system_prompt

TURNS = [
    {"role": "user", "content": "Name a metal."},
    {"role": "assistant", "content": "Iron."},
    {"role": "user", "content": "And another?"},
]
SYSTEM = {"role": "system", "content": "You are brief."}
LLAMA_3 = (
    "{{ '<|endoftext|>' }}{% for m in messages %}"
    "{{ '<|h|>' + m['role'] + '<|e|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|e|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<turn>' + role + '\n' + m['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)


def stand_in(tokenizer, template=None):
    own = copy.deepcopy(tokenizer)
    own.chat_template = template or own.chat_template
    return SimpleNamespace(tokenizer=own, cfg=SimpleNamespace(device="cpu"))


def theirs(model, messages):
    return model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template", [None, LLAMA_3, GEMMA], ids=["ChatML", "Llama 3", "Gemma"])
def test_turns_are_written_as_transformers_writes_them(tokenizer, template):
    model = stand_in(tokenizer, template)
    assert chat_text(model, TURNS) == theirs(model, TURNS)
    assert chat_text(model, as_prompt(TURNS)) == theirs(model, TURNS)
    if template != GEMMA:
        assert chat_text(model, [SYSTEM, *TURNS]) == theirs(model, [SYSTEM, *TURNS])
        assert chat_text(model, TURNS, system="You are brief.") == theirs(model, [SYSTEM, *TURNS])
        return
    folded = [{"role": "user", "content": "You are brief.\n\nName a metal."}, *TURNS[1:]]
    assert chat_text(model, [SYSTEM, *TURNS]) == theirs(model, folded)


def test_a_persona_stands_before_the_conversations_own_system_text_and_a_default_gives_way_to_it(tokenizer):
    model = stand_in(tokenizer)
    both = {"role": "system", "content": "You are happy.\n\nYou are brief."}
    assert chat_text(model, [SYSTEM, *TURNS], system="You are happy.") == theirs(model, [both, *TURNS])
    with system_prompt(model, "You are sad."):
        assert chat_text(model, [SYSTEM, *TURNS]) == theirs(model, [SYSTEM, *TURNS])
        assert "You are sad." in chat_text(model, TURNS)


def test_a_response_follows_all_turns(tokenizer):
    model = stand_in(tokenizer)
    text = answered(model, chat_text(model, TURNS, prefill="Tin"), ", say.")
    assert text == theirs(model, TURNS) + "Tin, say."
    assert chat_text(model, TURNS, prefill="Tin").answer_at == len(theirs(model, TURNS))


def test_a_conversation_goes_wherever_a_prompt_goes(model):
    by_hand = chat_text(model, TURNS)
    (expected,) = rtl.generate(model, [by_hand], max_new_tokens=6)
    assert rtl.generate(model, [TURNS, "Name a metal."], max_new_tokens=6)[0] == expected
    assert "".join(rtl.stream(model, TURNS, max_new_tokens=6)) == expected
    questions = rtl.evaluate(model, [TURNS], scorer="vader", max_new_tokens=6)
    assert questions.responses == [expected]
    pairs = ContrastPairs("mine", (Pair("Be happy.", "Be sad.", as_prompt(TURNS)),))
    persona = chat_text(model, [{"role": "system", "content": "Be happy."}, *TURNS])
    assert pairs.texts(model).positive == [persona]
    assert rtl.tuning.write_neutral(model, [as_prompt(TURNS)])[0].prompt == by_hand


def test_the_cache_over_several_turns_gives_what_the_whole_text_gives(model):
    whole, cached = (rtl.generate(model, [TURNS], max_new_tokens=12, use_cache=use) for use in (False, True))
    assert whole == cached


def test_a_question_about_a_conversation_lists_its_options_in_the_last_turn():
    question = Question(Conversation(TURNS), right=("Tin",), wrong=("Wood",))
    asked = lettered(question.prompt, question.options)
    assert [turn["content"] for turn in asked.messages[:2]] == ["Name a metal.", "Iron."]
    assert asked.messages[2]["content"].startswith("And another?\n\nA. Tin\nB. Wood\n\n")


def test_a_conversation_is_a_text_that_differs_from_its_last_turn_and_survives_copies():
    talk = as_prompt(TURNS)
    assert talk == "User: Name a metal.\nAssistant: Iron.\nUser: And another?"
    assert talk != as_prompt([SYSTEM, *TURNS]) != "And another?"
    for copied in (copy.deepcopy(talk), pickle.loads(pickle.dumps(talk)), str(talk)):
        assert isinstance(copied, Conversation)
        assert copied.messages == tuple(TURNS)
    pair = Pair("a", "b", talk)
    assert replace(pair, prefill="x").user.messages == tuple(TURNS)
    assert as_prompt(TURNS[:1]) == "Name a metal."
    assert not isinstance(as_prompt(TURNS[:1]), Conversation)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there."}]}]
    assert as_prompt(parts) == "Hi there."


def test_without_a_template_the_turns_are_paragraphs(tokenizer):
    model = stand_in(tokenizer)
    model.tokenizer.chat_template = None
    assert (
        chat_text(model, [SYSTEM, *TURNS], prefill="Tin")
        == "You are brief.\n\nName a metal.\n\nIron.\n\nAnd another?\n\nTin"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "robot", "content": "Hi"}], r"message 1 must have a role of system, .*, got 'robot'"),
        ([*TURNS, {"role": "user"}], r"message 4 must have a text as its content, got 'None'"),
        ([{"role": "user", "content": "  "}], r"message 1 must have a text as its content, got '  '"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], r"message 1 must have a text as its content"),
        (TURNS[:2], r"prompts at index 0 must end with a message to be answered, got the assistant's 'Iron\.'"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_messages_that_are_none_are_refused_by_number(tiny, messages, message):
    with pytest.raises(ValueError, match=message):
        rtl.generate(tiny, [messages], max_new_tokens=1)


@pytest.mark.usefixtures("as_a_user")
def test_one_conversation_in_the_place_of_a_list_says_to_wrap_it(tiny):
    with pytest.raises(ValueError, match=r"got a message at index 0. Wrap the conversation in a list"):
        rtl.generate(tiny, TURNS, max_new_tokens=1)


@pytest.mark.usefixtures("as_a_user")
def test_where_no_template_is_applied_a_conversation_is_refused(tiny):
    for given in (TURNS, as_prompt(TURNS)):
        with pytest.raises(ValueError, match=r"got a conversation at index 0. Apply the chat template first"):
            rtl.generate(tiny, [given], chat=False, max_new_tokens=1)
        with pytest.raises(ValueError, match=r"got a conversation at index 0"):
            rtl.models.last_token_activations(tiny, [as_prompt(TURNS)], ["blocks.0.hook_resid_post"])


def test_an_assistants_turn_may_be_calls_alone(tokenizer):
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    talk = Conversation([TURNS[0], calls, {"role": "tool", "content": "Tin."}])
    assert talk.messages[1]["content"] == ""


def test_messages_that_begin_with_a_special_token_get_the_template(tiny):
    user = {"role": "user", "content": "<|im_start|>user\nHi"}
    seen = []
    with tiny.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(x.shape[1]))]):
        rtl.generate(tiny, [[user]], max_new_tokens=1)
    assert seen[0] == len(tiny.tokenizer.encode(chat_text(tiny, user["content"]), add_special_tokens=False))
