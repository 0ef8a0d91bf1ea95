"""Responses of a model under the hooks that it has: batched, cached, streamed, reported token by token."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rt_lens.common.conversations import Conversation, Message
from rt_lens.common.inputs import as_text, text_list
from rt_lens.common.progress import Bar, breathe
from rt_lens.models.backends import backend_of
from rt_lens.models.context import token_context
from rt_lens.models.forward import model_name
from rt_lens.models.prompts import knows_rows, run_prompts
from rt_lens.models.protocol import HasTokenizer, Model
from rt_lens.models.sampling import Sampling, StopAt, Watched, before, copies, penalised, stop_strings
from rt_lens.models.tokens.batches import TokenBatch, encode, pad, pad_id_of
from rt_lens.models.tokens.chats import (
    begins_with_thought,
    chat_text,
    empty_thought,
    end_ids,
    has_chat_template,
    is_chat,
    system_of,
    without_thought,
)
from rt_lens.models.tokens.texts import Pieces, text_of


@runtime_checkable
class Directions(Protocol):
    """The part of steering vectors that a trace needs: hook name -> vector, as it is and as a unit vector."""

    @property
    def vectors(self) -> Mapping[str, Tensor]: ...

    def check_fits(self, model: Model) -> None: ...

    def unit(self) -> Directions: ...


@dataclass(frozen=True)
class NewToken:
    """One new token, in the form that `on_token` receives.

    Attributes:
        row: index of its prompt in the list.
        index: its index in the response, from 0.
        token: its id.
        text: the text that it adds; the texts of a row, joined, are its response. Empty for a special token, and for
            one that ends within a character, whose text comes with the token that completes it.
        projections: hook name -> projection of its own activation, under the hooks, on the unit vector.

    Example:
        >>> new_tokens = []
        >>> responses = generate(model, ["Name three metals."], max_new_tokens=3, on_token=new_tokens.append)
        >>> [(new.index, new.text) for new in new_tokens]
        [(0, 'The'), (1, ' most'), (2, ' common')]
    """

    row: int
    index: int
    token: int
    text: str
    projections: dict[str, float] = field(default_factory=dict)


def as_chat(model: HasTokenizer, prompts: Sequence[str], *, system: str = "") -> list[str]:
    """User messages with the chat template applied; chats stay as they are, and so do texts without a template.

    A system prompt that `system_prompt` has set stands before both.
    """
    if not has_chat_template(model) and not system_of(model):
        return [chat_text(model, text) if isinstance(text, Conversation) else text for text in prompts]
    return [text if _is_read(model, text) else chat_text(model, text, system=system) for text in prompts]


def _is_read(model: HasTokenizer, text: str) -> bool:
    """Whether the template has been applied; never to a conversation, whatever its first message begins with."""
    return not isinstance(text, Conversation) and is_chat(model, text)


def generate(
    model: Model,
    prompts: Iterable[str | Sequence[Message]],
    *,
    chat: bool = True,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    stop: str | Sequence[str] = (),
    eos_token_id: int | Sequence[int] | None = None,
    num_return_sequences: int = 1,
    thinking: str = "keep",
    batch_size: int = 64,
    use_cache: bool = True,
    trace: Directions | None = None,
    on_token: Callable[[NewToken], None] | None = None,
    progress: bool = False,
) -> list[str]:
    """Responses to prompts, in batches, with a key-value cache, under the hooks that the model has.

    The batch size does not change the responses: padding is on the left, masked and not counted in positions; each
    prompt has its own random stream; and edits know each row by its index in the list.

    Args:
        model: HookedTransformer or TransformerBridge.
        prompts: user messages or conversations (lists of messages), to which the chat template is applied. A
            `ChatText`, or a text that begins with a special token, has had it applied and stays as it is.
        chat: False leaves all prompts as they are.
        max_new_tokens: at most this many tokens each; a row also ends at the model's end tokens (`end_ids`).
        temperature: softmax temperature; 0 takes the most likely token.
        top_k: sample from the `top_k` most likely tokens; 0 for all.
        top_p: sample from the fewest tokens whose probabilities reach this sum; 1 for all.
        seed: seed for the sampling.
        repetition_penalty: divides the logits of tokens that the prompt or the response has already; 1 leaves them.
        min_new_tokens: at least this many tokens each.
        stop: strings that end a response, which ends before them.
        eos_token_id: ids that end a response, instead of the model's own.
        num_return_sequences: responses for each prompt, side by side in the list that is returned; hooks see each as a
            row of its own. More than one needs a temperature.
        thinking: what becomes of a reasoning model's thoughts: `keep` leaves them in the response, `hide` takes them
            out of it, and `skip` begins the response after an empty thought. `on_token` gets all tokens.
        batch_size: prompts per batch.
        use_cache: False runs the whole text again for each token. This is slow, and needed to hook attention patterns.
        trace: vectors on which each new token's activation is projected, for `on_token`.
        on_token: called with each new token as soon as it (and with `trace` its activation) exists; a token that ends
            within a character waits for the next token, or for the end.
        progress: show a bar.

    Returns:
        The new text of each prompt, in order.

    Raises:
        ValueError: if there is no prompt, a number is out of range, or the texts exceed the model's context.

    Example:
        >>> generate(model, ["Name three metals."], max_new_tokens=8)
        ['The most common and widely used metals are']
        >>> with model.hooks(fwd_hooks=add(vectors, layers=[21], multiplier=8.0)):
        ...     (steered,) = generate(model, ["Name three metals."], max_new_tokens=8)
        >>> steered == 'The most common and widely used metals are'
        False
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            "max_new_tokens and batch_size must be at least 1, got "
            f"max_new_tokens={max_new_tokens}, batch_size={batch_size}. Give whole numbers from 1 on."
        )
    prompts = text_list(prompts, "prompts", blank=not (chat and has_chat_template(model)), chats=chat)
    if trace is not None:
        trace.check_fits(model)
        if on_token is None:
            raise ValueError(
                "trace must come with on_token, got on_token=None. Give a function that takes each NewToken."
            )
        if any(vector.ndim > 1 for vector in trace.vectors.values()):
            raise ValueError(
                "trace must be vectors with one direction per hook point, got vectors per head (hook_z). "
                "Use vectors of hook='attn_out'."
            )
    sampling = Sampling(temperature, top_k, top_p, seed, repetition_penalty, min_new_tokens)
    stop, ends = stop_strings(stop), _ends(model, eos_token_id)
    texts = as_chat(model, prompts) if chat else prompts
    texts = [text for text in _thinking(model, texts, thinking) for _ in range(copies(num_return_sequences, sampling))]
    encoded = [encode(model, text) for text in texts]
    if [] in encoded:
        raise ValueError(
            f"prompts must have at least one token each, got none at index {encoded.index([])}. Leave it out."
        )
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i])) if len(encoded) > batch_size else None
    rows_left = order or list(range(len(encoded)))
    answers = [""] * len(encoded)
    with Bar(total=len(encoded), desc="generating", unit="answer", disable=not progress) as bar:
        for start in range(0, len(rows_left), batch_size):
            rows = rows_left[start : start + batch_size]
            new = generate_tokens(
                model, [encoded[i] for i in rows], max_new_tokens, sampling, rows=rows, n_rows=len(encoded),
                use_cache=use_cache, trace=trace, on_token=on_token, stop=stop, ends=ends,
            )  # fmt: skip
            for row, ids in zip(rows, new, strict=True):
                answers[row] = before(text_of(model, ids), stop)
            bar.update(len(rows))
    if thinking == "hide":
        return [without_thought(text, answer) for text, answer in zip(texts, answers, strict=True)]
    _warn_of_thoughts(texts, answers)
    return answers


def _thinking(model: Model, texts: Sequence[str], thinking: str) -> Sequence[str]:
    """The texts; to skip thoughts with an empty one after them."""
    if thinking not in ("keep", "hide", "skip"):
        raise ValueError(f"thinking must be 'keep', 'hide' or 'skip', got {thinking!r}.")
    return [text + empty_thought(model, text) for text in texts] if thinking == "skip" else texts


def _warn_of_thoughts(prompts: Sequence[str], answers: Sequence[str]) -> None:
    """Warns if responses begin with a model's thoughts."""
    n = sum(begins_with_thought(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
    if n:
        warnings.warn(
            f"prompts: {n} of {len(answers)} responses begin with a thought, so a score of them measures the thought. "
            "Use generate(..., thinking='skip' or 'hide'), or load the model with chat_template_kwargs="
            "{'enable_thinking': False} if its template has that switch.",
            stacklevel=3,
        )


def stream(
    model: Model,
    prompt: str | Sequence[Message],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    stop: str | Sequence[str] = (),
    eos_token_id: int | Sequence[int] | None = None,
    thinking: str = "keep",
) -> Iterator[str]:
    """The response to one prompt, piece by piece; joined, the pieces are the response of `generate`.

    The arguments are those of `generate`; `thinking` is `keep` or `skip` here. Consume it inside the `with` block whose
    hooks it should run under.

    Example:
        >>> for piece in stream(model, "Name three metals.", max_new_tokens=6):
        ...     print(piece, end="|")
        The| most| common| and| widely| used|
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}. The default is 40.")
    if thinking == "hide":
        raise ValueError("thinking must be 'keep' or 'skip' in a stream, got 'hide'. Use generate to hide thoughts.")
    pieces, ends, until = Pieces(model), _ends(model, eos_token_id), StopAt(stop_strings(stop))
    prompt = as_text(prompt, "prompt", blank=not has_chat_template(model), chats=True)
    texts = _thinking(model, as_chat(model, [prompt]), thinking)
    run = _Run(model, [encode(model, text) for text in texts], max_new_tokens, True, (0,))
    sampling = Sampling(temperature, top_k, top_p, seed, repetition_penalty, min_new_tokens)
    for column in run.columns(sampling, ends):
        if column[0] in ends:
            break
        if piece := until(pieces(int(column[0]))):
            yield piece
        if until.hit:
            return
    if rest := until(pieces.rest) + until.rest:
        yield rest


def generate_tokens(
    model: Model,
    encoded: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    rows: Sequence[int] | None = None,
    n_rows: int | None = None,
    use_cache: bool = True,
    trace: Directions | None = None,
    on_token: Callable[[NewToken], None] | None = None,
    stop: Sequence[str] = (),
    ends: Int[Tensor, "n"] | None = None,
) -> list[list[int]]:
    """New token ids of one batch, in the order of its rows.

    Args:
        model: HookedTransformer or TransformerBridge.
        encoded: token ids of each prompt.
        max_new_tokens: at most this many new tokens per row.
        sampling: None for greedy decoding.
        rows: index of each row in the caller's list; by default its index in the batch.
        n_rows: length of that list, if `rows` is given and the length is known.
        use_cache: False runs the whole text again for each token.
        trace: vectors on which each new token's activation is projected, for `on_token`.
        on_token: called with each new token.
        stop: strings that end a row, with the token that completes one of them.
        ends: ids that end a row. Defaults to the model's own.

    Example:
        >>> prompt = chat_text(model, "Name three metals.")
        >>> ids = model.tokenizer.encode(prompt, add_special_tokens=False)
        >>> (new_ids,) = generate_tokens(model, [ids], max_new_tokens=3)
        >>> model.tokenizer.decode(new_ids)
        'The most common'
    """
    run = _Run(model, encoded, max_new_tokens, use_cache, tuple(rows) if rows is not None else None, n_rows)
    ends = _ends(model) if ends is None else ends
    columns: list[Int[Tensor, "batch"]] = []
    report = None if on_token is None else _Reporter(model, run.rows, ends, on_token, trace, stop)
    with report.reading() if report is not None else nullcontext():
        for column in run.columns(sampling or Sampling(), ends, drops=report is None, stop=stop):
            if report is not None and report.traces and columns:
                report(len(columns) - 1, columns[-1])  # the step that gave this column ran the previous one
            columns.append(column)
            if report is not None and not report.traces:
                report(len(columns) - 1, column)
        if report is not None and report.traces and report.has_open_rows(columns[-1]):
            run.step(columns[-1][:, None])
            report(len(columns) - 1, columns[-1])
        if report is not None:
            report.finish()
    return [_until_end(model, row, ends, stop) for row in torch.stack(columns, 1).tolist()]


class _Run:
    """One batch in generation: the tokens so far, their mask, and the step that computes the next logits."""

    def __init__(
        self, model: Model, encoded: Sequence[Sequence[int]], n: int, use_cache: bool,
        rows: tuple[int, ...] | None = None, n_rows: int | None = None,
    ) -> None:  # fmt: skip
        longest = max(len(ids) for ids in encoded)
        if longest + n > model.cfg.n_ctx:
            raise ValueError(
                f"prompts and new tokens must fit the model's context of {model.cfg.n_ctx} tokens, got {longest} + "
                f"{n}. Shorten the prompts or lower max_new_tokens."
            )
        self.use_cache = use_cache and _may_cache(model, longest, longest + n)
        self.model, self.n, self.encoded = model, n, encoded
        self.rows = rows if rows is not None else tuple(range(len(encoded)))
        self.n_rows = len(encoded) if rows is None else n_rows
        self.lengths = torch.tensor([len(ids) for ids in encoded], device=model.cfg.device)
        self.memory: dict[Any, Any] = {}
        self.cache: Any = None
        self.mask: Tensor
        self.so_far: list[Tensor] = []

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, "batch new"] | None = None) -> Float[Tensor, "batch d_vocab"]:
        """Logits after the prompts (None), or after one more token of each row."""
        if tokens is None:
            return self._of_prompts()
        tokens = tokens.to(self.mask.device)
        batch = TokenBatch(tokens, torch.ones_like(tokens), self.rows)
        self.mask = torch.cat([self.mask, batch.mask], dim=1)
        with self._context(new=1 if self.use_cache else None):
            return self._next_logits(batch)

    def _of_prompts(self) -> Float[Tensor, "batch d_vocab"]:
        if self.use_cache:
            ran = run_prompts(
                self.model, self.encoded, self.n, rows=self.rows, n_rows=self.n_rows, memory=self.memory
            )  # fmt: skip
            self.cache, self.mask = ran.cache, ran.mask
            backend = backend_of(self.model)
            with self._context(new=1), backend.quick():
                return backend.unembed(ran.last)
        batch = pad(self.encoded, pad_id_of(self.model)).to(self.model.cfg.device)
        self.mask = batch.mask
        with self._context():
            return self._next_logits(batch)

    def _context(self, new: int | None = None) -> AbstractContextManager[Any]:
        return token_context(
            self.mask, new=new, lengths=self.lengths, rows=self.rows, n_rows=self.n_rows, memory=self.memory
        )  # fmt: skip

    def _next_logits(self, batch: TokenBatch) -> Float[Tensor, "batch d_vocab"]:
        backend = backend_of(self.model)
        if self.cache is not None:
            return backend.next_logits(batch.tokens, batch.mask, self.cache)
        self.so_far.append(batch.tokens)  # without a cache the whole text runs again for each token
        return backend.next_logits(torch.cat(self.so_far, dim=1), self.mask, None)

    def columns(
        self, sampling: Sampling, ends: Int[Tensor, "n"], *, drops: bool = False, stop: Sequence[str] = ()
    ) -> Iterator[Int[Tensor, "batch"]]:
        """The tokens of all rows, one new position after the other, until every row has ended.

        Args:
            sampling: how a token is chosen.
            ends: end tokens.
            drops: rows that have ended leave the batch, once a third of it has; their tokens are end tokens then.
            stop: strings that end a row as well.
        """
        watched = Watched(self.model, len(self.rows), stop)
        seen = self._seen() if sampling.repetition_penalty != 1 else None
        draws = _draws(sampling.seed, self.rows, self.n)
        running, column = torch.arange(len(self.rows), device="cpu"), None
        ended: Bool[Tensor, "running"] = torch.zeros(len(self.rows), dtype=torch.bool, device="cpu")
        drops = (
            drops
            and len(ends) > 0
            and self.use_cache
            and backend_of(self.model).shares(int(self.lengths.max()) + self.n)
        )
        for index in range(self.n):
            logits = self.step(None if column is None else column[:, None])
            if seen is not None:
                logits = penalised(logits, seen[running.to(seen.device)], sampling.repetition_penalty)
            if index < sampling.min_new_tokens:
                logits = logits.index_fill(-1, ends.to(logits.device), -torch.inf)
            column = sampling.choose(logits, draws[running, index].to(logits.device)).cpu()
            if seen is not None:
                seen[running.to(seen.device), column.to(seen.device)] = True
            yield ends[:1].repeat(len(draws)).scatter(0, running, column) if len(running) < len(draws) else column
            breathe()
            ended = ended | torch.isin(column, ends)
            if stop:
                ended = ended | watched.stopped(running, column)
            if ended.all():
                return
            if drops and 3 * int(ended.sum()) >= len(ended) > 2 and index + 1 < self.n and (drops := self._may_drop()):
                stay = (~ended).nonzero()[:, 0]
                self._keep(stay.tolist(), self.n - index)
                running, column, ended = running[stay], column[stay], ended[stay]

    def _seen(self) -> Bool[Tensor, "batch d_vocab"]:
        """The tokens that each prompt has."""
        seen = torch.zeros(len(self.rows), self.model.cfg.d_vocab, dtype=torch.bool, device=self.model.cfg.device)
        for row, ids in zip(seen, self.encoded, strict=True):
            row[list(ids)] = True
        return seen

    def _may_drop(self) -> bool:
        """Whether all that a hook keeps by row can follow the rows that stay."""
        kept = self.memory.values()
        by_row = all(isinstance(value, Tensor) and len(value) == len(self.rows) for value in kept)
        return by_row and knows_rows(self.model)

    def _keep(self, index: list[int], room: int) -> None:
        """Goes on with these rows of the batch only."""
        self.cache = self.cache.branch(self.model, index, room)
        self.mask, self.lengths = self.mask[index], self.lengths[index]
        self.rows = tuple(self.rows[i] for i in index)
        self.memory = {key: value[index] for key, value in self.memory.items()}


class _Reporter:
    """Calls `on_token` with new tokens; with a trace it reads their activations too."""

    def __init__(
        self, model: Model, rows: Sequence[int], ends: Tensor, on_token: Callable[[NewToken], None],
        trace: Directions | None, stop: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.rows, self.ends, self.on_token = model, rows, ends, on_token
        self.untils = [StopAt(stop) for _ in rows]
        self.units = {} if trace is None else trace.unit().vectors
        self.traces = trace is not None
        self.projections: dict[str, list[float]] = {}
        self.ended = [False] * len(rows)
        self.pieces = [Pieces(model) for _ in rows]
        self.held: dict[int, NewToken] = {}  # last tokens that end within a character and wait for the next one

    def reading(self) -> AbstractContextManager[Any]:
        """Hooks that read the projections. They come after the model's own hooks, so they see edited activations."""
        readers = [(name, partial(self._read, name)) for name in self.units]
        return self.model.hooks(fwd_hooks=readers) if readers else nullcontext()

    def _read(self, name: str, activation: Float[Tensor, "batch pos d"], hook: Any) -> None:
        last = activation[:, -1].detach().float()
        self.projections[name] = (last @ self.units[name].to(last)).tolist()

    def has_open_rows(self, column: Int[Tensor, "batch"]) -> bool:
        """Whether a token of this last column is still to be reported."""
        return any(not ended and int(t) not in self.ends for ended, t in zip(self.ended, column, strict=True))

    def __call__(self, index: int, column: Int[Tensor, "batch"]) -> None:
        for i, token in enumerate(column.tolist()):
            if self.ended[i]:
                continue
            self.ended[i] = token in self.ends
            if self.ended[i]:
                self._report_held(i, self._rest(i))
                continue
            self._report_held(i)
            projections = {name: values[i] for name, values in self.projections.items()}
            new = NewToken(self.rows[i], index, token, self.untils[i](self.pieces[i](token)), projections)
            self.ended[i] = self.untils[i].hit
            if not self.ended[i] and (self.pieces[i].rest or self.untils[i].rest):
                self.held[i] = new
            else:
                self.on_token(new)

    def _rest(self, i: int) -> str:
        """The text of a row that waited for more, and no more comes."""
        return self.untils[i](self.pieces[i].rest) + self.untils[i].rest

    def finish(self) -> None:
        """Reports the tokens that no other token follows."""
        for i in list(self.held):
            self._report_held(i, self._rest(i))

    def _report_held(self, i: int, rest: str = "") -> None:
        if new := self.held.pop(i, None):
            self.on_token(replace(new, text=new.text + rest))


def _may_cache(model: Model, first: int, longest: int) -> bool:
    """Whether decoding with a cache is exact for texts that grow so; warns, once per model, if it is not."""
    backend = backend_of(model)
    if backend.caches(first, longest):
        return True
    if not getattr(model.cfg, "rt_lens_cache_warned", False):
        model.cfg.rt_lens_cache_warned = True
        warnings.warn(
            f"model: {model_name(model)} ({backend.family}) gives other logits with a key-value cache than without. "
            "Generation runs without a cache, which is exact and slower.",
            stacklevel=2,
        )
    return False


def _draws(seed: int, streams: Iterable[int], n: int) -> Float[Tensor, "batch n"]:
    """Uniform numbers from one stream per prompt, so a batch draws the same numbers as its prompts would alone."""
    rows = [
        torch.rand(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + stream), device="cpu")
        for stream in streams
    ]
    return torch.stack(rows)


def _ends(model: Model, given: int | Sequence[int] | None = None) -> Int[Tensor, "n"]:
    """Ids that end a response: the model's own, or those given."""
    if given is None:  # a tokenizer may have end tokens that the model has no row for
        own = [number for number in end_ids(model) if number < model.cfg.d_vocab]
        return torch.tensor(own, dtype=torch.long, device="cpu")
    ids = (given,) if isinstance(given, int) else tuple(given)
    if any(not 0 <= number < model.cfg.d_vocab for number in ids) or not ids:
        raise ValueError(
            f"eos_token_id must be token ids from 0 to {model.cfg.d_vocab - 1}, got {given!r}. Leave it out for the "
            "model's own."
        )
    return torch.tensor(ids, dtype=torch.long, device="cpu")


def _until_end(model: Model, ids: list[int], ends: Tensor, stop: Sequence[str]) -> list[int]:
    """A row's tokens up to its end token, or with the one that completes a string to stop at."""
    stops, watched = set(ends.tolist()), Watched(model, 1, stop)
    for index, token in enumerate(ids):
        if token in stops:
            return ids[:index]
        if watched.after(0, token):
            return ids[: index + 1]
    return ids
