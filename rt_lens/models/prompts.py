"""Prompts that run once: the beginning that they share, and the blocks below the first one that anything changes.

Two kinds of work need not be done. Prompts share a beginning (a chat template's system text, a persona): where every
hook treats their rows alike, it runs once for all of them, or once for each kind of row that a multiplier by row makes.
And the same prompts run again and again, steered with other multipliers or with other weights, of which the blocks
below the first change know nothing: inside `SharedBelow` these run once, and later passes go on from there.

Both give the numbers of the plain pass up to rounding. Where a model's cache cannot be put together from parts, or a
hook could tell rows apart, the plain pass runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from rt_lens.models.backends import backend_of
from rt_lens.models.backends.base import hooked, users_hooks
from rt_lens.models.context import token_context
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import TokenBatch, pad, pad_id_of

SHORTEST = 4
"""Tokens that prompts must share at least: fewer are not worth a pass of their own."""
MOST_MEMORY = 2 * 1024**3
"""Bytes that `SharedBelow` keeps; beyond them the oldest go, and run again when the same tokens come back."""


@runtime_checkable
class TreatsRows(Protocol):
    """A hook that says which rows it treats alike, up to the end of their prompts."""

    def treats(self, row: int) -> Hashable | None:
        """The same for rows of the caller's list that it treats alike; None if it depends on more than the row."""


@dataclass(frozen=True)
class Ran:
    """Prompts that have run.

    Attributes:
        cache: their key-value cache, which further tokens extend.
        mask: Int[Tensor, "batch pos"], 1 for real tokens.
        last: Float[Tensor, "batch d_model"], the residual stream after the last block at each prompt's last token.
    """

    cache: Any
    mask: Int[Tensor, "batch pos"]
    last: Float[Tensor, "batch d_model"]


@torch.no_grad()
def run_prompts(
    model: Model,
    encoded: Sequence[Sequence[int]],
    room: int = 0,
    *,
    rows: Sequence[int] | None = None,
    n_rows: int | None = None,
    memory: dict[Any, Any] | None = None,
) -> Ran:
    """Runs a batch of prompts under the model's hooks, for models whose decoding can be cached.

    Args:
        model: HookedTransformer or TransformerBridge.
        encoded: token ids of each prompt.
        room: tokens that may follow each.
        rows: indices of the prompts in the caller's list.
        n_rows: length of that list.
        memory: values that hooks keep from one pass to the next.

    Example:
        >>> ran = run_prompts(model, [[19, 42, 7], [19, 42, 8]])
        >>> ran.last.shape
        torch.Size([2, 576])
    """
    backend, numbers = backend_of(model), list(range(len(encoded)) if rows is None else rows)
    lengths = torch.tensor([len(ids) for ids in encoded], device=model.cfg.device)
    capacity = int(lengths.max()) + room
    shares = backend.shares(capacity)
    kinds = kinds_of_rows(model, numbers) if shares else None
    n = _n_shared(encoded, kinds)
    reader = _Reader(model, shares=shares)
    cache = backend.cache(len(encoded), capacity)
    with backend.quick():
        if n:
            assert kinds is not None
            each = list(dict.fromkeys(kinds))
            firsts, of_row = [kinds.index(kind) for kind in each], [each.index(kind) for kind in kinds]
            beginning = pad([encoded[row][:n] for row in firsts], pad_id_of(model)).to(model.cfg.device)
            once = backend.cache(len(firsts), n)
            with token_context(
                beginning.mask, lengths=lengths[firsts], rows=[numbers[row] for row in firsts], n_rows=n_rows
            ):
                reader.extend(beginning, once)
            cache.adopt(once, of_row, range(model.cfg.n_layers))
            cache.mask = once.mask[of_row]
        rest = pad([ids[n:] for ids in encoded], pad_id_of(model)).to(model.cfg.device)
        mask = torch.cat([rest.mask.new_ones(len(encoded), n), rest.mask], dim=1)
        with token_context(
            mask, new=rest.mask.shape[1], lengths=lengths, rows=numbers, n_rows=n_rows, memory=memory
        ):  # fmt: skip
            final = reader.extend(rest, cache)
    return Ran(cache, mask, final[:, -1])


@torch.no_grad()
def last_logits(
    model: Model, encoded: Sequence[Sequence[int]], *, rows: Sequence[int] | None = None, n_rows: int | None = None
) -> Float[Tensor, "batch d_vocab"]:
    """Logits after the last token of each text, under the model's hooks, for any model.

    Args:
        model: HookedTransformer or TransformerBridge.
        encoded: token ids of each text.
        rows: indices of the texts in the caller's list.
        n_rows: length of that list.

    Example:
        >>> last_logits(model, [model.tokenizer.encode("The capital of France is")]).argmax().item() == (
        ...     model.tokenizer.encode(" Paris")[0]
        ... )
        True
    """
    backend = backend_of(model)
    if backend.shares(max(len(ids) for ids in encoded)):
        ran = run_prompts(model, encoded, rows=rows, n_rows=n_rows)
        with backend.quick(), token_context(ran.mask, new=1, rows=rows, n_rows=n_rows):
            return backend.unembed(ran.last)
    batch = pad(encoded, pad_id_of(model)).to(model.cfg.device)
    last = torch.zeros_like(batch.mask, dtype=torch.bool)
    last[:, -1] = True
    with token_context(batch.mask, rows=rows, n_rows=n_rows):
        return torch.cat(list(backend.logits(batch.tokens, batch.mask, last, len(encoded))))


def _n_shared(encoded: Sequence[Sequence[int]], kinds: Sequence[Hashable] | None) -> int:
    """Number of first tokens that all prompts share and that are to run once; each keeps a token of its own."""
    if kinds is None or 2 * len(set(kinds)) > len(encoded):
        return 0
    most = max(0, min(len(ids) for ids in encoded) - 1)
    columns = itertools.islice(zip(*encoded, strict=False), most)
    n = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return n if n >= SHORTEST else 0


def beginnings(encoded: Sequence[Sequence[int]]) -> list[int]:
    """Of each text, how many first tokens are worth running once for it and others that begin with them.

    Each text has one beginning. They are chosen to save the most tokens: of a longer beginning of few texts and a
    shorter one of many, the one with more tokens times texts.

    Example:
        >>> beginnings([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 3, 9]])
        [5, 5, 0]
    """
    order = sorted(range(len(encoded)), key=lambda i: list(encoded[i]))
    lengths = [0] * len(encoded)
    # How many first tokens each text, in alphabetical order, shares with the one before it.
    shared = [0, *(_alike(encoded[a], encoded[b]) for a, b in itertools.pairwise(order))]
    for first, last, n in _most_saved(shared, [len(encoded[i]) for i in order])[1]:
        for i in order[first:last]:
            lengths[i] = n
    return lengths


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _most_saved(shared: Sequence[int], sizes: Sequence[int]) -> tuple[int, list[tuple[int, int, int]]]:
    """Tokens saved, and (first, last, tokens) of each group of neighbours that share a beginning, without recursion.

    Neighbours that share a beginning lie in a tree of nested runs; a stack visits it from its leaves.
    """
    stack: list[tuple[int, int, int, list[tuple[int, int, int]]]] = []  # depth, first text, saved below, their groups
    for end in range(1, len(sizes) + 1):
        depth, first, saved, groups = (shared[end] if end < len(sizes) else 0), end - 1, 0, list[tuple[int, int, int]]()
        while stack and stack[-1][0] > depth:
            above, first, below, parts = stack.pop()
            below += saved
            parts.extend(groups)
            n = min(above, min(sizes[first:end]) - 1)  # each text keeps a token of its own
            gain = n * (end - first - 1) if n >= SHORTEST else 0
            saved, groups = (gain, [(first, end, n)]) if gain > below else (below, parts)
        if stack and (stack[-1][0] == depth or not depth):
            top, start, below, parts = stack.pop()
            parts.extend(groups)
            stack.append((top, start, below + saved, parts))
        else:
            stack.append((depth, first, saved, groups))
    return stack[0][2], stack[0][3]


def kinds_of_rows(model: Model, rows: Sequence[int]) -> list[Hashable] | None:
    """Of each row, what is the same for rows that all hooks treat alike; None if a hook does not say."""
    acting = _acting(model)
    if acting is None:
        return None
    kinds = [tuple(hook.treats(row) for hook in acting) for row in rows]
    return None if any(None in kind for kind in kinds) else list(kinds)


def knows_rows(model: Model) -> bool:
    """Whether every hook learns from the token context which rows it sees, so that a batch may lose some."""
    return _acting(model) is not None


def _acting(model: Model) -> list[TreatsRows] | None:
    """The hooks on the model; None if there are others than those that say how they treat rows."""
    points = {module for module in model.modules() if isinstance(module, HookPoint)}
    if hooked([module for module in model.modules() if module not in points]):
        return None
    listening = [point for point in points if users_hooks(point)]
    attached = [handle.user_hook for point in listening for handle in point.fwd_hooks]
    acting: list[Any] = [hook for hook in attached if isinstance(hook, TreatsRows)]
    return acting if len(acting) == sum(len(users_hooks(point)) for point in listening) else None


@dataclass
class _Kept:
    """What a pass over some tokens computes below a block.

    Attributes:
        number: of the pass, for the keys of passes that follow it.
        block: the block.
        rows: of each row of the batch, its row here: equal rows are kept once.
        mask: of the tokens.
        residual: the residual stream that enters the block.
        cache: keys and values of the blocks below, of these tokens and those before them; None where none will follow.
    """

    number: int
    block: int
    rows: list[int]
    mask: Int[Tensor, "row new"]
    residual: Float[Tensor, "row new d_model"]
    cache: Any

    @property
    def size(self) -> int:
        """Bytes, with as much for keys as for values, and no more of either than of the residual stream."""
        tensors = 1 if self.cache is None else 1 + 2 * self.block
        return tensors * self.residual.numel() * self.residual.element_size()


class SharedBelow:
    """Context manager under which blocks below the first change run once for the same tokens; it can be entered again.

    A change is a hook, or a parameter with other memory than when this was made, as an applied `WeightDelta` gives it;
    what is written into the same memory through `.data` is not seen.

    Attributes:
        model: the model.
        floor: no further pass changes anything below this block, so that what is kept can rise to it.

    Example:
        >>> with SharedBelow(model):
        ...     for multiplier in (1.0, 2.0):
        ...         with model.hooks(fwd_hooks=add(vectors, layers=[21], multiplier=multiplier)):
        ...             answers = generate(model, prompts, max_new_tokens=2)  # blocks 0 to 20 read the prompts once
    """

    def __init__(self, model: Model) -> None:
        self.model, self.floor = model, 0
        self._weights = [_memory(part) for part in _parts(model)]
        self._alive = [p.detach() for p in model.parameters()]  # so that no other memory gets their addresses
        self._kept: dict[_Key, _Kept] = {}
        self._numbers = itertools.count()

    def __enter__(self) -> SharedBelow:
        _ENTERED.set((*_ENTERED.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        _ENTERED.set(_ENTERED.get()[:-1])

    def limit(self) -> int:
        """The first block that a hook or a weight changes; 0 if that is before the blocks, or nothing is changed."""
        for index, (part, before) in enumerate(zip(_parts(self.model), self._weights, strict=True)):
            if hooked([module for each in part for module in each.modules()]) or _memory(part) != before:
                return max(0, index - 1)
        return 0  # a pass with a change will say where to keep

    def kept(self, batch: TokenBatch, limit: int, before: _Kept | None, *, caches: bool) -> _Kept:
        """What is kept of these tokens below a block, at most the limit; computed now if there is nothing."""
        limit = limit if before is None else min(limit, before.block)
        tokens, mask = (part.cpu().numpy() for part in (batch.tokens, batch.mask))
        key = (tokens.shape, tokens.tobytes(), mask.tobytes(), None if before is None else before.number, caches)
        found = self._kept.get(key)
        if found is not None and found.block <= limit:
            if found.block < self.floor <= limit:
                self._rise(found, before)
                self._forget_oldest()
            return found
        if found is not None:
            self._forget(key)
        computed = self._kept[key] = self._computed(batch, limit, before, caches)
        self._forget_oldest()
        return computed

    def _forget_oldest(self) -> None:
        while sum(kept.size for kept in self._kept.values()) > MOST_MEMORY:
            self._forget(next(iter(self._kept)))

    def _forget(self, key: _Key) -> None:
        """Drops a pass, and those that follow it, which nobody could find any more."""
        number = self._kept.pop(key).number
        for other in [other for other in self._kept if other[3] == number]:
            del self._kept[other]

    def _computed(self, batch: TokenBatch, limit: int, before: _Kept | None, caches: bool) -> _Kept:
        pairs = list(zip(batch.tokens.tolist(), batch.mask.tolist(), strict=True))
        each = list(dict.fromkeys((tuple(ids), tuple(mask)) for ids, mask in pairs))
        index = {row: number for number, row in enumerate(each)}
        rows = [index[tuple(ids), tuple(mask)] for ids, mask in pairs]
        firsts = [rows.index(number) for number in range(len(each))]
        tokens, mask, backend = batch.tokens[firsts], batch.mask[firsts], backend_of(self.model)
        cache = self._after(before, mask, limit) if caches else None
        residual = (
            backend.residual(tokens, mask, stop=limit)
            if cache is None
            else backend.extend(tokens, mask, cache, stop=limit)
        )
        return _Kept(next(self._numbers), limit, rows, mask, residual, cache)

    def _rise(self, kept: _Kept, before: _Kept | None) -> None:
        """Runs the blocks up to the floor, which nothing will change any more."""
        backend, span = backend_of(self.model), {"start": kept.block, "stop": self.floor}
        if kept.cache is None:
            residual = backend.residual(kept.residual, kept.mask, **span)
        else:
            above = self._after(before, kept.mask, self.floor)
            residual = backend.extend(kept.residual, kept.mask, above, **span)
            kept.cache.adopt(above, range(len(kept.mask)), range(kept.block, self.floor))
        kept.residual, kept.block = residual, self.floor

    def _after(self, before: _Kept | None, mask: Tensor, stop: int) -> Any:
        """A cache for some rows, which holds the tokens before them in the blocks below one."""
        earlier = 0 if before is None else before.cache.mask.shape[1]
        cache = backend_of(self.model).cache(len(mask), earlier + mask.shape[1])
        if before is not None:  # a beginning that all rows share
            cache.adopt(before.cache, [0] * len(mask), range(stop))
            cache.mask = before.cache.mask[[0] * len(mask)]
        return cache


_Key: TypeAlias = tuple[tuple[int, ...], bytes, bytes, int | None, bool]
"""Shape, tokens, mask, the pass before, and whether keys and values are kept."""
_ENTERED: ContextVar[tuple[SharedBelow, ...]] = ContextVar("shared_below", default=())
_NOT_BEFORE_BLOCKS = ("blocks", "ln_final", "unembed", "original_model")


def _parts(model: Any) -> list[list[Any]]:
    """The modules before the blocks, then each block."""
    before = [part for name, part in model.named_children() if name not in _NOT_BEFORE_BLOCKS]
    return [before, *([block] for block in model.blocks)]


def _memory(part: Sequence[Any]) -> list[tuple[int, int, int]]:
    parameters = [p for module in part for p in module.parameters()]
    return [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]


def go_on(model: Model, batch: TokenBatch) -> tuple[Tensor, int]:
    """What a pass over whole texts starts from, inside `SharedBelow`: a residual stream, and the block it enters.

    Outside, or where nothing may be shared: the tokens, and 0.
    """
    shared, limit = _sharing(model)
    if shared is None or not limit or not backend_of(model).shares(batch.tokens.shape[1]):
        return batch.tokens, 0
    with backend_of(model).quick():
        kept = shared.kept(batch, limit, None, caches=False)
    return kept.residual[kept.rows], kept.block


class _Reader:
    """Runs one part of the same prompts after the other, from where each has been read already."""

    def __init__(self, model: Model, *, shares: bool) -> None:
        self.backend = backend_of(model)
        self.shared, self.limit = _sharing(model) if shares else (None, 0)
        self.before: _Kept | None = None

    def extend(self, batch: TokenBatch, cache: Any) -> Float[Tensor, "batch new d_model"]:
        """`Backend.extend`, after the last block."""
        kept = self.shared.kept(batch, self.limit, self.before, caches=True) if self.shared and self.limit else None
        self.before, self.limit = kept, 0 if kept is None else kept.block
        if kept is None:
            return self.backend.extend(batch.tokens, batch.mask, cache)
        final = self.backend.extend(kept.residual[kept.rows], batch.mask, cache, start=kept.block)
        cache.adopt(kept.cache, kept.rows, range(kept.block), batch.mask.shape[1])
        return final


def _sharing(model: Model) -> tuple[SharedBelow | None, int]:
    """What shares this model's passes, and up to which block."""
    shared = _ENTERED.get()[-1] if _ENTERED.get() else None
    if shared is None or shared.model is not model or torch.is_grad_enabled():
        return None, 0
    return shared, shared.limit()
