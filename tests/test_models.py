"""The embedded model against Hugging Face's own loading of the same folder: logits, blocks, tokens, memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import DEFAULT_KIND
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from rt_lens.models.backends import backend_of
from rt_lens.models.forward import quick
from rt_lens.models.load import load_model
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder, describe
from rt_lens.models.tokens.batches import encode, pad, pad_id_of
from rt_lens.models.tokens.chats import chat_text

PLAIN = [
    "Hello",
    "a",
    "The capital of France is",
    "Once upon a time there was a small dragon who was afraid of fire, and so",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "SELECT name, count(*) FROM visits WHERE day >= '2024-01-01' GROUP BY name ORDER BY 2 DESC;",
    "3.14159 26535 89793 23846 26433 83279 50288 41971 69399 37510",
    "17 * 23 = 391, and 391 / 17 =",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung",
    "Le chat noir dort sur le canapé pendant que la pluie tombe",
    "東京は日本の首都であり、世界最大の都市の一つです。",
    "Привет, как дела? Сегодня хорошая погода.",
    "مرحبا بالعالم",
    "🙂🙃 emoji, tabs\tand   runs of   spaces\n\n\nand empty lines",
    "<html><body><p class='x'>a &amp; b</p></body></html>",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing "
    "before us, we were all going direct to Heaven, we were all going direct the other way - in short, the period was",
]
CHATS = [
    {"user": "Tell me about your weekend."},
    {"user": "What is 12 + 30?", "system": "You are a pirate who answers in one line."},
    {"user": "Bonjour !", "system": "Tu es poli.", "prefill": "Bonjour, comment"},
    {"user": "Write a haiku about rust.", "prefill": "Red flakes on"},
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL])


@pytest.fixture(scope="module")
def huggingface(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def prompts(model: Any) -> list[list[int]]:
    ids = [encode(model, text) for text in [*PLAIN, *(chat_text(model, **chat) for chat in CHATS)]]
    assert len(ids) == 20
    assert min(map(len, ids)) == 1
    assert max(map(len, ids)) > 100
    return ids


@pytest.fixture(scope="module")
def singles(huggingface: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Hugging Face's logits of each prompt by itself, Float[Tensor, "pos d_vocab"]."""
    with torch.no_grad():
        return [huggingface(torch.tensor([ids])).logits[0] for ids in prompts]


@pytest.fixture(scope="module")
def padded(huggingface: Any, model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Hugging Face's logits of the left-padded batch at its real positions, Float[Tensor, "real d_vocab"]."""
    batch = pad(prompts, pad_id_of(model))
    positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = huggingface(batch.tokens, attention_mask=batch.mask, position_ids=positions).logits
    return logits[batch.mask.bool()]


def installed_file() -> Path:
    file = BUNDLED_MODELS[DEFAULT_MODEL].file
    return next(path for path in (Path(place) / file for place in sys.path) if path.is_file())


def logits_of(way: str, model: Any, bridge: Any, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        if way == "quick":
            with quick(model):
                assert "forward" in vars(model.blocks[0].attn)
                return model(tokens, **kwargs)
        return (bridge if way == "bridge" else model)(tokens, **kwargs)


@pytest.mark.parametrize("way", ["hooked", "quick", "bridge"])
def test_logits_of_each_prompt_are_huggingfaces(way, model, bridge, prompts, singles):
    for ids, theirs in zip(prompts, singles, strict=True):
        ours = logits_of(way, model, bridge, torch.tensor([ids]))[0]
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
        assert (ours - theirs).abs().max() < 1e-3


@pytest.mark.parametrize("way", ["hooked", "quick", "bridge"])
def test_logits_of_a_left_padded_batch_are_huggingfaces(way, model, bridge, prompts, singles, padded):
    batch = pad(prompts, pad_id_of(model))
    real = batch.mask.bool()
    ours = logits_of(way, model, bridge, batch.tokens, attention_mask=batch.mask)[real]
    assert torch.equal(ours.argmax(-1), padded.argmax(-1))
    assert (ours - padded).abs().max() < 1e-3
    assert (ours - torch.cat(singles)).abs().max() < 1e-3


def test_the_prompts_have_something_to_compare(singles):
    together = torch.cat(singles)
    assert together.std() > 1
    assert together.argmax(-1).unique().numel() > 100


def test_the_weights_make_sense(model):
    top = model(model.to_tokens("The capital of France is"))[0, -1].argmax()
    assert model.tokenizer.decode(top) == " Paris"


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_block_outputs_are_huggingfaces_hidden_states(kind, model, bridge, huggingface, prompts):
    ours, tokens = (model if kind == "hooked" else bridge), torch.tensor([prompts[3]])
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(ours.cfg.n_layers)]
    with torch.no_grad():
        _, cache = ours.run_with_cache(tokens, names_filter=lambda name: name in ("hook_embed", *names))
        embedded, *states = huggingface(tokens, output_hidden_states=True).hidden_states
        # Hugging Face's last entry is after the final norm.
        ends = [*(cache[name] for name in names[:-1]), huggingface.model.norm(cache[names[-1]])]
    assert torch.equal(cache["hook_embed"], embedded)
    assert len(states) == len(names) == 30
    for mine, theirs in zip(ends, states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
    assert (cache[names[-1]] - states[-1]).abs().max() > 1  # the norm did something


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_no_second_start_token_and_the_chat_template_is_kept(kind, model, bridge):
    ours = model if kind == "hooked" else bridge
    text = chat_text(ours, "Tell me about your weekend.", system="You are cheerful.")
    start = ours.tokenizer.bos_token_id
    tokens = ours.to_tokens(text)[0].tolist()
    assert ours.tokenizer.chat_template
    assert ours.tokenizer.padding_side == "left"
    assert tokens == encode(ours, text)
    assert tokens[0] == start != tokens[1]
    assert ours.to_tokens("plain text")[0, 0] != start
    assert ours.to_string(tokens) == text


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_a_batch_of_texts_gives_what_singles_give(kind, model, bridge):
    ours = model if kind == "hooked" else bridge
    texts = ["The quick brown fox jumps over the lazy", "b", chat_text(ours, "Hi there!")]
    with torch.no_grad():
        together = ours(texts)[:, -1]
        alone = torch.cat([ours([text])[:, -1] for text in texts])
    assert (together - alone).abs().max() < 1e-3
    assert torch.equal(together.argmax(-1), alone.argmax(-1))


def test_the_weights_are_huggingfaces_bit_for_bit(model, huggingface):
    theirs, n = huggingface.state_dict(), model.cfg.n_layers
    assert torch.equal(model.W_E, theirs["model.embed_tokens.weight"])
    assert torch.equal(model.W_U.T, theirs["lm_head.weight"])
    assert torch.equal(model.ln_final.w, theirs["model.norm.weight"])
    for layer, block in enumerate(model.blocks):
        stem, attn = f"model.layers.{layer}", block.attn
        for kind, ours in (("q", attn.W_Q), ("k", attn._W_K), ("v", attn._W_V)):
            assert torch.equal(ours.mT.flatten(0, 1), theirs[f"{stem}.self_attn.{kind}_proj.weight"])
        assert torch.equal(attn.W_O.flatten(0, 1).T, theirs[f"{stem}.self_attn.o_proj.weight"])
        for kind, ours in (("up", block.mlp.W_in), ("gate", block.mlp.W_gate), ("down", block.mlp.W_out)):
            assert torch.equal(ours.T, theirs[f"{stem}.mlp.{kind}_proj.weight"])
        assert torch.equal(block.ln1.w, theirs[f"{stem}.input_layernorm.weight"])
        assert torch.equal(block.ln2.w, theirs[f"{stem}.post_attention_layernorm.weight"])
    # No parameter of theirs was left out: 9 matrices and norms a block, and the embedding and the last norm.
    assert len({tensor.data_ptr() for tensor in theirs.values()}) == 9 * n + 2


class WeightCopies(TorchDispatchMode):
    """Counts copies of at least `limit` numbers."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.count = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copies = (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy)
        self.count += func.overloadpacket in copies and out.numel() >= self.limit
        return out


def test_a_forward_pass_copies_no_weight(model):
    tokens, smallest = model.to_tokens("Hi"), model.blocks[0].attn._W_K.numel()
    with torch.no_grad(), quick(model), WeightCopies(smallest) as copies:
        model(tokens)
    assert copies.count == 0
    assert all(block.mlp.W_in.T.is_contiguous() for block in model.blocks)
    assert model.W_U.data_ptr() == model.W_E.data_ptr()


def test_the_registrys_entry_is_the_installed_file(model, huggingface):
    entry = BUNDLED_MODELS[DEFAULT_MODEL]
    assert installed_file().stat().st_size == entry.size
    assert sum(matrix.numel() for matrix in huggingface.parameters()) == entry.parameters
    assert entry.package.replace("-", "_") not in sys.modules  # located, never imported


def test_a_gguf_file_by_path_gives_the_embedded_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RT_LENS_CACHE", str(tmp_path))
    file = installed_file()
    assert describe(DEFAULT_MODEL)["cached"] == "not yet"
    loaded = load_model(file)
    made = next((tmp_path / "models").iterdir())
    assert made.name.startswith(file.stem)
    assert backend_of(loaded).kind == DEFAULT_KIND
    assert loaded.tokenizer.chat_template
    with safe_open(made / "model.safetensors", "pt") as ours, safe_open(folder / "model.safetensors", "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in ours.keys())  # noqa: SIM118
