"""Captured activations are those of plain `run_with_cache` on each text alone, and capturing leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from llama_folder import spelling_tokenizer

from rt_lens.models.activations import check_hook_names, last_token_activations, token_activations
from rt_lens.models.tokens.batches import encode

TEXTS = [
    "Short.",
    "A rather longer text about rivers, hills, boats and the people who live on them.",
    "Rain",
    "<|im_start|>user\nHello there, how are you?<|im_end|>\n<|im_start|>assistant\n",
    "Two words",
]
POST = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@torch.no_grad()
def alone(model, text: str, name: str) -> torch.Tensor:
    """Plain TransformerLens on one text with no padding and no mask: every position."""
    return model.run_with_cache(torch.tensor([encode(model, text)]))[1][name][0]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
@pytest.mark.parametrize("names", [POST, POST[:1], ["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"]])
def test_last_tokens_equal_plain_singles_in_order_for_any_batch_size(tiny, batch_size, names):
    found = last_token_activations(tiny, TEXTS, names, batch_size=batch_size)
    assert list(found) == names
    for name in names:
        expected = torch.stack([alone(tiny, text, name)[-1] for text in TEXTS])
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)
    assert torch.pdist(found[names[0]]).min() > 1e-3  # else a wrong order would not show


@pytest.mark.parametrize("name", ["hook_embed", "ln_final.hook_normalized"])
def test_hook_points_outside_the_blocks_are_read_as_well(tiny, name):
    found = last_token_activations(tiny, TEXTS, [name, POST[0]])
    torch.testing.assert_close(
        found[name], torch.stack([alone(tiny, text, name)[-1] for text in TEXTS]), atol=1e-5, rtol=1e-4
    )


def test_the_real_models_last_tokens_equal_plain_singles(model):
    name = "blocks.12.hook_resid_post"
    found = last_token_activations(model, TEXTS, [name], batch_size=3)[name]
    expected = torch.stack([alone(model, text, name)[-1] for text in TEXTS])
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-4


def test_every_token_of_one_text_with_its_word(tiny):
    words, found = token_activations(tiny, TEXTS[1], POST)
    assert "".join(words) == TEXTS[1]
    for name in POST:
        assert found[name].shape == (len(words), 32)
        torch.testing.assert_close(found[name], alone(tiny, TEXTS[1], name), atol=1e-5, rtol=1e-4)


def test_activations_are_read_under_the_hooks_that_the_model_carries(tiny):
    plain = last_token_activations(tiny, TEXTS, POST)
    with tiny.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: x + 1)]):
        steered = last_token_activations(tiny, TEXTS, POST)
    assert (steered[POST[1]] - plain[POST[1]]).abs().max() > 0.1


def test_nothing_is_left_hooked_and_the_users_hooks_stay(tiny, hooks_on):
    last_token_activations(tiny, TEXTS, POST)
    token_activations(tiny, TEXTS[0], POST)
    assert not hooks_on(tiny)
    tiny.add_perma_hook(POST[0], lambda x, hook: None)
    tiny.add_hook(POST[1], lambda x, hook: None)
    before = hooks_on(tiny)
    assert set(before) == set(POST)
    last_token_activations(tiny, TEXTS, POST)
    assert hooks_on(tiny) == before


def test_nothing_is_left_hooked_after_an_exception(tiny, hooks_on):
    def fail(x, hook):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), tiny.hooks(fwd_hooks=[(POST[1], fail)]):
        last_token_activations(tiny, TEXTS, POST)
    assert not hooks_on(tiny)
    assert not any("forward" in vars(block.attn) for block in tiny.blocks)


def test_reading_needs_no_gradient_and_keeps_none(tiny):
    assert tiny.embed.W_E.requires_grad
    found = last_token_activations(tiny, TEXTS, POST)
    assert not any(activation.requires_grad for activation in found.values())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "read", [lambda m, n: last_token_activations(m, TEXTS, n), lambda m, n: token_activations(m, "a", n)]
)
def test_an_unknown_hook_name_is_refused_with_near_ones(tiny, read):
    wanted = (
        r"hook_names contains 'blocks\.0\.hook_residpost', .* \(2 blocks\)\. Did you mean .*blocks\.0\.hook_resid_post"
    )
    with pytest.raises(ValueError, match=wanted):
        read(tiny, [POST[0], "blocks.0.hook_residpost"])


def test_known_hook_names_pass(tiny):
    check_hook_names(tiny, list(tiny.hook_dict))


@pytest.mark.parametrize(
    ("texts", "batch_size", "message"),
    [
        ([], 4, "texts must be a list of at least one text, got an empty one"),
        ("one string", 4, "texts must be a list of at least one text, got a str\. Wrap it in a list"),
        (["a", ""], 4, "texts must have at least one token each, got none at index 1"),
        (["a"], 0, "batch_size must be a whole number of at least 1, got 0"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(tiny, hooks_on, texts, batch_size, message):
    with pytest.raises(ValueError, match=message):
        last_token_activations(tiny, texts, POST, batch_size=batch_size)
    assert not hooks_on(tiny)


def test_no_hook_name_is_refused(tiny):
    with pytest.raises(ValueError, match=r"hook_names must name at least one hook point, got an empty list"):
        last_token_activations(tiny, TEXTS, [])


def test_labels_of_tokens_tell_a_words_beginning_from_its_middle(tiny):
    tiny.tokenizer = spelling_tokenizer()
    words, found = token_activations(tiny, "The sun is 日", POST)
    assert words[:3] == ["<s>", " T", "he"] and words[-3:] == ["<0xE6>", "<0x97>", "日"]
    assert len(words) == len(found[POST[0]])
