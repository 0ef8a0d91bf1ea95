"""The benchmark's arithmetic, tables and checks of equality; its timings are for people, not for tests."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from growth import exponent  # noqa: E402
from peers import bounds, equality, report, worker  # noqa: E402
from peers.bounds import Machine, Phase, Shape  # noqa: E402
from peers.recipe import cosine_toward, rate  # noqa: E402
from peers.report import Measure, Runs  # noqa: E402
from rt_lens.tuning.loop import _rate  # noqa: E402
from rt_lens.tuning.losses import cosine_loss  # noqa: E402

SMALL = Shape(n_layers=2, d_model=4, d_mlp=6, n_heads=2, n_key_value_heads=1, d_head=2, d_vocab=10)
MACHINE = Machine(square=1e9, model_like=2e9, stream=1e8)
EQUAL, UNEQUAL = equality.Equality(True, "same"), equality.Equality(False, "off by 3")


@pytest.fixture
def vectors():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["vectors", "tokens", "losses", "differences"])
def test_a_result_equals_itself_and_not_what_is_off(name, vectors):
    result = {name: vectors.abs() + 1 if name != "tokens" else (100 * vectors).long()}
    assert equality.compare(result, result).equal
    off = result[name].clone()
    off[-1, -1] += 1
    check = equality.compare({name: off}, result)
    assert not check.equal and check.text


def test_vectors_of_another_length_are_not_equal(vectors):
    check = equality.vectors(1.01 * vectors, vectors)
    assert not check.equal and check.text.startswith("5 of 5 layers")
    assert equality.vectors(1.0001 * vectors, vectors).equal


def test_no_number_is_never_equal(vectors):
    wrong = torch.full_like(vectors, float("nan"))
    for check in (equality.vectors, equality.losses, equality.differences):
        assert not check(wrong, vectors).equal


def test_another_shape_is_not_equal_and_an_unknown_result_is_refused(vectors):
    assert "shape (4, 8), not (5, 8)" in equality.compare({"vectors": vectors[1:]}, {"vectors": vectors}).text
    with pytest.raises(ValueError, match="reference must hold one of"):
        equality.compare({"images": vectors}, {"images": vectors})


def test_losses_are_compared_to_four_digits():
    losses = torch.tensor([2.0, 14.0])
    assert equality.losses(losses * (1 + 5e-5), losses).equal
    assert not equality.losses(losses * (1 + 2e-4), losses).equal


def test_weights_of_a_shape_are_those_of_the_bundled_model():
    config = {
        "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    }  # fmt: skip
    shape = Shape.of(config)
    assert shape.block_weights == 3_538_944
    assert shape.weights == 134_515_008 - 61 * 576  # all parameters but those of the norms


def test_distinct_tokens_share_beginnings():
    assert bounds.distinct_tokens([[1, 2, 3], [1, 2, 4], [1, 2]]) == 4
    assert bounds.distinct_tokens([[2], [1, 2]]) == 3


def test_extraction_needs_the_blocks_up_to_the_last_that_is_read():
    rows = [[1, 2], [1, 3]]
    assert bounds.extraction(SMALL, rows, [0, 1]) == [Phase(2 * SMALL.block_weights * 2 * 3)]
    assert bounds.extraction(SMALL, rows, [0]) == [Phase(2 * SMALL.block_weights * 3)]


def test_decoding_reads_all_weights_for_each_token():
    phases = bounds.decoding(SMALL, [[1, 2], [3, 4]], new_tokens=5)
    assert sum(phase.bytes for phase in phases) == 5 * 4 * SMALL.weights
    assert phases[-1].flop == 2 * 2 * SMALL.weights


def test_least_time_is_the_longer_of_arithmetic_and_reading_in_each_phase():
    assert bounds.seconds([Phase(4e9), Phase(1.0, 3e8)], MACHINE) == pytest.approx(2 + 3)
    assert bounds.best([MACHINE, Machine(3e9, 1e9, 1e7)]) == Machine(3e9, 2e9, 1e8)


def test_measured_rates_are_positive():
    assert bounds._matrix_rate(8, 8, 8, tries=1) > 0


def test_the_peers_schedule_and_cosine_are_those_of_rt_lens(vectors):
    assert [rate(step, 20) for step in range(20)] == [_rate(step, 20, 0.1) for step in range(20)]
    ours = cosine_loss(vectors, vectors[0], "toward").mean()
    torch.testing.assert_close(cosine_toward([vectors[None]], [vectors[0]]), ours)


def runs_of(*seconds: float, check=EQUAL, **others) -> Runs:
    return Runs(dict(enumerate(seconds)), [check for _ in seconds], **others)


def test_table_has_medians_ranges_ratios_and_dashes():
    runs = {
        "huggingface": runs_of(4.0, 8.0, 5.0, peak_mib=900.0),
        "huggingface_best": runs_of(2.0, 4.0, 2.5),
        "repeng": Runs(),
        "nnsight": Runs(failure="failed: no such layer"),
        "rt_lens": runs_of(1.0, 2.0, 1.0),
    }
    lines = "\n".join(report.table(Measure("Extraction", "extract"), runs))
    assert "(the fastest peer, Hugging Face, best known use, = 1)" in lines
    assert "| Hugging Face, plain | 5 [4, 8] | 3 | 1.00 | 0.50 | 900 | reference |" in lines
    assert "| rt_lens | 1 [1, 2] | 3 | 4.00 [4.00, 5.00] | 2.00 [2.00, 2.50] |" in lines
    assert "| repeng | – | 0 | – | – | – | has no such task |" in lines
    assert "failed: no such layer" in lines


def test_a_tool_whose_work_differs_is_neither_ranked_nor_the_fastest_peer():
    runs = {"huggingface": runs_of(4.0), "repeng": runs_of(1.0, check=UNEQUAL), "rt_lens": runs_of(2.0)}
    lines = report.table(Measure("Extraction", "extract"), runs)
    assert report.fastest_peer(runs) == "huggingface"
    (row,) = [line for line in lines if line.startswith("| repeng")]
    assert row == "| repeng | 1 [1, 1] | 1 | not ranked | not ranked | 0 | **no**: off by 3 |"


def test_one_unequal_round_is_enough():
    runs = Runs({0: 1.0, 1: 1.0, 2: 1.0}, [EQUAL, UNEQUAL, EQUAL])
    assert not runs.equal and equality.worst(runs.checks) is UNEQUAL


def test_values_of_rates_and_steps():
    assert Measure("", "", 64, "tokens/s").value(2.0) == "32"
    assert Measure("", "", 20, "s per step").value(10.0) == "0.5"
    assert "[16, 32]" in "\n".join(report.table(Measure("", "", 32, "tokens/s"), {"rt_lens": runs_of(1.0, 2.0)}))


def test_bound_line_says_the_share_of_the_bound():
    line = report.bound_line(Measure("", ""), [Phase(4e9), Phase(0.0, 1e8)], MACHINE, runs_of(6.0))
    assert line == (
        "Needs 4 GFLOP and 0.1 GB of memory traffic, so at best 3 s at the rates above; rt_lens reaches 50% of that "
        "bound."
    )
    per_step = report.bound_line(Measure("", "", 10, "s per step"), [Phase(4e9)], MACHINE, runs_of(40.0))
    assert "per step, so at best 2 s per step" in per_step and "reaches 50%" in per_step


def test_document_has_a_table_for_each_measure_that_was_run():
    measures = {"extract": Measure("Extraction", "extract"), "tune": Measure("Tuning", "tune")}
    text = report.document(["two cores"], measures, {"extract": {"rt_lens": runs_of(1.0)}}, {}, MACHINE)
    assert "## Extraction" in text and "## Tuning" not in text and "- two cores" in text


def test_exponent_is_that_of_a_power_with_its_interval():
    sizes = [1, 2, 4, 8]
    fit = exponent(sizes, [3 * size**1.5 for size in sizes])
    assert fit is not None and fit.slope == pytest.approx(1.5) and fit.low <= 1.5 + 1e-9 and fit.high >= 1.5 - 1e-9
    noisy = exponent(sizes, [3.1, 5.8, 12.5, 23.0])
    assert noisy is not None and noisy.low < noisy.slope < noisy.high
    assert exponent(sizes[:2], [1.0, 2.0]) is None


def test_peers_run_with_the_versions_that_rt_lens_is_tested_with():
    pinned = [dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(encoding="utf-8"), re.M))
              for name in ("constraints.txt", "benchmarks/peers/requirements.txt")]  # fmt: skip
    for package in ("torch", "transformers", "tokenizers", "safetensors"):
        assert pinned[0][package] == pinned[1][package]


@pytest.mark.parametrize(("short", "times"), [(60.0, 5), (0.0, 1)])
def test_short_tasks_run_several_times_after_one_preparation_and_long_ones_once(monkeypatch, short, times):
    monkeypatch.setattr(worker, "SHORT", short)
    done = []

    def run(model, inputs, prepared):
        done.append("run")
        return {"losses": torch.tensor([float(prepared)])}

    task = worker.Task(
        run, lambda model, inputs: done.append("before") or 7, lambda model, inputs: done.append("after")
    )
    seconds, result = task.timed(None, None)
    assert done == ["before", *["run", "after"] * times]
    assert result["losses"].item() == 7.0 and 0 <= seconds["seconds"] < 1 and 0 <= seconds["before"] < 1
