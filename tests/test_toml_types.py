"""The keys of a behaviour's file: strict types, a schema that the shipped files pass, an up-to-date reference."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

from rt_lens.arms.registry import BUILT_IN, registered_arm
from rt_lens.data.builtin import behaviour_content
from rt_lens.evaluation.registry import scorer_kinds
from rt_lens.experiment.config import TABLES, behaviour_schema, load_experiment
from rt_lens.experiment.toml_types import expected, meanings_of, properties

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import write_reference  # noqa: E402

FILES = sorted([*(ROOT / "data").glob("behaviours/*.toml"), *(ROOT / "data").glob("full/*.toml")])


@pytest.fixture(scope="module")
def schema():
    return behaviour_schema()


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_shipped_file_passes_the_schema_and_a_changed_one_does_not(schema, file):
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    jsonschema.validate(content, schema)
    jsonschema.validate(behaviour_content(file), schema)  # with what it extends
    for wrong in (
        {"tune": {"max_steps": "ten"}},
        {"tune": {"max_stepz": 10}},
        {"nmae": "x"},
        {"split": {"train": True}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**content, **wrong}, schema)


def test_the_schema_is_one_and_the_pages_are_what_it_gives(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    for path, text in write_reference.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"run python docs/write_reference.py: {path.name} differs"


def test_every_key_arm_and_scorer_stands_in_the_reference_with_its_meaning():
    page = (ROOT / "docs" / "behaviour.md").read_text(encoding="utf-8")
    for kind in TABLES.values():
        assert set(meanings_of(kind)) == set(properties(kind))
        assert all(f"| `{name}` |" in page for name in properties(kind))
    assert all(f"| `{kind}` |" in page for kind in scorer_kinds())
    assert all(f"| {arm} | `{knob}` |" in page for arm in BUILT_IN for knob in registered_arm(arm).knobs)


def written(tmp_path, table):
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "mood"\n{table}\n', encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[tune]\nmax_steps = "ten"', "max_steps must be a whole number, got 'ten'"),
        ("[tune]\nmax_steps = true", "max_steps must be a whole number, got True"),
        ("[tune]\ncentred = 1", "tune.centred must be true or false, got 1"),
        ('[tune]\nlayers = ["20"]', "layers must be a whole number, got '20'|layers must be a list of whole numbers"),
        ("[tune]\nhook = 3", "tune.hook must be a text, got 3"),
        ('[compare]\nkl = ["much"]', "compare.kl must be .*got \\['much'\\]"),
        ("[compare]\nstated = 0.01\nn_texts = 2.5", "compare.n_texts must be a whole number, got 2.5"),
        ("[compare]\nn_inside = true", "compare.n_inside must be a whole number, got True"),
        ('[choose]\nbound = "high"', "choose.bound must be a number, got 'high'"),
        ("[tune]\ntrained_layers = { cosine = [20], token = 3 }", "trained_layers.* must be a list"),
        ("[tune]\nlearning_rte = 1e-4", "unknown key 'learning_rte' in \\[tune\\]. Did you mean 'learning_rate'?"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(tmp_path, table, message):
    with pytest.raises(ValueError, match=message):
        load_experiment(written(tmp_path, table))


@pytest.mark.parametrize("name", ["tune", "model", "split", "test", "compare", "settings", "search", "report"])
def test_a_number_in_the_place_of_a_table_is_refused(tmp_path, name):
    path = tmp_path / "mine.toml"
    path.write_text(f"{name} = 3\n{behaviour_of_ones_own()}", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"config: {name} must be a table \[{name}\], got 3"):
        load_experiment(path)


def behaviour_of_ones_own():
    return '[pairs]\npositive = ["Be glad."]\nnegative = ["Be sad."]\ntopics = ["Hi?", "Ho?", "Hm?", "Ha?", "He?"]\n'


def test_whole_numbers_pass_where_numbers_are_asked_for(tmp_path):
    assert load_experiment(written(tmp_path, "[tune]\ncosine_weight = 6")).tune.cosine_weight == 6


def test_types_in_words():
    assert (
        expected({"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]})
        == "a list of whole numbers"
    )
    assert expected({"enum": ["a", "b"]}) == "one of 'a', 'b'"
    lists = {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}}
    assert expected(lists) == "a table with a list of texts each"
    assert json.dumps(properties(TABLES["extract"])["n_pairs"]["default"]) == "96"
