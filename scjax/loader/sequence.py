"""The sequence of an epoch: which stretch of which block comes where, and in which lane.

Lanes own equal, contiguous slices of the corpus as stored, beginning at another place in each epoch. So every
batch takes as many rows from each V-th of the corpus, and where neighbours are alike (a data set after the
other, or cells that were appended later) its composition varies less than that of independent draws.
A lane goes through its slice in rounds: the slice is cut into as many strata as a window holds blocks, and
each round takes one random block of every stratum. A window is hence a sample of the lane's whole slice.

Where the size of a window is a multiple of the block, windows and blocks coincide: the first block of a
lane is cut where its first window ends, the rest of it and the stretches that are shorter than a block
come last. So a block is read as a whole, and chunks that straddle two blocks are all that is read twice.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Pieces of blocks in the order of an epoch.

    Attributes:
      block: int64[n], which block each piece is of.
      offset: int64[n], at which row (or draw, in a weighted epoch) of the block it begins.
      begins: int64[n + 1], positions in the epoch at which the pieces begin, and its end.
    """

    block: np.ndarray
    offset: np.ndarray
    begins: np.ndarray

    def between(self, low: int, high: int) -> list[tuple[int, int, int]]:
        """(block, first, number) of the rows or draws at positions [low, high)."""
        out = []
        at = int(np.searchsorted(self.begins, low, side="right")) - 1
        while low < high:
            upto = min(high, int(self.begins[at + 1]))
            out.append((int(self.block[at]), int(self.offset[at]) + low - int(self.begins[at]), upto - low))
            low, at = upto, at + 1
        return out


def blocks_of(parts: tuple[tuple[int, int], ...], block: int) -> tuple[np.ndarray, np.ndarray]:
    """First global row and number of rows of every block: int64[n] each. A block never spans two parts."""
    firsts, sizes = [], []
    for first, n in parts:
        starts = np.arange(0, n, block)
        firsts.append(first + starts)
        sizes.append(np.minimum(block, n - starts))
    return np.concatenate(firsts), np.concatenate(sizes)


def stored(sizes: np.ndarray) -> Sequence:
    """All blocks as they are stored; blocks of 0 do not occur."""
    there = np.flatnonzero(sizes)
    return Sequence(there, np.zeros_like(there), np.concatenate([[0], np.cumsum(sizes[there])]))


def shuffled(
    sizes: np.ndarray,
    lane_starts: np.ndarray,
    bits: np.ndarray,
    *,
    window: int,
    whole: int | None,
    heads: np.ndarray,
) -> Sequence:
    """The sequence of one epoch.

    Args:
      sizes: int64[M], rows (or draws) of each block; blocks of 0 do not occur.
      lane_starts: int64[V + 1], positions at which lanes begin, and the end of the epoch.
      bits: uint64[M + V + 1], random.
      window: positions that a lane holds at a time.
      whole: size of a block that is not cut; None where sizes differ anyway.
      heads: int64[V], how much of its first whole block a lane has room for before its second window.
    """
    end = int(lane_starts[-1])
    turn = int(bits[-1] % np.uint64(end))  # where in the corpus lane 0 begins
    edges = np.concatenate([[0], np.cumsum(sizes)])
    starts = np.sort(np.concatenate([edges[:-1][sizes > 0], (turn + lane_starts[:-1]) % end]))
    starts = starts[np.flatnonzero(np.diff(starts, prepend=-1))]
    n = np.diff(np.append(starts, end))
    block = np.searchsorted(edges, starts, side="right") - 1
    offset = starts - edges[block]
    place = (starts - turn) % end
    order = np.roll(np.arange(len(starts)), -int(np.searchsorted(starts, turn)))
    place, n, block, offset = place[order], n[order], block[order], offset[order]

    lane = np.searchsorted(lane_starts, place, side="right") - 1
    short = np.zeros(len(n), bool) if whole is None else n != whole
    # one sort each, of keys that hold all there is to sort by: there are a million and more blocks
    group = 2 * lane + short
    members = np.bincount(group, minlength=2 * len(lane_starts))
    mean = end / len(n) if whole is None else whole
    strata = np.clip(members, 1, max(1, round(window / mean)))
    stratum = _rank(group, np.argsort(group, kind="stable")) * strata[group] // members[group]
    group = group * int(strata.max()) + stratum
    spare = 63 - int(group.max()).bit_length()
    random = (group.astype(np.uint64) << np.uint64(spare)) | (bits[: len(n)] >> np.uint64(64 - spare))
    turns = _rank(group, np.argsort(random, kind="stable"))
    order = np.argsort(((2 * lane + short) * (int(turns.max()) + 1) + turns) * int(strata.max()) + stratum)
    lane, n, block, offset, short = (x[order] for x in (lane, n, block, offset, short))

    # the first block of a lane is cut, where it is a whole one, and its rest comes last
    first = np.flatnonzero(np.diff(lane, prepend=-1))
    last = np.append(first[1:], len(lane))
    cut = (~short[first]) & (heads[lane[first]] > 0) & (heads[lane[first]] < n[first])
    first, last = first[cut], last[cut]
    head = heads[lane[first]]
    rest = n[first] - head
    n[first] = head
    block, offset = (
        np.insert(block, last, block[first]),
        np.insert(offset, last, offset[first] + head),
    )
    n = np.insert(n, last, rest)
    return Sequence(block, offset, np.concatenate([[0], np.cumsum(n)]))


def _rank(group: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How many of the same group come before each element, in an order that keeps groups together."""
    held = group[order]
    first = np.flatnonzero(np.diff(held, prepend=-1))
    sizes = np.diff(np.append(first, len(held)))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(first, sizes)
    return rank
