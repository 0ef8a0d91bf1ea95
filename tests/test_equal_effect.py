"""KL-then-steer's comparison: reading two arms at one KL, or at one score, from doses that fall on neither."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import kl_then_steer as study

DOSES = (-2.0, -1.0, 0.0, 1.0, 2.0)


def curve(slope: float, cost: float, noise: float = 0.0, rest: float = 0.0) -> study.Curve:
    """Scores of 0.3 + slope x dose, and a KL of cost x dose squared, over 3 seeds, 40 prompts and 10 texts."""
    generator = np.random.default_rng(0)
    doses = np.array(DOSES)
    scores = 0.3 + slope * doses[None, :, None] + noise * generator.standard_normal((3, 1, 40))
    sizes = np.arange(5, 15)
    kl = (rest + cost * doses**2)[None, :, None] * sizes * np.ones((3, 1, 1))
    return study.Curve(DOSES, scores, kl, sizes)


def whole(of: study.Curve) -> study.Draw:
    return next(study.draws(of))


def test_the_score_at_a_kl_and_the_kl_at_a_score_are_those_of_the_straight_line():
    of = curve(slope=0.1, cost=0.01)
    for sign in (1.0, -1.0):
        assert study.effect_at(of, sign, 0.01 * 1.5**2, whole(of)) == pytest.approx(0.3 + sign * 0.15)
        # Between doses the KL is taken as straight in the score: half way from 0.01 to 0.04.
        assert study.kl_at(of, sign, 0.3 + sign * 0.15, whole(of)) == pytest.approx(0.025)
    assert np.isnan(study.effect_at(of, 1.0, 0.05, whole(of)))
    assert np.isnan(study.kl_at(of, 1.0, 0.6, whole(of)))


def test_a_dose_that_scores_no_better_costs_nothing_more():
    doses = (0.0, 1.0, 2.0, 3.0, 4.0)
    scores, kl = np.array([0.0, 1.0, 2.0, 1.9, 1.8]), np.array([0.0, 0.01, 0.03, 0.1, 0.4])
    of = study.Curve(
        doses, np.tile(scores[None, :, None], (1, 1, 4)), np.tile(kl[None, :, None], (1, 1, 4)), np.ones(4)
    )
    assert study.kl_at(of, 1.0, 2.0, whole(of)) == pytest.approx(0.03)
    assert study.kl_at(of, 1.0, 1.5, whole(of)) == pytest.approx(0.02)


def test_a_model_with_a_kl_of_its_own_reaches_no_budget_below_it():
    of = curve(slope=0.1, cost=0.01, rest=0.004)
    assert np.isnan(study.effect_at(of, 1.0, 0.003, whole(of)))
    assert study.effect_at(of, 1.0, 0.014, whole(of)) == pytest.approx(0.4)


def test_arms_that_are_alike_do_not_differ_and_a_cheaper_one_does():
    plain, cheaper = curve(0.1, 0.01, noise=0.2), curve(0.1, 0.005, noise=0.2)
    (alike, *_) = study.at_equal_kl(plain, plain, [0.01])
    assert (alike["treated minus plain"], alike["out of reach"]) == (0.0, 0.0)
    toward, away = study.at_equal_kl(plain, cheaper, [0.01])
    assert toward["treated"] == pytest.approx(toward["plain"] + 0.1 * (2**0.5 - 1))
    assert toward["treated minus plain_low"] > 0 > away["treated minus plain_high"]
    (row,) = study.at_equal_effect(plain, cheaper, [1.0])
    assert (row["plain"], row["treated"]) == (pytest.approx(0.01), pytest.approx(0.005))
    assert row["treated minus plain_high"] < 0
    assert (row["prompts"], row["texts"], row["seeds"]) == (40, 10, 3)


def test_what_is_out_of_reach_has_no_interval():
    plain, weaker = curve(0.1, 0.01), curve(0.04, 0.01)
    (row,) = study.at_equal_effect(plain, weaker, [2.0])
    assert (row["treated"], row["treated minus plain"], row["treated minus plain_low"]) == (None, None, None)
    assert row["out of reach"] == 1.0
