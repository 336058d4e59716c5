"""Cutting parts of a split, such as `train[:90%]`, if the source has a name for each example.

An `examples.Cut` chooses the examples of a part from all those of its split. `ByHash` is used for
new runs, `Recorded` repeats the choice that a run has recorded, and `at_random` repeats the choice
of old runs that did not record it.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vvt_jax.data.examples import DataError

_SPLIT = re.compile(r"(\w+)(?:\[(?:(\d+)(%?))?:(?:(\d+)(%?))?\])?")
_ORDER_SEED = 0  # of the random order from which `at_random` cuts
_FORMERLY = (".jpg", ".jpeg", ".png", ".webp")


class _Bound(NamedTuple):
    """The position at which a part begins or ends: a number or a percentage of examples."""

    number: int
    percent: bool


_START, _END = _Bound(0, True), _Bound(100, True)


def split_name(split: str) -> str:
    """Return the name of a split without the bounds of a part, such as `train` or `validation`.

    Raises:
        DataError: if the notation is invalid.
    """
    return _parse(split)[0]


class ByHash:
    """A cut of each class separately, in the order of a hash of its examples' names.

    Each class is divided by the percentages, so every part contains every class that has at least
    one example for each part. Adding a name does not change the order of the others, so a new
    example moves at most one other example across a boundary between two parts. (A boundary given
    as a number of examples is exactly at that number, whatever the sizes of the classes. A new
    example can then also move an example of another class across it.)

    Args:
        parts: the splits of a run, as written in its config. A class with few examples is divided
            fairly among more than two parts only if all of them are known.
    """

    def __init__(self, parts: Iterable[str] = ()):
        self._parts = tuple(parts)

    def __call__(self, split: str, names: Sequence[str], classes: Sequence[int]) -> np.ndarray:
        name, start, stop = _parse(split)
        if (start, stop) == (_START, _END):
            return np.arange(len(names))
        cuts = {bound for part in self._parts for bound in _bounds_of(part, name)}
        percents = sorted(
            b.number for b in {*cuts, start, stop} if b.percent and 0 < b.number < 100
        )
        labels = np.asarray(classes, np.int64)
        # Sort by class and, within a class, by hash.
        hashes = np.array([_hash(each) for each in names], np.uint64)
        order = np.lexsort((hashes, labels))
        kinds, firsts, counts = np.unique(labels[order], return_index=True, return_counts=True)
        ranks = np.arange(len(order)) - np.repeat(firsts, counts)

        def ends(bound: _Bound) -> np.ndarray:
            """Return how many examples of each class lie before the boundary."""
            if not bound.percent:
                # Spread each class evenly over a common order, and take the first examples of it.
                places = (ranks + 0.5) / np.repeat(counts, counts)
                first = np.lexsort((hashes[order], places))[: bound.number]
                taken = np.bincount(np.repeat(np.arange(len(kinds)), counts)[first])
                return np.pad(taken, (0, len(kinds) - len(taken)))
            if bound.number in percents:
                which = percents.index(bound.number)
                return np.array([_quotas(int(count), percents)[which] for count in counts])
            return np.zeros_like(counts) if bound.number == 0 else counts

        before, after = (np.repeat(ends(bound), counts) for bound in (start, stop))
        return np.sort(order[(before <= ranks) & (ranks < after)])


class Recorded:
    """A cut that chooses the examples that a run has recorded, whatever has been added since.

    Args:
        names: the names of the part's examples, in the order of the run.
        fill: whether to replace an example that no longer exists by the next one in the list, which
            keeps the length of the list and the positions of all other examples, instead of leaving
            it out.

    Attributes:
        names: the names of the part's examples, in the order of the run.
        missing: the names that no longer exist, once the part has been cut.
        listed: all the names that the split has now, once the part has been cut.
    """

    def __init__(self, names: Sequence[str], *, fill: bool):
        self.names, self._fill = names, fill
        self.missing: list[str] = []
        self.listed: Sequence[str] = ()

    def __call__(self, split: str, names: Sequence[str], classes: Sequence[int]) -> np.ndarray:
        del classes
        places = {name: place for place, name in enumerate(names)}
        found = np.array([places.get(name, -1) for name in self.names], np.int64)
        there = np.flatnonzero(found >= 0)
        self.listed = names
        self.missing = [self.names[i] for i in np.flatnonzero(found < 0).tolist()]
        if not len(there):
            raise DataError(
                f"None of the {len(self.names)} examples that the run recorded for {split!r} is "
                "there any more: put the files back, or use another workdir."
            )
        if not self._fill:
            return found[there]
        following = np.searchsorted(there, np.arange(len(found))) % len(there)
        return found[there[following]]


def at_random(split: str, names: Sequence[str], classes: Sequence[int]) -> np.ndarray:
    """Cut a part as runs did that did not record their examples, from a fixed random order.

    That order changes completely with the number of examples. Those runs listed only the files
    directly in the folder of a class, in four formats. Anything else that is listed today is left
    out, because it would change their order.
    """
    depths = np.array([name.count("/") for name in names])
    formats = np.array([name.lower().endswith(_FORMERLY) for name in names])
    kept = np.flatnonzero(formats & (depths == depths[formats].min(initial=depths.max(initial=0))))
    kept = kept[np.lexsort((np.array(names)[kept], np.asarray(classes)[kept]))]
    _, start, stop = _parse(split)
    if (start, stop) == (_START, _END):
        return kept

    def position(bound: _Bound) -> int:
        share = round(bound.number / 100 * len(kept)) if bound.percent else bound.number
        return min(len(kept), share)

    order = np.random.default_rng(_ORDER_SEED).permutation(len(kept))
    return kept[np.sort(order[position(start) : position(stop)])]


def _parse(split: str) -> tuple[str, _Bound, _Bound]:
    if not (found := _SPLIT.fullmatch(split)):
        raise DataError(f"{split!r} is no split: write train, train[:90%] or train[100:].")
    name, first, first_percent, last, last_percent = found.groups()
    start = _START if first is None else _Bound(int(first), bool(first_percent))
    stop = _END if last is None else _Bound(int(last), bool(last_percent))
    return "validation" if name == "val" else name, start, stop


def _bounds_of(part: str, name: str) -> tuple[_Bound, ...]:
    """Return the two boundaries of a part if it belongs to the split `name`, or else nothing."""
    other, *bounds = _parse(part)
    return tuple(bounds) if other == name else ()


def _quotas(count: int, percents: Sequence[int]) -> list[int]:
    """Return how many of `count` examples lie before each percentage, in ascending order.

    Every part between two boundaries gets at least one example if there are enough; otherwise, the
    largest parts get one each. One more example raises each number by 0 or 1, and so moves at most
    one other example across a boundary.
    """
    parts = len(percents) + 1
    if count <= len(percents):
        edges = [0, *percents, 100]
        largest = sorted(range(parts), key=lambda i: edges[i] - edges[i + 1])[:count]
        return [sum(part < i for part in largest) for i in range(1, parts)]
    quotas: list[int] = []
    for i, percent in enumerate(percents, start=1):
        rounded = (2 * percent * count + 100) // 200  # round half up, so that no part vanishes
        least = (quotas[-1] if quotas else 0) + 1
        quotas.append(min(count - (parts - i), max(rounded, least)))
    return quotas


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big")
