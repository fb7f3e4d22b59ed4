"""Cells on their way to a part: fragments appended to one bucket of files per part."""

from __future__ import annotations

import pathlib
import pickle
from collections.abc import Iterator

import numpy as np
from scipy import sparse

Cells = dict[str, np.ndarray]  # per-cell columns


class Spill:
    """Buckets of cells in a folder: genes and counts as flat files, per-cell columns as pickled runs."""

    def __init__(self, folder: pathlib.Path, gene_dtype: np.dtype, count_dtype: np.dtype) -> None:
        folder.mkdir()
        self._folder = folder
        self._dtypes = {"genes": gene_dtype, "counts": count_dtype}
        self.n_cells = 0

    @property
    def itemsize(self) -> int:
        """Bytes per stored value."""
        return sum(dtype.itemsize for dtype in self._dtypes.values())

    def add(self, bucket: int, x: sparse.csr_matrix, cells: Cells) -> None:
        """Appends cells; ``cells`` must hold "nnz"."""
        for name, values in (("genes", x.indices), ("counts", x.data)):
            with open(self._folder / f"{bucket}.{name}", "ab") as file:
                file.write(values.astype(self._dtypes[name]).tobytes())
        with open(self._folder / f"{bucket}.cells", "ab") as file:
            file.write(pickle.dumps(cells, protocol=5))
        self.n_cells += x.shape[0]

    def load(self, bucket: int) -> tuple[np.ndarray, np.ndarray, Cells] | None:
        """(genes, counts, cells) of a bucket in the order of arrival, the first two memory-mapped."""
        runs = list(self._runs(bucket))
        if not runs:
            return None
        cells = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
        genes, counts = (
            np.memmap(self._folder / f"{bucket}.{name}", dtype, "r") for name, dtype in self._dtypes.items()
        )
        return genes, counts, cells

    def _runs(self, bucket: int) -> Iterator[Cells]:
        path = self._folder / f"{bucket}.cells"
        if path.exists():
            with open(path, "rb") as file:
                while file.peek(1):
                    yield pickle.load(file)

    def drop(self, bucket: int) -> None:
        """Frees the disk that a bucket holds."""
        for name in ("genes", "counts", "cells"):
            (self._folder / f"{bucket}.{name}").unlink(missing_ok=True)
