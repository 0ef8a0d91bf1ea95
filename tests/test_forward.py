"""The fast attention computes what TransformerLens computes, calls the same hooks, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rt_lens.models.backends import backend_of, products
from rt_lens.models.backends.hooked import KeyValueCache, can_be_quick
from rt_lens.models.backends.lean import joined
from rt_lens.models.forward import logits_where, quick

pytestmark = pytest.mark.hooked

LENGTHS = (12, 7, 1)
VARIANTS = {
    "grouped": {},
    "one key head": {"n_key_value_heads": 1},
    "not grouped": {"n_key_value_heads": None},
    "soft cap": {"output_logits_soft_cap": 3.0},
    "no attention scale": {"use_attn_scale": False},
    "llama 3 angles": {
        "use_NTK_by_parts_rope": True, "NTK_by_parts_low_freq_factor": 1.0, "NTK_by_parts_high_freq_factor": 4.0,
        "NTK_by_parts_factor": 8.0, "NTK_original_ctx_len": 64, "rotary_base": 500_000.0,
    },
}  # fmt: skip
OFF = {
    "adjacent pairs": {"rotary_adjacent_pairs": True},
    "half rotary": {"rotary_dim": 4},
    "learned positions": {"positional_embedding_type": "standard", "rotary_dim": None, "n_key_value_heads": None},
    "attention results": {"use_attn_result": True},
    "scores soft cap": {"attn_scores_soft_cap": 20.0},
    "normalised queries": {"use_qk_norm": True},
}


def ragged(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of unlike length, padded on one side or (``none``) all of full length."""
    noise = torch.Generator().manual_seed(3)
    tokens = torch.randint(100, 40_000, (len(LENGTHS), max(LENGTHS)), generator=noise)
    mask = torch.ones_like(tokens)
    for row, length in enumerate(LENGTHS):
        if side == "left":
            mask[row, : max(LENGTHS) - length] = 0
        elif side == "right":
            mask[row, length:] = 0
    return tokens.masked_fill(mask == 0, 2), mask


def swapped(model) -> list[bool]:
    return ["forward" in vars(block.attn) for block in model.blocks]


@pytest.fixture(params=VARIANTS)
def variant(request, make_tiny):
    return make_tiny(**VARIANTS[request.param])


# What it computes


@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_logits_equal_plain_transformer_lens(variant, side):
    tokens, mask = ragged(side)
    plain = variant(tokens, attention_mask=mask)
    with quick(variant):
        assert all(swapped(variant))
        fast = variant(tokens, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(fast[real], plain[real], atol=1e-5, rtol=1e-4)
    assert torch.isfinite(fast).all()


@torch.no_grad()
def test_logits_equal_plain_transformer_lens_without_a_mask(tiny):
    tokens, _ = ragged("none")
    plain = tiny(tokens)
    with quick(tiny):
        torch.testing.assert_close(tiny(tokens), plain, atol=1e-5, rtol=1e-4)
        tiny.tokenizer.padding_side = "right"  # then TransformerLens hands on no mask at all
        torch.testing.assert_close(tiny(tokens), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_gives_what_singles_give(tiny, side):
    tokens, mask = ragged(side)
    with quick(tiny):
        batch = tiny(tokens, attention_mask=mask)
        for row in range(len(LENGTHS)):
            real = mask[row].bool()
            single = tiny(tokens[row][real][None], attention_mask=mask[row][real][None])
            torch.testing.assert_close(batch[row][real], single[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_looks_back_and_never_ahead(tiny):
    tokens, _ = ragged("none")
    changed = tokens.clone()
    changed[:, 6] += 1
    with quick(tiny):
        before, after = tiny(tokens), tiny(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_the_real_model_gives_the_same_logits(model):
    tokens, mask = ragged("left")
    plain = model(tokens, attention_mask=mask)[mask.bool()]
    with quick(model):
        assert all(swapped(model))
        fast = model(tokens, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(fast, plain, atol=2e-3, rtol=1e-3)
    assert not any(swapped(model))


@torch.no_grad()
def test_passes_of_unlike_shape_and_mask_follow_each_other_in_one_block(tiny):
    inputs = [
        ragged("left"),
        ragged("none"),
        ragged("right"),
        tuple(x[:2, :5] for x in ragged("right")),
        ragged("left"),
    ]
    plain = [tiny(tokens, attention_mask=mask) for tokens, mask in inputs]
    with quick(tiny):
        for (tokens, mask), expected in zip(inputs, plain, strict=True):
            real = mask.bool()
            torch.testing.assert_close(tiny(tokens, attention_mask=mask)[real], expected[real], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_mask_that_is_changed_in_place_between_passes_is_read_anew(tiny):
    tokens, mask = ragged("none")
    with quick(tiny):
        unmasked = tiny(tokens, attention_mask=mask)
        mask[:, :5] = 0
        masked = tiny(tokens, attention_mask=mask)
    torch.testing.assert_close(masked[:, 5:], tiny(tokens, attention_mask=mask)[:, 5:], atol=1e-5, rtol=1e-4)
    assert (masked[:, 5:] - unmasked[:, 5:]).abs().max() > 1e-3


def test_a_pass_in_inference_mode_does_not_spoil_the_gradients_of_the_next(tiny):
    tokens, mask = ragged("left")
    with quick(tiny):
        with torch.inference_mode():
            tiny(tokens, attention_mask=mask)
        tiny(tokens, attention_mask=mask)[mask.bool()].square().mean().backward()
    assert tiny.blocks[0].attn.W_Q.grad.abs().max() > 0


@torch.no_grad()
def test_rotary_angles_grow_with_the_text_and_stop_at_the_context(make_tiny):
    model = make_tiny(n_ctx=80)
    for block in model.blocks:
        block.attn._extend_rotary_embeddings(16)
    tokens = torch.arange(80)[None] + 100
    with quick(model):
        fast = model(tokens)
        with pytest.raises(ValueError, match=r"tokens must fit this model's context of 80 positions, got 81"):
            model(torch.arange(81)[None])
    torch.testing.assert_close(fast, make_tiny(n_ctx=80)(tokens), atol=1e-5, rtol=1e-4)
    assert not any(swapped(model))


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_gradients_equal_plain_transformer_lens(variant, side):
    tokens, mask = ragged(side)

    def gradients() -> dict[str, torch.Tensor]:
        variant.zero_grad()
        log_probs = variant(tokens, attention_mask=mask).log_softmax(-1)
        # Rows that see padding only may differ, so only real positions count; scaled to gradients of order one.
        (-10 * log_probs[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0] * mask[:, :-1] * mask[:, 1:]).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in variant.named_parameters()}

    plain = gradients()
    with quick(variant):
        fast = gradients()
    assert plain.keys() == fast.keys()
    for name in plain:
        scale = plain[name].abs().max().clamp(min=1.0)
        torch.testing.assert_close(fast[name] / scale, plain[name] / scale, atol=1e-5, rtol=0, msg=name)
    assert plain["blocks.0.attn.W_Q"].abs().max() > 1e-3


# With a key-value cache


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("chunk", [1, 5])
@torch.no_grad()
def test_step_by_step_with_a_cache_equals_one_full_pass(variant, side, chunk):
    tokens, mask = ragged(side)
    plain = variant(tokens, attention_mask=mask)
    cache = KeyValueCache(variant, len(LENGTHS), max(LENGTHS))
    steps = []
    with quick(variant):
        for start in range(0, tokens.shape[1], chunk):
            part = slice(start, start + chunk)
            steps.append(variant(tokens[:, part], attention_mask=mask[:, part], past_kv_cache=cache))
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[real], plain[real], atol=1e-5, rtol=1e-4)
    assert [slot.length for slot in cache.slots] == [tokens.shape[1]] * 2


@torch.no_grad()
def test_a_foreign_cache_runs_transformer_lenss_own_attention(tiny):
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    tokens, mask = ragged("left")
    plain = tiny(tokens, attention_mask=mask)[:, -1]
    cache = TransformerLensKeyValueCache.init_cache(tiny.cfg, "cpu", len(LENGTHS))
    with quick(tiny):
        tiny(tokens[:, :-1], attention_mask=mask[:, :-1], past_kv_cache=cache)
        last = tiny(tokens[:, -1:], attention_mask=mask[:, -1:], past_kv_cache=cache)[:, -1]
    torch.testing.assert_close(last, plain, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_pattern_hooks_with_a_cache_are_refused_with_the_mend(tiny):
    tokens, mask = ragged("none")
    cache = KeyValueCache(tiny, len(LENGTHS), 20)
    seen = []
    with (
        quick(tiny),
        tiny.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: seen.append(x))]),
        pytest.raises(ValueError, match=r"hooks must leave attention scores and patterns alone.*Hook hook_z instead"),
    ):
        tiny(tokens, attention_mask=mask, past_kv_cache=cache)
    assert not seen


# Hooks


def unseen(name: str) -> bool:
    return not name.endswith(("hook_attn_scores", "hook_pattern"))


@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_every_hook_but_scores_and_pattern_is_called_with_the_same_values_in_the_same_order(variant, side):
    tokens, mask = ragged(side)
    _, plain = variant.run_with_cache(tokens, attention_mask=mask, names_filter=unseen)
    with quick(variant):
        _, fast = variant.run_with_cache(tokens, attention_mask=mask, names_filter=unseen)
    assert list(plain) == list(fast)
    assert "blocks.1.attn.hook_rot_k" in plain
    real = mask.bool()
    for name in plain:
        torch.testing.assert_close(fast[name][real], plain[name][real], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("point", ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k",
                                   "attn.hook_z", "hook_attn_out", "hook_resid_pre"])  # fmt: skip
@torch.no_grad()
def test_edits_in_hooks_take_effect_as_in_plain_transformer_lens(tiny, point):
    tokens, mask = ragged("left")
    unedited = tiny(tokens, attention_mask=mask)
    noise = torch.Generator().manual_seed(4)
    edit = [(f"blocks.0.{point}", lambda x, hook: x * torch.randn(x.shape[-1], generator=noise.manual_seed(4)))]
    with tiny.hooks(fwd_hooks=edit):
        plain = tiny(tokens, attention_mask=mask)
        with quick(tiny):
            fast = tiny(tokens, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(fast[real], plain[real], atol=1e-5, rtol=1e-4)
    if point.endswith(("hook_k", "hook_rot_q", "hook_q", "hook_rot_k")):
        real[-1] = False  # a row of one token attends to itself whatever its key
    assert (fast[real] - unedited[real]).abs().max() > 1e-4


@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_a_hooked_pattern_is_transformer_lenss_own(tiny, side):
    tokens, mask = ragged(side)
    names = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"]
    plain_logits, plain = tiny.run_with_cache(tokens, attention_mask=mask, names_filter=names)
    with quick(tiny):
        fast_logits, fast = tiny.run_with_cache(tokens, attention_mask=mask, names_filter=names)
    assert list(fast) == list(plain)
    real = mask.bool()
    pattern, expected = (cache[names[0]].transpose(1, 2)[real] for cache in (fast, plain))
    torch.testing.assert_close(pattern, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
    torch.testing.assert_close(fast_logits[real], plain_logits[real], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_edited_pattern_takes_effect(tiny):
    tokens, _ = ragged("none")
    uniform = [("blocks.1.attn.hook_pattern", lambda x, hook: torch.ones_like(x) / x.shape[-1])]
    with tiny.hooks(fwd_hooks=uniform):
        plain = tiny(tokens)
        with quick(tiny):
            fast = tiny(tokens)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)
    assert (fast - tiny(tokens)).abs().max() > 1e-3


def test_backward_hooks_on_a_pattern_are_called_with_the_same_gradient(tiny):
    tokens, _ = ragged("none")

    def gradient() -> torch.Tensor:
        seen = []
        with tiny.hooks(bwd_hooks=[("blocks.1.attn.hook_pattern", lambda g, hook: seen.append(g.clone()))]):
            tiny(tokens).square().mean().backward()
        return seen[0]

    plain = gradient()
    with quick(tiny):
        fast = gradient()
    torch.testing.assert_close(fast, plain, atol=1e-6, rtol=1e-4)
    assert plain.abs().max() > 0


@torch.no_grad()
def test_permanent_hooks_of_the_user_are_called_and_survive(tiny, hooks_on):
    tokens, _ = ragged("none")
    calls = []
    tiny.add_perma_hook("blocks.1.attn.hook_z", lambda x, hook: calls.append(hook.name))
    tiny.add_hook("blocks.0.hook_resid_post", lambda x, hook: calls.append(hook.name))
    before = hooks_on(tiny)
    assert set(before) == {"blocks.1.attn.hook_z", "blocks.0.hook_resid_post"}
    with quick(tiny):
        tiny(tokens)
    assert calls == ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]
    assert hooks_on(tiny) == before


# What it leaves


def test_the_model_is_as_before_after_the_block_and_after_nested_blocks(tiny):
    before = [dict(vars(block.attn)) for block in tiny.blocks]
    with quick(tiny) as same:
        assert same is tiny
        with quick(tiny):
            assert all(swapped(tiny))
        assert all(swapped(tiny))
    assert not any(swapped(tiny))
    assert [dict(vars(block.attn)) for block in tiny.blocks] == before


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_before_after_an_exception_in_a_hook(tiny, hooks_on, failure):
    tokens, _ = ragged("none")

    def fail(x, hook):
        raise failure

    with pytest.raises(failure), quick(tiny), tiny.hooks(fwd_hooks=[("blocks.1.attn.hook_z", fail)]):
        tiny(tokens)
    assert not any(swapped(tiny))
    assert not hooks_on(tiny)


def test_an_attention_that_someone_else_replaced_is_left_alone(tiny):
    theirs = tiny.blocks[1].attn.forward
    tiny.blocks[1].attn.forward = theirs
    with quick(tiny):
        assert swapped(tiny) == [False, True]
    assert vars(tiny.blocks[1].attn)["forward"] == theirs


@pytest.mark.parametrize("kind", OFF)
@torch.no_grad()
def test_a_model_with_other_maths_is_left_alone(make_tiny, kind):
    model = make_tiny(**OFF[kind])
    tokens, mask = ragged("left")
    plain = model(tokens, attention_mask=mask)
    assert not can_be_quick(model)
    with quick(model) as same:
        assert same is model
        assert not any(swapped(model))
        assert torch.equal(model(tokens, attention_mask=mask), plain)


@torch.no_grad()
def test_a_gpt2_style_model_is_left_alone(make_tiny):
    model = make_tiny(
        positional_embedding_type="standard", rotary_dim=None, normalization_type="LN", gated_mlp=False,
        final_rms=False, act_fn="gelu_new", n_key_value_heads=None,
    )  # fmt: skip
    tokens, mask = ragged("left")
    plain = model(tokens, attention_mask=mask)
    with quick(model):
        assert not any(swapped(model))
        assert torch.equal(model(tokens, attention_mask=mask), plain)
    where = mask.bool()
    torch.testing.assert_close(
        torch.cat([*logits_where(model, tokens, mask, where)]), plain[where], atol=1e-5, rtol=1e-4
    )


def test_what_is_no_model_is_refused_by_name():
    message = (
        r"model must be a HookedTransformer or a TransformerBridge, got a Linear\. Load it with rt_lens\.load_model"
    )
    with pytest.raises(ValueError, match=message), quick(torch.nn.Linear(2, 2)):
        pass


# The pieces of a forward pass


@torch.no_grad()
def test_the_final_residual_unembedded_is_the_logits(variant):
    tokens, mask = ragged("left")
    plain, cache = variant.run_with_cache(tokens, attention_mask=mask, names_filter="blocks.1.hook_resid_post")
    backend = backend_of(variant)
    residual = backend.residual(tokens, mask)
    assert torch.equal(residual, cache["blocks.1.hook_resid_post"])
    torch.testing.assert_close(backend.unembed(residual), plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(backend.unembed(residual[1, -1]), plain[1, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_logits_where_equals_the_chosen_ones_in_order(variant, side):
    tokens, mask = ragged(side)
    plain = variant(tokens, attention_mask=mask)
    where = mask.bool() & (torch.arange(12) % 3 != 1)
    found = torch.cat([*logits_where(variant, tokens, mask, where, size=2)])
    assert found.shape == (int(where.sum()), variant.cfg.d_vocab)
    torch.testing.assert_close(found, plain[where], atol=1e-5, rtol=1e-4)
    assert not any(swapped(variant))


@torch.no_grad()
@pytest.mark.parametrize("write", ["in place", "through data"])
def test_weights_written_between_passes_are_read_anew(tiny, write):
    tokens = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    with quick(tiny):
        before = tiny(tokens)
    for parameter in tiny.parameters():
        (parameter if write == "in place" else parameter.data).mul_(1.5)
    with quick(tiny):
        after = tiny(tokens)
    torch.testing.assert_close(after, tiny(tokens), atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("switch", ["0", "1"])
def test_products_are_torchs_and_keep_their_gradients(monkeypatch, switch):
    monkeypatch.setenv(products.SWITCH, switch)
    products._operator.cache_clear()
    try:
        assert (products._operator() is None) == (switch == "0")
        noise = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(shape, generator=noise) for shape in ((2, 5, 16), (8, 16)))
        bias = torch.randn(8, generator=noise)
        for each in (weight, weight.T.contiguous().T):
            torch.testing.assert_close(products.product(x, each, bias), torch.nn.functional.linear(x, weight, bias))
        for trained in (x, weight, bias):
            trained.requires_grad_(True)
            products.product(x, weight, bias).sum().backward()
            assert trained.grad is not None and trained.grad.abs().sum() > 0
            trained.requires_grad_(False)
    finally:
        products._operator.cache_clear()


@torch.no_grad()
@pytest.mark.parametrize("biased", [True, False])
def test_matrices_that_read_the_same_input_are_one_product_as_long_as_they_lie_together(tmp_path, biased):
    from rt_lens.models.backends.hooked_folder import hooked_from_folder  # not there with TransformerLens 4

    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=biased,
    ))  # fmt: skip
    for name, parameter in theirs.named_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape) * name.endswith("bias")
    theirs.save_pretrained(tmp_path)
    model = hooked_from_folder(tmp_path, device="cpu", dtype=torch.float32)
    backend, tokens = backend_of(model), torch.arange(12).view(2, 6) + 5
    expected = theirs.eval()(tokens).logits
    with quick(model):
        torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-5)
        weights = backend.weights(1)
        assert torch.equal(weights.qkv.matrix, torch.cat([weights.q, weights.k, weights.v]))
        assert torch.equal(weights.qkv.bias, torch.cat([weights.q_bias, weights.k_bias, weights.v_bias]))
        assert torch.equal(weights.gate_up.matrix, torch.cat([weights.gate, weights.up]))
        assert weights.qkv.matrix.data_ptr() == weights.q.data_ptr()  # a view, which no write can outdate
        for name in ("attn.W_Q", "mlp.W_in"):
            parameter = model.blocks[1].get_parameter(name)
            parameter.data = parameter.data.clone()
        weights = backend.weights(1)
        assert weights.qkv is None and weights.gate_up is None
        torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-5)
    with torch.enable_grad():
        assert backend.weights(0).qkv is None


def test_matrices_of_other_memory_or_order_are_not_joined():
    whole = torch.randn(6, 4)
    first, second = whole.split([2, 4])
    assert torch.equal(joined((first, second), (None, None)).matrix, whole)
    for parts in (
        (second, first),
        (first, second.clone()),
        (first, second[:, :2]),
        (first.T, second.T),
        (first, first),
    ):
        assert joined(parts, (None, None)) is None
    bias = torch.randn(6)
    assert torch.equal(joined((first, second), bias.split([2, 4])).bias, bias)
    for biases in ((bias[:2], None), (bias[:2], bias[2:].clone()), (bias[:2], bias[2:4])):
        assert joined((first, second), biases) is None
