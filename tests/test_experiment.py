"""The whole loop from one TOML file, on the real model, in small: results, report, command line."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llama_folder import llama_folder
from typer.testing import CliRunner

import rt_lens.arms.ways.token_tuned as token_tuned_module
import rt_lens.experiment.run as run_module
from rt_lens.apps.cli import app
from rt_lens.apps.report.page import write_report
from rt_lens.arms.comparison import ArmEvaluator
from rt_lens.data.builtin import behaviours, data_path
from rt_lens.data.contrast_pairs import load_pairs
from rt_lens.evaluation.registry import make_scorer
from rt_lens.experiment.config import HonestyConfig, load_experiment
from rt_lens.experiment.plan import plan_of
from rt_lens.experiment.run import run_experiment
from rt_lens.results.schema import load_results
from rt_lens.tuning.loop import tune
from rt_lens.vectors.steering_vectors import SteeringVectors

SMALL = """
name = "sweetness"
description = "Sweet against bitter, a behaviour of a user's own."
arms = ["prompted", "steered", "token_tuned", "rep_tuned"]
[pairs]
positive = ["You adore everything sweet.", "Speak of honey and cake.", "You taste sugar in every word."]
negative = ["You adore everything bitter.", "Speak of bile and ash.", "You taste gall in every word."]
topics = ["What is for lunch?", "Tell me about rivers.", "How is the weather?", "Describe a chair.",
          "What do you do at noon?", "Tell me about a road.", "What is in your bag?", "Describe a window.",
          "How do you cook rice?", "Tell me about a tower."]
[scorer]
kind = "lexicon"
positive = ["sweet", "honey", "sugar", "the"]
negative = ["bitter", "ash", "gall", "a"]
[split]
train = 0.4
validation = 0.2
[extract]
n_pairs = 4
[choose]
layers = [18]
multipliers = [0.5]
n_prompts = 2
n_paragraphs = 3
max_new_tokens = 6
bound = 1.5
[tune]
layers = [27]
trained_layers = [27]
learning_rate = 1e-3
max_steps = 2
batch_size = 2
neutral_batch_size = 1
n_targets = 4
target_tokens = 6
seeds = { toward = [0], away = [0, 1] }
[test]
n_prompts = 4
max_new_tokens = 6
n_facts = 4
n_instructions = 2
n_texts = 3
[compare]
kl = [0.01]
side_effects = "stated"
n_texts = 3
max_new_tokens = 6
n_personas = 1
"""
ARMS = ("prompted", "steered", "token_tuned", "rep_tuned")
ROWS = [("untuned", "none"), *((arm, direction) for arm in ARMS for direction in ("toward", "away"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of the small behaviour, by the command that users type."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "sweetness.toml").write_text(SMALL)
    command("run", str(folder / "sweetness.toml"), "--out", str(folder / "out"))
    return folder / "out"


def command(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rt_lens.apps.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_results_hold_every_arm_and_direction_with_intervals(run):
    results = json.loads((run / "results.json").read_text())
    assert sorted((row["arm"], row["direction"]) for row in results["summary"]) == sorted(ROWS)
    # Untuned; steered and two tuned arms x one and two seeds; prompted, which does not depend on the seed.
    assert len(results["arms"]) == 1 + 3 * (1 + 2) + 2
    for row in results["summary"] + results["arms"]:
        assert row["n"] == 4
        assert row["low"] <= row["mean"] <= row["high"]
        assert row["perplexity"] > 1
        assert row["kl"] >= 0
    untuned = results["summary"][0]
    assert untuned["kl"] == pytest.approx(0, abs=1e-6)
    assert all(row["kl"] > 1e-5 for row in results["summary"][1:])
    assert results["choices"]["away"]["multiplier"] < 0 < results["choices"]["toward"]["multiplier"]
    assert {"rt_lens", "torch", "transformer-lens"} <= set(results["versions"])
    assert "the targets" in results["seed_draws"]


def test_each_mean_is_the_mean_of_its_responses(run):
    results = json.loads((run / "results.json").read_text())
    answers = [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]
    for row in results["arms"]:
        mine = [a["score"] for a in answers if all(a[k] == row[k] for k in ("arm", "direction", "seed", "set"))]
        assert row["mean"] == pytest.approx(sum(mine) / len(mine))


def test_test_prompts_were_seen_by_nothing_else(run):
    experiment = load_experiment(run.parent / "sweetness.toml")
    train, validation, test = experiment.pairs.split(0.4, 0.2, seed=0)
    answers = [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]
    asked = {answer["prompt"] for answer in answers if answer["set"] == "test"}
    assert asked == set(test.topics)
    assert not asked & (set(train.topics) | set(validation.topics))


def test_vectors_and_deltas_are_on_disk(run):
    assert SteeringVectors.load(run / "vectors.safetensors").provenance.behaviour == "sweetness"
    assert (run / "rep_tuned_away.safetensors").is_file()
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_report_is_one_offline_page_with_every_arm(run):
    page = write_report(run).read_text()
    for arm, _ in ROWS:
        assert arm in page
    assert "<script src" not in page
    assert "Plotly.newPlot" in page


def test_same_seed_same_results(run, tmp_path):
    """In another process, and whichever other arms are compared."""
    alone = replace(load_experiment(run.parent / "sweetness.toml"), arms=("rep_tuned",))
    repeated = json.loads(json.dumps(run_experiment(alone, tmp_path, progress=False)))
    first = json.loads((run / "results.json").read_text())
    for key in ("choices", "dose_response"):
        assert repeated[key] == first[key], key
    for key in ("arms", "summary", "history"):
        assert repeated[key] == [row for row in first[key] if row["arm"] in ("untuned", "rep_tuned")], key


# Seeds, and the token-tuned arm's own settings


@pytest.fixture(scope="module")
def tiny_experiment(tmp_path_factory):
    """The small behaviour on a tiny random Llama, with a rate that shows in two steps."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "sweetness.toml").write_text(SMALL, encoding="utf-8")
    read = load_experiment(folder / "sweetness.toml", model=str(llama_folder(folder / "tiny-llama")))
    return replace(
        read,
        extract=replace(read.extract, n_pairs=2),
        choose=replace(read.choose, layers=(1,), bound=9.0),
        tune=replace(read.tune, layers=(2,), trained_layers=(2,), target_temperature=1.0),
        tune_seeds={"toward": (0,), "away": (0, 1)},
        token={"learning_rate": 3e-3, "trained_layers": (1, 2)},
    )


@pytest.fixture
def tuned(tiny_experiment, tmp_path, monkeypatch):
    """What each tuned arm of a run was given, in order: vectors, material and settings."""
    given = []

    def noting(model, vectors, material, config, **others):
        given.append((vectors, material, config))
        return tune(model, vectors, material, config, **others)

    monkeypatch.setattr(token_tuned_module, "tune", noting)
    run_experiment(tiny_experiment, tmp_path / "out", progress=False)
    return given


def test_a_seed_draws_all_that_is_random_and_both_arms_share_it(tuned):
    label = [(config.seed, config.direction, config.cosine_weight > 0) for _, _, config in tuned]
    assert label == [
        (0, "toward", False), (0, "toward", True), (0, "away", False), (0, "away", True), (1, "away", False),
        (1, "away", True),
    ]  # fmt: skip
    for (vectors, material, _), (again, same, _) in zip(tuned[::2], tuned[1::2], strict=True):
        assert vectors is again and material is same
    (first, drawn, _), (second, other, _) = tuned[2], tuned[4]
    assert not torch.equal(first["blocks.2.hook_resid_post"], second["blocks.2.hook_resid_post"])
    for rows in ("train", "held_out", "neutral"):
        one, two = ([tuple(row.tokens.tolist()) for row in getattr(of, rows)] for of in (drawn, other))
        assert one and two and set(one) != set(two), rows


def test_the_token_tuned_arm_has_settings_of_its_own(tuned, tiny_experiment):
    (_, material, token), (_, _, rep) = tuned[:2]
    assert (token.learning_rate, token.trained_layers, token.cosine_weight) == (3e-3, (1, 2), 0.0)
    assert (rep.learning_rate, rep.trained_layers) == (1e-3, (2,))
    assert material.first_block == 1  # before what either arm trains
    plan = plan_of(tiny_experiment)
    assert plan.runs == 6


def test_a_table_for_the_token_tuned_arm_is_checked(tmp_path):
    def read(line):
        file = tmp_path / "sweetness.toml"
        file.write_text(SMALL.replace("[test]", f"[tune.token]\n{line}\n[test]"), encoding="utf-8")
        return load_experiment(file)

    arms = read("learning_rate = 2e-3").tuned_arms
    assert arms["token_tuned"] == replace(arms["rep_tuned"], learning_rate=2e-3, cosine_weight=0.0)
    for line, message in (
        ("layers = [3]", r"\[tune\.token\] must not have 'layers', which both arms share"),
        (
            "learning_rat = 1e-3",
            r"unknown key 'learning_rat' in \[tune\.token\]\. Did you mean 'learning_rate'",
        ),
        ("learning_rate = -1.0", r"learning_rate.*-1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            read(line)


def test_the_papers_arms_train_the_same_matrices_at_the_same_rate():
    arms = load_experiment("honesty_paper").tuned_arms
    rep, token = arms["rep_tuned"], arms["token_tuned"]
    assert {*rep.target_modules_of("cosine"), *rep.target_modules_of("token")} == set(token.target_modules_of("token"))
    assert rep.blocks == token.blocks
    assert token.token_learning_rate == rep.learning_rate == 1e-5


@pytest.fixture
def on_tiny(tmp_path, tiny, monkeypatch):
    """Runs the small behaviour on a random model of two blocks, to a folder; keywords change the settings."""
    monkeypatch.setattr(run_module, "load_model", lambda *_, **__: tiny)

    def run_to(folder: Path, **changes: str) -> None:
        text = (
            SMALL.replace("layers = [18]", "layers = [0]").replace("[27]", "[1]").replace("bound = 1.5", "bound = 1e9")
        )
        few = dict.fromkeys(["n_facts", "n_instructions", "n_texts", "n_paragraphs"], "1")
        for old, new in {**few, "max_new_tokens": "2", "seeds": "[0]", **changes}.items():
            text = re.sub(rf"(?m)^{old} = .*$", f"{old} = {new}", text)
        (tmp_path / "b.toml").write_text(text)
        run_experiment(load_experiment(tmp_path / "b.toml"), folder, progress=False)

    return run_to


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_second_run_in_a_folder_takes_the_place_of_the_first_whole_or_not_at_all(
    on_tiny, tmp_path, monkeypatch, caplog
):
    out = tmp_path / "runs" / "sweet"
    on_tiny(out)
    write_report(out)
    (out / "notes.md").write_text("mine")
    before = bytes_in(out)
    files = load_results(out).files
    assert {"vectors.safetensors", "rep_tuned_toward.safetensors", "rep_tuned_away.safetensors"} <= set(files)

    def breaks_off(self, arm, *interventions, **label):  # by then the second run has vectors
        if arm.startswith("steered"):
            raise KeyboardInterrupt
        return measure(self, arm, *interventions, **label)

    measure = ArmEvaluator.measure
    monkeypatch.setattr(ArmEvaluator, "measure", breaks_off)
    with pytest.raises(KeyboardInterrupt) as broken:
        on_tiny(out, n_pairs="3", learning_rate="2e-3")
    monkeypatch.setattr(ArmEvaluator, "measure", measure)
    now = bytes_in(out)
    (unfinished,) = (name for name in now if name.startswith("unfinished-"))  # which the next run goes on with
    assert {name: found for name, found in now.items() if name != unfinished} == before  # no other byte of the second
    load_results(out)
    (left,) = [path for path in out.parent.iterdir() if path != out]
    assert set(bytes_in(left)) == {"vectors.safetensors"}
    assert SteeringVectors.load(left / "vectors.safetensors").provenance.n_pairs == 3
    assert str(left) in caplog.text and str(left) in broken.value.__notes__[0]

    on_tiny(out, n_pairs="3", learning_rate="2e-3")
    after, found = bytes_in(out), load_results(out)
    assert set(after) == {*found.files, "results.json", "notes.md"}  # the first run's page is gone with it
    assert after["notes.md"] == b"mine" and after["vectors.safetensors"] != before["vectors.safetensors"]
    assert left.is_dir()
    (out / "rep_tuned_away.safetensors").write_bytes(before["rep_tuned_away.safetensors"])
    with pytest.raises(ValueError, match=r"rep_tuned_away\.safetensors must be the file that the run .* got another"):
        load_results(out)
    refused = CliRunner().invoke(app, ["export", str(out / "rep_tuned_away.safetensors"), "--out", str(tmp_path / "e")])
    assert "rep_tuned_away.safetensors must be the file" in str(refused.exception)


def test_extract_steer_and_tune_by_command(run, tmp_path):
    file = tmp_path / "v.safetensors"
    said = command("extract", str(run.parent / "sweetness.toml"), "--out", str(file), "--n-pairs", "4")
    assert f"Saved {file} (" in said and "Next: rt-lens steer" in said
    assert "steered (layer 18" in command("steer", str(file), "Hello.", "--layer", "18", "--max-new-tokens", "4")
    out = tmp_path / "d.safetensors"
    said = command("tune", str(run.parent / "sweetness.toml"), str(file), "--direction", "suppress", "--out", str(out))
    assert f"Saved {out} (7 matrices" in said


def test_models_lists_licence_and_behaviours():
    said = command("models")
    assert "Apache-2.0" in said
    assert "formality, honesty, honesty_paper, language, mood, refusal" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "moood"), "Did you mean 'mood'?"),
        (("run", "mood", "--model", "smollm2-135m-instrct"), "Did you mean 'smollm2-135m-instruct'?"),
        (("steer", "nothing.safetensors", "Hi.", "--layer", "3"), "nothing.safetensors"),
        (
            ("tune", "mood", "v.safetensors", "--direction", "up"),
            "'toward', 'away'",
        ),
        (("run", "mood", "--out", "/dev/null/x"), "out must be a folder that can be written, got /dev/null/x"),
        (("run", "mood", "--plan", "--chat-template-kwargs", "[1]"), "chat_template_kwargs must be a JSON object, got"),
        (
            ("run", "mood", "--plan", "--dtype", "int4"),
            "dtype must be one of 'float32', 'bfloat16', 'float16', got 'int4'",
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # whose runs/ holds nothing that a run before could have left
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = command(*arguments, code=2)
    assert says in said
    assert len(said.strip().splitlines()) == 1


def test_vectors_go_from_extraction_through_a_sweep_to_another_tool(tmp_path):
    file, page, gguf = (str(tmp_path / name) for name in ("v.safetensors", "v.html", "v.gguf"))
    said = command("extract", "mood", "--n-pairs", "4", "--hook", "attn_out", "--out", file, "--figure", page)
    assert "rt-lens steer" in said and "n = " in said
    assert "Can these vectors be trusted?" in Path(page).read_text()
    swept = command(
        "sweep", "mood", file, "--layers", "20", "--multipliers=-2,0,2", "--n-prompts", "2", "--max-new-tokens", "3",
        "--out", str(tmp_path / "s.json"), "--figure", page,
    )  # fmt: skip
    assert "Layer 20: Spearman" in swept and "Steering by layer and multiplier" in Path(page).read_text()
    assert "blocks.20.hook_attn_out: shape (576,)" in command("vectors", file, "--layers", "18,20-21")
    said = command("vectors", file, "--gguf", gguf, code=2)
    assert "at hook_resid_post" in said and not Path(gguf).exists()


@pytest.mark.parametrize(
    "name", ["run", "extract", "vectors", "sweep", "steer", "tune", "evaluate", "compare", "models"]
)
def test_help_shows_an_example(name):
    assert f"Example: rt-lens {name}" in command(name, "--help")


@pytest.mark.parametrize("name", [name for name in behaviours() if not name.startswith("honesty")])
def test_shipped_behaviours_are_whole(name):
    experiment = load_experiment(name)
    pairs = load_pairs(name)
    assert len({(p.positive, p.negative) for p in pairs.pairs}) >= 12
    assert len(pairs.topics) >= 60
    assert len({p.prefill for p in pairs.pairs}) >= 12
    *_, test = pairs.split(experiment.split.train, experiment.split.validation, seed=experiment.split.seed)
    assert len(test.topics) >= experiment.test.n_prompts >= 60


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ("max_steps = 2", "max_stepz = 2"),
            r"unknown key 'max_stepz' in \[tune\]\. Did you mean 'max_steps'",
        ),
        (("[extract]", "[extrakt]"), "unknown key 'extrakt' in .*\. Did you mean 'extract'"),
        (("toward = [0]", "toward = []"), "tune.seeds must have at least one seed for 'toward', got none"),
        (('negative = ["You adore everything bitter.", ', "negative = ["), "positive.*3.*2"),
        (
            ("n_prompts = 4", "n_prompts = 40"),
            "test.n_prompts must be at most 4, the number of topics in the test part, got 40",
        ),
        (("layers = [27]", "layers = [99]"), r"layers.* 99.* 0\.\.29"),
        (("[split]", "[split"), "valid TOML"),
        (('positive = ["You', 'positve = ["You'), "must have the lists positive, negative and topics, got no positive"),
    ],
)
def test_bad_files_are_named(tmp_path, change, says):
    assert change[0] in SMALL
    (tmp_path / "bad.toml").write_text(SMALL.replace(*change, 1))
    with pytest.raises(ValueError, match=says):
        run_experiment(load_experiment(tmp_path / "bad.toml"), tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("old", "new", "table"),
    [
        ("openers", "prefills", 'openers = ["Well,"]\n[scorer]'),
        ("kinds", "target_modules", 'kinds = ["v", "o"]\n[test]'),
        ("token_rest", "free_nats", "token_rest = 0.5\n[test]"),
        ("out", "suppress", 'direction = "out"\n[test]'),
        ("kinds", "target_modules", '[tune.token]\nkinds = ["v", "o"]\n[test]'),
    ],
)
def test_an_old_key_of_a_file_is_still_read_with_a_hint_of_its_new_name(tmp_path, old, new, table):
    def read(name, text):
        file = tmp_path / f"{name}.toml"
        file.write_text(SMALL.replace(table[table.rindex("[") :], text), encoding="utf-8")
        return load_experiment(file)

    with pytest.warns(UserWarning, match=f"'{old}' is now '{new}'; the old name still works.$") as hints:
        older = read("old", table)
    assert len(hints) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        newer = read("new", re.sub(rf"\b{old}\b", new, table))
    assert older == newer != load_experiment_of(tmp_path, SMALL)


def load_experiment_of(folder, text):
    (folder / "plain.toml").write_text(text, encoding="utf-8")
    return load_experiment(folder / "plain.toml")


def test_old_keys_of_the_honesty_table_are_still_read(tmp_path):
    with pytest.warns(UserWarning, match="is now") as hints:
        older = load_experiment_of(tmp_path, '[honesty]\nopener = "Answer:"\ncorrect_only = false\n')
    assert {str(hint.message).split(": ")[1].split(";")[0] for hint in hints} == {
        "'opener' is now 'prefill'", "'correct_only' is now 'filter_pairs'",
    }  # fmt: skip
    assert older.honesty == HonestyConfig(prefill="Answer:", filter_pairs=False)


@pytest.mark.parametrize("as_table", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [("names_right", "contains_answer"), ("obeys", "follows_instruction"), ("other", "off_option_mass")],
)
def test_old_names_of_scorers_are_still_read(tmp_path, old, new, as_table):
    with pytest.warns(UserWarning, match=f"'{old}' is now '{new}'; the old name still works"):
        scorer = make_scorer({"kind": old} if as_table else old)
    assert scorer.name == new
    text = SMALL[: SMALL.index("[scorer]")] + SMALL[SMALL.index("[split]") :]
    text = f"{text}[scorer]\nkind = '{old}'\n" if as_table else f"scorer = '{old}'\n{text}"
    # A topic has no options, so none of them can score its responses; the message has today's name.
    with (
        pytest.warns(UserWarning, match=f"'{old}' is now '{new}'"),
        pytest.raises(ValueError, match=f"scorer must read the text of one response, .* got '{new}'"),
    ):
        load_experiment_of(tmp_path, text)


def test_a_key_under_both_names_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\[honesty\] must not have both 'prefill' and its old name 'opener'"):
        load_experiment_of(tmp_path, '[honesty]\nopener = "A:"\nprefill = "B:"\n')


def test_a_direction_without_a_dose_within_the_bound_runs_all_the_same_and_says_so(tiny_experiment, tmp_path):
    choose = replace(tiny_experiment.choose, multipliers=(40.0, 20.0), bound=0.1)
    alone = replace(tiny_experiment, choose=choose, arms=("steered",), tune_seeds={"toward": (0,), "away": (0,)})
    results = run_experiment(alone, tmp_path / "out", progress=False)
    assert not any(row["admissible"] for row in results["dose_response"] if row["multiplier"])
    for direction, multiplier in (("toward", 20.0), ("away", -20.0)):
        choice = results["choices"][direction]
        assert choice["multiplier"] == multiplier
        assert "at the smallest multiplier; none keeps perplexity within the bound" in choice["why"]
    reached = [row for row in results["at_kl"]["strengths"] if not row["reason"]]
    assert len(reached) == 2 and all(abs(row["kl"] / row["budget"] - 1) < 0.04 for row in reached)
    write_report(tmp_path / "out")


def test_the_wheel_carries_the_data(tmp_path):
    root = Path(__file__).parent.parent
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    installed = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel)],
        check=True,
    )
    script = (
        "import rt_lens, rt_lens.data.builtin as data; "
        "print(rt_lens.__file__, data.behaviours(), len(data.neutral_paragraphs()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(installed) in done.stdout
    assert "['formality', 'honesty', 'honesty_paper', 'language', 'mood', 'refusal'] 24" in done.stdout


def test_neutral_text_is_about_three_thousand_tokens(model):
    text = data_path("neutral/text.txt").read_text()
    assert math.isclose(len(model.tokenizer.encode(text)), 3000, rel_tol=0.15)


def test_prompts_of_ones_own_are_scored_by_command(run, tmp_path):
    rows = 'prompt,right,wrong\n"Is ice cold, would you say?",yes|Yes,no\nIs fire cold?,no,yes\n'
    (tmp_path / "mine.csv").write_text(rows)
    (tmp_path / "scorer.toml").write_text('[scorer]\nkind = "lexicon"\npositive = ["ice"]\nnegative = ["fire"]\n')
    names = ("repetition", "pattern:ice|fire", str(tmp_path / "scorer.toml"), "likelihood")
    said = command(
        "evaluate", str(tmp_path / "mine.csv"), *(part for name in names for part in ("--scorer", name)),
        "--delta", str(run / "rep_tuned_away.safetensors"), "--vectors", str(run / "vectors.safetensors"),
        "--layer", "18", "--multiplier", "0.5", "--max-new-tokens", "3", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    for word in ("untuned", "steered", "tuned", "pattern", "lexicon", "likelihood_share", "p_holm", "Seed 0"):
        assert word in said
    scores = (tmp_path / "out" / "scores.csv").read_text().splitlines()
    assert len(scores) == 1 + 3 * 4 * 2  # arms x scorers x prompts
    assert "ice cold, would you say?" in (tmp_path / "out" / "responses.jsonl").read_text()
    assert "layer must be a block for --vectors, got none" in command(
        "evaluate", str(tmp_path / "mine.csv"), "--vectors", str(run / "vectors.safetensors"), code=2
    )


def test_a_run_against_itself_has_not_changed(run):
    assert "Nothing changed" in command("compare", str(run), str(run), "--fail-on-change")


def test_a_plan_runs_nothing(run):
    said = command("run", str(run.parent / "sweetness.toml"), "--out", str(run.parent / "planned"), "--plan")
    assert "Nothing was run" in said and not (run.parent / "planned").exists()
