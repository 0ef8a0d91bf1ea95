"""What a run leaves on disk is what was measured, comes back as it was, and makes tables that mean the same."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
from full_disk import full_disk
from small_runs import (
    ARMS,
    OLD_NAMES,
    PROJECTIONS,
    SETS,
    as_an_older_run,
    make_board,
    make_content,
    without_checksums,
    write_run,
)

from rt_lens.apps.report.page import write_report
from rt_lens.arms.comparison import ArmEvaluator, EvalTask
from rt_lens.data.questions import Question
from rt_lens.evaluation.scorers import Likelihood
from rt_lens.results.schema import _OLD_NAMES, checked, checked_file, files_of_run, load_results
from rt_lens.results.tables import efficient, to_latex, to_markdown
from rt_lens.results.writing import plain, tables_of, write_results, write_scores
from rt_lens.steering.binding import add

FILES = {
    *("results.json", "scores.csv", "texts.csv", "summary.csv", "responses.jsonl", "projections.json"),
    *("table.md", "table.tex"),
}
HOSTILE = ("a_b%c&d#e$f", "{x}~^\\y", "p<q>r|s", '"quoted"', "[start", "*star", "line\nbreak", "`code`", "<b>bold</b>")


@pytest.fixture
def board():
    return make_board(0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("results") / "run", make_board(0))


@pytest.fixture
def run(written, tmp_path):
    """A run's folder of the test's own."""
    return shutil.copytree(written, tmp_path / "run")


# Tables of results.json


def test_summary_has_the_behaviours_sets_and_side_effects_have_all_others(board):
    tables = tables_of(board, tasks=["test"], writing="test")
    cells = {key: {(row["set"], row["scorer"]) for row in tables[key]} for key in ("summary", "side_effects")}
    assert cells["summary"] == {("test", "vader")}
    every = {(name, scorer) for name, scorers in SETS.items() for scorer in scorers}
    assert cells["side_effects"] == every - cells["summary"]
    assert [(row["arm"], row["direction"]) for row in tables["summary"]] == list(ARMS)


def test_summary_rows_are_the_boards_with_facts_and_repetition_beside_them(board):
    pooled = board.summary().set_index(["arm", "direction", "set", "scorer"])
    for row in tables_of(board, tasks=["test"], writing="test")["summary"]:
        label = (row["arm"], row["direction"])
        own = pooled.loc[(*label, "test", "vader")]
        for key in ("n", "mean", "low", "high", "perplexity", "perplexity_low", "n_texts", "seeds"):
            assert row[key] == own[key]
        assert row["kl"] == own["kl"] and (row["kl"] > 0) == (label[0] != "untuned")
        facts, repeats = pooled.loc[(*label, "facts", "contains_answer")], pooled.loc[(*label, "test", "repetition")]
        assert (row["facts"], row["facts_low"], row["n_facts"]) == (facts["mean"], facts["low"], facts["n"])
        assert (row["repetition"], row["repetition_high"]) == (repeats["mean"], repeats["high"])


def test_each_seed_has_its_row_and_they_average_to_the_summary(board):
    tables = tables_of(board, tasks=["test"], writing="test")
    for pooled in tables["summary"]:
        own = [row for row in tables["arms"] if (row["arm"], row["direction"]) == (pooled["arm"], pooled["direction"])]
        assert [row["seed"] for row in own] == pooled["seeds"]
        assert np.mean([row["mean"] for row in own]) == pytest.approx(pooled["mean"])
        assert np.mean([row["facts"] for row in own]) == pytest.approx(pooled["facts"])
        assert "seeds" not in own[0]
    assert len({row["mean"] for row in tables["arms"]}) == len(tables["arms"]) == 8


def test_what_was_not_measured_is_null_and_not_missing(board):
    kept = board.scores[board.scores["set"] == "test"]
    bare = type(board)(kept[kept["scorer"] == "vader"], board.texts[:0], board.answers, 0)
    tables = tables_of(bare, tasks=["test"], writing="test")
    assert tables["side_effects"] == []
    row = plain(tables["summary"][0])
    for key in ("perplexity", "kl", "n_texts", "facts", "facts_low", "n_facts", "repetition", "repetition_high"):
        assert row[key] is None
    assert checked(make_content(board, **tables))


def test_a_task_that_was_not_measured_is_named(board):
    with pytest.raises(ValueError, match=r"tasks must be sets .* of \['facts', 'talk', 'test'\], got \['exam'\]"):
        tables_of(board, tasks=["exam"], writing="test")


def test_plain_knows_what_json_knows():
    found = plain({"a": np.float32(0.5), "b": [np.int64(3), math.nan, (math.inf,)], 4: np.array([1.0, math.nan])})
    assert found == {"a": 0.5, "b": [3, None, [None]], "4": [1.0, None]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# Files


def test_all_files_are_written_and_nothing_else(run):
    assert {path.name for path in run.iterdir()} == FILES


def test_scores_and_texts_come_back_to_the_last_digit(board, run):
    found = load_results(run)
    for name, written, read in (("scores", board.scores, found.scores()), ("texts", board.texts, found.texts())):
        assert len(written), name
        for column in written:
            assert read[column].tolist() == written[column].tolist(), (name, column)
    assert set(found.scores()["prompt"]) == {answer["prompt"] for answer in board.answers}


def test_each_score_stands_beside_its_own_prompt(board, run):
    scores = load_results(run).scores()
    by_key = {
        tuple(answer[key] for key in ("arm", "direction", "seed", "set", "prompt")): answer for answer in board.answers
    }
    for row in scores.itertuples():
        answer = by_key[row.arm, row.direction, row.seed, row.set, row.prompt]
        assert answer[row.scorer] == row.score


def test_results_come_back_as_they_were_given(board, run):
    assert load_results(run).content == plain(make_content(board))
    assert load_results(run / "results.json").content == load_results(str(run)).content


def test_responses_have_the_first_scorers_score_and_all_others(board, run):
    rows = load_results(run).responses()
    assert len(rows) == len(board.answers)
    for row, answer in zip(rows, board.answers, strict=True):
        assert row["score"] == answer[SETS[row["set"]][0]]
        assert {key: row[key] for key in answer} == answer


def test_hostile_prompts_and_names_survive_the_files(tmp_path):
    board = make_board(0)
    names = ["None", "NA", "nan", "a,b", 'say "so"', "two\nlines", "car\rriage", " space ", "=1+1", "ünï😀", "\u2028x"]
    renamed = {f"Question {number}, test?": name for number, name in enumerate(names)}
    for answer in board.answers:
        answer["prompt"] = renamed.get(answer["prompt"], answer["prompt"])
    board.scores["category"] = "None"
    found = load_results(write_run(tmp_path / "run", board))
    assert set(names) <= set(found.scores()["prompt"])
    assert set(found.scores()["category"]) == {"None"}
    assert [row["prompt"] for row in found.responses()] == [answer["prompt"] for answer in board.answers]


def test_half_a_surrogate_pair_is_written_as_a_question_mark(tmp_path):
    board = make_board(0)
    board.answers[0]["response"] = "cut \ud83d"
    assert load_results(write_run(tmp_path / "run", board)).responses()[0]["response"] == "cut ?"


def test_a_run_without_texts_removes_those_of_the_run_before(board, run):
    assert (run / "texts.csv").is_file()
    bare = type(board)(board.scores, board.texts[:0], board.answers, 0)
    write_run(run, bare)
    assert not (run / "texts.csv").exists()
    assert load_results(run).texts() is None


def test_scores_alone_are_written_as_a_run_writes_them(board, written, tmp_path):
    folder = write_scores(tmp_path / "scores", board)
    names = {"scores.csv", "texts.csv", "summary.csv", "responses.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    assert all((folder / name).read_bytes() == (written / name).read_bytes() for name in names)


def test_a_full_disk_leaves_the_last_whole_run_in_place(run):
    before = (run / "results.json").read_bytes()
    with full_disk(2000), pytest.raises(OSError, match="."):
        write_run(run, make_board(5))
    assert (run / "results.json").read_bytes() == before
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_tables_that_were_forgotten_are_named_before_anything_is_written(board, tmp_path):
    content = make_content(board)
    del content["side_effects"]
    with pytest.raises(ValueError, match="results must have the keys .*got none of side_effects"):
        write_results(tmp_path / "run", content, board, PROJECTIONS)
    assert not (tmp_path / "run").exists()


def test_a_report_is_made_of_what_was_written(run):
    page = write_report(run).read_text()
    for row in load_results(run).content["summary"]:
        assert f"{row['mean'] + 0.0:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in page
    assert 'id="figure-pareto-0"' in page


def test_a_real_board_of_a_real_model_goes_through_it_all(tiny, tiny_vectors, tmp_path):
    questions = [
        Question(f"{word}?", right=("yes",), wrong=("no", "perhaps")) for word in ("Sun", "Rain", "Snow", "Fog")
    ]
    exam = EvalTask(questions, (Likelihood("share"), Likelihood("accuracy")))
    board = ArmEvaluator(tiny, {"test": exam}, ["The sun is up.", "Rain fell all day long."], seed=3)
    board.measure("untuned")
    board.measure("steered", add(tiny_vectors, [1], 8.0), direction="toward")
    found = board.scores()
    content = load_results(write_run(tmp_path / "run", found, seed=3)).content
    untuned, steered = (row for row in content["summary"] if row["scorer"] == "likelihood_share")
    assert untuned["mean"] != steered["mean"] and (untuned["kl"], steered["kl"] > 0) == (0.0, True)
    assert {row["a"] for row in content["comparisons"]} == {"steered"}
    assert content["side_effects"] == []


# One run, and no other's files


@pytest.mark.parametrize("name", sorted(FILES - {"results.json"}))
def test_a_file_of_another_run_is_refused_by_name(run, tmp_path, name):
    other = write_run(tmp_path / "other", make_board(1), behaviour="other", model="large")
    (run / name).write_bytes((other / name).read_bytes() + b" ")
    says = rf"run: .*{re.escape(name)} must be the file that the run of results\.json wrote, got another"
    with pytest.raises(ValueError, match=says):
        load_results(run)
    if name in ("responses.jsonl", "projections.json"):
        with pytest.raises(ValueError, match=says):
            write_report(run)


@pytest.mark.parametrize("read", ["scores", "texts", "responses", "projections"])
def test_a_run_that_was_loaded_reads_no_file_of_the_one_that_took_its_place(run, read):
    first = load_results(run)
    shown = getattr(first, read)()
    assert len(shown)
    board = make_board(1)
    write_results(run, make_content(board), board, {**PROJECTIONS, "tokens": ["x", "y"]})
    with pytest.raises(ValueError, match="belongs to another run, or it is damaged or changed"):
        getattr(first, read)()
    assert len(getattr(load_results(run), read)())


def test_further_files_of_a_run_are_checked_as_well_and_somebodys_own_are_not(board, tmp_path, tiny_vectors):
    folder = tmp_path / "run"
    tiny_vectors.save(folder / "vectors.safetensors")
    (folder / "notes.txt").write_text("mine")
    write_results(folder, make_content(board), board, PROJECTIONS, files=["vectors.safetensors"])
    (folder / "notes.txt").write_text("mine, later")
    assert set(load_results(folder).files) == FILES - {"results.json"} | {"vectors.safetensors"}
    assert checked_file(folder / "vectors.safetensors") == folder / "vectors.safetensors"
    (2 * tiny_vectors).save(folder / "vectors.safetensors")  # by a run that was broken off, say
    for opens in (load_results, lambda run: checked_file(run / "vectors.safetensors")):
        with pytest.raises(ValueError, match=r"vectors\.safetensors must be the file that the run"):
            opens(folder)
    assert checked_file(folder / "notes.txt").read_text() == "mine, later"
    (folder / "vectors.safetensors").unlink()  # large, and not needed for a table
    assert load_results(folder).content == plain(make_content(board))


def test_a_report_of_the_run_before_goes_with_it(board, run):
    write_report(run)
    load_results(run)  # the page is none of the run's own files
    write_run(run, make_board(1))
    assert {path.name for path in run.iterdir()} == FILES


def test_scores_alone_do_not_take_the_place_of_a_runs(board, run):
    before = (run / "scores.csv").read_bytes()
    with pytest.raises(ValueError, match="out must be a folder without a run, got .*Choose a different folder"):
        write_scores(run, make_board(1))
    assert (run / "scores.csv").read_bytes() == before


@pytest.mark.parametrize(
    "files",
    [3, ["scores.csv"], {"../results.json": "0" * 64}, {"a/b": "0" * 64}, {"a\\b": "0" * 64}, {"..": "0" * 64},
     {"c:x": "0" * 64}, {"scores.csv": "short"}, {"scores.csv": None}],
)  # fmt: skip
def test_checksums_of_files_elsewhere_are_refused_and_nothing_there_is_touched(run, files):
    content = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**content, "files": files}))
    with pytest.raises(
        ValueError, match=r"results\.json: files must be an object of file names and SHA-256 checksums, got"
    ):
        load_results(run)
    assert set(files_of_run(run)) <= {*FILES, "report.html", "vectors.safetensors", "rep_tuned_toward.safetensors",
                                      "rep_tuned_away.safetensors"}  # fmt: skip


# What is refused


def test_a_later_schema_is_refused_and_the_message_says_what_reads_it(board):
    later = {**make_content(board), "schema": 3, "versions": {"rt_lens": "9.1"}}
    message = r"schema must be at most 2, got 3. Use the rt_lens that wrote the file \(version 9.1\)"
    with pytest.raises(ValueError, match=message):
        checked(later)
    for schema in (3, 0, "1", None):
        with pytest.raises(ValueError, match="schema must be at most 2, got"):
            checked({"schema": schema})


@pytest.mark.parametrize("key", ["schema", "behaviour", "summary", "versions", "bound", "seconds"])
def test_a_missing_key_is_named(board, key):
    content = make_content(board)
    del content[key]
    with pytest.raises(ValueError, match=rf"results.json must have the key {key}, got "):
        checked(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be valid JSON"),
        ("[]", "must be an object, got a list"),
        ("", "must be valid JSON"),
        ("\xff", "must be UTF-8 text"),
    ],
)
def test_damaged_json_is_refused_with_its_path(run, text, message):
    (run / "results.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        load_results(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", " must be a CSV table, got a file that cannot be read"),
        ("arm,direction\n1,2\n", " must have the column set, scorer, prompt, seed, item, score, got arm, direction"),
        (
            "arm,direction,set,scorer,prompt,seed,item,score\na,b,c,d,e,0,0,high\n",
            ": column score must hold numbers",
        ),
        ("arm,direction,set,scorer,prompt,seed,item,score\n", " must have at least one row"),
    ],
)
def test_a_damaged_table_is_refused_with_its_path(run, text, message):
    (without_checksums(run) / "scores.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"scores\.csv{message}"):
        load_results(run).scores()


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run: there is no file .*results\.json. Run the experiment first"):
        load_results(tmp_path)


def test_an_older_run_loads_with_what_can_be_filled_in(board, run):
    content = json.loads((run / "results.json").read_text())
    for key in ("side_effects", "protocol", "at_kl", "files"):
        del content[key]
    old = ("a", "b", "n", "difference", "low", "high", "p", "test", "seeds")
    told = [row for row in content["comparisons"] if row["scorer"] == "vader"]
    content["comparisons"] = [{**{key: row[key] for key in old}, "direction": row["a_direction"]} for row in told]
    (run / "results.json").write_text(json.dumps(content))
    (run / "scores.csv").unlink()
    rows = [
        row for row in map(json.loads, (run / "responses.jsonl").read_text().split("\n")[:-1]) if row["set"] == "test"
    ]
    kept = ("arm", "direction", "seed", "prompt", "response", "score")
    (run / "responses.jsonl").write_text("\n".join(json.dumps({key: row[key] for key in kept}) for row in rows))
    found = load_results(run)
    assert found.content["at_kl"] is None
    assert found.content["side_effects"] == [] and found.content["protocol"]["why"] == ""
    first = found.content["comparisons"][0]
    assert (first["b"], first["b_direction"], first["set"], first["p_holm"]) == ("untuned", "none", "test", None)
    expected = board.scores[(board.scores["set"] == "test") & (board.scores["scorer"] == "vader")]
    assert found.scores()["score"].tolist() == expected["score"].tolist()
    assert found.scores()["item"].tolist() == expected["item"].tolist()


def test_a_run_of_schema_1_is_read_under_the_names_of_schema_2(run):
    new = load_results(run)
    scores, responses = new.scores(), new.responses()
    old = load_results(as_an_older_run(run))
    on_disk = (
        (run / "results.json").read_text() + (run / "scores.csv").read_text() + (run / "responses.jsonl").read_text()
    )
    assert '"obeys"' in on_disk and "contains_answer" not in on_disk, "the files do have the old names"
    assert {**old.content, "schema": 2} == new.content and old.content["schema"] == 1
    assert old.scores()["scorer"].tolist() == scores["scorer"].tolist()
    assert old.responses() == responses and "follows_instruction" in responses[-1]
    page = write_report(run).read_text()
    assert "follows_instruction" in page and "obeys" not in page.partition('id="plotly"')[0]


def test_an_older_runs_record_of_how_it_was_made_has_its_new_key(board):
    record = {"command": None, "call": None, "file": None, "toml": None, "sha256": None, "settings": {"seed": 0}}
    content = checked({**make_content(board), "schema": 1, "again": record})
    assert content["reproducibility"] == record and "again" not in content
    assert {old: new for new, old in OLD_NAMES.items()} == _OLD_NAMES


def test_a_scorer_of_ones_own_keeps_its_name_in_a_new_run(board, tmp_path):
    renamed = board.scores.replace({"scorer": {"follows_instruction": "other"}})
    for answer in board.answers:
        answer["other"] = answer.pop("follows_instruction", None)
    scores = load_results(write_run(tmp_path / "own", type(board)(renamed, board.texts, board.answers, 0))).scores()
    assert "other" in set(scores["scorer"]) and "off_option_mass" not in set(scores["scorer"])


# Tables for a paper


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def table_row(**changes) -> dict:
    row = {"arm": "tuned", "direction": "none", "set": "test", "scorer": "vader", "n": 60, "mean": 0.5, "low": 0.4}
    return {**row, "high": 0.61, "seeds": [0], **changes}


def test_markdown_cells_are_the_rows_numbers(board):
    rows = tables_of(board, tasks=["test"], writing="test")["summary"]
    lines = to_markdown(rows, caption="mood").split("\n")
    head, *body = [cells_of(line) for line in lines if line.startswith("|") and "---" not in line]
    assert head == ["arm", "direction", "test: vader", "texts: perplexity", "texts: KL"]
    assert len(body) == len(rows)
    for row, cells in zip(rows, body, strict=True):
        assert cells[0].replace("\\", "") == row["arm"]
        assert cells[2].replace("*", "") == f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        assert cells[3].replace("*", "").startswith(f"{row['perplexity']:.2f} [")
    assert "n: test 24; texts 8. Seeds: 0 (untuned; steered, away); 0, 1, 2 (rep\\_tuned, toward" in lines[-2]


def test_the_best_of_a_column_is_bold_and_knows_what_good_means():
    rows = [
        table_row(arm=arm, direction=direction, mean=mean, kl=kl, kl_low=None, kl_high=None, n_texts=8)
        for arm, direction, mean, kl in (
            *(("untuned", "none", 0.95, 0.0), ("s", "toward", 0.6, 0.2), ("t", "toward", 0.7, 0.3)),
            *(("s", "away", -0.1, 0.1), ("t", "away", -0.3, 0.4)),
        )
    ]
    bold = re.findall(r"^\| (\w+) \| (\w+) \|(.*)\*\*(.*)\*\*", to_markdown(rows, caption="x"), re.MULTILINE)
    assert {(arm, direction, value) for arm, direction, _, value in bold} == {
        ("t", "toward", "0.70"), ("t", "away", "-0.30"), ("s", "away", "0.100"),
    }  # fmt: skip
    whole = to_markdown(rows, caption="x", by_direction=False)
    assert whole.count("**0.95**") == 1 and whole.count("**0.70**") == 0, "one column, whatever the direction"
    repeats = [{**row, "scorer": "repetition", "kl": None} for row in rows]
    assert "**-0.30**" in to_markdown(repeats, caption="x"), "less repetition is better"
    assert "**" not in to_markdown([{**row, "mean": 0.5, "kl": None} for row in rows], caption="").replace("****", "")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_markdown_keeps_its_cells_and_shows_what_came(hostile):
    rows = [table_row(arm=hostile, set=hostile), table_row(arm="other", set=hostile, mean=0.2)]
    lines = [line for line in to_markdown(rows, caption=hostile).split("\n") if line.startswith("|")]
    assert [len(cells_of(line)) for line in lines] == [2, 2, 2, 2]
    shown = re.sub(r"\\(.)", r"\1", cells_of(lines[2])[0])
    assert shown.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == " ".join(hostile.split())
    assert "<b>" not in "".join(lines)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_latex_escapes_every_sign_that_it_would_obey(hostile):
    rows = [table_row(arm=hostile, set=hostile, scorer=hostile), table_row(arm="other", set=hostile, scorer=hostile)]
    text = to_latex(rows, caption=hostile)
    label = " ".join(hostile.split())
    for sign in "&%$#_":
        bare = re.findall(rf"(?<!\\){re.escape(sign)}", text.split(r"\midrule")[1].split(" & ")[0])
        assert not bare, sign
    first = text.split("\\midrule\n")[1].split(" & ")[0]
    assert not re.search(r"[<>|\"~^]", first)
    assert not first.startswith(("[", "*")), "after the end of a row they would be read as its arguments"
    assert plain_latex(first) == label
    assert_is_latex(text)


def plain_latex(text: str) -> str:
    """What LaTeX prints of an escaped text."""
    names = {"backslash": "\\", "asciitilde": "~", "asciicircum": "^", "less": "<", "greater": ">", "bar": "|"}
    names["quotedbl"] = '"'
    text = re.sub(r"\\text(\w+)\{\}", lambda found: f"\0{ord(names[found[1]])};", text)
    text = re.sub(r"\\([{}&%$#_])", lambda found: f"\0{ord(found[1])};", text)
    return re.sub(r"\0(\d+);", lambda found: chr(int(found[1])), re.sub(r"[{}]", "", text))


def assert_is_latex(text: str) -> None:
    """Groups and environments close, and every row has as many cells as its tabular has columns."""
    code = re.sub(r"(?m)^%.*$", "", text)
    depth = 0
    for sign in re.findall(r"(?<!\\)[{}]", code.replace("\\\\", "")):
        depth += 1 if sign == "{" else -1
        assert depth >= 0
    assert depth == 0
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", code):
        assert kind == "begin" or opened.pop() == name
        if kind == "begin":
            opened.append(name)
    assert not opened
    for columns, body in re.findall(r"\\begin\{tabular\}\{@\{\}(\w+)@\{\}\}(.*?)\\end\{tabular\}", code, re.DOTALL):
        rows = [line for line in body.split("\n") if line.endswith(r" \\")]
        assert len(rows) > 2
        for row in rows:
            spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", row)]
            assert len(re.findall(r"(?<!\\)&", row)) + 1 + sum(spans) - len(spans) == len(columns)


def test_latex_says_what_markdown_says(board):
    rows = board.summary()
    text, markdown = to_latex(rows, caption="mood"), to_markdown(rows, caption="mood")
    assert_is_latex(text)
    numbers = r"-?\d+\.\d\d\d?"
    assert sorted(re.findall(numbers, text.replace("$-$", "-").partition("toprule")[2])) == sorted(
        re.findall(numbers, markdown.partition("|")[2])
    )
    assert text.count(r"\begin{tabular}") == 2, "seven columns in panels of four"
    assert text.count(r"\textbf{") == markdown.partition("|")[2].count("**") / 2 > 0
    assert text.count(r"\multicolumn{2}{c}{test}") == 1
    assert r"n: test 24; facts 24; talk 24; texts 8" in text


def test_a_table_of_arms_without_directions_has_no_column_for_them():
    text = to_markdown([table_row(), table_row(arm="other", mean=0.2, low=math.nan, high=math.nan)], caption="x")
    assert "direction" not in text.split("\n")[2]
    assert "| other | 0.20 |" in text, "no interval is claimed where there is none"
    assert "–" in to_markdown([table_row(), table_row(arm="b", mean=None)], caption="x")


def test_tables_refuse_what_they_cannot_show():
    with pytest.raises(ValueError, match="rows must have at least one row, got none"):
        to_markdown([], caption="x")
    with pytest.raises(ValueError, match="rows must have the column seeds, got"):
        to_latex([{key: value for key, value in table_row().items() if key != "seeds"}], caption="x")
    with pytest.raises(ValueError, match="got two for tuned, none, test, vader. Pool them"):
        to_markdown([table_row(), table_row()], caption="x")


# Efficient arms


def test_an_arm_is_efficient_if_no_other_of_its_direction_is_as_good_for_less():
    rows = [
        table_row(arm=arm, direction=direction, mean=mean, kl=kl)
        for arm, direction, mean, kl in (
            *(("untuned", "none", 0.3, 0.0), ("cheap", "toward", 0.5, 0.1), ("dear", "toward", 0.5, 0.2)),
            *(("strong", "toward", 0.9, 0.3), ("weak", "away", 0.35, 0.1), ("good", "away", -0.4, 0.1)),
            ("unknown", "away", -0.9, None),
        )
    ]
    found = {row["arm"]: row["efficient"] for row in efficient(rows)}
    assert found == {
        "untuned": True, "cheap": True, "dear": False, "strong": True, "weak": False, "good": True, "unknown": False,
    }  # fmt: skip


def test_efficient_arms_are_the_scoreboards_where_no_direction_is_wanted(board):
    scores, texts = (
        table.assign(arm=table["arm"] + table["direction"], direction="none") for table in (board.scores, board.texts)
    )
    flat = type(board)(scores, texts, board.answers, 0)
    theirs = flat.pareto("test", "vader")
    rows = flat.summary()
    rows = rows[(rows["set"] == "test") & (rows["scorer"] == "vader")]
    assert [row["efficient"] for row in efficient(rows)] == theirs["efficient"].tolist()
    assert 0 < theirs["efficient"].sum() < len(theirs)


def test_scores_of_two_sets_share_no_axis(board):
    with pytest.raises(ValueError, match=r"rows must have one set and one scorer, got \d pairs"):
        efficient(board.summary())
