"""The place of every cell, a pure function of (seed, data set, row): nothing per cell is kept in a plan.

A cell has a key; its part is where that key falls between the cuts of its split. The cuts are keys
themselves, chosen so that parts are of equal size, in two passes over all keys that hold only those near a
cut.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

_STEP = 2**20  # cells looked at in one go
_BINS = 2**16


def hashed(seed: int, purpose: str, name: str, first: int, last: int) -> np.ndarray:
    """uint64 [last - first], a hash of (seed, purpose, data set, row): splitmix64 from where sha256 says."""
    start = hashlib.sha256(f"{seed}|{purpose}|{name}".encode()).digest()[:8]
    row = np.arange(first + 1, last + 1, dtype=np.uint64)
    z = np.frombuffer(start, "<u8") + row * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the cells of all data sets go.

    Attributes:
      seed: of the keys and of the split.
      names, sizes: of the data sets.
      shuffled: False gives the cells keys in the order of the data sets and rows.
      held_below: cells whose hash is below are in the validation split; None where groups decide.
      cuts: of the splits train and validation: uint64, the key at which each part but the first begins.
      splits: of every part, those of train first.
    """

    seed: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    shuffled: bool
    held_below: int | None = 0
    cuts: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.uint64), np.zeros(0, np.uint64))
    splits: tuple[str, ...] = ()

    def keys(self, number: int, first: int, last: int) -> np.ndarray:
        """uint64, the order of rows [first, last) of data set ``number`` within their split."""
        if self.shuffled:
            return hashed(self.seed, "order", self.names[number], first, last)
        before, total = sum(self.sizes[:number]), sum(self.sizes)
        position = np.arange(before + first, before + last, dtype=np.uint64)
        return position << np.uint64(64 - max(1, total.bit_length()))

    def held(self, number: int, first: int, last: int, groups: np.ndarray | None) -> np.ndarray:
        """bool, whether rows [first, last) are in the validation split.

        Args:
          groups: packed bits of the whole data set, where groups decide.
        """
        if groups is not None:
            bits = np.unpackbits(groups[first // 8 : -(-last // 8)], bitorder="little")
            return bits[first % 8 : first % 8 + last - first].astype(bool)
        if not self.held_below:
            return np.zeros(last - first, bool)
        return hashed(self.seed, "split", self.names[number], first, last) < np.uint64(self.held_below)

    def parts(self, keys: np.ndarray, held: np.ndarray) -> np.ndarray:
        """int32, the part of cells: its position in ``splits``."""
        n_train = self.splits.count("train")
        train, validation = (np.searchsorted(cuts, keys, side="right") for cuts in self.cuts)
        return np.where(held, validation + n_train, train).astype(np.int32)


def find_places(
    names: Sequence[str],
    sizes: Sequence[int],
    *,
    seed: int,
    shuffled: bool,
    validation: float,
    groups: Sequence[np.ndarray] | None,
    part_cells: int,
) -> Places:
    """Cuts all cells into parts of at most ``part_cells`` of one split, as equal as can be.

    Args:
      validation: fraction of the cells in the validation split.
      groups: per data set, packed bits of the cells in the validation split, where groups decide.
    """
    places = Places(seed, tuple(names), tuple(sizes), shuffled)
    total = sum(sizes)
    if groups is not None:
        places = dataclasses.replace(places, held_below=None)
    elif validation:
        n_held = max(1, round(validation * total))

        def lots() -> Iterator[np.ndarray]:
            for number, first, last in _stretches(sizes):
                yield hashed(seed, "split", names[number], first, last)

        below = _at_ranks(lots, [n_held])[0] if n_held < total else 2**64 - 1
        places = dataclasses.replace(places, held_below=below)

    def keys(of_validation: bool) -> Callable[[], Iterator[np.ndarray]]:
        def pieces() -> Iterator[np.ndarray]:
            for number, first, last in _stretches(sizes):
                held = places.held(number, first, last, None if groups is None else groups[number])
                yield places.keys(number, first, last)[held == of_validation]

        return pieces

    cuts, splits = [], []
    for split, of_validation in (("train", False), ("validation", True)):
        n = sum(len(piece) for piece in keys(of_validation)())
        n_parts = -(-n // part_cells)
        ranks = [-(-part * n // n_parts) for part in range(1, n_parts)]
        cuts.append(np.array(_at_ranks(keys(of_validation), ranks), np.uint64))
        splits += [split] * n_parts
    return dataclasses.replace(places, cuts=(cuts[0], cuts[1]), splits=tuple(splits))


def _stretches(sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    for number, size in enumerate(sizes):
        for first in range(0, size, _STEP):
            yield number, first, min(first + _STEP, size)


def _at_ranks(pieces: Callable[[], Iterator[np.ndarray]], ranks: Sequence[int]) -> list[int]:
    """The values that would be at these (rising) positions if all pieces were sorted together."""
    if not ranks:
        return []
    shift = np.uint64(64 - _BINS.bit_length() + 1)
    counts = np.zeros(_BINS, np.int64)
    for piece in pieces():
        counts += np.bincount((piece >> shift).astype(np.int64), minlength=_BINS)
    ends = np.cumsum(counts)
    bins = np.searchsorted(ends, ranks, side="right")
    wanted = np.zeros(_BINS, bool)
    wanted[bins] = True
    held = [piece[wanted[(piece >> shift).astype(np.int64)]] for piece in pieces()]
    near = np.sort(np.concatenate(held))
    bin_of = (near >> shift).astype(np.int64)
    found = []
    for rank, bin_ in zip(ranks, bins, strict=True):
        before = int(ends[bin_] - counts[bin_])
        found.append(int(near[np.searchsorted(bin_of, bin_) + rank - before]))
    return found
