"""Gradients of a tuning step against losses written out by hand, row by row, with no padding, prefix or portions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from small_tuning import answer_of
from torch.nn.functional import cosine_similarity, cross_entropy

import rt_lens as rtl
from rt_lens.models.backends import parameters_of
from rt_lens.models.divergence import kl_divergence
from rt_lens.models.tokens.batches import encode
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.direction_targets import resolve_targets
from rt_lens.tuning.loop import tune
from rt_lens.tuning.losses import cosine_loss
from rt_lens.tuning.objective import Objective
from rt_lens.tuning.targets import Target
from rt_lens.tuning.tuning_data import prepare_data
from rt_lens.tuning.weights import trainable_params, trained_by
from rt_lens.vectors.steering_vectors import SteeringVectors

# By HookedTransformer's names; test_architectures.py compares a bridge's gradients and prefix.
pytestmark = pytest.mark.hooked

TARGETS = [
    Target("Hello there.", " Hi."),
    Target("What is a whale? Say it in a few words, please.", " A whale is an animal of the sea, and a big one."),
    Target("Name a colour that you like.", " Blue."),
    Target("And one more thing:", " I think that this is all there is to it."),
]
NEUTRAL = [
    Target("Add 2 and 3.", " That makes 5."),
    Target("Name three metals that are found in the ground.", " Iron."),
    Target("How long is a week?", " A week is seven days long, as everyone knows."),
]
CONFIG = TuneConfig(layers=[0, 1], trained_layers=[0, 1], cosine_weight=2.0, token_weight=0.5, kl_weight=3.0,
                    validation_share=0.0)  # fmt: skip
SEPARATE = {"cosine": ["v", "o"], "token": ["gate", "up", "down"]}


def shaken(model, first: int = 0) -> None:
    """Moves the weights from a block on: near the untuned model's own the KL is small, and float32 rounding shows."""
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in parameters_of(model).items():
            if name.startswith("blocks.") and int(name.split(".")[1]) >= first:
                parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=noise)


def found_by(model, vectors, material, config, rows=None, neutral=None):
    """Losses and gradients of one step as the loop takes it; None for a parameter that got no gradient."""
    trained = trained_by(model, config)
    union = {name: parameter for group in trained.values() for name, parameter in group.items()}
    with trainable_params(model, union, config):
        objective = Objective(model, resolve_targets(model, vectors, config), config, material, trained)
        rows = material.train if rows is None else rows
        losses = objective.gradients(rows, material.neutral if neutral is None else neutral, [])
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in parameters_of(model).items()}
    return losses, grads


def plain_forward(model, target: Target, names: Sequence[str]):
    """Logits and activations of one row by TransformerLens alone, and the positions that predict the answer."""
    prompt, answer = encode(model, target.prompt), answer_of(model, target)
    kept: dict[str, torch.Tensor] = {}

    def keep(activation, hook):
        kept[hook.name] = activation[0]

    logits = model.run_with_hooks(torch.tensor([prompt + answer]), fwd_hooks=[(name, keep) for name in names])
    predicting = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return logits[0], kept, list(predicting), torch.tensor(answer)


def by_hand(model, untuned, vectors, targets, neutral, config) -> dict[str, torch.Tensor]:
    """The three losses written out: averages over all positions of all rows, one row at a time."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in config.layers]
    with torch.no_grad():
        still = [plain_forward(untuned, target, names) for target in targets]
    centres = {name: torch.cat([kept[name][where] for _, kept, where, _ in still]).mean(0) for name in names}
    rows = [plain_forward(model, target, names) for target in targets]
    cosines = [
        cosine_loss(torch.cat([kept[name][where] for _, kept, where, _ in rows]), vectors[name], config.direction,
                    centres[name] if config.centred else None).mean()
        for name in names
    ]  # fmt: skip
    tokens = torch.cat(
        [cross_entropy(logits[where], answer, reduction="none") for logits, _, where, answer in rows]
    ).mean()
    divergences = []
    for target in neutral:
        logits, _, where, _ = plain_forward(model, target, [])
        with torch.no_grad():
            reference, *_ = plain_forward(untuned, target, [])
        divergences.append(kl_divergence(logits[where].log_softmax(-1), reference[where].log_softmax(-1)))
    return {"cosine": torch.stack(cosines).mean(), "token": tokens, "kl": torch.cat(divergences).mean()}


def gradients_by_hand(model, losses, config) -> dict[str, dict[str, torch.Tensor]]:
    """Loss -> parameter -> its weighted gradient, over all parameters of the blocks."""
    parameters = {name: p for name, p in parameters_of(model).items() if name.startswith("blocks.")}
    found = {}
    for loss, value in losses.items():
        grads = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        found[loss] = {
            name: config.weight(loss) * grad
            for name, grad in zip(parameters, grads, strict=True)
            if grad is not None and grad.abs().max() > 0
        }
    return found


def assert_same(found, expected, tolerance=1e-5) -> None:
    """Gradients of the same parameters, equal to within a share of the largest value of them all."""
    there = {name: grad for name, grad in found.items() if grad is not None}
    assert set(there) == set(expected)
    largest = max(float(grad.abs().max()) for grad in expected.values())
    assert largest > 1e-4
    for name, grad in there.items():
        assert (grad - expected[name]).abs().max() <= tolerance * largest, name


@pytest.fixture
def untuned(make_tiny, tiny):
    """The tiny model once more, to stay as it is while the other is moved."""
    other = make_tiny()
    other.load_state_dict(tiny.state_dict())
    return other


@pytest.mark.parametrize("micro", [None, 1, 2, 3])
@pytest.mark.parametrize(("trained", "prefix"), [([0, 1], "off"), ([1], "memory"), ([1], "disk"), ([1], "off")])
def test_a_steps_gradients_are_those_of_the_plain_sum(tiny, untuned, tiny_vectors, micro, trained, prefix):
    """Any micro-batch size, any place of the prefix, rows of unlike lengths: the same as row by row and by hand."""
    config = replace(CONFIG, layers=[1], trained_layers=trained, micro_batch_size=micro, prefix_cache=prefix)
    material = prepare_data(tiny, tiny_vectors, TARGETS, config, validation=TARGETS[:1], neutral=NEUTRAL)
    assert material.first_block == (0 if prefix == "off" else 1)
    shaken(tiny, first=min(trained))
    losses, grads = found_by(tiny, tiny_vectors, material, config)
    expected = by_hand(tiny, untuned, tiny_vectors, TARGETS, NEUTRAL, config)
    for loss, value in expected.items():
        assert losses[loss] == pytest.approx(float(value.detach()), rel=1e-5)
        assert value > 0.001
    assert losses["total"] == pytest.approx(sum(config.weight(loss) * losses[loss] for loss in expected))
    alone = gradients_by_hand(tiny, expected, config)
    names = trained_by(tiny, config)["token"]
    assert_same(grads, {name: sum(alone[loss][name] for loss in alone) for name in names})


@pytest.mark.parametrize("kinds", [SEPARATE, {**SEPARATE, "kl": ["q", "o", "up"]}], ids=["kl left out", "kl named"])
@pytest.mark.parametrize("micro", [None, 3])
def test_each_loss_trains_its_own_kinds_and_no_others(tiny, untuned, tiny_vectors, kinds, micro):
    config = replace(CONFIG, target_modules=kinds, micro_batch_size=micro)
    material = prepare_data(tiny, tiny_vectors, TARGETS, config, validation=TARGETS[:1], neutral=NEUTRAL)
    shaken(tiny)
    _, grads = found_by(tiny, tiny_vectors, material, config)
    alone = gradients_by_hand(tiny, by_hand(tiny, untuned, tiny_vectors, TARGETS, NEUTRAL, config), config)
    groups = trained_by(tiny, config)
    assert set(groups["kl"]) == (
        set(groups["cosine"]) | set(groups["token"]) if "kl" not in kinds else
        {f"blocks.{b}.{n}" for b in (0, 1) for n in ("attn.W_Q", "attn.W_O", "mlp.W_in")}
    )  # fmt: skip
    expected: dict[str, torch.Tensor] = {}
    for loss, group in groups.items():
        for name in group:
            if name in alone[loss]:  # the cosine at the last block has no gradient into what comes after it
                expected[name] = expected.get(name, 0) + alone[loss][name]
    assert_same(grads, expected)
    # There was something to leave out: each loss does depend on weights that it may not train.
    assert any(alone["token"][name].abs().max() > 1e-4 for name in groups["cosine"])
    assert any(alone["cosine"][name].abs().max() > 1e-4 for name in groups["token"] if name in alone["cosine"])


def test_separate_runs_of_each_loss_add_up_to_the_run_of_both(tiny, tiny_vectors):
    """With both losses on, a group's gradient is to the bit that of its loss alone, and it is so for each."""
    both = replace(CONFIG, target_modules=SEPARATE, kl_weight=0.0)
    material = prepare_data(tiny, tiny_vectors, TARGETS, both, validation=TARGETS[:1])
    _, grads = found_by(tiny, tiny_vectors, material, both)
    for loss, other in (("cosine", "token"), ("token", "cosine")):
        _, single = found_by(tiny, tiny_vectors, material, replace(both, **{f"{other}_weight": 0.0}))
        group = trained_by(tiny, both)[loss]
        assert {name for name, grad in single.items() if grad is not None} <= set(group)
        for name in group:
            if single[name] is None:
                assert grads[name] is None
            else:
                assert single[name].abs().max() > 0
                torch.testing.assert_close(grads[name], single[name], atol=1e-7, rtol=1e-6)


def test_each_loss_trains_its_own_blocks_and_kl_only_what_they_do(tiny, untuned, tiny_vectors):
    config = replace(CONFIG, layers=[1], trained_layers={"cosine": [1], "token": [0]}, target_modules=SEPARATE)
    groups = trained_by(tiny, config)
    assert set(groups["cosine"]) == {"blocks.1.attn._W_V", "blocks.1.attn.W_O"}
    assert set(groups["token"]) == {f"blocks.0.mlp.{name}" for name in ("W_in", "W_gate", "W_out")}
    assert set(groups["kl"]) == set(groups["cosine"]) | set(groups["token"])
    material = prepare_data(tiny, tiny_vectors, TARGETS, config, validation=TARGETS[:1], neutral=NEUTRAL)
    shaken(tiny)
    _, grads = found_by(tiny, tiny_vectors, material, config)
    alone = gradients_by_hand(tiny, by_hand(tiny, untuned, tiny_vectors, TARGETS, NEUTRAL, config), config)
    expected = {name: alone["kl"][name] + alone[loss][name] for loss in ("cosine", "token") for name in groups[loss]}
    assert_same(grads, expected)
    # The cosine would have reached block 0, and the token loss block 1.
    assert alone["cosine"]["blocks.0.mlp.W_in"].abs().max() > 1e-4 < alone["token"]["blocks.1.attn.W_O"].abs().max()


@pytest.mark.parametrize("kinds", [SEPARATE, ["v", "up"]], ids=["separate", "shared"])
def test_weights_that_no_loss_names_are_not_in_the_delta(tiny, tiny_vectors, kinds):
    config = replace(CONFIG, target_modules=kinds, max_steps=2, batch_size=2, kl_weight=0.0)
    delta = tune(tiny, tiny_vectors, TARGETS, config, validation=TARGETS[:1], progress=False)
    named = {"v": "attn._W_V", "o": "attn.W_O", "gate": "mlp.W_gate", "up": "mlp.W_in", "down": "mlp.W_out"}
    wanted = kinds if isinstance(kinds, list) else [kind for each in kinds.values() for kind in each]
    assert set(delta.changes) == {f"blocks.{block}.{named[kind]}" for block in (0, 1) for kind in wanted}
    assert all(change.abs().max() > 0 for change in delta.changes.values())


def test_one_backward_pass_for_all_and_one_for_each_give_the_same(tiny, tiny_vectors):
    """All three losses given the same kinds by name, which is the shared way told the long way round."""
    shared = replace(CONFIG, target_modules=["v", "down"])
    named = replace(CONFIG, target_modules={loss: ["v", "down"] for loss in ("cosine", "token", "kl")})
    material = prepare_data(tiny, tiny_vectors, TARGETS, shared, validation=TARGETS[:1], neutral=NEUTRAL)
    shaken(tiny)
    grads = [found_by(tiny, tiny_vectors, material, config)[1] for config in (shared, named)]
    assert_same(grads[0], {name: grad for name, grad in grads[1].items() if grad is not None}, 1e-6)


@pytest.mark.parametrize("prefix", ["memory", "disk"])
def test_the_prefix_changes_no_gradient_of_the_real_model(model, pairs, prefix):
    vectors = rtl.extract_vectors(model, pairs.sample(2), layers=[28])
    config = replace(CONFIG, layers=[28], trained_layers=[28, 29], target_modules=["v", "down"], prefix_cache=prefix)
    grads = []
    for each in (config, replace(config, prefix_cache="off")):
        material = prepare_data(model, vectors, TARGETS[:2], each, validation=TARGETS[:1], neutral=NEUTRAL[:1])
        assert material.first_block == (28 if each is config else 0)
        grads.append(found_by(model, vectors, material, each)[1])
    assert_same(grads[0], {name: grad for name, grad in grads[1].items() if grad is not None})
    assert not model.list_hooks()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_prefix_and_micro_batches_change_no_history(tiny, tiny_vectors, lora_rank):
    config = replace(CONFIG, layers=[1], trained_layers=[1], max_steps=5, batch_size=3, epochs=9, validate_every=2,
                     learning_rate=1e-3, lora_rank=lora_rank)  # fmt: skip
    ways = [{}, {"prefix_cache": "off"}, {"prefix_cache": "disk"}, {"micro_batch_size": 1}, {"micro_batch_size": 2}]
    deltas = [
        tune(tiny, tiny_vectors, TARGETS, replace(config, **way), validation=TARGETS[:2], neutral=NEUTRAL,
             progress=False)
        for way in ways
    ]  # fmt: skip
    first = deltas[0].history
    assert abs(first[0]["total"] - first[-1]["total"]) > 0.05
    for delta in deltas[1:]:
        for row, other in zip(first, delta.history, strict=True):
            assert {name: row[name] for name in ("step", "split")} == {name: other[name] for name in ("step", "split")}
            for name in ("total", "token", "cosine", "kl"):
                assert other[name] == pytest.approx(row[name], abs=1e-4), name


class Calls:
    """Counts how often hook points are called, and keeps the shape they saw last."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __call__(self, activation, hook) -> None:
        self.of[hook.name] = self.of.get(hook.name, 0) + 1
        self.shapes[hook.name] = tuple(activation.shape)


@pytest.mark.parametrize("prefix", ["memory", "disk", "off"])
def test_only_what_is_needed_is_run(make_tiny, tiny_vectors, prefix):
    """Of four blocks, 1 is the first trained one, and the cosine alone reads no further than its own block."""
    model = make_tiny(n_layers=4)
    config = replace(CONFIG, layers=[1], trained_layers=[1], prefix_cache=prefix)
    material = prepare_data(model, tiny_vectors, TARGETS, config, validation=TARGETS[:1], neutral=NEUTRAL)
    names = [f"blocks.{block}.hook_resid_pre" for block in range(4)]

    def called(config, rows, neutral) -> Calls:
        calls = Calls()
        with model.hooks(fwd_hooks=[(name, calls) for name in [*names, "unembed.hook_in", "ln_final.hook_normalized"]
                                    if name in model.hook_dict]):  # fmt: skip
            found_by(model, tiny_vectors, material, config, rows, neutral)
        return calls

    first = 0 if prefix == "off" else 1
    everything = called(config, material.train, [])
    assert [everything.of.get(name, 0) for name in names] == [int(block >= first) for block in range(4)]
    predicting = sum(int(row.predicts.sum()) for row in material.train)
    assert everything.shapes["ln_final.hook_normalized"] == (predicting, 1, 32)
    assert predicting < sum(len(row.tokens) for row in material.train)

    only_cosine = called(replace(config, token_weight=0.0), material.train, [])
    assert [only_cosine.of.get(name, 0) for name in names] == [int(first <= block <= 1) for block in range(4)]
    assert "ln_final.hook_normalized" not in only_cosine.of

    in_parts = called(replace(config, micro_batch_size=1), material.train, material.neutral)
    assert in_parts.of["blocks.1.hook_resid_pre"] == len(TARGETS) + len(NEUTRAL)


def test_a_ragged_batchs_losses_are_the_average_of_its_rows_by_positions(tiny, tiny_vectors):
    config = replace(CONFIG, prefix_cache="off")
    material = prepare_data(tiny, tiny_vectors, TARGETS, config, validation=TARGETS[:1], neutral=NEUTRAL)
    shaken(tiny)
    objective = Objective(tiny, resolve_targets(tiny, tiny_vectors, config), config, material, trained_by(tiny, config))
    whole = objective.values(material.train, material.neutral, [[]])
    assert len({len(row.tokens) for row in material.train}) == len(TARGETS)
    for loss, rows in (("cosine", material.train), ("token", material.train), ("kl", material.neutral)):
        counts = [int(row.predicts.sum()) for row in rows]
        each = [
            objective.values([], [row], [[]]) if loss == "kl" else objective.values([row], [], [[]]) for row in rows
        ]
        average = sum(n * found[loss] for n, found in zip(counts, each, strict=True)) / sum(counts)
        assert whole[loss] == pytest.approx(average, rel=1e-5)
        assert len({round(found[loss], 4) for found in each}) > 1


@pytest.mark.parametrize(
    ("positions", "read"),
    [
        ("response", lambda prompt, answer: range(prompt - 1, prompt + answer - 1)),
        ("last", lambda prompt, answer: [prompt - 1]),
        ("first", lambda prompt, answer: [0]),
        ("mean last 3", lambda prompt, answer: range(prompt - 3, prompt)),
        ("token -2", lambda prompt, answer: [prompt - 2]),
        ("mean prompt", lambda prompt, answer: range(prompt)),
        ("mean response", lambda prompt, answer: range(prompt, prompt + answer)),
        ("mean", lambda prompt, answer: range(prompt + answer)),
    ],
)
@pytest.mark.parametrize("centred", [True, False])
def test_positions_read_the_tokens_that_they_name(tiny, tiny_vectors, positions, read, centred):
    config = replace(CONFIG, layers=[1], direction="toward", positions=positions, centred=centred, kl_weight=0.0)
    material = prepare_data(tiny, tiny_vectors, TARGETS, config, validation=TARGETS[:1])
    losses, _ = found_by(tiny, tiny_vectors, material, config)
    name, activations = "blocks.1.hook_resid_post", []
    for target in TARGETS:
        prompt, answer = encode(tiny, target.prompt), answer_of(tiny, target)
        _, cache = tiny.run_with_cache(torch.tensor([prompt + answer]))
        activations.append(cache[name][0][list(read(len(prompt), len(answer)))])
    h = torch.cat(activations)
    cosine = cosine_similarity(h - h.mean(0) if centred else h, tiny_vectors[name][None])
    assert losses["cosine"] == pytest.approx(float((1 - cosine).mean()) / 2, rel=1e-5)


def test_vector_reads_where_the_vector_was_made_from(tiny, tiny_vectors):
    def cosine(vectors, positions) -> float:
        config = replace(CONFIG, layers=[1], positions=positions, kl_weight=0.0)
        material = prepare_data(tiny, vectors, TARGETS, config, validation=TARGETS[:1])
        return found_by(tiny, vectors, material, config)[0]["cosine"]

    for words, position in (
        ("last token", "last"), ("mean over the last 3 tokens", "mean last 3"), ("token 2 from the end", "token -2"),
    ):  # fmt: skip
        vectors = replace(tiny_vectors, provenance=replace(tiny_vectors.provenance, position=words))
        assert cosine(vectors, "vector") == cosine(vectors, position)
        assert cosine(vectors, "vector") != cosine(vectors, "response")
    own = replace(tiny_vectors, provenance=replace(tiny_vectors.provenance, position="my_function"))
    with pytest.raises(ValueError, match=r"positions.*'my_function'.*'response' or 'last'"):
        cosine(own, "vector")


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": [0], "trained_layers": [1]},
        {"layers": [1], "trained_layers": [1], "hook": "resid_pre"},
        {"layers": [1], "trained_layers": [1], "hook": "resid_mid", "target_modules": ["up", "down"]},
        {"layers": [0], "trained_layers": {"cosine": [1], "token": [0]}},
    ],
)
def test_a_cosine_that_no_trained_weight_moves_is_refused(tiny, tiny_vectors, provenance, settings):
    hooks = ("resid_post", "resid_pre", "resid_mid")
    vectors = SteeringVectors(
        {f"blocks.{layer}.hook_{hook}": torch.ones(32) for hook in hooks for layer in (0, 1)}, provenance
    )
    config = replace(CONFIG, kl_weight=0.0, **settings)
    with pytest.raises(
        ValueError, match=r"layers contains \d, but blocks.*before the first weight that the cosine loss trains"
    ):
        tune(tiny, vectors, TARGETS, config, progress=False)
    mended = replace(config, trained_layers=[0, 1], target_modules=TuneConfig().target_modules, max_steps=1)
    assert tune(tiny, vectors, TARGETS, mended, validation=TARGETS[:1], progress=False).changes


def test_the_activations_are_read_in_any_kind_of_block_output(tiny, provenance):
    """`hook` other than the default reads what run_with_cache calls so."""
    noise = torch.Generator().manual_seed(3)
    for hook in ("resid_mid", "mlp_out", "attn_out"):
        name = f"blocks.1.hook_{hook}"
        vectors = SteeringVectors({name: torch.randn(32, generator=noise)}, provenance)
        config = replace(CONFIG, layers=[1], trained_layers=[1], hook=hook, kl_weight=0.0, centred=False)
        material = prepare_data(tiny, vectors, TARGETS[:1], config, validation=TARGETS[:1])
        losses, _ = found_by(tiny, vectors, material, config)
        prompt, answer = encode(tiny, TARGETS[0].prompt), answer_of(tiny, TARGETS[0])
        _, cache = tiny.run_with_cache(torch.tensor([prompt + answer]))
        cosine = cosine_similarity(cache[name][0, len(prompt) - 1 : -1], vectors[name][None]).mean()
        assert losses["cosine"] == pytest.approx(float(1 + cosine) / 2, rel=1e-5)


def test_bfloat16_runs_near_float32_and_its_weights_stay_float32(tiny, tiny_vectors):
    config = replace(CONFIG, layers=[1], trained_layers=[1])
    material = prepare_data(tiny, tiny_vectors, TARGETS, config, validation=TARGETS[:1], neutral=NEUTRAL)
    shaken(tiny, first=1)
    full, grads = found_by(tiny, tiny_vectors, material, config)
    mixed, mixed_grads = found_by(tiny, tiny_vectors, material, replace(config, precision="bfloat16"))
    assert mixed != full
    for loss in ("cosine", "token", "kl"):
        assert mixed[loss] == pytest.approx(full[loss], rel=0.02, abs=0.002)
    assert_same(mixed_grads, {name: grad for name, grad in grads.items() if grad is not None}, 0.03)
    assert {grad.dtype for grad in mixed_grads.values() if grad is not None} == {torch.float32}
    delta = tune(
        tiny, tiny_vectors, TARGETS, replace(config, precision="bfloat16", max_steps=3, learning_rate=1e-6),
        validation=TARGETS[:1], neutral=NEUTRAL, progress=False,
    )  # fmt: skip
    for name, change in delta.changes.items():
        weight = parameters_of(tiny)[name]
        assert change.dtype == weight.dtype == torch.float32
        assert 0 < change.abs().max() < 1e-5 < weight.abs().max() / 256  # bfloat16 would round it away


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_without_a_gpu_auto_is_float32(tiny, tiny_vectors, precision):
    if torch.cuda.is_available():
        pytest.skip("auto may be bfloat16 here")
    config = replace(CONFIG, precision=precision, kl_weight=0.0)
    material = prepare_data(tiny, tiny_vectors, TARGETS, config, validation=TARGETS[:1])
    losses, _ = found_by(tiny, tiny_vectors, material, config)
    plain, _ = found_by(tiny, tiny_vectors, material, replace(config, precision="float32"))
    assert losses == plain


@pytest.mark.parametrize("micro_batch_size", [None, 1])
@pytest.mark.parametrize("prefix_cache", ["memory", "off"])
def test_in_mixed_precision_an_untouched_model_is_no_further_from_itself(
    tiny, tiny_vectors, prefix_cache, micro_batch_size
):
    config = replace(
        CONFIG, layers=[1], trained_layers=[1], precision="bfloat16", prefix_cache=prefix_cache,
        micro_batch_size=micro_batch_size,
    )  # fmt: skip
    with torch.no_grad():
        tiny.unembed.W_U *= 20  # a model that is sure of something, as trained ones are
    material = prepare_data(tiny, tiny_vectors, TARGETS, config, validation=TARGETS[:1], neutral=NEUTRAL)
    objective = Objective(tiny, resolve_targets(tiny, tiny_vectors, config), config, material, trained_by(tiny, config))
    for neutral in (material.neutral, material.neutral[1:]):
        assert 0 <= objective.values(material.held_out, neutral, [[]])["kl"] < 1e-6
    with torch.autocast("cpu", torch.bfloat16):  # whatever the caller has switched on
        again = prepare_data(tiny, tiny_vectors, TARGETS, config, validation=TARGETS[:1], neutral=NEUTRAL)
        assert objective.values(again.held_out, again.neutral, [[]])["kl"] < 1e-6
    rounded, _ = found_by(tiny, tiny_vectors, material, config)
    full, _ = found_by(tiny, tiny_vectors, material, replace(config, precision="float32"))
    assert rounded["token"] != full["token"] and rounded["cosine"] != full["cosine"]  # the rest is in mixed precision
    delta = tune(tiny, tiny_vectors, material, replace(config, max_steps=1), progress=False)
    assert delta.history[0]["split"] == "train" and 0 <= delta.history[0]["kl"] < 1e-6
