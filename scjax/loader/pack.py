"""The one pass of host work over the counts: gather, look up, pad; and the memory that it fills."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

_ALIGN = 64  # JAX takes numpy memory as it is on the CPU where it begins at such an address
_NO_LUT = np.empty(0, np.int32)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep the compiled code, as in a read-only container
        return numba.njit(nogil=True)(function)


@intrinsic
def _pointer(typing_context, address):
    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), build


@_compiled
def _mix(z: np.uint64) -> np.uint64:
    """The finaliser of splitmix64: every bit of the input moves every bit of the output."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_compiled
def _pack(indices_at, data_at, length, row, indices_like, data_like, lut, keep, key, gene_id, count, n_genes):
    golden = np.uint64(0x9E3779B97F4A7C15)
    for b in range(length.size):
        n = length[b]
        filled = 0
        if n > 0:
            indices = numba.carray(_pointer(indices_at[b]), n, indices_like.dtype)  # type: ignore[call-arg]
            data = numba.carray(_pointer(data_at[b]), n, data_like.dtype)
            known = n
            if lut.size > 0:
                known = 0
                for k in range(n):
                    if lut[indices[k]] >= 0:
                        known += 1
            # a slot is written whether or not its gene is wanted, and kept if so: no branch to mispredict
            if known <= keep and lut.size == 0:
                for k in range(n):
                    gene_id[b, k] = indices[k]
                for k in range(n):
                    count[b, k] = data[k]
                filled = n
            elif known <= keep:
                for k in range(n):
                    if filled == known:
                        break
                    gene_id[b, filled] = lut[indices[k]]
                    count[b, filled] = data[k]
                    filled += lut[indices[k]] >= 0
            else:
                # selection sampling: of the genes still to come, each wanted one is taken with equal odds
                state = _mix(key ^ _mix(np.uint64(row[b]) + golden))
                to_come = np.uint64(known)
                for k in range(n):
                    if filled == keep:
                        break
                    gene = np.int32(indices[k])
                    if lut.size > 0:
                        gene = lut[indices[k]]
                        if gene < 0:
                            continue
                    state += golden
                    draw = _mix(state) >> np.uint64(32)
                    gene_id[b, filled] = gene
                    count[b, filled] = data[k]
                    filled += (draw * to_come) >> np.uint64(32) < np.uint64(keep - filled)
                    to_come -= np.uint64(1)
        n_genes[b] = filled
        gene_id[b, filled:] = -1
        count[b, filled:] = 0


def pack(
    indices_at: np.ndarray,
    data_at: np.ndarray,
    length: np.ndarray,
    row: np.ndarray,
    dtypes: tuple[np.dtype, np.dtype],
    gene_id: np.ndarray,
    count: np.ndarray,
    n_genes: np.ndarray,
    *,
    lut: np.ndarray | None = None,
    max_genes: int | None = None,
    key: int | np.integer = 0,
) -> None:
    """Copies B sparse rows into padded arrays. Releases the GIL.

    Args:
      indices_at, data_at: uint64[B], memory addresses of the genes and the counts of each row. The caller
        keeps that memory alive.
      length: int32[B], elements of each row; 0 leaves the row empty.
      row: uint32[B], global row numbers, the key of the random choice.
      dtypes: of the genes and of the counts at these addresses.
      gene_id, count, n_genes: int32[B, L], float32[B, L] and int32[B], filled here.
      lut: int32, what to write for each gene; genes with -1 are dropped.
      max_genes: rows with more keep a uniform random subset of this many, which depends on ``key`` and the
        row number only.
    """
    width = gene_id.shape[1]
    keep = width if max_genes is None else min(max_genes, width)
    like = [np.empty(0, dtype) for dtype in dtypes]
    lut = _NO_LUT if lut is None else lut
    _pack(indices_at, data_at, length, row, *like, lut, keep, np.uint64(key), gene_id, count, n_genes)


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
        slab = np.empty(size, np.uint8)
        if free:
            self._slabs[free[0]] = slab
        elif len(self._slabs) < self._limit:
            self._slabs.append(slab)
        return slab
