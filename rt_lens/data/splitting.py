"""Assigning items to parts that have nothing in common. This module sees keys and shares, and knows no pairs."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Hashable, Sequence


def is_product(axes: Sequence[Sequence[Hashable]]) -> bool:
    """Whether every combination of the axes' values occurs; each axis has a value for each item."""
    combinations = 1
    for axis in axes:
        combinations *= len(set(axis))
    return len(set(zip(*axes, strict=True))) == combinations


def cut(values: Sequence[Hashable], bounds: Sequence[float], seed: int) -> list[int] | None:
    """The part of each value, or None if there are fewer different values than parts.

    Args:
        values: equal values belong to one part.
        bounds: where each part but the last ends, as a fraction of the different values.
        seed: seed for the shuffle.
    """
    distinct = list(dict.fromkeys(values))
    random.Random(f"{seed}-{len(distinct)}").shuffle(distinct)
    cuts = [round(bound * len(distinct)) for bound in bounds]
    edges = [0, *cuts, len(distinct)]
    if any(low >= high for low, high in itertools.pairwise(edges)):
        return None
    part_of = {value: sum(index >= cut for cut in cuts) for index, value in enumerate(distinct)}
    return [part_of[value] for value in values]


def connected(axes: Sequence[Sequence[Sequence[Hashable]]]) -> list[int]:
    """The group of each item: items that share a key on any axis belong to one group.

    Args:
        axes: for each axis, the keys of each item; empty if the item has nothing that another could share.
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
    """The part of each item, so that groups stay whole and the parts' sizes are near their shares of all items.

    The largest groups are assigned first, each to the part that lacks most items. Then groups are moved and exchanged
    as long as this brings the sizes nearer. Among groups of one size the assignment is random.

    Args:
        groups: the group of each item.
        bounds: where each part but the last ends, as a fraction of the items.
        seed: seed for the random assignment.

    Returns:
        None if there are fewer groups than parts, since no part may be empty.
    """
    sizes = Counter(groups)
    targets = sizes_of(bounds, len(groups))
    if len(sizes) < len(targets):
        return None
    held: list[Counter[int]] = [Counter() for _ in targets]  # for each part: size of a group -> number of groups
    for left, size in zip(range(len(sizes), 0, -1), sorted(sizes.values(), reverse=True), strict=True):
        empty = [part for part, groups_held in enumerate(held) if not groups_held]
        open_to = empty if left <= len(empty) else range(len(targets))
        held[max(open_to, key=lambda part: targets[part] - _total(held[part]))][size] += 1
    while _exchange(held, targets):
        pass
    shuffled = list(sizes)
    random.Random(f"{seed}-{len(sizes)}").shuffle(shuffled)
    parts = {
        size: iter([part for part, groups_held in enumerate(held) for _ in range(groups_held[size])])
        for size in set(sizes.values())
    }
    part_of = {group: next(parts[sizes[group]]) for group in shuffled}
    return [part_of[group] for group in groups]


def sizes_of(bounds: Sequence[float], n: int) -> list[int]:
    """The intended number of items of each part, of n items in all."""
    edges = [0, *(round(bound * n) for bound in bounds), n]
    return [high - low for low, high in itertools.pairwise(edges)]


def _total(held: Counter[int]) -> int:
    return sum(size * count for size, count in held.items())


def _exchange(held: list[Counter[int]], targets: Sequence[int]) -> bool:
    """Moves one group, or exchanges two, if that brings two parts nearer to their targets; returns whether it did."""
    over = [_total(groups_held) - target for groups_held, target in zip(held, targets, strict=True)]
    best = (0, 0, 0, 0, 0)
    for a, b in itertools.permutations(range(len(held)), 2):
        for size, other in itertools.product(held[a], [0, *held[b]]):
            moved = size - other  # gain: (over[a]^2 + over[b]^2) - (over[a] - moved)^2 - (over[b] + moved)^2
            gain = 2 * moved * (over[a] - over[b] - moved)
            if (other or held[a].total() > 1) and gain > best[0]:
                best = (gain, a, b, size, other)
    gain, a, b, size, other = best
    for part, removed, added in ((a, size, other), (b, other, size)) if gain else ():
        held[part].update({added: 1} if added else {})
        held[part].subtract({removed: 1} if removed else {})
        held[part] += Counter()  # drops sizes with a count of 0
    return bool(gain)
