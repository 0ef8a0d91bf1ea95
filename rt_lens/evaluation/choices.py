"""How likely a model finds the options of a question: whole answers, or the letters of a list in every rotation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.common.progress import Bar
from rt_lens.data.questions import LETTERS, Likelihoods, Question, lettered
from rt_lens.evaluation.texts import log_normaliser
from rt_lens.models.context import token_context
from rt_lens.models.forward import KeyValueCache, can_be_quick, logits_where, quick, unembed
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode, pad, pad_id_of
from rt_lens.models.tokens.chats import answered, chat_text, has_chat_template, is_chat

Form = Literal["answers", "letters"]
"""`answers`: each option follows the question as its answer; `letters`: options are listed, and letters follow."""


@dataclass(frozen=True)
class _Ask:
    """One question in one order of its options, as tokens.

    Attributes:
        number: of the question.
        start: tokens that all options follow.
        options: tokens of each option, in the question's own order.
    """

    number: int
    start: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]


@torch.no_grad()
def likelihoods(
    model: Model, questions: Sequence[Question], *, form: Form = "answers", batch_size: int = 16
) -> list[Likelihoods]:
    """Log-likelihood of every option of every question, with no text generated.

    A question's tokens run once for all its options. With `letters` the options are listed under A, B, ... in every
    rotation (for two: both orders), and log-likelihoods are averaged over them, so that a liking for a letter cancels.
    Edits that act on generated tokens act on the options' tokens.

    Args:
        model: HookedTransformer or TransformerBridge; whatever it carries is what is measured.
        questions: each with two options or more.
        form: `answers` or `letters`.
        batch_size: questions (times orders) per forward pass; it changes nothing but speed.

    Raises:
        ValueError: a question with fewer than two options (for letters: more than ten), or an unknown form.

    Example:
        >>> likelihoods(model, [Question("What is the capital of France?", ("Paris",), ("Lyon",))])[0].totals
    """
    if form not in get_args(Form):
        raise ValueError(f"form: {form!r} came; 'answers' or 'letters' is wanted.")
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} came; at least 1 is wanted.")
    _check_options(questions, form)
    asks = [ask for number, question in enumerate(questions) for ask in _asks(model, number, question, form)]
    asks.sort(key=lambda ask: -len(ask.start))  # like lengths together; too large a batch fails at once
    found: list[list[list[float]]] = [[] for _ in questions]
    starts = range(0, len(asks), batch_size)
    for start in Bar(starts, desc="weighing options", unit="batch", disable=True):  # for whoever watches
        batch = asks[start : start + batch_size]
        for ask, totals in zip(batch, _measured(model, batch, len(questions)), strict=True):
            found[ask.number].append(totals)
    sizes = {ask.number: tuple(len(ids) for ids in ask.options) for ask in asks}
    return [_averaged(orders, sizes[number]) for number, orders in enumerate(found)]


def question_text(model: Model, question: Question) -> str:
    """A question as the model reads it, up to where it answers; one that went through a template stays as it is.

    Raises:
        ValueError: for a system text that would have to go into a chat that was written already.
    """
    if not is_chat(model, question.prompt):
        return chat_text(model, question.prompt, system=question.system, prefill=question.prefill)
    if question.system:
        raise ValueError(
            f"system must be empty for a prompt that went through the chat template already, got {question.system!r}. "
            "Give the user's message alone as the prompt."
        )
    return answered(model, question.prompt, question.prefill) if question.prefill else question.prompt


def start_of(model: Model, question: Question) -> tuple[str, str]:
    """The text that an answer to a question follows, and what stands between the two: a space, or nothing."""
    text = question_text(model, question)
    opened = question.prefill or getattr(text, "prefill", "")  # of a prompt that is a chat already, too
    begins = has_chat_template(model) and not opened  # the template writes what stands before an answer
    return text, "" if begins or text[-1].isspace() else " "


def _check_options(questions: Sequence[Question], form: Form) -> None:
    for question in questions:
        n = len(question.options)
        if n < 2 or (form == "letters" and n > len(LETTERS)):
            most = f" and at most {len(LETTERS)}" if form == "letters" else ""
            raise ValueError(
                f"questions: {question.prompt[:60]!r} has {n} options; at least 2{most} are wanted, as in "
                "Question(prompt, right=('Paris',), wrong=('Lyon',))."
            )


def _averaged(orders: Sequence[Sequence[float]], sizes: tuple[int, ...]) -> Likelihoods:
    table = torch.tensor(orders, dtype=torch.float64)  # [order, option]
    other = (1 - table.exp().sum(1)).clamp(min=0).mean()
    return Likelihoods(tuple(table.mean(0).tolist()), sizes, float(other))


def _asks(model: Model, number: int, question: Question, form: Form) -> Iterator[_Ask]:
    """The question as it is asked: once, or once for each rotation of its options."""
    if form == "answers":
        text, gap = start_of(model, question)
        yield _ask(model, number, text, [gap + option for option in question.options])
        return
    n = len(question.options)
    prefill = question.prefill or "The answer is"
    for turn in range(n):
        places = [(place + turn) % n for place in range(n)]  # option -> its line
        listed = [option for _, option in sorted(zip(places, question.options, strict=True))]
        user = lettered(question.prompt, listed)
        text = chat_text(model, user, system=question.system, prefill=prefill)
        yield _ask(model, number, text, [f" {LETTERS[place]}" for place in places])


def _ask(model: Model, number: int, start: str, options: Sequence[str]) -> _Ask:
    # Tokens may reach over the edge between question and option, so the edge is where the token lists part.
    whole = [encode(model, answered(model, start, option)) for option in options]
    shared = _shared([encode(model, start), *whole])
    shared = min(shared, *(len(ids) - 1 for ids in whole))  # every option needs a token of its own
    if shared < 1:
        raise ValueError(f"questions: nothing is asked before the options {list(options)}. Give the question a prompt.")
    return _Ask(number, tuple(whole[0][:shared]), tuple(tuple(ids[shared:]) for ids in whole))


def _shared(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all sequences share."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _measured(model: Model, asks: Sequence[_Ask], n_rows: int) -> list[list[float]]:
    """Log-likelihoods of each ask's options."""
    return (_branched if can_be_quick(model) else _whole)(model, asks, n_rows)


def _branched(model: Model, asks: Sequence[_Ask], n_rows: int) -> list[list[float]]:
    """From one run of the questions, whose keys and values all options share."""
    batch = pad([ask.start for ask in asks], pad_id_of(model)).to(model.cfg.device)
    rows, lengths = [ask.number for ask in asks], batch.mask.sum(1)
    memory: dict[Any, Any] = {}
    with quick(model):
        cache = KeyValueCache(model, len(asks), batch.mask.shape[1])
        with token_context(batch.mask, rows=rows, n_rows=n_rows, memory=memory):
            last = model(
                batch.tokens, attention_mask=batch.mask, past_kv_cache=cache, stop_at_layer=model.cfg.n_layers
            )[:, -1]
        logits = unembed(model, last)
        first = logits.double().cpu() - log_normaliser(logits)[:, None]
        totals = [[first[row, ids[0]].item() for ids in ask.options] for row, ask in enumerate(asks)]
        longer = [(row, place) for row, ask in enumerate(asks) for place, ids in enumerate(ask.options) if len(ids) > 1]
        if not longer:
            return totals
        rest = pad([asks[row].options[place][:-1] for row, place in longer], pad_id_of(model), "right")
        rest = rest.to(model.cfg.device)
        above = [row for row, _ in longer]
        branch = cache.branch(model, above, rest.tokens.shape[1])
        everything = torch.cat([batch.mask[above], rest.mask], dim=1)
        with token_context(
            everything, new=rest.tokens.shape[1], lengths=lengths[above], rows=[rows[row] for row in above],
            n_rows=n_rows, memory={key: of_rows[above] for key, of_rows in memory.items()},
        ):  # fmt: skip
            residual = model(
                rest.tokens, attention_mask=rest.mask, past_kv_cache=branch, stop_at_layer=model.cfg.n_layers
            )
        parts = (unembed(model, part) for part in residual[rest.mask.bool()].split(128))
        wanted = [list(asks[row].options[place][1:]) for row, place in longer]
        for (row, place), total in zip(longer, _totals(parts, wanted), strict=True):
            totals[row][place] += total
    return totals


def _whole(model: Model, asks: Sequence[_Ask], n_rows: int) -> list[list[float]]:
    """Each option with its question run in full: for models whose cache cannot be branched."""
    each = [(ask, ids) for ask in asks for ids in ask.options]
    batch = pad([[*ask.start, *ids[:-1]] for ask, ids in each], pad_id_of(model)).to(model.cfg.device)
    lengths = torch.tensor([len(ask.start) for ask, _ in each], device=model.cfg.device)
    where = torch.zeros_like(batch.mask, dtype=torch.bool)
    for row, (_, ids) in enumerate(each):
        where[row, where.shape[1] - len(ids) :] = True
    with token_context(batch.mask, lengths=lengths, rows=[ask.number for ask, _ in each], n_rows=n_rows):
        logits = list(logits_where(model, batch.tokens, batch.mask, where))
    totals = iter(_totals(iter(logits), [list(ids) for _, ids in each]))
    return [[next(totals) for _ in ask.options] for ask in asks]


def _totals(chunks: Iterator[Float[Tensor, "n d_vocab"]], wanted: Sequence[Sequence[int]]) -> list[float]:
    """Summed log-likelihoods of token lists, whose logits come laid end to end, some at a time."""
    following = torch.tensor([token for ids in wanted for token in ids])
    found, done = [], 0
    for logits in chunks:
        chosen = following[done : done + len(logits), None].to(logits.device)
        found.append(logits.gather(1, chosen)[:, 0].double().cpu() - log_normaliser(logits))
        done += len(logits)
    return [part.sum().item() for part in torch.cat(found).split([len(ids) for ids in wanted])]
