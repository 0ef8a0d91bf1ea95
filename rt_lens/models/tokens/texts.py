"""Tokens to text.

A token's text depends on its neighbours: a SentencePiece decoder drops the space before a first word, and the bytes of
one character may be spread over several tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rt_lens.models.protocol import HasTokenizer
from rt_lens.models.tokens.chats import tokenizer_of


def text_of(model: HasTokenizer, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of tokens, as the model wrote it: the `Pieces` of all of them, joined.

    Equals the tokenizer's `decode` without its clean-up of spaces, except where tokens end within a character that
    SentencePiece spells in bytes: there the decoder also breaks the whole characters just before, which this keeps.

    Args:
        model: for its tokenizer.
        ids: tokens.
        special: write special tokens out too.
    """
    text = _decoded(tokenizer_of(model), ids, special)
    if _BROKEN not in text:
        return text
    pieces = Pieces(model, special=special)
    return "".join([*map(pieces, ids), pieces.rest])


def token_texts(model: HasTokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token of a sequence, in context; special tokens are written out.

    Joined, they are the decoded text, except for characters whose bytes are spread over several tokens: the last of
    these has the character, and the others show their bytes, as in `<0xE6>`.

    Args:
        model: for its tokenizer.
        ids: tokens.

    Example:
        >>> token_texts(model, model.tokenizer.encode("It was 日"))
        ['It', ' was', ' <0xE6>', '<0x97>', '日']
    """
    pieces, texts = Pieces(model, special=True), []
    for token in ids:
        text = pieces(token)
        if _BROKEN in text:  # bytes before it that never became a character
            text = token_text(model, token)
        elif pieces.rest:
            bytes_left = re.search(r"(?:<0x[0-9A-F]{2}>)*$", token_text(model, token))
            text += bytes_left[0] if bytes_left else ""
        texts.append(text)
    return texts


def token_text(model: HasTokenizer, token: int) -> str:
    """The text of a token without context; the space before a word stays, and incomplete bytes are shown as `<0xE6>`.

    Args:
        model: for its tokenizer.
        token: its id, which also names a token without text.

    Example:
        >>> [token_text(model, token) for token in model.tokenizer.encode(" rain")]
        [' rain']
    """
    tokenizer = tokenizer_of(model)
    once = _decoded(tokenizer, [token], True)
    if _BROKEN not in once:
        # Decoders drop a space at the beginning of a text, and the second of two is not there.
        twice = _decoded(tokenizer, [token, token], True)
        text = twice[len(once) :] if twice.startswith(once) else once
        return text or f"<token {token}>"
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if all(letter in _BYTES for letter in piece):
        piece = bytes(_BYTES[letter] for letter in piece).decode("utf-8", "surrogateescape")
        piece = re.sub("[\udc80-\udcff]", lambda escaped: _spelt(bytes([ord(escaped[0]) - 0xDC00])), piece)
    return piece.replace(_BROKEN, _spelt(_BROKEN.encode()))


class Pieces:
    """Incremental decoding: each call returns the text that a new token adds.

    A token that ends within a character adds nothing; the token that completes the character adds it. Joined, the
    pieces and the `rest` are `text_of` all tokens. Each call decodes the last few tokens only, so the cost per token
    does not grow with the text.

    Example:
        >>> pieces = Pieces(model)
        >>> [pieces(token) for token in model.tokenizer.encode("It was 日")]
        ['It', ' was', ' ', '', '日']
        >>> pieces.rest
        ''
    """

    def __init__(self, model: HasTokenizer, *, special: bool = False) -> None:
        """An empty text.

        Args:
            model: for its tokenizer.
            special: write special tokens out too.
        """
        self._tokenizer, self._special = tokenizer_of(model), special
        self._before: list[int] = []  # tokens of the previous piece, and their text
        self._context = ""
        self._open: list[int] = []  # tokens since then, and the part of their text that was returned
        self._given = ""
        self.rest = ""
        """The text still to come if no further token completes it: U+FFFD for bytes of an incomplete character."""

    def __call__(self, token: int) -> str:
        self._open.append(int(token))
        text = _decoded(self._tokenizer, [*self._before, *self._open], self._special)
        if not text.rstrip(_BROKEN).startswith(self._context):
            # SentencePiece's bytes: an incomplete character breaks those before it, so it is decoded without them.
            self._before, self._context = [], ""
            text = _decoded(self._tokenizer, self._open, self._special)
        whole = text.rstrip(_BROKEN)
        known = self._context + self._given
        piece = whole[len(known) :] if whole.startswith(known) else ""
        self._given += piece
        self.rest = text[len(known) + len(piece) :]
        if self._given and not self.rest:
            self._before, self._open, self._given = self._open, [], ""
            self._context = _decoded(self._tokenizer, self._before, self._special)
        return piece


_BROKEN = "\ufffd"  # what decoders write for bytes of no character


def _decoded(tokenizer: Any, ids: Sequence[int], special: bool) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def _spelt(some: bytes) -> str:
    """Bytes as SentencePiece names them: `<0xE6><0x97>`."""
    return "".join(f"<0x{byte:02X}>" for byte in some)


def _byte_letters() -> dict[str, int]:
    """Character -> byte, as the vocabularies of byte-level tokenizers write bytes (GPT-2's `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_letters()
