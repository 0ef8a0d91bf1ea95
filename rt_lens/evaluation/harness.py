"""A model, under whatever it carries, for EleutherAI's lm-evaluation-harness: its tasks on rt_lens's own batched code.

For those who have it (`pip install "rt_lens[harness]"`); importing this file does not import it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from rt_lens.evaluation.texts import Piece, log_normaliser, predictions, windows_of
from rt_lens.models.forward import model_name
from rt_lens.models.generation import NewToken, Sampling, generate_tokens
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode
from rt_lens.models.tokens.chats import ChatText, has_chat_template, rendered, tokenizer_of
from rt_lens.models.tokens.texts import text_of


def harness_model(model: Model, *, batch_size: int = 16, seed: int = 0) -> Any:
    """The model as an `lm_eval.api.model.LM`, to be handed to `lm_eval.simple_evaluate`.

    What the model carries while a task runs (hooks, a delta) is what is measured. A request's context counts as the
    prompt and what follows as generated, for edits that tell them apart. Log-likelihoods and greedy answers are those
    of the harness's own Hugging Face model, but for two things: a whole text begins with one token of a text's
    beginning, where that has two for tokenizers that add one by themselves; and an answer also ends where the
    assistant's turn does.

    Args:
        model: HookedTransformer or TransformerBridge.
        batch_size: requests per forward pass; it changes nothing but speed.
        seed: of requests that want their answers sampled.

    Returns:
        An object with `loglikelihood`, `loglikelihood_rolling`, `generate_until` and a chat template.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: a batch size below 1, or a model without a tokenizer.

    Example:
        >>> import lm_eval
        >>> with model.hooks(fwd_hooks=add(vectors, [18], 2.0)):
        ...     found = lm_eval.simple_evaluate(harness_model(model), tasks=["arc_easy"], limit=100)
        >>> found["results"]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} came, a whole number of at least 1 is wanted.")
    tokenizer_of(model)
    return _kind()(model, batch_size, seed)


@cache
def _kind() -> type:
    """The class itself, whose parent is there only where lm-eval is."""
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise ImportError('harness: lm-eval is not installed. Run: pip install "rt_lens[harness]".') from None

    class HarnessModel(TemplateLM):
        def __init__(self, model: Model, batch_size: int, seed: int) -> None:
            super().__init__()
            self.model, self.batch_size, self.seed = model, batch_size, seed
            self.tokenizer = tokenizer_of(model)
            self._device = torch.device(model.cfg.device)

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return prefix_of(self.model)

        @property
        def max_length(self) -> int:
            return self.model.cfg.n_ctx

        @property
        def tokenizer_name(self) -> str:
            return self.tokenizer.name_or_path.replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
            return _encoded(self.model, string, add_special_tokens)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return chat_of(self.model, chat_history, add_generation_prompt)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            return continued(self.model, [(before, after) for _, before, after in requests], self.batch_size)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return rolled(self.model, [request.args[0] for request in requests], self.batch_size)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return written(self.model, [request.args for request in requests], self.batch_size, self.seed)

    return HarnessModel


def prefix_of(model: Model) -> int:
    """The token that a text without a context follows: the tokenizer's beginning, or else end, of a text."""
    tokenizer = tokenizer_of(model)
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def chat_of(model: Model, messages: Sequence[Mapping[str, str]], open_answer: bool = True) -> str:
    """A conversation through the model's chat template; a system role that it lacks goes before the user's text.

    Args:
        model: for its tokenizer.
        messages: with `role` and `content` each.
        open_answer: end where the assistant is to write; False leaves the last message open, to be gone on with.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not has_chat_template(model):
        raise ValueError(f"model: {model_name(model)} has no chat template. Run the task without apply_chat_template.")

    return ChatText(rendered(model, messages, open_answer=open_answer), messages)


@torch.no_grad()
def continued(
    model: Model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation in nats, and whether it is what the model would write greedily.

    Args:
        model: whatever it carries is what is measured.
        pairs: token ids of a context and of its continuation; what does not fit is cut off the context's beginning.
        batch_size: pairs per forward pass.

    Raises:
        ValueError: a continuation of no token, or of more than the model's context.
    """
    room, pieces = model.cfg.n_ctx, []
    for number, (before, after) in enumerate(pairs):
        if not 1 <= len(after) <= room:
            raise ValueError(
                f"requests: number {number} has a continuation of {len(after)} tokens; 1 to {room}, this model's "
                "context, are wanted. Leave it out."
            )
        seen = list(before)[max(0, len(before) + len(after) - 1 - room) :]
        pieces.append(Piece(number, 0, (*seen, *after[:-1]), len(seen), tuple(after), len(seen)))
    _tell_of_cuts(sum(len(piece.ids) < len(b) + len(a) - 1 for piece, (b, a) in zip(pieces, pairs, strict=True)), room)
    return _scored(model, pieces, len(pairs), batch_size)


@torch.no_grad()
def rolled(model: Model, texts: Sequence[str], batch_size: int) -> list[float]:
    """Log-likelihood of each whole text in nats, after the token of a text's beginning.

    A text longer than the context is run in windows side by side; the last is moved back to be full.
    """
    pieces = []
    for number, text in enumerate(texts):
        ids = [prefix_of(model), *_encoded(model, text, False)]
        windows = windows_of(len(ids), model.cfg.n_ctx, model.cfg.n_ctx) if len(ids) > 1 else []
        pieces += [
            Piece(number, start, tuple(ids[start:end]), first, tuple(ids[first : end + 1]), len(ids))
            for start, end, first in windows
        ]
    totals = [0.0] * len(texts)
    for piece, (total, _) in zip(pieces, _scored(model, pieces, len(texts), batch_size), strict=True):
        totals[piece.number] += total
    return totals


def _scored(model: Model, pieces: Sequence[Piece], n_rows: int, batch_size: int) -> list[tuple[float, bool]]:
    """Log-likelihood of what each piece wants, and whether each of its tokens was the likeliest."""
    found = [(0.0, True)] * len(pieces)
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i].ids))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        values, greedy = [], []
        for logits, wanted in predictions(model, [pieces[row] for row in rows], n_rows):
            values.append(logits.gather(1, wanted)[:, 0].cpu().double() - log_normaliser(logits))
            greedy.append((logits.argmax(-1) == wanted[:, 0]).cpu())
        sizes = [len(pieces[row].wanted) for row in rows]
        parts = zip(torch.cat(values).split(sizes), torch.cat(greedy).split(sizes), strict=True)
        for row, (value, likeliest) in zip(rows, parts, strict=True):
            found[row] = (float(value.sum()), bool(likeliest.all()))
    return found


@dataclass(frozen=True)
class Wish:
    """How a request wants its answer written.

    Attributes:
        until: texts before which the answer ends.
        max_new_tokens: at most so many tokens.
        sampling: how a token is chosen.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling


_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def wish_of(options: Mapping[str, Any], seed: int = 0) -> Wish:
    """A task's `generation_kwargs`, read; greedy and 256 tokens unless they say otherwise, as in the harness itself.

    Raises:
        ValueError: an option that rt_lens does not have.
    """
    known = ("until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"generation_kwargs: {', '.join(unknown)} came; known are {', '.join(known)}.")
    until = options.get("until") or ()
    most = next((int(options[name]) for name in _LENGTHS if options.get(name) is not None), 256)
    sample, heat = options.get("do_sample"), options.get("temperature")
    if sample is None:
        sample = bool(heat)
    temperature = float(1.0 if heat is None else heat) if sample else 0.0
    top_k, top_p = int(options.get("top_k") or 0), float(options.get("top_p") or 1.0)
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Wish(tuple(stop for stop in stops if stop), most, Sampling(temperature, top_k, top_p, seed))


def written(
    model: Model, requests: Sequence[tuple[str, Mapping[str, Any]]], batch_size: int, seed: int = 0
) -> list[str]:
    """Answers to contexts, each cut before the first of its stop texts; a batch ends when all of its rows have one.

    Args:
        model: whatever it carries is what is measured.
        requests: contexts with their `generation_kwargs`; what does not fit is cut off a context's beginning.
        batch_size: contexts per batch.
        seed: of sampling; each request has a stream of its own.

    Raises:
        ValueError: an option that rt_lens does not have, or more new tokens than the context holds.
    """
    groups: dict[Wish, list[int]] = defaultdict(list)
    for number, (_, options) in enumerate(requests):
        groups[wish_of(options, seed)].append(number)
    context, answers, cut = model.cfg.n_ctx, [""] * len(requests), 0
    for wish in groups:
        if not 1 <= wish.max_new_tokens < context:
            raise ValueError(
                f"generation_kwargs: {wish.max_new_tokens} new tokens came, this model's context holds {context}. Set "
                "max_gen_toks between 1 and what leaves room for the question."
            )
    for wish, numbers in groups.items():
        room = context - wish.max_new_tokens
        encoded = {number: _encoded(model, requests[number][0]) for number in numbers}
        cut += sum(len(ids) > room for ids in encoded.values())
        order = sorted(numbers, key=lambda number: -len(encoded[number]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            texts = _batch_written(model, rows, [encoded[row][-room:] for row in rows], wish, len(requests))
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
    _tell_of_cuts(cut, context)
    return answers


class _AllStoppedError(Exception):
    """Every row of the batch has met a stop text."""


class _Watch:
    """Gathers new tokens, and ends the batch when no row is left that goes on."""

    def __init__(self, model: Model, rows: Sequence[int], wish: Wish) -> None:
        self.model, self.wish = model, wish
        self.ids: dict[int, list[int]] = {row: [] for row in rows}
        self.stopped: set[int] = set()

    def __call__(self, new: NewToken) -> None:
        if new.row not in self.stopped:
            self.ids[new.row].append(new.token)
            text = text_of(self.model, self.ids[new.row], special=True)  # a task may name a special token
            if any(stop in text for stop in self.wish.until):
                self.stopped.add(new.row)
        # A row told of neither of the two places before this one has ended by itself; of one place it may be told late.
        if not any(len(ids) >= new.place - 1 for row, ids in self.ids.items() if row not in self.stopped):
            raise _AllStoppedError

    def texts(self) -> list[str]:
        found = []
        for ids in self.ids.values():
            text = text_of(self.model, ids)
            ends = [text.find(stop) for stop in self.wish.until if stop in text]
            found.append(text[: min(ends)] if ends else text)
        return found


def _batch_written(
    model: Model, rows: Sequence[int], encoded: Sequence[Sequence[int]], wish: Wish, n_rows: int
) -> list[str]:
    watch = _Watch(model, rows, wish)
    with suppress(_AllStoppedError):
        generate_tokens(model, encoded, wish.max_new_tokens, wish.sampling, rows=rows, n_rows=n_rows, on_token=watch)
    return watch.texts()


def _encoded(model: Model, text: str, add_special_tokens: bool | None = None) -> list[int]:
    if add_special_tokens is None:
        return encode(model, text)
    return tokenizer_of(model).encode(text, add_special_tokens=add_special_tokens)


def _tell_of_cuts(n: int, room: int) -> None:
    if n:
        warnings.warn(
            f"requests: {n} did not fit the context of {room} tokens and lost their beginnings.", stacklevel=3
        )
