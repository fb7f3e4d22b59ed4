"""The one pass of host work over the counts: gather, look up, choose, pad; and the memory that it fills."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import sys
from typing import Any

import numba
import numpy as np

from scjax.corpus.compiled import compiled, mix, pointer

_ALIGN = 64  # JAX takes numpy memory as it is on the CPU where it begins at such an address
_LARGE_PAGE = 2**21
_NO_LUT = np.empty((1, 0), np.int32)


@compiled
def _choose(known, keep, state, marks):
    """A uniform random subset of ``keep`` of ``known`` things, as bits of ``marks`` (uint64[known / 64]).

    By Floyd's method, on the side that is smaller: it draws as many numbers as there are to choose.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    low = np.uint64(63)
    few = min(keep, known - keep)
    words = (known + 63) >> 6
    for w in range(words):
        marks[w] = 0
    for j in range(known - few, known):
        state += golden
        t = np.int64((mix(state) >> np.uint64(32)) * np.uint64(j + 1) >> np.uint64(32))
        taken = marks[t >> 6] >> (np.uint64(t) & low) & np.uint64(1)
        new = j if taken else t
        marks[new >> 6] |= np.uint64(1) << (np.uint64(new) & low)
    if few < keep:  # those chosen are the ones to leave out
        for w in range(words):
            marks[w] = ~marks[w]


@compiled
def _known(indices, lut):
    known = 0
    for k in range(indices.size):
        known += lut[indices[k]] >= 0
    return known


@compiled
def _row(indices, data, lut, keep, state, marks, gene, count):
    """One row into the front of ``gene`` and ``count``; returns how many of its genes were written."""
    n = indices.size
    known = _known(indices, lut) if lut.size > 0 else n
    if known <= keep and lut.size == 0:
        for k in range(n):
            gene[k] = indices[k]
        for k in range(n):
            count[k] = data[k]
        return n
    # a slot is written whether or not its gene is wanted, and kept if so: no branch to mispredict
    filled = 0
    if known <= keep:
        for k in range(n):
            if filled == known:
                break
            gene[filled] = lut[indices[k]]
            count[filled] = data[k]
            filled += lut[indices[k]] >= 0
        return filled
    _choose(known, keep, state, marks)
    one = np.uint64(1)
    if lut.size == 0:
        for k in range(n):
            if filled == keep:
                break
            gene[filled] = indices[k]
            count[filled] = data[k]
            filled += int(marks[k >> 6] >> np.uint64(k & 63) & one)
        return filled
    m = 0
    for k in range(n):
        if filled == keep:
            break
        wanted = lut[indices[k]] >= 0
        gene[filled] = lut[indices[k]]
        count[filled] = data[k]
        filled += wanted & int(marks[m >> 6] >> np.uint64(m & 63) & one)
        m += wanted
    return filled


@compiled
def _state(key, row):
    return mix(key ^ mix(np.uint64(row) + np.uint64(0x9E3779B97F4A7C15)))


@compiled
def _pack(at, length, row, like, luts, which, keep, key, gene_id, count, n_genes):
    marks = np.empty((max(length.max(), 1) + 63) >> 6, np.uint64) if length.size else np.empty(1, np.uint64)
    for b in range(length.size):
        n, filled = length[b], 0
        if n > 0:
            indices = numba.carray(pointer(at[0][b]), n, like[0].dtype)  # type: ignore[call-arg]
            data = numba.carray(pointer(at[1][b]), n, like[1].dtype)
            state = _state(key, row[b])
            filled = _row(indices, data, luts[which[b]], keep, state, marks, gene_id[b], count[b])
        n_genes[b] = filled
        gene_id[b, filled:] = -1
        count[b, filled:] = 0


@compiled
def _pack_rows(at, length, row, like, luts, which, keep, key, indptr, gene_id, count):
    marks = np.empty((max(length.max(), 1) + 63) >> 6, np.uint64) if length.size else np.empty(1, np.uint64)
    for b in range(length.size):
        n, low, high = length[b], indptr[b], indptr[b + 1]
        if n > 0 and high > low:
            indices = numba.carray(pointer(at[0][b]), n, like[0].dtype)  # type: ignore[call-arg]
            data = numba.carray(pointer(at[1][b]), n, like[1].dtype)
            state = _state(key, row[b])
            _row(indices, data, luts[which[b]], keep, state, marks, gene_id[low:high], count[low:high])


@compiled
def _count(indices_at, length, like, luts, which, n_genes):
    for b in range(length.size):
        n_genes[b] = 0
        if length[b] > 0:
            indices = numba.carray(pointer(indices_at[b]), length[b], like.dtype)  # type: ignore[call-arg]
            n_genes[b] = _known(indices, luts[which[b]])


@dataclasses.dataclass(frozen=True)
class Rows:
    """Sparse rows in memory that the caller keeps alive.

    Attributes:
      indices_at, data_at: uint64[B], addresses of the genes and of the counts of each row.
      length: int32[B], elements of each row; 0 for a row that is empty.
      row: uint32[B], global row numbers, the key of the random choice.
      dtypes: of the genes and of the counts at these addresses.
      luts: int32[k, n_genes], what to write for each gene, genes with -1 are dropped; None leaves all as
        they are.
      lut: int[B], which of the k goes for each row; None stands for 0.
    """

    indices_at: np.ndarray
    data_at: np.ndarray
    length: np.ndarray
    row: np.ndarray
    dtypes: tuple[np.dtype, np.dtype]
    luts: np.ndarray | None = None
    lut: np.ndarray | None = None

    def _arguments(self) -> tuple[Any, ...]:
        like = (np.empty(0, self.dtypes[0]), np.empty(0, self.dtypes[1]))
        return (self.indices_at, self.data_at), self.length, self.row, like, *self._tables()

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        which = np.zeros(len(self.length), np.int64) if self.lut is None or self.luts is None else self.lut
        return _NO_LUT if self.luts is None else self.luts, which

    def count(self) -> np.ndarray:
        """int32[B], genes of each row that the tables know."""
        n_genes = np.empty(len(self.length), np.int32)
        if self.luts is None:
            n_genes[:] = self.length
        else:
            like = np.empty(0, self.dtypes[0])
            _count(self.indices_at, self.length, like, *self._tables(), n_genes)
        return n_genes

    def pad(
        self,
        gene_id: np.ndarray,
        count: np.ndarray,
        n_genes: np.ndarray,
        max_genes: int | None = None,
        key: int | np.integer = 0,
    ) -> None:
        """Copies the rows into padded arrays. Releases the GIL.

        Args:
          gene_id, count, n_genes: int32[B, L], float32[B, L] and int32[B], filled here. No row may need more
            than L slots after ``max_genes``.
          max_genes: rows with more keep a uniform random subset of this many, which depends on ``key`` and
            the row number only. The genes stay in their order.
        """
        width = gene_id.shape[1]
        keep = width if max_genes is None else min(max_genes, width)
        _pack(*self._arguments(), keep, np.uint64(key), gene_id, count, n_genes)

    def join(
        self,
        indptr: np.ndarray,
        gene_id: np.ndarray,
        count: np.ndarray,
        max_genes: int | None = None,
        key: int | np.integer = 0,
    ) -> None:
        """Copies the rows one after the other, as ``pad`` would but without padding. Releases the GIL.

        Args:
          indptr: int64[B + 1], where each row goes: ``count()`` elements, at most ``max_genes``.
          gene_id, count: [indptr[B]], of types that hold the ids and counts, filled here.
          max_genes, key: as in ``pad``.
        """
        keep = np.iinfo(np.int64).max if max_genes is None else max_genes
        _pack_rows(*self._arguments(), keep, np.uint64(key), indptr, gene_id, count)


def prepare(dtypes: tuple[np.dtype, np.dtype], sparse: bool) -> None:
    """Loads the compiled code for these types; compiles it where nothing did so before. About a second."""
    none, at = np.empty(0, np.int32), np.empty(0, np.uint64)
    rows = Rows(at, at, none, np.empty(0, np.uint32), dtypes, None, none)
    if sparse:
        rows.join(np.zeros(1, np.int64), np.empty(0, dtypes[0]), np.empty(0, dtypes[1]))
    else:
        rows.pad(np.empty((0, 1), np.int32), np.empty((0, 1), np.float32), none)


def pages(size: int, used: int | None = None) -> np.ndarray:
    """uint8[size] of zeros, straight from the system, which gets it back as a whole.

    The heap would keep holes of buffers that were let go and cut the others into small pages: at the rate of
    a loader, looking up 4 KB pages is a good part of the work. Of the rest beyond ``used`` bytes, the least
    that will be filled, only what is touched is taken.
    """
    room = mmap.mmap(-1, size + _LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -np.frombuffer(room, np.uint8).ctypes.data % _LARGE_PAGE
    whole = min(size, size if used is None else used) // _LARGE_PAGE * _LARGE_PAGE
    if whole and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system that was built without
            room.madvise(mmap.MADV_HUGEPAGE, first, whole)
    # not a view of another array: to views of it this array is the owner, which ``Slabs`` counts on
    return np.frombuffer(room, np.uint8, size, first)


class Slabs:
    """Memory for batches, reused as soon as, and not before, nobody looks at it.

    A batch is a set of views of one slab, and every view, or view of a view, refers to the slab itself. So
    does a JAX array that took the memory of a view over without a copy, as JAX does on the CPU. A slab with
    no reference but the pool's own is free. A slab made for long batches serves short ones as well.
    """

    def __init__(self, limit: int):
        """At most ``limit`` slabs are kept; what is needed beyond them is given away."""
        self._limit = limit
        self._slabs: list[np.ndarray] = []

    def take(self, fields: dict[str, tuple[tuple[int, ...], Any]]) -> dict[str, np.ndarray]:
        """Uninitialised arrays: name -> (shape, dtype) in, name -> array out."""
        places, size = {}, 0
        for name, (shape, dtype) in fields.items():
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            places[name] = (size, nbytes)
            size += -(-nbytes // _ALIGN) * _ALIGN
        slab = self._free(size + _ALIGN)
        first = -slab.ctypes.data % _ALIGN
        return {
            name: slab[first + at : first + at + nbytes].view(fields[name][1]).reshape(fields[name][0])
            for name, (at, nbytes) in places.items()
        }

    def _free(self, size: int) -> np.ndarray:
        # one reference is the list's, one that of the call
        free = [i for i in range(len(self._slabs)) if sys.getrefcount(self._slabs[i]) == 2]
        for i in free:
            if self._slabs[i].size >= size:
                return self._slabs[i]
        slab = pages(size)
        if free:
            self._slabs[free[0]] = slab
        elif len(self._slabs) < self._limit:
            self._slabs.append(slab)
        return slab
