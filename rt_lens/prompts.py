"""Contrast pairs: the same content asked of two opposite personas. They know no model until `texts` is called."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import random
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from rt_lens.shipped import behaviour_file
from rt_lens.tokens import chat_text


@dataclass(frozen=True, slots=True)
class Pair:
    """One user message and one answer's opening, under two opposite personas; or one that differs between the sides.

    Attributes:
        positive: persona that asks for the behaviour (system prompt).
        negative: persona that asks for its opposite.
        user: what the user says; also the pair's topic.
        opener: first words of the answer; may be empty.
        negative_user: what the user says on the negative side, where that is something else.
        negative_opener: first words of the negative side's answer, where they are others. Then personas may be empty.
        group: pairs of one group stay together in a split; the user message where it is empty.
    """

    positive: str
    negative: str
    user: str
    opener: str = ""
    negative_user: str = ""
    negative_opener: str = ""
    group: str = ""

    @property
    def sides(self) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
        """Persona, user message and opener of the positive and of the negative side."""
        return (
            (self.positive, self.user, self.opener),
            (self.negative, self.negative_user or self.user, self.negative_opener or self.opener),
        )


class PairTexts(NamedTuple):
    """Aligned texts of the two sides, through a model's chat template."""

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
        >>> pairs = load_pairs("mood")
        >>> train, test = pairs.split(0.7, seed=0)
        >>> set(train.topics) & set(test.topics)
        set()
    """

    name: str
    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError(f"pairs: {self.name!r} has none. Give at least one positive and one negative side.")
        for number, pair in enumerate(self.pairs):
            for side in ("user",) if pair.negative_user or pair.negative_opener else ("positive", "negative", "user"):
                if not getattr(pair, side).strip():
                    raise ValueError(f"pairs: number {number} of {self.name!r} has an empty {side!r} side. Fill it in.")

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def topics(self) -> list[str]:
        """The user messages, each once, in order."""
        return list(dict.fromkeys(pair.user for pair in self.pairs))

    @property
    def sha256(self) -> str:
        """Checksum of the pairs' content and order."""
        always = ("positive", "negative", "user", "opener")
        kept = [{key: text for key, text in asdict(pair).items() if text or key in always} for pair in self.pairs]
        content = json.dumps(kept, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def texts(self, model: Any) -> PairTexts:
        """The two sides through the model's chat template, special tokens included (tokenize with none added)."""
        sides = zip(*(pair.sides for pair in self.pairs), strict=True)
        return PairTexts(
            *(
                [chat_text(model, user, system=persona, opener=opener) for persona, user, opener in side]
                for side in sides
            )
        )

    def sample(self, n: int, seed: int = 0) -> ContrastPairs:
        """At most `n` pairs, drawn so that topics appear as evenly as can be; personas and openers fall by chance."""
        if n < 1:
            raise ValueError(f"n: {n} came, a number of pairs of at least 1 is wanted.")
        shuffled = list(self.pairs)
        random.Random(seed).shuffle(shuffled)
        seen: dict[str, int] = {}
        ranked = []
        for place, pair in enumerate(shuffled):
            seen[pair.user] = seen.get(pair.user, 0) + 1
            ranked.append((seen[pair.user], place))
        return ContrastPairs(self.name, tuple(shuffled[place] for _, place in sorted(ranked)[:n]))

    def split(self, *shares: float, seed: int = 0) -> tuple[ContrastPairs, ...]:
        """Splits by topic, and by persona and opener where there are enough, so that the parts share nothing.

        Args:
            shares: share of the topics in each part but the last, which gets the rest: `split(0.7)` gives two parts.
            seed: of the shuffle.

        Returns:
            `len(shares) + 1` parts. Pairs that would straddle two parts are left out.

        Raises:
            ValueError: if the shares do not leave every part a topic and a pair.
        """
        if not shares or min(shares) <= 0 or sum(shares) >= 1:
            raise ValueError(f"shares: {shares} came; positive numbers with a sum below 1 are wanted, say 0.7.")
        bounds = list(itertools.accumulate(shares))
        keys = [
            _parts([pair.group or pair.user for pair in self.pairs], bounds, seed, needed=True),
            _parts([(pair.positive, pair.negative) for pair in self.pairs], bounds, seed),
            # Openers that differ between the sides are the answers themselves.
            _parts(["" if pair.negative_opener else pair.opener for pair in self.pairs], bounds, seed),
        ]
        chosen: list[list[Pair]] = [[] for _ in range(len(shares) + 1)]
        for number, pair in enumerate(self.pairs):
            parts = {part for key in keys if (part := key[number]) is not None}
            if len(parts) == 1:
                chosen[parts.pop()].append(pair)
        if not all(chosen):
            raise ValueError(
                f"shares: {shares} leave a part of {self.name!r} no pair of its own. Give more topics and personas."
            )
        return tuple(ContrastPairs(self.name, tuple(part)) for part in chosen)


def _parts(values: Sequence[Any], bounds: Sequence[float], seed: int, needed: bool = False) -> list[int | None]:
    """For each value the part it falls in, or None for all where there are too few values to share out."""
    distinct = list(dict.fromkeys(values))
    random.Random(f"{seed}-{len(distinct)}").shuffle(distinct)
    cuts = [round(bound * len(distinct)) for bound in bounds]
    edges = [0, *cuts, len(distinct)]
    if any(low >= high for low, high in itertools.pairwise(edges)):
        if needed:
            raise ValueError(f"shares: {len(distinct)} topics cannot be split at {tuple(bounds)}. Give more topics.")
        return [None] * len(values)
    part_of = {value: sum(place >= cut for cut in cuts) for place, value in enumerate(distinct)}
    return [part_of[value] for value in values]


def load_pairs(name_or_path: str | Path) -> ContrastPairs:
    """Contrast pairs of a shipped behaviour, or of a TOML, JSONL or CSV file of your own.

    A TOML file has a table `[pairs]` with lists `positive` and `negative` (personas, aligned), `topics` (user
    messages) and, if wanted, `openers`; every combination becomes a pair. Lines of JSONL and rows of CSV have the
    fields `positive`, `negative`, `user` and, if wanted, `opener`, and each is one pair; `negative_user` and
    `negative_opener` are for pairs whose sides differ in what is said.

    Raises:
        ValueError: unknown behaviour or file type, or a side that is missing; the message says where.
    """
    path = behaviour_file(name_or_path)
    if path.suffix == ".toml":
        return pairs_from_table(path.stem, read_toml(path).get("pairs", {}), source=str(path))
    if path.suffix == ".jsonl":
        lines = enumerate(path.read_text().splitlines(), start=1)
        rows = [(number, _parsed(line)) for number, line in lines if line.strip()]
    elif path.suffix == ".csv":
        with path.open(newline="") as stream:
            reader = csv.DictReader(stream)
            rows = [(reader.line_num, row) for row in reader]
    else:
        raise ValueError(f"pairs: {path.name} has an unknown ending. Give a .toml, .jsonl or .csv file.")
    return ContrastPairs(path.stem, tuple(_pair(row, f"{path.name}, line {number}") for number, row in rows))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dictionary; a syntax error names the file and the line."""
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config: {path} is not valid TOML: {error}.") from None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _pair(row: Any, where: str) -> Pair:
    if not isinstance(row, dict):
        raise ValueError(f"pairs: {where} is no JSON object. Each needs positive, negative and user.")
    apart = row.get("negative_user") or row.get("negative_opener")
    for side in ("user",) if apart else ("positive", "negative", "user"):
        if not isinstance(row.get(side), str) or not row[side].strip():
            raise ValueError(f"pairs: {where} lacks the side {side!r}. Each needs positive, negative and user.")
    return Pair(**{field.name: row.get(field.name) or "" for field in fields(Pair)})


def pairs_from_table(name: str, table: dict[str, Any], source: str = "the table") -> ContrastPairs:
    """Every combination of the personas, topics and openers of a `[pairs]` table.

    Raises:
        ValueError: if a list is missing or empty, or the two sides are of unlike length.
    """
    for side in ("positive", "negative", "topics"):
        if not isinstance(table.get(side), list) or not table[side]:
            raise ValueError(f"pairs: {source} lacks a list pairs.{side}. Both sides and the topics are needed.")
    if not isinstance(table.get("openers", []), list):
        raise ValueError(f"pairs: {source} has pairs.openers that are no list. Put the one opener in brackets.")
    positive, negative = table["positive"], table["negative"]
    if len(positive) != len(negative):
        raise ValueError(f"pairs: {len(positive)} positive and {len(negative)} negative personas came. Align them.")
    combinations = itertools.product(
        table["topics"], zip(positive, negative, strict=True), table.get("openers") or [""]
    )
    return ContrastPairs(name, tuple(Pair(p, n, user, opener) for user, (p, n), opener in combinations))
