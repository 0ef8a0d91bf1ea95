"""How likely a model finds the options of a question: as completions, or as letters of a list in every rotation.

Nothing is generated, and nothing is scored.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rt_lens.common.progress import Bar
from rt_lens.data.questions import LETTERS, Likelihoods, Question, lettered
from rt_lens.evaluation.scorers import Form, check_form
from rt_lens.evaluation.texts import log_normaliser
from rt_lens.models.backends import backend_of
from rt_lens.models.context import token_context
from rt_lens.models.forward import logits_where
from rt_lens.models.prompts import run_prompts
from rt_lens.models.protocol import HasTokenizer, Model
from rt_lens.models.tokens.batches import encode, pad, pad_id_of
from rt_lens.models.tokens.chats import answered, chat_text, has_chat_template, is_chat


@dataclass(frozen=True)
class _Ask:
    """One question, with its options in one order, as tokens.

    Attributes:
        number: index of the question.
        start: tokens that precede every option.
        options: tokens of each option, in the question's order.
    """

    number: int
    start: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]


@torch.no_grad()
def likelihoods(
    model: Model,
    questions: Sequence[Question],
    *,
    form: Form = "completion",
    batch_size: int = 16,
) -> list[Likelihoods]:
    """Log-likelihood of every option of every question; no text is generated.

    The model reads a question's tokens once for all its options. With `multiple_choice` the options are listed under
    A, B, ... in every rotation (for two options: in both orders), and log-likelihoods are averaged over the rotations,
    so that a preference for a letter cancels out. Edits of generated tokens act on the options' tokens.

    Args:
        model: HookedTransformer or TransformerBridge, measured with its current hooks and weights.
        questions: questions with at least two options each.
        form: `completion` (each option follows the question as its response) or `multiple_choice` (options are listed,
            and letters follow).
        batch_size: questions (times orders) per forward pass; it affects speed only.

    Raises:
        ValueError: for a question with fewer than two options (`multiple_choice`: or more than ten), or an unknown
            form.

    Example:
        >>> question = Question("What is the capital of France?", right=("Paris",), wrong=("Lyon",))
        >>> paris, lyon = likelihoods(model, [question])[0].totals
        >>> paris > lyon
        True
        >>> len(likelihoods(model, [question], form="multiple_choice")[0].totals)
        2
    """
    check_form(form)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    _check_options(questions, form)
    asks = [ask for number, question in enumerate(questions) for ask in _asks(model, number, question, form)]
    asks.sort(key=lambda ask: -len(ask.start))  # similar lengths together; a batch too large for memory fails at once
    by_question: list[list[list[float]]] = [[] for _ in questions]
    starts = range(0, len(asks), batch_size)
    for start in Bar(starts, desc="scoring options", unit="batch", disable=True):  # for an observer of progress
        batch = asks[start : start + batch_size]
        for ask, totals in zip(batch, _measured(model, batch, len(questions)), strict=True):
            by_question[ask.number].append(totals)
    sizes = {ask.number: tuple(len(ids) for ids in ask.options) for ask in asks}
    return [_averaged(orders, sizes[number]) for number, orders in enumerate(by_question)]


def question_text(model: HasTokenizer, question: Question) -> str:
    """The text the model reads up to its response; a prompt that already has the chat template stays as it is.

    Raises:
        ValueError: for a system message with a prompt that already has the chat template.
    """
    if not is_chat(model, question.prompt):
        return chat_text(model, question.prompt, system=question.system, prefill=question.prefill)
    if question.system:
        raise ValueError(
            f"system must be empty for a prompt that already has the chat template, got {question.system!r}. "
            "Give the user's message alone as the prompt."
        )
    return answered(model, question.prompt, question.prefill) if question.prefill else question.prompt


def start_of(model: HasTokenizer, question: Question) -> tuple[str, str]:
    """The text that a response to a question follows, and what separates the two: a space, or nothing."""
    text = question_text(model, question)
    prefill = question.prefill or getattr(text, "prefill", "")  # a prompt with the chat template may have one, too
    begins = has_chat_template(model) and not prefill  # the template itself ends with what precedes a response
    return text, "" if begins or text[-1].isspace() else " "


def _check_options(questions: Sequence[Question], form: str) -> None:
    for question in questions:
        n = len(question.options)
        if n < 2 or (form == "multiple_choice" and n > len(LETTERS)):
            most = f" and at most {len(LETTERS)}" if form == "multiple_choice" else ""
            raise ValueError(
                f"questions must have at least 2{most} options each, got {n} for {question.prompt[:60]!r}. Give them "
                "as in Question(prompt, right=('Paris',), wrong=('Lyon',))."
            )


def _averaged(orders: Sequence[Sequence[float]], sizes: tuple[int, ...]) -> Likelihoods:
    table = torch.tensor(orders, dtype=torch.float64, device="cpu")  # [order, option]
    off_options = (1 - table.exp().sum(1)).clamp(min=0).mean()
    return Likelihoods(tuple(table.mean(0).tolist()), sizes, float(off_options))


def _asks(model: Model, number: int, question: Question, form: Form) -> Iterator[_Ask]:
    """The question once, or once for each rotation of its options."""
    if form == "completion":
        text, gap = start_of(model, question)
        yield _ask(model, number, text, [gap + option for option in question.options])
        return
    n = len(question.options)
    prefill = question.prefill or "The answer is"
    for turn in range(n):
        lines = [(index + turn) % n for index in range(n)]  # option -> its line in the list
        in_order = [option for _, option in sorted(zip(lines, question.options, strict=True))]
        user = lettered(question.prompt, in_order)
        text = chat_text(model, user, system=question.system, prefill=prefill)
        yield _ask(model, number, text, [f" {LETTERS[line]}" for line in lines])


def _ask(model: Model, number: int, start: str, options: Sequence[str]) -> _Ask:
    # A token may span the end of the question and the start of an option, so the split is where the token lists differ.
    with_option = [encode(model, answered(model, start, option)) for option in options]
    shared = _shared([encode(model, start), *with_option])
    shared = min(shared, *(len(ids) - 1 for ids in with_option))  # each option keeps at least one token
    if shared < 1:
        raise ValueError(
            f"questions must have a prompt before their options, got none before {list(options)}. Give the question a "
            "prompt."
        )
    return _Ask(number, tuple(with_option[0][:shared]), tuple(tuple(ids[shared:]) for ids in with_option))


def _shared(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix of the sequences."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _measured(model: Model, asks: Sequence[_Ask], n_rows: int) -> list[list[float]]:
    """Log-likelihoods of the options of each ask."""
    longest = max(len(ask.start) + len(ids) for ask in asks for ids in ask.options)
    return (_branched if backend_of(model).branches(longest) else _whole)(model, asks, n_rows)


def _branched(model: Model, asks: Sequence[_Ask], n_rows: int) -> list[list[float]]:
    """Runs each question once; all its options share the question's keys and values."""
    rows, memory = [ask.number for ask in asks], dict[Any, Any]()
    backend = backend_of(model)
    with backend.quick():
        room = max(len(ids) for ask in asks for ids in ask.options)
        ran = run_prompts(model, [ask.start for ask in asks], room, rows=rows, n_rows=n_rows, memory=memory)
        lengths, logits = ran.mask.sum(1), backend.unembed(ran.last)
        first = logits.double().cpu() - log_normaliser(logits)[:, None]
        totals = [[first[row, ids[0]].item() for ids in ask.options] for row, ask in enumerate(asks)]
        longer = [
            (row, option) for row, ask in enumerate(asks) for option, ids in enumerate(ask.options) if len(ids) > 1
        ]
        if not longer:
            return totals
        rest = pad([asks[row].options[option][:-1] for row, option in longer], pad_id_of(model), "right")
        rest = rest.to(model.cfg.device)
        question_rows = [row for row, _ in longer]
        branch = ran.cache.branch(model, question_rows, rest.tokens.shape[1])
        mask = torch.cat([ran.mask[question_rows], rest.mask], dim=1)
        with token_context(
            mask, new=rest.tokens.shape[1], lengths=lengths[question_rows], rows=[rows[row] for row in question_rows],
            n_rows=n_rows, memory={key: values[question_rows] for key, values in memory.items()},
        ):  # fmt: skip
            residual = backend.extend(rest.tokens, rest.mask, branch)
        chunks = (backend.unembed(part) for part in residual[rest.mask.bool()].split(128))
        targets = [list(asks[row].options[option][1:]) for row, option in longer]
        for (row, option), total in zip(longer, _totals(chunks, targets), strict=True):
            totals[row][option] += total
    return totals


def _whole(model: Model, asks: Sequence[_Ask], n_rows: int) -> list[list[float]]:
    """Runs the whole question again for each option, for models whose cache cannot be branched."""
    rows = [(ask, ids) for ask in asks for ids in ask.options]
    batch = pad([[*ask.start, *ids[:-1]] for ask, ids in rows], pad_id_of(model)).to(model.cfg.device)
    lengths = torch.tensor([len(ask.start) for ask, _ in rows], device=model.cfg.device)
    where = torch.zeros_like(batch.mask, dtype=torch.bool)
    for row, (_, ids) in enumerate(rows):
        where[row, where.shape[1] - len(ids) :] = True
    with token_context(batch.mask, lengths=lengths, rows=[ask.number for ask, _ in rows], n_rows=n_rows):
        logits = list(logits_where(model, batch.tokens, batch.mask, where))
    totals = iter(_totals(iter(logits), [list(ids) for _, ids in rows]))
    return [[next(totals) for _ in ask.options] for ask in asks]


def _totals(chunks: Iterator[Float[Tensor, "n d_vocab"]], targets: Sequence[Sequence[int]]) -> list[float]:
    """Summed log-likelihood of each list of target tokens; the chunks hold their logits, list after list."""
    flat = torch.tensor([token for ids in targets for token in ids], device="cpu")
    log_likelihoods, done = [], 0
    for logits in chunks:
        chosen = flat[done : done + len(logits), None].to(logits.device)
        log_likelihoods.append(logits.gather(1, chosen)[:, 0].double().cpu() - log_normaliser(logits))
        done += len(logits)
    return [part.sum().item() for part in torch.cat(log_likelihoods).split([len(ids) for ids in targets])]
