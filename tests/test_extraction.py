"""Finding directions: against an independent computation, and against data with nothing to find."""

from __future__ import annotations

import pytest
import torch

import rt_lens as rtl
from rt_lens.extraction import logit_lens, separability, token_projections
from rt_lens.prompts import ContrastPairs, Pair


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
    swapped = ContrastPairs("swapped", tuple(Pair(p.negative, p.positive, p.user, p.opener) for p in few.pairs))
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layers": [2]}, "layers: 2 is outside this model's blocks 0..1"),
        ({"layers": []}, "layers: the list is empty"),
        ({"method": "magic"}, "method: 'magic' came"),
        ({"position": "frist"}, "position: 'frist' came"),
        ({"position": "first"}, "first token of .* the two sides are the same"),
        ({"hook": "resid_pst"}, "Near: "),
    ],
)
def test_bad_arguments_are_named(tiny, pairs, arguments, says):
    with pytest.raises(ValueError, match=says):
        rtl.extract_vectors(tiny, pairs.sample(1), **arguments)
