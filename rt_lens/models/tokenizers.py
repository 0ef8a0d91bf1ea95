"""Tokenizers for models: padding on the left with an id in the model's vocabulary, no second start token.

The source tokenizer's own settings are kept, so that an export writes them.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

from rt_lens.models.hub import hub_token
from rt_lens.models.protocol import Model


def read_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """A folder's tokenizer, unchanged."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), token=hub_token(), trust_remote_code=trust_remote_code)


def give_tokenizer(model: Any, tokenizer: Any) -> Any:
    """Sets a model's tokenizer, for batches padded on the left."""
    before = {"padding_side": tokenizer.padding_side, "pad_token": tokenizer.pad_token}
    # A padding token that was added to the tokenizer alone has no row in the embedding.
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= model.cfg.d_vocab:
        tokenizer.pad_token = _safe_padding(tokenizer, model.cfg.d_vocab)
    tokenizer.padding_side = "left"
    model.cfg.rt_lens_tokenizer = {
        name: (value, getattr(tokenizer, name)) for name, value in before.items() if value != getattr(tokenizer, name)
    }
    # Not through set_tokenizer, which rebuilds it to add a start token to every text: chat templates write one already.
    model.tokenizer = tokenizer
    model.cfg.default_prepend_bos = False
    model.cfg.tokenizer_prepends_bos = _begins_with_start(tokenizer)
    return model


def source_tokenizer(model: Model) -> Any:
    """A copy of a model's tokenizer with the source's padding; settings made since loading are kept."""
    tokenizer = copy.deepcopy(model.tokenizer)
    for name, (before, ours) in getattr(model.cfg, "rt_lens_tokenizer", {}).items():
        if getattr(tokenizer, name) == ours:
            setattr(tokenizer, name, before)
    return tokenizer


def _safe_padding(tokenizer: Any, d_vocab: int) -> str | None:
    """The end-of-text token, else any token in the vocabulary: the mask covers it."""
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id < d_vocab:
        return tokenizer.eos_token
    return tokenizer.convert_ids_to_tokens(0)


def _begins_with_start(tokenizer: Any) -> bool:
    """Whether the tokenizer adds a start token; the empty text tests those whose vocabulary lacks the letter a."""
    if tokenizer.bos_token_id is None:
        return False
    for text in ("a", ""):
        with suppress(Exception):  # tokenizers raise bare ones
            return tokenizer.encode(text)[:1] == [tokenizer.bos_token_id]
    return False
