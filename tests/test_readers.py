"""Text files of one's own: whatever a spreadsheet or another tool wrote is read whole, or refused by file and line."""

from __future__ import annotations

import ast
import csv
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_lens.data.contrast_pairs import load_pairs
from rt_lens.data.questions import Question, load_questions
from rt_lens.data.readers import read_lines, read_rows, read_toml

KNOWN = ("positive", "negative", "user", "prefill")
ROW = {"positive": "Be glad.", "negative": "Be sad.", "user": "Wie geht’s – gut?", "prefill": "It was"}
MARKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # where str.splitlines cuts, and no file format does


def cells(path, argument="pairs", known=KNOWN):
    return [row.cells for row in read_rows(path, argument, known)]


def table(delimiter, *rows, end="\r\n", quoting=csv.QUOTE_MINIMAL):
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)
    return stream.getvalue()


# What others write


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_is_read_with_any_delimiter_line_end_quoting_and_byte_order_mark(
    tmp_path, delimiter, quoting, end, encoding
):
    text = table(
        delimiter, KNOWN, ROW.values(), [], ["", " ", "", ""], ["a;b", "c,d", "e\tf", ""], end=end, quoting=quoting
    )
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    assert cells(tmp_path / "t.csv") == [ROW, {"positive": "a;b", "negative": "c,d", "user": "e\tf"}]


def test_tabs_have_an_ending_of_their_own_and_endings_may_be_large(tmp_path):
    for name, delimiter in (("t.tsv", "\t"), ("T.TSV", "\t"), ("T.CSV", ";")):
        (tmp_path / name).write_text(table(delimiter, ROW, ROW.values()), encoding="utf-8", newline="")
        assert load_pairs(tmp_path / name).pairs[0].user == ROW["user"]
    (tmp_path / "Q.TXT").write_text("Hi.\n", encoding="utf-8")
    assert load_questions(tmp_path / "Q.TXT") == [Question("Hi.")]


def test_a_spreadsheets_note_of_its_delimiter_is_obeyed_and_lines_still_count(tmp_path):
    (tmp_path / "t.csv").write_text("sep=;\npositive;negative;user\na;b\n", encoding="utf-8")
    assert [(row.where, row.cells) for row in read_rows(tmp_path / "t.csv", "pairs", KNOWN)] == [
        ("t.csv, line 3", {"positive": "a", "negative": "b"})
    ]


def test_columns_without_a_name_may_be_there_if_they_are_empty(tmp_path):
    (tmp_path / "t.csv").write_text("positive, negative ,user,,\na,b,c,,\n", encoding="utf-8")
    assert cells(tmp_path / "t.csv") == [{"positive": "a", "negative": "b", "user": "c"}]


def test_a_cell_may_be_as_long_as_a_book_and_the_limit_of_other_code_stays(tmp_path):
    before, book = csv.field_size_limit(), "word " * 60_000
    (tmp_path / "t.csv").write_text(table(",", ROW, [*list(ROW.values())[:2], book, ""]), encoding="utf-8")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: cells(tmp_path / "t.csv")[0]["user"], range(8)))
    assert found == [book] * 8
    assert csv.field_size_limit() == before < len(book)


@pytest.mark.parametrize("mark", MARKS)
def test_no_format_cuts_a_text_at_marks_that_end_no_line(tmp_path, mark):
    text = f"First{mark}second"
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "r.csv").write_text(table(",", ["prompt", "right"], [text, ""]), encoding="utf-8", newline="")
    (tmp_path / "r.txt").write_text(text + "\n", encoding="utf-8")
    (tmp_path / "r.toml").write_text(f"text = '''{text}'''\n", encoding="utf-8")
    for ending in ("jsonl", "csv", "txt"):
        assert load_questions(tmp_path / f"r.{ending}") == [Question(text)]
    if mark in "\u2028\u2029\x85":  # TOML itself allows no other of them
        assert read_toml(tmp_path / "r.toml") == {"text": text}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=3, max_size=3), max_size=6
    ),
    st.sampled_from([",", ";", "\t"]),
)
def test_whatever_csv_writes_is_read_back(tmp_path_factory, rows, delimiter):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(table(delimiter, KNOWN[:3], *rows, quoting=csv.QUOTE_ALL).encode())
    kept = [row for row in rows if any(cell.strip() for cell in row)]
    assert cells(path) == [{name: cell for name, cell in zip(KNOWN, row, strict=False) if cell} for row in kept]


def test_null_and_nan_are_what_an_empty_cell_is(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "Hi.", "right": null, "category": NaN, "wrong": ["a"]}\n')
    assert load_questions(tmp_path / "q.jsonl") == [Question("Hi.", wrong=("a",))]


def test_toml_and_lines_may_begin_with_a_byte_order_mark_and_end_as_on_windows(tmp_path):
    (tmp_path / "t.toml").write_bytes("\ufeffname = 'größer'\r\nlist = [\r\n1]\r\n".encode())
    (tmp_path / "t.txt").write_bytes("\ufeffeins\r\n\r\nzwei\r\n".encode())
    assert read_toml(tmp_path / "t.toml") == {"name": "größer", "list": [1]}
    assert read_lines(tmp_path / "t.txt", "prompts") == [(1, "eins"), (3, "zwei")]


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", "user\nsch\xf6n\n".encode("cp1252"), r"got the byte 0xf6 in line 2\. Save it as UTF-8"),
        ("t.jsonl", '\n{"user": "sch\xf6n"}\n'.encode("latin-1"), r"byte 0xf6 in line 2\. Save it as UTF-8"),
        ("t.csv", "positive,user\na,b\n".encode("utf-16"), r"got the byte 0xff in line 1\. Save it as UTF-8"),
        ("t.csv", "positive,user\na,b\n".encode("utf-16-le"), r"got the byte 0x00 in line 1\. Save it as UTF-8"),
        ("t.csv", b"positive,user\na,b,c\n", r"line 2 must have at most one cell .* 2 columns, got 3\. Put .* ','"),
        ("t.csv", b"positive;user\na;b;\n", r"line 2 must have at most one cell .* 2 columns, got 3\. Put .* ';'"),
        ("t.csv", b'positive,user\n"a\nb",c\n\n"d,e\nf,g\n', r"line 5 must close each quote that it opens"),
        ("t.csv", b'positive,user\n"a "b" c",d\n', r"line 2 must close each quote that it opens"),
        ("t.csv", b"positive,user,user\na,b,c\n", r"line 1 must name each column once, got 'user' twice"),
        ("t.csv", b"positive,user,\na,b,c\n", r"line 2 must have a name for each of its columns, got 'c'"),
        ("t.csv", b"\nBe glad.,Be sad.,Hello?\n", r"line 2 must name the columns \(some of .*got 'Be glad\., B"),
        ("t.csv", b'positive,negative,user\n"a\n\nb",c,d\ne,f\n', r"t\.csv, line 5 must have .*got no 'user'"),
    ],
)  # fmt: skip
def test_what_would_be_read_wrongly_is_refused_with_its_line_and_the_fix(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^pairs: .*{says}"):
        load_pairs(tmp_path / name)


def test_toml_in_another_encoding_is_refused_by_its_name(tmp_path):
    (tmp_path / "t.toml").write_bytes("name = 'größer'\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"config: t\.toml must be UTF-8 text, got the byte 0xf6 in line 1"):
        read_toml(tmp_path / "t.toml")


# Every text file of the project is UTF-8 by name, whatever the system's own encoding is

HOME = Path(__file__).parent.parent
SOURCES = [
    file
    for folder in ("rt_lens", "notebooks", "benchmarks", "tests")
    for file in (HOME / folder).rglob("*.py")
    if not file.name.startswith("test_")
]


def unencoded(source: str) -> list[int]:
    """Lines of calls that open a text file, or read a program's output, in the system's own encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func).split(".")
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        mode = [*node.args[1 if call == ["open"] else 0 :][:1], *([named["mode"]] if "mode" in named else [])]
        binary = any(isinstance(each, ast.Constant) and "b" in str(each.value) for each in mode)
        opens = call[-1] in ("open", "fdopen", "NamedTemporaryFile", "TextIOWrapper") and not binary
        texts = call[-1] in ("read_text", "write_text") or (call[0] == "subprocess" and {"text"} & set(named))
        if (opens or texts) and "encoding" not in named and not set(call) & {"archive", "webbrowser", "build_opener"}:
            positional = len(node.args) > (1 if call[-1] == "write_text" else 0) and call[-1] in (
                "read_text",
                "write_text",
            )
            lines += [] if positional else [node.lineno]
    return lines


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(HOME)))
def test_every_text_file_is_opened_as_utf_8(file):
    assert not unencoded(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "open('a')",
        "open('a', 'w')",
        "path.open()",
        "path.open('a')",
        "path.read_text()",
        "path.write_text('a')",
        "subprocess.run(['a'], text=True)",
    ],
)
def test_the_check_finds_a_file_opened_in_the_systems_encoding(source):
    assert unencoded(source) == [1]


@pytest.mark.parametrize(
    "source",
    [
        "open('a', 'rb')",
        "open('a', mode='wb')",
        "path.open('ab', buffering=0)",
        "path.open(encoding='utf-8')",
        "path.read_text('utf-8')",
        "path.write_text('a', encoding='utf-8')",
        "subprocess.run(['a'], capture_output=True)",
    ],
)
def test_the_check_lets_utf_8_and_bytes_pass(source):
    assert not unencoded(source)
