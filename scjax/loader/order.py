"""Which cell goes where: the order of an epoch as pure arithmetic on row numbers.

An epoch is a sequence of all N rows of a split, made by permuting blocks of neighbouring rows (one
block is one read). V virtual lanes own equal slices of that sequence. Every step takes r = B / V rows
from each lane, and a lane hands its rows out window by window, shuffled inside each window:

    sequence   |---- lane 0 ----|---- lane 1 ----|---- lane 2 ----| ...        N rows
    lane       |win|-- window --|-- window --|wi|                            W rows each, the first cut short
    batch t    r rows of lane 0, r rows of lane 1, ...                         B rows

Because a lane does not know who reads it, a batch is the same on any number of hosts; because a window is
a function of (seed, epoch, lane, window) alone, any step can be reached without visiting those before it.
Windows begin at a different step in each lane, so that the reading they cause is spread evenly.

Nothing here reads a file. The number of expressed genes per row, which grouping by length needs, is handed
in by the caller.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Lengths = Callable[[np.ndarray], np.ndarray]  # global row numbers -> expressed genes of each

MAX_LANES = 256


def random_bits(*key: Any, n: int) -> np.ndarray:
    """``uint64[n]`` that depend on the key (numbers and strings) and nothing else.

    The key is hashed as a whole, so that (seed 0, epoch 1) and (seed 1, epoch 0) are unrelated. Philox's
    raw words are used rather than numpy's ``Generator`` because only they are promised to stay the same in
    later versions of numpy, and an order must survive an upgrade.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(n)


def permutation(*key: Any, n: int) -> np.ndarray:
    """A random permutation of 0..n-1 (int64) that depends on the key and nothing else."""
    return np.argsort(random_bits(*key, n=n), kind="stable")


def default_lanes(batch_size: int) -> int:
    """The largest power of two that divides the batch, at most 256."""
    return min(MAX_LANES, batch_size & -batch_size)


def default_block(n_rows: int, lanes: int, chunk_rows: float) -> int:
    """1024 rows, less where a lane would otherwise hold fewer than four blocks; but a few times what is
    decompressed at a time (``chunk_rows``), as the rest of a chunk is decompressed for nothing."""
    block = 1024
    while block > max(16, 4 * chunk_rows) and block * 4 * lanes > n_rows:
        block //= 2
    return block


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """The order in which the rows of a split are visited.

    Attributes:
      parts: (first global row, number of rows) of each part, in the order of the manifest.
      batch_size: B, rows of a global batch.
      lanes: V; divides B.
      window: rows of a lane that are shuffled together; rounded up to a whole number of steps and cut to
        the length of a lane.
      block: neighbouring rows that are read together.
      seed: any integer.
      salt: names what is being ordered (a manifest id), so that two corpora share no order.
      shuffle: False keeps blocks, and rows inside a window, as they are stored; with ``lanes=1`` batches
        then come in plain row order.
      group_lengths: sort each window by length and hand it out in groups of similar length. All lanes
        visit long and short groups at the same steps, in a random order.
    """

    parts: tuple[tuple[int, int], ...]
    batch_size: int
    lanes: int
    window: int = 1024
    block: int = 1024
    seed: int = 0
    salt: str = ""
    shuffle: bool = True
    group_lengths: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "lanes", "window", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_size % self.lanes:
            raise ValueError(
                f"lanes={self.lanes} does not divide batch_size={self.batch_size}; "
                f"the default would be {default_lanes(self.batch_size)}"
            )
        if self.n_rows < 1:
            raise ValueError("there are no cells to order")

    # ---- sizes

    @functools.cached_property
    def n_rows(self) -> int:
        return sum(n for _, n in self.parts)

    @property
    def rows_per_lane(self) -> int:
        """r, the rows that a lane gives to each step."""
        return self.batch_size // self.lanes

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Steps until the longest lane is exhausted; the last may hold filler rows."""
        return -(-self.n_rows // self.batch_size)

    @functools.cached_property
    def steps_per_window(self) -> int:
        """K; every window but the first and last of a lane lasts this many steps."""
        return min(-(-self.window // self.rows_per_lane), self.steps_per_epoch)

    @functools.cached_property
    def _lane_starts(self) -> np.ndarray:
        return np.array([lane * self.n_rows // self.lanes for lane in range(self.lanes + 1)])

    @functools.cached_property
    def _window_zero(self) -> np.ndarray:
        """Step, 0 or negative, at which window 0 of each lane would have begun if it were whole.

        Multiples of the golden ratio are spread evenly over any run of neighbouring lanes, hence over the
        lanes of any host.
        """
        K = self.steps_per_window
        if K == self.steps_per_epoch:
            return np.zeros(self.lanes, np.int64)
        fraction = np.arange(self.lanes, dtype=np.int64) * 2654435769 % 2**32
        return -(fraction * K >> 32)

    def windows_at(self, step: int) -> np.ndarray:
        """Number of the window that each lane is in at a step: int64[V]."""
        return (step - self._window_zero) // self.steps_per_window

    def window_steps(self, lane: int, window: int) -> tuple[int, int]:
        """First step of a window, and the step after its last."""
        start = int(self._window_zero[lane]) + window * self.steps_per_window
        return max(start, 0), min(start + self.steps_per_window, self.steps_per_epoch)

    # ---- what a window holds

    @functools.cached_property
    def _blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """First global row and size of every block. A block never spans two parts."""
        firsts, sizes = [], []
        for first, n in self.parts:
            starts = np.arange(0, n, self.block)
            firsts.append(first + starts)
            sizes.append(np.minimum(self.block, n - starts))
        return np.concatenate(firsts), np.concatenate(sizes)

    def _sequence(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """First row of every block in the epoch's order, and the positions at which the blocks begin."""
        kept = self._sequences.get(epoch)
        if kept is not None:
            return kept
        firsts, sizes = self._blocks
        if self.shuffle:
            order = permutation("blocks", self.salt, self.seed, epoch, n=len(firsts))
            firsts, sizes = firsts[order], sizes[order]
        kept = (firsts, np.concatenate([[0], np.cumsum(sizes)]))
        self._sequences[epoch] = kept
        for old in list(self._sequences)[:-2]:  # an epoch and the next, whose windows are read ahead
            self._sequences.pop(old, None)
        return kept

    @functools.cached_property
    def _sequences(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    def runs(self, epoch: int, lane: int, window: int) -> list[tuple[int, int]]:
        """The rows of a window as stored: runs of neighbours, (first row, number of rows) each."""
        firsts, begins = self._sequence(epoch)
        start, stop = self.window_steps(lane, window)
        low, end = self._lane_starts[lane : lane + 2]
        high = min(low + stop * self.rows_per_lane, end)
        low = min(low + start * self.rows_per_lane, end)
        out = []
        block = int(np.searchsorted(begins, low, side="right")) - 1
        while low < high:
            upto = min(high, begins[block + 1])
            out.append((int(firsts[block] + low - begins[block]), int(upto - low)))
            low, block = upto, block + 1
        return out

    def picks(self, epoch: int, lane: int, window: int) -> np.ndarray | None:
        """Which of the rows that ``runs`` reads the window hands out: int64[m], positions within the runs.

        A weighted order repeats some rows and leaves out others; the positions never decrease. None stands
        for all rows, once each.
        """
        return None

    def visits(self, epoch: int, lane: int, window: int, lengths: np.ndarray) -> np.ndarray:
        """In which order the rows of a window are handed out.

        Args:
          lengths: expressed genes of each of the m rows of the window, in the order of ``picks``.

        Returns:
          int64[steps * r]: for each slot of each step of the window, which of its rows goes there. -1 is
          filler, found in the last step of an epoch only.
        """
        r, n = self.rows_per_lane, len(lengths)
        start, stop = self.window_steps(lane, window)
        steps = stop - start
        order = np.arange(n)
        if self.group_lengths:
            keys = np.asarray(lengths).astype(np.uint64) << np.uint64(32)
            if self.shuffle:  # rows of equal length in random order
                keys |= random_bits("rows", self.salt, self.seed, epoch, lane, window, n=n) >> np.uint64(32)
            order = np.argsort(keys, kind="stable")
        elif self.shuffle:
            order = permutation("rows", self.salt, self.seed, epoch, lane, window, n=n)
        filler = np.full(steps * r - n, -1, np.int64)
        if not self.group_lengths:
            return np.concatenate([order, filler])
        turns = self._turns(epoch)[np.arange(start, stop) % self.steps_per_window]
        rank = np.argsort(np.argsort(turns))  # rank[j]: which group, by length, step j of the window takes
        cut = (rank[-1] + 1) * r - len(filler)  # the group of the last step is the one with filler
        return np.concatenate([order[:cut], filler, order[cut:]]).reshape(steps, r)[rank].ravel()

    def _turns(self, epoch: int) -> np.ndarray:
        """Common to all lanes: at which of K steps the shortest, ..., longest group has its turn."""
        return permutation("turns", self.salt, self.seed, epoch, n=self.steps_per_window)

    # ---- a batch

    def rows(self, epoch: int, step: int, lengths: Lengths | None = None) -> np.ndarray:
        """Global row numbers of a global batch: int64[B], -1 where there is none.

        This is the definition of the order. The pipeline computes the same thing window by window.

        Args:
          lengths: rows -> expressed genes of each; needed where ``group_lengths`` is set.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} is outside the epoch's {self.steps_per_epoch} steps")
        out = np.empty((self.lanes, self.rows_per_lane), np.int64)
        for lane, window in enumerate(self.windows_at(step)):
            rows = run_rows(self.runs(epoch, lane, int(window)))
            picks = self.picks(epoch, lane, int(window))
            rows = rows if picks is None else rows[picks]
            genes = np.zeros(len(rows), np.int64) if lengths is None else lengths(rows)
            slots = self.visits(epoch, lane, int(window), genes)
            at = (step - self.window_steps(lane, int(window))[0]) * self.rows_per_lane
            slots = slots[at : at + self.rows_per_lane]
            out[lane] = np.where(slots < 0, -1, np.append(rows, -1)[slots])
        return out.ravel()


def run_rows(runs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Runs of neighbouring rows -> the row numbers: int64."""
    return np.concatenate([np.arange(first, first + n) for first, n in runs] or [np.empty(0, np.int64)])
