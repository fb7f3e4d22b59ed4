"""What every source of counts can do, and the checks that stand before everything it hands out."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
import pathlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from scjax.corpus.counts import CountsError, validate_counts

WHOLE_RUNS = 4  # see Source.runs
CHUNK_ELEMENTS = 2**23  # stored values held in memory at a time


def whole_runs(n_rows: int, n_stored: int, max_elements: int) -> list[tuple[int, int]]:
    """Runs of rows of a source of which each run reads everything: as few as memory allows."""
    n_runs = min(n_rows, max(1, -(-n_stored // (WHOLE_RUNS * max_elements))))
    cuts = [run * n_rows // n_runs for run in range(n_runs + 1)]
    return list(zip(cuts[:-1], cuts[1:], strict=True))


class Source(abc.ABC):
    """One study: cells x genes of counts, with ``obs`` and ``var``.

    A source on disk holds no open file, and pickles as its path, name and layer: a worker opens it anew.

    Attributes:
      name: the data set's name.
      where: what messages call it (the path, or the name of an AnnData in memory), with the layer.
      file: file name without folder, None in memory.
      layer: "X", "raw" or the name of a layer.
      shape: (cells, genes).
      n_stored: stored values, zeros included where the matrix is dense.
    """

    name: str
    where: str
    file: str | None
    layer: str
    shape: tuple[int, int]
    n_stored: int

    @property
    @abc.abstractmethod
    def obs(self) -> pd.DataFrame: ...

    @property
    @abc.abstractmethod
    def var(self) -> pd.DataFrame: ...

    @property
    def account(self) -> dict[str, int]:
        """What the file holds and this source leaves out: why -> how many. Empty for most."""
        return {}

    @contextlib.contextmanager
    def obsm(self) -> Iterator[Mapping[str, Any]]:
        """The matrices beside the counts, as far as they are numbers of the same cells, to read from while
        the context lasts: key -> array, sparse matrix or table, in memory or as its file has it."""
        yield {}

    @abc.abstractmethod
    def sha256(self) -> str:
        """Hash of the bytes of the file or files, or of the counts and names of an AnnData in memory."""

    @abc.abstractmethod
    def _rows(self, first: int, last: int, scratch: pathlib.Path | None) -> Iterator[sparse.csr_matrix]:
        """Rows first..last in order, at most about CHUNK_ELEMENTS stored values at a time."""

    @abc.abstractmethod
    def _heads(self) -> dict[str, np.ndarray]:
        """Layer -> some of its first stored values, for every matrix of the study."""

    def runs(self, max_elements: int) -> list[tuple[int, int]]:
        """Cuts the rows into runs (first, last) that can be read apart from each other.

        Args:
          max_elements: stored values in a run (more where a single row has more). A source that can only be
            read as a whole is read once for each run: its runs are ``WHOLE_RUNS`` times as large.

        Returns:
          The runs in order, all rows once.
        """
        return whole_runs(self.shape[0], self.n_stored, max_elements)

    def check_head(self) -> None:
        """A quick look, before hours of reading: raises CountsError if the first values are no counts."""
        head = self._heads().get(self.layer)
        if head is None or not whole(head):
            with contextlib.closing(self.counts()) as counts:
                next(counts)

    def counts(
        self,
        first: int = 0,
        last: int | None = None,
        *,
        allow_non_integer: bool = False,
        scratch: pathlib.Path | None = None,
    ) -> Generator[tuple[int, sparse.csr_matrix], None, None]:
        """Yields (first row, counts of a run of rows), checked, indices sorted, no stored zeros.

        Args:
          first, last: rows to read, [first, last); default: all.
          allow_non_integer: see ``validate_counts``.
          scratch: folder for temporary files (a large CSC matrix is turned there); default: the system's.

        Raises:
          CountsError: the matrix does not hold counts; names cell and gene, and a layer that does.
          OSError, ValueError: the file is damaged.
        """
        from scjax.corpus.sources.kernels import tidy

        last = self.shape[0] if last is None else last
        if not 0 <= first <= last <= self.shape[0]:
            raise ValueError(f"{self.where}: no rows {first} to {last}; there are {self.shape[0]}")
        for rows in self._rows(first, last, scratch):
            try:
                validate_counts(rows, source=self.where, allow_non_integer=allow_non_integer)
            except CountsError:
                self._complain(rows, first, allow_non_integer)
                raise
            if not tidy(rows.indptr, rows.indices, rows.data):
                rows.sum_duplicates()
                rows.eliminate_zeros()
            yield first, rows
            first += rows.shape[0]

    def _complain(self, rows: sparse.csr_matrix, first: int, allow_non_integer: bool) -> None:
        """The same complaint with names, which are only read for it."""
        try:
            validate_counts(
                rows,
                source=self.where,
                genes=self.var.index,
                cells=self.obs.index[first : first + rows.shape[0]],
                first_row=first,
                allow_non_integer=allow_non_integer,
            )
        except CountsError as error:
            heads = self._heads()
            others = [name for name in heads if name != self.layer and whole(heads[name])]
            hint = f"; whole numbers are in: {', '.join(others)} (pass layer=...)" if others else ""
            raise CountsError(f"{error}{hint}") from None


def title(layer: str) -> str:
    """What messages call a layer."""
    return {"X": "X", "raw": "raw.X"}.get(layer, f"layer {layer!r}")


def check_shape(where: str, shape: Sequence[int], obs: int, var: int) -> tuple[int, int]:
    """The shape of a matrix, which must be that of its tables and not empty."""
    if tuple(shape) != (obs, var):
        raise ValueError(
            f"{where}: the matrix is {shape[0]} x {shape[1]}, but obs has {obs} rows and var {var}"
        )
    if not obs or not var:
        raise ValueError(f"{where}: the matrix is empty ({obs} cells x {var} genes)")
    return obs, var


def no_layer(where: str, layer: str, there: Iterable[str]) -> KeyError:
    """The error for a matrix that a source does not have."""
    return KeyError(f"{where}: no {title(layer)}; there are: {', '.join(there) or 'no matrices'}")


def plain(values: np.ndarray) -> np.ndarray:
    """Values of a type that scipy can work with: native byte order, no half floats, no booleans."""
    same: Any = {"float16": np.float32, "bool": np.uint8}.get(values.dtype.name)
    return values.astype(same or values.dtype.newbyteorder("="), copy=False)


def whole(values: np.ndarray) -> bool:
    """Whether all are finite whole numbers, at least 0."""
    if values.dtype.kind not in "biuf":
        return False
    return bool(((values >= 0) & (values < np.inf) & (np.floor(values) == values)).all())


def hash_files(paths: Sequence[pathlib.Path], root: pathlib.Path) -> str:
    """sha256 of one file; of several, of their names below ``root`` and their hashes."""
    digests = []
    for path in paths:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(paths) == 1:
        return digests[0]
    lines = (f"{p.relative_to(root).as_posix()} {d}\n" for p, d in zip(paths, digests, strict=True))
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def look_at(paths: Iterable[pathlib.Path]) -> list[tuple[str, int, int]]:
    """(absolute path, bytes, time of the last change in ns) of files, sorted."""
    found = ((os.path.abspath(path), os.stat(path)) for path in paths)
    return sorted((path, stat.st_size, stat.st_mtime_ns) for path, stat in found)
