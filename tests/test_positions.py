"""Every position names exactly the tokens that its words say, whatever the tokenizer puts in by itself."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from rt_lens.models.positions import Row, numbers_in, position_named, position_of, rows_of
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import chat_text

PREFILL = "Well, I'd"
PROMPT = [
    "<|im_start|>", "system", "\n", "Be", " kind", ".", "<|im_end|>", "\n",
    "<|im_start|>", "user", "\n", "Kind", " of", " you", "?", "<|im_end|>", "\n",
    "<|im_start|>", "ass", "istant", "\n",
]  # fmt: skip
ANSWER = ["Well", ",", " I", "'d"]


def third_token(row: Row) -> list[int]:
    return [2]


def commas(row: Row) -> list[int]:
    return [number for number, label in enumerate(row.labels) if label == ","]


@pytest.fixture
def stand_in(tokenizer):
    """What positions need of a model: the real tokenizer."""
    return SimpleNamespace(tokenizer=tokenizer)


@pytest.fixture
def framing(stand_in):
    """A tokenizer that puts a token before every text and one after it, by itself, and has no chat template."""
    own = copy.deepcopy(stand_in.tokenizer)
    names = ("<|im_start|>", "<|im_end|>")
    own._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[(name, own.convert_tokens_to_ids(name)) for name in names],
    )
    own.chat_template = None
    return SimpleNamespace(tokenizer=own)


def row_of(model, user="Kind of you?", system="Be kind.", prefill=PREFILL) -> Row:
    text = chat_text(model, user, system=system, prefill=prefill)
    (row,) = rows_of(model, [text], [len(text) - len(prefill)])
    return row


def labels(row: Row, position) -> list[str]:
    return [row.labels[number] for number in numbers_in(row, position_of(position), "the text")]


def test_a_row_holds_the_ids_the_model_gets_and_the_characters_of_each(stand_in):
    row = row_of(stand_in)
    assert list(row.ids) == encode(stand_in, row.text)
    assert list(row.labels) == PROMPT + ANSWER
    assert [row.text[low:high] for low, high in row.spans] == PROMPT + ANSWER


@pytest.mark.parametrize(
    ("position", "words", "named"),
    [
        ("last", "last token", ["'d"]),
        ("first", "first token", ["<|im_start|>"]),
        ("letter", "last token with a letter or digit", ["'d"]),
        ("mean", "mean over all tokens", PROMPT + ANSWER),
        ("mean prompt", "mean over the prompt's tokens", PROMPT),
        ("mean response", "mean over the tokens of the response's prefill", ANSWER),
        ("mean last 1", "mean over the last 1 tokens", ["'d"]),
        ("mean last 6", "mean over the last 6 tokens", ["istant", "\n", *ANSWER]),
        ('mean "Kind of"', "mean over the tokens of 'Kind of'", ["Kind", " of"]),
        ('mean "kind"', "mean over the tokens of 'kind'", [" kind"]),
        ('mean "nd of y"', "mean over the tokens of 'nd of y'", ["Kind", " of", " you"]),
        ('mean "<|im_end|>"', "mean over the tokens of '<|im_end|>'", ["<|im_end|>"]),
        ('mean "."', "mean over the tokens of '.'", ["."]),
        (0, "token 0 from the beginning", ["<|im_start|>"]),
        (4, "token 4 from the beginning", [" kind"]),
        (-1, "token 1 from the end", ["'d"]),
        (-5, "token 5 from the end", ["\n"]),
        (-25, "token 25 from the end", ["<|im_start|>"]),
        ("token 4", "token 4 from the beginning", [" kind"]),
        ("token -3", "token 3 from the end", [","]),
        (third_token, "third_token", ["\n"]),
        (commas, "commas", [","]),
    ],
)
def test_each_position_names_the_tokens_meant_and_says_so_in_words(stand_in, position, words, named):
    assert position_of(position).meaning == words
    assert labels(row_of(stand_in), position) == named


@pytest.mark.parametrize(
    "position",
    [
        "last", "first", "letter", "mean", "mean prompt", "mean response", "mean last 1", "mean last 6", "token 0",
        "token 12", "token -1", "token -3", 'mean "Kind of"', "mean \"it's\"", 'mean "a "quoted" word"',
        "mean \"it's \"so\"\"", 'mean "two\nlines"', 'mean "back\\slash"', 'mean "東京 🜚"',
    ],
)  # fmt: skip
def test_a_positions_words_bring_back_its_name(position):
    assert position_named(position_of(position).meaning) == position


def test_a_number_comes_back_as_a_name_of_the_same_token(stand_in):
    row = row_of(stand_in)
    for number in (0, 4, -1, -3, -25):
        name = position_named(position_of(number).meaning)
        assert numbers_in(row, position_of(name), "it") == numbers_in(row, position_of(number), "it") == [number % 25]


def test_the_wording_of_older_files_brings_the_position_back():
    for ending in ("", " of the chat prompt and the answer's opener"):
        assert position_named(f"mean over the tokens of the answer's opening words{ending}") == "mean response"
        assert position_named(f"last token{ending}") == "last"


@pytest.mark.parametrize("words", ["third_token", "", "mean over the tokens of 'it's'", "token x from the end"])
def test_words_of_no_named_position_are_refused(words):
    with pytest.raises(
        ValueError, match=r"positions must be given for vectors read at .* Use positions='response' or 'last'"
    ):
        position_named(words)


def test_prompt_and_response_are_the_whole_and_share_nothing(stand_in):
    for prefill in (PREFILL, "\n\n  Hm", "🙂🙃", "tant"):  # some of them grow together with the template's last newline
        row = row_of(stand_in, prefill=prefill)
        prompt, response = (numbers_in(row, position_of(f"mean {part}"), "it") for part in ("prompt", "response"))
        assert prompt + response == list(range(len(row.ids)))
        covered = "".join(row.text[row.spans[i][0] : row.spans[i][1]] for i in dict.fromkeys(response))
        assert prefill.strip()[:2] in covered


def test_the_last_occurrence_of_the_words_is_read(stand_in):
    row = row_of(stand_in, user="Red or red?", system="Say red.", prefill="red!")
    numbers = numbers_in(row, position_of('mean "red"'), "it")
    assert numbers == [len(row.ids) - 2]
    assert sum("red" in label for label in row.labels) == 3


def test_words_of_several_bytes_a_character_name_all_their_tokens(stand_in):
    row = row_of(stand_in, user="I like 東京 and 🜚 very much", prefill="")
    for words in ("東京", "🜚"):
        numbers = numbers_in(row, position_of(f'mean "{words}"'), "it")
        read = stand_in.tokenizer.decode([row.ids[number] for number in numbers])
        assert read.strip() == words
    assert len(numbers) > 1


def test_without_an_prefill_the_prompt_is_the_whole_text(stand_in):
    assert labels(row_of(stand_in, prefill=""), "mean prompt") == PROMPT
    (row,) = rows_of(stand_in, ["A plain text."])
    assert labels(row, "mean prompt") == ["A", " plain", " text", "."]


def test_the_start_token_that_the_tokenizer_adds_covers_no_character_and_its_end_token_is_left_out(framing):
    row = row_of(framing)
    assert list(row.ids) == encode(framing, row.text)
    assert list(row.labels) == [
        "<|im_start|>", "Be", " kind", ".", "\n", "\n", "Kind", " of", " you", "?", "\n", "\n", *ANSWER,
    ]  # fmt: skip
    assert framing.tokenizer.encode(row.text)[-1] == framing.tokenizer.convert_tokens_to_ids("<|im_end|>")  # left out
    assert row.spans[0] == (0, 0)
    assert labels(row, "first") == ["<|im_start|>"]
    assert labels(row, "last") == ANSWER[-1:]
    assert labels(row, "mean response") == ANSWER
    assert labels(row, 'mean "Be kind"') == ["Be", " kind"]
    assert labels(row, "mean prompt") == list(row.labels)[:12]
    assert labels(row, 1) == ["Be"]


def test_a_chat_that_holds_its_special_tokens_gets_none_added(framing, stand_in):
    text = chat_text(stand_in, "Kind of you?", system="Be kind.", prefill=PREFILL)
    (row,) = rows_of(framing, [text], [text.answer_at])
    assert list(row.labels) == PROMPT + ANSWER
    assert labels(row, "mean response") == ANSWER


@pytest.mark.parametrize("position", ["frist", "", "mean last", "mean last 0", "mean last -2", 'mean ""', "mean it"])
def test_unknown_positions_are_refused_with_those_there_are(position):
    with pytest.raises(ValueError, match=r"position must be 'last', 'first'.*'mean last 5'.*a function, got "):
        position_of(position)


@pytest.mark.parametrize(
    ("position", "says"),
    [
        (25, r"between -25 and 24 for the text, which has 25 tokens, got 'token 25 from the beginning'"),
        (-26, r"the text, which has 25 tokens, got 'token 26 from the end'"),
        ("mean last 26", r"got 'mean over the last 26 tokens'"),
        ('mean "purple"', r"'purple'\" for the text: the text does not contain 'purple'"),
        (lambda row: [], r"name at least one token of every text, got .* for the text"),
        (lambda row: [99], r"be between -25 and 24 for the text"),
    ],
)
def test_tokens_that_a_text_has_not_are_refused_by_its_name_and_beginning(stand_in, position, says):
    with pytest.raises(ValueError, match=rf"position must .*{says}.*It begins '<\|im_start\|>system\\nBe kind"):
        labels(row_of(stand_in), position)


def test_a_response_that_is_not_there_is_refused_with_the_fix(stand_in):
    with pytest.raises(ValueError, match=r"no prefills, so there is no response to read; use 'mean prompt' or 'last'"):
        labels(row_of(stand_in, prefill=""), "mean response")


def test_a_function_may_give_whatever_numbers_are(stand_in):
    row = row_of(stand_in)
    for numbers in (torch.tensor([3, -1]), (3, -1), range(3, 4)):
        assert numbers_in(row, position_of(lambda row, numbers=numbers: numbers), "it")[0] == 3
    assert numbers_in(row, position_of(lambda row: [3, -1]), "it") == [3, 24]


@pytest.mark.parametrize(
    ("prefill", "named"), [("(A)", "A"), ("(B).", "B"), ("Yes", "Yes"), ("No!", "No"), ("(7)", "7"), ("", "istant")]
)
def test_the_letter_is_that_of_the_answer_whatever_stands_after_it(stand_in, prefill, named):
    text = chat_text(stand_in, "Wet?\n (A) Yes\n (B) No", prefill=prefill)
    (row,) = rows_of(stand_in, [text], [text.answer_at])
    assert labels(row, "letter") == [named]


def test_a_text_without_a_letter_is_named(stand_in):
    (row,) = rows_of(stand_in, ["?!"])
    with pytest.raises(ValueError, match="'last token with a letter or digit' for the text: the text has no letter"):
        labels(row, "letter")
