"""The tuner: it moves what it is asked to move, nothing else, and leaves the model as it found it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

import rt_lens as rtl
from rt_lens import tuning
from rt_lens.delta import WeightDelta
from rt_lens.extraction import token_projections
from rt_lens.tuning import Target, TuneConfig, loop, prepare, tune

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


def test_out_tuning_brings_the_cosine_near_zero(tiny, tiny_vectors):
    config = replace(QUICK, direction="out", token_weight=0.0, cosine_weight=1.0, centred=False, max_steps=20)
    found = loss(tune(tiny, tiny_vectors, TARGETS, config, progress=False), "train", "cosine")
    assert found[0] > 0.05
    assert found[-1] < found[0] / 2


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
    answer = tiny.tokenizer.encode(one[0].answer)
    with torch.no_grad():
        logits = tiny(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    assert found == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer))), abs=1e-5)


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


class Interrupting:
    """A callable that lets a few calls through, then presses Ctrl-C."""

    def __init__(self, wrapped, after: int) -> None:
        self.wrapped, self.left = wrapped, after

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.wrapped(*args, **kwargs)


def test_ctrl_c_leaves_weights_and_hooks_as_they_were(tiny, tiny_vectors, monkeypatch):
    before = fingerprint(tiny)
    monkeypatch.setattr(loop, "cosine_loss", Interrupting(loop.cosine_loss, after=3))
    with pytest.raises(KeyboardInterrupt):
        tune(tiny, tiny_vectors, TARGETS, QUICK, progress=False)
    assert fingerprint(tiny) == before
    assert not tiny.list_hooks()
    assert not any("forward" in vars(block.attn) for block in tiny.blocks)


def test_best_weights_are_kept_not_the_last(tiny, tiny_vectors):
    """A rate that ruins the model late: the delta's validation loss is the lowest seen, not the last."""
    config = replace(QUICK, cosine_weight=0.0, max_steps=12, validate_every=2, learning_rate=0.05, patience=9)
    held_out = [Target("Question 0: what is it?", " Completely other words than in training.")]
    delta = tune(tiny, tiny_vectors, TARGETS, config, validation=held_out, progress=False)
    seen = loss(delta, "validation", "total")
    assert min(seen) < seen[-1]
    with delta.applied(tiny):
        again = tune(tiny, tiny_vectors, held_out, replace(config, max_steps=1, batch_size=1), validation=held_out,
                     progress=False)  # fmt: skip
    first = loss(again, "train", "token")[0]
    assert first == pytest.approx(min([*seen]), abs=1e-4) or not any(c.abs().max() for c in delta.changes.values())


def test_early_stop_after_patience(tiny, tiny_vectors):
    config = replace(
        QUICK, cosine_weight=0.0, max_steps=40, epochs=20, validate_every=1, patience=2, learning_rate=0.05
    )
    held_out = [Target("Question 0: what is it?", " Completely other words than in training.")]
    delta = tune(tiny, tiny_vectors, TARGETS, config, validation=held_out, progress=False)
    assert max(row["step"] for row in delta.history) < 40


def test_shared_material_gives_the_same_delta_as_targets_and_is_checked(tiny, tiny_vectors):
    config = replace(QUICK, kl_weight=1.0)
    alone = tune(tiny, tiny_vectors, TARGETS, config, neutral=NEUTRAL, progress=False)
    material = prepare(tiny, tiny_vectors, TARGETS, config, neutral=NEUTRAL)
    for _ in range(2):
        shared = tune(tiny, tiny_vectors, material, config, progress=False)
        assert all(torch.equal(shared.changes[name], alone.changes[name]) for name in alone.changes)
    with pytest.raises(ValueError, match="Prepare it with the same layers"):
        tune(tiny, tiny_vectors, material, replace(config, layers=[0], trained_layers=[0]), progress=False)


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
    with pytest.raises(ValueError, match=r"delta: blocks\.9\.attn\.W_Q"), delta.applied(tiny):
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
    under = rtl.generate(model, [chosen[0].user], max_new_tokens=8)
    assert isinstance(under[0], str)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cosine_weight": 0.0, "token_weight": 0.0}, "nothing to tune"),
        ({"direction": "out", "token_weight": 1.0}, "Set token_weight=0"),
        ({"kl_weight": -1.0}, "kl_weight: -1.0 came"),
        ({"max_steps": 0}, "max_steps: 0 came"),
    ],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        TuneConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": [7]}, "layers: 7 is outside these vectors' blocks 0..1"),
        ({"trained_layers": [5]}, "layers: 5 is outside this model's blocks 0..1"),
        ({"kl_weight": 1.0}, "neutral: the KL term needs neutral prompts"),
    ],
)
def test_bad_requests_are_named_before_any_work(tiny, tiny_vectors, settings, says):
    with pytest.raises(ValueError, match=says):
        tune(tiny, tiny_vectors, TARGETS, replace(QUICK, **settings), progress=False)


def test_vectors_of_another_model_are_refused(model, tiny_vectors):
    with pytest.raises(ValueError, match="vectors: made for d_model 32"):
        tune(model, tiny_vectors, TARGETS, QUICK, progress=False)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tiny, tiny_vectors, monkeypatch):
    before = fingerprint(tiny)
    monkeypatch.setattr(loop, "token_loss", lambda logits, targets: logits.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="step 1"):
        tune(tiny, tiny_vectors, TARGETS, QUICK, progress=False)
    assert fingerprint(tiny) == before


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
