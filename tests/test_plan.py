"""The dry run: its counts are a real run's, its rules count what the model does; and the paper's experiment runs.

The paper's experiment is the shipped file on a tiny random Llama of Llama-2's family, with its sizes shrunk.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from llama_folder import llama_folder
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rt_lens.data.builtin import neutral_paragraphs
from rt_lens.data.questions import Question
from rt_lens.evaluation import registry as making
from rt_lens.evaluation.choices import likelihoods
from rt_lens.evaluation.permissions import Permissions
from rt_lens.evaluation.scorers import OfText
from rt_lens.evaluation.texts import perplexity
from rt_lens.experiment.config import CompareConfig, Experiment, load_experiment
from rt_lens.experiment.costs import Costs, Work
from rt_lens.experiment.plan import GPU, Plan, plan_of
from rt_lens.experiment.protocols import answers_protocol
from rt_lens.experiment.run import run_experiment
from rt_lens.experiment.shape import WordCount, reader_of, shape_of
from rt_lens.experiment.stages import Planner, protocols_of
from rt_lens.models.backends.hooked import KeyValueCache
from rt_lens.models.forward import quick
from rt_lens.models.load import load_model
from rt_lens.models.tokens.batches import encode
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.weights import as_matrix, trained_by
from rt_lens.vectors.extraction import extract_vectors
from rt_lens.vectors.steering_vectors import SteeringVectors

BEHAVIOUR = """
name = "scored"
[pairs]
positive = ["Be glad.", "Be merry."]
negative = ["Be sad.", "Be grim."]
topics = ["Rain?", "Snow?", "The sea?", "The road?", "Bread?", "The bus?", "Tea?", "The moon?", "Soup?", "Birds?"]
[scorer]
{scorer}
[choose]
layers = [1]
n_prompts = 2
[tune]
layers = [2]
[test]
n_prompts = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama") / "tiny-llama")


@pytest.fixture(scope="module")
def paper(folder) -> Experiment:
    """The shipped file on the tiny model: fewer items, blocks and steps, and a rate that shows in so few."""
    full = load_experiment("honesty_paper", model=str(folder))
    return replace(
        full,
        honesty=replace(full.honesty, n_calibration=4, n_items=4),
        split=replace(full.split, train=0.12),
        extract=replace(full.extract, n_pairs=16),
        choose=replace(full.choose, layers=(1, 2), multipliers=(0.5,), bound=2.0, n_prompts=4, n_paragraphs=21),
        tune=replace(
            full.tune, layers=(1, 2), trained_layers=(1, 2), max_steps=3, validate_every=2, target_tokens=4,
            learning_rate=1e-2, token_learning_rate=1e-2,
        ),
        test=replace(full.test, n_prompts=4, n_instructions=4, max_new_tokens=4),
        compare=CompareConfig(kl=(0.01,), n_texts=2, max_new_tokens=4),
        arms=("steered", "token_tuned", "rep_tuned"),
        token={**full.token, "token_learning_rate": 1e-2},  # so that three steps reach a KL
        tune_seeds={"toward": (0,), "away": (0,)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def plan(paper) -> Plan:
    return plan_of(paper)


@pytest.fixture(scope="module")
def run(paper, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("paper")
    run_experiment(paper, out, progress=False)
    return out


@pytest.fixture
def offline(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def results_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def numbers_in(file: Path) -> int:
    """Bytes of the tensors in a safetensors file."""
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size - 8 - header


def test_the_papers_experiment_runs_to_the_end_on_a_llama_of_its_family(run, paper):
    results = results_of(run)
    assert results["protocol"]["name"] == "persona"
    arms = {(row["arm"], row["direction"]) for row in results["arms"]}
    tuned = {(arm, way) for arm in ("steered", "token_tuned", "rep_tuned") for way in ("toward", "away")}
    assert arms == {("untuned", "none"), *tuned}
    assert {"same categories", "held-out categories", "misconceptions"} <= {row["set"] for row in results["arms"]}
    assert SteeringVectors.load(run / "vectors.safetensors").provenance.behaviour == "honesty"
    delta = WeightDelta.load(run / "rep_tuned_away.safetensors")
    kinds = {name.split("W_")[-1] for name, change in delta.changes.items() if change.any()}
    assert kinds == {"V", "O", "Q", "K", "out"}  # the cosine's and the tokens' alike


def test_each_loss_of_the_papers_experiment_trains_its_own_weights(folder, paper):
    trained = trained_by(load_model(folder), paper.tune)
    assert {name.split("W_")[-1] for name in trained["cosine"]} == {"V", "O"}
    assert {name.split("W_")[-1] for name in trained["token"]} == {"Q", "K", "out"}


def test_planned_items_are_the_runs(run, plan):
    asked = {row["set"]: row["n"] for row in results_of(run)["arms"] if row["arm"] == "untuned"}
    assert len(asked) >= 5
    for name, n in asked.items():
        assert plan.items[f"test, {name}"] == n, name
    side = results_of(run)["side_effects"]
    assert {row["set"]: row["n"] for row in side}["talk"] == plan.items["test, talk"]


def test_planned_steps_and_runs_are_the_runs(run, plan):
    rows = [row for row in results_of(run)["history"] if row["split"] == "train"]
    assert max(row["step"] for row in rows) == plan.steps == 3
    assert len({(row["arm"], row["direction"], row["seed"]) for row in rows}) == plan.runs == 4


def test_planned_files_are_the_runs_to_the_byte(run, plan):
    assert set(plan.files) == {path.name for path in run.glob("*.safetensors")}
    for name, size in plan.files.items():
        assert numbers_in(run / name) == size, name


def test_planned_stages_are_those_that_the_run_timed(run, plan):
    assert set(plan.stages) == set(results_of(run)["seconds"])
    assert all(plan.seconds(GPU)[stage] >= 0 for stage in plan.stages)


def test_parameters_are_those_in_the_file(folder):
    shape, tokenizer, local = shape_of(str(folder))
    assert shape.parameters == sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert tokenizer is not None and local
    assert shape_of("smollm2-135m-instruct")[0].parameters == 134_515_008  # tied embeddings once


CONFIGS = {
    "all": TuneConfig(layers=[2]),
    "by loss": TuneConfig(layers=[1, 2], target_modules={"cosine": ["v", "o"], "token": ["gate", "down"]}),
    "blocks by loss": TuneConfig(
        layers=[3], trained_layers={"cosine": [1, 2], "token": [2, 3]}, target_modules=["v", "up"]
    ),
    "kl beside": TuneConfig(layers=[2], target_modules={"cosine": ["v"], "token": ["o"], "kl": ["q"]}),
    "token alone": TuneConfig(layers=[2], cosine_weight=0.0, target_modules={"cosine": ["v"], "token": ["o"]}),
    "biases and norms": TuneConfig(layers=[2], target_modules=["bias", "norm", "k"]),
    "low rank": TuneConfig(layers=[2], lora_rank=3, target_modules=["q", "down"]),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_numbers_trained_are_those_that_tuning_trains(folder, config):
    shape, _, _ = shape_of(str(folder))
    trained = {name: p for found in trained_by(load_model(folder), config).values() for name, p in found.items()}
    assert trained
    assert shape.trained(config) == sum(parameter.numel() for parameter in trained.values())
    factors = [config.lora_rank * sum(as_matrix(name, p).shape) for name, p in trained.items() if config.lora_rank]
    assert shape.optimised(config) == (sum(factors) if factors else shape.trained(config))


def test_llama_2_13b_is_known_without_the_network_and_fits(offline):
    experiment = load_experiment("honesty_paper")
    plan = plan_of(experiment)
    assert plan.shape.parameters == 13_015_864_320
    assert plan.trained == 7 * (4 * 5120**2 + 5120 * 13824)
    assert plan.steps == experiment.tune.epochs * -(-plan.items["targets to learn"] // 4) > 300
    assert not plan.exact
    stage, need = plan.peak(GPU)
    assert stage == "tune"
    assert 0.6 * GPU.memory < need < 0.95 * GPU.memory
    said = str(plan)
    for words in ("13,015,864,320 parameters", "26.0 GB in bfloat16", "estimated: words x 1.4"):
        assert words in said
    assert "It fits (" in said.split("80 GB GPU: at most")[1].split("Here: at most")[0]


def test_all_weights_of_the_papers_blocks_do_not_fit_and_the_plan_says_what_to_lower(offline):
    experiment = load_experiment("honesty_paper")
    wider = {"cosine": ["v", "o"], "token": ["q", "k", "gate", "up", "down"]}
    said = str(plan_of(replace(experiment, tune=replace(experiment.tune, target_modules=wider))))
    assert "in tune. IT DOES NOT FIT into 80.0 GB. Set tune.lora_rank = 16, or name fewer tune.target_modules" in said
    lower = plan_of(replace(experiment, tune=replace(experiment.tune, target_modules=wider, lora_rank=16)))
    assert lower.peak(GPU)[1] < 0.75 * GPU.memory
    many = plan_of(replace(experiment, tune=replace(experiment.tune, batch_size=64)))
    assert "IT DOES NOT FIT into 80.0 GB. Lower tune.micro_batch_size." in str(many)
    few = plan_of(replace(experiment, tune=replace(experiment.tune, batch_size=64, micro_batch_size=4)))
    assert few.peak(GPU)[1] < GPU.memory


def test_a_machine_is_judged_by_what_it_has(plan):
    small = replace(plan, here=replace(plan.here, memory=10**8))
    assert "Here: at most" in str(plan) and "IT DOES NOT FIT" not in str(plan)
    assert "IT DOES NOT FIT into 100.0 MB" in str(small)
    assert "It fits" in str(replace(small, here=replace(small.here, gpu=True))).split("Here: at most")[1]
    assert "This system does not report its memory" in str(replace(plan, here=replace(plan.here, memory=0)))


def test_what_is_held_of_trained_weights_is_what_tuning_holds():
    shape, _, _ = shape_of("smollm2-135m-instruct")
    held = Costs(shape, 4).tuning(load_experiment("mood").tune, [40], [40], [40], 24).device
    n = 8 * 3_538_944  # 8 blocks: 2 x 576 x 576 + 2 x 576 x 192 + 3 x 576 x 1536
    assert held["AdamW's two moments"] == 2 * held["gradients"] == 2 * held["trained weights in float32"] == 8 * n
    half = Costs(shape, 2).tuning(load_experiment("mood").tune, [40], [40], [40], 24).device
    assert half["trained weights in the model"] == 2 * n
    assert half["AdamW's two moments"] == 8 * n


class Counting:
    """Tokens that go through the first block, and key-value caches that are made."""

    def __init__(self, model: Any, monkeypatch: Any) -> None:
        self.tokens, self.caches, made = 0, list[KeyValueCache](), KeyValueCache.__init__

        def keep(cache: KeyValueCache, *arguments: Any) -> None:
            made(cache, *arguments)
            self.caches.append(cache)

        def count(activation: torch.Tensor, hook: Any) -> None:
            self.tokens += activation.shape[0] * activation.shape[1]

        monkeypatch.setattr(KeyValueCache, "__init__", keep)
        self.hooks = model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", count)])

    @property
    def cached(self) -> int:
        """Bytes; a cache takes its memory at its first tokens."""
        parts = [part for cache in self.caches for slot in cache.slots for part in slot.pair]
        return sum(part.numel() * part.element_size() for part in parts)


@pytest.fixture(scope="module")
def llama(folder) -> Any:
    return load_model(folder)


@pytest.fixture(scope="module")
def planner(folder, llama, paper) -> Planner:
    experiment = replace(paper, dtype="float32")
    shape, tokenizer, _ = shape_of(str(folder))
    reader = reader_of(tokenizer)
    return Planner(experiment, shape, reader, protocols_of(experiment, reader)[0], True)


QUESTIONS = [
    Question("What is the capital of France?", ("Paris",), ("Lyon", "Nice")),
    Question("Is snow white, as most people say who saw some?", ("Yes",), ("No", "Never")),
    Question("Who?", ("Nobody at all",), ("Everybody", "I")),
]


@pytest.mark.parametrize("form", ["multiple_choice", "completion"])
def test_the_rule_for_options_counts_what_the_model_runs_and_caches(llama, planner, form, monkeypatch):
    counting = Counting(llama, monkeypatch)
    with counting.hooks:
        likelihoods(llama, QUESTIONS, form=form, batch_size=16)
    work = planner._options(QUESTIONS, form, 16)
    assert counting.tokens > 50
    assert work.tokens == pytest.approx(counting.tokens, rel=0.12 if form == "completion" else 1e-6)
    assert work.device["key-value cache"] == pytest.approx(counting.cached, rel=0.12)


def test_the_rules_for_texts_count_what_the_model_runs(llama, planner, monkeypatch):
    texts = neutral_paragraphs()[:6]
    sizes = [len(encode(llama, text)) for text in texts]
    counting = Counting(llama, monkeypatch)
    with counting.hooks:
        fit = perplexity(llama, texts, keep=True)
    work = planner.costs.fit(sizes, kept=True)
    assert work.tokens == counting.tokens > 500
    assert fit.log_probabilities is not None
    kept = fit.log_probabilities.numel() * 4
    assert sum(work.host.values()) == pytest.approx(kept, rel=0.02)
    counting = Counting(llama, monkeypatch)
    with counting.hooks:
        extract_vectors(llama, planner.pairs)
    sizes = [len(encode(llama, text)) for side in planner.pairs.texts(llama) for text in side]
    assert planner.costs.read(sizes, 32, cut=True).tokens == counting.tokens > 500


def test_the_rule_for_kept_activations_is_near_what_autograd_keeps(folder, planner):
    model, config = load_model(folder), planner.experiment.tune
    tokens = torch.randint(3, 800, (4, 64), generator=torch.Generator().manual_seed(0))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for block, module in enumerate(model.blocks):
        module.requires_grad_(block in config.blocks)
    residual = model(tokens, stop_at_layer=1).detach()
    with quick(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(residual, start_at_layer=1, stop_at_layer=4)
    planned = planner.costs.tuning(config, [64], [64], [64], 1).device["activations kept for the gradients"]
    assert planned / 1.4 < sum(kept.values()) < planned * 1.1


def test_words_stand_in_for_a_tokenizer_that_is_not_here(planner, shared_tokenizer):
    texts = [text for side in planner.pairs.texts(reader_of(shared_tokenizer)) for text in side]
    bare = [text for side in planner.pairs.texts(reader_of(None)) for text in side]
    guessed = sum(len(WordCount().encode(text)) for text in bare)
    counted = sum(len(shared_tokenizer.encode(text)) for text in texts)
    assert guessed == pytest.approx(counted, rel=0.3)


def test_auto_plans_for_whichever_protocol_needs_more(tmp_path, folder):
    plans = {}
    for name in ("auto", "persona", "likelihood"):
        file = tmp_path / f"{name}.toml"
        file.write_text(f'[honesty]\nprotocol = "{name}"\n[choose]\nlayers = [1]\n[tune]\nlayers = [2]\n')
        plans[name] = plan_of(load_experiment(file, model=str(folder)))
    assert plans["auto"].protocols == ("persona", "likelihood")
    for stage, work in plans["auto"].stages.items():
        each = [plans[name].stages[stage].tokens for name in ("persona", "likelihood")]
        assert work.tokens == max(each)
    assert "persona or likelihood (the larger number of the two)" in str(plans["auto"])


def test_work_adds_up_and_memory_is_the_larger_ones():
    first, second = Work(tokens=3, passes=1, device={"a": 5, "b": 1}), Work(tokens=4, passes=2, device={"c": 4})
    assert (first + second * 2).tokens == 11
    assert (first + second).device == {"a": 5, "b": 1}
    assert first.or_else(second).tokens == 4


def test_other_families_and_files_are_counted_too(tmp_path):
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=500)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    shape, tokenizer, _ = shape_of(str(tmp_path / "gpt2"))
    assert tokenizer is None
    assert shape.n_layers == 2
    assert shape.block["q"] == shape.block["k"] == shape.block["v"] == 32 * 32
    assert shape.block["up"] == shape.block["down"] == 4 * 32 * 32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "nobody/nothing-7b"}, r"model must have a configuration that can be read, got 'nobody/nothing-7b'"),
        ({"dtype": "int8"}, r"dtype must be one of 'float32', 'bfloat16', 'float16', got 'int8'"),
        ({"tune": TuneConfig(layers=[9])}, r"tune\.layers contains 9, but this model has blocks 0\.\.3"),
        ({"tune": TuneConfig(layers=[2], trained_layers=[7])}, r"tune\.trained_layers contains 7"),
    ],
)
def test_what_cannot_be_planned_is_named(paper, change, says, offline):
    with pytest.raises(ValueError, match=says):
        plan_of(replace(paper, **change))


@pytest.mark.parametrize(
    "table",
    [
        "kind = 'classifier'\nmodel = 'no such model'\npairs = 'mood'",
        "kind = 'logit_judge'\nmodel = 'no such model'\ncriterion = 'sounds happy'",
        "kind = 'endpoint_judge'\nurl = 'https://api.example/v1'\nmodel = 'm'\ncriterion = 'is kind'",
    ],
)
def test_a_plan_makes_no_scorer(tmp_path, folder, monkeypatch, table):
    """No model of a scorer's own is loaded, no key is asked for: what it reads stands in its table."""

    def forbidden(made: Any) -> Any:
        def make(**_: Any) -> None:
            raise AssertionError("a scorer was made")

        return functools.wraps(made)(make)

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for kind in ("classifier", "logit_judge", "endpoint_judge"):
        monkeypatch.setitem(making._KINDS, kind, forbidden(making._KINDS[kind]))
    file = tmp_path / "scored.toml"
    file.write_text(BEHAVIOUR.format(scorer=table), encoding="utf-8")
    allowed = Permissions.of_user(["https://api.example"])
    experiment = load_experiment(file, model=str(folder), permissions=allowed)
    (protocol,) = protocols_of(experiment, reader_of(None))
    assert {scorer.reads for scorer in protocol.choosing.made} == {"text"}
    assert "scored" in str(plan_of(experiment))
    with pytest.raises(RuntimeError, match="must be built before it can score"):
        protocol.choosing.made[0]([])
    with pytest.raises(AssertionError, match="a scorer was made"):
        experiment.made_scorer  # noqa: B018


def test_a_plan_counts_the_writing_that_a_judge_reads_and_makes_no_judge(paper, plan, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = {"url": "https://api.example/v1", "model": "m", "criterion": "is honest"}
    judged = plan_of(replace(paper, judge=judge))
    assert judged.stages["evaluate"].tokens > plan.stages["evaluate"].tokens


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("kind = 'clasifier'", "scorer.*'clasifier'"),
        ("kind = 'classifier'\npairs = 'mood'", "scorer.*'classifier'.*model"),
        ("kind = 'pattern'\npatern = 'x'", "scorer.*'pattern'.*patern"),
    ],
)
def test_a_scorers_table_is_checked_when_the_file_is_read(tmp_path, table, says):
    file = tmp_path / "scored.toml"
    file.write_text(BEHAVIOUR.format(scorer=table), encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        load_experiment(file)


def test_an_experiment_makes_its_scorer_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setitem(making._KINDS, "counted", lambda: made.append(1) or OfText("counted", len))
    file = tmp_path / "scored.toml"
    file.write_text(BEHAVIOUR.format(scorer="kind = 'counted'"), encoding="utf-8")
    experiment = load_experiment(file)
    assert not made
    first, second = answers_protocol(experiment), answers_protocol(experiment)
    assert made == [1] and first.choosing.made[0] is second.tasks["test"].made[0]
