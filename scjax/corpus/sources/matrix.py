"""Runs of rows out of matrices on disk: compressed by row, compressed by column, dense."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import sparse

from scjax.corpus.sources import base

Read = Callable[[int, int], np.ndarray]  # elements [low, high) of a vector


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A sparse matrix as three vectors on disk.

    Attributes:
      where: what messages call it.
      shape: (cells, genes).
      by_row: compressed by row (CSR), else by column (CSC).
      n_stored: length of ``data`` and ``indices``.
      data, indices, indptr: read a range of that vector.
    """

    where: str
    shape: tuple[int, int]
    by_row: bool
    n_stored: int
    data: Read
    indices: Read
    indptr: Read

    def check(self, n_indices: int, n_indptr: int) -> None:
        """ValueError where the three vectors cannot belong together."""
        major = self.shape[0] if self.by_row else self.shape[1]
        if n_indices != self.n_stored:
            raise ValueError(f"{self.where}: damaged: {n_indices} indices for {self.n_stored} stored values")
        if n_indptr != major + 1:
            raise self._torn()

    def _torn(self) -> ValueError:
        return ValueError(
            f"{self.where}: damaged: indptr does not describe the {self.n_stored} stored values"
        )

    def _starts(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first + 1]: where each row (of CSC: column) starts, checked."""
        starts = self.indptr(first, last + 1).astype(np.int64)
        major = self.shape[0] if self.by_row else self.shape[1]
        wrong = len(starts) != last - first + 1 or (np.diff(starts) < 0).any()
        wrong |= starts[0] < 0 or starts[-1] > self.n_stored
        if wrong or (first == 0 and starts[0] != 0) or (last == major and starts[-1] != self.n_stored):
            raise self._torn()
        minor = self.shape[1] if self.by_row else self.shape[0]
        longest = int(np.diff(starts).argmax()) if last > first else 0
        if last > first and starts[longest + 1] - starts[longest] > minor:
            raise ValueError(
                f"{self.where}: damaged: {'row' if self.by_row else 'column'} {longest + first} has "
                f"{starts[longest + 1] - starts[longest]} stored values, more than the {minor} it can have"
            )
        return starts

    def runs(self, max_elements: int) -> list[tuple[int, int]]:
        """See ``Source.runs``."""
        if not self.by_row:
            return base.whole_runs(self.shape[0], self.n_stored, max_elements)
        return list(cut(self._starts(0, self.shape[0]), max_elements))

    def rows(self, first: int, last: int, scratch: pathlib.Path | None) -> Iterator[sparse.csr_matrix]:
        """See ``Source._rows``."""
        if self.by_row:
            yield from self._pieces(first, last)
        else:
            yield from turn(self._triples(), self.shape, self.n_stored, scratch, first, last)

    def _triples(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(cells, genes, values) of a CSC matrix, a run of columns at a time."""
        start = 0
        for piece in self._pieces(0, self.shape[1]):
            columns = sparse.coo_matrix(piece)
            yield columns.col, columns.row + start, columns.data
            start += piece.shape[0]

    def _pieces(self, first: int, last: int) -> Iterator[sparse.csr_matrix]:
        """Rows (of a CSC matrix: columns) first..last as CSR, a run at a time."""
        if first == last:
            return
        starts = self._starts(first, last)
        minor = self.shape[1] if self.by_row else self.shape[0]
        for start, end in cut(starts, base.CHUNK_ELEMENTS):
            low, high = int(starts[start]), int(starts[end])
            indices, data = self.indices(low, high), base.plain(self.data(low, high))
            if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < minor:
                raise ValueError(
                    f"{self.where}: damaged: indices outside 0..{minor - 1} "
                    f"between {start + first} and {end + first}"
                )
            parts = data, indices.astype(np.int32, copy=False), starts[start : end + 1] - low
            yield sparse.csr_matrix(parts, shape=(end - start, minor))


def dense_rows(read: Read, n_genes: int, first: int, last: int) -> Iterator[sparse.csr_matrix]:
    """Rows first..last of a dense matrix, of which ``read`` gives a range of rows."""
    step = max(1, base.CHUNK_ELEMENTS // n_genes)
    for start in range(first, last, step):
        yield sparse.csr_matrix(base.plain(read(start, min(start + step, last))))


def dense_runs(shape: tuple[int, int], chunk_rows: int, max_elements: int) -> list[tuple[int, int]]:
    """See ``Source.runs``: whole chunks of ``chunk_rows`` rows, so that none is decoded twice."""
    step = max(1, max_elements // shape[1])
    step = max(step - step % chunk_rows, min(chunk_rows, step))
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def cut(indptr: np.ndarray, elements: int) -> Iterator[tuple[int, int]]:
    """Cuts rows into runs of at most ``elements`` stored values (at least one row)."""
    start, n = 0, len(indptr) - 1
    while start < n:
        end = int(np.searchsorted(indptr, indptr[start] + elements, side="right")) - 1
        end = min(max(end, start + 1), n)
        yield start, end
        start = end


def turn(
    triples: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]],
    shape: tuple[int, int],
    n_stored: int,
    scratch: pathlib.Path | None,
    first: int,
    last: int,
) -> Iterator[sparse.csr_matrix]:
    """Entries in any order -> runs of rows first..last, through temporary files where memory would not do.

    Args:
      triples: pieces of (cells, genes, values), of which one fits in memory.
      shape: (cells, genes).
      n_stored: entries of all pieces together.
    """
    step = max(1, int(shape[0] * base.CHUNK_ELEMENTS / max(n_stored, 1)))
    groups = -(-(last - first) // step)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="turn-") as folder:
        held: list[list[np.ndarray]] = [[] for _ in range(groups)]
        dtype = np.dtype([("row", "i4"), ("gene", "i4"), ("value", "i8")])
        for rows, genes, values in triples:
            dtype = np.dtype([("row", "i4"), ("gene", "i4"), ("value", values.dtype)])
            within = (rows >= first) & (rows < last) if (first, last) != (0, shape[0]) else slice(None)
            record = np.empty(len(rows[within]), dtype)
            record["row"], record["gene"], record["value"] = rows[within], genes[within], values[within]
            record["row"] -= first
            record = record[np.argsort(record["row"] // step, kind="stable")]
            cuts = np.searchsorted(record["row"] // step, np.arange(groups + 1))
            for group in range(groups):
                piece = record[cuts[group] : cuts[group + 1]]
                if n_stored <= base.CHUNK_ELEMENTS:
                    held[group].append(piece)
                elif len(piece):
                    with open(f"{folder}/{group}", "ab") as file:
                        file.write(piece.tobytes())
        for group in range(groups):
            path = pathlib.Path(folder, str(group))
            pieces: list[Any] = [np.fromfile(path, dtype)] if path.exists() else held[group]
            record = np.concatenate(pieces or [np.empty(0, dtype)])
            size = min(step, last - first - group * step), shape[1]
            yield sparse.csr_matrix(
                (record["value"], (record["row"] - group * step, record["gene"])), shape=size
            )
            path.unlink(missing_ok=True)
