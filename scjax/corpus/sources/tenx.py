"""A 10x .h5 file as a source: Cell Ranger 3 and later (group ``matrix``), and 2 (a group for each genome)."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from scjax.corpus.sources import base
from scjax.corpus.sources.base import Source
from scjax.corpus.sources.hdf5 import opened, vector
from scjax.corpus.sources.matrix import Compressed

GENES = "Gene Expression"  # the type of the features that are counts of genes


class Features:
    """The features of a 10x matrix and which of them are genes.

    Args:
      ids, names: of each feature.
      types: "Gene Expression", "Antibody Capture", ...; None in files of before there were types.
      genomes: of each feature; None where the file does not say.

    Attributes:
      var: table of the genes: index = name, ``gene_ids``, and ``genome`` where known.
      account: feature type that is left out -> number of features.
      column: int32 [n_features]: column of ``var``, -1 where left out; None where all are genes.
    """

    def __init__(
        self,
        ids: Sequence[str],
        names: Sequence[str],
        types: Sequence[str] | None = None,
        genomes: Sequence[str] | None = None,
    ) -> None:
        genes = np.array([kind == GENES for kind in types]) if types is not None else np.ones(len(ids), bool)
        self.n = len(genes)
        self.account = {
            f"features of type {kind!r}": n for kind, n in Counter(types or ()).items() if kind != GENES
        }
        if genomes is not None:
            # Cell Ranger tells the genes of several genomes apart: GRCh38_ENSG..., mm10___ENSMUSG...
            mark = re.compile("|".join(f"{re.escape(genome)}_+" for genome in sorted(set(genomes)) if genome))
            if all(mark.match(name) for name in ids):
                ids, names = ([mark.sub("", v, count=1) for v in values] for values in (ids, names))
        table = {"gene_ids": ids} | ({} if genomes is None else {"genome": genomes})
        self.var = pd.DataFrame(table, index=pd.Index(names, dtype=object)).loc[genes]
        self.column = None
        if not genes.all():
            self.column = np.where(genes, np.cumsum(genes) - 1, -1).astype(np.int32)

    def check(self, where: str) -> None:
        """ValueError where no feature is a gene."""
        if not len(self.var):
            raise ValueError(f"{where}: no feature is of type {GENES!r}; left out: {self.account}")

    def take(self, rows: sparse.csr_matrix) -> sparse.csr_matrix:
        """Cells x features -> cells x genes."""
        if self.column is None:
            return rows
        columns = self.column[rows.indices]
        kept = columns >= 0
        indptr = np.concatenate([[0], np.cumsum(kept)])[rows.indptr]
        return sparse.csr_matrix(
            (rows.data[kept], columns[kept], indptr), shape=(rows.shape[0], len(self.var))
        )


def is_tenx(path: pathlib.Path) -> bool:
    """Whether an HDF5 file is laid out as Cell Ranger does it; False where it cannot be opened."""
    try:
        with h5py.File(path, "r") as file:
            return "obs" not in file and bool(_groups(file))
    except OSError:
        return False


def _groups(file: h5py.File) -> list[str]:
    """The groups that hold a matrix."""
    return [
        name
        for name in file
        if isinstance(file[name], h5py.Group)
        and {"barcodes", "indptr"} <= set(file[name])
        and ("features" in file[name] or "genes" in file[name])
    ]


class TenxSource(Source):
    """A 10x .h5 file. Features that are no genes are left out, and counted in ``account``.

    Where a file of Cell Ranger 2 holds several genomes, a cell is a barcode of any of them, and has the genes
    of all of them.
    """

    def __init__(self, path: pathlib.Path, name: str, layer: str) -> None:
        self.name, self.file, self.layer, self.path = name, path.name, layer, path
        self.where = str(path)
        if layer != "X":
            raise base.no_layer(str(path), layer, ["X"])
        with opened(path) as file:
            self._names = _groups(file)
            self._features = [self._read_features(file, group) for group in self._names]
            barcodes = [_texts(file[group]["barcodes"]) for group in self._names]
            self.n_stored = 0
            for group, features, cells in zip(self._names, self._features, barcodes, strict=True):
                self.n_stored += self._compressed(file[group], features.n, len(cells)).n_stored
        cells = barcodes[0]
        self._place: list[np.ndarray | None] = [None] * len(self._names)
        if any(other != cells for other in barcodes):
            cells = sorted(set().union(*barcodes))
            where = {barcode: i for i, barcode in enumerate(cells)}
            for i, own in enumerate(barcodes):
                place = np.full(len(cells), -1)
                place[[where[barcode] for barcode in own]] = np.arange(len(own))
                self._place[i] = place
        self._obs = pd.DataFrame(index=pd.Index(cells, dtype=object))
        self._var = pd.concat([features.var for features in self._features])
        for features in self._features:
            features.check(self.where)
        self.shape = base.check_shape(self.where, (len(cells), len(self._var)), len(cells), len(self._var))

    def __reduce__(self) -> Any:
        return TenxSource, (self.path, self.name, self.layer)

    def _read_features(self, file: h5py.File, name: str) -> Features:
        group = file[name]
        if "features" not in group:  # Cell Ranger 2: the group is the genome
            ids, names = (
                _texts(group["genes"]),
                _texts(group["gene_names"] if "gene_names" in group else group["genes"]),
            )
            genomes = [name] * len(ids) if len(self._names) > 1 else None
            return Features(ids, names, genomes=genomes)
        table = group["features"]
        missing = [key for key in ("id", "name", "feature_type") if key not in table]
        if missing:
            raise ValueError(f"{self.path}: damaged: {name}/features without {' and '.join(missing)}")
        columns = [_texts(table[key]) for key in ("id", "name", "feature_type", "genome") if key in table]
        if len({len(column) for column in columns}) > 1:
            raise ValueError(f"{self.path}: damaged: the columns of {name}/features differ in length")
        return Features(*columns)

    def _compressed(self, group: h5py.Group, n_features: int, n_cells: int) -> Compressed:
        missing = [key for key in ("data", "indices", "indptr", "shape") if key not in group]
        if missing:
            raise ValueError(f"{self.path}: damaged: {group.name[1:]} without {' and '.join(missing)}")
        shape = tuple(int(n) for n in group["shape"][:])
        if shape != (n_features, n_cells):
            raise ValueError(
                f"{self.path}: damaged: {group.name[1:]} is {' x '.join(map(str, shape))}, but there are "
                f"{n_features} features and {n_cells} barcodes"
            )
        # A column of features x barcodes is a row of cells x features.
        read = (vector(group[key]) for key in ("data", "indices", "indptr"))
        matrix = Compressed(self.where, shape[::-1], True, len(group["data"]), *read)
        matrix.check(len(group["indices"]), len(group["indptr"]))
        return matrix

    @contextlib.contextmanager
    def _matrices(self) -> Iterator[list[Compressed]]:
        with opened(self.path) as file:
            shapes = [(file[name], len(file[name]["barcodes"])) for name in self._names]
            yield [
                self._compressed(group, features.n, n)
                for (group, n), features in zip(shapes, self._features, strict=True)
            ]

    @property
    def obs(self) -> pd.DataFrame:
        return self._obs

    @property
    def var(self) -> pd.DataFrame:
        return self._var

    @property
    def account(self) -> dict[str, int]:
        return dict(sum((Counter(features.account) for features in self._features), Counter()))

    def sha256(self) -> str:
        return base.hash_files([self.path], self.path.parent)

    def runs(self, max_elements: int) -> list[tuple[int, int]]:
        if len(self._names) > 1:
            step = self._step(max_elements)
            return [(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step)]
        with self._matrices() as (matrix,):
            return matrix.runs(max_elements)

    def _step(self, elements: int) -> int:
        return max(1, int(elements * self.shape[0] / max(self.n_stored, 1)))

    def _rows(self, first: int, last: int, scratch: pathlib.Path | None) -> Iterator[sparse.csr_matrix]:
        with self._matrices() as matrices:
            if len(matrices) == 1:
                yield from map(self._features[0].take, matrices[0].rows(first, last, scratch))
                return
            step = self._step(base.CHUNK_ELEMENTS)
            for start in range(first, last, step):
                yield sparse.hstack(
                    [
                        self._genome(i, matrix, start, min(start + step, last))
                        for i, matrix in enumerate(matrices)
                    ],
                    format="csr",
                )

    def _genome(self, i: int, matrix: Compressed, first: int, last: int) -> sparse.csr_matrix:
        """Cells first..last x genes of one genome."""
        place, features = self._place[i], self._features[i]
        rows = np.arange(first, last) if place is None else place[first:last]
        there = rows[rows >= 0]
        low, high = (int(there.min()), int(there.max()) + 1) if len(there) else (0, 0)
        pieces = [features.take(piece) for piece in matrix.rows(low, high, None)]
        # One row more, which is empty: that of a barcode that this genome does not have.
        empty = sparse.csr_matrix((1, len(features.var)), dtype=np.int32)
        stacked = sparse.vstack([*pieces, empty], format="csr")
        return stacked[np.where(rows >= 0, rows - low, high - low)]

    def _heads(self) -> dict[str, np.ndarray]:
        with self._matrices() as matrices:
            return {"X": np.concatenate([m.data(0, min(100_000, m.n_stored)) for m in matrices])}


def _texts(dataset: h5py.Dataset) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in dataset[:]]
