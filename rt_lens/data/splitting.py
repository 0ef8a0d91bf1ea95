"""Sharing items out to parts that have nothing in common. This room sees keys and shares, and knows no pairs."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Hashable, Sequence


def is_product(axes: Sequence[Sequence[Hashable]]) -> bool:
    """Whether every combination of the axes' values is there; each axis has a value for each item."""
    combinations = 1
    for axis in axes:
        combinations *= len(set(axis))
    return len(set(zip(*axes, strict=True))) == combinations


def cut(values: Sequence[Hashable], bounds: Sequence[float], seed: int) -> list[int] | None:
    """For each value the part it falls in, or None where there are too few values for a part each.

    Args:
        values: equal ones fall in one part.
        bounds: where each part but the last ends, as a share of the different values.
        seed: of the shuffle.
    """
    distinct = list(dict.fromkeys(values))
    random.Random(f"{seed}-{len(distinct)}").shuffle(distinct)
    cuts = [round(bound * len(distinct)) for bound in bounds]
    edges = [0, *cuts, len(distinct)]
    if any(low >= high for low, high in itertools.pairwise(edges)):
        return None
    part_of = {value: sum(place >= cut for cut in cuts) for place, value in enumerate(distinct)}
    return [part_of[value] for value in values]


def connected(axes: Sequence[Sequence[Sequence[Hashable]]]) -> list[int]:
    """For each item the number of its group: items with a key in common, on whatever axis, are in one.

    Args:
        axes: for each item its keys, none where it has nothing that another could share.
    """
    parent = list(range(len(axes[0])))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = item = parent[parent[item]]
        return item

    for axis in axes:
        first: dict[Hashable, int] = {}
        for item, keys in enumerate(axis):
            for key in keys:
                one, other = sorted((root(item), root(first.setdefault(key, item))))
                parent[other] = one
    return [root(item) for item in range(len(parent))]


def share_out(groups: Sequence[int], bounds: Sequence[float], seed: int) -> list[int] | None:
    """For each item a part, so that groups stay whole and the parts' sizes come near the shares of all items.

    The largest groups go first, each to the part that lacks most; then groups are moved and exchanged as long as that
    brings the sizes nearer. Which groups of one size go where is drawn.

    Args:
        groups: the group of each item.
        bounds: where each part but the last ends, as a share of the items.
        seed: of the draw.

    Returns:
        None where there are fewer groups than parts: none may be empty.
    """
    sizes = Counter(groups)
    wanted = sizes_of(bounds, len(groups))
    if len(sizes) < len(wanted):
        return None
    held: list[Counter[int]] = [Counter() for _ in wanted]  # of each part: size -> how many groups
    for left, size in zip(range(len(sizes), 0, -1), sorted(sizes.values(), reverse=True), strict=True):
        empty = [part for part, mine in enumerate(held) if not mine]
        open_to = empty if left <= len(empty) else range(len(wanted))
        held[max(open_to, key=lambda part: wanted[part] - _total(held[part]))][size] += 1
    while _exchange(held, wanted):
        pass
    shuffled = list(sizes)
    random.Random(f"{seed}-{len(sizes)}").shuffle(shuffled)
    parts = {
        size: iter([part for part, mine in enumerate(held) for _ in range(mine[size])]) for size in set(sizes.values())
    }
    part_of = {group: next(parts[sizes[group]]) for group in shuffled}
    return [part_of[group] for group in groups]


def sizes_of(bounds: Sequence[float], n: int) -> list[int]:
    """How many of n items each part should have."""
    edges = [0, *(round(bound * n) for bound in bounds), n]
    return [high - low for low, high in itertools.pairwise(edges)]


def _total(held: Counter[int]) -> int:
    return sum(size * count for size, count in held.items())


def _exchange(held: list[Counter[int]], wanted: Sequence[int]) -> bool:
    """Moves one group, or exchanges two, where that brings two parts nearer to what is wanted; whether it did."""
    over = [_total(mine) - size for mine, size in zip(held, wanted, strict=True)]
    best = (0, 0, 0, 0, 0)
    for a, b in itertools.permutations(range(len(held)), 2):
        for size, other in itertools.product(held[a], [0, *held[b]]):
            moved = size - other  # nearer by (over[a]^2 + over[b]^2) - (over[a] - moved)^2 - (over[b] + moved)^2
            gain = 2 * moved * (over[a] - over[b] - moved)
            if (other or held[a].total() > 1) and gain > best[0]:
                best = (gain, a, b, size, other)
    gain, a, b, size, other = best
    for part, goes, comes in ((a, size, other), (b, other, size)) if gain else ():
        held[part].update({comes: 1} if comes else {})
        held[part].subtract({goes: 1} if goes else {})
        held[part] += Counter()  # drops sizes of which none is left
    return bool(gain)
