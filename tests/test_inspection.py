"""What tuning did inside, against cases whose answer is known: baked edits, rank-one changes, steering itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import rt_lens as rtl
from rt_lens.arms.inspection import ResidualShifts, _spectrum, residual_shifts, weight_changes
from rt_lens.arms.projections import projection_changes
from rt_lens.common.progress import Step, watched
from rt_lens.models.activations import last_token_activations
from rt_lens.models.backends import parameters_of
from rt_lens.models.generation import as_chat
from rt_lens.tuning.delta import WeightDelta
from rt_lens.vectors.reading import token_projections
from rt_lens.vectors.steering_vectors import SteeringVectors

TEXTS = ["The weather is lovely today.", "I have lost my keys again, and it is raining.", "Name three metals."]
L0, L1 = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


def fingerprint(model) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def one(model, name, change, vectors=None, **options):
    """The row of a delta of one parameter."""
    table = weight_changes(model, WeightDelta({name: change}, "tiny", {}, []), vectors, **options)
    assert len(table) == 1
    return table.iloc[0]


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(vectors, name=L1):
    return vectors[name] / vectors[name].norm()


# --- the weights


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (200, 200)])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, None, "decay", "two sizes"])
def test_rank_and_share_are_those_of_the_singular_value_decomposition(shape, rank):
    """Squares of singular values lose all that is below 1e-8 of the largest: rounding of a change of low rank, say."""
    draw = torch.Generator().manual_seed(7)
    n, m = shape
    if rank is None:
        matrix = torch.randn(n, m, generator=draw, dtype=torch.float64)
    elif isinstance(rank, int):
        left, right = torch.randn(n, rank, generator=draw), torch.randn(rank, m, generator=draw)
        matrix = (left @ right).double()  # with float32's rounding, which is of full rank
        exact = left.double() @ right.double()
        assert _spectrum(exact)["effective_rank"] == pytest.approx(by_svd(exact)["effective_rank"], abs=1e-6)
        assert rank > 1 or _spectrum(exact)["effective_rank"] == pytest.approx(1, abs=1e-9)
    else:
        sizes = torch.logspace(0, -10, min(n, m), dtype=torch.float64)
        sizes = sizes if rank == "decay" else torch.where(torch.arange(min(n, m)) < min(n, m) // 2, 1.0, 1e-9).double()
        left, right = (torch.linalg.qr(torch.randn(k, k, generator=draw).double())[0] for k in shape)
        matrix = left[:, : min(n, m)] * sizes @ right[: min(n, m)]
    found, wanted = _spectrum(matrix), by_svd(matrix)
    assert found["effective_rank"] == pytest.approx(wanted["effective_rank"], abs=1e-6)
    assert found["top_share"] == pytest.approx(wanted["top_share"], abs=1e-6)
    assert found["rank_limit"] == min(shape)


def by_svd(matrix):
    singular = torch.linalg.svdvals(matrix)
    shares = singular / singular.sum()
    return {
        "effective_rank": float((-torch.special.xlogy(shares, shares).sum()).exp()),
        "top_share": float(singular[0] ** 2 / (singular**2).sum()),
    }


def test_nothing_and_a_single_number_have_a_spectrum_too():
    assert math.isnan(_spectrum(torch.zeros(5, 3).double())["effective_rank"])
    assert _spectrum(torch.full((1, 1), -2.0).double()) == {"effective_rank": 1.0, "rank_limit": 1, "top_share": 1.0}


def test_the_bar_is_seen_unless_it_is_switched_off(tiny, capfd):
    delta = WeightDelta({"blocks.1.mlp.b_out": torch.ones(32)}, "tiny", {}, [])
    weight_changes(tiny, delta, progress=False)
    assert "weights" not in capfd.readouterr().err
    weight_changes(tiny, delta)
    assert "weights: 100%" in capfd.readouterr().err


def test_a_baked_addition_lies_along_the_vector_and_has_the_size_of_the_multiple(tiny, tiny_vectors):
    before = float(tiny.blocks[1].mlp.b_out.detach().norm())
    table = weight_changes(tiny, rtl.bake(tiny, rtl.add(tiny_vectors, [1], -3.0)), tiny_vectors)
    row = table.iloc[0]
    assert (row["parameter"], row["layer"], row["kind"]) == ("blocks.1.mlp.b_out", 1, "bias")
    assert row["alignment"] == pytest.approx(1.0, abs=1e-6)
    assert row["chance"] == pytest.approx(1 / math.sqrt(32))
    assert row["norm"] == pytest.approx(3 * float(tiny_vectors[L1].norm()), rel=1e-5)
    assert row["relative"] == pytest.approx(row["norm"] / before, rel=1e-5)
    assert (row["effective_rank"], row["rank_limit"], row["top_share"]) == (pytest.approx(1), 1, pytest.approx(1))


def test_ablation_orthogonalises_what_writes_and_its_change_is_of_rank_one_along_the_vector(tiny, tiny_vectors):
    delta = rtl.bake(tiny, rtl.ablate(tiny_vectors.everywhere(tiny, 1), hook="any"))
    table = weight_changes(tiny, delta, tiny_vectors.everywhere(tiny, 1)).set_index("parameter")
    for name, kind in {"embed.W_E": "embed", "blocks.0.attn.W_O": "o", "blocks.1.mlp.W_out": "down"}.items():
        assert table.loc[name, "kind"] == kind
        assert table.loc[name, "alignment"] == pytest.approx(1.0, abs=1e-5)
        assert table.loc[name, "effective_rank"] == pytest.approx(1.0, abs=0.01)
        assert table.loc[name, "top_share"] == pytest.approx(1.0, abs=1e-5)
    assert math.isnan(table.loc["embed.W_E", "layer"])
    assert table.loc["blocks.1.mlp.W_out", "layer"] == 1


@pytest.mark.parametrize("name", ["blocks.1.attn.W_Q", "blocks.1.mlp.W_gate", "blocks.1.mlp.W_out"])
def test_a_change_along_one_direction_has_rank_one_and_a_random_one_nearly_all(tiny, name):
    shape = parameters_of(tiny)[name].shape
    if len(shape) == 3:  # heads together: the row and the column run over them all
        rank_one = torch.einsum("hd,m->hmd", noise((shape[0], shape[2])), noise(shape[1], 1))
    else:
        rank_one = torch.outer(noise(shape[0]), noise(shape[1], 1))
    narrow, wide = one(tiny, name, rank_one), one(tiny, name, noise(shape))
    assert narrow["effective_rank"] == pytest.approx(1.0, abs=1e-3)
    assert narrow["top_share"] == pytest.approx(1.0, abs=1e-6)
    assert narrow["rank_limit"] == wide["rank_limit"] == 32
    assert wide["effective_rank"] > 0.75 * 32
    assert wide["top_share"] < 0.25


def test_equal_singular_values_have_the_full_effective_rank(tiny):
    square, _ = torch.linalg.qr(noise((64, 32)))
    row = one(tiny, "blocks.0.mlp.W_out", square)
    assert row["effective_rank"] == pytest.approx(32, rel=1e-5)
    assert row["top_share"] == pytest.approx(1 / 32, rel=1e-5)
    assert row["norm"] == pytest.approx(math.sqrt(32), rel=1e-5)


READERS = {
    "attn.W_Q": "q", "attn._W_K": "k", "attn._W_V": "v", "mlp.W_gate": "gate", "mlp.W_in": "up",
}  # fmt: skip


@pytest.mark.parametrize(("part", "kind"), READERS.items())
def test_what_reads_the_stream_is_held_against_the_vector_of_the_layer_below(tiny, tiny_vectors, part, kind):
    name = f"blocks.1.{part}"
    shape = parameters_of(tiny)[name].shape
    others = noise(shape[:-2] + shape[-1:])  # everything but the axis of d_model
    reads = torch.einsum("m,...d->...md", unit(tiny_vectors, L0), others)
    row = one(tiny, name, reads, tiny_vectors)
    assert row["kind"] == kind
    assert row["alignment"] == pytest.approx(1.0, abs=1e-5)
    between = float(unit(tiny_vectors, L0) @ unit(tiny_vectors, L1))
    own_only = one(tiny, name, reads, tiny_vectors.select([1]))
    assert own_only["alignment"] == pytest.approx(abs(between), abs=1e-5)
    assert abs(between) < 0.9


@pytest.mark.parametrize(("part", "kind"), [("attn.W_O", "o"), ("mlp.W_out", "down")])
def test_what_writes_the_stream_is_held_against_its_own_layers_vector(tiny, tiny_vectors, part, kind):
    name = f"blocks.1.{part}"
    shape = parameters_of(tiny)[name].shape
    random = noise(shape)
    row = one(tiny, name, noise(shape[:-1])[..., None] * unit(tiny_vectors), tiny_vectors)
    assert row["kind"] == kind
    assert row["alignment"] == pytest.approx(1.0, abs=1e-5)
    across = random - (random @ unit(tiny_vectors))[..., None] * unit(tiny_vectors)
    assert one(tiny, name, across, tiny_vectors)["alignment"] < 1e-5
    assert one(tiny, name, random, tiny_vectors)["alignment"] == pytest.approx(row["chance"], rel=0.5)


def test_a_kind_of_hook_point_may_be_named_in_full(tiny, tiny_vectors):
    change = noise(parameters_of(tiny)["blocks.1.mlp.W_in"].shape)
    short, full = (one(tiny, "blocks.1.mlp.W_in", change, tiny_vectors, hook=hook) for hook in (
        "resid_post", "hook_resid_post"
    ))  # fmt: skip
    assert short["alignment"] == full["alignment"] > 0


def test_it_tells_of_each_weight_and_can_be_stopped_between_two(tiny, tiny_vectors):
    delta = rtl.bake(tiny, rtl.ablate(tiny_vectors.everywhere(tiny, 1), hook="any"))
    seen: list[Step] = []

    def watch(step: Step | None) -> None:
        if step is not None and step.stage == "weights":
            seen.append(step)
            if step.done == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(watch):
        weight_changes(tiny, delta)
    assert [step.done for step in seen] == [0, 1, 2]
    assert {(step.total, step.unit) for step in seen} == {(len(delta.changes), "parameter")} and len(delta.changes) > 2


def test_chance_is_what_random_directions_give(tiny, provenance):
    change = noise((64, 32))
    found = []
    for seed in range(200):
        random = SteeringVectors({L1: noise(32, seed + 10)}, provenance)
        found.append(one(tiny, "blocks.1.mlp.W_out", change, random)["alignment"])
    chance = one(tiny, "blocks.1.mlp.W_out", change, random)["chance"]
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(chance, rel=0.05)


def test_no_alignment_where_it_has_no_meaning_or_no_vector(tiny, tiny_vectors):
    meaningless = {
        "blocks.1.attn.b_Q": "bias", "blocks.1.ln1.w": "norm", "ln_final.w": "norm", "unembed.W_U": "other",
        "unembed.b_U": "bias", "blocks.1.mlp.b_in": "bias",
    }  # fmt: skip
    for name, kind in meaningless.items():
        row = one(tiny, name, noise(parameters_of(tiny)[name].shape), tiny_vectors)
        assert row["kind"] == kind, name
        assert math.isnan(row["alignment"]), name
    there = one(tiny, "blocks.0.mlp.W_out", noise((64, 32)), tiny_vectors)
    gone = one(tiny, "blocks.0.mlp.W_out", noise((64, 32)), tiny_vectors.select([1]))
    assert there["alignment"] > 0
    assert math.isnan(gone["alignment"])
    assert "alignment" not in one(tiny, "blocks.0.mlp.W_out", noise((64, 32)))


def test_another_kind_of_hook_point_holds_each_block_against_its_own_vector(tiny, provenance):
    vectors = SteeringVectors(
        {"blocks.0.hook_resid_pre": noise(32), "blocks.1.hook_resid_pre": noise(32, 1)}, provenance
    )
    reads = torch.outer(vectors["blocks.1.hook_resid_pre"], noise(64))
    row = one(tiny, "blocks.1.mlp.W_in", reads, vectors, hook="resid_pre")
    assert row["alignment"] == pytest.approx(1.0, abs=1e-5)


def test_no_change_has_size_zero_and_no_rank(tiny, tiny_vectors):
    row = one(tiny, "blocks.1.mlp.W_out", torch.zeros(64, 32), tiny_vectors)
    assert (row["norm"], row["relative"]) == (0, 0)
    assert all(math.isnan(row[column]) for column in ("effective_rank", "top_share", "alignment"))
    with torch.no_grad():
        tiny.blocks[1].mlp.b_out.zero_()
    assert math.isnan(one(tiny, "blocks.1.mlp.b_out", torch.ones(32))["relative"])


def test_relative_is_to_the_weight_as_it_is(tiny):
    weight = tiny.blocks[1].mlp.W_out.detach()
    assert one(tiny, "blocks.1.mlp.W_out", 0.03 * weight)["relative"] == pytest.approx(0.03, rel=1e-5)


def test_it_reads_the_weights_and_changes_none(tiny, tiny_vectors):
    before = fingerprint(tiny)
    delta = rtl.bake(tiny, rtl.add(tiny_vectors, [1], 2.0))
    weight_changes(tiny, delta, tiny_vectors)
    projection_changes(tiny, tiny_vectors, TEXTS, {"baked": delta}, chat=False)
    residual_shifts(tiny, {"baked": delta, "steered": rtl.add(tiny_vectors, [1])}, TEXTS, tiny_vectors)
    assert fingerprint(tiny) == before
    assert not tiny.list_hooks()


def test_a_delta_or_vectors_of_another_model_are_refused(tiny, tiny_vectors, make_tiny, provenance):
    with pytest.raises(ValueError, match=r"blocks\.9\.mlp\.W_out .* no such parameter"):
        one(tiny, "blocks.9.mlp.W_out", noise((64, 32)))
    with pytest.raises(ValueError, match="extracted from a model with d_model 32"):
        one(make_tiny(d_model=16), "blocks.0.mlp.W_out", noise((64, 16)), tiny_vectors)
    heads = SteeringVectors({"blocks.0.attn.hook_z": noise((4, 8))}, provenance)
    with pytest.raises(ValueError, match="one for each head"):
        one(tiny, "blocks.0.mlp.W_out", noise((64, 32)), heads, hook="z")


def test_both_backends_tell_the_same_of_one_change(model, bridge):
    """The same rows and columns, whether heads are an axis of their own or not."""
    vectors = rtl.extract_vectors(model, rtl.load_pairs("mood").sample(4, 0), layers=[2, 3])
    front = "model.layers.3._original_component"
    q, o, up = noise((576, 576)), noise((576, 576), 1), noise((1536, 576), 2)  # as Hugging Face stores them
    hooked = {
        "blocks.3.attn.W_Q": q.reshape(9, 64, 576).transpose(1, 2),
        "blocks.3.attn.W_O": o.T.reshape(9, 64, 576),
        "blocks.3.mlp.W_in": up.T,
        "blocks.3.ln1.w": torch.ones(576),
    }
    bridged = {
        f"{front}.self_attn._original_component.q_proj._original_component.weight": q,
        f"{front}.self_attn._original_component.o_proj._original_component.weight": o,
        f"{front}.mlp._original_component.up_proj._original_component.weight": up,
        f"{front}.input_layernorm._original_component.weight": torch.ones(576),
    }
    ours = weight_changes(model, WeightDelta(hooked, "m", {}, []), vectors)
    theirs = weight_changes(bridge, WeightDelta(bridged, "m", {}, []), vectors)
    assert list(ours["kind"]) == list(theirs["kind"]) == ["q", "o", "up", "norm"]
    assert list(theirs["layer"]) == [3] * 4
    numbers = ["norm", "relative", "effective_rank", "rank_limit", "top_share", "alignment", "chance"]
    np.testing.assert_allclose(ours[numbers].astype(float), theirs[numbers].astype(float), rtol=1e-4)
    embedding = WeightDelta({"model.embed_tokens._original_component.weight": torch.zeros(49152, 576)}, "m", {}, [])
    assert weight_changes(bridge, embedding)["kind"].item() == "embed"


# --- projections


def test_steering_moves_the_projection_at_its_layer_by_the_multiple_and_below_by_nothing(tiny, tiny_vectors):
    steer = rtl.add(tiny_vectors, [1], -2.5)
    table = projection_changes(tiny, tiny_vectors, TEXTS, {"steered": steer, "untuned": None}, chat=False, seed=7)
    assert list(table.columns) == ["arm", "layer", "n", "mean", "low", "high", "seed"]
    rows = table.set_index(["arm", "layer"])
    length = float(tiny_vectors[L1].norm())
    assert rows.loc[("steered", 1), "mean"] == pytest.approx(-2.5 * length, rel=1e-4)
    assert rows.loc[("steered", 0), "mean"] == 0
    assert (rows.loc["untuned", "mean"] == 0).all()
    assert rows.loc["untuned", ["low", "high"]].isna().all(axis=None)  # without spread there is nothing to infer from
    assert set(table["n"]) == {3}
    assert set(table["seed"]) == {7}


def test_the_change_is_the_mean_over_all_tokens_but_the_first_of_each_text(tiny, tiny_vectors):
    steer = rtl.add(tiny_vectors, [0], 4.0)
    expected = []
    for text in TEXTS:
        _, before = token_projections(tiny, tiny_vectors, text)
        with rtl.applied(tiny, steer):
            _, after = token_projections(tiny, tiny_vectors, text)
        expected.append((after - before)[:, 1:].mean(1))
    table = projection_changes(tiny, tiny_vectors, TEXTS, {"steered": steer}, chat=False)
    for layer in (0, 1):
        row = table[table["layer"] == layer].iloc[0]
        assert row["mean"] == pytest.approx(float(torch.stack(expected)[:, layer].mean()), abs=1e-4)
    spread = table[table["layer"] == 1].iloc[0]
    assert spread["low"] < spread["mean"] < spread["high"]


def test_a_baked_arm_moves_texts_as_the_steered_one(tiny, tiny_vectors):
    steer = rtl.add(tiny_vectors, [0], 3.0)
    table = projection_changes(
        tiny, tiny_vectors, TEXTS, {"steered": steer, "baked": rtl.bake(tiny, steer)}, chat=False
    )
    steered, baked = (table[table["arm"] == arm]["mean"].to_numpy() for arm in ("steered", "baked"))
    np.testing.assert_allclose(steered, baked, rtol=1e-3, atol=1e-4)
    assert np.abs(steered).min() > 1


# --- the stream


def at(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_steering_shifts_its_own_layer_along_the_vector_by_the_multiple(tiny, tiny_vectors):
    arms = {"toward": rtl.add(tiny_vectors, [1], 2.0), "away": rtl.add(tiny_vectors, [1], -2.0)}
    found = residual_shifts(tiny, arms, TEXTS, tiny_vectors, seed=3)
    for arm, sign in (("toward", 1), ("away", -1)):
        row = at(found.along, arm=arm, layer=1)
        assert row["cosine_mean"] == pytest.approx(sign, abs=1e-5)
        assert row["norm_mean"] == pytest.approx(2 * float(tiny_vectors[L1].norm()), rel=1e-5)
        assert (row["n"], row["n_cosine"], row["seed"]) == (3, 3, 3)
    row = at(found.between, layer=1)
    assert (row["a"], row["b"], row["n"], row["seed"]) == ("toward", "away", 3, 3)
    assert row["mean"] == pytest.approx(-1, abs=1e-5)


def test_below_the_edit_nothing_shifts_and_no_cosine_is_given(tiny, tiny_vectors):
    found = residual_shifts(
        tiny, {"early": rtl.add(tiny_vectors, [0]), "late": rtl.add(tiny_vectors, [1])}, TEXTS, tiny_vectors
    )
    row = at(found.along, arm="late", layer=0)
    assert (row["norm_mean"], row["n"], row["n_cosine"]) == (0, 3, 0)
    assert all(math.isnan(row[f"cosine_{end}"]) for end in ("mean", "low", "high"))
    assert at(found.along, arm="early", layer=0)["n_cosine"] == 3
    row = at(found.between, layer=0)
    assert row["n"] == 0
    assert math.isnan(row["mean"])
    assert at(found.between, layer=1)["n"] == 3


def test_a_baked_arm_shifts_the_stream_as_the_steered_one_at_every_layer_from_its_own(make_tiny, provenance):
    model = make_tiny(n_layers=5)
    vectors = SteeringVectors({f"blocks.{i}.hook_resid_post": noise(32, i) for i in range(5)}, provenance)
    steer = rtl.add(vectors, [2], 3.0)
    arms = {"steered": steer, "baked": rtl.bake(model, steer), "other": rtl.add(vectors, [1], 3.0)}
    between = residual_shifts(model, arms, TEXTS, vectors).between
    for layer in (2, 3, 4):
        alike = at(between, a="steered", b="baked", layer=layer)
        assert alike["mean"] > 0.9999 and not alike["low"] < 0.9999  # texts that are all alike have no interval
        assert at(between, a="baked", b="other", layer=layer)["mean"] < 0.9
    assert [at(between, a="steered", b="baked", layer=layer)["n"] for layer in (0, 1)] == [0, 0]
    assert len(between) == 3 * 5


def test_shifts_are_read_at_the_last_token_of_the_chat(tiny, tiny_vectors):
    steer, chats = rtl.add(tiny_vectors, [0], 5.0), as_chat(tiny, TEXTS)
    assert chats != TEXTS
    before = last_token_activations(tiny, chats, [L1])[L1]
    with rtl.applied(tiny, steer):
        after = last_token_activations(tiny, chats, [L1])[L1]
    row = at(residual_shifts(tiny, {"s": steer}, TEXTS, tiny_vectors, layers=[1]).along, layer=1)
    shift = after - before
    cosines = torch.cosine_similarity(shift, tiny_vectors[L1].expand_as(shift))
    assert row["norm_mean"] == pytest.approx(float(shift.norm(dim=1).mean()), rel=1e-5)
    assert row["cosine_mean"] == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert row["cosine_low"] < row["cosine_mean"] < row["cosine_high"]


def test_texts_without_a_shift_do_not_count_in_the_cosine(tiny, tiny_vectors):
    """One multiplier for each prompt: the second is left alone."""
    some = rtl.add(tiny_vectors, [1], torch.tensor([2.0, 0.0, 2.0]))
    found = residual_shifts(tiny, {"some": some, "all": rtl.add(tiny_vectors, [1], 2.0)}, TEXTS, tiny_vectors)
    row = at(found.along, arm="some", layer=1)
    assert (row["n"], row["n_cosine"]) == (3, 2)
    assert row["cosine_mean"] == pytest.approx(1, abs=1e-5)
    assert row["norm_mean"] == pytest.approx(4 / 3 * float(tiny_vectors[L1].norm()), rel=1e-4)
    assert at(found.between, layer=1)["n"] == 2


def test_one_arm_has_nothing_to_be_compared_with(tiny, tiny_vectors):
    found = residual_shifts(tiny, {"steered": rtl.add(tiny_vectors, [1])}, TEXTS, tiny_vectors, layers=[1])
    assert isinstance(found, ResidualShifts)
    assert found.between.empty
    assert list(found.between.columns) == ["a", "b", "layer", "n", "mean", "low", "high", "seed"]


def test_a_layer_without_a_vector_has_its_length_and_no_cosine(tiny, tiny_vectors):
    row = at(residual_shifts(tiny, {"s": rtl.add(tiny_vectors, [0])}, TEXTS, tiny_vectors.select([1])).along, layer=0)
    assert row["norm_mean"] > 1
    assert row["n_cosine"] == 0
    assert math.isnan(row["cosine_mean"])


def test_same_seed_same_tables(tiny, tiny_vectors):
    arms = {"steered": rtl.add(tiny_vectors, [0])}
    first, again = (residual_shifts(tiny, arms, TEXTS, tiny_vectors, seed=1).along for _ in range(2))
    assert first.equals(again)


@pytest.mark.parametrize("look", [projection_changes, lambda m, v, t, a: residual_shifts(m, a, t, v)])
@pytest.mark.parametrize(
    ("texts", "arms", "says"),
    [
        (TEXTS, {}, "arms must map at least one name to an intervention"),
        ([], {"untuned": None}, "texts must be a list of at least one text, got an empty one"),
        ("one", {"untuned": None}, "texts must be .*got a str"),
        (
            TEXTS,
            {"wrong": "add"},
            r"arms\['wrong'\] must be a WeightDelta, a list of hooks .*, or None, got a str",
        ),
        (TEXTS, {"far": [("blocks.7.hook_resid_post", lambda h, hook: h)]}, r"arms\['far'\] must fit this model"),
        (TEXTS, {"alien": WeightDelta({"w": torch.ones(1)}, "other", {}, [])}, r"arms\['alien'\] must fit this model"),
    ],
)
def test_what_is_wrong_is_named(tiny, tiny_vectors, as_a_user, look, texts, arms, says):
    with pytest.raises(ValueError, match=says):
        look(tiny, tiny_vectors, texts, arms)


def test_texts_and_vectors_that_cannot_be_projected_are_named(tiny, tiny_vectors):
    with pytest.raises(ValueError, match="texts must have two tokens or more.*index 1"):
        projection_changes(tiny, tiny_vectors, ["Two words", "One"], {"untuned": None}, chat=False)
    with pytest.raises(ValueError, match="one vector per layer, got several at layer 0"):
        projection_changes(tiny, tiny_vectors.everywhere(tiny, 1), TEXTS, {"untuned": None}, chat=False)
    with pytest.raises(ValueError, match="layers.*5"):
        residual_shifts(tiny, {"untuned": None}, TEXTS, tiny_vectors, layers=[5])


def test_on_the_real_model_a_baked_vector_does_inside_what_steering_does(model, pairs):
    vectors = rtl.extract_vectors(model, pairs.sample(8, 0), layers=[8, 10, 12])
    steer = rtl.add(vectors, [10], 2.0)
    arms = {"steered": steer, "baked": rtl.bake(model, steer)}
    found = residual_shifts(model, arms, TEXTS, vectors, layers=[8, 10, 12, 29])
    for layer in (10, 12, 29):
        assert at(found.between, layer=layer)["mean"] > 0.9999
    assert at(found.between, layer=8)["n"] == 0
    assert at(found.along, arm="baked", layer=10)["cosine_mean"] == pytest.approx(1, abs=1e-4)
    assert 0 < at(found.along, arm="baked", layer=12)["cosine_mean"] < 0.999
