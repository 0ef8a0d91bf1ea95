"""Evidence for vectors: high where a direction was planted, at chance where nothing is, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import pytest
import torch

import rt_lens as rtl
from rt_lens.data.contrast_pairs import ContrastPairs, Pair
from rt_lens.vectors.extraction import Sides
from rt_lens.vectors.reading import separability
from rt_lens.vectors.steering_vectors import SteeringVectors, hook_names, layer_of
from rt_lens.vectors.validation import VectorValidation, _auc, recommend

D = 32
STRENGTHS = {0: 0.0, 1: 0.0, 2: 12.0, 3: 12.5, 4: 12.0, 5: 0.0}


def numbered(n: int, name: str = "planted") -> ContrastPairs:
    return ContrastPairs(name, tuple(Pair("yes", "no", f"{name} {number}") for number in range(n)))


def shuffled(pairs: ContrastPairs, seed: int) -> ContrastPairs:
    """The sides of each pair swapped, or not, by chance: there is nothing to find any more."""
    coin = random.Random(seed)
    swapped = [Pair(p.negative, p.positive, p.user, p.prefill) if coin.random() < 0.5 else p for p in pairs.pairs]
    return ContrastPairs(f"{pairs.name}, shuffled", tuple(swapped))


def planted(pairs: ContrastPairs, name: str, strength: float, of: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sides `strength` apart along a direction that is the layer's own, in noise that is the pairs' own."""
    truth = torch.randn(D, generator=torch.Generator().manual_seed(layer_of(name)))
    noise = torch.Generator().manual_seed(int(pairs.sha256[:8], 16) + 1000 * layer_of(name) + 7919 * of)
    shared, first, second = torch.randn(3, len(pairs), D, generator=noise)
    half = strength / 2 * truth / truth.norm()
    return shared + first + half, shared + second - half


@pytest.fixture
def plant(monkeypatch, make_tiny) -> Callable[..., Callable[..., VectorValidation]]:
    """`validate_vectors` on a model whose activations are planted: the reading is replaced, all else is as it is."""

    def make(strengths: Mapping[int, float] = STRENGTHS, of: int = 0) -> Callable[..., VectorValidation]:
        model = make_tiny(n_layers=len(strengths), d_vocab=8)

        def read(model: Any, pairs: ContrastPairs, names: list[str], places: Any, **_: Any) -> list[Sides]:
            both = {name: planted(pairs, name, strengths[layer_of(name)], of) for name in names}
            sides = ({name: side[i] for name, side in both.items()} for i in (0, 1))
            return [Sides(*sides, "planted", ("it",), False)]

        def run(n: int = 64, n_held_out: int = 60, **arguments: Any) -> VectorValidation:
            monkeypatch.setattr("rt_lens.vectors.validation.read_sides", read)
            return rtl.validate_vectors(
                model, numbered(n), numbered(n_held_out, "unseen"), **{"splits": 6, **arguments}
            )

        return run

    return make


# What is found


def test_a_planted_direction_is_recommended_where_it_is_and_believed(plant):
    found = plant()()
    table = found.layers.set_index("layer")
    assert found.recommended == (2, 3, 4)
    assert found.best == 2
    assert (table.loc[[2, 3, 4], ["accuracy", "auc"]] > 0.99).all(axis=None)
    assert (table.loc[[2, 3, 4], "stability"] > 0.95).all()
    assert (table.loc[[0, 1, 5], "stability"] < 0.5).all()
    assert (table.loc[[0, 1, 5], "accuracy"] < 0.75).all()
    for layer in (2, 3, 4):
        truth = torch.randn(D, generator=torch.Generator().manual_seed(layer))
        (name,) = hook_names([layer])
        assert torch.cosine_similarity(found.vectors[name], truth, dim=0) > 0.97
    assert found.reason.startswith(
        "Layers 2 to 4 are the earliest layers to separate held-out texts nearly as well as the best layer"
    )
    assert "pair accuracy 1.00" in found.reason and "n = 60 pairs" in found.reason


def test_a_difference_so_large_that_random_directions_see_it_is_believed_too(plant):
    found = plant({0: 0.0, 1: 60.0})()
    assert found.layers["control_high"].tolist()[1] == found.layers["accuracy"].tolist()[1] == 1.0
    assert found.recommended == (1,)


def test_d_prime_is_the_planted_distance_over_its_noise(plant):
    found = plant({0: 3.0, 1: 6.0})(n=400, n_held_out=400)
    assert found.layers["d_prime"].tolist() == pytest.approx([3 / 2**0.5, 6 / 2**0.5], rel=0.1)
    for layer, distance in ((0, 3.0), (1, 6.0)):  # halves of 200 pairs, whose differences have variance 2 in each of D
        theory = distance**2 / (distance**2 + 2 * D / 200)
        assert found.layers["stability"][layer] == pytest.approx(theory, abs=0.02)


def test_columns_are_those_promised_and_intervals_hold_their_estimates(plant):
    found = plant({0: 0.0, 1: 1.0, 2: 4.0})(n=20, n_held_out=30)
    assert list(found.layers) == [
        "layer", "n", "accuracy", "accuracy_low", "accuracy_high", "auc", "auc_low", "auc_high", "control_low",
        "control_high", "d_prime", "control_d_prime", "stability", "stability_low", "stability_high", "seed",
    ]  # fmt: skip
    assert set(found.learning) == {
        "layer", "n_pairs", "accuracy", "accuracy_low", "accuracy_high", "cosine", "cosine_low", "cosine_high", "n",
        "seed",
    }  # fmt: skip
    assert found.layers["layer"].tolist() == [0, 1, 2]
    assert set(found.layers["n"]) == {30}
    for table, names in ((found.layers, ("accuracy", "auc", "stability")), (found.learning, ("accuracy", "cosine"))):
        for name in names:
            assert (table[f"{name}_low"] <= table[name] + 1e-12).all()
            assert (table[name] <= table[f"{name}_high"] + 1e-12).all()
    assert (found.layers["accuracy_low"] < found.layers["accuracy_high"]).all()
    assert (found.layers["auc_low"] < found.layers["auc_high"]).iloc[:2].all()


def test_the_intervals_are_about_as_wide_as_they_should_be(plant):
    narrow, wide = (plant({0: 1.0})(n_held_out=n).layers.iloc[0] for n in (400, 25))
    for name in ("accuracy", "auc"):
        ratio = (wide[f"{name}_high"] - wide[f"{name}_low"]) / (narrow[f"{name}_high"] - narrow[f"{name}_low"])
        assert 2.5 < ratio < 6  # the root of 16 is 4


def test_the_auc_is_that_of_two_normals_and_its_interval_covers_it_about_as_often_as_it_says():
    truth, draws = 0.7602, torch.Generator().manual_seed(0)  # Phi(1 / root 2)
    found = []
    for seed in range(150):
        shared, first, second = torch.randn(3, 40, generator=draws)
        mixed = 0.5**0.5
        found.append(_auc(mixed * (shared + first) + 1, mixed * (shared + second), seed))
    assert sum(auc for auc, _, _ in found) / 150 == pytest.approx(truth, abs=0.015)
    assert 0.88 <= sum(low <= truth <= high for _, low, high in found) / 150 <= 0.985


def test_random_directions_cover_chance_and_keep_away_from_the_ends(plant):
    table = plant()().layers
    assert (table["control_low"] < 0.5).all() and (table["control_high"] > 0.5).all()
    noise = table[table["layer"].isin([0, 1, 5])]
    assert (noise["control_low"] > 0.3).all() and (noise["control_high"] < 0.7).all()
    # On a strong difference random directions are right, or wrong, about nearly all pairs.
    strong = table[table["layer"].isin([2, 3, 4])]
    assert (strong["control_high"] > 0.9).all()
    assert (strong["control_d_prime"] < strong["d_prime"]).all()


def test_everything_repeats_with_its_seed_and_changes_with_another(plant):
    run = plant({0: 1.0, 1: 2.0})
    first, again, other = run(seed=3), run(seed=3), run(seed=4)
    for table in ("layers", "learning", "cosines", "behaviours"):
        pd.testing.assert_frame_equal(getattr(first, table), getattr(again, table))
    assert (first.recommended, first.best, first.reason) == (again.recommended, again.best, again.reason)
    assert set(first.layers["seed"]) == {3} == set(first.learning["seed"]) and first.seed == 3
    for column in ("auc_low", "control_d_prime", "stability"):
        assert (first.layers[column] != other.layers[column]).any()


def test_the_learning_curve_grows_by_doublings_to_all_pairs(plant):
    run = plant({0: 0.0, 1: 3.0})
    for n, sizes in ((40, [2, 4, 8, 16, 32, 40]), (32, [2, 4, 8, 16, 32]), (4, [2, 4])):
        found = run(n=n)
        assert found.learning["n_pairs"].tolist() == sizes
    learning = run(n=256, splits=12).learning.set_index("n_pairs")
    assert set(learning["layer"]) == {1}
    assert learning["cosine"].is_monotonic_increasing
    assert learning["cosine"][256] == pytest.approx(1)
    assert learning["accuracy"][256] > learning["accuracy"][2]
    whole = run(n=256).layers.set_index("layer")
    assert learning["accuracy"][256] == pytest.approx(whole["accuracy"][1])


def test_cosines_between_layers_and_with_other_behaviours(plant, provenance):
    noise = torch.Generator().manual_seed(5)
    names = hook_names([1, 2, 9])
    other = SteeringVectors({name: torch.randn(D, generator=noise) for name in names}, provenance)
    found = plant()(others=[other, -2 * other])
    between = found.cosines.pivot(index="layer", columns="other", values="cosine")
    assert between.shape == (6, 6)
    for i in range(6):
        for j in range(6):
            a, b = (found.vectors[name] for name in hook_names([i, j]))
            assert between.loc[i, j] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-5)
    assert list(found.behaviours) == ["layer", "behaviour", "cosine"]
    table = found.behaviours.set_index(["behaviour", "layer"])["cosine"]
    assert sorted(table.index) == [(name, layer) for name in ("-2 * (mood)", "mood") for layer in (1, 2)]
    for layer in (1, 2):
        (name,) = hook_names([layer])
        direct = float(torch.cosine_similarity(found.vectors[name], other[name], dim=0))
        assert table["mood", layer] == pytest.approx(direct, abs=1e-5)
        assert table["-2 * (mood)", layer] == pytest.approx(-direct, abs=1e-5)
    assert abs(direct) > 1e-3


@pytest.mark.parametrize("method", ["mean_diff", "pca", "logistic", "mass_mean", "leace"])
def test_every_method_that_has_seen_the_pairs_finds_what_was_planted(plant, method):
    found = plant()(method=method)
    assert found.recommended == (2, 3, 4)
    assert found.vectors.provenance.method == method


def test_the_random_method_is_seldom_believed(plant):
    recommended = [plant(of=of)(method="random", seed=of).recommended for of in range(20)]
    assert sum(map(bool, recommended)) <= 5  # one in 40 for each of six layers


def test_noise_is_seldom_recommended_and_separates_at_chance(plant):
    accuracies, believed = [], 0
    for of in range(8):
        found = plant(dict.fromkeys(range(12), 0.0), of)(seed=of)
        accuracies += found.layers["accuracy"].tolist()
        believed += bool(found.recommended)
    assert sum(accuracies) / len(accuracies) == pytest.approx(0.5, abs=0.03)
    assert believed <= 1


# The rule


def layers_table(auc: list[float], accuracy: Any = 0.95, stability: Any = 0.9, **more: Any) -> pd.DataFrame:
    columns = {"accuracy": accuracy, "stability": stability, "accuracy_low": 0.8, "accuracy_high": 0.99}
    fixed = {"n": 40, "control_high": 0.7, "control_d_prime": 0.5, "d_prime": 2.0, "auc_low": 0.5, "auc_high": 1.0}
    return pd.DataFrame({"layer": range(10, 10 + len(auc)), "auc": auc, **columns, **fixed, **more})


@pytest.mark.parametrize(
    ("table", "run"),
    [
        (layers_table([0.6, 0.79, 0.81, 0.9, 0.7]), (12, 13)),  # 0.75 of 0.4 above chance is 0.8
        (layers_table([0.6, 0.6, 0.95, 0.6]), (12,)),
        (layers_table([0.6, 0.95, 0.6, 0.95, 0.95]), (13, 14)),  # a lone layer may be luck
        (layers_table([0.9, 0.92, 0.6, 0.9, 0.94, 0.9]), (10, 11)),
        (layers_table([0.9] * 4, accuracy=[0.69, 0.7, 0.9, 0.6]), (11, 12)),
        (layers_table([0.9] * 4, stability=[0.5, 0.89, 0.91, 1.0]), (12, 13)),
        (layers_table([0.9] * 2, control_d_prime=[2.1, 1.9]), (11,)),
        (layers_table([0.9] * 2, control_high=[0.96, 0.7]), (11,)),
        (layers_table([1.0] * 2, accuracy=1.0, control_high=1.0), (10, 11)),
        (layers_table([0.9]), (10,)),
    ],
)
def test_the_rule_takes_the_earliest_run_of_layers_that_are_nearly_best(table, run):
    chosen, best, reason = recommend(table)
    assert (chosen, best) == (run, run[0])
    expected = f"Layers {run[0]} to {run[-1]} are the earliest" if len(run) > 1 else f"Layer {run[0]} is the earliest"
    assert reason.startswith(expected) and f"at layer {best} AUC" in reason and "n = 40" in reason


def test_a_table_from_before_the_columns_were_renamed_gets_the_same_layers():
    table = layers_table([0.6, 0.79, 0.81, 0.9, 0.7])
    old = table.rename(columns={"d_prime": "signal", "control_d_prime": "control_signal"})
    assert recommend(old) == recommend(table)


@pytest.mark.parametrize(
    "table",
    [
        layers_table([0.9, 0.9], accuracy=0.69),
        layers_table([0.9, 0.9], control_d_prime=2.1),
        layers_table([0.1, 0.2], accuracy=0.1, d_prime=-2.0),
        layers_table([0.5], d_prime=0.0, control_d_prime=0.0),
        layers_table([0.9, 0.6], stability=[0.3, 0.9]),
    ],
)
def test_the_rule_recommends_nothing_where_no_layer_is_eligible(table):
    run, best, reason = recommend(table)
    assert (run, best) == ((), None)
    assert reason.startswith("None: no layer beats random directions") and "n = 40" in reason


def test_the_rule_does_not_depend_on_the_order_of_the_rows():
    table = layers_table([0.6, 0.9, 0.95, 0.6, 0.95])
    assert recommend(table.iloc[::-1]) == recommend(table)
    assert recommend(table)[0] == (11, 12)


# Models


def test_vectors_are_those_of_extract_vectors_and_accuracy_that_of_separability(tiny, pairs):
    train, held_out = pairs.split(0.7, seed=0)
    train = train.sample(8)
    found = rtl.validate_vectors(tiny, train, held_out, splits=2, position="mean prompt")
    plain = rtl.extract_vectors(tiny, train, position="mean prompt")
    assert found.vectors.provenance == plain.provenance
    for name in plain.hook_names:
        torch.testing.assert_close(found.vectors[name], plain[name], atol=1e-6, rtol=0)
    one_each = held_out.sample(len(held_out.topics))
    assert len(set(one_each.topics)) == len(one_each) < len(held_out)
    direct = separability(tiny, plain, one_each, position="mean prompt")
    assert found.layers["accuracy"].tolist() == direct["accuracy"].tolist()
    assert set(found.layers["n"]) == {len(held_out.topics)}


@pytest.fixture(scope="module")
def few(pairs) -> tuple[ContrastPairs, ContrastPairs]:
    train, held_out = pairs.split(0.7, seed=0)
    return train.sample(16), held_out.sample(16)


def test_mood_is_believed_on_the_real_model_and_with_shuffled_sides_it_is_not(model, few):
    train, held_out = few
    settings: dict[str, Any] = {"layers": range(12, 20), "splits": 6}
    true = rtl.validate_vectors(model, train, held_out, **settings)
    assert true.recommended
    assert true.best in true.recommended
    assert true.layers["accuracy"].max() >= 0.9
    assert true.layers["stability"].max() > 0.6
    false = rtl.validate_vectors(model, shuffled(train, 1), shuffled(held_out, 2), **settings)
    assert false.recommended == () or false.layers["accuracy"].max() < 0.75
    assert 0.2 < false.layers["accuracy"].mean() < 0.8
    assert false.layers["d_prime"].abs().max() < 0.5 * true.layers["d_prime"].max()


# Faults


@pytest.mark.parametrize("n", [1, 2, 3])
def test_too_few_pairs_are_refused(tiny, pairs, n):
    with pytest.raises(
        ValueError, match=rf"train must be at least 4 pairs, so that two halves can be compared, got {n}"
    ):
        rtl.validate_vectors(tiny, pairs.sample(n), pairs.sample(4, seed=1))


def test_one_held_out_pair_is_evidence_for_nothing(plant):
    found = plant()(n_held_out=1)
    assert found.recommended == () and found.best is None
    assert (found.layers["accuracy_high"] - found.layers["accuracy_low"]).min() > 0.7


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"splits": 1}, "splits must be at least 2, got 1"),
        ({"hook": "z"}, r"hook must be a point .*got blocks\.0\.attn\.hook_z.*Use hook='attn_out'; `separability`"),
        ({"method": "magic"}, "method must be one of .*got 'magic'"),
        ({"layers": [7]}, "layers.*7"),
        ({"position": "first"}, "the two sides are the same"),
        (
            {"position": 'mean "no such words"'},
            "text 0 of the positive side: the text does not contain 'no such words'",
        ),
    ],
)
def test_bad_arguments_are_named(tiny, pairs, arguments, says):
    with pytest.raises(ValueError, match=says):
        rtl.validate_vectors(tiny, pairs.sample(4), pairs.sample(4, seed=1), **arguments)
