"""Bridges are compared with transformers before they are used: wrong logits are refused, wrong caches are not used."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_model_folders import make_folder

from rt_lens.models.backends import backend_of
from rt_lens.models.forward import logits_where
from rt_lens.models.generation import generate
from rt_lens.models.load import load_model
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder
from rt_lens.models.tokens.batches import encode, pad, pad_id_of
from rt_lens.steering.binding import ablate, add, scale
from rt_lens.vectors.steering_vectors import Provenance, SteeringVectors, hook_names

PROMPTS = ["Hi", "Tell me about your weekend."]
OLMO2 = {"model_type": "olmo2"}
EXAONE4 = {"model_type": "exaone4", "sliding_window": 8, "sliding_window_pattern": 2}
WIDTHS = {"hidden_size": 32, "n_head": 4, "n_heads": 4, "num_attention_heads": 4}
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 49152}
FALCON = {"model_type": "falcon", "alibi": True, "new_decoder_architecture": False}
MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 49152}


@pytest.fixture(scope="module")
def tokenizer_folder() -> Path:
    return bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL])


@pytest.fixture
def source(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    return lambda name="model", **changes: make_folder(tmp_path / name, tokenizer_folder, changes)


def huggingface(folder: Path, **settings: Any) -> Any:
    read = transformers.AutoModelForCausalLM.from_pretrained
    return read(folder, dtype=torch.float32, attn_implementation="eager", **settings).eval()


def vectors_at(names: list[str], provenance: Provenance) -> SteeringVectors:
    noise = torch.Generator().manual_seed(5)
    return SteeringVectors({name: torch.randn(32, generator=noise) for name in names}, provenance)


# Logits


@pytest.mark.hooked  # TransformerLens 4 knows them; there test_architectures.py compares Cohere with transformers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["cohere", "hunyuan_v1_dense"])
def test_a_bridge_with_other_logits_than_transformers_is_refused_by_family(family, dtype, source):
    """Both turn pairs of dimensions in an order of their own, which the bridge does not know."""
    folder = source(model_type=family, **({"head_dim": 8} if family != "cohere" else {}))
    with pytest.raises(
        ValueError, match=r"model: model must compute what transformers computes, got other logits from"
    ):
        load_model(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("changes", [OLMO2, {"model_type": "qwen3", "head_dim": 8}], ids=["olmo2", "qwen3"])
def test_a_bridge_with_the_same_logits_loads_without_a_word(changes, dtype, source):
    folder = source(**changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_model(folder, backend="bridge", dtype=dtype)


def test_where_nothing_can_be_compared_the_family_is_named(source, monkeypatch):
    folder = source(**OLMO2)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(transformers.Olmo2ForCausalLM, "forward", fails)
    with pytest.warns(UserWarning, match=r"model \(Olmo2ForCausalLM\) cannot be compared .*no such kernel"):
        load_model(folder)


def test_an_architecture_that_nothing_covers_is_named(source):
    folder = source(model_type="helium", head_dim=8)
    with pytest.raises(ValueError, match=r"model: model must be of an architecture that .* got HeliumForCausalLM\."):
        load_model(folder)


# Caches


def answers_of_transformers(folder: Path, model: Any, n: int) -> list[str]:
    """The most likely tokens of transformers' own model after each prompt, without a cache."""
    plain, answers = huggingface(folder), []
    for prompt in PROMPTS:
        ids = encode(model, prompt)
        for _ in range(n):
            with torch.no_grad():
                ids.append(int(plain(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        answers.append(model.tokenizer.decode(ids[-n:], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("changes", [MPT], ids=["mpt"])
def test_a_cache_that_only_the_bridges_own_blocks_get_wrong_is_used_without_hooks_inside_blocks(changes, source):
    folder = source(**changes)
    model = load_model(folder)
    answers = generate(model, PROMPTS, chat=False, max_new_tokens=6)
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda h, hook: h)]):
        uncached = backend_of(model).caches()
        with nullcontext() if uncached else pytest.warns(UserWarning, match="runs without a cache"):
            assert generate(model, PROMPTS, chat=False, max_new_tokens=6) == answers
    assert answers == answers_of_transformers(folder, model, 6)


@pytest.mark.parametrize(
    "changes",
    [pytest.param({**FALCON, **WIDTHS}, id="falcon_alibi", marks=pytest.mark.hooked), pytest.param(MAMBA, id="mamba")],
)  # TransformerLens 4 gets falcon's cache right
def test_a_cache_that_gives_other_logits_is_not_used_and_answers_are_transformers(changes, source):
    folder = source(**changes)
    model = load_model(folder)
    assert not backend_of(model).caches()
    with pytest.warns(UserWarning, match=r"gives other logits with a key-value cache .*runs without a cache"):
        answers = generate(model, PROMPTS, chat=False, max_new_tokens=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it is said once
        assert generate(model, PROMPTS, chat=False, max_new_tokens=6) == answers
    assert answers == answers_of_transformers(folder, model, 6)


def test_a_cache_that_is_right_is_used_and_looked_at_once_without_the_models_hooks(source, provenance):
    model = load_model(source(**OLMO2))
    names, called = hook_names([0]), []
    rows = torch.tensor([1.0, 2.0])  # edits by row would refuse the check's own rows
    noting = [("blocks.0.hook_resid_pre", lambda h, hook: called.append(h.shape[1]))]
    with model.hooks(fwd_hooks=[*noting, *add(vectors_at(names, provenance), multiplier=rows)]):
        generate(model, PROMPTS, chat=False, max_new_tokens=4)
    assert called[1:] == [1, 1, 1]  # a token a step
    assert backend_of(model).cache_errors[True] < 1e-5


# Hook points


@pytest.mark.parametrize(
    "changes", [OLMO2, EXAONE4, {"model_type": "qwen3", "head_dim": 8}], ids=["olmo2", "exaone4", "qwen3"]
)
def test_the_middle_of_the_stream_is_read_right_and_refused_for_edits(changes, source, provenance, hooks_on):
    model = load_model(source(**changes))
    kinds = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.arange(100, 112)[None])
    pre, attention, mid, mlp, post = (cache[f"blocks.1.hook_{kind}"] for kind in kinds)
    torch.testing.assert_close(pre + attention, mid)
    torch.testing.assert_close(mid + mlp, post)
    vectors = vectors_at(["blocks.1.hook_resid_mid"], provenance)
    edits = (
        add(vectors, hook="resid_mid"),
        ablate(vectors, hook="resid_mid"),
        scale({"blocks.1.hook_resid_mid": 0.5}),
    )
    for hooks in edits:
        with (
            pytest.raises(ValueError, match="resid_mid"),
            model.hooks(fwd_hooks=hooks),
        ):
            model(torch.tensor([[504, 2115]]))
        assert not hooks_on(model)
    everywhere = vectors.everywhere(model, 1, hook="resid_mid")
    with torch.no_grad(), model.hooks(fwd_hooks=ablate(everywhere, hook="any")):
        _, cache = model.run_with_cache(torch.tensor([[504, 2115]]))
    unit = vectors["blocks.1.hook_resid_mid"] / vectors["blocks.1.hook_resid_mid"].norm()
    assert (cache["blocks.1.hook_resid_post"] @ unit).abs().max() < 1e-5
    with (
        pytest.raises(ValueError, match="resid_mid of a TransformerBridge"),
        model.hooks(
            fwd_hooks=ablate(everywhere, hook="any", multiplier=0.5)  # twice a half is not a half
        ),
    ):
        model(torch.tensor([[504, 2115]]))


def test_a_hook_point_that_a_bridge_has_not_is_refused_and_not_passed_over(source, provenance):
    """Where attention and MLP read the same residual there is no middle."""
    sizes = {
        "model_type": "gpt_neox",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
    }
    model = load_model(source(**sizes, vocab_size=49152, intermediate_size=48, max_position_embeddings=64))
    hooks = add(vectors_at(["blocks.1.hook_resid_mid"], provenance), hook="resid_mid")
    with pytest.raises(
        ValueError, match=r"hooks contains 'blocks\.1\.hook_resid_mid', which is not in this model \(2 blocks\)\. Did"
    ):
        model.hooks(fwd_hooks=hooks)
    with pytest.raises(ValueError, match=r"hooks contains 'blocks\.7\.hook_resid_post', which is not in this model"):
        model.run_with_hooks(torch.tensor([[5]]), fwd_hooks=[("blocks.7.hook_resid_post", lambda h, hook: None)])


# Only the logits that are read


class LogitsMade:
    """The shapes of all logits that a bridge makes while the block lasts."""

    def __init__(self, model: Any) -> None:
        self.model, self.shapes = model, []

    def __enter__(self) -> list[tuple[int, ...]]:
        self.head = self.model.unembed.original_component
        made = self.head.forward

        def noted(inputs: torch.Tensor) -> torch.Tensor:  # not a hook: those need all logits
            self.shapes.append(tuple(inputs.shape[:2]))
            return made(inputs)

        vars(self.head)["forward"] = noted
        return self.shapes

    def __exit__(self, *_: object) -> None:
        del vars(self.head)["forward"]


def test_a_bridge_makes_only_the_logits_that_are_read_and_they_are_the_same(source):
    model = load_model(source(**OLMO2))
    batch = pad([encode(model, text) for text in PROMPTS], pad_id_of(model))
    where = torch.zeros_like(batch.mask, dtype=torch.bool)
    where[0, -1] = where[1, -3] = where[1, -1] = True
    with torch.no_grad():
        expected = model(batch.tokens, attention_mask=batch.mask)[where]
        with LogitsMade(model) as shapes:
            found = torch.cat(list(logits_where(model, batch.tokens, batch.mask, where, size=2)))
            none = list(logits_where(model, batch.tokens, batch.mask, torch.zeros_like(where)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert sum(len(part) for part in none) == 0
    assert sum(rows * columns for rows, columns in shapes) == 3
    backend_of(model).caches()
    with LogitsMade(model) as shapes:
        generate(model, PROMPTS, chat=False, max_new_tokens=3)
    assert shapes == [(2, 1)] * 3


def test_hooks_on_logits_see_them_all(source):
    model = load_model(source(**OLMO2))
    seen: list[int] = []
    with torch.no_grad(), model.hooks(fwd_hooks=[("unembed.hook_out", lambda h, hook: seen.append(h.shape[1]))]):
        last = torch.tensor([[False, False, True]])
        list(logits_where(model, torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long), last))
    assert seen == [3]


def test_a_bridge_keeps_its_generation_settings(source):
    folder = source(**OLMO2)
    file = folder / "generation_config.json"
    file.write_text(re.sub(r'"eos_token_id": 2', '"eos_token_id": [2, 7]', file.read_text()))
    assert load_model(folder).cfg.rt_lens_generation["eos_token_id"] == [2, 7]
    file.unlink()
    assert load_model(folder).cfg.rt_lens_generation["eos_token_id"] == 2
