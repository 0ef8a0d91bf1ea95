"""Block search: each row is what tuning that candidate alone gives; finished candidates are not tuned again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import rt_lens as rtl
from rt_lens.arms.search import block_search, candidates_of
from rt_lens.evaluation.tasks import LogitDifference
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.loop import tune
from rt_lens.tuning.targets import Target
from rt_lens.tuning.tuning_data import prepare_data

TARGETS = [Target(f"Question {i}: what is it?", f" It is the thing number {i}, I think.") for i in range(8)]
BASE = TuneConfig(
    layers=[1], trained_layers=[1], max_steps=3, batch_size=4, validate_every=1, kl_weight=0.0, learning_rate=3e-3,
    epochs=20,
)  # fmt: skip
CANDIDATES = [
    replace(BASE, target_modules={"cosine": ["v", "o"], "token": ["gate", "up", "down"]}),
    replace(BASE, target_modules={"cosine": ["down"], "token": ["q", "k"]}),
    replace(BASE, target_modules=["o"], trained_layers=[0, 1]),
]


def logit(model) -> list[float]:
    return LogitDifference(["How are you?", "What is it?", "Is it late?"], " yes", " no")(model)


def test_each_row_is_that_candidate_tuned_alone(tiny, tiny_vectors):
    table = block_search(tiny, tiny_vectors, TARGETS, CANDIDATES, measure=logit, progress=False)
    assert table["cosine"].tolist() == ["v o, blocks 1", "down, blocks 1", "o, blocks 0-1"]
    assert table["token"].tolist() == ["gate up down, blocks 1", "q k, blocks 1", "o, blocks 0-1"]
    assert set(table["kl"]) == {"–"}
    for candidate, (_, row) in zip(CANDIDATES, table.iterrows(), strict=True):
        delta = tune(tiny, tiny_vectors, TARGETS, candidate, progress=False)
        kept = min((r for r in delta.history if r["split"] == "validation"), key=lambda r: r["total"])
        assert row["total_loss"] == pytest.approx(kept["total"], abs=1e-5)
        assert row["step"] == kept["step"]
        assert row["n_weights"] == sum(change.numel() for change in delta.changes.values())
        with delta.applied(tiny):
            scores = logit(tiny)
        assert row["mean"] == pytest.approx(sum(scores) / 3, abs=1e-4)
        assert row["n"] == 3 and row["low"] <= row["mean"] <= row["high"]
    assert table["mean"].nunique() == 3


def test_a_broken_search_goes_on_and_tunes_nothing_twice(tiny, tiny_vectors, tmp_path):
    path, calls = tmp_path / "search.json", []

    def counted(model) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return logit(model)

    whole = block_search(tiny, tiny_vectors, TARGETS, CANDIDATES, measure=logit, progress=False)
    with pytest.raises(KeyboardInterrupt):
        block_search(tiny, tiny_vectors, TARGETS, CANDIDATES, measure=counted, path=path, progress=False)
    assert len(json.loads(path.read_text())["parts"]) == 1
    resumed = block_search(tiny, tiny_vectors, TARGETS, CANDIDATES, measure=counted, path=path, progress=False)
    assert len(calls) == 4  # the first, the broken one, and the two that were left
    assert resumed.to_dict("records") == whole.to_dict("records")


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"learning_rate": 1e-3}, "learning_rate"), ({"seed": 3}, "seed"), ({"cosine_weight": 1.0}, "cosine_weight")],
)
def test_another_searchs_file_is_refused(tiny, tiny_vectors, tmp_path, changed, says):
    path = tmp_path / "search.json"
    some = CANDIDATES[:1]
    block_search(tiny, tiny_vectors, TARGETS, some, path=path, progress=False)
    with pytest.raises(
        ValueError, match=f"path must be the file of a block search with the same settings, .* other .*{says}"
    ):
        block_search(tiny, tiny_vectors, TARGETS, [replace(c, **changed) for c in some], path=path, progress=False)
    path.write_text("{}")
    with pytest.raises(ValueError, match="path must be the file of a block search, got"):
        block_search(tiny, tiny_vectors, TARGETS, some, path=path, progress=False)


def test_an_older_file_goes_on_with_a_warning(tiny, tiny_vectors, tmp_path):
    path = tmp_path / "search.json"
    whole = block_search(tiny, tiny_vectors, TARGETS, CANDIDATES[:2], measure=logit, path=path, progress=False)
    stored = json.loads(path.read_text())
    rows = {key.replace("blocks 1", "blocks 1-1"): row for key, row in stored["parts"].items()}
    rows.popitem()
    settings = {**stored["settings"], "code": "of an older version"}
    settings["token_rest"] = settings.pop("free_nats")
    path.write_text(json.dumps({"settings": settings, "rows": rows}))
    with pytest.warns(UserWarning, match="search.json was written by an older rt_lens"):
        resumed = block_search(tiny, tiny_vectors, TARGETS, CANDIDATES[:2], measure=logit, path=path, progress=False)
    assert resumed.to_dict("records") == whole.to_dict("records")
    for says, changed in (("seed", {"seed": 4}), ("free_nats", {"token_rest": 0.25})):
        path.write_text(json.dumps({"settings": {**settings, **changed}, "rows": rows}))
        with pytest.raises(ValueError, match=f"path must be a file with the same settings, got .* other {says}"):
            block_search(tiny, tiny_vectors, TARGETS, CANDIDATES[:2], measure=logit, path=path, progress=False)


def test_without_a_measure_the_losses_stand_alone(tiny, tiny_vectors):
    material = prepare_data(tiny, tiny_vectors, TARGETS, BASE)
    table = block_search(tiny, tiny_vectors, material, CANDIDATES[:2], progress=False)
    assert table["n"].tolist() == [0, 0] and table["mean"].isna().all()
    assert table["total_loss"].notna().all()
    assert len(rtl.plots.block_search(table).data) > 0


def test_candidates_that_differ_in_more_are_refused(tiny, tiny_vectors):
    with pytest.raises(
        ValueError, match="candidates must differ in target_modules and trained_layers only, got other seed"
    ):
        block_search(tiny, tiny_vectors, TARGETS, [BASE, replace(BASE, seed=1)], progress=False)
    with pytest.raises(ValueError, match="candidates must not be empty"):
        block_search(tiny, tiny_vectors, TARGETS, [], progress=False)


def test_the_candidates_offered_differ_from_each_other():
    offered = candidates_of(BASE)
    assert len({str(candidate.target_modules) for candidate in offered}) == len(offered) == 19


def test_it_draws(tiny, tiny_vectors):
    table = block_search(tiny, tiny_vectors, TARGETS, CANDIDATES[:2], measure=logit, progress=False)
    assert len(rtl.plots.block_search(table).data) > 0
