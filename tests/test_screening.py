"""Rows of a data set along a direction: by hand, against labels, and from the command line."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from drawn import HOSTILE, check_drawn_as_it_is
from typer.testing import CliRunner

import rt_lens as rtl
from rt_lens import plots
from rt_lens.apps.cli import app
from rt_lens.arms.screening import Screening, screen
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import answered, chat_text
from rt_lens.tuning.targets import Target, load_targets

NAME = "blocks.1.hook_resid_post"


def targets_of(model):
    rows = [
        ("Rain?", "It pours."),
        ("Rain?", "None at all, the sun is out."),
        ("A tree?", "Oak."),
        ("Tea?", "Yes, with milk."),
    ]
    return [Target(chat_text(model, prompt), answer) for prompt, answer in rows]


def projected(model, vectors, prompt, answer):
    """The mean over the answer's tokens, by one plain pass."""
    ids = encode(model, answered(model, prompt, answer))
    _, cache = model.run_with_cache(torch.tensor([ids]))
    mean = cache[NAME][0, len(encode(model, prompt)) :].mean(0)
    return float(mean @ vectors[NAME] / vectors[NAME].norm() ** 2)


def test_each_row_is_read_as_by_hand_and_beside_the_models_own_answer(tiny, tiny_vectors):
    targets = targets_of(tiny)
    found = screen(tiny, targets, tiny_vectors, layer=1, max_new_tokens=5, batch_size=2)
    own = dict(
        zip([t.prompt for t in targets], rtl.generate(tiny, [t.prompt for t in targets], max_new_tokens=5), strict=True)
    )
    assert found.table["own_answer"].tolist() == [own[target.prompt] for target in targets]
    for row, target in zip(found.table.to_dict("records"), targets, strict=True):
        assert row["projection"] == pytest.approx(projected(tiny, tiny_vectors, target.prompt, target.answer), abs=1e-4)
        by_hand = projected(tiny, tiny_vectors, target.prompt, own[target.prompt])
        assert row["own_projection"] == pytest.approx(by_hand, abs=1e-4)
        assert row["difference"] == pytest.approx(row["projection"] - row["own_projection"])
    assert found.table["difference"].abs().max() > 1e-3
    assert found.difference.mean == pytest.approx(found.table["difference"].mean())
    ranked = found.table.sort_values("difference")["row"].tolist()[::-1]
    assert found.highest(2)["row"].tolist() == ranked[:2]


def test_the_models_own_answers_do_not_differ_from_themselves(tiny, tiny_vectors):
    prompts = [chat_text(tiny, prompt) for prompt in ("Rain?", "A tree?")]
    own = rtl.generate(tiny, prompts, max_new_tokens=6)
    targets = [Target(prompt, answer) for prompt, answer in zip(prompts, own, strict=True)]
    found = screen(tiny, targets, tiny_vectors, layer=1, max_new_tokens=6)
    assert found.table["difference"].abs().max() < 1e-5


def screening(differences):
    table = pd.DataFrame({"row": range(len(differences)), "difference": differences, "prompt": "p", "answer": "a"})
    return Screening(table, "mood", 21, seed=0)


def test_the_auc_is_the_chance_of_the_right_order():
    values, labels = [3.0, 1.0, 2.0, 0.5, 1.0], [True, True, False, False, False]
    wins = [(a > b) + 0.5 * (a == b) for a in (3.0, 1.0) for b in (2.0, 0.5, 1.0)]
    found = screening(values).auc(labels)
    assert found.mean == pytest.approx(np.mean(wins))
    assert found.low <= found.mean <= found.high
    assert found.n == 5
    assert screening([1.0, 0.0] * 20).auc([True, False] * 20)[1:] == (1.0, 1.0, 1.0)
    for wrong in ([True] * 5, [False] * 5, [True, False]):
        with pytest.raises(ValueError, match="labels must be one for each of 5 rows, some true and some false, got"):
            screening(values).auc(wrong)


GLAD = [
    "It was wonderful, I loved every minute!", "Great fun, thank you, I feel so happy.",
    "A delight from start to end!", "I am thrilled, it could not be better.",
]  # fmt: skip
GRIM = [
    "It was dreadful, I hated every minute.", "Miserable, I feel so sad and alone.",
    "A disaster from start to end.", "I am in despair, it could not be worse.",
]  # fmt: skip
ASKED = ["How was the party?", "How was your day?", "Tell me about the trip.", "What is new?"]


def test_glad_answers_lie_further_along_a_vector_of_other_glad_answers_than_grim_ones(model):
    """Vectors as in the paper: the mean over responses of both kinds; here of other questions and other words."""
    pairs = rtl.load_pairs(
        [
            {"prompt": ask, "chosen": glad, "rejected": grim}
            for ask, glad, grim in zip(ASKED[:2], GLAD, GRIM, strict=False)
        ]
    )
    vectors = rtl.extract_vectors(model, pairs, layers=[21], position="mean response")
    targets = [
        Target(chat_text(model, ask), text) for texts in (GLAD[2:], GRIM[2:]) for ask in ASKED[2:] for text in texts
    ]
    found = screen(model, targets, vectors, layer=21, max_new_tokens=16)
    assert found.auc([True] * 4 + [False] * 4) == (8, 1.0, 1.0, 1.0)
    assert str(found).startswith("8 rows along 'pairs' at layer 21: mean difference ")


def test_the_figure_shows_every_row_sorted_with_its_text():
    rows = [
        {"row": i, "difference": value, "prompt": f"<b>{i}", "answer": "a" * 200, "label": label}
        for i, (value, label) in enumerate([(0.2, "plain"), (1.4, "happy"), (-0.3, "plain"), (1.0, "happy")])
    ]
    figure = plots.screening(rows)
    traces = {trace.name: trace for trace in figure.data}
    assert traces["happy"].y.tolist() == [1.4, 1.0]
    assert [*traces["happy"].x, *traces["plain"].x] == [1, 2, 3, 4]
    assert "&lt;b&gt;1" in traces["happy"].hovertext[0]
    hostile = [{"row": 0, "difference": 0.1, "prompt": HOSTILE, "answer": HOSTILE, "label": HOSTILE}]
    check_drawn_as_it_is(plots.screening(hostile, title=HOSTILE))
    with pytest.raises(ValueError, match="must have .*difference"):
        plots.screening([{"row": 0, "prompt": "p", "answer": "a"}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda targets: [], "targets must be at least one, each with an answer, got 0"),
        (lambda targets: [*targets, Target("p", " ")], "each with an answer, got 5, of which 1 are without"),
    ],
)
def test_bad_rows_are_refused_before_any_work(tiny, tiny_vectors, change, message):
    with pytest.raises(ValueError, match=message):
        screen(tiny, change(targets_of(tiny)), tiny_vectors, layer=1)
    with pytest.raises(ValueError, match="layers"):
        screen(tiny, targets_of(tiny), tiny_vectors, layer=7)


@pytest.mark.slow
def test_the_command_reads_a_users_file_and_writes_table_and_figure(tmp_path, model, pairs):
    vectors = rtl.extract_vectors(model, pairs.sample(16), layers=[21])
    vectors.save(tmp_path / "v.safetensors")
    rows = [{"messages": [{"role": "user", "content": "How was it?"}, {"role": "assistant", "content": text}]}
            for text in ("Wonderful, I loved it!", "Dreadful. I cried.")]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out, figure = tmp_path / "table.csv", tmp_path / "screen.html"
    arguments = ["screen", data, tmp_path / "v.safetensors", "--layer", 21, "--out", out, "--figure", figure]
    result = CliRunner().invoke(app, [str(each) for each in [*arguments, "--max-new-tokens", 8]])
    assert result.exit_code == 0, result.output
    expected = screen(model, load_targets(data, model), vectors, layer=21, max_new_tokens=8)
    table = pd.read_csv(out)
    assert table["difference"].tolist() == pytest.approx(expected.table["difference"].tolist())
    assert table["difference"][0] > table["difference"][1]
    assert "row 0" in result.output
    assert figure.stat().st_size > 1_000_000
