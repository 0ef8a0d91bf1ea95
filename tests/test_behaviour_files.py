"""Behaviour files that extend a built-in one, and test topics of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rt_lens.data.builtin import behaviour_content, data_path, prompt_kinds
from rt_lens.data.contrast_pairs import load_pairs
from rt_lens.experiment.check import check_behaviour
from rt_lens.experiment.config import load_experiment
from rt_lens.experiment.protocols import answers_protocol, family_of
from rt_lens.experiment.reproducibility import recorded

FULL = data_path("full/mood.toml")


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_that_extends_another_holds_what_differs(tmp_path):
    base = load_experiment("mood")
    mine = load_experiment(written(tmp_path, 'extends = "mood"\nname = "mine"\n[tune]\nseeds = [7]\nmax_steps = 3\n'))
    assert mine.pairs.pairs == base.pairs.pairs and mine.scorer == base.scorer and mine.choose == base.choose
    assert (mine.name, mine.tune.max_steps, mine.tune_seeds["away"]) == ("mine", 3, (7,))
    assert mine.tune.cosine_weight == base.tune.cosine_weight and mine.token == base.token
    assert load_pairs(tmp_path / "mine.toml").pairs == base.pairs.pairs


@pytest.mark.parametrize(
    ("changes", "kept"),
    [("[tune]\nseeds = [7]", True), ("[test]\nn_prompts = 2", True), ("[tune]\nmax_steps = 3", False),
     ("[tune.token]\nlearning_rate = 1e-3", False), ('[model]\nname = "gpt2"', False),
     ('[pairs]\nprefills = ["Well,"]', False), ("tune = 3", False)],
)  # fmt: skip
def test_settings_found_for_other_pairs_models_or_tuning_are_not_taken_over(tmp_path, changes, kept):
    """A rate in [tune] would do nothing to an arm whose own rate a search has found."""
    file = written(tmp_path, f'extends = "mood"\n{changes}\n')
    own = "\n[settings.steered]\nlayer = 3\n"
    found = behaviour_content(data_path("behaviours/mood.toml"))["settings"]
    assert found and behaviour_content(file).get("settings") == (found if kept else None)
    assert behaviour_content(written(tmp_path, file.read_text() + own))["settings"]["steered"]["layer"] == 3


@pytest.mark.parametrize("extended", ['"../mood.toml"', '"moood"', "3"])
def test_only_built_in_behaviours_can_be_extended(tmp_path, extended):
    with pytest.raises(ValueError, match=r"extends must be a built-in behaviour \(.*mood.*\), got .* in mine\.toml"):
        behaviour_content(written(tmp_path, f"extends = {extended}"))


@pytest.mark.parametrize("behaviour", ["mood", "formality", "language", "refusal"])
def test_the_full_comparison_asks_fresh_topics_alone(behaviour):
    full, demo = load_experiment(FULL.with_stem(behaviour)), load_experiment(behaviour)
    asked = [question.prompt for question in answers_protocol(full).tasks["test"].asked]
    assert len(asked) == len(set(asked)) == 60
    of_pairs = {topic for part in family_of(demo).parts() for topic in part.topics}
    assert not of_pairs & set(asked)
    assert family_of(full).parts()[0].topics == family_of(demo).parts()[0].topics  # the same training part
    findings = {finding.subject: finding for finding in check_behaviour(full)}
    assert "The test asks 60 other topics." in findings["split"].text
    assert "With 60 test topics" in findings["power"].text


def test_it_is_recorded_with_the_command_that_repeats_it():
    assert recorded(load_experiment(FULL, search=12), FULL)["command"] == "rt-lens run mood.toml --search 12"


def test_topics_may_be_a_list_or_a_file_beside(tmp_path):
    (tmp_path / "asked.txt").write_text("Why?\n\nWhere to?\n", encoding="utf-8")
    for topics in ('"asked.txt"', '["Why?", "Where to?"]'):
        file = written(tmp_path, f'extends = "mood"\n[test]\nn_prompts = 2\ntopics = {topics}')
        assert load_experiment(file).test.topics == ("Why?", "Where to?")
    file.write_text(file.read_text().replace("n_prompts = 2", "n_prompts = 3"))
    with pytest.raises(ValueError, match=r"test\.n_prompts must be at most 2, the number of topics in test\.topics"):
        answers_protocol(load_experiment(file))


def test_honesty_which_asks_its_own_questions_takes_no_topics(tmp_path):
    with pytest.raises(ValueError, match=r"test\.topics must be left out, since \[honesty\] brings its own"):
        load_experiment(written(tmp_path, 'extends = "honesty"\n[test]\ntopics = ["Why?"]'))


@pytest.mark.parametrize(
    ("topics", "says"),
    [
        ('"/etc/hostname"', "test.topics must be a file in the folder of mine.toml, got '/etc/hostname'"),
        ('"../other.txt"', "test.topics must be a file in the folder of mine.toml, got '../other.txt'"),
        ("[]", "test.topics must be a list of texts, or a file of them, got []"),
        ("[1]", "test.topics must be a list of texts, or a file of them, got [1]"),
        ('["tell me about your weekend."]', "test.topics must not be topics of [pairs]"),
    ],
)
def test_wrong_topics_are_refused(tmp_path, topics, says):
    (tmp_path.parent / "other.txt").write_text("Why?\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(says)):
        load_experiment(written(tmp_path, f'extends = "mood"\n[test]\ntopics = {topics}'))


def test_prompts_of_unlike_kinds_are_asked_at_the_stated_kl_alone(tmp_path):
    """They are checks, which `side_effects = "stated"` asks at that budget, with the behaviour's own scorer."""
    file = written(tmp_path, 'extends = "mood"\n[test]\nkinds = ["stories", "arithmetic"]\n')
    protocol = answers_protocol(load_experiment(file))
    assert list(protocol.checks)[-2:] == ["unlike_stories", "unlike_arithmetic"]
    stories = protocol.checks["unlike_stories"]
    assert [scorer.name for scorer in stories.made] == [scorer.name for scorer in protocol.tasks["test"].made]
    assert [question.prompt for question in stories.asked] == prompt_kinds()["stories"]
    assert not any(name.startswith("unlike") for name in answers_protocol(load_experiment("mood")).checks)


@pytest.mark.parametrize(("kinds", "message"), [('["tales"]', "test.kinds must be some of stories, .* got 'tales'"),
                                                ('"stories"', "test.kinds must be a list of names")])  # fmt: skip
def test_unknown_kinds_are_refused(tmp_path, kinds, message):
    with pytest.raises(ValueError, match=message):
        load_experiment(written(tmp_path, f'extends = "mood"\n[test]\nkinds = {kinds}\n'))
