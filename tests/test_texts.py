"""Perplexity and KL against direct computations: whole texts, long texts in windows, under edits, on either kind of
model; and what may not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import rt_lens as rtl
from rt_lens.data.builtin import neutral_paragraphs
from rt_lens.evaluation.texts import PerplexityResult, log_normaliser, perplexity, windows_of
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder

LONG, SHORT = neutral_paragraphs()[0], "Bread rises."
FOREIGN = "Das Schloß über dem Fluß; 河の水は冷たい。 Привет! 🚂"


def naive(model, text, window, stride, hooks=None):
    """Log-probabilities of each token but the first, one window after the other; hooks are made for each window."""
    ids = model.to_tokens(text, truncate=False)
    n, found, done, begin = ids.shape[1], [], 0, 0
    while done < n - 1:
        if begin + window >= n - 1:
            begin = max(0, n - 1 - window)
        tokens = ids[:, begin : begin + window]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks(begin, tokens.shape[1]) if hooks else []):
            rows = model(tokens)[0].double().log_softmax(-1)
        for token in range(done + 1, min(begin + window, n - 1) + 1):
            found.append(rows[token - 1 - begin])
            done = token
        begin += stride
    return torch.stack(found), ids[0, 1:]


def nll_of(log_probabilities, wanted):
    return -float(log_probabilities.gather(1, wanted[:, None]).sum())


def perplexity_of(model, texts, window=10**6, stride=10**6):
    parts = [naive(model, text, window, stride) for text in texts]
    return math.exp(sum(nll_of(*part) for part in parts) / sum(len(part[1]) for part in parts))


# Texts that fit


def test_in_float64_perplexity_is_that_of_a_direct_computation(tiny):
    tiny.double()
    texts = [LONG, SHORT, FOREIGN]
    found = perplexity(tiny, texts, keep=True)
    assert found.perplexity.mean == pytest.approx(perplexity_of(tiny, texts), rel=1e-7)
    assert found.log_probabilities.dtype == torch.float64
    assert found.log_probabilities.exp().sum(-1) == pytest.approx(np.ones(found.sizes.sum()), abs=1e-12)


def test_in_float32_perplexity_is_that_of_a_direct_computation_in_float64(model):
    texts = [*neutral_paragraphs()[:3], FOREIGN]
    assert perplexity(model, texts).perplexity.mean == pytest.approx(perplexity_of(model, texts), rel=1e-6)


def test_perplexity_is_hugging_faces_own(model):
    folder = bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    texts, exact, loss, n = neutral_paragraphs()[:2], 0.0, 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = model.to_tokens(text)
            found = theirs(ids, labels=ids)
            exact += float(cross_entropy(found.logits[0, :-1], ids[0, 1:], reduction="sum"))
            loss += float(found.loss) * (ids.shape[1] - 1)
            n += ids.shape[1] - 1
    ours = perplexity(model, texts).perplexity.mean
    assert ours == pytest.approx(math.exp(exact / n), rel=1e-6)
    assert ours == pytest.approx(math.exp(loss / n), rel=2e-5)  # theirs goes through float32's log_softmax


def test_a_tokens_log_likelihood_does_not_drift_with_the_vocabulary_and_torchs_own_does():
    logits = 4 * torch.randn(128, 49152, generator=torch.Generator().manual_seed(0))
    exact = logits.double().logsumexp(-1)
    torchs = (logits[:, 0] - logits.log_softmax(-1)[:, 0]).double()
    assert (log_normaliser(logits) - exact).abs().max() < 1e-6
    assert abs(float((log_normaliser(logits) - exact).mean())) < 1e-7 < abs(float((torchs - exact).mean()))
    assert log_normaliser(logits.bfloat16()) == pytest.approx(logits.bfloat16().double().logsumexp(-1), abs=1e-6)


def test_a_window_that_holds_every_text_changes_no_bit(tiny):
    whole = perplexity(tiny, [LONG, SHORT, FOREIGN])
    for window, stride in ((256, 1), (200, 200), (int(whole.sizes.max()) + 1, 7)):
        found = perplexity(tiny, [LONG, SHORT, FOREIGN], window=window, stride=stride)
        assert (found.nll == whole.nll).all() and found.window is found.stride is None


# Texts that do not fit


@given(st.integers(2, 200), st.integers(1, 40), st.data())
def test_windows_predict_each_token_once_from_enough_tokens(length, window, data):
    stride = data.draw(st.integers(1, window))
    predicted = []
    for each in windows_of(length, window, stride):
        assert 0 <= each.start < each.end <= length and each.end - each.start <= window
        assert length <= window or each.end - each.start == window
        for token in range(each.first, min(each.end, length - 1) + 1):
            predicted.append(token)
            assert token - each.start >= min(token, window - stride + 1)
    assert predicted == list(range(1, length))


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 32), (17, 5), (1, 1)])
def test_a_long_text_is_read_in_windows(tiny, window, stride):
    tiny.double()
    found = perplexity(tiny, [LONG, SHORT], window=window, stride=stride)
    assert found.sizes.tolist() == [tiny.to_tokens(text).shape[1] - 1 for text in (LONG, SHORT)]
    assert found.nll[0] == pytest.approx(nll_of(*naive(tiny, LONG, window, stride)), rel=1e-7)
    assert found.perplexity.mean == pytest.approx(perplexity_of(tiny, [LONG, SHORT], window, stride), rel=1e-7)
    assert abs(found.nll[0] - perplexity(tiny, [LONG]).nll[0]) > 1e-6  # and the windows did cut something off


def test_the_default_windows_are_the_context_by_halves(make_tiny):
    small = make_tiny(n_ctx=40)
    ids = small.to_tokens(LONG, truncate=False)[0]
    assert len(ids) > 80
    found = perplexity(small, [SHORT, LONG])
    assert (found.window, found.stride) == (40, 20)
    assert found.sizes[1] == len(ids) - 1
    assert found.nll[1] == pytest.approx(nll_of(*naive(small, LONG, 40, 20)), rel=1e-6)


def test_windows_of_the_bundled_model_of_either_kind(model, bridge):
    direct = perplexity_of(model, [LONG, SHORT], 48, 24)
    assert perplexity(model, [LONG, SHORT], window=48, stride=24).perplexity.mean == pytest.approx(direct, rel=3e-6)
    assert perplexity(bridge, [LONG, SHORT], window=48, stride=24).perplexity.mean == pytest.approx(direct, rel=1e-5)
    assert abs(direct / perplexity(model, [LONG, SHORT]).perplexity.mean - 1) > 0.01  # the windows do matter


# KL


def test_kl_in_windows_is_that_of_a_direct_computation(tiny, tiny_vectors):
    tiny.double()
    texts = [SHORT, LONG]
    reference = perplexity(tiny, texts, keep=True, window=32, stride=16)
    with tiny.hooks(fwd_hooks=rtl.add(tiny_vectors, [1], 1.0)):
        found = perplexity(tiny, texts, reference=reference, batch_size=3, window=32, stride=16)
    for text, kl in zip(texts, found.kl, strict=True):
        before, _ = naive(tiny, text, 32, 16)
        after, _ = naive(tiny, text, 32, 16, lambda *_: rtl.add(tiny_vectors, [1], 1.0))
        direct = float((before.exp() * (before - after)).sum())
        assert direct > 0.01
        assert kl == pytest.approx(direct, rel=1e-7)
    assert (perplexity(tiny, texts, reference=reference, window=32, stride=16).kl == 0).all()


def test_what_is_kept_is_one_row_for_each_token_predicted(tiny):
    result = perplexity(tiny, [SHORT, LONG], keep=True, window=32, stride=16)
    assert result.log_probabilities.shape == (result.sizes.sum(), tiny.cfg.d_vocab)
    assert not result.log_probabilities.exp().sum(-1).sub(1).abs().max() > 1e-5
    assert perplexity(tiny, [SHORT]).log_probabilities is None


# Edits


def test_an_edit_at_one_token_of_a_long_text_acts_there_in_every_window(tiny, tiny_vectors):
    tiny.double()
    vectors, place = tiny_vectors, 20
    vector = vectors.vectors["blocks.1.hook_resid_post"].double()

    def by_hand(begin, width):
        def push(h, hook):
            h = h.clone()
            if 0 <= place - begin < width:
                h[:, place - begin] += 5.0 * vector
            return h

        return [("blocks.1.hook_resid_post", push)]

    with tiny.hooks(fwd_hooks=rtl.add(vectors, [1], 5.0, positions=[place])):
        found = perplexity(tiny, [SHORT + SHORT * 10, LONG], window=32, stride=16)
    direct = nll_of(*naive(tiny, LONG, 32, 16, by_hand))
    assert found.nll[1] == pytest.approx(direct, rel=1e-7)
    assert abs(direct - nll_of(*naive(tiny, LONG, 32, 16))) > 1e-3


def test_an_edit_at_the_last_token_changes_no_prediction_whole_or_in_windows(tiny, tiny_vectors):
    for window in (256, 32):
        plain = perplexity(tiny, [LONG], window=window)
        with tiny.hooks(fwd_hooks=rtl.add(tiny_vectors, [1], 5.0, positions="last")):
            assert perplexity(tiny, [LONG], window=window).nll == pytest.approx(plain.nll, rel=1e-6)
        with tiny.hooks(fwd_hooks=rtl.add(tiny_vectors, [1], 5.0)):
            assert abs(perplexity(tiny, [LONG], window=window).nll - plain.nll) > 0.1


def test_multipliers_by_text_reach_all_of_its_windows(tiny, tiny_vectors):
    texts, strengths = [SHORT, LONG, FOREIGN], torch.tensor([0.0, 3.0, -2.0])
    with tiny.hooks(fwd_hooks=rtl.add(tiny_vectors, [1], strengths)):
        together = perplexity(tiny, texts, window=16, stride=8)
    for number, (text, strength) in enumerate(zip(texts, strengths.tolist(), strict=True)):
        with tiny.hooks(fwd_hooks=rtl.add(tiny_vectors, [1], strength)):
            assert perplexity(tiny, [text], window=16, stride=8).nll[0] == pytest.approx(together.nll[number], rel=1e-6)


# What may not change a score


@pytest.mark.parametrize("window", [None, 12])
def test_batch_size_padding_side_and_order_change_no_score(model, pairs, monkeypatch, window):
    texts = [*LONG.split(". ")[:3], SHORT, FOREIGN]
    vectors = rtl.extract_vectors(model, pairs.sample(2), layers=[20])

    shuffled, references = [3, 1, 4, 0, 2], {}

    def measured(order, batch_size):
        chosen = [texts[i] for i in order]
        if tuple(order) not in references:
            references[tuple(order)] = perplexity(model, chosen, keep=True, batch_size=2, window=window)
        with model.hooks(fwd_hooks=rtl.add(vectors, [20], 1.0)):
            return perplexity(model, chosen, reference=references[tuple(order)], batch_size=batch_size, window=window)

    usual = measured(range(5), 4)
    assert usual.mean_kl.mean > 0.01
    found = {"one by one": measured(range(5), 1), "all at once": measured(range(5), 16)}
    found["another order"] = measured(shuffled, 4)
    monkeypatch.setattr(model.tokenizer, "padding_side", "right")
    found["a tokenizer that pads on the right"] = measured(range(5), 4)
    for change, result in found.items():
        order = np.argsort(shuffled) if change == "another order" else np.arange(5)
        assert result.perplexity.mean == pytest.approx(usual.perplexity.mean, rel=1e-6), change
        assert abs(result.mean_kl.mean - usual.mean_kl.mean) < 1e-5, change
        assert np.abs(result.nll[order] / usual.sizes - usual.nll / usual.sizes).max() < 1e-5, change
        assert np.abs(result.kl[order] / usual.sizes - usual.kl / usual.sizes).max() < 1e-5, change


# What is refused


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ([], {}, r"texts must be a list of at least one text, got an empty one"),
        ("one string", {}, r"texts must be .*got a str.*in a list"),
        (["A b c.", "a"], {}, r"texts must have at least two tokens .* got 1 token at index 1, 'a'\. Leave it out"),
        (["A b c.", ""], {}, r"texts must have at least two tokens .* got no tokens at index 1, ''"),
        (["A b c.", None], {}, r"texts must be a list of texts, got None at index 1"),
        (["A b c."], {"stride": 0}, r"stride must be between 1 and 256, the window, got 0.*Try stride=128"),
        (["A b c."], {"stride": 9, "window": 8}, r"stride must be between 1 and 8, the window, got 9"),
        (["A b c."], {"window": 0}, r"window must be between 1 and 256 tokens, this model's context, got 0"),
        (["A b c."], {"window": 257}, r"window must be between 1 and 256 tokens, this model's context, got 257"),
        (["A b c."], {"batch_size": 0}, r"batch_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_model_runs(tiny, as_a_user, texts, changes, message):
    def never(activation, hook):
        raise AssertionError("the model ran")

    with tiny.hooks(fwd_hooks=[("hook_embed", never)]), pytest.raises(ValueError, match=message):
        perplexity(tiny, texts, **changes)


def test_a_reference_that_does_not_fit_is_refused(tiny):
    with pytest.raises(ValueError, match="reference must hold its log-probabilities"):
        perplexity(tiny, [LONG], reference=perplexity(tiny, [LONG]))
    kept = perplexity(tiny, [LONG], keep=True)
    with pytest.raises(ValueError, match="reference must be measured on the same texts"):
        perplexity(tiny, [SHORT], reference=kept)
    with pytest.raises(ValueError, match=r"window and stride \(32, 16\) .*, got \(None, None\)"):
        perplexity(tiny, [LONG], reference=kept, window=32)


# Intervals


def test_intervals_are_over_texts_and_hold_the_estimate(tiny):
    result = perplexity(tiny, neutral_paragraphs()[:8], seed=3)
    low, mean, high = result.perplexity.low, result.perplexity.mean, result.perplexity.high
    assert result.perplexity.n == 8 and low < mean < high
    assert mean == pytest.approx(math.exp(result.nll.sum() / result.sizes.sum()))
    assert math.isnan(perplexity(tiny, [LONG]).perplexity.low)  # one text says nothing of other texts


def test_pooling_averages_and_refuses_other_texts_or_windows(tiny):
    one = perplexity(tiny, [SHORT, LONG], window=32)
    other = PerplexityResult(one.nll + 2.0, None, one.sizes, one.texts_sha256, one.seed, None, one.window, one.stride)
    pooled = PerplexityResult.pooled([one, other])
    assert pooled.nll == pytest.approx(one.nll + 1.0) and pooled.window == 32 and pooled.kl is None
    with pytest.raises(ValueError, match="results must be of the same texts and windows, got 2"):
        PerplexityResult.pooled([one, perplexity(tiny, [SHORT, LONG])])
    with pytest.raises(ValueError, match="results must be a list of at least one"):
        PerplexityResult.pooled([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_no_distance_from_itself_in_any_type(make_tiny, dtype):
    model = make_tiny(dtype=dtype)
    texts = neutral_paragraphs()[:3]
    untuned = perplexity(model, texts, keep=True)
    assert perplexity(model, texts, reference=untuned).mean_kl.mean == 0
