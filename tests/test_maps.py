"""Tables of projections, lengths, cosines and maps, against what they are made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import rt_lens as rtl
from rt_lens.arms.projections import mean_projections
from rt_lens.data.contrast_pairs import ContrastPairs, Pair
from rt_lens.models.activations import last_token_activations
from rt_lens.tuning.delta import WeightDelta
from rt_lens.vectors.geometry import activation_map, cosines, norms
from rt_lens.vectors.steering_vectors import SteeringVectors

TEXTS = ["How was your day?", "Do you like rain?", "What did you eat?", "Any plans?"]
LAYERS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture
def few() -> ContrastPairs:
    users = ["How was your day?", "Do you like rain?", "What did you eat?", "Any plans?", "Where were you?"]
    return ContrastPairs("mood", tuple(Pair("You are happy.", "You are sad.", user, "Well,") for user in users))


def chats(model, texts=TEXTS):
    return rtl.models.generation.as_chat(model, texts)


def test_mean_projections_are_those_of_each_text(tiny, tiny_vectors):
    table = mean_projections(tiny, tiny_vectors, TEXTS, seed=3)
    found = last_token_activations(tiny, chats(tiny), LAYERS)
    assert list(table["arm"]) == ["untuned"] * 2
    assert list(table["layer"]) == [0, 1]
    for (_, row), name in zip(table.iterrows(), LAYERS, strict=True):
        values = found[name] @ (tiny_vectors[name] / tiny_vectors[name].norm())
        assert row["mean"] == pytest.approx(float(values.mean()), abs=1e-5)
        assert row["low"] < row["mean"] < row["high"]
        assert (row["n"], row["seed"]) == (4, 3)


def test_an_added_vector_moves_the_mean_projection_by_its_length(tiny, tiny_vectors):
    arms = {"untuned": None, "steered": rtl.add(tiny_vectors, [0], 2.0)}
    table = mean_projections(tiny, tiny_vectors, TEXTS, arms=arms).set_index(["arm", "layer"])
    moved = table.loc[("steered", 0), "mean"] - table.loc[("untuned", 0), "mean"]
    assert moved == pytest.approx(2 * float(tiny_vectors[LAYERS[0]].norm()), rel=1e-4)
    alone = mean_projections(tiny, tiny_vectors, TEXTS).set_index(["arm", "layer"])
    assert table.loc[("untuned", 1), "mean"] == alone.loc[("untuned", 1), "mean"], "no arm outlasts its reading"


def test_mean_projections_read_the_position_that_is_asked_for(tiny, tiny_vectors):
    last, first = (mean_projections(tiny, tiny_vectors, TEXTS, position=word) for word in ("last", "first"))
    assert abs(last["mean"] - first["mean"]).min() > 1e-3
    assert first["low"].isna().all(), "all chats begin with the same token, whose bounds nobody knows"


def test_norms_are_of_the_vectors_and_of_the_last_tokens(tiny, tiny_vectors):
    table = norms(tiny, tiny_vectors, TEXTS, seed=1)
    found = last_token_activations(tiny, chats(tiny), LAYERS)
    for (_, row), name in zip(table.iterrows(), LAYERS, strict=True):
        assert row["vector"] == pytest.approx(float(tiny_vectors[name].norm()))
        assert row["mean"] == pytest.approx(float(found[name].norm(dim=-1).mean()), rel=1e-5)
        assert row["ratio"] == pytest.approx(row["vector"] / row["mean"])
        assert row["ratio_low"] < row["ratio"] < row["ratio_high"]
        assert (row["n"], row["seed"]) == (4, 1)


def test_cosines_are_those_of_every_two_vectors(tiny_vectors):
    table = cosines({"mood": tiny_vectors, "minus": -tiny_vectors}).set_index(["a", "b"])["cosine"]
    a, b = (tiny_vectors[name] for name in LAYERS)
    between = float(torch.cosine_similarity(a, b, dim=0))
    assert abs(between) > 0.01
    assert table["mood, layer 0", "mood, layer 1"] == pytest.approx(between, abs=1e-6)
    assert table["minus, layer 0", "mood, layer 1"] == pytest.approx(-between, abs=1e-6)
    assert table["minus, layer 1", "mood, layer 1"] == pytest.approx(-1)
    assert len(table) == 16


def test_cosines_of_one_behaviour_are_named_by_layer_and_chance_is_that_of_random_directions(tiny_vectors, provenance):
    table = cosines({"mood": tiny_vectors}, layers=[1])
    assert table[["a", "b"]].to_numpy().tolist() == [[1, 1]]
    noise = torch.Generator().manual_seed(0)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(60)]
    random = cosines(
        {"noise": SteeringVectors({name: torch.randn(256, generator=noise) for name in names}, provenance)}
    )
    apart = random[random["a"] < random["b"]]
    assert (apart["cosine"].abs() < apart["chance"]).mean() == pytest.approx(0.95, abs=0.02)


def test_a_map_is_the_principal_components_of_both_sides(tiny, few):
    table = activation_map(tiny, few, layers=[1], seed=2)
    texts = few.texts(tiny)
    found = last_token_activations(tiny, texts.positive + texts.negative, LAYERS[1:])[LAYERS[1]].double().numpy()
    centred = found - found.mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    for column, axis in (("x", 0), ("y", 1)):
        np.testing.assert_allclose(np.abs(table[column]), np.abs(left[:, axis] * singular[axis]), atol=1e-4)
        share = singular[axis] ** 2 / (singular**2).sum()
        np.testing.assert_allclose(table[f"explained_{column}"], share, rtol=1e-4)
    np.testing.assert_allclose(table["explained"], table["explained_x"] + table["explained_y"])
    assert list(table["side"]) == ["positive"] * 5 + ["negative"] * 5
    assert list(table["text"])[:2] == ["How was your day? → Well,", "Do you like rain? → Well,"]
    assert set(table["n"]) == {5}
    assert set(table["seed"]) == {2}
    assert table.groupby("side")["x"].mean()["positive"] > 0


def test_a_paired_map_has_no_more_of_what_the_sides_share(tiny, few):
    table = activation_map(tiny, few, paired=True)
    assert list(table["layer"].unique()) == [0, 1]
    for _, layer in table.groupby("layer"):
        sides = {side: own[["x", "y"]].to_numpy() for side, own in layer.groupby("side")}
        np.testing.assert_allclose(sides["positive"], -sides["negative"], atol=1e-4)
        assert np.abs(sides["positive"]).max() > 1e-3


def test_a_map_by_neighbours_is_the_same_with_the_same_seed_only(tiny, few):
    maps = [activation_map(tiny, few, layers=[1], method="tsne", seed=seed) for seed in (0, 0, 1)]
    assert maps[0].equals(maps[1])
    assert maps[0]["explained"].isna().all()
    assert set(maps[0]["method"]) == {"tsne"}
    assert np.isfinite(maps[0][["x", "y"]].to_numpy()).all()


def test_a_map_of_activations_that_are_all_the_same_is_one_point(tiny, few):
    table = activation_map(tiny, few, layers=[0], hook="resid_pre")
    assert not table[["x", "y"]].to_numpy().any(), "the embedding of the prefill's last token"
    assert math.isnan(table["explained"].iloc[0])


def test_long_messages_are_shortened(tiny):
    pairs = ContrastPairs("mood", tuple(Pair("Happy.", "Sad.", f"{number}\n" + "word " * 30) for number in range(3)))
    assert activation_map(tiny, pairs, layers=[1])["text"].str.len().max() == 80


def test_the_figures_draw_these_tables(tiny, tiny_vectors, few, only_returned):
    arms = {"untuned": None, "steered": rtl.add(tiny_vectors, [0])}
    assert rtl.plots.projection_curves(rtl.arms.mean_projections(tiny, tiny_vectors, TEXTS, arms=arms)).data
    assert rtl.plots.norms(rtl.vectors.norms(tiny, tiny_vectors, TEXTS)).data
    assert rtl.plots.cosines(rtl.vectors.cosines({"mood": tiny_vectors})).data
    assert rtl.plots.activation_map(rtl.vectors.activation_map(tiny, few)).data


@pytest.mark.usefixtures("as_a_user")
def test_what_cannot_be_read_is_refused_first(tiny, tiny_vectors, few, provenance):
    wrong_delta = WeightDelta({"blocks.7.attn.W_O": torch.ones(2)}, "tiny", {}, [])
    two = SteeringVectors({name: torch.ones(32) for name in ("blocks.0.hook_resid_post", "blocks.0.hook_mlp_out")},
                          provenance)  # fmt: skip
    for refused, message in [
        (lambda: mean_projections(tiny, tiny_vectors, "How are you?"), "got a str"),
        (lambda: norms(tiny, tiny_vectors, []), "texts must be a list of at least one text, got an empty one"),
        (lambda: mean_projections(tiny, tiny_vectors, TEXTS, arms={}), "arms"),
        (
            lambda: mean_projections(tiny, tiny_vectors, TEXTS, arms={"mine": wrong_delta}),
            r"arms\['mine'\] must fit this model",
        ),
        (lambda: mean_projections(tiny, tiny_vectors, TEXTS, position=900), "position must be between .* for text 0"),
        (lambda: norms(tiny, two, TEXTS), "vectors must have one vector per layer, got several at layer 0"),
        (lambda: cosines({}), "vectors must be at least one name"),
        (lambda: cosines({"mood": tiny_vectors}, layers=[9]), "layers contains 9"),
        (lambda: activation_map(tiny, few, method="umap"), "method must be 'pca' or 'tsne', got 'umap'"),
        (lambda: activation_map(tiny, few.sample(2)), "pairs must be at least 3 to span a plane, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            refused()


def test_vectors_of_different_widths_have_no_cosine(tiny_vectors, provenance):
    wide = SteeringVectors({LAYERS[0]: torch.ones(64)}, provenance)
    with pytest.raises(ValueError, match=r"vectors must have the same d_model, got \[32, 64\]"):
        cosines({"mood": tiny_vectors, "wide": wide}, layers=[0])


def test_heads_have_no_norm_of_their_own_here(tiny, provenance):
    heads = SteeringVectors({"blocks.0.attn.hook_z": torch.ones(4, 8)}, provenance)
    with pytest.raises(ValueError, match="one for each head"):
        norms(tiny, heads, TEXTS)


def test_moods_pairs_part_by_the_middle_layers(model, pairs):
    table = activation_map(model, pairs.sample(6), layers=[18], paired=True)
    x = table.set_index("side")["x"]
    assert (x["positive"] > 0).mean() >= 0.9
