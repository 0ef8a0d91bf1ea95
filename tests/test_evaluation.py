"""Measures: scorers on hand cases, perplexity and KL against direct computations, facts on right and wrong answers."""

from __future__ import annotations

import math

import pytest
import torch

import rt_lens as rtl
from rt_lens.evaluation import Lexicon, TextFit, evaluate, facts_kept, make_scorer, repetition, text_fit, vader

TEXTS = ["The lock lets a boat climb a hill.", "Bread rises.", "A map scale tells how far apart two places are."]


def test_vader_orders_moods():
    assert vader("I am so happy, this is wonderful!") > 0.5 > -0.5 > vader("I am miserable, this is terrible.")


def test_lexicon_counts_whole_words_and_phrases():
    score = Lexicon(("therefore", "I am"), ("i'm", "kind of", "yeah"))
    assert score("Therefore I am here.") == 1.0
    assert score("Yeah, I’m kind of tired.") == -1.0
    assert score("Therefore, yeah.") == 0.0
    assert score("Yeahs and thereforeness") == 0.0


@pytest.mark.parametrize("scorer", ["vadr", {"kind": "lexicon", "positive": ["a"]}, {}])
def test_bad_scorers_are_named(scorer):
    with pytest.raises(ValueError, match="scorer: "):
        make_scorer(scorer)


def test_evaluate_scores_what_the_model_says_and_batches_do_not_matter(model):
    prompts = ["How do you take your tea?", "Hello.", "What do you think of trains, and of long journeys by train?"]
    found = evaluate(model, prompts, max_new_tokens=8)
    assert found.responses == rtl.generate(model, prompts, max_new_tokens=8, batch_size=1)
    assert found.scores == [vader(response) for response in found.responses]
    assert found.interval.n == 3
    assert evaluate(model, prompts, len, max_new_tokens=8).scores == [len(r) for r in found.responses]


def test_perplexity_equals_a_direct_computation(model):
    total = count = 0.0
    with torch.no_grad():
        for text in TEXTS:
            tokens = model.to_tokens(text)
            log_probabilities = model(tokens)[0].double().log_softmax(-1)
            total -= float(log_probabilities[:-1].gather(1, tokens[0, 1:, None]).sum())
            count += tokens.shape[1] - 1
    for batch_size in (1, 3):
        found = text_fit(model, TEXTS, batch_size=batch_size)
        assert found.perplexity.mean == pytest.approx(math.exp(total / count), rel=5e-5)  # float32 logits
        assert found.sizes.sum() == count
        assert found.perplexity.low <= found.perplexity.mean <= found.perplexity.high


def test_kl_is_zero_for_the_model_itself_and_right_for_another(model, pairs):
    reference = text_fit(model, TEXTS, keep=True)
    same = text_fit(model, TEXTS, reference=reference).mean_kl
    assert same is not None
    assert same.mean == pytest.approx(0, abs=1e-6)
    vectors = rtl.extract_vectors(model, pairs.sample(2), layers=[20])
    tokens = model.to_tokens(TEXTS[0])
    with torch.no_grad():
        before = model(tokens)[0, :-1].double().log_softmax(-1)
        with model.hooks(fwd_hooks=rtl.add(vectors, [20], 1.0)):
            after = model(tokens)[0, :-1].double().log_softmax(-1)
            found = text_fit(model, TEXTS, reference=reference)
    assert found.kl is not None
    direct = float((before.exp() * (before - after)).sum())
    assert direct > 0.01
    assert found.kl[0] == pytest.approx(direct, rel=1e-3)


def test_a_reference_without_log_probabilities_or_of_other_texts_is_refused(model):
    with pytest.raises(ValueError, match="keep=True"):
        text_fit(model, TEXTS, reference=text_fit(model, TEXTS))
    with pytest.raises(ValueError, match="other texts"):
        text_fit(model, TEXTS[:2], reference=text_fit(model, TEXTS[1:], keep=True))


def test_pooling_the_same_fit_changes_nothing(model):
    fit = text_fit(model, TEXTS)
    assert TextFit.pooled([fit, fit]).perplexity == fit.perplexity


def test_facts_kept_takes_right_answers_and_refuses_wrong_ones(model):
    right = {"question": "What is the capital of France?", "answers": ["Paris"], "wrong": ["Lyon"]}
    wrong = {"question": "What is the capital of France?", "answers": ["Rome"], "wrong": ["Paris"]}
    assert facts_kept(model, [right, wrong, right]) == [True, False, True]


def test_repetition_tells_a_loop_from_prose():
    assert repetition(["the cat sat on a mat", "yes"]) == [0.0, 0.0]
    assert repetition(["no no no no no no no no no"])[0] > 0.8
