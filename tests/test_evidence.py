"""The tables and pictures of the documentation are drawn from kept results, and say what these say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from small_runs import make_at_kl, make_board, write_run

from rt_lens.results.schema import load_results

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import evidence  # noqa: E402


@pytest.fixture
def run(tmp_path):
    board = make_board(0, shift=0.6)
    labels = [(("rep_tuned", way), ("untuned", "none")) for way in ("toward", "away")]
    comparisons = board.comparisons(labels, [("test", "vader")]).to_dict("records")
    return write_run(tmp_path / "small", board, at_kl=make_at_kl(board), comparisons=comparisons)


def test_what_is_kept_is_what_was_found_to_six_digits_without_responses(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    evidence.keep(run)
    text = (tmp_path / "small.json").read_text()
    kept, found = json.loads(text), load_results(run).content
    assert list(kept) == list(evidence.KEPT)
    for row, other in zip(kept["summary"], found["summary"], strict=True):
        assert row["mean"] == pytest.approx(other["mean"], rel=1e-5, abs=1e-12) and row["n"] == other["n"]
    assert kept["comparisons"] and kept["at_kl"]["kl"] == found["at_kl"]["kl"]
    assert "Question 0" not in text and len(text.splitlines()) > len(kept["summary"])


def test_a_table_says_the_kept_numbers(run):
    content = json.loads(evidence.kept(load_results(run).content))
    (row,) = [row for row in evidence.first_rows(content["at_kl"]["table"])
              if (row["arm"], row["direction"], row["budget"]) == ("rep_tuned", "toward", 0.01)]  # fmt: skip
    expected = f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]".replace("-", "−")
    table = evidence.scores(content, "toward")
    (line,) = [line for line in table.splitlines() if line.startswith("| rep_tuned")]
    assert line.split(" | ")[2 + content["at_kl"]["kl"].index(0.01)] == expected
    assert "0, 1, 2" in line and "away" not in table
    assert "- rep_tuned (away) does not reach that KL: KL is at most 0.02." in evidence.gaps(content)
    (difference,) = [row for row in content["comparisons"] if row["a_direction"] == "toward"]
    assert f"| rep_tuned − untuned | toward | {difference['difference']:.2f} [" in evidence.comparisons(content)


def test_only_what_stands_between_the_marks_is_written(run):
    results = {"small": json.loads(evidence.kept(load_results(run).content))}
    text = "before\n<!-- evidence: small scores away -->\nold\n<!-- end -->\nafter\n"
    once = evidence.filled(text, results)
    assert once.startswith("before\n<!-- evidence: small scores away -->\n\n| arm | as it is | KL ")
    assert once.endswith("\n<!-- end -->\nafter\n") and "old" not in once
    assert evidence.filled(once, results) == once
    for wrong in ("other scores away", "small plot"):
        with pytest.raises(ValueError, match="a place must name kept results"):
            evidence.filled(f"<!-- evidence: {wrong} -->\n<!-- end -->", results)


@pytest.mark.parametrize("document", evidence.DOCUMENTS, ids=lambda path: path.parent.name)
def test_the_documents_say_what_the_kept_results_say(document):
    results = {path.stem: json.loads(path.read_text()) for path in evidence.RESULTS.glob("*.json")}
    assert evidence.filled(document.read_text(), results) == document.read_text()
    assert document.read_text().count("<!-- evidence: ") == document.read_text().count("<!-- end -->")
