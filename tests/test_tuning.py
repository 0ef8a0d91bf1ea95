"""The tuner: it moves what it is asked to move, nothing else, and leaves the model as it found it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import rt_lens as rtl
from rt_lens import tuning
from rt_lens.models import checksums
from rt_lens.tuning.config import TuneConfig, modern
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.loop import tune
from rt_lens.tuning.objective import Objective
from rt_lens.tuning.targets import Target
from rt_lens.tuning.tuning_data import prepare_data
from rt_lens.vectors.reading import token_projections

TARGETS = [Target(f"Question {i}: what is it?", f" It is the thing number {i}, I think.") for i in range(8)]
NEUTRAL = [Target(f"Add {i} and 1.", f" That makes {i + 1}.") for i in range(4)]
QUICK = TuneConfig(
    layers=[1], trained_layers=[1], max_steps=6, batch_size=4, neutral_batch_size=2, validate_every=3, kl_weight=0.0,
    learning_rate=3e-3, epochs=20,
)  # fmt: skip


def fingerprint(model) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def loss(delta: WeightDelta, split: str, part: str) -> list[float]:
    return [row[part] for row in delta.history if row["split"] == split]


@pytest.mark.parametrize(("direction", "sign"), [("toward", 1), ("away", -1)])
def test_cosine_tuning_moves_the_projection_the_way_it_should(tiny, tiny_vectors, direction, sign):
    config = replace(QUICK, direction=direction, token_weight=0.0, cosine_weight=1.0)
    delta = tune(tiny, tiny_vectors, TARGETS, config, progress=False)
    text = TARGETS[0].prompt + TARGETS[0].answer
    before = token_projections(tiny, tiny_vectors, text)[1][1].mean()
    with delta.applied(tiny):
        after = token_projections(tiny, tiny_vectors, text)[1][1].mean()
    assert sign * (after - before) > 0.05


@pytest.mark.parametrize("token_weight", [0.0, 0.1])
def test_out_tuning_brings_the_cosine_near_zero_also_beside_a_token_loss(tiny, tiny_vectors, token_weight):
    config = replace(
        QUICK, direction="suppress", token_weight=token_weight, cosine_weight=1.0, centred=False, max_steps=20
    )
    delta = tune(tiny, tiny_vectors, TARGETS, config, progress=False)
    found = loss(delta, "train", "cosine")
    assert found[0] > 0.05
    assert found[-1] < found[0] / 2
    if token_weight:
        assert loss(delta, "train", "token")[-1] < loss(delta, "train", "token")[0]


def test_token_loss_alone_falls_and_reads_no_vector(tiny, tiny_vectors):
    delta = tune(tiny, tiny_vectors, TARGETS, replace(QUICK, cosine_weight=0.0), progress=False)
    found = loss(delta, "train", "token")
    assert found[-1] < found[0]
    assert loss(delta, "train", "cosine") == [None] * len(found)


def test_the_token_loss_is_the_cross_entropy_of_the_answer_by_a_plain_forward_pass(tiny, tiny_vectors):
    one = [TARGETS[0]]
    config = replace(QUICK, cosine_weight=0.0, batch_size=1, max_steps=1)
    found = loss(tune(tiny, tiny_vectors, one, config, validation=one, progress=False), "train", "token")[0]
    prompt = tiny.tokenizer.encode(one[0].prompt)
    answer = [*tiny.tokenizer.encode(one[0].answer), tiny.tokenizer.eos_token_id]  # a whole answer, with its end
    with torch.no_grad():
        logits = tiny(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    assert found == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer))), abs=1e-5)


@pytest.mark.hooked  # how far this very model goes in a few steps
def test_kl_term_is_zero_at_the_start_and_holds_the_model_back(tiny, tiny_vectors):
    def neutral_kl(delta: WeightDelta) -> float:
        tokens = tiny.to_tokens(NEUTRAL[0].prompt + NEUTRAL[0].answer)
        with torch.no_grad():
            reference = tiny(tokens).log_softmax(-1)
            with delta.applied(tiny):
                tuned = tiny(tokens).log_softmax(-1)
        return float((reference.exp() * (reference - tuned)).sum(-1).mean())

    config = replace(QUICK, cosine_weight=0.0, max_steps=12, validate_every=12)
    free = tune(tiny, tiny_vectors, TARGETS, config, progress=False)
    held = tune(tiny, tiny_vectors, TARGETS, replace(config, kl_weight=30.0), neutral=NEUTRAL, progress=False)
    assert loss(held, "train", "kl")[0] == pytest.approx(0.0, abs=1e-6)
    assert neutral_kl(held) < neutral_kl(free) / 2


def test_only_the_chosen_blocks_matrices_change(tiny, tiny_vectors):
    delta = tune(tiny, tiny_vectors, TARGETS, QUICK, progress=False)
    assert set(delta.changes) == {
        f"blocks.1.{name}"
        for name in ("attn.W_Q", "attn._W_K", "attn._W_V", "attn.W_O", "mlp.W_in", "mlp.W_gate", "mlp.W_out")
    }
    assert all(change.abs().max() > 0 for change in delta.changes.values())


def test_starting_at_the_first_trained_block_gives_the_gradients_of_the_whole_model(tiny, tiny_vectors):
    """Tuning block 1 alone starts from remembered residuals; naming block 0 too does not, and block 1 must agree."""
    config = replace(QUICK, max_steps=1, validate_every=1, weight_decay=0.0)
    near = tune(tiny, tiny_vectors, TARGETS, config, progress=False).changes
    whole = tune(tiny, tiny_vectors, TARGETS, replace(config, trained_layers=[0, 1]), progress=False).changes
    assert "blocks.0.attn.W_Q" in whole
    for name, change in near.items():
        # One Adam step is the gradient's sign times the rate, where the gradient is not tiny.
        assert (torch.sign(change) == torch.sign(whole[name])).float().mean() > 0.999


def test_the_model_is_bit_for_bit_as_before(tiny, tiny_vectors):
    before, flags = fingerprint(tiny), [p.requires_grad for p in tiny.parameters()]
    delta = tune(tiny, tiny_vectors, TARGETS, QUICK, progress=False)
    assert fingerprint(tiny) == before
    with delta.applied(tiny):
        assert fingerprint(tiny) != before
    assert fingerprint(tiny) == before
    assert [p.requires_grad for p in tiny.parameters()] == flags
    assert all(p.grad is None for p in tiny.parameters())
    assert not tiny.list_hooks()


HELD_OUT = [Target("Question 0: what is it?", " Completely other words than in training.")]


@pytest.mark.hooked  # how far this very model goes in a few steps
def test_best_weights_are_kept_not_the_last(tiny, tiny_vectors):
    """A rate that ruins the model late: the delta's loss by a plain forward pass is the lowest that was seen."""
    config = replace(QUICK, cosine_weight=0.0, max_steps=12, validate_every=2, learning_rate=0.05, patience=9)
    delta = tune(tiny, tiny_vectors, TARGETS, config, validation=HELD_OUT, progress=False)
    seen = loss(delta, "validation", "total")
    assert len(seen) == 6
    assert min(seen) < seen[-1] - 0.1
    prompt, answer = (tiny.tokenizer.encode(text) for text in (HELD_OUT[0].prompt, HELD_OUT[0].answer))
    answer.append(tiny.tokenizer.eos_token_id)  # a whole answer, with its end
    with torch.no_grad(), delta.applied(tiny):
        logits = tiny(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    found = float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))
    assert found == pytest.approx(min(seen), abs=1e-4)


@pytest.mark.parametrize("patience", [1, 2])
def test_it_stops_after_as_many_validations_without_improvement_as_patience_says(tiny, tiny_vectors, patience):
    config = replace(QUICK, cosine_weight=0.0, max_steps=40, validate_every=1, patience=patience, learning_rate=0.05)
    delta = tune(tiny, tiny_vectors, TARGETS, config, validation=HELD_OUT, progress=False)
    seen = loss(delta, "validation", "total")
    assert len(seen) == len(loss(delta, "train", "total")) < 40
    worse = [value >= min(seen[:number]) for number, value in enumerate(seen) if number]
    assert all(worse[-patience:])
    runs = "".join("x" if each else "." for each in worse[:-1])
    assert "x" * patience not in runs


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.3), (10, 0.0), (7, 0.5), (1, 0.1), (2, 0.9)])
def test_the_rate_rises_over_the_warm_up_and_falls_to_zero_after_it(tiny, tiny_vectors, monkeypatch, steps, warmup):
    rates = []
    step = torch.optim.AdamW.step

    def listening(self, *args):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", listening)
    config = replace(QUICK, max_steps=steps, warmup=warmup, learning_rate=2e-3, patience=99)
    tune(tiny, tiny_vectors, TARGETS, config, progress=False)
    rising = max(1, round(steps * warmup))
    falling = steps - rising
    up = [2e-3 * (number + 1) / rising for number in range(rising)]
    down = [2e-3 * (1 - number / falling) for number in range(falling)]
    assert [rate for rate, *_ in rates] == pytest.approx(up + down)
    assert all(len(each) == 1 for each in rates)


def test_the_token_rate_is_for_what_the_cosine_does_not_train(tiny, tiny_vectors):
    """With nearly none, what both losses train moves all the same, and what the token loss alone trains does not."""
    kinds = {"cosine": ["v", "o"], "token": ["o", "gate", "up", "down"]}
    config = replace(QUICK, target_modules=kinds, max_steps=4)
    slow = tune(tiny, tiny_vectors, TARGETS, replace(config, token_learning_rate=1e-12), progress=False).changes
    same = tune(tiny, tiny_vectors, TARGETS, config, progress=False).changes
    assert len(slow) == 5
    for name in slow:
        assert same[name].abs().max() > 1e-4
        if ".mlp." in name:
            assert slow[name].abs().max() < 1e-7
        else:
            assert slow[name].abs().max() > 1e-4


def batches_of(model, vectors, monkeypatch, config) -> tuple[list[list[str]], list[list[str]]]:
    """Prompts of the rows, and of the neutral rows, of each step."""
    rows, neutral = [], []
    gradients = Objective.gradients

    def listening(self, some, others, hooks):
        rows.append([row.prompt for row in some])
        neutral.append([row.prompt for row in others])
        return gradients(self, some, others, hooks)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "gradients", listening)
        tune(model, vectors, TARGETS, config, validation=HELD_OUT, neutral=NEUTRAL, progress=False)
    return rows, neutral


def test_each_epoch_sees_each_row_once_in_an_order_of_the_seed(tiny, tiny_vectors, monkeypatch):
    config = replace(QUICK, batch_size=3, epochs=2, max_steps=99, kl_weight=1.0, neutral_batch_size=1, patience=99)
    rows, neutral = batches_of(tiny, tiny_vectors, monkeypatch, config)
    assert [len(step) for step in rows] == [3, 3, 2] * 2
    first, second = ([prompt for step in epoch for prompt in step] for epoch in (rows[:3], rows[3:]))
    everything = sorted(target.prompt for target in TARGETS)
    assert sorted(first) == sorted(second) == everything
    assert len({tuple(first), tuple(second), tuple(everything)}) == 3
    assert all(len(step) == 1 for step in neutral)
    assert len({prompt for step in neutral for prompt in step}) == 2  # the other half is kept for the validations
    assert batches_of(tiny, tiny_vectors, monkeypatch, config) == (rows, neutral)
    assert batches_of(tiny, tiny_vectors, monkeypatch, replace(config, seed=1))[0] != rows
    assert batches_of(tiny, tiny_vectors, monkeypatch, replace(config, max_steps=4))[0] == rows[:4]


def test_shared_material_gives_the_same_delta_as_targets_and_is_checked(tiny, tiny_vectors):
    config = replace(QUICK, kl_weight=1.0)
    alone = tune(tiny, tiny_vectors, TARGETS, config, neutral=NEUTRAL, progress=False)
    material = prepare_data(tiny, tiny_vectors, TARGETS, config, neutral=NEUTRAL)
    for _ in range(2):
        shared = tune(tiny, tiny_vectors, material, config, progress=False)
        assert all(torch.equal(shared.changes[name], alone.changes[name]) for name in alone.changes)
    with pytest.raises(ValueError, match="prepared with the same layers"):
        tune(tiny, tiny_vectors, material, replace(config, layers=[0], trained_layers=[0]), progress=False)


def test_material_is_refused_on_other_weights_of_the_same_name(tiny, tiny_vectors, tmp_path):
    """What `prepare_data` computed is of the weights it saw: else the KL would refer to another model."""
    config = replace(QUICK, kl_weight=1.0)
    material = prepare_data(tiny, tiny_vectors, TARGETS, config, neutral=NEUTRAL)
    delta = tune(tiny, tiny_vectors, material, config, progress=False)
    says = "train must be data prepared with this model's weights, got data of other weights of tiny. Prepare it"
    for checkpoint in (None, tmp_path / "c.ckpt"):
        with delta.applied(tiny), pytest.raises(ValueError, match=says):
            tune(tiny, tiny_vectors, material, config, checkpoint=checkpoint, progress=False)
    again = tune(tiny, tiny_vectors, material, config, progress=False)  # taken off, they are the same weights again
    assert all(torch.equal(again.changes[name], delta.changes[name]) for name in delta.changes)
    tiny.blocks[0].mlp.W_in.data[0, 0] += 1e-6  # a block before those that are tuned
    with pytest.raises(ValueError, match=says):
        tune(tiny, tiny_vectors, material, config, progress=False)


def test_weights_are_read_once_a_run_and_only_where_something_is_compared(tiny, tiny_vectors, tmp_path, monkeypatch):
    read = []
    whole = checksums.parameters_sha256
    for module in (tuning.loop, tuning.tuning_data, tuning.checkpoint):
        monkeypatch.setattr(module, "parameters_sha256", lambda model: read.append(model) or whole(model))
    tune(tiny, tiny_vectors, TARGETS, QUICK, progress=False)
    assert len(read) == 0
    tune(tiny, tiny_vectors, TARGETS, QUICK, checkpoint=tmp_path / "a.ckpt", progress=False)
    assert len(read) == 1
    material = prepare_data(tiny, tiny_vectors, TARGETS, QUICK)
    tune(tiny, tiny_vectors, material, QUICK, checkpoint=tmp_path / "b.ckpt", progress=False)
    assert len(read) == 3


def test_same_seed_same_delta_and_another_seed_another(tiny, tiny_vectors):
    first, again, other = (tune(tiny, tiny_vectors, TARGETS, replace(QUICK, seed=s), progress=False) for s in (0, 0, 1))
    name = "blocks.1.mlp.W_in"
    assert torch.equal(first.changes[name], again.changes[name])
    assert not torch.equal(first.changes[name], other.changes[name])


def test_delta_round_trips_and_says_what_it_is(tiny, tiny_vectors, tmp_path):
    delta = tune(tiny, tiny_vectors, TARGETS, QUICK, progress=False)
    loaded = WeightDelta.load(delta.save(tmp_path / "delta.safetensors"))
    assert all(torch.equal(loaded.changes[name], delta.changes[name]) for name in delta.changes)
    assert loaded.config["direction"] == "away"
    assert loaded.history == delta.history


def test_a_delta_of_another_model_is_refused_before_anything_changes(tiny):
    before = fingerprint(tiny)
    changes = {"blocks.0.attn.W_Q": torch.ones_like(tiny.W_Q[0]), "blocks.9.attn.W_Q": torch.ones(2, 2)}
    delta = WeightDelta(changes, "other", {}, [])
    with pytest.raises(ValueError, match=r"delta must fit the model, .*blocks\.9\.attn\.W_Q"), delta.applied(tiny):
        pass
    assert fingerprint(tiny) == before


def test_pairs_give_targets_in_the_models_own_words_without_the_persona(model, pairs):
    train, _ = pairs.split(0.7, seed=0)
    config = TuneConfig(n_targets=3, target_tokens=8)
    targets = tuning.write_targets(model, train, "away", config)
    chosen = train.sample(3, seed=0).pairs
    assert len(targets) == 3
    for target, pair in zip(targets, chosen, strict=True):
        assert pair.user in target.prompt
        assert pair.negative not in target.prompt
    applied = rtl.generate(model, [chosen[0].user], max_new_tokens=8)
    assert isinstance(applied[0], str)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cosine_weight": 0.0, "token_weight": 0.0, "kl_weight": 0.0}, "so there is nothing to tune"),
        ({"direction": "up"}, "direction must be 'toward', 'away' or 'suppress', got 'up'"),
        ({"direction": "out"}, "direction must be .*, got 'out', the old name of 'suppress'"),
        ({"precision": "float16"}, "precision must be 'float32', 'bfloat16' or 'auto', got 'float16'"),
        ({"prefix_cache": "ram"}, "prefix_cache must be 'auto', 'memory', 'disk' or 'off', got 'ram'"),
        ({"kl_weight": -1.0}, "kl_weight must be 0 or more, got -1.0"),
        ({"kl_weight": float("nan")}, "kl_weight must be 0 or more, got nan"),
        ({"free_nats": -0.1}, "free_nats must be 0 or more, got -0.1"),
        ({"max_steps": 0}, "max_steps must be more than 0, got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be more than 0, got 0"),
        ({"token_learning_rate": 0.0}, "token_learning_rate must be more than 0, got 0.0"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1\.0"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_bad_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        TuneConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": [7]}, "layers contains 7, but these vectors are of blocks 0..1"),
        ({"trained_layers": [5]}, "layers.*5.*blocks 0..1"),
        ({"kl_weight": 1.0}, "neutral must be at least one prompt for the KL term"),
        (
            {"cosine_weight": 0.0, "token_weight": 0.0, "kl_weight": 1.0},
            "or steer given, .*so there is nothing to tune",
        ),
    ],
)
def test_bad_requests_are_named_before_any_work(tiny, tiny_vectors, settings, says):
    with pytest.raises(ValueError, match=says):
        tune(tiny, tiny_vectors, TARGETS, replace(QUICK, **settings), progress=False)


def test_vectors_of_another_model_are_refused(model, tiny_vectors):
    with pytest.raises(ValueError, match="extracted from a model with d_model 32"):
        tune(model, tiny_vectors, TARGETS, QUICK, progress=False)


def test_a_bridge_tunes_too(bridge, pairs):
    vectors = rtl.extract_vectors(bridge, pairs.sample(2), layers=[27])
    before = fingerprint(bridge)
    config = replace(QUICK, layers=[27], trained_layers=[27], token_weight=0.0, cosine_weight=1.0, max_steps=3,
                     batch_size=2, learning_rate=1e-3)  # fmt: skip
    delta = tune(bridge, vectors, TARGETS[:4], config, progress=False)
    found = loss(delta, "train", "cosine")
    assert len(delta.changes) == 7
    assert found[-1] < found[0] - 0.01
    assert fingerprint(bridge) == before


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": 20}, "layers must be a list of blocks .*got 20"),
        ({"layers": "20"}, "layers must be a list of blocks .*got '20'"),
        ({"layers": []}, "layers must name at least one block"),
        ({"trained_layers": []}, "trained_layers must name at least one block"),
        ({"layers": [1.5]}, "layers must be a whole number, got 1.5"),
        ({"target_modules": 5}, "target_modules must be a list such as .*got 5"),
        ({"target_modules": "v o"}, r"target_modules must be a list, got 'v o'\. Try target_modules=\['v', 'o'\]"),
        ({"max_steps": 2.5}, "max_steps must be a whole number, got 2.5"),
        ({"micro_batch_size": 1.5}, "micro_batch_size must be a whole number, got 1.5"),
        ({"learning_rate": "1e-4"}, "learning_rate must be a number, got '1e-4'"),
        ({"seed": None}, "seed must be a whole number, got None"),
    ],
)
def test_settings_of_the_wrong_kind_are_named(settings, says, as_a_user):
    with pytest.raises(ValueError, match=says):
        TuneConfig(**settings)


def test_numpys_numbers_are_as_good_as_pythons(tiny, tiny_vectors, tmp_path, as_a_user):
    config = replace(QUICK, layers=np.array([1]), trained_layers=np.arange(1, 2), seed=np.int64(0), max_steps=1)
    assert config == replace(QUICK, max_steps=1)
    assert tune(tiny, tiny_vectors, TARGETS, config, progress=False).save(tmp_path / "delta.safetensors").is_file()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"train": "a text"}, "train must be ContrastPairs, or a list of Target"),
        ({"train": [("a", "b")]}, "train must be ContrastPairs, or a list of Target"),
        ({"validation": ["a"]}, "validation must be ContrastPairs, or a list of Target"),
        ({"neutral": "Iron?"}, "neutral must be a list of texts"),
        ({"neutral": [("a", "b")]}, "neutral must be a list of texts"),
    ],
)
def test_texts_of_the_wrong_kind_are_named(tiny, tiny_vectors, changed, says, as_a_user):
    request = {"train": TARGETS, "neutral": NEUTRAL, **changed}
    with pytest.raises(ValueError, match=says):
        tune(tiny, tiny_vectors, request.pop("train"), QUICK, progress=False, **request)


def test_material_of_another_model_or_direction_is_refused(tiny, make_tiny, tiny_vectors):
    material = prepare_data(tiny, tiny_vectors, TARGETS, QUICK, neutral=NEUTRAL)
    other = make_tiny()
    other.cfg.rt_lens_name = "another"
    with pytest.raises(ValueError, match="train must be data prepared with this model, another, got data of tiny"):
        tune(other, tiny_vectors, material, QUICK, progress=False)
    written = replace(material, direction="toward")  # as `prepare_data` says of targets that the model wrote
    with pytest.raises(ValueError, match="targets written for direction 'away', got targets for 'toward'"):
        tune(tiny, tiny_vectors, written, QUICK, progress=False)
    with pytest.raises(ValueError, match="must be left out where train is prepared data"):
        tune(tiny, tiny_vectors, material, QUICK, neutral=NEUTRAL, progress=False)


def test_held_out_targets_share_no_prompt_with_the_others(tiny, tiny_vectors):
    twice = [Target(target.prompt, answer) for target in TARGETS for answer in (" Yes.", " No.")]
    parts = [prepare_data(tiny, tiny_vectors, twice, replace(QUICK, seed=seed)) for seed in (0, 0, 1)]
    for part in parts:
        train, held = ({row.prompt for row in rows} for rows in (part.train, part.held_out))
        assert not train & held and len(train | held) == len(TARGETS)
        assert len(part.held_out) == 2 * len(held)
    first, again, other = ([row.prompt for row in part.held_out] for part in parts)
    assert first == again != other


# Names that files had before


def test_old_names_and_values_of_a_file_are_read_with_a_hint():
    old = {"direction": "out", "kinds": {"cosine": ["v"]}, "token_rest": 0.3, "layers": [20]}
    kept = dict(old)
    with pytest.warns(UserWarning, match="the old name still works") as hints:
        found = modern(old)
    assert found == {"direction": "suppress", "target_modules": {"cosine": ["v"]}, "free_nats": 0.3, "layers": [20]}
    assert [str(hint.message) for hint in hints] == [
        "direction 'out' is now 'suppress'; the old name still works.",
        "'kinds' is now 'target_modules'; the old name still works.",
        "'token_rest' is now 'free_nats'; the old name still works.",
    ]
    assert old == kept


@pytest.mark.filterwarnings("ignore:.*the old name still works")
def test_old_names_within_sums_and_targets_are_read_too():
    half = {"times": 0.5, "of": {"sum_of": [{"kinds": ["v"]}, {"vectors": [{"direction": "out"}, {"weight": 1}]}]}}
    assert modern(half) == {
        "times": 0.5,
        "of": {"sum_of": [{"target_modules": ["v"]}, {"vectors": [{"direction": "suppress"}, {"weight": 1}]}]},
    }


@pytest.mark.filterwarnings("error")
def test_todays_names_are_left_as_they_are_without_a_hint():
    config = asdict(TuneConfig(direction="suppress"))
    assert modern(config) == config
