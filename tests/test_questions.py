"""Questions from files of one's own, and from the shipped sets."""

from __future__ import annotations

import json

import pytest

from rt_lens.data.builtin import QUESTIONS
from rt_lens.data.contrast_pairs import ContrastPairs, Pair
from rt_lens.data.questions import Question, as_questions, lettered, load_questions


def test_options_are_the_right_ones_then_the_wrong_ones():
    assert Question("2 + 2?", ("4", "four"), ("5",)).options == ("4", "four", "5")


def test_jsonl_csv_and_txt_hold_the_same_questions(tmp_path):
    asked = [Question("What is 2 + 2?", ("4", "four"), ("5",), "sums"), Question("Say, hello")]
    lines = [
        {"question": "What is 2 + 2?", "answers": ["4", "four"], "wrong": "5", "category": "sums"},
        {"prompt": "Say, hello"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "q.csv").write_text('prompt,right,wrong,category\nWhat is 2 + 2?,4|four,5,sums\n"Say, hello",,,\n')
    (tmp_path / "q.txt").write_text("What is 2 + 2?\n\nSay, hello\n")
    assert load_questions(tmp_path / "q.jsonl") == asked
    assert load_questions(tmp_path / "q.csv") == asked
    assert [each.prompt for each in load_questions(tmp_path / "q.txt")] == [each.prompt for each in asked]


def test_a_csv_that_a_spreadsheet_wrote_is_read(tmp_path):
    (tmp_path / "q.csv").write_bytes("\ufeffprompt,right\r\nWie heißt du?,Zoë\r\n".encode())
    assert load_questions(tmp_path / "q.csv") == [Question("Wie heißt du?", ("Zoë",))]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("q.jsonl", '{"prompt": "Hi."}\n{"promt": "Hi."}', "q.jsonl, line 2 must have the fields prompt, right, wrong"),
        ("q.jsonl", '{"prompt": "Hi."}\n{"promt": "Hi."}', "got 'promt'. Did you mean 'prompt'?"),
        ("q.jsonl", '{"prompt": "Hi.", "note": "x"}', "line 1 must have no fields but prompt, right"),
        ("q.jsonl", '{"prompt": "Hi.", "question": "Ho."}', "line 1 must have either 'prompt' or 'question', got both"),
        ("q.jsonl", '{"prompt": "Hi.", "right": [null]}', "line 1, right must be a list of texts, got [None]"),
        ("q.jsonl", '{"prompt": "Hi."}\n\nHi.', "q.jsonl, line 3 must be a JSON object, got 'Hi.'"),
        ("q.jsonl", '{"right": ["a"]}', "line 1 must have a prompt"),
        ("q.jsonl", '{"prompt": 3}', "line 1: prompt must be a string, got 3"),
        ("q.jsonl", '{"prompt": "Hi.", "right": 3}', "line 1, right must be a list of texts, got 3"),
        ("q.jsonl", '{"prompt": " "}', "line 1: prompt must be a string, got an empty one"),
        (
            "q.jsonl",
            '{"prompt": "Hi.", "right": ["a"], "wrong": ["a"]}',
            "must be different texts, none of them empty, got ['a', 'a']",
        ),
        ("q.csv", "text\nHi.\n", "q.csv, line 1 must name the columns (some of prompt, question, right"),
        ("q.csv", "prompt\nHi, there\n", "q.csv, line 2 must have at most one cell for each of the 1 columns, got 2"),
        ("q.txt", "\n", "q.txt must hold at least one question, got none"),
        ("q.xlsx", "", "questions must be a .jsonl, .json, .csv, .tsv or .txt file, got q.xlsx"),
    ],
)
def test_bad_files_are_named(tmp_path, as_a_user, name, content, says):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="^questions(: | must be )") as caught:
        load_questions(tmp_path / name)
    assert says in str(caught.value)


def test_an_opener_is_read_as_a_prefill_with_a_hint(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "Hi.", "opener": "It is"}\n', encoding="utf-8")
    (tmp_path / "q.csv").write_text("prompt;opener\nHi.;It is\n", encoding="utf-8")
    for ending in ("jsonl", "csv"):
        with pytest.warns(UserWarning, match=r"'opener' is now 'prefill'; the old name still works"):
            assert load_questions(tmp_path / f"q.{ending}") == [Question("Hi.", prefill="It is")]


def test_a_file_that_is_not_there_is_named_with_the_built_in_sets():
    with pytest.raises(FileNotFoundError, match=r"questions must be a built-in set \(capitals, .* got capitols"):
        load_questions("capitols")


@pytest.mark.parametrize("name", QUESTIONS)
def test_built_in_sets_load_and_have_no_question_twice(name):
    asked = load_questions(name)
    assert len(asked) >= 20
    assert len({question.prompt for question in asked}) == len(asked)


def test_pairs_prompts_and_questions_can_be_asked():
    pairs = ContrastPairs("x", (Pair("be a", "be b", "Hi."), Pair("be c", "be d", "Hi.")))
    assert as_questions(pairs) == as_questions(["Hi."]) == as_questions([Question("Hi.")]) == [Question("Hi.")]
    for nothing in ([], "Hi."):
        with pytest.raises(ValueError, match="prompts must be a list of at least one text"):
            as_questions(nothing)


@pytest.mark.usefixtures("as_a_user")
def test_one_string_for_options_is_refused():
    with pytest.raises(ValueError, match="right must be a list of texts, got a str"):
        Question("Hi.", "abc")  # type: ignore[arg-type]


def test_letters_list_the_options_in_order():
    assert lettered("Which?", ["x", "y"]) == "Which?\n\nA. x\nB. y\n\nAnswer with the letter only."
