"""What a run remembers makes the same experiment again, and says nothing of the machine."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import replace

import pytest

from rt_lens.data.builtin import data_path
from rt_lens.experiment.config import load_experiment
from rt_lens.experiment.reproducibility import recorded

OWN = """
name = "sweetness"
[pairs]
positive = ["You adore honey."]
negative = ["You adore gall."]
topics = ["What is for lunch?", "Tell me about rivers."]
[tune]
seeds = { toward = [3], away = [0, 1] }
[split]
seed = 7
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my own.toml"
    path.write_text(OWN)
    return path


def test_a_shipped_behaviour_is_known_by_its_name():
    made = recorded(load_experiment("honesty"), None)
    text = data_path("behaviours/honesty.toml").read_text()
    assert made["command"] == "rt-lens run honesty" and made["file"] == "honesty.toml"
    assert made["toml"] == text and made["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert made["settings"]["tune"]["max_steps"] == load_experiment("honesty").tune.max_steps
    assert made == recorded(load_experiment("honesty"), "honesty") == json.loads(json.dumps(made))


def test_the_file_in_the_record_is_the_same_experiment(own, tmp_path):
    ran = load_experiment(own, model="some/hub-name")
    made = recorded(ran, own)
    assert shlex.split(made["command"]) == ["rt-lens", "run", "my own.toml", "--model", "some/hub-name"]
    assert (
        made["call"] == "run_experiment(load_experiment('my own.toml', model='some/hub-name'), Path('runs/repeated'))"
    )
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / made["file"]).write_text(made["toml"])
    _, _, file, _, model = shlex.split(made["command"])
    assert load_experiment(tmp_path / "again" / file, model=model) == ran


def test_no_path_of_the_machine_is_kept(own, tmp_path):
    (tmp_path / "weights").mkdir()
    made = recorded(load_experiment(own, model=str(tmp_path / "weights")), str(own))
    assert str(tmp_path) not in json.dumps(made)
    assert made["settings"]["model"] == "weights" and made["command"].endswith("--model weights")


def test_the_type_and_the_templates_arguments_are_part_of_the_command(own):
    said = {"dtype": "bfloat16", "chat_template_kwargs": {"enable_thinking": False}}
    ran = load_experiment(own, **said)
    made = recorded(ran, own)
    options = ["--dtype", "bfloat16", "--chat-template-kwargs", '{"enable_thinking": false}']
    assert shlex.split(made["command"]) == ["rt-lens", "run", "my own.toml", *options]
    assert made["settings"]["chat_template_kwargs"] == {"enable_thinking": False}
    own.write_text(OWN + "[model]\nchat_template_kwargs = { enable_thinking = false }\n")
    assert load_experiment(own).chat_template_kwargs == {"enable_thinking": False}


def test_all_settings_are_kept_but_the_pairs_own_text(own):
    settings = recorded(load_experiment(own), own)["settings"]
    assert settings["split"]["seed"] == 7 and settings["tune_seeds"] == {"toward": [3], "away": [0, 1]}
    assert settings["pairs"] == {"n": 2, "topics": 2}
    assert "honey" not in json.dumps(settings)


@pytest.mark.parametrize("changed", [{"description": "otherwise"}, {"name": "other"}])
def test_settings_that_no_file_has_get_no_command(own, changed):
    made = recorded(replace(load_experiment(own), **changed), own)
    assert made["command"] is made["call"] is made["toml"] is made["sha256"] is None
    assert made["settings"] == recorded(load_experiment(own), own)["settings"] | changed


def test_a_file_that_was_edited_since_or_not_told_gets_no_command(own):
    ran = load_experiment(own)
    assert recorded(ran, None)["command"] is None
    own.write_text(OWN.replace("seed = 7", "seed = 8"))
    assert recorded(ran, own)["command"] is None


def test_a_source_that_is_no_file_is_refused(own):
    with pytest.raises(ValueError, match="behaviour.*'gone.toml'"):
        recorded(load_experiment(own), "gone.toml")
