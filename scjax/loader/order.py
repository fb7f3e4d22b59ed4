"""Which cell goes where: the order of an epoch as pure arithmetic on row numbers.

An epoch is a sequence of D rows: all N rows of a split once each (D = N), or, where there are weights, D
draws of them. V virtual lanes own equal slices of that sequence. Every step takes r = B / V rows from each
lane, and a lane hands its rows out window by window, shuffled inside each window:

    sequence   |---- lane 0 ----|---- lane 1 ----|---- lane 2 ----| ...        D rows
    lane       |win|-- window --|-- window --|wi|                            W rows each, the first cut short
    batch t    r rows of lane 0, r rows of lane 1, ...                         B rows

What holds, for every seed and epoch e, and is tested:

- A batch is a function of (manifest, settings, seed, e, step), not of the hosts, as a lane does not know who
  reads it; a window is one of (seed, e, lane, window), so that any step is reached without those before it.
- Without weights every row comes exactly once an epoch. With them an epoch is exactly D draws, and
  ``scjax.loader.weights`` says which.
- An epoch has ceil(D / B) steps. Lane v holds floor((v + 1) D / V) - floor(v D / V) rows, so all lanes are
  exhausted in the last step, and rows of weight 0 (-1 here) fill it up; there are none in other steps.
- The sequence (``scjax.loader.sequence``) takes blocks of neighbouring rows, one block being one read, such
  that rows of all regions of the corpus are in the windows at any time.
- Windows begin at a different step in each lane, so that the reading they cause is spread evenly.
- Copies of a row that is drawn several times are handed out evenly over its window: with m copies and a
  window of K steps they are in different batches while m is well below K. Grouping by length puts them side
  by side, and a row with more copies than a window has steps comes several times in a batch.

The definition is ``Order.rows``. Nothing here reads a file but through ``weights``, which reads label codes.
The number of expressed genes per row, which grouping by length needs, is handed in by the caller.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scjax.loader.sequence import Sequence as Layout
from scjax.loader.sequence import blocks_of, shuffled, stored

if TYPE_CHECKING:
    from scjax.loader.weights import Weights

Lengths = Callable[[np.ndarray], np.ndarray]  # global row numbers -> expressed genes of each

MAX_LANES = 64  # by default: with windows of 1,024 cells, 65 thousand are held, half a gigabyte or less
BLOCK, SOURCE_BLOCK = 1024, 64  # rows, in corpora that were shuffled when they were built and in others


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
    """The largest power of two that divides the batch, at most 64, whatever the number of processes."""
    return min(MAX_LANES, batch_size & -batch_size)


def default_block(n_rows: int, lanes: int, chunk_rows: float, in_source_order: bool = False) -> int:
    """1,024 rows, less where a lane would otherwise hold fewer than four blocks; but a few times what is
    decompressed at a time (``chunk_rows``), as the rest of a chunk is decompressed for nothing.

    Where cells lie in the order of their sources a block is a single kind of cell, and a window must hold
    many of them: 64 rows at most, although more is then decompressed than is used.
    """
    block, least = (SOURCE_BLOCK, 16.0) if in_source_order else (BLOCK, max(16, 4 * chunk_rows))
    while block > least and block * 4 * lanes > n_rows:
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
      weights: how often which row is drawn, for the same parts and block; None for once each.
      skip: stretches of more rows than this that a window does not draw are not read. Has no part in what
        is handed out.
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
    weights: Weights | None = None
    skip: int = 128

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
    def n_draws(self) -> int:
        """D, rows that an epoch hands out."""
        return self.n_rows if self.weights is None else self.weights.draws

    @property
    def rows_per_lane(self) -> int:
        """r, the rows that a lane gives to each step."""
        return self.batch_size // self.lanes

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Steps until the longest lane is exhausted; the last may hold filler rows."""
        return -(-self.n_draws // self.batch_size)

    @functools.cached_property
    def steps_per_window(self) -> int:
        """K; every window but the first and last of a lane lasts this many steps."""
        return min(-(-self.window // self.rows_per_lane), self.steps_per_epoch)

    @functools.cached_property
    def _lane_starts(self) -> np.ndarray:
        return np.array([lane * self.n_draws // self.lanes for lane in range(self.lanes + 1)])

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
        return blocks_of(self.parts, self.block)

    @functools.cached_property
    def _sequences(self) -> tuple[threading.Lock, dict[int, Layout]]:
        return threading.Lock(), {}

    def _sequence(self, epoch: int) -> Layout:
        lock, kept = self._sequences
        with lock:  # threads that read windows of a new epoch wait for the first of them to make it
            if epoch not in kept:
                kept[epoch] = self._make_sequence(epoch)
                for old in list(kept)[:-2]:  # an epoch and the next, whose windows are read ahead
                    del kept[old]
            return kept[epoch]

    def _make_sequence(self, epoch: int) -> Layout:
        sizes, whole = self._blocks[1], self.block if self.weights is None else None
        if self.weights is not None:
            sizes = self.weights.block_draws(epoch)
        if not self.shuffle:
            return stored(sizes)
        window = self.steps_per_window * self.rows_per_lane
        heads = np.zeros(self.lanes, np.int64)
        if whole is not None and window % whole == 0:
            heads += [self.window_steps(lane, 0)[1] * self.rows_per_lane for lane in range(self.lanes)]
            heads %= whole
        bits = random_bits("blocks", self.salt, self.seed, epoch, n=len(sizes) + self.lanes + 1)
        return shuffled(sizes, self._lane_starts, bits, window=window, whole=whole, heads=heads)

    def _pieces(self, epoch: int, lane: int, window: int) -> list[tuple[int, int, int]]:
        """(block, first, number) of the rows, or draws, of a window."""
        start, stop = self.window_steps(lane, window)
        low, end = (int(at) for at in self._lane_starts[lane : lane + 2])
        high = min(low + stop * self.rows_per_lane, end)
        return self._sequence(epoch).between(min(low + start * self.rows_per_lane, end), high)

    def runs(self, epoch: int, lane: int, window: int) -> list[tuple[int, int]]:
        """What is read for a window: runs of neighbouring rows, (first row, number of rows) each.

        A run lies inside one block. Without weights these are the rows that the window hands out.
        """
        if self.weights is not None:
            return self._drawn(epoch, lane, window)[0]
        firsts = self._blocks[0]
        return [(int(firsts[block]) + at, n) for block, at, n in self._pieces(epoch, lane, window)]

    def picks(self, epoch: int, lane: int, window: int) -> np.ndarray | None:
        """Which of the rows that ``runs`` reads the window hands out: int64[m], positions within the runs.

        A weighted order repeats some rows and leaves out others; the positions never decrease, and copies of
        a row are neighbours. None stands for all rows, once each.
        """
        return None if self.weights is None else self._drawn(epoch, lane, window)[1]

    @functools.cached_property
    def _drawn(self) -> Callable[[int, int, int], tuple[list[tuple[int, int]], np.ndarray]]:
        return functools.lru_cache(2 * self.lanes)(self._draw)  # asked for several times while it is read

    def _draw(self, epoch: int, lane: int, window: int) -> tuple[list[tuple[int, int]], np.ndarray]:
        """The runs and picks of a window of a weighted order."""
        assert self.weights is not None
        runs: list[tuple[int, int]] = []
        picks, read = [np.empty(0, np.int64)], 0
        for block, first, n in self._pieces(epoch, lane, window):
            draws = self.weights.row_draws(epoch, block)
            rows = np.repeat(np.arange(len(draws)), draws)[first : first + n]
            for piece in np.split(rows, np.flatnonzero(np.diff(rows) > self.skip) + 1):
                runs.append((int(self._blocks[0][block] + piece[0]), int(piece[-1] - piece[0]) + 1))
                picks.append(piece - piece[0] + read)
                read += runs[-1][1]
        return runs, np.concatenate(picks)

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
            bits = random_bits("rows", self.salt, self.seed, epoch, lane, window, n=n)
            picks = self.picks(epoch, lane, window)
            order = np.argsort(bits if picks is None else _apart(bits, picks), kind="stable")
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
            at = (step - self.window_steps(lane, int(window))[0]) * self.rows_per_lane
            out[lane] = self._handed(epoch, lane, int(window), lengths)[at : at + self.rows_per_lane]
        return out.ravel()

    def lane_rows(
        self, epoch: int, lane: int, lengths: Lengths | None = None, steps: int | None = None
    ) -> np.ndarray:
        """What a lane gives to the first steps of an epoch: int64[steps, r]; ``rows`` for many at once."""
        steps = self.steps_per_epoch if steps is None else min(steps, self.steps_per_epoch)
        windows = int(self.windows_at(steps - 1)[lane]) + 1
        handed = [self._handed(epoch, lane, window, lengths) for window in range(windows)]
        return np.concatenate(handed)[: steps * self.rows_per_lane].reshape(steps, -1)

    def _handed(self, epoch: int, lane: int, window: int, lengths: Lengths | None) -> np.ndarray:
        rows, picks = run_rows(self.runs(epoch, lane, window)), self.picks(epoch, lane, window)
        rows = rows if picks is None else rows[picks]
        genes = np.zeros(len(rows), np.int64) if lengths is None else lengths(rows)
        slots = self.visits(epoch, lane, window, genes)
        return np.where(slots < 0, -1, np.append(rows, -1)[slots])


def _apart(bits: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Keys to sort by, at random, that spread the m copies of a row evenly: 1/m of the whole apart."""
    first = np.flatnonzero(np.diff(picks, prepend=-1))
    copies = np.diff(np.append(first, len(picks)))
    number = np.arange(len(picks)) - np.repeat(first, copies)
    apart = np.uint64(2**64 - 1) // np.repeat(copies, copies).astype(np.uint64)
    return np.repeat(bits[first], copies) + number.astype(np.uint64) * apart  # modulo 2**64


def run_rows(runs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Runs of neighbouring rows -> the row numbers: int64."""
    return np.concatenate([np.arange(first, first + n) for first, n in runs] or [np.empty(0, np.int64)])
