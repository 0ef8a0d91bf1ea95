"""Whatever holds texts in order will do wherever a list does; what is no text is refused by its number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import rt_lens as rtl
from rt_lens.arms.comparison import ArmEvaluator, EvalTask
from rt_lens.common.inputs import text_list
from rt_lens.evaluation.tasks import LogitDifference
from rt_lens.models.activations import last_token_activations
from rt_lens.models.tokens.batches import batches
from rt_lens.tuning.targets import write_neutral

TEXTS = ["How was your day?", "Tell me about music.", "What do rivers do?"]
COLUMN = pd.Series(TEXTS, index=[7, 7, 3])  # an index that is neither unique nor in order
HELD: dict[str, Callable[[], Any]] = {
    "tuple": lambda: tuple(TEXTS),
    "Series": lambda: COLUMN,
    "categories": lambda: COLUMN.astype("category"),
    "array of objects": lambda: np.array(TEXTS, dtype=object),
    "array of strings": lambda: np.array(TEXTS),
    "Index": lambda: pd.Index(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "keys": lambda: dict.fromkeys(TEXTS).keys(),
}


@pytest.mark.parametrize("held", HELD)
def test_texts_are_listed_from_whatever_holds_them(held):
    listed = text_list(HELD[held]())
    assert listed == TEXTS
    assert {type(text) for text in listed} == {str}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("Hi.", r"got a str\. Wrap it in a list: \['\.\.\.'\]"),
        (b"Hi.", r"got a bytes"),
        ([], r"at least one text, got an empty one"),
        (pd.Series([], dtype=object), r"got an empty one"),
        (None, r"got a NoneType"),
        (3, r"got a int"),
        (pd.DataFrame({"prompt": TEXTS}), r"got a DataFrame of 2 dimensions\. Give one column of it"),
        (np.array([TEXTS]), r"got a ndarray of 2 dimensions"),
        (np.array("Hi."), r"got a ndarray of 0 dimensions"),
        ({"a": "Hi."}, r"got a dict"),
        ({"Hi."}, r"got a set"),
        (
            ["Hi.", float("nan")],
            r"got nan at index 1\. Leave empty cells out \(dropna in pandas\)",
        ),
        (pd.Series(["Hi.", None, "Ho."]), r"got (None|nan) at index 1"),
        (pd.Series(["Hi.", pd.NA], dtype="string"), r"got <NA> at index 1"),
        (["Hi.", 3], r"got 3 at index 1"),
        (["Hi.", ["Ho."]], r"got \['Ho\.'\] at index 1"),
        (["Hi.", b"Ho."], r"got b'Ho\.' at index 1"),
        (["Hi.", " \n"], r"got an empty one at index 1.*Leave it out"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_what_is_no_list_of_texts_is_refused_by_argument_number_and_fix(given, says):
    with pytest.raises(ValueError, match=rf"^holds must be a list of .*{says}"):
        text_list(given, "holds")


def test_empty_texts_and_no_text_pass_where_they_make_sense():
    assert text_list(["", "a"], blank=True) == ["", "a"]
    assert text_list(pd.Series([], dtype=object), none=True) == []


# At every front door

SUMS = ["What is 1 + 1?", "Add 2 and 2.", "3 + 4?", "5 + 5?"]
POST = "blocks.0.hook_resid_post"
CALLS: dict[str, Callable[..., Any]] = {
    "generate": lambda m, v, t: rtl.generate(m, t, max_new_tokens=3),
    "generate as they are": lambda m, v, t: rtl.generate(m, t, chat=False, max_new_tokens=3),
    "evaluate": lambda m, v, t: rtl.evaluate(m, t, max_new_tokens=3).scores,
    "perplexity": lambda m, v, t: rtl.evaluation.perplexity(m, t).nll.tolist(),
    "batches": lambda m, v, t: [batch.tokens.tolist() for batch in batches(m, t, 2)],
    "activations": lambda m, v, t: last_token_activations(m, t, [POST])[POST].tolist(),
    "sweep": lambda m, v, t: rtl.sweep(
        m, v, LogitDifference(t, " a", " b"), layers=[0], multipliers=[0, 1], progress=False
    ).table.to_dict(),
    "resistance": lambda m, v, t: rtl.arms.resistance(
        m, {"a": None, "b": None}, v, EvalTask(t, len, 2), layer=0, multipliers=[-1, 1], progress=False
    ).scores.to_dict(),
    "mean_projections": lambda m, v, t: rtl.arms.mean_projections(m, v, t).to_dict(),
    "norms": lambda m, v, t: rtl.vectors.norms(m, v, t).to_dict(),
    "projection_changes": lambda m, v, t: rtl.arms.projection_changes(m, v, t, {"a": None}).to_dict(),
    "residual_shifts": lambda m, v, t: rtl.arms.residual_shifts(m, {"a": rtl.add(v, [0], 1.0)}, t, v).along.to_dict(),
    "covariate_vectors": lambda m, v, t: rtl.vectors.covariate_vectors(m, t, layers=[0])[POST].tolist(),
    "fit_condition": lambda m, v, t: rtl.steering.fit_condition(m, t, SUMS, layer=0).threshold,
    "exam": lambda m, v, t: [question.prompt for question in EvalTask(t).questions],
    "texts of arms": lambda m, v, t: ArmEvaluator(m, {"a": EvalTask(["Hi."], max_new_tokens=1)}, t).texts,
    "write_neutral": lambda m, v, t: [target.answer for target in write_neutral(m, t, rtl.TuneConfig(target_tokens=3))],
}


@pytest.mark.parametrize("call", CALLS)
def test_a_column_and_a_generator_give_what_the_list_gives(tiny, tiny_vectors, call):
    texts = [*TEXTS, "Say something about bread.", "And of the sea, please, all that you know?"]
    usual = CALLS[call](tiny, tiny_vectors, texts)
    frame = pd.DataFrame({"prompt": texts}, index=[4, 4, 0, 1, 2])
    for given in (frame["prompt"], frame["prompt"].to_numpy(dtype=object), (text for text in texts)):
        assert str(CALLS[call](tiny, tiny_vectors, given)) == str(usual)  # str, since NaN is not equal to itself


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("as_a_user")
def test_an_empty_cell_and_one_string_are_refused_at_every_door(tiny, tiny_vectors, call):
    for given, says in (([*TEXTS, "a", float("nan")], "got nan at index 4"), ("Hi.", "got a str"),
                        (pd.DataFrame({"prompt": TEXTS}), "got a DataFrame")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^(prompts|texts|questions|positive) must be a list of .*{says}"):
            CALLS[call](tiny, tiny_vectors, given)


def test_a_message_of_nothing_is_refused_and_a_text_of_nothing_only_where_it_has_no_token(tiny):
    with pytest.raises(ValueError, match=r"prompts must be a list of texts, got an empty one at index 1"):
        rtl.generate(tiny, ["Hi.", ""])
    with pytest.raises(ValueError, match=r"prompt must be a string, got an empty one"):
        next(rtl.stream(tiny, " "))
    with pytest.raises(ValueError, match=r"prompts must have at least one token each, got none at index 1"):
        rtl.generate(tiny, ["Hi.", ""], chat=False)


@pytest.mark.usefixtures("as_a_user")
def test_neutral_prompts_may_be_a_column_and_hold_no_empty_cell(tiny, tiny_vectors, pairs):
    config = rtl.TuneConfig(layers=[0], trained_layers=[0], max_steps=1, n_targets=4, target_tokens=3, kl_weight=1.0)
    deltas = [
        rtl.tune(tiny, tiny_vectors, pairs, config, neutral=neutral, progress=False)
        for neutral in (TEXTS, COLUMN, iter(TEXTS))
    ]
    for delta in deltas[1:]:
        assert all(torch.equal(delta.changes[name], change) for name, change in deltas[0].changes.items())
    for neutral, says in ((["Hi.", float("nan")], "got nan at index 1"), ("Hi.", "got a str")):
        with pytest.raises(ValueError, match=rf"neutral must be a list of .*{says}"):
            rtl.tune(tiny, tiny_vectors, pairs, config, neutral=neutral, progress=False)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, v: rtl.token_projections(m, v, float("nan")), "text must be a string, got nan"),
        (lambda m, v: rtl.token_projections(m, v, ["Hi."]), r"text must be a string, got \['Hi\.'\]"),
        (lambda m, v: next(rtl.stream(m, None)), "prompt must be a string, got None"),
        (lambda m, v: rtl.data.Question(float("nan")), "prompt must be a string, got nan"),
        (lambda m, v: rtl.data.Question("Hi.", right=(float("nan"),)), "must be texts, got"),
    ],
)
def test_one_text_is_refused_if_it_is_none(tiny, tiny_vectors, call, says):
    with pytest.raises(ValueError, match=says):
        call(tiny, tiny_vectors)
