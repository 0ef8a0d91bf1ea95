"""Gemma 3, a family with terms of its own, a large vocabulary and no chat template: a tiny model, and the real one.

The real one is fetched only where its user has accepted its terms: RT_LENS_ACCEPT_TERMS=gemma3-270m.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rt_lens.models.generation import generate
from rt_lens.models.load import load_model
from rt_lens.models.registry import BUNDLED_MODELS
from rt_lens.models.sources import (
    ACCEPT_TERMS,
    _downloaded_file,
    _installed_file,
    bundled_folder,
    describe,
    gguf_folder,
)
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import chat_text, has_chat_template
from rt_lens.tuning.export.card import model_card

NAME = "gemma3-270m"
ACCEPTED = NAME in os.environ.get(ACCEPT_TERMS, "")
needs_consent = pytest.mark.skipif(
    not ACCEPTED, reason=f"the terms of {NAME} are the user's to accept: set {ACCEPT_TERMS}={NAME}"
)
TEXTS = [
    "", " ", "a", "The capital of France is", "  two  and   three spaces,\ta tab,\r\nlines\n\n\nand an end ",
    "naïve café, Straße, ﬁ ligature, e\u0301 combined, \u00a0no-break, \u200bzero width, \ufeffmark",
    "東京は日本の首都です。 Привет, как дела? مرحبا بالعالم שלום हिन्दी 한국어",
    "🙂🙃👩‍👩‍👧‍👦🇫🇷 emoji, ▁ a lower one eighth block, \x00\x07 control, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢, \U0010ffff",
    "<bos>Hello<eos> <pad><unk> <start_of_turn>user\nHi<end_of_turn>\n<0x41> <unused7> <mask>",
    "def f(x):\n    return x ** 2  # 3.14159 26535\n", "<html><b>bold</b>&amp;</html>", "x" * 1000,
]  # fmt: skip


def write_gemma(file: Path) -> Path:
    """A Gemma 3 of two blocks, quantised in four ways, with a sentencepiece vocabulary without merges."""
    noise, letters = np.random.default_rng(0), "abcdefghijklmnopqrstuvwxyzTF.,"
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = ["▁", "  ", "   ", "th", "the", "▁the", "▁c", "▁ca", "ap", "▁cap", "é", "🙂", "\n"]
    turns = ["<start_of_turn>", "<end_of_turn>"]
    tokens = [*special, *turns, *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    kinds = (
        [3] * len(special) + [3] * len(turns) + [6] * 256 + [4 if set(w) == {" "} else 1 for w in [*words, *letters]]
    )
    writer = gguf.GGUFWriter(file, "gemma3")
    writer.add_name("Tiny Gemma")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(16)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(n) for n in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    types = gguf.GGMLQuantizationType
    shapes = {"token_embd": (len(tokens), 256, types.Q8_0), "output_norm": (256,)}
    for layer in range(2):
        for name, shape in {
            "attn_norm": (256,), "post_attention_norm": (256,), "ffn_norm": (256,), "post_ffw_norm": (256,),
            "attn_q_norm": (64,), "attn_k_norm": (64,), "attn_q": (256, 256, types.Q5_0),
            "attn_k": (64, 256, types.Q4_0), "attn_v": (64, 256, types.Q8_0), "attn_output": (256, 256, types.Q5_0),
            "ffn_up": (256, 256, types.Q4_1),
            "ffn_gate": (256, 256, types.Q4_0), "ffn_down": (256, 256, types.F16),
        }.items():  # fmt: skip
            shapes[f"blk.{layer}.{name}"] = shape
    for name, (*shape, kind) in shapes.items():
        if not shape:  # a norm
            shape, kind = [kind], types.F32
        numbers = (noise.standard_normal(shape) * (0.1 if len(shape) > 1 else 1)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def compare_with_transformers(folder: Path, file: Path) -> Any:
    """A converted folder against what transformers itself makes of the file: weights bit for bit, tokens of TEXTS."""
    theirs: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    ours: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    tokenizers = [
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
    ]
    for text in TEXTS:
        for special in (True, False):
            ids, expected = (made(text, add_special_tokens=special)["input_ids"] for made in tokenizers)
            assert ids == expected
            assert tokenizers[0].decode(ids) == tokenizers[1].decode(ids)
    for attribute in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "all_special_ids"):
        assert getattr(tokenizers[0], attribute) == getattr(tokenizers[1], attribute)
    assert len(tokenizers[0]) == len(tokenizers[1])
    return theirs


def same_logits(model: Any, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        tokens = torch.tensor([encode(model, text)])
        with torch.no_grad():
            ours, expected = model(tokens), theirs(tokens).logits
        assert expected.std() > 0.1
        assert torch.equal(ours.argmax(-1), expected.argmax(-1))
        assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_a_tiny_gemma_is_what_transformers_makes_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RT_LENS_CACHE", str(tmp_path / "cache"))
    file = write_gemma(tmp_path / "tiny.gguf")
    theirs = compare_with_transformers(gguf_folder(file), file)
    model = load_model(file)
    same_logits(model, theirs, ["the capital of the", "é 🙂  the cap"])
    assert not has_chat_template(model)
    assert generate(model, ["the cap"], max_new_tokens=4)


def test_the_card_of_an_exported_gemma_has_the_notice_that_its_terms_demand(tiny):
    tiny.cfg.rt_lens_name = NAME
    card = model_card("mine", tiny, None, [], behaviour=None, note="")
    assert "license: gemma\n" in card and "base_model: google/gemma-3-270m\n" in card
    assert "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms" in card


@pytest.fixture(scope="module")
def gemma() -> Any:
    return load_model(NAME)


@needs_consent
def test_the_real_models_folder_is_what_transformers_makes_of_its_file(gemma, tmp_path):
    entry = BUNDLED_MODELS[NAME]
    folder = bundled_folder(entry)
    assert describe(NAME)["cached"] == str(folder)
    theirs = compare_with_transformers(folder, _installed_file(entry, tmp_path) or _downloaded_file(entry, tmp_path))
    assert sum(weight.numel() for weight in theirs.parameters()) == entry.parameters
    same_logits(gemma, theirs, [text for text in TEXTS if text.strip()])


@needs_consent
def test_the_real_model_goes_on_with_plain_text(gemma):
    assert not has_chat_template(gemma)
    assert chat_text(gemma, "Hello", system="Be kind.") == "Be kind.\n\nHello"
    tokens = encode(gemma, "The capital of France is")
    assert gemma.tokenizer.decode(tokens) == "<bos>The capital of France is"
    with torch.no_grad():
        likely = gemma(torch.tensor([tokens]))[0, -1].topk(3).indices.tolist()
    assert " Paris" in gemma.tokenizer.batch_decode([[token] for token in likely])
    prompts = ["The capital of Italy is Rome. The capital of France is", "1, 2, 3, 4,"]
    paris, numbers = generate(gemma, prompts, max_new_tokens=4)
    assert paris.startswith(" Paris")
    assert numbers.startswith(" 5,")
