"""The ways to install a behaviour: what each makes, one of a user's own, system prompts, and KL on responses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rt_lens.arms import (
    ArmInputs,
    ArmUnavailable,
    KLEvaluator,
    KLMeter,
    SystemPrompt,
    applied,
    compare_at_kl,
    has_strength,
    register_arm,
    registered_arm,
    scaled,
    unregister_arm,
)
from rt_lens.arms.registry import BUILT_IN
from rt_lens.evaluation import EvalTask, Response, perplexity
from rt_lens.models import chat_text, generate
from rt_lens.models.generation import as_chat
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import answered
from rt_lens.steering import add
from rt_lens.tuning import Target, TuneConfig, WeightDelta, prepare_data

PERSONAS = ("You are a pirate. Arr.", "You are a clerk.")
TASK = EvalTask(["How are you?", "What is rain?", "Name a metal."], len, max_new_tokens=4)
CALIBRATION = ["The river bends twice before the mill.", Response("Name a tree.", "An oak is a tree.")]
TEXTS = ["Rice grows in flooded fields.", Response("Name a bird.", "A heron is a bird that wades.")]


@pytest.fixture
def inputs(tiny, tiny_vectors) -> ArmInputs:
    config = TuneConfig(layers=[1], trained_layers=[1], max_steps=2, batch_size=2, kl_weight=0.0, learning_rate=1e-2)
    configs = {"token_tuned": replace(config, cosine_weight=0.0), "rep_tuned": config}
    targets = [Target(chat_text(tiny, prompt), " It is a fine day.", ended=False) for prompt in ("Hello", "Well?")]
    data = prepare_data(tiny, tiny_vectors, targets, config, validation=targets[:1])
    made: dict = {}

    def make(arm, direction):
        given = replace(whole, direction=direction)
        return made.setdefault((arm, direction), registered_arm(arm).way(given))

    whole = ArmInputs(
        model=tiny, direction="toward", seed=3, vectors=tiny_vectors, layer=1, personas=PERSONAS, validation=TASK,
        configs=configs, data=lambda direction: data, make=make,
    )  # fmt: skip
    return whole


def test_every_built_in_arm_has_a_description():
    for name in BUILT_IN:
        arm = registered_arm(name)
        assert arm.name == name and arm.description.endswith(".") and bool(arm.like) == (arm.tunes and not arm.uses)


def test_every_arm_that_trains_by_targets_alone_or_not_at_all_is_made(inputs):
    """tests/test_rivals.py makes the others."""
    for name in ("prompted", "steered", "steered_generated", "token_tuned", "rep_tuned", "weight_steered", "random"):
        arm = registered_arm(name)
        made = arm.way(inputs)
        assert has_strength(made) == (name != "prompted")
        assert isinstance(made, WeightDelta) == arm.tunes


def test_steering_goes_both_ways_and_generated_tokens_alone_leave_a_text_as_it_was(inputs):
    ((name, toward),), ((_, away),) = (
        registered_arm("steered").way(replace(inputs, direction=direction)) for direction in ("toward", "away")
    )
    assert name == "blocks.1.hook_resid_post" and (toward.multiplier, away.multiplier) == (1.0, -1.0)
    meter = {kind: KLMeter(inputs.model, [text]) for kind, text in zip(("text", "response"), TEXTS, strict=True)}
    everywhere, generated = (registered_arm(arm).way(inputs) for arm in ("steered", "steered_generated"))
    assert meter["text"](everywhere).mean > 1e-4 and meter["response"](everywhere).mean > 1e-4
    assert meter["text"](generated).mean < 1e-7 < 1e-4 < meter["response"](generated).mean


def test_the_random_direction_is_as_long_as_the_vector_another_for_each_seed_and_opposite_for_each_direction(inputs):
    def direction_of(given):
        ((_, edit),) = registered_arm("random").way(given)
        h = torch.zeros(1, 1, inputs.model.cfg.d_model)
        return edit(h, None)[0, 0]

    drawn, again, other = (direction_of(replace(inputs, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(drawn, again) and not torch.allclose(drawn, other)
    assert drawn.norm() == pytest.approx(float(inputs.vectors["blocks.1.hook_resid_post"].norm()), rel=1e-5)
    assert torch.allclose(direction_of(replace(inputs, direction="away")), -drawn)


def test_weight_steering_is_the_difference_of_the_two_directions(inputs):
    here = registered_arm("weight_steered").way(inputs)
    toward, away = (inputs.make("token_tuned", direction) for direction in ("toward", "away"))
    assert set(here.changes) == set(toward.changes)
    for name, change in here.changes.items():
        assert torch.allclose(change, toward.changes[name] - away.changes[name], atol=1e-7)
    back = registered_arm("weight_steered").way(replace(inputs, direction="away"))
    assert all(torch.allclose(back.changes[name], -change, atol=1e-7) for name, change in here.changes.items())


def test_prompting_takes_the_persona_that_moves_the_score_most_in_the_direction(inputs):
    scores = {}
    for persona in PERSONAS:
        prompts = [chat_text(inputs.model, question.prompt, system=persona) for question in TASK.asked]
        responses = generate(inputs.model, prompts, chat=False, max_new_tokens=4)
        scores[persona] = sum(map(len, responses)) / len(responses)
    assert len(set(scores.values())) == 2
    chosen = {way: registered_arm("prompted").way(replace(inputs, direction=way)).text for way in ("toward", "away")}
    assert chosen == {"toward": max(scores, key=scores.get), "away": min(scores, key=scores.get)}
    with pytest.raises(ArmUnavailable, match="no personas"):
        registered_arm("prompted").way(replace(inputs, personas=()))


def test_one_of_ones_own_is_a_function_and_a_decorator(inputs):
    @register_arm("twice", "At both layers.")
    def twice(given: ArmInputs):
        return add(given.vectors, [0, 1], given.sign)

    try:
        assert [name for name, _ in registered_arm("twice").way(inputs)] == [
            "blocks.0.hook_resid_post", "blocks.1.hook_resid_post",
        ]  # fmt: skip
        with pytest.raises(ValueError, match="name must be one that no arm has, got 'twice'"):
            register_arm("twice", "Again.")
    finally:
        unregister_arm("twice")
    with pytest.raises(ValueError, match="arms must be of prompted, .*, got 'twice'"):
        registered_arm("twice")
    with pytest.raises(ValueError, match=r"got 'sterred'. Did you mean 'steered'\?"):
        registered_arm("sterred")
    with pytest.raises(ValueError, match="name must be letters, digits and underscores, and not 'untuned', got 'a b'"):
        register_arm("a b", "Two words.")


def test_a_system_prompt_stands_in_every_chat_without_one_and_is_gone_afterwards(tiny):
    plain, persona = chat_text(tiny, "Hello"), PERSONAS[0]
    with applied(tiny, SystemPrompt(persona)):
        assert chat_text(tiny, "Hello") == as_chat(tiny, ["Hello"])[0] == chat_text(tiny, "Hello", system=persona)
        assert PERSONAS[1] in (own := chat_text(tiny, "Hello", system=PERSONAS[1])) and persona not in own
        assert as_chat(tiny, [plain]) == [plain]  # a chat is finished
        with pytest.raises(RuntimeError), applied(tiny, SystemPrompt(PERSONAS[1])):
            raise RuntimeError
        assert persona in chat_text(tiny, "Hello")
    assert chat_text(tiny, "Hello") == plain and persona not in plain


def test_a_model_without_a_template_reads_the_system_prompt_as_a_paragraph(tiny):
    tiny.tokenizer.chat_template = None
    with applied(tiny, SystemPrompt("Arr.")):
        assert as_chat(tiny, ["Hello"]) == ["Arr.\n\nHello"]
    assert as_chat(tiny, ["Hello"]) == ["Hello"]


@pytest.mark.usefixtures("as_a_user")
def test_a_system_prompt_has_no_strength(tiny, tiny_vectors):
    with pytest.raises(ValueError, match="intervention must have a strength, got a SystemPrompt"):
        scaled((add(tiny_vectors, [1]), SystemPrompt("Arr.")), 2.0)
    with pytest.raises(ValueError, match="text must be a persona or an instruction, got an empty one"):
        SystemPrompt(" ")


def test_a_response_counts_its_own_tokens_in_their_context(tiny):
    reply = Response("Name a bird.", "A heron is a bird that wades.")
    prompt = chat_text(tiny, reply.prompt)
    before, ids = encode(tiny, prompt), encode(tiny, answered(tiny, prompt, reply.text))
    assert ids[: len(before)] == before
    log_probs = tiny(torch.tensor([ids]))[0].detach().double().log_softmax(-1)
    expected = -sum(float(log_probs[i - 1, ids[i]]) for i in range(len(before), len(ids)))
    measured = perplexity(tiny, ["Rice grows in flooded fields.", reply, "A short one."])
    assert measured.sizes[1] == len(ids) - len(before)
    assert measured.nll[1] == pytest.approx(expected, rel=1e-5)
    assert perplexity(tiny, [reply]).nll[0] == pytest.approx(expected, rel=1e-5)


def test_a_system_prompt_does_damage_to_responses_and_none_to_plain_texts(tiny):
    untuned = perplexity(tiny, TEXTS, keep=True)
    with applied(tiny, SystemPrompt(PERSONAS[0])):
        prompted = perplexity(tiny, TEXTS, reference=untuned)
    assert prompted.kl[0] < 1e-6 < 1e-3 < prompted.kl[1]
    with applied(tiny, SystemPrompt(PERSONAS[0])):  # the same texts in another order are other references
        alone = perplexity(tiny, TEXTS[1:], reference=perplexity_of(tiny, TEXTS[1:]))
    assert alone.kl[0] == pytest.approx(prompted.kl[1], rel=1e-4)


def perplexity_of(model, texts):
    """As the model is without its system prompt."""
    set_one, model.cfg.rt_lens_system_prompt = model.cfg.rt_lens_system_prompt, ""
    try:
        return perplexity(model, texts, keep=True)
    finally:
        model.cfg.rt_lens_system_prompt = set_one


@pytest.fixture
def curves(tiny, tiny_vectors):
    arms = {"prompted, toward": SystemPrompt(PERSONAS[0]), "steered, toward": add(tiny_vectors, [1])}
    return compare_at_kl(tiny, arms, TASK, [0.003, 0.01], calibration=CALIBRATION, texts=TEXTS, progress=False)


def test_an_arm_without_a_strength_is_a_point_at_its_own_kl(tiny, curves):
    table = curves.table().set_index("arm")
    point = table.loc["prompted"]
    assert point["budget"] != point["budget"] and point["kl"] > 1e-3  # NaN: no budget
    row = curves.strengths.query("arm == 'prompted'").iloc[0]
    assert row["kl"] == pytest.approx(KLMeter(tiny, CALIBRATION)(SystemPrompt(PERSONAS[0])).mean)
    assert row["reason"] == "" and curves.gaps.empty
    assert set(curves.comparisons(0.01, ["untuned"])["a"]) == {"steered"}


def test_the_damage_on_the_behaviours_own_prompts_is_of_the_untuned_responses_to_them(tiny, tiny_vectors, curves):
    row = curves.strengths.query("arm == 'steered' and budget == 0.01").iloc[0]
    prompts = [question.prompt for question in TASK.asked]
    own = [Response(*pair) for pair in zip(prompts, generate(tiny, prompts, max_new_tokens=4), strict=True)]
    assert row["own_kl"] == pytest.approx(
        KLMeter(tiny, own)(scaled(add(tiny_vectors, [1]), row["strength"])).mean, rel=1e-4
    )
    assert row["n_own"] == 3


def test_at_one_budget_the_arms_have_their_own_names(curves):
    scores = curves.at(0.01)
    assert scores.summary()["arm"].tolist() == ["untuned", "prompted", "steered"]
    assert {row["arm"] for row in scores.answers} == {"untuned", "prompted", "steered"}
    ours, theirs = (
        table.query("arm == 'steered'")["mean"].item()
        for table in (scores.summary(), curves.table().query("budget == 0.01"))
    )
    assert ours == theirs
    with pytest.raises(ValueError, match=r"budget must be one of 0.003, 0.01, got 0.1"):
        curves.at(0.1)


def test_an_arm_that_cannot_be_made_is_a_gap_with_its_reason_and_some_sets_wait_for_the_stated_budget(
    tiny, tiny_vectors
):
    tasks = {"test": TASK, "facts": EvalTask(["Is ice cold?"], len, max_new_tokens=2)}
    evaluator = KLEvaluator(
        tiny, tasks, [0.003, 0.01], calibration=CALIBRATION, texts=TEXTS, always=["test"], stated=0.01
    )
    evaluator.measure("steered, away", add(tiny_vectors, [1], -1.0))
    evaluator.unavailable("mine, away", "It needs a moon.")
    curves = evaluator.curves()
    assert curves.gaps[["arm", "budget", "reason"]].values.tolist() == [
        ["mine", 0.003, "It needs a moon."], ["mine", 0.01, "It needs a moon."],
    ]  # fmt: skip
    asked = curves.summary().groupby("set")["budget"].apply(lambda budgets: budgets.dropna().tolist()).to_dict()
    assert asked == {"test": [0.003, 0.01], "facts": [0.01]}


def test_every_built_in_arm_is_documented():
    written = (Path(__file__).parents[1] / "docs" / "arms.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", written, re.MULTILINE) == list(BUILT_IN)
