"""A model's sizes without its weights: from the configuration in a folder or file, or from a table of names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from rt_lens.models.backends import has_hooked
from rt_lens.models.hub import official_name
from rt_lens.models.llama import FAMILIES
from rt_lens.models.parameter_names import block_and_modules
from rt_lens.models.registry import BUNDLED_MODELS
from rt_lens.models.sources import bundled_folder
from rt_lens.tuning.config import LOSSES, TuneConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        n_layers: blocks.
        d_model: width of the residual stream.
        d_mlp: width of the MLPs.
        d_key_value: size of the keys of one token in one block (heads times their width).
        d_vocab: tokens of the vocabulary.
        n_ctx: largest number of tokens of a text.
        parameters: number of them in the model's file; tied embeddings count once.
        block: module (q, k, v, o, gate, up, down, bias, norm) -> its parameters in one block of the loaded model. A
            HookedTransformer has biases (of zero) where the file has none.
        sides: module -> rows plus columns of its matrices, for the size of low-rank factors.
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
        """Parameters in the matrices of all blocks, which a forward pass multiplies by."""
        return self.n_layers * sum(size for module, size in self.block.items() if module in self.sides)

    def trained(self, config: TuneConfig) -> int:
        """The number of the model's parameters that a tuning run changes."""
        return sum(self.block[module] for _, module in self._trained_modules(config))

    def optimised(self, config: TuneConfig) -> int:
        """The number of parameters in the optimiser: those of the model, or of their low-rank factors."""
        if not config.lora_rank:
            return self.trained(config)
        return sum(config.lora_rank * self.sides[module] for _, module in self._trained_modules(config))

    def _trained_modules(self, config: TuneConfig) -> set[tuple[int, str]]:
        """Block and module of the trained weights, for each loss with a weight."""
        by_loss = [
            setting for setting in (config.target_modules, config.trained_layers) if isinstance(setting, Mapping)
        ]
        # A KL that is not named trains the same weights as the losses beside it.
        losses = LOSSES if all(setting.get("kl") for setting in by_loss) else ("cosine", "token")
        trained = {
            (block, module)
            for loss in losses
            for block in config.blocks_of(loss)
            for module in config.target_modules_of(loss)
        }
        for block, _ in trained:
            if not 0 <= block < self.n_layers:
                raise ValueError(
                    f"layers contains {block}, but this model has blocks 0..{self.n_layers - 1}. Change [tune]."
                )
        return {(block, module) for block, module in trained if module in self.block}


def shape_of(name_or_path: str) -> tuple[Shape, Any, bool]:
    """A model's sizes, and its tokenizer where that is available without the network.

    Args:
        name_or_path: as for `load_model`. A folder or file is read in place; a bundled model is converted on first use;
            for a name on the hub the local cache comes first, then TransformerLens's table, then the hub's config.json.

    Returns:
        The Shape, the tokenizer or None, and whether the weights are in a local folder or file.

    Raises:
        ValueError: for a model without a configuration that can be read.

    Example:
        >>> from rt_lens.experiment.shape import shape_of
        >>> shape, tokenizer, is_local = shape_of("smollm2-135m-instruct")
        >>> shape.n_layers, shape.d_model, is_local
        (30, 576, True)
    """
    from transformers import AutoTokenizer

    source, file = _source(name_or_path)
    config = _config(source, file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, **file)
    except (OSError, ValueError):
        tokenizer = None
    if tokenizer is not None and not tokenizer.encode("word"):  # transformers makes an empty one if there is none
        tokenizer = None
    return _sizes(config), tokenizer, bool(file) or Path(source).is_dir()


def _source(name_or_path: str) -> tuple[str, dict[str, str]]:
    """Folder or hub name of configuration and tokenizer, and the GGUF file in it for a model that is one."""
    path = Path(name_or_path).expanduser()
    if name_or_path.lower() in BUNDLED_MODELS:
        return str(bundled_folder(BUNDLED_MODELS[name_or_path.lower()])), {}
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return (str(path) if path.is_dir() else name_or_path), {}


def _config(source: str, file: Mapping[str, str]) -> Any:
    """Hugging Face's configuration."""
    from transformers import AutoConfig

    attempts = [lambda: AutoConfig.from_pretrained(source, local_files_only=True, **file)]
    if not file and not Path(source).is_dir():
        attempts += [lambda: _config_of_table(source), lambda: AutoConfig.from_pretrained(source)]
    reason = ""
    for attempt in attempts:
        try:
            return attempt()
        except (OSError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
    raise ValueError(
        f"model must have a configuration that can be read, got {source!r}, whose configuration was not found "
        f"({reason}). Give a bundled model, a Hugging Face folder, a .gguf file, a Llama name that TransformerLens "
        "knows, or any hub name while online."
    )


# Blocks, width, width of the MLP, heads and key-value heads of the first Llamas (Touvron et al. 2023), by billions of
# parameters: the paper's own, for which a plan needs no network.
_LLAMAS = {
    "7b": (32, 4096, 11008, 32, 32),
    "13b": (40, 5120, 13824, 40, 40),
    "30b": (60, 6656, 17920, 52, 52),
    "65b": (80, 8192, 22016, 64, 64),
    "70b": (80, 8192, 28672, 64, 8),
}


def _config_of_table(name: str) -> Any:
    """The configuration of a Llama of the first two generations, by its name.

    Raises:
        ValueError: for a name that is not in the table.
    """
    from transformers import LlamaConfig

    short = official_name(name).rsplit("/", 1)[-1].lower()
    known = re.fullmatch(r"(code)?llama-?(2)?-(\d+b)(-(chat|instruct|python))?(-hf)?", short)
    if known is None or known[3] not in _LLAMAS:
        raise ValueError(f"name must be that of a Llama, got {name!r}")
    layers, width, mlp, heads, kv_heads = _LLAMAS[known[3]]
    return LlamaConfig(
        vocab_size=32016 if known[1] and known[5] != "python" else 32000, hidden_size=width, intermediate_size=mlp,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=4096 if known[1] or known[2] else 2048, tie_word_embeddings=False,
    )  # fmt: skip


def _sizes(config: Any) -> Shape:
    """The sizes of the architecture, which is built without memory for its parameters."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes: dict[str, int] = {}
    sides: dict[str, int] = {}
    rows: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        block, modules = block_and_modules(name)
        for module in modules if block == 0 else ():
            sizes[module] = sizes.get(module, 0) + parameter.numel() // len(modules)
            if parameter.ndim == 2:
                sides[module] = sum(parameter.shape)
                rows[module] = parameter.shape[0]
    if config.model_type in FAMILIES and has_hooked():  # loaded as HookedTransformers, which have no bias at the gate
        sizes["norm"] = 2 * config.hidden_size
        sizes["bias"] = sum(size for module, size in rows.items() if module != "gate")
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        n_layers=config.num_hidden_layers, d_model=config.hidden_size,
        d_mlp=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        d_key_value=(getattr(config, "num_key_value_heads", None) or heads) * d_head, d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings, parameters=_n_parameters(model), block=sizes, sides=sides,
    )  # fmt: skip


def _n_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # tied ones count once


class WordCount:
    """Replaces a missing tokenizer: 1.4 tokens per word, and the tokens that a chat template adds to a turn."""

    chat_template = None
    all_special_ids: tuple[int, ...] = ()
    bos_token_id = 1
    all_special_tokens: tuple[str, ...] = ()
    template_tokens = 24

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """A list as long as the expected number of tokens."""
        template = [self.bos_token_id] * (self.template_tokens * add_special_tokens)
        return template + [0] * round(1.4 * len(text.split()))


def reader_of(tokenizer: Any) -> Any:
    """An object that replaces a model where texts are only formatted and counted."""
    return SimpleNamespace(tokenizer=tokenizer or WordCount())
