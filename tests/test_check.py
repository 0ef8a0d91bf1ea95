"""What `rt-lens check` finds before a run, what `rt-lens new` writes, and which files are refused when read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llama_folder import llama_folder
from typer.testing import CliRunner

from rt_lens.apps.cli import app
from rt_lens.apps.report.page import write_report
from rt_lens.apps.report.verdict import spoken
from rt_lens.data.builtin import neutral_prompts, new_behaviour
from rt_lens.data.contrast_pairs import pairs_from_table
from rt_lens.data.readers import read_toml
from rt_lens.experiment.check import Finding, check_behaviour, measure_behaviour
from rt_lens.experiment.config import Experiment, load_experiment
from rt_lens.experiment.plan import plan_of
from rt_lens.experiment.protocols import parts
from rt_lens.experiment.run import run_experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama") / "tiny-llama")


@pytest.fixture(scope="module")
def example(folder, tmp_path_factory) -> Experiment:
    """What `rt-lens new` writes, on the tiny model."""
    file = tmp_path_factory.mktemp("new") / "sea.toml"
    file.write_text(new_behaviour("sea"), encoding="utf-8")
    return small(load_experiment(file, model=str(folder)))


def small(experiment: Experiment) -> Experiment:
    """The experiment with blocks that the tiny model has."""
    return replace(
        experiment, choose=replace(experiment.choose, layers=(1,)), tune=replace(experiment.tune, layers=(2,))
    )


def changed(experiment: Experiment, **lists: list[str]) -> Experiment:
    """The experiment with other personas, topics or prefills."""
    pairs = experiment.pairs.pairs
    table = {
        "positive": list(dict.fromkeys(pair.positive for pair in pairs)),
        "negative": list(dict.fromkeys(pair.negative for pair in pairs)),
        "topics": experiment.pairs.topics,
        "prefills": list(dict.fromkeys(pair.prefill for pair in pairs)),
    }
    return replace(experiment, pairs=pairs_from_table("changed", {**table, **lists}))


def warned(experiment: Experiment, subject: str) -> str:
    """The texts of the warnings about a subject; no finding is an error."""
    findings = check_behaviour(experiment)
    assert not [finding for finding in findings if finding.verdict == "error"]
    assert all(finding.fix for finding in findings if finding.verdict == "warning" and finding.subject != "split")
    return " ".join(str(f) for f in findings if f.verdict == "warning" and f.subject == subject)


def test_the_example_has_nothing_to_warn_of(example):
    findings = check_behaviour(example)
    assert {finding.verdict for finding in findings} == {"ok"}
    assert [finding.subject for finding in findings] == ["personas", "length", "scorer", "split", "power", "time"]
    by_subject = {finding.subject: finding.text for finding in findings}
    train, validation, test = (len(part.topics) for part in parts(example))
    assert f"40 topics: {train} for training, {validation} for validation, {test} for the test" in by_subject["split"]
    assert by_subject["power"].startswith(f"With {test} test topics")


def test_personas_that_are_too_few_to_split_or_to_average_over_are_warned_of(example):
    two = {"positive": ["Be wet.", "Be at sea."], "negative": ["Be dry.", "Be on land."]}
    assert "Fewer than 3 pairs cannot be split" in warned(changed(example, **two), "personas")
    five = {side: [f"{word} {n}." for n in range(5)] for side, word in (("positive", "Sea"), ("negative", "Farm"))}
    assert "5 positive and 5 negative personas" in warned(changed(example, **five), "personas")


def test_copies_are_found_whether_exact_or_but_for_case_and_punctuation(example):
    topics = example.pairs.topics
    assert not warned(example, "topics") and not warned(example, "pairs")
    near = warned(changed(example, topics=[*topics, topics[0].upper().rstrip("?") + " !"]), "topics")
    assert f"'{topics[0]}'" in near and "but for case and punctuation" in near and "training and test" in near
    exact = warned(changed(example, topics=[*topics, topics[0]]), "pairs")
    assert f"'{topics[0]}' (topics)" in exact and "60 of 2,460 pairs are copies" in exact
    assert "'well' are the same" in warned(changed(example, prefills=["Well,", "well", "So,", "It is"]), "prefills")
    assert not warned(changed(example, prefills=["1.", "1)", "2.", "2)"]), "prefills")


def test_a_persona_on_both_sides_and_a_topic_among_the_neutral_prompts_are_found(example):
    positive, negative = (list(dict.fromkeys(side)) for side in zip(*personas(example), strict=True))
    assert "on both sides" in warned(changed(example, negative=[positive[1].lower(), *negative[1:]]), "personas")
    topics = [*example.pairs.topics, neutral_prompts()[0]]
    assert "among the neutral prompts" in warned(changed(example, topics=topics), "topics")


def personas(experiment: Experiment) -> list[tuple[str, str]]:
    return list(dict.fromkeys((pair.positive, pair.negative) for pair in experiment.pairs.pairs))


def test_personas_that_differ_in_length_are_a_confound_and_equally_long_ones_are_not(example):
    longer = [f"{positive} Do so at length, please." for positive, _ in personas(example)]
    found = warned(changed(example, positive=longer), "length")
    assert "16.2 words and negative ones 11.2" in found and "difference 5.0" in found and "AUC 1.00" in found
    mixed = [f"{text} Please." if n % 5 == 0 else text for n, (text, _) in enumerate(personas(example))]
    assert not warned(changed(example, positive=mixed), "length")  # a fifth of a word is none


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        ({"kind": "pattern", "pattern": r"\b(soup|cats)\b"}, "'pattern' itself counts 2 of 40 topics"),
        ({"kind": "lexicon", "positive": ["soup", "cats"], "negative": ["x"]}, "(for 'soup', 'cats')"),
        (lambda text: float("soup" in text or "cats" in text), "itself counts 2 of 40 topics"),
    ],
)
def test_words_of_the_scorer_in_topics_are_found(example, scorer, says):
    assert says in warned(replace(example, scorer=scorer), "topics")


def test_words_of_the_scorer_in_prefills_and_expressions_that_match_everything_are_found(example):
    assert "counts 1 of 6 prefills, such as 'So,'" in warned(
        replace(example, scorer={"kind": "pattern", "pattern": "^so"}), "prefills"
    )
    assert "counts an empty response" in warned(replace(example, scorer={"kind": "pattern", "pattern": "a*"}), "scorer")


def test_a_scorer_that_needs_a_model_is_not_made(example):
    judge = {"kind": "logit_judge", "model": "no such model", "criterion": "is of the sea"}
    (found,) = (f for f in check_behaviour(replace(example, scorer=judge)) if f.subject == "scorer")
    assert found.verdict == "ok" and "needs a model" in found.text


def test_a_test_too_small_to_show_anything_is_warned_of(example):
    nine = replace(example, test=replace(example.test, n_prompts=9))  # 18 comparisons, 2 in 512 at best
    assert "no difference of two arms can be significant" in warned(nine, "power")
    ten = warned(replace(example, test=replace(example.test, n_prompts=10)), "power")
    assert "must differ by 1.00" in ten and "34 test topics" in ten
    share = replace(example, scorer={"kind": "pattern", "pattern": "sea"})
    power = next(finding.text for finding in check_behaviour(share) if finding.subject == "power")
    assert "a share of 0.53" in power  # 0.75 standard deviations of at most 0.71


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"topics": ["Tea?", "Rain?"]}, ("split", "shares must leave every part a topic, got 0.4, 0.2 and the rest")),
        ({"topics": [f"{n}?" for n in range(20)]}, ("test", "test.n_prompts must be at most 8")),
    ],
)
def test_what_a_run_would_refuse_is_an_error(example, change, says):
    errors = [f for f in check_behaviour(changed(example, **change)) if f.verdict == "error"]
    assert [(f.subject, f.text[: len(says[1])]) for f in errors] == [says]


def test_blocks_outside_the_model_are_an_error_and_an_unknown_model_leaves_out_the_time(example, tmp_path):
    outside = replace(example, choose=replace(example.choose, layers=(7,)))
    assert "choose.layers contains 7" in next(f.text for f in check_behaviour(outside) if f.verdict == "error")
    assert "Not estimated" in warned(replace(example, model=str(tmp_path / "nothing")), "time")


def test_few_validation_topics_are_warned_of(example):
    wish = replace(example, choose=replace(example.choose, n_prompts=20))
    assert "choose.n_prompts = 20, but layer and multiplier are chosen on 8" in warned(wish, "split")


# With a model: the scorer below reads the persona, so that each test says what the personas do to the score.


class OfPersona:
    """Scores by the side of a response's persona, and remembers what was asked."""

    reads = "text"

    def __init__(self, experiment: Experiment, scores: dict[str, Any], name: str = "scored", share: bool = False):
        self.sides = dict.fromkeys((positive for positive, _ in personas(experiment)), "positive")
        self.sides |= dict.fromkeys((negative for _, negative in personas(experiment)), "negative")
        self.scores, self.name, self.share, self.asked = scores, name, share, set[str]()

    def __call__(self, answers):
        self.asked |= {answer.question.prompt for answer in answers}
        scores = []
        for number, answer in enumerate(answers):
            level = self.scores[self.sides.get(answer.question.system, "untuned")]
            scores.append(float(level(number) if callable(level) else level))
        return scores


def measured(experiment: Experiment, tiny: Any, **scorer: Any) -> list[Finding]:
    few = replace(experiment, test=replace(experiment.test, max_new_tokens=2))
    return measure_behaviour(replace(few, scorer=OfPersona(experiment, **scorer)), tiny)


def noisy(level: float) -> Any:
    return lambda number: level + 0.1 * (number % 3)


def test_personas_that_move_the_score_are_ok_with_n_interval_and_seed(example, tiny):
    found = measured(example, tiny, scores={"untuned": noisy(0), "positive": noisy(0.5), "negative": noisy(-0.5)})
    assert [finding.verdict for finding in found] == ["ok"] * 4
    assert found[0].text.startswith("The personas move the score: positive minus negative is 1.00")
    assert all("n = 24 topics, seed 0" in finding.text for finding in found)
    assert "[" in found[3].text


def test_personas_that_the_model_ignores_are_said_first(example, tiny):
    found = measured(example, tiny, scores=dict.fromkeys(("untuned", "positive", "negative"), noisy(0)))
    assert found[0].verdict == "warning" and found[0].text.startswith("The model ignores these personas")
    assert [finding.verdict for finding in found] == ["warning"] * 3 + ["ok"]


def test_one_side_that_does_nothing_and_sides_the_wrong_way_round_are_told_apart(example, tiny):
    one = measured(example, tiny, scores={"untuned": noisy(0), "positive": noisy(0.5), "negative": noisy(0)})
    assert [finding.verdict for finding in one] == ["ok", "ok", "warning", "ok"]
    wrong = measured(example, tiny, scores={"untuned": noisy(0), "positive": noisy(-0.5), "negative": noisy(0.5)})
    assert "the wrong way" in wrong[0].text and "Exchange the lists" in wrong[0].fix


@pytest.mark.parametrize(("level", "direction"), [(0, "away"), (1, "toward")])
def test_a_score_at_an_end_of_its_range_leaves_a_direction_without_room(example, tiny, level, direction):
    scores = {"untuned": level, "positive": lambda number: number % 2, "negative": level}
    found = measured(example, tiny, scores=scores, share=True)
    assert found[3].verdict == "warning" and f"'{direction}' has no room" in found[3].text


def test_a_score_without_spread_is_a_warning_at_an_unknown_place_and_ok_within_a_known_range(example, tiny):
    scores = {"untuned": 0, "positive": noisy(0.5), "negative": noisy(-0.5)}
    assert measured(example, tiny, scores=scores)[3].verdict == "warning"
    found = measured(example, tiny, scores=scores, name="lexicon")[3]
    assert found.verdict == "ok" and "the same for all, so without an interval" in found.text


def test_a_scorer_that_never_fires_is_the_one_finding(example, tiny):
    (found,) = measured(example, tiny, scores=dict.fromkeys(("untuned", "positive", "negative"), 0))
    assert found.subject == "scorer" and "gives 0.00 to all 72 responses" in found.text


def test_test_topics_are_never_asked(example, tiny):
    scorer = OfPersona(example, dict.fromkeys(("untuned", "positive", "negative"), noisy(0)))
    measure_behaviour(replace(example, scorer=scorer), tiny, n_topics=100)
    train, validation, test = parts(example)
    assert scorer.asked == {*train.topics, *validation.topics} and not scorer.asked & set(test.topics)


# The commands


def command(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done.output


def test_new_writes_a_file_with_a_comment_on_every_table_and_checks_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("new", "sea")
    assert "0 errors, 0 warnings." in said and "Saved sea.toml" in said and "rt-lens check sea.toml" in said
    lines = (tmp_path / "sea.toml").read_text().splitlines()
    tables = [number for number, line in enumerate(lines) if line.startswith("[")]
    assert len(tables) == 9 and all(lines[number - 1].startswith("# ") for number in tables)
    assert read_toml(tmp_path / "sea.toml")["name"] == "sea"


def test_new_overwrites_nothing_and_takes_a_name_that_a_file_can_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("precious")
    done = CliRunner().invoke(app, ["new", "sea", "--out", "mine.toml"])
    assert "out must be a file that does not exist yet" in str(done.exception)
    assert (tmp_path / "mine.toml").read_text() == "precious"
    done = CliRunner().invoke(app, ["new", "../sea", "--out", "sea.toml"])
    assert "name must be" in str(done.exception) and not (tmp_path / "sea.toml").exists()


def test_check_exits_with_1_for_what_a_run_would_refuse_and_only_for_that(tmp_path, folder):
    file = tmp_path / "sea.toml"
    text = new_behaviour("sea").replace("[18, 21]", "[1]").replace("[20, 21, 22, 23, 24]", "[2]")
    file.write_text(text.replace('"It is", ', '"Sea", '))
    said = command("check", file, "--model", folder)
    assert "warning  prefills" in said and "0 errors, 1 warning." in said and f"then rt-lens run {file}" in said
    file.write_text(text.replace("n_prompts = 16", "n_prompts = 17"))
    assert "error    test      test.n_prompts must be at most 16" in command("check", file, "--model", folder, code=1)
    file.write_text(text.replace("[split]", "[spilt]"))
    assert "Did you mean 'split'?" in command("check", file, code=1)
    done = CliRunner().invoke(app, ["check", "moood"])
    assert "Did you mean 'mood'?" in str(done.exception)


# What a file may hold: refused when it is read, and not after the model has loaded or the run has ended.


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("layers = [18, 21]", "layers = 18", r"choose\.layers must be a list of at least one block, got 18"),
        ("layers = [18, 21]", "layers = []", r"choose\.layers must be a list of at least one block, got \[\]"),
        ("multipliers = [1.5, 3.0]", "multipliers = 2", r"choose\.multipliers must be a list of at least one number"),
        ("bound = 1.1", 'bound = "1.1"', r"choose\.bound must be a number, got '1\.1'"),
        ("n_prompts = 8", "n_prompts = 0", r"choose\.n_prompts must be a whole number from 1 on, got 0"),
        ("n_prompts = 16", 'n_prompts = "16"', r"test\.n_prompts must be a whole number from 1 on, got '16'"),
        ("n_pairs = 96", "n_pairs = true", r"extract\.n_pairs must be a whole number from 1 on, got True"),
        ("train = 0.4", "train = [0.4]", r"split\.train must be a number, got \[0\.4\]"),
        ("seeds = [0]", "seeds = 3", r"tune\.seeds must be a list of different whole numbers for 'toward', got 3"),
        ("seeds = [0]", "seeds = [0.5]", r"tune\.seeds .*different whole numbers for .toward., got \[0\.5\]"),
        ("seeds = [0]", "seeds = [1, 1]", r"tune\.seeds .*different whole numbers for .toward., got \[1, 1\]"),
        ("description = ", "description = 3 # ", r"description must be a text, got 3"),
        ('kind = "lexicon"', 'kind = "lexicon"\nnegative = "farm"\n[x]', "negative of scorer 'lexicon' must be a list"),
        ('kind = "lexicon"', 'kind = "pattern"\npattern = ["a"]\n[x]', "a regular expression as text, got \\['a'\\]"),
        ('kind = "lexicon"', 'kind = "pattern"\npattern = "("\n[x]', "a valid regular expression, got '\\('"),
        ('kind = "lexicon"', 'kind = "likelihood"\n[x]', "must read the text of one response.*got 'likelihood'"),
        ('kind = "lexicon"', 'kind = "contains_answer"\n[x]', "must read the text of one response"),
        (
            'kind = "lexicon"',
            'kind = "logit_judge"\nmodel = "m"\ncriterion = "is wet"\npairs = true\n[x]',
            "got 'logit_judge', with pairs = true",
        ),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_a_wrong_setting_is_refused_when_the_file_is_read(tmp_path, old, new, says):
    text = new_behaviour("sea")
    assert old in text
    text = text.replace(old, new, 1)
    if new.endswith("[x]"):  # the scorer's own word lists go
        start = text.index("[x]")
        text = text[:start] + text[text.index("# The model", start) :]
    file = tmp_path / "sea.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        load_experiment(file)


@pytest.mark.slow
def test_the_example_runs_from_start_to_report_without_personas_to_spare(example, tmp_path):
    """With three personas a side, one prefill, and a scorer that never fires: no number has an interval."""
    fewer = changed(
        example, **{s: [p[i] for p in personas(example)[:3]] for i, s in enumerate(("positive", "negative"))}
    )
    tune = replace(fewer.tune, max_steps=1, n_targets=2, target_tokens=2, trained_layers=(2,), neutral_batch_size=1)
    short = replace(
        fewer, tune=tune, scorer={"kind": "lexicon", "positive": ["zz"], "negative": ["zzz"]},
        extract=replace(fewer.extract, n_pairs=4),
        choose=replace(fewer.choose, multipliers=(0.1,), bound=9.0, n_paragraphs=2, max_new_tokens=2),
        test=replace(fewer.test, n_prompts=3, max_new_tokens=2, n_facts=2, n_instructions=2, n_texts=2),
    )  # fmt: skip
    results = run_experiment(short, tmp_path / "out", source=None, progress=False)
    assert {row["mean"] for row in results["summary"]} == {0.0}
    assert results["persona_effect"]["alike"] and spoken(results)[0].startswith("The scorer 'lexicon' gives 0.00 to")
    assert set(plan_of(short).stages) == set(results["seconds"])
    assert_no_gap_shows(write_report(tmp_path / "out").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_run_of_prompts_alone_comes_to_its_report(example, tmp_path):
    """No arm has a strength, so no budget is measured."""
    few = replace(
        example, arms=("prompted",), extract=replace(example.extract, n_pairs=4),
        choose=replace(example.choose, multipliers=(0.1,), n_paragraphs=2, max_new_tokens=2),
        test=replace(example.test, n_prompts=3, max_new_tokens=2, n_facts=2, n_instructions=2, n_texts=2),
    )  # fmt: skip
    results = run_experiment(few, tmp_path / "out", source=None, progress=False)
    labels = [(row["arm"], row["direction"]) for row in results["summary"]]
    assert labels == [("untuned", "none"), ("prompted", "toward"), ("prompted", "away")]
    assert len(results["comparisons"]) == 2
    assert_no_gap_shows(write_report(tmp_path / "out").read_text(encoding="utf-8"))


def assert_no_gap_shows(page: str) -> None:
    """No cell or sentence shows what Python calls a gap, and no axis of a figure has one for an end."""
    body = page[: page.index('<script type="text/plain" id="plotly">')]
    figures = re.findall(r'<script type="application/json">(.*?)</script>', body, re.DOTALL)
    text = re.sub(r"<(script|style|pre).*?</\1>", "", body, flags=re.DOTALL)
    for part in [text, *figures]:
        assert not re.search(r"\b(nan|NaN|None|inf)\b(?! in this run)", part)
    for figure in figures:
        assert '"range":[null' not in figure


def test_the_untuned_model_heeds_the_personas_of_the_example(model, tmp_path):
    file = tmp_path / "sea.toml"
    file.write_text(new_behaviour("sea"), encoding="utf-8")
    found = measure_behaviour(load_experiment(file), model)
    assert found[0].text.startswith("The personas move the score")
    assert found[3].verdict == "ok"


def test_a_few_responses_that_score_do_not_show_that_personas_do(example, tiny):
    """3 of 24: the bootstrap interval excludes 0, and the permutation test shows nothing."""
    scores = {"untuned": 0, "positive": lambda number: float(number < 3), "negative": 0}
    found = measured(example, tiny, scores=scores)
    assert found[0].text.startswith("The model ignores these personas") and "[0.04, 0.33]" in found[0].text
