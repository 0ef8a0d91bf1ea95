"""Text to token batches and tokens to text, through a model's own tokenizer. This room never runs a model.

Padding is on the left unless asked otherwise, and every batch carries its attention mask, so that the last real token
of each row sits at position -1 and a batch gives what singles give. A token's text depends on its neighbours: a
SentencePiece decoder drops the space before a first word, and one letter's bytes may be spread over several tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Token ids with the mask of what is real.

    Attributes:
        tokens: Int[Tensor, "batch pos"], padded with the tokenizer's pad (or end-of-text) id.
        mask: Int[Tensor, "batch pos"], 1 for real tokens, 0 for padding.
        rows: indices of these rows in the list that was given (batches are made in order of length).
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    rows: tuple[int, ...]

    def to(self, device: Any) -> TokenBatch:
        return TokenBatch(self.tokens.to(device), self.mask.to(device), self.rows)


def tokenizer_of(model: Any) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: if the model has none.
    """
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("model: it has no tokenizer, so text cannot be given to it. Set model.tokenizer first.")
    return model.tokenizer


def has_chat_template(model: Any) -> bool:
    """True if the model's tokenizer knows how to write a chat."""
    return bool(getattr(tokenizer_of(model), "chat_template", None))


def chat_text(model: Any, user: str, *, system: str = "", opener: str = "") -> str:
    """One exchange through the model's chat template, up to the point where the assistant writes.

    Templates without a system role get the system text in front of the user's; tokenizers without a template get plain
    paragraphs. The string holds the template's special tokens already: encode it without adding any.

    Args:
        user: what the user says.
        system: a persona or instruction; empty leaves the template's default.
        opener: first words of the assistant's answer, already written.
    """
    tokenizer = tokenizer_of(model)
    if not has_chat_template(model):
        return "\n\n".join(part for part in (system, user, opener) if part)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": user})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as refusal:  # templates raise jinja errors of their own for a role they do not know
        if not system:
            raise
        folded = [{"role": "user", "content": f"{system}\n\n{user}"}]
        try:
            text = tokenizer.apply_chat_template(folded, tokenize=False, add_generation_prompt=True)
        except Exception:
            raise refusal from None
    return text + opener


def encode(model: Any, text: str) -> list[int]:
    """Token ids of a text: a chat's special tokens are taken as written, plain text gets what the tokenizer adds."""
    tokenizer = tokenizer_of(model)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if ids and ids[0] in tokenizer.all_special_ids:
        return ids
    return tokenizer.encode(text)


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"] = "left") -> TokenBatch:
    """Pads sequences of ids to one length.

    Raises:
        ValueError: if there is none, or one of them is empty.
    """
    if not sequences or any(len(ids) == 0 for ids in sequences):
        empty = next((i for i, ids in enumerate(sequences) if len(ids) == 0), None)
        raise ValueError("texts: the list is empty." if empty is None else f"texts: number {empty} has no tokens.")
    length = max(len(ids) for ids in sequences)
    tokens = torch.full((len(sequences), length), pad_id, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(sequences):
        span = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
        tokens[row, span] = torch.tensor(list(ids))
        mask[row, span] = 1
    return TokenBatch(tokens, mask, tuple(range(len(sequences))))


def pad_id_of(model: Any) -> int:
    """The id used for padding: the pad token, else the end-of-text token, else 0."""
    tokenizer = tokenizer_of(model)
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0


def batches(
    model: Any, texts: Sequence[str], batch_size: int, side: Literal["left", "right"] = "left"
) -> Iterator[TokenBatch]:
    """Token batches of like length, longest first (so that a batch too large for the memory fails at once).

    Raises:
        ValueError: if `texts` is empty or holds an empty text, or the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} came, a whole number of at least 1 is wanted.")
    if isinstance(texts, str):
        raise ValueError("texts: one string came, a list of strings is wanted. Put it in brackets.")
    encoded = [encode(model, text) for text in texts]
    if not encoded:
        raise ValueError("texts: the list is empty.")
    if [] in encoded:
        raise ValueError(f"texts: number {encoded.index([])} has no tokens.")
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        padded = pad([encoded[i] for i in rows], pad_id_of(model), side)
        yield TokenBatch(padded.tokens, padded.mask, tuple(rows)).to(model.cfg.device)


def text_of(model: Any, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of tokens, as the model wrote it: the `Pieces` of all of them together.

    It is what the tokenizer's `decode` gives, without its cleaning up of spaces. The two differ where tokens end within
    a letter that SentencePiece spells in bytes: then its decoder spoils the whole letters just before, and this keeps
    them.

    Args:
        model: for its tokenizer.
        ids: tokens.
        special: write special tokens too, as they are written.
    """
    text = _decoded(tokenizer_of(model), ids, special)
    if _BROKEN not in text:
        return text
    pieces = Pieces(model, special=special)
    return "".join([*map(pieces, ids), pieces.rest])


def token_texts(model: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token of a sequence, in its context; special tokens as they are written.

    Together they are the decoded text, but for letters whose bytes are spread over several tokens: the last of these
    has the letter, and those before it show their bytes, as in `<0xE6>`.

    Args:
        model: for its tokenizer.
        ids: tokens.

    Example:
        >>> token_texts(model, encode(model, "It was 日"))
        ['It', ' was', ' <0xE6>', '<0x97>', '日']
    """
    pieces, texts = Pieces(model, special=True), []
    for token in ids:
        text = pieces(token)
        if _BROKEN in text:  # of bytes before it, that never became a letter
            text = token_text(model, token)
        elif pieces.rest:
            bytes_left = re.search(r"(?:<0x[0-9A-F]{2}>)*$", token_text(model, token))
            text += bytes_left[0] if bytes_left else ""
        texts.append(text)
    return texts


def token_text(model: Any, token: int) -> str:
    """The text of a token without context: the space before a word stays, and bytes of no whole letter are `<0xE6>`.

    Args:
        model: for its tokenizer.
        token: its id; one that the tokenizer has no text for is named by it.
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
        piece = re.sub("[\udc80-\udcff]", lambda found: _spelt(bytes([ord(found[0]) - 0xDC00])), piece)
    return piece.replace(_BROKEN, _spelt(_BROKEN.encode()))


class Pieces:
    """Tokens to text, one after the other: each call gives what a new token adds to the text.

    A token that completes no letter adds nothing, and the one that completes it has the letter. Together the pieces and
    the `rest` are `text_of` all tokens. Only the last few are decoded with a new one, so a long text costs no more a
    token than a short one.

    Example:
        >>> pieces = Pieces(model)
        >>> text = "".join([*map(pieces, ids), pieces.rest])
    """

    def __init__(self, model: Any, *, special: bool = False) -> None:
        """A text that is empty yet.

        Args:
            model: for its tokenizer.
            special: write special tokens too, as they are written.
        """
        self._tokenizer, self._special = tokenizer_of(model), special
        self._before: list[int] = []  # tokens of the piece before, and their text
        self._context = ""
        self._open: list[int] = []  # tokens since, and as much of their text as was given
        self._given = ""
        self.rest = ""
        """What is still to come if no further token completes it: U+FFFD for bytes of no whole letter."""

    def __call__(self, token: int) -> str:
        self._open.append(int(token))
        text = _decoded(self._tokenizer, [*self._before, *self._open], self._special)
        if not text.rstrip(_BROKEN).startswith(self._context):
            # SentencePiece's bytes: a broken letter spoils the whole ones before it, so it is decoded without them.
            self._before, self._context = [], ""
            text = _decoded(self._tokenizer, self._open, self._special)
        whole = text.rstrip(_BROKEN)
        told = self._context + self._given
        piece = whole[len(told) :] if whole.startswith(told) else ""
        self._given += piece
        self.rest = text[len(told) + len(piece) :]
        if self._given and not self.rest:
            self._before, self._open, self._given = self._open, [], ""
            self._context = _decoded(self._tokenizer, self._before, self._special)
        return piece


_BROKEN = "\ufffd"  # what decoders write for bytes of no letter


def _decoded(tokenizer: Any, ids: Sequence[int], special: bool) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def _spelt(some: bytes) -> str:
    """Bytes as SentencePiece names them: `<0xE6><0x97>`."""
    return "".join(f"<0x{byte:02X}>" for byte in some)


def _byte_letters() -> dict[str, int]:
    """Letter -> byte, as the vocabularies of byte-level tokenizers write bytes (GPT-2's `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()
