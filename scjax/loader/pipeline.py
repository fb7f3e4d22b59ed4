"""From parts on disk to padded batches, forward from one position.

Every lane holds one window of rows, decompressed, in a reused buffer. A few windows are read ahead by a small
pool of threads, in the order in which they will be needed; where the window of each lane begins is staggered
by ``Order``, so that the reading is spread over the steps. A batch is then one fused pass over the buffers.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import heapq
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from scjax.loader.buckets import bucket_of
from scjax.loader.order import random_bits, run_rows
from scjax.loader.pack import Slabs, pack
from scjax.types import CellBatch

if TYPE_CHECKING:
    from scjax.loader.loader import Loader

READ_THREADS = 2
READ_AHEAD = 4  # windows, at least


@dataclasses.dataclass
class Counts:
    """A reused buffer: the genes and counts of one window."""

    indices: np.ndarray
    data: np.ndarray


@dataclasses.dataclass
class Content:
    """What has been read for a window, row by row as the window hands them out."""

    counts: Counts
    begins: np.ndarray  # int64, first element of the row in ``counts``
    depth: np.ndarray  # float32
    labels: np.ndarray  # int32[labels, rows]


@dataclasses.dataclass
class Window:
    """The rows of one window in the order in which they are handed out, filler included."""

    lane: int
    start: int  # its first step, and the step after its last, counted from step 0 of epoch 0
    stop: int
    rows: np.ndarray  # int64, -1 for filler
    lengths: np.ndarray  # int32, elements on disk
    genes: np.ndarray  # int32, slots needed in a batch: fewer where a vocabulary drops genes
    content: Content | None  # None in lanes of other processes: their lengths decide the width of a batch


class Pipeline:
    """Batches of consecutive steps, for one process."""

    def __init__(self, loader: Loader, epoch: int, step: int, keep_batches: int):
        self._loader = loader
        self._order = order = loader.order
        self._now = epoch * order.steps_per_epoch + step
        self._lanes = range(loader.lanes_here.start, loader.lanes_here.stop)
        self._first_rows = np.array([part.first_row for part in loader.parts])
        self._dtypes = loader.count_dtypes
        self._key = functools.lru_cache(1)(
            lambda epoch: int(random_bits("genes", loader.seed, epoch, n=1)[0])
        )
        self._slabs = Slabs(keep_batches)

        width, here = order.steps_per_window * order.rows_per_lane, len(self._lanes)
        self._start = np.zeros(order.lanes, np.int64)
        self._stop = np.full(order.lanes, self._now)
        self._rows = np.empty((order.lanes, width), np.int64)
        self._lengths = np.empty((order.lanes, width), np.int32)
        self._genes = np.empty((order.lanes, width), np.int32)
        self._indices_at = np.empty((here, width), np.uint64)
        self._data_at = np.empty((here, width), np.uint64)
        self._depth = np.empty((here, width), np.float32)
        self._labels = np.empty((len(loader.labels), here, width), np.int32)

        self._held: dict[int, Counts] = {}  # lane -> the buffer its current window is in
        self._spare: list[Counts] = []
        self._due = [
            (epoch * order.steps_per_epoch + order.window_steps(lane, window)[0], lane, epoch, window)
            for lane, window in enumerate(order.windows_at(step).tolist())
        ]
        heapq.heapify(self._due)
        self._reading: collections.deque[tuple[int, Future[Window]]] = collections.deque()
        steps_ahead = -(-2 * order.lanes // order.steps_per_window)  # windows that two steps use up
        self._ahead = max(READ_AHEAD * loader.process_count, steps_ahead)
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="scjax-read")

    def close(self) -> None:
        """Waits for reads under way and drops those that have not begun. May be called twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    # ---- windows

    def _load(self, lane: int, epoch: int, number: int) -> Window:
        """Reads one window. Runs in the pool."""
        order, loader = self._order, self._loader
        runs = order.runs(epoch, lane, number)
        pieces = []  # (part, first, last) within the part; a run never spans two
        for first, n in runs:
            which = int(np.searchsorted(self._first_rows, first, side="right")) - 1
            first -= int(self._first_rows[which])
            pieces.append((which, first, first + n))
        readers = loader.readers
        lengths = _join([readers[p].column("nnz", a, b) for p, a, b in pieces], np.int32)
        counted = loader.genes_per_cell
        genes = lengths if counted is None else _join([counted[p][a:b] for p, a, b in pieces], np.int32)
        slots = order.visits(epoch, lane, number, genes)
        start, stop = (epoch * order.steps_per_epoch + step for step in order.window_steps(lane, number))
        rows = _hand_out(run_rows(runs), slots, -1)
        handed = _hand_out(lengths, slots, 0), _hand_out(genes, slots, 0)
        if lane not in self._lanes:
            return Window(lane, start, stop, rows, *handed, None)

        ends = np.cumsum(lengths, dtype=np.int64)
        counts, at = self._buffer(int(ends[-1]) if len(ends) else 0), 0
        for which, first, last in pieces:
            low, high = readers[which].row_span(first, last)
            upto = at + high - low
            readers[which].read_spans([(low, high)], counts.indices[at:upto], counts.data[at:upto])
            at = upto

        def column(name: str, dtype: type, filler: int) -> np.ndarray:
            return _hand_out(
                _join([readers[p].column(name, a, b) for p, a, b in pieces], dtype), slots, filler
            )

        labels = [column(f"codes/{name}", np.int32, -1) for name in loader.labels]
        content = Content(
            counts,
            begins=_hand_out(ends - lengths, slots, 0),
            depth=column("total", np.float32, 0),
            labels=np.stack(labels) if labels else np.empty((0, len(slots)), np.int32),
        )
        return Window(lane, start, stop, rows, *handed, content)

    def _buffer(self, size: int) -> Counts:
        """A spare buffer, grown if it is too small."""
        try:
            counts = self._spare.pop()
        except IndexError:
            counts = Counts(np.empty(0, self._dtypes[0]), np.empty(0, self._dtypes[1]))
        if counts.indices.size < size:
            room = size + size // 8
            counts = Counts(np.empty(room, self._dtypes[0]), np.empty(room, self._dtypes[1]))
        return counts

    def _read_ahead(self) -> None:
        """Starts reading all that is due now and, as far as memory is meant for it, what comes next."""
        order, epochs = self._order, self._loader.epochs
        while self._due and (self._due[0][0] <= self._now or len(self._reading) < self._ahead):
            start, lane, epoch, number = heapq.heappop(self._due)
            self._reading.append((start, self._pool.submit(self._load, lane, epoch, number)))
            stop = order.window_steps(lane, number)[1]
            following = (epoch, number + 1) if stop < order.steps_per_epoch else (epoch + 1, 0)
            if epochs is None or following[0] < epochs:
                begins = following[0] * order.steps_per_epoch + stop % order.steps_per_epoch
                heapq.heappush(self._due, (begins, lane, *following))

    def _install(self, window: Window) -> None:
        lane, n, content = window.lane, len(window.rows), window.content
        self._start[lane], self._stop[lane] = window.start, window.stop
        self._rows[lane, :n] = window.rows
        self._lengths[lane, :n] = window.lengths
        self._genes[lane, :n] = window.genes
        if content is not None:
            here, counts = lane - self._lanes.start, content.counts
            self._held[lane] = counts
            begins = content.begins.astype(np.uint64)
            for table, array in ((self._indices_at, counts.indices), (self._data_at, counts.data)):
                table[here, :n] = begins * np.uint64(array.itemsize) + np.uint64(array.ctypes.data)
            self._depth[here, :n] = content.depth
            self._labels[:, here, :n] = content.labels

    # ---- batches

    def next(self) -> CellBatch:
        """The batch of the next step; raises what went wrong in reading it, again if asked again."""
        for lane in np.flatnonzero(self._stop <= self._now).tolist():
            if lane in self._held:  # before any read, which may then use the memory
                self._spare.append(self._held.pop(lane))
        self._read_ahead()
        while self._reading and self._reading[0][0] <= self._now:
            self._install(self._reading[0][1].result())
            self._reading.popleft()
        self._read_ahead()
        batch = self._fill()
        self._now += 1
        return batch

    def _fill(self) -> CellBatch:
        order, loader = self._order, self._loader
        width, r = self._rows.shape[1], order.rows_per_lane
        begins = np.arange(order.lanes) * width + (self._now - self._start) * r
        slots = begins[:, None] + np.arange(r)
        longest = int(self._genes.ravel()[slots].max())
        if loader.max_genes is not None:
            longest = min(longest, loader.max_genes)
        L, B = bucket_of(longest, loader.bucket_lengths), loader.local_batch_size

        mine = slots[self._lanes.start : self._lanes.stop].ravel()
        rows, lengths = self._rows.ravel()[mine], self._lengths.ravel()[mine]
        mine -= self._lanes.start * width
        out = self._slabs.take(
            {
                "gene_id": ((B, L), np.int32),
                "count": ((B, L), np.float32),
                "depth": ((B,), np.float32),
                "n_genes": ((B,), np.int32),
                "row": ((B,), np.uint32),
                "weight": ((B,), np.float32),
                "labels": ((len(loader.labels), B), np.int32),
            }
        )
        out["row"][:] = np.maximum(rows, 0)
        out["weight"][:] = rows >= 0
        out["depth"][:] = self._depth.ravel()[mine]
        labels = out.pop("labels")
        for codes, table in zip(labels, self._labels, strict=True):
            codes[:] = table.ravel()[mine]
        pack(
            self._indices_at.ravel()[mine],
            self._data_at.ravel()[mine],
            lengths,
            out["row"],
            self._dtypes,
            out["gene_id"],
            out["count"],
            out["n_genes"],
            lut=loader.lut,
            max_genes=loader.max_genes,
            key=self._key(self._now // order.steps_per_epoch),
        )
        return CellBatch(**out, label=dict(zip(loader.labels, labels, strict=True)), value={})


def _join(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *pieces], dtype=dtype, casting="unsafe")


def _hand_out(column: np.ndarray, slots: np.ndarray, filler: int) -> np.ndarray:
    """The values of a window's rows in the order of its slots; slot -1 is filler."""
    return np.append(column, np.array(filler, column.dtype))[slots]
