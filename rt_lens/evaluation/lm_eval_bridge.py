"""Bridge to EleutherAI's lm-evaluation-harness: its tasks run on a steered or tuned model with rt_lens's batched code.

The harness is optional (`pip install "rt_lens[harness]"`); importing this module does not import it.
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
    """The model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate`.

    A task measures the model with the hooks and weights it has while the task runs. For edits that distinguish them, a
    request's context counts as the prompt and what follows as generated. Log-likelihoods and greedy responses equal
    those of the harness's own Hugging Face model, with two exceptions: a whole text begins with one
    beginning-of-text token, where the harness uses two for tokenizers that add one by themselves; and a response also
    ends where the assistant's turn does.

    Args:
        model: HookedTransformer or TransformerBridge.
        batch_size: requests per forward pass; it affects speed only.
        seed: seed for requests that sample their responses.

    Returns:
        An object with `loglikelihood`, `loglikelihood_rolling`, `generate_until` and a chat template.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: for a batch size below 1, or a model without a tokenizer.

    Example:
        With lm-eval installed, steer the model and hand it over:

        >>> import importlib.util
        >>> if importlib.util.find_spec("lm_eval"):
        ...     with model.hooks(fwd_hooks=add(vectors, [18], 2.0)):
        ...         lm = harness_model(model)  # lm_eval.simple_evaluate(lm, tasks=["arc_easy"], limit=100)
        ...     assert lm.tok_encode("Bread rises.")
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    tokenizer_of(model)
    return _harness_class()(model, batch_size, seed)


@cache
def _harness_class() -> type:
    """The LM class, built on first use since its parent exists only if lm-eval is installed."""
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise ImportError(
            'harness_model needs lm-eval, which is not installed. Run: pip install "rt_lens[harness]".'
        ) from None

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
    """The token before a text without a context: the tokenizer's beginning-of-text, or else end-of-text, token."""
    tokenizer = tokenizer_of(model)
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def chat_of(model: Model, messages: Sequence[Mapping[str, str]], open_answer: bool = True) -> str:
    """A conversation in the model's chat template; without a system role, the system text goes before the user's.

    Args:
        model: the model whose tokenizer holds the template.
        messages: messages with `role` and `content`.
        open_answer: end where the assistant's response begins; False leaves the last message open, to be continued.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not has_chat_template(model):
        raise ValueError(
            f"model must have a chat template, got {model_name(model)}, which has none. Run the task without "
            "apply_chat_template."
        )
    return ChatText(rendered(model, messages, open_answer=open_answer), messages)


@torch.no_grad()
def continued(
    model: Model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation in nats, and whether greedy decoding gives that continuation.

    Args:
        model: the model, measured with its current hooks and weights.
        pairs: token ids of a context and of its continuation; a context that does not fit loses its beginning.
        batch_size: pairs per forward pass.

    Raises:
        ValueError: for a continuation of no token, or of more tokens than the model's context.
    """
    n_ctx, pieces = model.cfg.n_ctx, []
    for number, (context, continuation) in enumerate(pairs):
        if not 1 <= len(continuation) <= n_ctx:
            raise ValueError(
                f"requests must have continuations of 1 to {n_ctx} tokens, this model's context, got "
                f"{len(continuation)} at index {number}. Leave it out."
            )
        kept = list(context)[max(0, len(context) + len(continuation) - 1 - n_ctx) :]
        pieces.append(Piece(number, 0, (*kept, *continuation[:-1]), len(kept), tuple(continuation), len(kept)))
    lengths = [len(context) + len(continuation) - 1 for context, continuation in pairs]
    _warn_of_cuts(sum(len(piece.ids) < length for piece, length in zip(pieces, lengths, strict=True)), n_ctx)
    return _scored(model, pieces, len(pairs), batch_size)


@torch.no_grad()
def rolled(model: Model, texts: Sequence[str], batch_size: int) -> list[float]:
    """Log-likelihood of each whole text in nats, after the token of `prefix_of`.

    A text longer than the context runs in adjacent windows; the last one moves back to be full.
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
    """Log-likelihood of each piece's targets, and whether each target token is the likeliest one."""
    results = [(0.0, True)] * len(pieces)
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i].ids))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        values, greedy = [], []
        for logits, targets in predictions(model, [pieces[row] for row in rows], n_rows):
            values.append(logits.gather(1, targets)[:, 0].cpu().double() - log_normaliser(logits))
            greedy.append((logits.argmax(-1) == targets[:, 0]).cpu())
        sizes = [len(pieces[row].targets) for row in rows]
        parts = zip(torch.cat(values).split(sizes), torch.cat(greedy).split(sizes), strict=True)
        for row, (value, likeliest) in zip(rows, parts, strict=True):
            results[row] = (float(value.sum()), bool(likeliest.all()))
    return results


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate the response to a request.

    Attributes:
        until: stop texts; the response ends before the first of them.
        max_new_tokens: maximum number of tokens.
        sampling: how to choose a token.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling


_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def options_of(kwargs: Mapping[str, Any], seed: int = 0) -> GenerationOptions:
    """A task's `generation_kwargs`, parsed. The defaults are the harness's own: greedy, and 256 tokens.

    Raises:
        ValueError: for an option that rt_lens does not have.
    """
    known = ("until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS)
    if unknown := sorted(set(kwargs) - set(known)):
        raise ValueError(
            f"generation_kwargs must be among {', '.join(known)}, got {', '.join(unknown)}. Leave the others out."
        )
    until = kwargs.get("until") or ()
    max_new_tokens = next((int(kwargs[name]) for name in _LENGTHS if kwargs.get(name) is not None), 256)
    sample, given_temperature = kwargs.get("do_sample"), kwargs.get("temperature")
    if sample is None:
        sample = bool(given_temperature)
    temperature = float(1.0 if given_temperature is None else given_temperature) if sample else 0.0
    top_k, top_p = int(kwargs.get("top_k") or 0), float(kwargs.get("top_p") or 1.0)
    stops = (until,) if isinstance(until, str) else tuple(until)
    sampling = Sampling(temperature, top_k, top_p, seed)
    return GenerationOptions(tuple(stop for stop in stops if stop), max_new_tokens, sampling)


def written(
    model: Model, requests: Sequence[tuple[str, Mapping[str, Any]]], batch_size: int, seed: int = 0
) -> list[str]:
    """Responses to contexts, each cut before its first stop text. A batch ends once all of its rows have met one.

    Args:
        model: the model, measured with its current hooks and weights.
        requests: contexts with their `generation_kwargs`; a context that does not fit loses its beginning.
        batch_size: contexts per batch.
        seed: seed for sampling; each request has its own random stream.

    Raises:
        ValueError: for an option that rt_lens does not have, or more new tokens than the context holds.
    """
    groups: dict[GenerationOptions, list[int]] = defaultdict(list)
    for number, (_, kwargs) in enumerate(requests):
        groups[options_of(kwargs, seed)].append(number)
    n_ctx, responses, cut = model.cfg.n_ctx, [""] * len(requests), 0
    for options in groups:
        if not 1 <= options.max_new_tokens < n_ctx:
            raise ValueError(
                f"generation_kwargs must ask for 1 to {n_ctx - 1} new tokens, as this model's context holds {n_ctx}, "
                f"got {options.max_new_tokens}. Set max_gen_toks so that it leaves room for the question."
            )
    for options, numbers in groups.items():
        room = n_ctx - options.max_new_tokens
        encoded = {number: _encoded(model, requests[number][0]) for number in numbers}
        cut += sum(len(ids) > room for ids in encoded.values())
        order = sorted(numbers, key=lambda number: -len(encoded[number]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            texts = _batch_written(model, rows, [encoded[row][-room:] for row in rows], options, len(requests))
            for row, text in zip(rows, texts, strict=True):
                responses[row] = text
    _warn_of_cuts(cut, n_ctx)
    return responses


class _AllStoppedError(Exception):
    """Every row of the batch has met a stop text."""


class _StopWatch:
    """Collects new tokens, and ends the batch once every row has met a stop text or ended."""

    def __init__(self, model: Model, rows: Sequence[int], options: GenerationOptions) -> None:
        self.model, self.options = model, options
        self.ids: dict[int, list[int]] = {row: [] for row in rows}
        self.stopped: set[int] = set()

    def __call__(self, new: NewToken) -> None:
        if new.row not in self.stopped:
            self.ids[new.row].append(new.token)
            text = text_of(self.model, self.ids[new.row], special=True)  # a task may name a special token
            if any(stop in text for stop in self.options.until):
                self.stopped.add(new.row)
        # A row that lacks both of the two tokens before this one has ended by itself; the last one may come late.
        if not any(len(ids) >= new.index - 1 for row, ids in self.ids.items() if row not in self.stopped):
            raise _AllStoppedError

    def texts(self) -> list[str]:
        cut = []
        for ids in self.ids.values():
            text = text_of(self.model, ids)
            ends = [text.find(stop) for stop in self.options.until if stop in text]
            cut.append(text[: min(ends)] if ends else text)
        return cut


def _batch_written(
    model: Model, rows: Sequence[int], encoded: Sequence[Sequence[int]], options: GenerationOptions, n_rows: int
) -> list[str]:
    watch = _StopWatch(model, rows, options)
    with suppress(_AllStoppedError):
        generate_tokens(
            model, encoded, options.max_new_tokens, options.sampling, rows=rows, n_rows=n_rows, on_token=watch
        )
    return watch.texts()


def _encoded(model: Model, text: str, add_special_tokens: bool | None = None) -> list[int]:
    if add_special_tokens is None:
        return encode(model, text)
    return tokenizer_of(model).encode(text, add_special_tokens=add_special_tokens)


def _warn_of_cuts(n: int, n_ctx: int) -> None:
    if n:
        warnings.warn(
            f"requests: {n} do not fit the context of {n_ctx} tokens and lose their beginnings. Shorten them.",
            stacklevel=3,
        )
