"""Text to tokens, through a model's own chat template and tokenizer. This room never runs a model."""

from rt_lens.models.tokens.batches import TokenBatch, batches, encode, pad, pad_id_of
from rt_lens.models.tokens.chats import (
    ChatText,
    answered,
    begins_with_thought,
    chat_text,
    end_ids,
    end_of_answer,
    has_chat_template,
    is_chat,
    rendered,
    tokenizer_of,
)
from rt_lens.models.tokens.texts import Pieces, text_of, token_text, token_texts

__all__ = [
    "ChatText",
    "Pieces",
    "TokenBatch",
    "answered",
    "batches",
    "begins_with_thought",
    "chat_text",
    "encode",
    "end_ids",
    "end_of_answer",
    "has_chat_template",
    "is_chat",
    "pad",
    "pad_id_of",
    "rendered",
    "text_of",
    "token_text",
    "token_texts",
    "tokenizer_of",
]
