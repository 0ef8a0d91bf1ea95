"""What changed between two runs beyond noise is said, and what did not is not."""

from __future__ import annotations

import gc
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from small_runs import as_an_older_run, make_board, without_checksums, write_run
from typer.testing import CliRunner

from rt_lens.apps.cli import app, main
from rt_lens.arms.comparison import ArmEvaluator, EvalTask
from rt_lens.common.statistics.comparisons import holm, mcnemar, unpaired_comparison
from rt_lens.common.statistics.power import detectable
from rt_lens.data.questions import Question
from rt_lens.evaluation.scorers import Likelihood
from rt_lens.results.comparing import _ALPHA, _judged, _row, _Side, compare_runs
from rt_lens.results.schema import load_results
from rt_lens.steering.binding import add

KEY = ("rep_tuned", "toward", "test", "vader")
SEEDS = (0, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of one experiment: two draws, one with a real difference, one on other prompts."""
    folder = tmp_path_factory.mktemp("runs")
    boards = {
        "before": make_board(1, seeds=SEEDS),
        "again": make_board(2, seeds=SEEDS),
        "moved": make_board(13, seeds=SEEDS, shift=1.0),
        "elsewhere": make_board(4, seeds=SEEDS, prompts=tuple(range(100, 140)), asked="Else"),
    }
    return {name: write_run(folder / name, board) for name, board in boards.items()}


def compared(runs, a, b):
    return compare_runs(load_results(runs[a]), load_results(runs[b]))


def row_of(found, key=KEY):
    rows = found.rows.set_index(["arm", "direction", "set", "scorer"])
    return rows.loc[key]


def changed_run(runs, tmp_path, **changes):
    run = shutil.copytree(runs["before"], tmp_path / "changed")
    content = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**content, **changes}))
    return run


def side(grid, seeds=None, items=None) -> _Side:
    grid = np.asarray(grid, dtype=float)
    return _Side(grid, seeds or list(range(len(grid))), items or list(range(grid.shape[1])))


# A run against itself, and against another draw


def test_a_run_against_itself_changed_nothing(runs):
    found = compared(runs, "before", "before")
    assert len(found.rows) == 4 * 5 + 4 * 2
    assert (found.rows["difference"] == 0).all() and (found.rows["p"] == 1).all() and (found.rows["p_holm"] == 1).all()
    assert set(found.rows["verdict"]) == {"the same"}
    assert len(found.changed) == len(found.only_a) == len(found.only_b) == len(found.settings) == 0
    assert found.closing == "Nothing changed: 28 rows, the same on every item (seeds 0, 1, 2, 3, 4)."


def test_a_real_difference_is_found_where_it_is_and_nowhere_else(runs):
    found = compared(runs, "before", "moved")
    changed = found.changed
    assert set(zip(changed["arm"], changed["set"], changed["scorer"], strict=True)) == {("rep_tuned", "test", "vader")}
    assert set(changed["direction"]) == {"toward", "away"} and set(changed["verdict"]) == {"higher"}
    row = row_of(found)
    assert row["low"] < 1.0 < row["high"] and row["low"] > 0
    assert row["difference"] == pytest.approx(row["b_mean"] - row["a_mean"])
    assert "rep_tuned" in str(found) and found.closing.startswith("2 of 28 rows changed beyond noise")


def test_the_other_way_round_it_is_lower(runs):
    there, back = compared(runs, "before", "moved"), compared(runs, "moved", "before")
    assert set(back.changed["verdict"]) == {"lower"}
    assert back.rows["difference"].to_numpy() == pytest.approx(-there.rows["difference"].to_numpy())
    assert back.rows["p_holm"].to_numpy() == pytest.approx(there.rows["p_holm"].to_numpy())


def test_another_draw_differs_and_no_change_is_shown(runs):
    found = compared(runs, "before", "again")
    assert (found.rows["difference"] != 0).sum() > 20, "there was noise to see through"
    assert not len(found.changed)
    assert found.closing.startswith("No change shown in 28 rows")
    assert '"no change shown" does not mean "no change"' in str(found)


def test_every_row_is_counted_in_holms_correction(runs):
    rows = compared(runs, "before", "moved").rows
    assert rows["p_holm"].to_numpy() == pytest.approx(holm(rows["p"].to_numpy()))
    assert (rows["p_holm"] >= rows["p"]).all() and (rows["p_holm"] > rows["p"]).any()


def test_what_each_number_rests_on_is_said(runs):
    found = compared(runs, "before", "moved")
    for seen in ("n = 8 to 24", "seeds 0, 1, 2, 3, 4", "Holm", "95 % interval"):
        assert seen in str(found)
    assert row_of(found)["n"] == 24 and row_of(found, ("steered", "away", "texts", "kl"))["n"] == 8
    assert row_of(found)["a_seeds"] == row_of(found)["b_seeds"] == [*SEEDS]


# How a row is tested


def test_seeds_and_prompts_both_count_as_noise():
    noise = np.random.default_rng(0)
    a = noise.normal(0, 0.1, (3, 60))
    whole = _row(KEY, side(a), side(a + 0.3 + noise.normal(0, 0.01, (3, 60))), 0)
    uneven = _row(KEY, side(a), side(a + np.array([[0.0], [0.3], [0.6]])), 0)
    assert whole["difference"] == pytest.approx(uneven["difference"], abs=0.01)
    assert whole["p"] < 1e-3 < 0.05 < uneven["p"], "seeds that disagree prove little, however many the prompts"


def test_shares_of_one_seed_are_tested_exactly():
    a = np.array([[1.0] * 20 + [0.0] * 20])
    b = np.array([[1.0] * 38 + [0.0] * 2])
    found, expected = _row(KEY, side(a), side(b), 0), mcnemar(b[0], a[0])
    assert {key: found[key] for key in expected._fields} == expected._asdict()
    assert found["p"] == pytest.approx(2 * 0.5**18), "all 18 that differ went one way"


def test_differences_that_rounding_makes_are_none():
    a = np.random.default_rng(0).normal(size=(1, 30))
    assert _row(KEY, side(a), side(a + 9e-6), 0)["test"] == "the same"
    assert _row(KEY, side(a), side(a + 9e-4), 0)["p"] < 0.01, "each prompt moved, and alike"


def test_prompts_are_paired_by_their_text_and_not_by_their_place():
    a = np.random.default_rng(0).normal(size=(2, 20))
    backwards = side(a[:, ::-1], items=list(range(20))[::-1])
    assert _row(KEY, side(a), backwards, 0)["test"] == "the same"


def test_prompts_in_common_are_paired_if_they_are_half():
    a = np.random.default_rng(0).normal(size=(1, 20))
    more = side(np.hstack([a, np.ones((1, 10))]))
    found = _row(KEY, side(a), more, 0)
    assert found["paired"] and (found["n"], found["difference"]) == (20, 0.0)
    few = side(a, items=[*range(8), *range(100, 112)])
    apart = _row(KEY, side(a), few, 0)
    assert not apart["paired"] and apart["n"] == 40


def test_other_prompts_are_two_samples(runs):
    found = compared(runs, "before", "elsewhere")
    row = row_of(found)
    assert not row["paired"] and row["n"] == 24 + 40 and row["test"].startswith("Welch t")
    a, b = (load_results(runs[name]).scores() for name in ("before", "elsewhere"))
    grids = []
    for own in (a, b):
        mine = own.set_index(["arm", "direction", "set", "scorer"]).sort_index().loc[KEY]
        grids.append(mine.pivot(index="seed", columns="item", values="score"))
    expected = unpaired_comparison(grids[1].to_numpy(), grids[0].to_numpy())
    assert [row[key] for key in ("difference", "low", "high")] == pytest.approx(expected[1:4])
    assert row["p"] >= expected.p, "few seeds vouch for less, so far out in the tails"
    assert any("The prompts of the two runs differ" in note for note in found.notes)
    assert row_of(found, ("steered", "away", "texts", "kl"))["paired"], "the texts were the same ones"


def test_more_seeds_in_one_run_are_left_out_those_in_common_kept():
    a = np.random.default_rng(0).normal(size=(3, 20))
    found = _row(KEY, side(a, seeds=[0, 1, 2]), side(a[[1, 2]], seeds=[1, 2]), 0)
    assert found["test"] == "the same" and found["a_seeds"] == found["b_seeds"] == [1, 2]
    assert found["a_mean"] == found["b_mean"] == pytest.approx(a[[1, 2]].mean())  # of the seeds compared


def test_single_seeds_that_differ_are_not_judged(tmp_path):
    boards = (make_board(0, seeds=(0,)), make_board(1, seeds=(1,), shift=2.0))
    a, b = (load_results(write_run(tmp_path / str(n), board)) for n, board in enumerate(boards))
    found = compare_runs(a, b)
    row = row_of(found)
    assert row["verdict"] == "not judged" and np.isnan(row["p_holm"])
    assert not len(found.changed) and "not judged: 14" in found.closing
    assert any("one tuning seed and the two differ: rep_tuned, toward; rep_tuned, away" in note for note in found.notes)
    assert np.isfinite(row_of(found, ("steered", "away", "test", "vader"))["p_holm"]), "no seed changes it"


def test_the_change_that_would_have_been_found_is_that_of_the_test_used():
    a = np.random.default_rng(0).normal(size=(2, 1, 40))
    first, second = (_row(KEY, side(one), side(one + a[::-1][n]), 0) for n, one in enumerate(a))
    rows = _judged(pd.DataFrame([first, second]))
    sd = float(a[1].std(ddof=1))
    assert rows["detectable"].iloc[0] == pytest.approx(detectable(40, sd, alpha=_ALPHA / 2), rel=2e-3)


def test_a_change_as_large_as_detectable_is_found_four_times_in_five():
    noise, found = np.random.default_rng(0), []
    for _ in range(400):
        a = noise.normal(size=(1, 40))
        row = _row(KEY, side(a), side(a + detectable(40, 0.5) + noise.normal(0, 0.5, (1, 40))), 0)
        found.append(row["p"] < 0.05)
    assert 0.73 < np.mean(found) < 0.87  # 0.8, and three standard errors of 400 draws


@pytest.mark.parametrize("n_seeds", [1, 3])
@pytest.mark.parametrize("paired", [True, False])
def test_runs_of_one_distribution_raise_few_false_alarms(n_seeds, paired):
    """Of 200 pairs of runs with nothing changed, about 5 % raise any alarm at all among their 8 rows."""
    noise, alarms, differed = np.random.default_rng(0), 0, 0
    gc.freeze()  # statsmodels collects garbage at every correction, which takes long among many objects
    for _ in range(200):
        levels = noise.normal(0.2, 0.5, 20)
        rows = []
        for number in range(8):
            runs = []
            for run in range(2):
                grid = levels + noise.normal(0, 0.4, (n_seeds, 20))
                grid += noise.normal(0, 0.2, (n_seeds, 1)) if n_seeds > 1 else 0.0
                grid = np.clip(grid, -1, 1) if number % 2 else (grid > 0.2).astype(float)
                runs.append(side(grid, items=None if paired else list(range(100 * run, 100 * run + 20))))
            rows.append(_row(("arm", "none", "test", str(number)), *runs, 0))
        verdicts = _judged(pd.DataFrame(rows))["verdict"]
        alarms += bool(verdicts.isin(["higher", "lower"]).any())
        differed += int((verdicts == "no change shown").sum())
    gc.unfreeze()
    assert differed > 1200, "there was noise to raise an alarm"
    # 5 % and three standard errors of 200 draws.
    assert alarms / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_few_seeds_raise_no_more_alarms_at_the_levels_of_a_large_table_than_they_should():
    noise, level = np.random.default_rng(0), 0.002
    alarms = []
    for _ in range(4000):
        moved = noise.normal(size=(3, 40)) + 0.5 * noise.normal(size=(3, 1)) + 0.5 * noise.normal(size=(1, 40))
        alarms.append(_row(KEY, side(np.zeros((3, 40))), side(moved), 0)["p"] < level)
    # 0.2 % and three standard errors of 4000 draws.
    assert np.mean(alarms) <= level + 3 * np.sqrt(level / 4000)


def test_an_older_run_is_compared_with_a_new_one_under_the_new_names(runs, tmp_path):
    older = load_results(as_an_older_run(shutil.copytree(runs["before"], tmp_path / "older")))
    found = compare_runs(older, load_results(runs["before"]))
    assert found.closing.startswith("Nothing changed: 28 rows") and not found.only_a and not found.only_b
    assert {"contains_answer", "follows_instruction"} <= set(found.rows["scorer"])
    moved = compare_runs(older, load_results(runs["moved"]))
    pd.testing.assert_frame_equal(moved.rows, compared(runs, "before", "moved").rows)


# What else two runs may differ in


def test_two_boards_of_a_real_model_one_changed(tiny, tiny_vectors, tmp_path):
    questions = [
        Question(f"{word}?", right=("yes",), wrong=("no",)) for word in ("Sun", "Rain", "Snow", "Fog", "Hail", "Ice")
    ]
    tasks = {"test": EvalTask(questions, (Likelihood("share"),))}
    texts = ["The sun is up and warm.", "Rain fell all day.", "A road leads on.", "Bread rises in the oven at night."]

    def run(name, multiplier):
        board = ArmEvaluator(tiny, tasks, texts)
        board.measure("untuned")
        board.measure("steered", add(tiny_vectors, [1], multiplier), direction="toward")
        return load_results(write_run(tmp_path / name, board.scores()))

    before, again, changed = run("before", 0.5), run("again", 0.5), run("changed", 40.0)
    assert compare_runs(before, again).closing.startswith("Nothing changed: 6 rows")
    found = compare_runs(before, changed)
    moved = set(zip(found.changed["arm"], found.changed["scorer"], strict=True))
    assert ("steered", "likelihood_share") in moved
    assert not any(arm == "untuned" for arm, _ in moved)


def test_rows_that_only_one_run_has_are_listed(runs, tmp_path):
    run = without_checksums(shutil.copytree(runs["before"], tmp_path / "less"))
    table = pd.read_csv(run / "scores.csv", keep_default_na=False)
    table[table["set"] != "facts"].to_csv(run / "scores.csv", index=False)
    (run / "texts.csv").unlink()
    found = compare_runs(load_results(runs["before"]), load_results(run))
    assert len(found.only_a) == 4 + 4 * 2 and not found.only_b
    assert ("steered", "away", "facts", "contains_answer") in found.only_a
    assert "Only in a:\n  untuned, none, facts, contains_answer" in str(found)
    assert compare_runs(load_results(run), load_results(runs["before"])).only_b == found.only_a


def test_settings_and_versions_that_differ_are_told(runs, tmp_path):
    changes = {"bound": 1.3, "versions": {"rt_lens": "0.2.0", "torch": "2.9.0"}}
    run = changed_run(
        runs, tmp_path, **changes, choices={"away": {"layer": 0, "multiplier": -2.0, "why": ""}, "rule": ""}
    )
    found = compare_runs(load_results(runs["before"]), load_results(run)).settings
    assert found.to_dict("records") == [
        {"what": "bound", "a": "1.1", "b": "1.3"},
        {"what": "choice away", "a": "layer 1, multiplier -2.0", "b": "layer 0, multiplier -2.0"},
        {"what": "version of rt_lens", "a": "0.1.0", "b": "0.2.0"},
    ]


def test_another_behaviour_is_refused(runs, tmp_path):
    run = changed_run(runs, tmp_path, behaviour="honesty")
    with pytest.raises(
        ValueError, match="run_b must be a run of the same behaviour as run_a .'mood'., got .*'honesty'"
    ):
        compare_runs(load_results(runs["before"]), load_results(run))


def test_another_model_is_compared_without_what_counts_its_tokens(runs, tmp_path):
    run = changed_run(runs, tmp_path, model="other")
    found = compare_runs(load_results(runs["before"]), load_results(run))
    assert set(found.rows["set"]) == {"test", "facts", "talk"}
    assert any("two models: tiny and other." in note for note in found.notes)
    assert "two models" in str(found) and found.settings["what"].tolist() == ["model"]


def test_runs_with_nothing_in_common_are_refused(runs, tmp_path):
    run = without_checksums(shutil.copytree(runs["before"], tmp_path / "other"))
    table = pd.read_csv(run / "scores.csv", keep_default_na=False)
    table.assign(set="new").to_csv(run / "scores.csv", index=False)
    (run / "texts.csv").unlink()
    with pytest.raises(ValueError, match="have no arm, direction, set and scorer in common"):
        compare_runs(load_results(runs["before"]), load_results(run))


def test_a_score_that_is_missing_is_told(runs, tmp_path):
    run = without_checksums(shutil.copytree(runs["before"], tmp_path / "torn"))
    lines = (run / "scores.csv").read_text().splitlines()
    (run / "scores.csv").write_text("\n".join(lines[:-3]))
    with pytest.raises(ValueError, match="must have one score per seed and item, got .*missing or doubled"):
        compare_runs(load_results(runs["before"]), load_results(run))


def test_a_prompt_asked_twice_is_two_items(tmp_path):
    board = make_board(0)
    for answer in board.answers:
        answer["prompt"] = "Again?"
    run = load_results(write_run(tmp_path / "run", board))
    found = compare_runs(run, run)
    assert row_of(found)["n"] == 24 and set(found.rows["verdict"]) == {"the same"}


def test_names_cannot_speak_to_the_terminal(runs, tmp_path):
    board = make_board(9)
    for row in (*board.answers,):
        row["set"] = {"facts": "facts\x1b[31m"}.get(row["set"], row["set"])
    board.scores["set"] = board.scores["set"].replace("facts", "facts\x1b[31m")
    found = compare_runs(load_results(runs["before"]), load_results(write_run(tmp_path / "run", board)))
    assert "\x1b" not in str(found) and "facts?[31m" in str(found)


# The command


def command(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_command_exits_with_1_only_if_asked_and_something_changed(runs):
    same = command(runs["before"], runs["before"], "--fail-on-change")
    assert same.exit_code == 0 and "Nothing changed: 28 rows" in same.output
    assert command(runs["before"], runs["again"], "--fail-on-change").exit_code == 0
    moved = command(runs["before"], runs["moved"])
    assert moved.exit_code == 0 and "2 of 28 rows changed beyond noise" in moved.output
    assert command(runs["before"], runs["moved"], "--fail-on-change").exit_code == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("results.json", None, "there is no file"),
        ("results.json", "{", "must be valid JSON"),
        ("scores.csv", "arm\nx\n", "must have the column direction, set"),
        ("results.json", '{"schema": 3}', "schema must be at most 2, got 3"),
    ],
)
def test_a_bad_folder_is_one_line_and_code_2(runs, tmp_path, file, text, message, monkeypatch, capsys):
    run = without_checksums(shutil.copytree(runs["before"], tmp_path / "bad"))
    (run / file).unlink()
    if text is not None:
        (run / file).write_text(text)
    monkeypatch.setattr("sys.argv", ["rt-lens", "compare", str(runs["before"]), str(run)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("rt-lens: ") and message in said and said.count("\n") == 1


def test_help_shows_a_working_example():
    said = command("--help").output
    assert "Example: rt-lens compare runs/mood" in said and "--fail-on-change" in said
