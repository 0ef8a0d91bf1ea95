"""Contrast pairs: the same user message under two opposite personas. Only `texts` needs a model, for its tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from rt_lens.data.builtin import behaviour_content, behaviour_file
from rt_lens.data.formats import OWN, read_source
from rt_lens.data.readers import ROW_ENDINGS, Row, Table, current_names, refuse_misspelt
from rt_lens.data.splitting import connected, cut, is_product, share_out, sizes_of
from rt_lens.models.protocol import HasTokenizer
from rt_lens.models.tokens.chats import chat_text


@dataclass(frozen=True, slots=True)
class Pair:
    """One user message and prefill under two opposite personas; both may also differ between the sides.

    Attributes:
        positive: persona that asks for the behaviour (system prompt).
        negative: persona that asks for its opposite.
        user: the user message, or a `Conversation`; also the pair's topic. If it is empty, the sides are whole texts,
            which are read as they are.
        prefill: first words of the response; may be empty.
        negative_user: the user message of the negative side, if it is another one.
        negative_prefill: the prefill of the negative side, if it is another one. Then the personas may be empty.
        group: pairs of one group stay together in a split; if it is empty, the user message is the group.

    Example:
        >>> pair = Pair("You are happy.", "You are sad.", user="How was your day?", prefill="It was")
        >>> pair.sides[1]
        ('You are sad.', 'How was your day?', 'It was')
    """

    positive: str
    negative: str
    user: str
    prefill: str = ""
    negative_user: str = ""
    negative_prefill: str = ""
    group: str = ""

    @property
    def topic(self) -> str:
        """The user message; of two whole texts the positive one."""
        return self.user or self.positive

    @property
    def sides(self) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
        """Persona, user message and prefill of the positive and of the negative side."""
        return (
            (self.positive, self.user, self.prefill),
            (self.negative, self.negative_user or self.user, self.negative_prefill or self.prefill),
        )


_fields_of = attrgetter(*(field.name for field in fields(Pair)))
_ALWAYS_HASHED = ("positive", "negative", "user", "prefill")
# Checksums stay those of earlier versions, which called a prefill an opener.
_HASHED_AS = {"prefill": "opener", "negative_prefill": "negative_opener"}


class PairTexts(NamedTuple):
    """Aligned texts of the two sides, in a model's chat template."""

    positive: list[str]
    negative: list[str]


@dataclass(frozen=True)
class ContrastPairs:
    """Contrast pairs of one behaviour, independent of any model.

    Attributes:
        name: the behaviour.
        pairs: the pairs.

    Raises:
        ValueError: if there is no pair, or a pair lacks a side.

    Example:
        >>> hello, bye = Pair("Be happy.", "Be sad.", "Hello!"), Pair("Be happy.", "Be sad.", "Bye!")
        >>> pairs = ContrastPairs("mood", (hello, bye))
        >>> len(pairs), pairs.topics
        (2, ['Hello!', 'Bye!'])
        >>> texts = pairs.texts(model)
        >>> "Be happy." in texts.positive[0], "Be sad." in texts.negative[0]
        (True, True)
    """

    name: str
    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError(
                f"pairs must hold at least one pair, got none for {self.name!r}. Give a positive and a negative side."
            )
        for number, pair in enumerate(self.pairs):
            where = f"index {number} of {self.name!r}"
            if any(not isinstance(text, str) for text in _fields_of(pair)):
                side, text = next((name, text) for name, text in asdict(pair).items() if not isinstance(text, str))
                raise ValueError(
                    f"pairs: {side} at {where} must be a string, got {text!r}. Leave out rows with empty cells, or "
                    "give '' where a field may be empty."
                )
            for side in ("user",) if pair.negative_user or pair.negative_prefill else ("positive", "negative"):
                if not getattr(pair, side).strip():
                    raise ValueError(f"pairs: {side} at {where} must be a string, got an empty one. Fill it in.")

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def topics(self) -> list[str]:
        """The user messages, each once, in order; none of pairs that are whole texts."""
        return list(dict.fromkeys(pair.user for pair in self.pairs if pair.user))

    @property
    def sha256(self) -> str:
        """Checksum of the pairs' content and order."""
        rows = [
            {
                _HASHED_AS.get(field, field): text
                for field, text in asdict(pair).items()
                if text or field in _ALWAYS_HASHED
            }
            for pair in self.pairs
        ]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    def texts(self, model: HasTokenizer) -> PairTexts:
        """The two sides in the model's chat template, special tokens included (tokenize without adding any).

        Pairs without a user message are whole texts, and stay as they are.
        """
        sides = zip(*(pair.sides for pair in self.pairs), strict=True)
        return PairTexts(
            *(
                [
                    chat_text(model, user, system=persona, prefill=prefill) if user else persona
                    for persona, user, prefill in side
                ]
                for side in sides
            )
        )

    def sample(self, n: int, seed: int = 0) -> ContrastPairs:
        """At most `n` pairs, drawn so that topics occur as evenly as possible; personas and prefills are random.

        Example:
            >>> sample = pairs.sample(155)
            >>> len(sample), len(sample.topics)
            (155, 155)
        """
        if n < 1:
            raise ValueError(f"n must be at least 1 pair, got {n}. Give a number of pairs.")
        shuffled = list(self.pairs)
        random.Random(seed).shuffle(shuffled)
        seen: dict[str, int] = {}
        ranked = []
        for index, pair in enumerate(shuffled):
            seen[pair.topic] = seen.get(pair.topic, 0) + 1
            ranked.append((seen[pair.topic], index))
        return ContrastPairs(self.name, tuple(shuffled[index] for _, index in sorted(ranked)[:n]))

    def split(self, *shares: float, seed: int = 0) -> Parts:
        """Splits into parts that share no topic (no group, if pairs have one), and if possible nothing else.

        If every topic occurs with every persona and every prefill, as in the table `[pairs]` of a TOML file, the split
        assigns topics, personas and prefills to parts separately. A part gets the pairs whose three all belong to it,
        and the other pairs are left out. If there are fewer personas or prefills than parts, all parts share them.

        Otherwise (rows of JSONL or CSV) no pair is left out. Pairs with a common topic stay together. So do pairs that
        share a persona, a prefill or the other side's message, as long as such groups allow parts near the shares (at
        most 5 % of the pairs further off than by topic alone). A value that would tie nearly all pairs together, such
        as a persona that all of them have, does not: the parts share it.

        Args:
            shares: fraction of the topics in each part but the last, which gets the rest: `split(0.7)` gives two parts.
                For rows: fraction of the pairs, as nearly as whole groups allow.
            seed: seed for the shuffle.

        Returns:
            `len(shares) + 1` parts, with `left_out`, the number of pairs that are in none.

        Raises:
            ValueError: if the topics are too few to leave every part one.

        Warns:
            UserWarning: if pairs are left out and a part is small, or parts share one of several personas or prefills.

        Example:
            >>> train, validation, test = pairs.split(0.4, 0.2, seed=0)
            >>> len(train), len(validation), len(test)
            (6200, 744, 6200)
            >>> set(train.topics) & set(test.topics)
            set()
        """
        if not shares or min(shares) <= 0 or sum(shares) >= 1:
            raise ValueError(f"shares must be positive numbers with a sum below 1, got {shares}. Try split(0.7).")
        bounds = list(itertools.accumulate(shares))
        numbers, given_up = _crossed(self.pairs, bounds, seed) or _grouped(self.pairs, bounds, seed)
        parts = Parts(
            ContrastPairs(self.name, tuple(pair for pair, of in zip(self.pairs, numbers, strict=True) if of == part))
            for part in range(len(bounds) + 1)
        )
        parts.left_out = numbers.count(None)
        least = min(len(part) for part in parts)
        if parts.left_out and least < _FEW:
            warnings.warn(
                f"split: {parts.left_out} of the {len(self)} pairs of {self.name!r} are left out, and a part has only "
                f"{least}. The split separates topics, personas and prefills, so a pair whose topic falls to one part "
                "and whose persona falls to another fits in neither. Give more of them, or more equal shares.",
                stacklevel=2,
            )
        if given_up:
            warnings.warn(
                f"split: the parts of {self.name!r} have no topic in common, but they share {', '.join(given_up)}. "
                f"Separating these too would tie so many pairs together that no parts of {shares} exist. If the parts "
                "must not share one, give each of its values topics of its own.",
                stacklevel=2,
            )
        return parts


_FEW = 30  # a part with fewer pairs than these gives a warning if other pairs were left out
_SLACK = 0.05  # share of the pairs by which parts may be further off than by topic alone, to separate more


class Parts(tuple[ContrastPairs, ...]):
    """The parts of a split: a tuple of ContrastPairs.

    Attributes:
        left_out: number of pairs that are in no part.

    Example:
        >>> parts = load_pairs("mood").split(0.4, 0.2, seed=0)
        >>> train, validation, test = parts
        >>> parts.left_out
        83576
    """

    left_out: int = 0


def _crossed(pairs: Sequence[Pair], bounds: Sequence[float], seed: int) -> tuple[list[int | None], list[str]] | None:
    """For each pair the part where its topic, persona and prefill meet.

    None if a combination of them is missing, or there is nothing to cross.

    Raises:
        ValueError: if the topics are too few.
    """
    topics = [pair.group or pair.topic for pair in pairs]
    personas = [(pair.positive, pair.negative) for pair in pairs]
    # Prefills that differ between the sides are the answers themselves.
    prefills = ["" if pair.negative_prefill else pair.prefill for pair in pairs]
    n_topics = len(set(topics))
    if (
        len({*personas}) == len({*prefills}) == 1
        or any(pair.negative_user for pair in pairs)
        or not is_product([topics, personas, prefills])
        or (any(pair.group for pair in pairs) and len(set(connected(_topic_keys(pairs)))) < n_topics)  # of one message
    ):
        return None
    by_topic = cut(topics, bounds, seed)
    if by_topic is None:
        raise _too_few(bounds, n_topics)
    keys = [by_topic, *(parts for axis in (personas, prefills) if (parts := cut(axis, bounds, seed)) is not None)]
    return [falls[0] if len(set(falls)) == 1 else None for falls in zip(*keys, strict=True)], []


def _grouped(pairs: Sequence[Pair], bounds: Sequence[float], seed: int) -> tuple[list[int | None], list[str]]:
    """For each pair its part, and the fields that the parts share although these have more than one value.

    Raises:
        ValueError: if the topics are too few.
    """
    topics = _topic_keys(pairs)
    by_topic = share_out(connected(topics), bounds, seed)
    if by_topic is None:
        n_topics = len(set(connected(topics)))
        raise _too_few(bounds, n_topics)
    allowed = _deviation(by_topic, bounds) + _SLACK
    separable = {
        "positive personas": _keys(pair.positive for pair in pairs),
        "negative personas": _keys(pair.negative for pair in pairs),
        "prefills": _keys("" if pair.negative_prefill else pair.prefill for pair in pairs),
        "messages of the negative side": _keys((pair.user for pair in pairs), (pair.negative_user for pair in pairs)),
    }
    if len({pair.negative_user for pair in pairs} - {""}) < 2:
        del separable["messages of the negative side"]
    separable = {name: keys for name, keys in separable.items() if len(set(keys) - {()}) > 1}
    for n in range(len(separable), 0, -1):
        for separated in itertools.combinations(separable, n):
            parts = share_out(connected([*topics, *(separable[name] for name in separated)]), bounds, seed)
            if parts is not None and _deviation(parts, bounds) <= allowed:
                return list(parts), [name for name in separable if name not in separated]
    return list(by_topic), list(separable)


def _too_few(bounds: Sequence[float], n_topics: int) -> ValueError:
    shares = ", ".join(f"{high - low:.3g}" for low, high in itertools.pairwise([0.0, *bounds]))
    return ValueError(
        f"shares must leave every part a topic, got {shares} and the rest of {n_topics} topics. Give more topics, or "
        "more equal shares."
    )


def _topic_keys(pairs: Sequence[Pair]) -> list[list[tuple[str, ...]]]:
    return [_keys(pair.topic for pair in pairs), _keys(pair.group for pair in pairs)]


def _keys(*texts: Iterable[str]) -> list[tuple[str, ...]]:
    """For each pair the texts that another pair could share with it, without empty ones."""
    return [tuple(text for text in of_pair if text) for of_pair in zip(*texts, strict=True)]


def _deviation(parts: Sequence[int], bounds: Sequence[float]) -> float:
    """The largest difference between a part's size and its intended size, as a fraction of all items."""
    sizes = sizes_of(bounds, len(parts))
    return max(abs(parts.count(part) - size) for part, size in enumerate(sizes)) / len(parts)


def load_pairs(
    source: str | Path | Table, *, name: str | None = None, both_orders: bool = True, as_messages: bool = False
) -> ContrastPairs:
    """Contrast pairs of a built-in behaviour, of a file, or of a table in memory.

    A TOML file has a table `[pairs]` with the lists `positive` and `negative` (personas, aligned), `topics` (user
    messages) and optionally `prefills`; every combination becomes a pair. A line of JSONL, an item of a JSON list, a
    row of CSV (with commas, semicolons or tabs), of a pandas frame or of a `datasets.Dataset` is one pair, with the
    fields `positive`, `negative`, `user` and optionally `prefill` and `group`; `negative_user` and `negative_prefill`
    are for pairs whose sides differ in these too. Files are UTF-8.

    Formats of other tools are known by their columns (`rt_lens.data.formats`): model-written evaluations and CAA,
    preferences (`chosen`, `rejected`), steering-bench, TruthfulQA, and plain pairs of texts, `positive` and `negative`
    alone or a list of two texts each. `rt-lens look FILE` says what a file holds.

    Args:
        source: name of a built-in behaviour, path, or table.
        name: of the behaviour. Defaults to the file's; a table's is `pairs`.
        both_orders: gives a question with lettered options twice, with the options in both orders.
        as_messages: reads plain pairs of texts as user messages in the chat template, and not as they are.

    Raises:
        ValueError: an unknown behaviour or file type, a missing side, a misspelt field, or a file that cannot be read
            as such; the message names the line.

    Warns:
        UserWarning: for fields that are not used, for fields under an earlier version's name, and where most positive
            sides answer the same word.

    Example:
        >>> pairs = load_pairs("mood")
        >>> pairs.pairs[0].positive, pairs.pairs[0].negative
        ('You are a happy assistant.', 'You are a sad assistant.')
        >>> len(pairs) == 24 * 26 * 155  # personas, prefills, topics
        True
        >>> load_pairs([("It was great.", "It was awful.")], name="mood").texts(model)
        PairTexts(positive=['It was great.'], negative=['It was awful.'])
    """
    path = behaviour_file(source) if isinstance(source, str | Path) else None
    if path is not None and path.suffix.lower() == ".toml":
        return pairs_from_table(name or path.stem, behaviour_content(path).get("pairs", {}), source=str(path))
    if path is not None and path.suffix.lower() not in ROW_ENDINGS:
        raise ValueError(
            f"pairs must be a .toml, .jsonl, .json, .csv or .tsv file, got {path.name}. Rename or convert it."
        )
    rows, foreign = read_source(path or source, "pairs", both_orders=both_orders)
    unused = _unused(rows) if foreign is None else []
    pairs = [_pair(row) for row in rows] if foreign is None else [Pair(**{**_NO_SIDES, **row.cells}) for row in rows]
    if as_messages:
        pairs = [pair if pair.user else _as_message(pair) for pair in pairs]
    whole = ContrastPairs(name or (path.stem if path else "pairs"), tuple(pairs))
    if unused:
        warnings.warn(
            f"pairs: {path.name if path else 'the table'} has fields that are not used: {', '.join(unused)}. The "
            f"fields used are {', '.join(OWN['pairs'])}.",
            stacklevel=2,
        )
    return whole


_NO_SIDES = {"positive": "", "negative": "", "user": ""}


def _unused(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in refuse_misspelt(row, "pairs", OWN["pairs"])))


def _as_message(pair: Pair) -> Pair:
    """A pair of texts as two user messages."""
    return Pair("", "", user=pair.positive, negative_user=pair.negative, group=pair.group)


def _pair(row: Row) -> Pair:
    cells = {field.name: row.cells.get(field.name, "") for field in fields(Pair)}
    if type(cells["group"]) is int:  # JSON files may number their groups
        cells["group"] = str(cells["group"])
    sides_differ = cells["negative_user"] or cells["negative_prefill"]
    for side, text in cells.items():
        if not isinstance(text, str):
            raise ValueError(f"pairs: {row.where} must have a text as {side!r}, got {text!r}. Put it in quotes.")
        if not text.strip() and side in (("user",) if sides_differ else ("positive", "negative", "user")):
            raise ValueError(
                f"pairs: {row.where} must have the fields positive, negative and user, got no {side!r}. Add it."
            )
    return Pair(**cells)


def pairs_from_table(name: str, table: dict[str, Any], source: str = "the table") -> ContrastPairs:
    """Every combination of the personas, topics and prefills of a `[pairs]` table.

    Args:
        name: the behaviour.
        table: the lists `positive`, `negative`, `topics` and optionally `prefills`.
        source: the file, for messages.

    Raises:
        ValueError: if a list is missing or empty, or the two sides differ in length.

    Example:
        >>> table = {"positive": ["Be happy."], "negative": ["Be sad."], "topics": ["Hello!", "Bye!"]}
        >>> pairs_from_table("mood", table).pairs[1]
        Pair(positive='Be happy.', negative='Be sad.', user='Bye!', prefill='', ...)
    """
    table = current_names(table, source)
    for side in ("positive", "negative", "topics"):
        if not isinstance(table.get(side), list) or not table[side]:
            raise ValueError(
                f"pairs: {source} must have the lists positive, negative and topics, got no {side}. Add it."
            )
    if not isinstance(table.get("prefills", []), list):
        raise ValueError(
            f"pairs: prefills of {source} must be a list, got {table['prefills']!r}. Wrap a single prefill in a list."
        )
    positive, negative = table["positive"], table["negative"]
    if len(positive) != len(negative):
        raise ValueError(
            f"pairs: {source} must have as many positive as negative personas, got {len(positive)} and "
            f"{len(negative)}. Align the two lists."
        )
    combinations = itertools.product(
        table["topics"], zip(positive, negative, strict=True), table.get("prefills") or [""]
    )
    return ContrastPairs(name, tuple(Pair(p, n, user, prefill) for user, (p, n), prefill in combinations))
