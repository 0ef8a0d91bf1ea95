"""Finding directions: against an independent computation, and against data with nothing to find."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rt_lens as rtl
from rt_lens.data.contrast_pairs import ContrastPairs, Pair
from rt_lens.models.activations import read_activations, token_activations
from rt_lens.models.positions import numbers_in, position_of, rows_of
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.texts import token_text
from rt_lens.vectors.methods import METHODS
from rt_lens.vectors.operators import Erase
from rt_lens.vectors.reading import logit_lens, separability, token_projections
from rt_lens.vectors.steering_vectors import SteeringVectors, hook_names

POST = hook_names([0, 1])
POSITIONS = ["last", "first", "mean", "mean prompt", "mean response", "mean last 3", 'mean "like"', 5, -4]
HOOKS = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"]


@pytest.fixture
def ragged() -> ContrastPairs:
    """Pairs of very unlike length, within and between sides, each of which says `like`."""
    pairs = [
        Pair("Be glad.", "You are someone who grumbles about everything, at any time.", "Do you like tea?", "Well, I"),
        Pair("You like it all.", "You like nothing.", "Trains", "As for"),
        Pair("Cheer up, whatever comes your way.", "Sigh.", "What is it like to live by a river in winter?", "It"),
        Pair("Sing!", "Weep!", "I like rain, hail, snow and every other kind of weather; and you?", "Rain, hail and"),
        Pair("Joy.", "Gloom, doom and so on.", "Like what? I like dogs.", "Dogs"),
    ]
    return ContrastPairs("ragged", tuple(pairs))


@torch.no_grad()
def plain_sides(model: Any, pairs: ContrastPairs, position: Any, name: str) -> list[torch.Tensor]:
    """Both sides by TransformerLens itself, one text at a time, with no padding, mask or rt_lens forward pass."""
    sides = []
    for texts in pairs.texts(model):
        means = []
        for text, pair in zip(texts, pairs.pairs, strict=True):
            (row,) = rows_of(model, [text], [len(text) - len(pair.prefill)])
            numbers = numbers_in(row, position_of(position), "it")
            cached = model.run_with_cache(torch.tensor([encode(model, text)]))[1][name][0]
            means.append(torch.stack([cached[number] for number in numbers]).mean(0))
        sides.append(torch.stack(means))
    return sides


def test_mean_diff_is_the_difference_of_plain_runs_one_text_at_a_time(tiny, pairs):
    few = pairs.sample(3)
    vectors = rtl.extract_vectors(tiny, few, batch_size=2)
    texts = few.texts(tiny)
    with torch.no_grad():
        each = [
            torch.stack(
                [tiny.run_with_cache(tiny.to_tokens(text))[1]["blocks.1.hook_resid_post"][0, -1] for text in side]
            )
            for side in (texts.positive, texts.negative)
        ]
    expected = (each[0] - each[1]).mean(0)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(vectors["blocks.1.hook_resid_post"], expected, atol=1e-4, rtol=1e-4)


def test_provenance_says_what_the_vectors_are(tiny, pairs):
    few = pairs.sample(2, seed=3)
    made = rtl.extract_vectors(tiny, few, layers=[1], seed=3).provenance
    assert (made.behaviour, made.method, made.n_pairs, made.seed) == ("mood", "mean_diff", 2, 3)
    assert made.data_sha256 == few.sha256


def test_mood_separates_held_out_pairs_and_swapped_sides_do_not(model, pairs):
    train, held_out = pairs.split(0.7, seed=0)
    vectors = rtl.extract_vectors(model, train.sample(24), layers=range(16, 22))
    few = held_out.sample(20)
    assert separability(model, vectors, few)["accuracy"].min() >= 0.9
    swapped = ContrastPairs("swapped", tuple(Pair(p.negative, p.positive, p.user, p.prefill) for p in few.pairs))
    assert separability(model, vectors, swapped)["accuracy"].max() <= 0.1


def test_token_projections_are_scalar_products_with_the_unit_vector(tiny, tiny_vectors):
    tokens, values = token_projections(tiny, tiny_vectors, "A dog ran home.")
    with torch.no_grad():
        _, cache = tiny.run_with_cache(tiny.to_tokens("A dog ran home."))
    name = "blocks.1.hook_resid_post"
    unit = tiny_vectors[name] / tiny_vectors[name].norm()
    torch.testing.assert_close(values[1], cache[name][0] @ unit, atol=1e-5, rtol=1e-4)
    assert len(tokens) == values.shape[1]


def test_logit_lens_is_the_final_norm_and_unembedding_of_the_vector(tiny, tiny_vectors):
    vector = tiny_vectors["blocks.1.hook_resid_post"]
    with torch.no_grad():
        scores = (tiny.ln_final.w * vector / vector.norm()) @ tiny.W_U
    table = logit_lens(tiny, tiny_vectors.select([1]), top=3).set_index("sign")["tokens"]
    assert table["+v"] == [tiny.tokenizer.decode([i]) for i in scores.topk(3).indices.tolist()]
    assert table["-v"] == [tiny.tokenizer.decode([i]) for i in (-scores).topk(3).indices.tolist()]


@torch.no_grad()
def test_logit_lens_of_a_model_with_biases_is_the_directions_own(make_tiny, tiny_vectors):
    """LayerNorm as GPT-2 and Pythia have it: what is the same for every direction is no part of this one."""
    tiny = make_tiny(normalization_type="LN", final_rms=False)
    vector = tiny_vectors["blocks.1.hook_resid_post"]
    loud = 1234
    tiny.ln_final.b += 100 * tiny.W_U[:, loud] / tiny.W_U[:, loud].norm()  # raises one token whatever the direction
    tiny.unembed.b_U[4321] = 1e4
    centred = vector - vector.mean()
    scores = (tiny.ln_final.w * centred / (centred.pow(2).mean() + tiny.cfg.eps).sqrt()) @ tiny.W_U
    own = logit_lens(tiny, tiny_vectors.select([1]), top=5).set_index("sign")["tokens"]
    assert own["+v"] == [token_text(tiny, i) for i in scores.topk(5).indices.tolist()]
    assert own["-v"] == [token_text(tiny, i) for i in (-scores).topk(5).indices.tolist()]
    assert not set(own["+v"]) & set(own["-v"])
    shared = tiny.ln_final(vector[None, None])[0, 0] @ tiny.W_U
    assert shared.argmax() == loud == (tiny.ln_final(-vector[None, None])[0, 0] @ tiny.W_U).argmax()
    turned = dataclasses.replace(tiny_vectors, vectors={name: -each for name, each in tiny_vectors.vectors.items()})
    other = logit_lens(tiny, turned.select([1]), top=5).set_index("sign")["tokens"]
    assert (other["+v"], other["-v"]) == (own["-v"], own["+v"])


@torch.no_grad()
def test_logit_lens_of_the_bundled_model_has_no_bias_to_leave_out(model, provenance):
    noise = torch.Generator().manual_seed(0)
    vector = torch.randn(model.cfg.d_model, generator=noise)
    found = logit_lens(model, SteeringVectors({"blocks.20.hook_resid_post": vector}, provenance), top=20)
    plain = model.ln_final(vector[None, None])[0, 0] @ model.W_U
    for sign, scores in (("+v", plain), ("-v", -plain)):
        (tokens,) = found.loc[found["sign"] == sign, "tokens"]
        assert tokens == [token_text(model, i) for i in scores.topk(20).indices.tolist()]


# Reading


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_and_hook_point_equals_plain_runs_one_text_at_a_time(tiny, ragged, position, hook):
    (name,) = hook_names([1], hook)
    positive, negative = plain_sides(tiny, ragged, position, name)
    expected = (positive - negative).mean(0)
    if position == "first":  # a causal model's first token has seen nothing
        assert not expected.any()
        with pytest.raises(ValueError, match=r"the two sides are the same, token by token, up to the first token of"):
            rtl.extract_vectors(tiny, ragged, position=position, layers=[1], hook=hook)
        return
    found = rtl.extract_vectors(tiny, ragged, position=position, layers=[1], hook=hook, batch_size=4)
    assert expected.norm() > 1e-3
    assert found[name].shape == ((4, 8) if hook == "z" else (32,))
    torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", [position for position in POSITIONS if position != "first"])
def test_vectors_do_not_depend_on_padding_or_batch_size(tiny, ragged, position):
    lengths = [len(encode(tiny, text)) for side in ragged.texts(tiny) for text in side]
    assert max(lengths) - min(lengths) > 12
    found = [
        rtl.extract_vectors(tiny, ragged, position=position, batch_size=batch_size) for batch_size in (1, 2, 3, 7, 32)
    ]
    for name in POST:
        assert found[0][name].norm() > 1e-3
        for other in found[1:]:
            torch.testing.assert_close(other[name], found[0][name], atol=1e-5, rtol=0)


def test_positions_read_different_tokens(tiny, ragged):
    found = [rtl.extract_vectors(tiny, ragged, position=p)[POST[1]] for p in POSITIONS if p != "first"]
    assert torch.pdist(torch.stack(found)).min() > 1e-3


def test_a_position_of_ones_own_sees_each_row_and_may_choose_in_each(tiny, ragged):
    seen = []

    def halfway(row) -> list[int]:
        seen.append(row.text)
        return [len(row.ids) // 2]

    found = rtl.extract_vectors(tiny, ragged, position=halfway, layers=[0])
    positive, negative = plain_sides(tiny, ragged, halfway, POST[0])
    texts = ragged.texts(tiny)
    assert seen[: 2 * len(ragged)] == texts.positive + texts.negative
    assert found.provenance.position.startswith("halfway of the chat prompt")
    torch.testing.assert_close(found[POST[0]], (positive - negative).mean(0), atol=1e-5, rtol=1e-4)


def test_offsets_equal_separate_extractions(tiny, ragged):
    found = rtl.vectors.extract_offsets(tiny, ragged, last=6, batch_size=3)
    assert list(found) == [-1, -2, -3, -4, -5, -6]
    for number, vectors in found.items():
        alone = rtl.extract_vectors(tiny, ragged, position=number)
        assert vectors.provenance == alone.provenance
        for name in POST:
            torch.testing.assert_close(vectors[name], alone[name], atol=1e-5, rtol=0)
    assert not torch.allclose(found[-1][POST[1]], found[-2][POST[1]], atol=1e-3)


def test_offsets_at_which_the_sides_are_the_same_are_left_out_and_texts_too_short_refused(tiny):
    same_beginning = ContrastPairs("x", (Pair("Go", "So", "Hm"),))
    length = len(encode(tiny, same_beginning.texts(tiny).positive[0]))
    found = rtl.vectors.extract_offsets(tiny, same_beginning, last=length)
    assert list(found) == list(range(-1, 3 - length - 1, -1))  # all but start token, role and newline
    with pytest.raises(
        ValueError,
        match=rf"position must be between .* for text 0 of the positive side, .* got .token {length + 1} from the end",
    ):
        rtl.vectors.extract_offsets(tiny, same_beginning, last=length + 1)
    with pytest.raises(ValueError, match="last must be a number of tokens of at least 1, got 0"):
        rtl.vectors.extract_offsets(tiny, same_beginning, last=0)


# What is known of the vectors


@pytest.mark.parametrize(
    ("position", "words", "tokens"),
    [
        ("last", "last token", (" I",)),
        ("mean response", "mean over the tokens of the response's prefill", ("Well", ",", " I")),
        ('mean "like"', "mean over the tokens of 'like'", (" like",)),
        (-2, "token 2 from the end", (",",)),
    ],
)
def test_provenance_says_the_position_in_words_and_in_the_first_pairs_tokens(tiny, ragged, position, words, tokens):
    made = rtl.extract_vectors(tiny, ragged, position=position, layers=[0]).provenance
    assert made.position == f"{words} of the chat prompt and the prefill of the response"
    assert made.position_tokens == tokens


@pytest.mark.parametrize("hook", HOOKS)
def test_vectors_at_every_hook_point_are_the_same_after_a_file(tmp_path, tiny, ragged, hook):
    vectors = rtl.extract_vectors(tiny, ragged, hook=hook, position="mean prompt")
    loaded = SteeringVectors.load(vectors.save(tmp_path / "v.safetensors"))
    assert loaded.provenance == vectors.provenance
    assert set(loaded.hook_names) == set(hook_names([0, 1], hook))
    assert all(torch.equal(loaded[name], vectors[name]) for name in vectors.hook_names)
    loaded.check_fits(tiny)


@pytest.mark.usefixtures("as_a_user")
def test_norm_unit_gives_length_1_to_each_vector_and_each_head(tiny, ragged):
    for hook in ("resid_post", "z"):
        (name,) = hook_names([1], hook)
        kept, unit = (rtl.extract_vectors(tiny, ragged, hook=hook, norm=norm)[name] for norm in ("keep", "unit"))
        assert (kept.norm(dim=-1) - 1).abs().min() > 1e-3
        torch.testing.assert_close(unit, kept / kept.norm(dim=-1, keepdim=True))
    assert "unit norm" in rtl.extract_vectors(tiny, ragged, norm="unit").provenance.method
    with pytest.raises(ValueError, match="norm must be 'keep' or 'unit', got 'max'"):
        rtl.extract_vectors(tiny, ragged, norm="max")


def test_winsorised_clips_each_dimension_of_the_differences(tiny, ragged):
    for hook in ("resid_post", "z"):
        (name,) = hook_names([1], hook)
        positive, negative = plain_sides(tiny, ragged, "last", name)
        differences = positive - negative
        low, high = (differences.double().quantile(q, dim=0).float() for q in (0.2, 0.8))
        found = rtl.extract_vectors(tiny, ragged, hook=hook, winsorised=0.2)
        expected = differences.clamp(low, high).mean(0)
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)
        assert (expected - differences.mean(0)).abs().max() > 1e-3
        assert found.provenance.method == "mean_diff, winsorised 0.2"
    for share in (-0.1, 0.5, float("nan")):
        with pytest.raises(ValueError, match=r"winsorised must be at least 0 and below 0\.5, got "):
            rtl.extract_vectors(tiny, ragged, winsorised=share)


# Methods


@pytest.mark.parametrize("hook", ["resid_post", "z"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_mean_differences_norm(tiny, ragged, method, hook):
    plain, found = (rtl.extract_vectors(tiny, ragged, method=name, hook=hook) for name in ("mean_diff", method))
    assert found.provenance.method == method
    for name in plain.hook_names:
        torch.testing.assert_close(found[name].norm(dim=-1), plain[name].norm(dim=-1), atol=1e-5, rtol=1e-4)
        same = torch.allclose(found[name], plain[name], atol=1e-4)
        assert same == (method in ("mean_diff", "leace"))


def test_random_directions_change_with_layer_and_seed_and_repeat(tiny, ragged):
    first, again, other = (rtl.extract_vectors(tiny, ragged, method="random", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in POST)
    assert abs(first.cosine(other)[POST[0]]) < 0.9
    assert abs(torch.cosine_similarity(first[POST[0]], first[POST[1]], dim=0)) < 0.9


def test_a_method_of_ones_own_gets_both_sides_pair_by_pair(tiny, ragged):
    def largest(positive, negative):
        differences = positive - negative
        return differences[differences.norm(dim=1).argmax()]

    found = rtl.extract_vectors(tiny, ragged, method=largest)
    positive, negative = plain_sides(tiny, ragged, "last", POST[1])
    torch.testing.assert_close(found[POST[1]], largest(positive, negative), atol=1e-5, rtol=1e-4)
    assert found.provenance.method == "largest"


# Erasing


@pytest.mark.parametrize("hook", ["resid_post", "z"])
@torch.no_grad()
def test_erase_makes_the_sides_means_equal_where_it_was_fitted_and_before_they_differed(tmp_path, tiny, ragged, hook):
    name = hook_names([1], hook)[0]
    vectors = rtl.extract_vectors(tiny, ragged, method="leace", layers=[1], hook=hook, position="mean response")
    loaded = SteeringVectors.load(vectors.save(tmp_path / "v.safetensors"))
    for part in ("left", "right", "centre"):
        assert torch.equal(getattr(loaded.erasers[name], part), getattr(vectors.erasers[name], part))
    before = rtl.extract_vectors(tiny, ragged, layers=[1], hook=hook, position="mean response")[name]
    assert before.norm() > 0.1
    with rtl.applied(tiny, rtl.steering.erase(loaded, hook=hook)):
        positive, negative = plain_sides(tiny, ragged, "mean response", name)
    assert (positive - negative).mean(0).norm() < 1e-4 * before.norm()
    assert positive.std(0).norm() > 0.1 * before.norm()  # something else is left


def test_erasers_stay_with_unit_vectors_and_with_a_selection_and_go_with_arithmetic(tiny, ragged):
    vectors = rtl.extract_vectors(tiny, ragged, method="leace")
    unit = rtl.extract_vectors(tiny, ragged, method="leace", norm="unit")
    assert set(vectors.erasers) == set(POST)
    for name in POST:
        torch.testing.assert_close(unit.erasers[name].left, vectors.erasers[name].left)
    assert set(vectors.select([1]).erasers) == {POST[1]}
    assert vectors.select([1]).erasers[POST[1]] is vectors.erasers[POST[1]]
    assert not (2 * vectors).erasers
    with pytest.raises(ValueError, match=r"vectors must carry erasers, got vectors by mean_diff.*method='leace'"):
        rtl.steering.erase(rtl.extract_vectors(tiny, ragged))


def test_the_eraser_reads_otherwise_than_the_direction_it_takes_out(tiny, ragged):
    eraser = rtl.extract_vectors(tiny, ragged, method="leace", layers=[1]).erasers[POST[1]]
    assert torch.cosine_similarity(eraser.left, eraser.right, dim=0) < 0.99
    h = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    once = Erase(eraser.left, eraser.right, eraser.centre)(h)
    torch.testing.assert_close(((once - eraser.centre) @ eraser.right), torch.zeros(1, 4), atol=1e-4, rtol=0)


# Nuisances


def test_a_covariate_of_0_and_1_is_the_difference_of_the_groups_means(tiny, ragged):
    texts = ragged.texts(tiny).positive
    for hook in ("resid_post", "z"):
        (name,) = hook_names([1], hook)
        found = rtl.vectors.covariate_vectors(tiny, texts, [1, 0, 0, 1, 1], name="letter", hook=hook)
        h, _ = plain_sides(tiny, ragged, "last", name)
        expected = h[[0, 3, 4]].mean(0) - h[[1, 2]].mean(0)
        assert expected.norm() > 0.1
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)
    assert (found.provenance.behaviour, found.provenance.method) == ("letter", "covariate")


def test_length_is_the_slope_on_the_number_of_tokens(tiny, ragged):
    texts = ragged.texts(tiny).positive
    found = rtl.vectors.covariate_vectors(tiny, texts, position="mean", layers=[0])
    h, _ = plain_sides(tiny, ragged, "mean", POST[0])
    lengths = torch.tensor([float(len(encode(tiny, text))) for text in texts])
    design = torch.stack([torch.ones(5), lengths], dim=1)
    slope = torch.linalg.lstsq(design.double(), h.double()).solution[1]
    torch.testing.assert_close(found[POST[0]], slope.float(), atol=1e-5, rtol=1e-3)
    assert found.provenance.behaviour == "length"
    assert slope.norm() > 1e-4


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1, 0], "values must be one number for each text, got 2 for 5 texts"),
        ([2, 2, 2, 2, 2], "values must differ between texts, got 5 equal values \(2\)"),
        ("lenght", "values must be 'length' or one number for each text, got 'lenght'"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_covariates_that_cannot_be_are_refused(tiny, ragged, values, says):
    with pytest.raises(ValueError, match=says):
        rtl.vectors.covariate_vectors(tiny, ragged.texts(tiny).positive, values)


def test_without_a_nuisance_there_is_no_projection_on_it_and_before_there_was(tiny, ragged):
    for hook in ("resid_post", "z"):
        vectors = rtl.extract_vectors(tiny, ragged, hook=hook)
        texts = ragged.texts(tiny).positive
        length = rtl.vectors.covariate_vectors(tiny, texts, hook=hook)
        letter = rtl.vectors.covariate_vectors(tiny, texts, [1, 0, 0, 1, 1], hook=hook)
        cleaned = vectors.without(length, letter)
        for name in vectors.hook_names:
            for nuisance in (length[name], letter[name]):
                before, after = ((v[name] * nuisance).sum(-1) / nuisance.norm(dim=-1) for v in (vectors, cleaned))
                assert before.abs().max() > 1e-2
                assert after.abs().max() < 1e-5
            assert cleaned[name].norm() > 0.1 * vectors[name].norm()
        assert cleaned.provenance.method == "mean_diff without length and covariate"


def test_a_nuisance_however_short_beside_another_is_projected_out(tiny, ragged):
    vectors = rtl.extract_vectors(tiny, ragged)
    texts = ragged.texts(tiny).positive
    short = 1e-9 * rtl.vectors.covariate_vectors(tiny, texts)
    long = 1e6 * rtl.vectors.covariate_vectors(tiny, texts, [1, 0, 0, 1, 1])
    for name, cosine in vectors.without(short, long).cosine(1e9 * short).items():
        assert abs(vectors.cosine(1e9 * short)[name]) > 1e-3
        assert abs(cosine) < 1e-5


def test_without_refuses_to_leave_nothing_and_to_miss_a_hook_point(tiny, ragged):
    vectors = rtl.extract_vectors(tiny, ragged)
    with pytest.raises(
        ValueError, match=r"leave something of ragged, but nothing is left at blocks\.0\.hook_resid_post without 2 \* "
    ):
        vectors.without(2 * vectors)
    with pytest.raises(ValueError, match="nuisances must be at least one set"):
        vectors.without()
    with pytest.raises(
        ValueError, match=r"nuisances must have a vector at blocks\.0\.hook_resid_post, but ragged has none"
    ):
        vectors.without(vectors.select([1]))


def test_orthogonalised_sets_have_no_cosine_and_the_first_stays(tiny, ragged, pairs):
    sets = [
        rtl.extract_vectors(tiny, ragged),
        rtl.extract_vectors(tiny, pairs.sample(3)),
        rtl.extract_vectors(tiny, ragged, position="mean"),
    ]
    found = rtl.vectors.orthogonalised(sets)
    assert all(torch.equal(found[0][name], sets[0][name]) for name in POST)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert all(abs(cosine) > 1e-3 for cosine in sets[i].cosine(sets[j]).values())
        assert all(abs(cosine) < 1e-5 for cosine in found[i].cosine(found[j]).values())
    with pytest.raises(ValueError, match="nothing is left"):
        rtl.vectors.orthogonalised([sets[0], sets[1], sets[0] + sets[1]])


# Pairs that the model answers as asked


def test_correct_only_keeps_the_pairs_that_both_personas_get_their_way_in(tiny, ragged, monkeypatch):
    texts = ragged.texts(tiny)
    answers = {text: f"side {side} of pair {i}" for side, some in enumerate(texts) for i, text in enumerate(some)}
    scores = [(1, -1), (-1, 1), (1, 0), (0.5, -0.1), (0, -1)]  # 0 is on neither side of the threshold
    monkeypatch.setattr(
        "rt_lens.evaluation.answering.generate", lambda model, asked, **_: [answers[text] for text in asked]
    )

    def score(answer: str) -> float:
        _, side, _, _, pair = answer.split()
        return scores[int(pair)][int(side)]

    kept = rtl.evaluation.filter_pairs(tiny, ragged, score)
    assert kept.pairs.pairs == (ragged.pairs[0], ragged.pairs[3])
    assert (kept.share.n, kept.share.mean, kept.scorer) == (5, 0.4, "score")
    assert rtl.evaluation.filter_pairs(tiny, ragged, score, threshold=-0.5).pairs.pairs == (
        ragged.pairs[0],
        ragged.pairs[4],
    )
    with pytest.raises(ValueError, match=r"got none of 5: the mean score is 0\.30 on the positive and -0\.22"):
        rtl.evaluation.filter_pairs(tiny, ragged, score, threshold=2.0)


@pytest.mark.hooked  # by what this very model says
def test_correct_only_asks_the_model_itself_with_personas_and_prefills(tiny, ragged):
    texts = ragged.texts(tiny)
    first, second = (rtl.generate(tiny, side, max_new_tokens=3) for side in texts)
    wanted = {first[1], first[3]}
    assert len(wanted) == 2 and not wanted & {first[0], first[2], first[4], second[1], second[3]}

    def score(answer: str) -> float:
        return 1.0 if answer in wanted else -1.0

    kept = rtl.evaluation.filter_pairs(tiny, ragged, score, max_new_tokens=3, batch_size=3)
    assert kept.pairs.pairs == (ragged.pairs[1], ragged.pairs[3])


# Against Hugging Face


@torch.no_grad()
def huggingface_mean_difference(pairs: ContrastPairs, model: Any) -> torch.Tensor:
    """Float[Tensor, "layer d_model"] of the last tokens, each text alone, with no rt_lens or TransformerLens code."""
    folder = bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL])
    huggingface = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    last_block = []
    hooked = huggingface.model.layers[-1].register_forward_hook(
        lambda module, given, out: last_block.append((out[0] if isinstance(out, tuple) else out)[0, -1])
    )
    sides = []
    for texts in pairs.texts(model):
        ends = []
        for text in texts:
            ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            states = huggingface(ids, output_hidden_states=True).hidden_states
            # Hugging Face's last hidden state is after the final norm.
            ends.append(torch.stack([*(state[0, -1] for state in states[1:-1]), last_block.pop()]))
        sides.append(torch.stack(ends))
    hooked.remove()
    return (sides[0] - sides[1]).mean(0)


def test_vectors_are_those_of_huggingfaces_hidden_states_at_every_layer(model, pairs):
    few = pairs.sample(6, seed=5)
    lengths = {len(encode(model, text)) for side in few.texts(model) for text in side}
    assert len(lengths) > 3
    theirs = huggingface_mean_difference(few, model)
    assert theirs.shape == (30, 576)
    worst = 1.0
    for batch_size in (1, 5):
        vectors = rtl.extract_vectors(model, few, batch_size=batch_size)
        ours = torch.stack([vectors[name] for name in hook_names(range(30))])
        cosines = torch.cosine_similarity(ours.double(), theirs.double(), dim=1)
        worst = min(worst, cosines.min().item())
        torch.testing.assert_close(ours.norm(dim=1), theirs.norm(dim=1), atol=0, rtol=1e-4)
    print(f"smallest cosine with Hugging Face's vectors over 30 layers: 1 - {1 - worst:.1e}")
    assert worst >= 0.99999
    neighbours = torch.cosine_similarity(theirs[1:], theirs[:-1], dim=1)
    assert neighbours.max() < 0.99999  # so that a shift by one layer would show


# Faults


def test_one_pair_is_enough_for_a_mean_difference(tiny, ragged):
    one = ContrastPairs("one", ragged.pairs[:1])
    positive, negative = plain_sides(tiny, one, "last", POST[0])
    found = rtl.extract_vectors(tiny, one)
    torch.testing.assert_close(found[POST[0]], (positive - negative)[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(
        ValueError, match=r"pairs 'one', last token .*, at blocks\.0.*must be at least 2 pairs for logistic, got 1"
    ):
        rtl.extract_vectors(tiny, one, method="logistic")


def test_sides_that_are_the_same_are_refused_by_the_pairs_name(tiny, ragged):
    same = ContrastPairs("same", tuple(dataclasses.replace(pair, negative=pair.positive) for pair in ragged.pairs))
    for batch_size in (1, 3, 32):
        with pytest.raises(
            ValueError, match=r"in 'same' the two sides are the same, token by token, up to the last token"
        ):
            rtl.extract_vectors(tiny, same, batch_size=batch_size)


def test_sides_of_unlike_number_are_refused_where_pairs_are_made(tmp_path):
    file = tmp_path / "lame.toml"
    file.write_text('[pairs]\npositive = ["a", "b"]\nnegative = ["c"]\ntopics = ["d"]\n')
    with pytest.raises(ValueError, match="as many positive as negative personas, got 2 and 1"):
        rtl.load_pairs(file)


@pytest.mark.parametrize(
    ("position", "says"),
    [
        ('mean "rain, hail"', r"text 0 of the positive side.*'rain, hail'"),
        ('mean "grumbles"', r"text 0 of the positive side.*'grumbles'"),
        ('mean "glad"', r"text 1 of the positive side.*'glad'"),
        (25, r"for text 0 of the positive side, which has 25 tokens, got .token 25 from the beginning"),
        (60, r"position must be between .* for text 0 of the positive side"),
    ],
)
def test_a_text_without_the_words_or_too_short_is_named_with_its_side(tiny, ragged, position, says):
    with pytest.raises(ValueError, match=says):
        rtl.extract_vectors(tiny, ragged, position=position)


def test_the_negative_side_is_named_too(tiny, ragged):
    swapped = tuple(
        Pair(pair.positive + " I like grumbles.", pair.negative, pair.user, pair.prefill) for pair in ragged.pairs
    )
    with pytest.raises(ValueError, match=r"text 1 of the negative side: the text does not contain 'grumbles'"):
        rtl.extract_vectors(tiny, ContrastPairs("swapped", swapped), position='mean "grumbles"')


def test_a_truncated_file_of_vectors_with_erasers_is_refused_at_every_length(tmp_path, tiny, ragged):
    path = rtl.extract_vectors(tiny, ragged, method="leace").save(tmp_path / "v.safetensors")
    content = path.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="must be a complete safetensors file"):
            SteeringVectors.load(path)


def test_files_of_another_model_or_schema_or_with_strange_names_are_refused(tmp_path, tiny, make_tiny, ragged):
    path = rtl.extract_vectors(tiny, ragged, method="leace").save(tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match=r"d_model 32 .*this model has 48"):
        separability(make_tiny(d_model=48, n_heads=6), SteeringVectors.load(path), ragged)
    with pytest.raises(
        ValueError, match=r"vectors must be at hook points of this model.*blocks\.1\.hook_resid_post.*\(1 blocks\)"
    ):
        separability(make_tiny(n_layers=1), SteeringVectors.load(path), ragged)
    tensors = load_file(path)
    known = {"schema": 1, "kind": "steering_vectors", **dataclasses.asdict(SteeringVectors.load(path).provenance)}

    def rewritten(header: dict[str, Any], **more: torch.Tensor) -> Any:
        save_file({**tensors, **more}, tmp_path / "w.safetensors", metadata={"rt_lens": json.dumps(header)})
        return tmp_path / "w.safetensors"

    assert SteeringVectors.load(rewritten(known)).hook_names
    for header in ({**known, "schema": 2}, {**known, "kind": "delta"}, {**known, "surprise": 1}, {"schema": 1}):
        with pytest.raises(ValueError, match="must be a file of steering vectors of schema 1"):
            SteeringVectors.load(rewritten(header))
    for name in ("../../passwd", "blocks.0.hook_resid_post\n", "blocks.99999.hook_resid_post", "__class__", ""):
        with pytest.raises(
            ValueError, match=r"must name its tensors after hook points|must be a file of steering vectors"
        ):
            SteeringVectors.load(rewritten(known, **{name: torch.ones(32)}))
    for name in (
        "eraser/",
        "eraser/left",
        "eraser/left/blocks.7.hook_mlp_out",
    ):
        with pytest.raises(ValueError, match="must be a file of steering vectors"):
            SteeringVectors.load(rewritten(known, **{name: torch.ones(32)}))


def test_an_exception_while_reading_leaves_no_hook(tiny, ragged, hooks_on):
    def fail(positive, negative):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        rtl.extract_vectors(tiny, ragged, method=fail)
    assert not hooks_on(tiny)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layers": [2]}, "layers.*2.*blocks 0..1"),
        ({"layers": []}, "layers.*empty"),
        ({"method": "magic"}, "method must be one of 'mean_diff', .*got 'magic'"),
        ({"position": "frist"}, "position.*'frist'"),
        ({"position": "first"}, "the two sides are the same, .* first token of"),
        ({"hook": "resid_pst"}, "Near: |Did you mean"),
    ],
)
def test_bad_arguments_are_named(tiny, pairs, arguments, says):
    with pytest.raises(ValueError, match=says):
        rtl.extract_vectors(tiny, pairs.sample(1), **arguments)


def test_random_heads_have_directions_of_their_own(tiny, pairs):
    vectors = rtl.extract_vectors(tiny, pairs.sample(2), method="random", hook="z", layers=[1])
    heads = vectors["blocks.1.attn.hook_z"]
    cosines = torch.cosine_similarity(heads[:, None], heads[None], dim=-1)
    assert (cosines - torch.eye(len(heads))).abs().max() < 0.99


def test_a_mean_over_many_tokens_is_taken_in_float32(make_tiny, pairs):
    model = make_tiny(dtype=torch.bfloat16)
    text = "rain " * 100
    read = read_activations(model, [text], ["blocks.0.hook_resid_post"], [[list(range(100))]])[
        "blocks.0.hook_resid_post"
    ]
    _, each = token_activations(model, text, ["blocks.0.hook_resid_post"])
    torch.testing.assert_close(read[0, 0], each["blocks.0.hook_resid_post"][:100].mean(0), atol=1e-5, rtol=1e-5)
