"""A model's sizes, known without its weights: from a folder's or file's configuration, or a table of names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from rt_lens.models.llama import FAMILIES
from rt_lens.models.registry import BUNDLED_MODELS
from rt_lens.models.sources import bundled_folder
from rt_lens.tuning.config import LOSSES, TuneConfig
from rt_lens.tuning.weights import parts_of


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        n_layers: blocks.
        d_model: width of the residual stream.
        d_mlp: width of the MLPs.
        d_key_value: keys of one token in one block (heads times their width).
        d_vocab: tokens of the vocabulary.
        n_ctx: most tokens of a text.
        parameters: numbers in the model's file; tied embeddings count once.
        block: kind of weight (q, k, v, o, gate, up, down, bias, norm) -> numbers in one block, as the loaded model has
            them: a HookedTransformer has biases (of zero) where the file has none.
        sides: kind -> rows plus columns of its matrices, for the size of low-rank factors.
    """

    n_layers: int
    d_model: int
    d_mlp: int
    d_key_value: int
    d_vocab: int
    n_ctx: int
    parameters: int
    block: Mapping[str, int]
    sides: Mapping[str, int]

    @property
    def in_blocks(self) -> int:
        """Numbers in the matrices of all blocks: what a forward pass multiplies by."""
        return self.n_layers * sum(size for kind, size in self.block.items() if kind in self.sides)

    def trained(self, config: TuneConfig) -> int:
        """How many of the model's numbers a tuning run may change."""
        return sum(self.block[kind] for _, kind in self._chosen(config))

    def optimised(self, config: TuneConfig) -> int:
        """How many numbers the optimiser holds: those, or their low-rank factors."""
        if not config.lora_rank:
            return self.trained(config)
        return sum(config.lora_rank * self.sides[kind] for _, kind in self._chosen(config))

    def _chosen(self, config: TuneConfig) -> set[tuple[int, str]]:
        """Block and kind of what is trained, for each loss with weight."""
        by_loss = [each for each in (config.target_modules, config.trained_layers) if isinstance(each, Mapping)]
        # A KL that is not named trains no more than the losses it holds in check.
        losses = LOSSES if all(each.get("kl") for each in by_loss) else ("cosine", "token")
        each = {
            (block, kind)
            for loss in losses
            for block in config.blocks_of(loss)
            for kind in config.target_modules_of(loss)
        }
        for block, _ in each:
            if not 0 <= block < self.n_layers:
                raise ValueError(f"layers: {block} is outside this model's blocks 0..{self.n_layers - 1}. Mend [tune].")
        return {(block, kind) for block, kind in each if kind in self.block}


def shape_of(name_or_path: str) -> tuple[Shape, Any, bool]:
    """A model's sizes, and its tokenizer where it can be had without the network.

    Args:
        name_or_path: as for `load_model`. A folder or file is read where it is; an embedded model is converted once if
            it never was; for a name on the hub the local cache is asked first, then TransformerLens's table, then the
            hub's config.json.

    Returns:
        The Shape, the tokenizer or None, and whether the weights lie in a local folder or file.

    Raises:
        ValueError: for what is found nowhere; the message says how to mend it.
    """
    from transformers import AutoTokenizer

    where, file = _place(name_or_path)
    config = _config(where, file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, **file)
    except (OSError, ValueError):
        tokenizer = None
    if tokenizer is not None and not tokenizer.encode("word"):  # transformers makes an empty one where there is none
        tokenizer = None
    return _sizes(config), tokenizer, bool(file) or Path(where).is_dir()


def _place(name_or_path: str) -> tuple[str, dict[str, str]]:
    """Where configuration and tokenizer lie: a folder or a hub name, and the GGUF file in it if it is one."""
    path = Path(name_or_path).expanduser()
    if name_or_path.lower() in BUNDLED_MODELS:
        return str(bundled_folder(BUNDLED_MODELS[name_or_path.lower()])), {}
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return (str(path) if path.is_dir() else name_or_path), {}


def _config(where: str, file: Mapping[str, str]) -> Any:
    """Hugging Face's configuration."""
    from transformers import AutoConfig

    attempts = [lambda: AutoConfig.from_pretrained(where, local_files_only=True, **file)]
    if not file and not Path(where).is_dir():
        attempts += [lambda: _tabled(where), lambda: AutoConfig.from_pretrained(where)]
    reason = ""
    for attempt in attempts:
        try:
            return attempt()
        except (OSError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
    raise ValueError(
        f"model: the configuration of {where!r} cannot be had ({reason}). Give an embedded model, a Hugging Face "
        "folder, a .gguf file, a Llama name that TransformerLens knows, or any hub name while online."
    )


def _tabled(name: str) -> Any:
    """A Llama's configuration from TransformerLens's own table, which needs no network for these names.

    Raises:
        ValueError: for a name that the table has not; what it would ask the hub for is left to transformers.
    """
    from transformer_lens.loading_from_pretrained import get_official_model_name, get_pretrained_model_config
    from transformers import LlamaConfig

    if "llama" not in get_official_model_name(name).lower():
        raise ValueError(f"{name} is no Llama")
    cfg = get_pretrained_model_config(name)
    return LlamaConfig(
        vocab_size=cfg.d_vocab, hidden_size=cfg.d_model, intermediate_size=cfg.d_mlp or 4 * cfg.d_model,
        num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, head_dim=cfg.d_head,
        num_key_value_heads=cfg.n_key_value_heads or cfg.n_heads, max_position_embeddings=cfg.n_ctx,
        tie_word_embeddings=bool(cfg.tie_word_embeddings),
    )  # fmt: skip


def _sizes(config: Any) -> Shape:
    """Counted on the architecture itself, built without memory for its numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes: dict[str, int] = {}
    sides: dict[str, int] = {}
    rows: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        block, kinds = parts_of(name)
        for kind in kinds if block == 0 else ():
            sizes[kind] = sizes.get(kind, 0) + parameter.numel() // len(kinds)
            if parameter.ndim == 2:
                sides[kind] = sum(parameter.shape)
                rows[kind] = parameter.shape[0]
    if config.model_type in FAMILIES:  # loaded as HookedTransformers, which have no bias at the gate
        sizes["norm"] = 2 * config.hidden_size
        sizes["bias"] = sum(size for kind, size in rows.items() if kind != "gate")
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        n_layers=config.num_hidden_layers, d_model=config.hidden_size,
        d_mlp=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        d_key_value=(getattr(config, "num_key_value_heads", None) or heads) * d_head, d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings, parameters=_numbers(model), block=sizes, sides=sides,
    )  # fmt: skip


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # tied ones come once


class WordCount:
    """Stands in for a tokenizer that is not here: 1.4 tokens a word, and what a chat template writes around a turn."""

    chat_template = None
    all_special_ids: tuple[int, ...] = ()
    bos_token_id = 1
    all_special_tokens: tuple[str, ...] = ()
    template_tokens = 24

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As many numbers as tokens are expected."""
        template = [self.bos_token_id] * (self.template_tokens * add_special_tokens)
        return template + [0] * round(1.4 * len(text.split()))


def reader_of(tokenizer: Any) -> Any:
    """What goes for a model where texts are only written and counted."""
    return SimpleNamespace(tokenizer=tokenizer or WordCount())
