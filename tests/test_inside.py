"""What happens inside under each arm: shifts, shares, likelihoods and weights against their values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rt_lens import plots
from rt_lens.arms import InsideMeter, SystemPrompt, applied
from rt_lens.evaluation import Response, perplexity
from rt_lens.models import chat_text
from rt_lens.models.backends import parameters_of
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import answered
from rt_lens.steering import add
from rt_lens.tuning import WeightDelta

OWN = [Response("Name a tree.", "An oak is a tree."), Response("What is rain?", "Water that falls from clouds, often.")]
SETS = {"own": OWN, "toward": [Response("Hello", "Sweet of you!")], "away": [Response("Hello", "Bitter news.")]}


@pytest.fixture
def meter(tiny, tiny_vectors):
    return InsideMeter(tiny, tiny_vectors, SETS)


def test_an_added_vector_shifts_the_stream_by_its_multiplier_along_itself(meter, tiny, tiny_vectors, hooks_on):
    rows = meter.measure("steered, away", add(tiny_vectors, [1], -0.5))
    before, after = rows["shifts"]
    assert (before["layer"], before["along"], before["n"]) == (0, 0.0, 2) and math.isnan(before["share"])
    assert after["along"] == pytest.approx(-0.5, abs=1e-5) and after["share"] == pytest.approx(1, abs=1e-5)
    assert (after["arm"], after["direction"], after["seed"]) == ("steered", "away", 0)
    assert rows["weights"] == [] and not hooks_on(tiny)


def test_an_edit_of_generated_tokens_is_read_where_it_acts(meter, tiny, tiny_vectors):
    """Of the tokens that predict a response the first stands in the prompt, which the edit leaves as it was."""
    rows = meter.measure("steered_generated, toward", add(tiny_vectors, [1], 2.0, positions="generated"))
    shares = []
    for response in OWN:
        prompt = chat_text(tiny, response.prompt)
        n = len(encode(tiny, answered(tiny, prompt, response.text))) - len(encode(tiny, prompt))
        shares.append((n - 1) / n)
    assert rows["shifts"][1]["along"] == pytest.approx(2 * np.mean(shares), abs=1e-5)


def test_likelihoods_are_those_of_perplexity_before_and_after(meter, tiny, tiny_vectors):
    hooks = add(tiny_vectors, [1], 5.0)
    rows = {row["set"]: row for row in meter.measure("steered, toward", hooks)["likelihoods"]}
    assert list(rows) == ["own", "toward", "away"]
    for name, responses in SETS.items():
        untuned = perplexity(tiny, responses)
        with applied(tiny, hooks):
            steered = perplexity(tiny, responses)
        tokens = untuned.sizes.sum()
        assert rows[name]["before"] == pytest.approx(untuned.nll.sum() / tokens)
        assert rows[name]["after"] == pytest.approx(steered.nll.sum() / tokens)
        assert rows[name]["change"] == pytest.approx(rows[name]["after"] - rows[name]["before"], abs=1e-9)
        assert abs(rows[name]["change"]) > 1e-4


def test_a_system_prompt_shifts_every_layer(meter):
    rows = meter.measure("prompted, away", SystemPrompt("You are a clerk who counts."))
    assert all(abs(row["along"]) > 1e-4 and 0 < row["share"] < 1 for row in rows["shifts"])


def test_a_weight_change_is_described_by_block(meter, tiny):
    name = next(name for name in parameters_of(tiny) if "1" in name and ("W_in" in name or "up_proj" in name))
    weight = parameters_of(tiny)[name].detach()
    ranked = torch.outer(torch.randn(weight.shape[0]), torch.randn(weight.shape[1]))
    change = 0.01 * weight.norm() * ranked / ranked.norm()
    (row,) = meter.measure("tuned, away", WeightDelta({name: change}, "tiny", {}, []))["weights"]
    assert (row["block"], row["rank_limit"]) == (1, 32)
    assert row["relative"] == pytest.approx(0.01, rel=1e-4) and row["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_rows_of_another_process_are_added(meter, tiny, tiny_vectors):
    rows = meter.measure("steered, away", add(tiny_vectors, [1], -0.5))
    other = InsideMeter(tiny, tiny_vectors, SETS)
    other.add(rows)
    assert other.tables().likelihoods.equals(meter.tables().likelihoods)
    with pytest.raises(ValueError, match="responses must be sets of at least one Response each"):
        InsideMeter(tiny, tiny_vectors, {"own": []})


def test_the_figure_sets_the_arms_side_by_side(meter, tiny_vectors):
    for way, sign in (("toward", 1.0), ("away", -1.0)):
        meter.measure(f"steered, {way}", add(tiny_vectors, [1], sign))
        meter.measure(f"random, {way}", add(tiny_vectors, [0], sign))
    tables = meter.tables()
    figure = plots.inside_arms(tables.shifts, tables.likelihoods, tables.weights)
    named = [trace.name for trace in figure.data if trace.name]
    assert named == [
        "steered", "random", "the untuned model's own", "the positive personas'", "the negative personas'",
    ]  # fmt: skip
    drawn = [
        trace.y
        for trace in figure.data
        if trace.mode == "lines" and trace.hovertext and "steered" in trace.hovertext[0]
    ]
    assert [round(float(line[-1]), 4) for line in drawn] == [1.0, 1.0, -1.0, 1.0]  # shift and share, both directions
