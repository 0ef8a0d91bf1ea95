"""A tiny random Llama of Llama-2's family: plain heads, its ratio of widths, its kind of tokenizer and template."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rt_lens.data.builtin import data_path

_TEMPLATE = (
    "{% set told = namespace(system='') %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set told.system = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' %}"
    "{% elif message.role == 'user' %}{{ bos_token + '[INST] ' + told.system + message.content + ' [/INST]' }}"
    "{% set told.system = '' %}{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-2's kind: every text begins with a space mark, so that " A" alone is two tokens and "A" is one."""
    texts = [
        data_path(f"honesty/{name}.jsonl").read_text(encoding="utf-8")
        for name in ("statements", "personas", "roleplays")
    ]
    texts.append("[INST] <<SYS>> <</SYS>> [/INST] " * 20)
    made = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(texts, BpeTrainer(vocab_size=900, special_tokens=special + bytes_, show_progress=False))
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = _TEMPLATE
    return wrapped


def spelling_tokenizer() -> PreTrainedTokenizerFast:
    """The same with the bytes as plain tokens, as Llama-2 has them: letters that no word has are spelt in bytes."""
    made = llama_tokenizer()
    state = json.loads(made.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    plain = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_folder(folder: Path) -> Path:
    """A folder that save_pretrained wrote: 4 blocks, 4 plain heads, width 64, MLPs of 2.7 times the width."""
    tokenizer = llama_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    made, noise = LlamaForCausalLM(config), torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        parameter.data = float("norm" in name) + 0.1 * torch.randn(parameter.shape, generator=noise)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
