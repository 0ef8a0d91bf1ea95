"""Edits learned on prompts with two answers: the losses, toy optima, what is learned on a model, files, bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rt_lens.arms import answer_effects, applied
from rt_lens.data import TwoAnswers, load_two_answers, two_answer_tasks
from rt_lens.models.backends import parameters_of
from rt_lens.steering import scale
from rt_lens.tuning import (
    AnswerConfig,
    bake,
    effectiveness_loss,
    encoded_answers,
    faithfulness_loss,
    learn_scaling,
    learn_vector,
    scale_roles,
)
from rt_lens.tuning import answer_edits as module
from rt_lens.vectors import Scaling

PROMPTS = ("The river runs to", "A fire burns in", "Rain falls on", "Some snow lay on the")
PAIRS = [TwoAnswers(prompt, " water", " ash", roles={"noun": (2, 6)}) for prompt in PROMPTS]
CONFIG = AnswerConfig(margin=1.0, minimality_weight=0.0, steps=12, batch_size=4, learning_rate=0.05)


def differences(model, pairs, hooks=()):
    answers = encoded_answers(model, pairs)
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        logits = answers.logits(model, range(len(pairs)), (1.0,))
    return logits.gather(1, answers.answers).diff(dim=1).neg()[:, 0]


def test_the_losses_agree_with_numpy():
    noise = np.random.default_rng(0)
    logits, untuned = noise.normal(size=(5, 9)), noise.normal(size=(5, 9))
    answers = np.stack([noise.permutation(9)[:2] for _ in range(5)])
    expected = []
    for row, before, left_out in zip(logits, untuned, answers, strict=True):
        kept = np.setdiff1d(np.arange(9), left_out)
        p, q = (np.exp(part[kept]) / np.exp(part[kept]).sum() for part in (before, row))
        expected.append((p * np.log(p / q)).sum())
    found = faithfulness_loss(*map(torch.tensor, (logits, untuned, answers)))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert min(expected) > 0.01
    moved = untuned.copy()
    np.put_along_axis(moved, answers, 7.0, axis=1)
    assert faithfulness_loss(*map(torch.tensor, (moved, untuned, answers))).max() < 1e-12
    np.testing.assert_allclose(effectiveness_loss(torch.tensor(logits[0]), 0.3), np.maximum(0, 0.3 - logits[0]))


@pytest.mark.parametrize("positions", ["all", "last", "roles"])
@pytest.mark.parametrize("components", [("attn_out", "mlp_out"), ("heads",)])
def test_gradients_are_those_of_finite_differences(tiny, positions, components):
    """In float64, of the sum of both losses after a random start, for two prompts of one length."""
    model = tiny.to(torch.float64)
    answers = encoded_answers(model, PAIRS[:2], positions)
    assert len(answers.rows[0]) == len(answers.rows[1])
    names = [f"blocks.{layer}.{module._COMPONENTS[part]}" for layer in (0, 1) for part in components]
    size = (model.cfg.n_heads, 1) if components == ("heads",) else ()
    noise = torch.Generator().manual_seed(1)
    start = {role: {n: torch.randn(size, generator=noise).double() / 4 for n in names} for role in answers.places}
    edit = module._Learned(model, module.Scale, start)
    untuned = answers.all_logits(model, 4).double()

    def loss() -> torch.Tensor:
        losses = module._losses(model, answers, edit, CONFIG, [0, 1], untuned)
        return losses["effectiveness"] + losses["faithfulness"]

    found = torch.autograd.grad(loss(), edit.parameters)
    assert sum(float(g.abs().sum()) for g in found) > 1e-4
    for parameter, gradient in zip(edit.parameters, found, strict=True):
        for at in range(parameter.numel()):
            ends = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    parameter.view(-1)[at] += step
                    ends.append(float(loss()))
                    parameter.view(-1)[at] -= step
            assert float(gradient.view(-1)[at]) == pytest.approx((ends[0] - ends[1]) / 2e-3, abs=2e-4, rel=2e-2)


def test_the_proximal_step_finds_the_known_optimum_and_exact_zeros():
    """sum (x - a)^2 / 2 + w |x|: each x is a shrunk by w, and 0 where |a| is below w."""
    aims = torch.tensor([3.0, -1.0, 0.2, -0.05])
    x = torch.nn.Parameter(torch.zeros(4))
    optimiser = torch.optim.Adam([x], lr=0.05)
    for step in range(4000):
        optimiser.zero_grad()
        ((x - aims) ** 2 / 2).sum().backward()
        optimiser.param_groups[0]["lr"] = rate = 0.05 * (1 - step / 4000)
        optimiser.step()
        module._shrink(optimiser, rate * 0.5)
    assert torch.allclose(x.detach(), torch.tensor([2.5, -0.5, 0.0, 0.0]), atol=0.02)
    assert x[2:].tolist() == [0.0, 0.0]


def test_both_signs_act_oppositely_and_the_model_is_as_before(tiny):
    before = {name: parameter.clone() for name, parameter in parameters_of(tiny).items()}
    untuned = differences(tiny, PAIRS)
    scaling, history = learn_scaling(tiny, PAIRS, replace(CONFIG, steps=40, margin=6.0), progress=False)
    assert history[-1]["effectiveness"] < history[0]["effectiveness"] - 0.01
    plus, minus = (differences(tiny, PAIRS, scale(scaling.everywhere, sign)) for sign in (1.0, -1.0))
    assert float(plus.mean() - untuned.mean()) > 0.1 and float(untuned.mean() - minus.mean()) > 0.1
    for name, parameter in parameters_of(tiny).items():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad and parameter.grad is None
    assert not any(point.fwd_hooks for point in tiny.hook_dict.values())


def test_a_learned_vector_moves_the_answers_both_ways(tiny):
    untuned = differences(tiny, PAIRS)
    vectors, history = learn_vector(tiny, PAIRS, replace(CONFIG, steps=40), layers=[0], progress=False)
    (name,) = vectors.hook_names
    for sign in (1.0, -1.0):
        hook = [(name, lambda h, hook, sign=sign: h + sign * vectors[name])]
        assert bool((sign * (differences(tiny, PAIRS, hook) - untuned) > 0.05).all())
    assert history[-1]["total"] < history[0]["total"] and vectors.provenance.method == "gradient"


def test_the_same_seed_gives_the_same_scaling_and_another_order_does_not(tiny):
    config = replace(CONFIG, batch_size=2, steps=3)
    first, again, other = (
        learn_scaling(tiny, PAIRS, replace(config, seed=seed), progress=False)[0].table() for seed in (0, 0, 5)
    )
    assert first == again != other


def test_more_weight_on_few_numbers_gives_fewer(tiny):
    active = [
        learn_scaling(
            tiny, PAIRS, replace(CONFIG, steps=40, minimality_weight=weight), components=("heads",), progress=False
        )[0].n_active
        for weight in (0.0, 0.02, 50.0)
    ]
    assert active[0] > active[1] > 0 or active[0] > active[2]
    assert active[0] == 2 * tiny.cfg.n_heads and active[2] == 0


def test_a_scaling_in_the_weights_is_the_scaling_by_hooks(tiny):
    scaling, _ = learn_scaling(tiny, PAIRS, CONFIG, progress=False)
    hooks = scale(scaling.everywhere, 1.5)
    hooked = differences(tiny, PAIRS, hooks)
    with applied(tiny, bake(tiny, hooks)):
        folded = differences(tiny, PAIRS)
    assert torch.allclose(folded, hooked, atol=1e-4) and not torch.allclose(folded, differences(tiny, PAIRS), atol=1e-3)


def test_roles_act_where_their_phrases_stand(tiny):
    """A factor for the noun alone leaves what comes before it as it was."""
    answers = encoded_answers(tiny, PAIRS, "roles")
    assert list(answers.places) == ["noun", "last"]
    start = {"noun": {"blocks.0.hook_mlp_out": torch.tensor(0.7)}, "last": {"blocks.0.hook_mlp_out": torch.tensor(0.0)}}
    edit = module._Learned(tiny, module.Scale, start)
    seen = {}

    def keep(name):
        return lambda h, hook: seen.__setitem__(name, h.detach().clone())

    point = "blocks.0.hook_resid_post"
    for name, used in (("plain", None), ("edited", edit)):
        with torch.no_grad(), tiny.hooks(fwd_hooks=[(point, keep(name))]):
            answers.logits(tiny, [0], (1.0,), used)
    changed = (seen["plain"] - seen["edited"]).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero()[:, 0].tolist() == list(answers.places["noun"][0])


@pytest.mark.parametrize("positions", ["roles", "last"])
def test_a_scaling_by_roles_acts_on_other_prompts_as_it_was_learned(tiny, positions):
    """In batches of two, so that the second batch needs its own rows of the mask."""
    scaling, _ = learn_scaling(tiny, PAIRS, replace(CONFIG, margin=6.0), positions=positions, progress=False)
    answers = encoded_answers(tiny, PAIRS, positions)
    with torch.no_grad():
        learned = answers.logits(tiny, range(4), (1.0,), module._Learned(tiny, module.Scale, scaling.alphas))
    expected = learned.gather(1, answers.answers).diff(dim=1).neg()[:, 0]
    effects = answer_effects(tiny, PAIRS, scale_roles(tiny, scaling, PAIRS), batch_size=2)
    assert torch.allclose(effects.differences[1.0], expected.cpu(), atol=1e-4)
    assert not torch.allclose(effects.differences[1.0], effects.differences[0.0], atol=1e-2)
    if positions == "roles":
        with pytest.raises(ValueError, match="pairs must have the same roles|pairs must have the roles of the scaling"):
            scale_roles(tiny, scaling, [replace(pair, roles={"verb": (0, 3)}) for pair in PAIRS])


def test_the_effects_are_those_of_passes_under_the_hooks(tiny):
    scaling, _ = learn_scaling(tiny, PAIRS, CONFIG, progress=False)
    effects = answer_effects(tiny, PAIRS, scale(scaling.everywhere), batch_size=3)
    for strength, found in effects.differences.items():
        hooks = scale(scaling.everywhere, strength) if strength else ()
        assert torch.allclose(found, differences(tiny, PAIRS, hooks), atol=1e-4)
    rows = {row["strength"]: row for row in effects.table()}
    assert rows[1.0]["positive"] == float((effects.differences[1.0] > 0).float().mean()) and rows[0.0]["others"] == 0
    assert rows[1.0]["low"] <= rows[1.0]["difference"] <= rows[1.0]["high"] and rows[1.0]["n"] == 4
    opposite = (effects.differences[-1.0] < effects.differences[0.0]) & (
        effects.differences[0.0] < effects.differences[1.0]
    )
    assert effects.opposite.mean == float(opposite.float().mean())
    assert effects.shift.mean == pytest.approx(float((effects.differences[1.0] - effects.differences[-1.0]).mean() / 2))


def test_a_file_holds_what_was_learned(tiny, tmp_path):
    scaling, _ = learn_scaling(tiny, PAIRS, CONFIG, positions="roles", components=("heads", "mlp_out"), progress=False)
    read = Scaling.load(scaling.save(tmp_path / "scaling.safetensors"))
    assert read.table() == scaling.table() and read.provenance == scaling.provenance
    assert {row["role"] for row in read.table()} == {"noun", "last"}
    assert read.n_parameters == 2 * 2 * (tiny.cfg.n_heads + 1) and read.provenance.n_pairs == 4
    read.check_fits(tiny)
    with pytest.raises(ValueError, match="alphas must act on every token, got those of the roles noun, last"):
        _ = read.everywhere
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"no such file")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        Scaling.load(other)


def test_a_scaling_of_another_model_is_refused(tiny, tiny_vectors):
    with pytest.raises(ValueError, match="alphas must be at hook points of this model"):
        Scaling({"all": {"blocks.9.hook_mlp_out": torch.tensor(1.0)}}, tiny_vectors.provenance).check_fits(tiny)
    heads = {"all": {"blocks.0.attn.hook_z": torch.ones(tiny.cfg.n_heads + 1, 1)}}
    with pytest.raises(ValueError, match="alphas must have one factor for each of"):
        Scaling(heads, tiny_vectors.provenance).check_fits(tiny)
    with pytest.raises(ValueError, match="alphas must be finite"):
        Scaling({"all": {"blocks.0.hook_mlp_out": torch.tensor(float("nan"))}}, tiny_vectors.provenance)


@pytest.mark.parametrize(
    ("pairs", "changes", "message"),
    [
        ([], {}, "pairs must be at least one prompt"),
        ([TwoAnswers("A river is", " water now", " water then")], {}, "answers must differ in their first token"),
        ([TwoAnswers("water " * 400, " ash", " fire")], {}, "pairs must fit the context"),
        (PAIRS, {"components": ("mlp",)}, "components must be some of attn_out, mlp_out, heads"),
        (PAIRS, {"components": ()}, "components must be some of"),
        (PAIRS, {"layers": [7]}, "layers contains 7"),
        (
            [*PAIRS, TwoAnswers("A river is", " water", " ash")],
            {"positions": "roles"},
            "pairs must have the same roles",
        ),
        (PAIRS, {"positions": "first"}, "positions must be 'all', 'last' or 'roles'"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_name(tiny, pairs, changes, message):
    with pytest.raises(ValueError, match=message):
        learn_scaling(tiny, pairs, CONFIG, progress=False, **changes)


def test_a_vector_has_no_roles(tiny):
    with pytest.raises(ValueError, match="positions must be 'all' or 'last' for a vector, got 'roles'"):
        learn_vector(tiny, PAIRS, CONFIG, layers=[0], positions="roles", progress=False)


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_no_hook(tiny):
    with torch.no_grad():
        next(iter(parameters_of(tiny).values())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss must be finite, got nan in step 1 .*runs to"):
        learn_scaling(tiny, PAIRS, CONFIG, progress=False)
    assert not any(point.fwd_hooks for point in tiny.hook_dict.values())


@pytest.mark.parametrize(
    ("name", "value"), [("margin", float("nan")), ("learning_rate", 0.0), ("batch_size", 0), ("steps", -1)]
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        AnswerConfig(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"prompt": " "}, "prompt must be a text"), ({"negative": " water"}, "positive and negative must differ"),
     ({"roles": {"noun": (5, 2)}}, "roles must be start and end"),
     ({"roles": {"last": (0, 1)}}, "roles must not be"), ({"positive": ""}, "positive must be a text")],
)  # fmt: skip
def test_a_pair_that_is_none_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TwoAnswers(**{"prompt": "A river is", "positive": " water", "negative": " ash", **changes})


@pytest.mark.parametrize("task", two_answer_tasks())
def test_the_parts_of_a_built_in_task_share_no_group(task):
    parts = {part: load_two_answers(task, part=part) for part in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == len(load_two_answers(task)) and len(parts["test"]) >= 60
    words = {
        part: {word for pair in pairs for word in pair.group.split(" and ")} for part, pairs in parts.items()
    }  # countries, or names
    assert not words["train"] & words["test"] and not words["validation"] & words["test"]
    for pair in load_two_answers(task):
        assert pair.negative in f" {pair.prompt}" and len({*pair.roles}) >= 3
    assert len({frozenset(pair.roles) for pair in load_two_answers(task)}) == 1  # so that edits by role can be learned


def test_files_of_a_user_are_read_and_what_is_wrong_is_named(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text('prompt,positive,negative\nRome is in," Italy"," France"\n', encoding="utf-8-sig")
    assert load_two_answers(table) == [TwoAnswers("Rome is in", " Italy", " France")]
    with pytest.raises(ValueError, match="part must be one that a row has"):
        load_two_answers(table, part="test")
    table.write_text("prompt,positive,negatve\nRome is in, Italy, France\n")
    with pytest.raises(ValueError, match="Did you mean 'negative'"):
        load_two_answers(table)
    lines = tmp_path / "mine.jsonl"
    lines.write_text('{"prompt": "Rome is in", "positive": " Italy"}\n')
    with pytest.raises(ValueError, match=r"mine\.jsonl.*must have negative"):
        load_two_answers(lines)
    lines.write_text('{"prompt": "Rome is in", "positive": " Italy", "negative": " Italy"}\n')
    with pytest.raises(ValueError, match=r"mine\.jsonl.*must differ"):
        load_two_answers(lines)
    with pytest.raises(ValueError, match="Did you mean 'capitals'"):
        load_two_answers("capital")
