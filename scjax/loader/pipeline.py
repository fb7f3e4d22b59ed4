"""From parts on disk to batches, forward from one position.

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
from typing import TYPE_CHECKING, Any

import numpy as np

from scjax.loader.buckets import bucket_of
from scjax.loader.order import random_bits, run_rows
from scjax.loader.pack import Rows, Slabs, pages
from scjax.types import CellBatch, SparseBatch

if TYPE_CHECKING:
    from scjax.loader.loader import Loader

READ_THREADS = 2
REMOTE_THREADS = 16  # where reads wait for a network rather than for a processor
READ_AHEAD = 4  # windows, at least


class Counts:
    """A reused buffer: the genes and counts of one window."""

    def __init__(self, n_bytes: int):
        self._memory = pages(n_bytes, n_bytes * 5 // 6)  # most windows fill that

    def take(self, size: int, dtypes: tuple[np.dtype, np.dtype]) -> bool:
        """Makes ``indices`` and ``data`` arrays of ``size`` elements; False if the buffer is too small."""
        cut, end = _places(size, dtypes)
        if end > self._memory.size:
            return False
        self.indices = self._memory[: size * dtypes[0].itemsize].view(dtypes[0])
        self.data = self._memory[cut:end].view(dtypes[1])
        return True


def _places(size: int, dtypes: tuple[np.dtype, np.dtype]) -> tuple[int, int]:
    """Where the counts begin behind the genes, and where they end: as near as may be, in few pages."""
    cut = -(-size * dtypes[0].itemsize // 64) * 64
    return cut, cut + size * dtypes[1].itemsize


@dataclasses.dataclass
class Content:
    """What has been read for a window, row by row as the window hands them out."""

    counts: Counts
    begins: np.ndarray  # int64, first element of the row in ``counts``
    depth: np.ndarray  # float32
    lut: np.ndarray  # int32, which table of genes is for the row
    labels: np.ndarray  # int32[labels, rows]
    values: list[np.ndarray]  # float32[rows, ...] each


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

        cells, elements = (sum(getattr(part, of) for part in loader.parts) for of in ("n_cells", "nnz"))
        width, here = order.steps_per_window * order.rows_per_lane, len(self._lanes)
        self._room = int(1.125 * width * elements / cells)  # almost always enough; costs what is touched
        self._start = np.zeros(order.lanes, np.int64)
        self._stop = np.full(order.lanes, self._now)
        self._rows = np.empty((order.lanes, width), np.int64)
        self._lengths = np.empty((order.lanes, width), np.int32)
        self._genes = np.empty((order.lanes, width), np.int32)
        self._indices_at = np.empty((here, width), np.uint64)
        self._data_at = np.empty((here, width), np.uint64)
        self._depth = np.empty((here, width), np.float32)
        self._lut = np.zeros((here, width), np.int32)
        self._labels = np.empty((len(loader.labels), here, width), np.int32)
        self._values = [np.empty((here, width, *panel.shape), np.float32) for panel in loader.panels.values()]

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
        threads = READ_THREADS
        if any(part.store.remote for part in loader.parts):
            threads = REMOTE_THREADS
            self._ahead = max(self._ahead, threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="scjax-read")

    def close(self) -> None:
        """Waits for reads under way and drops those that have not begun. May be called twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    # ---- windows

    def _load(self, lane: int, epoch: int, number: int) -> Window:
        """Reads one window. Runs in the pool."""
        order, loader = self._order, self._loader
        runs, picks = order.runs(epoch, lane, number), order.picks(epoch, lane, number)
        pieces = self._pieces(runs)
        readers = loader.readers
        nnz = [readers[p].column("nnz", a, b) for p, a, b in pieces]
        lengths = _join(nnz, np.int32)
        genes = _join(
            [loader.genes_of(p, a, b, n) for (p, a, b), n in zip(pieces, nnz, strict=True)], np.int32
        )
        slots = order.visits(epoch, lane, number, genes if picks is None else genes[picks])
        # for each slot, which of the rows that are read goes there: one more than there are for filler
        from_row = slots if picks is None else np.append(picks, -1)[slots]
        start, stop = (epoch * order.steps_per_epoch + step for step in order.window_steps(lane, number))

        def hand_out(column: np.ndarray, filler: int) -> np.ndarray:
            return np.append(column, np.array(filler, column.dtype))[from_row]

        rows = hand_out(run_rows(runs), -1)
        handed = hand_out(lengths, 0), hand_out(genes, 0)
        if lane not in self._lanes:
            return Window(lane, start, stop, rows, *handed, None)

        ends = np.cumsum(lengths, dtype=np.int64)
        counts, at = self._buffer(int(ends[-1]) if len(ends) else 0), 0
        for which, first, last in pieces:
            low, high = readers[which].row_span(first, last)
            upto = at + high - low
            readers[which].read_spans([(low, high)], counts.indices[at:upto], counts.data[at:upto])
            at = upto
        if at != (ends[-1] if len(ends) else 0):
            raise RuntimeError(
                f"{at} elements were read for a window of {ends[-1]}"
            )  # never, or all is shifted

        def column(name: str, dtype: type, filler: int) -> np.ndarray:
            return hand_out(_join([readers[p].column(name, a, b) for p, a, b in pieces], dtype), filler)

        lut = np.zeros(len(from_row), np.int32)
        if len(loader.lut_of_part) and loader.luts is not None and len(loader.luts) > 1:
            lut = hand_out(
                np.repeat(loader.lut_of_part[[p for p, _, _ in pieces]], [b - a for _, a, b in pieces]), 0
            )
        content = Content(
            counts,
            begins=hand_out(ends - lengths, 0),
            depth=column("total", np.float32, 0),
            lut=lut,
            labels=np.empty((len(loader.labels), len(from_row)), np.int32),
            values=[self._numbers(name, pieces)[from_row] for name in loader.panels],
        )
        for codes, name in zip(content.labels, loader.labels, strict=True):
            codes[:] = hand_out(self._codes(name, pieces), -1)
        return Window(lane, start, stop, rows, *handed, content)

    def _pieces(self, runs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """Runs as (part, first, last) within the part; neighbours that follow one another are joined."""
        pieces: list[tuple[int, int, int]] = []
        for first, n in runs:  # a run never spans two parts
            which = int(np.searchsorted(self._first_rows, first, side="right")) - 1
            first -= int(self._first_rows[which])
            if pieces and pieces[-1][0] == which and pieces[-1][2] == first:
                pieces[-1] = which, pieces[-1][1], first + n
            else:
                pieces.append((which, first, first + n))
        return pieces

    def _codes(self, name: str, pieces: list[tuple[int, int, int]]) -> np.ndarray:
        """A label of the rows that are read, in the numbers of the loader's categories."""
        out = []
        for which, first, last in pieces:
            codes, to = self._loader.readers[which].column(f"codes/{name}", first, last), None
            to = self._loader.code_maps[name][which]
            out.append(codes if to is None else to[codes])  # the last entry of a map is that of -1
        return _join(out, np.int32)

    def _numbers(self, name: str, pieces: list[tuple[int, int, int]]) -> np.ndarray:
        """float32 [rows + 1, ...]: a value of the rows that are read, and NaN for filler."""
        readers, shape = self._loader.readers, self._loader.panels[name].shape
        read = [readers[which].value(name, first, last) for which, first, last in pieces]
        return np.concatenate([*read, np.full((1, *shape), np.nan, np.float32)])

    def _buffer(self, size: int) -> Counts:
        """A spare buffer of ``size`` elements, or a new one where it is too small."""
        try:
            counts = self._spare.pop()
        except IndexError:  # not asked for before: another thread may take the last one
            counts = None
        if counts is None or not counts.take(size, self._dtypes):
            counts = Counts(_places(max(size + size // 16, self._room), self._dtypes)[1])
            counts.take(size, self._dtypes)
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
            self._lut[here, :n] = content.lut
            self._labels[:, here, :n] = content.labels
            for held, values in zip(self._values, content.values, strict=True):
                held[here, :n] = values

    # ---- batches

    def next(self) -> CellBatch | SparseBatch:
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

    def _fill(self) -> CellBatch | SparseBatch:
        order, loader = self._order, self._loader
        width, r, B = self._rows.shape[1], order.rows_per_lane, loader.local_batch_size
        begins = np.arange(order.lanes) * width + (self._now - self._start) * r
        slots = begins[:, None] + np.arange(r)
        mine = slots[self._lanes.start : self._lanes.stop].ravel()
        row, lengths = self._rows.ravel()[mine], self._lengths.ravel()[mine]
        mine = mine - self._lanes.start * width

        rows = Rows(
            self._indices_at.ravel()[mine],
            self._data_at.ravel()[mine],
            lengths,
            np.maximum(row, 0).astype(np.uint32),
            self._dtypes,
            loader.luts,
            self._lut.ravel()[mine],
        )
        fields: dict[str, tuple[tuple[int, ...], Any]] = {
            "depth": ((B,), np.float32),
            "n_genes": ((B,), np.int32),
            "row": ((B,), np.uint32),
            "weight": ((B,), np.float32),
            "labels": ((len(loader.labels), B), np.int32),
        }
        shapes = [panel.shape for panel in loader.panels.values()]
        fields |= {f"value {i}": ((B, *shape), np.float32) for i, shape in enumerate(shapes)}
        choice = loader.max_genes, self._key(self._now // order.steps_per_epoch)
        if loader.sparse:
            n_genes = rows.count()
            if loader.max_genes is not None:
                np.minimum(n_genes, loader.max_genes, out=n_genes)
            size = int(n_genes.sum(dtype=np.int64))
            room = (size + size // 16,)  # or a batch that is a little longer than all before needs new memory
            fields |= {
                "gene_id": (room, loader.sparse_dtypes[0]),
                "count": (room, loader.sparse_dtypes[1]),
                "indptr": ((B + 1,), np.int64),
            }
            out = self._slabs.take(fields)
            out["n_genes"][:] = n_genes
            out["indptr"][0] = 0
            np.cumsum(n_genes, out=out["indptr"][1:])
            out["gene_id"], out["count"] = out["gene_id"][:size], out["count"][:size]
            rows.join(out["indptr"], out["gene_id"], out["count"], *choice)
        else:
            longest = int(self._genes.ravel()[slots].max())
            if loader.max_genes is not None:
                longest = min(longest, loader.max_genes)
            L = bucket_of(longest, loader.bucket_lengths)
            out = self._slabs.take(fields | {"gene_id": ((B, L), np.int32), "count": ((B, L), np.float32)})
            rows.pad(out["gene_id"], out["count"], out["n_genes"], *choice)
        out["row"][:] = rows.row
        out["weight"][:] = row >= 0
        out["depth"][:] = self._depth.ravel()[mine]
        labels = out.pop("labels")
        for codes, table in zip(labels, self._labels, strict=True):
            codes[:] = table.ravel()[mine]
        label = dict(zip(loader.labels, labels, strict=True))
        value = {name: out.pop(f"value {i}") for i, name in enumerate(loader.panels)}
        for values, held in zip(value.values(), self._values, strict=True):
            values[:] = held.reshape(-1, *values.shape[1:])[mine]
        return (SparseBatch if loader.sparse else CellBatch)(**out, label=label, value=value)


def _join(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *pieces], dtype=dtype, casting="unsafe")
