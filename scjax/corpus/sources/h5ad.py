"""An .h5ad file as a source."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from scjax.corpus.sources import base
from scjax.corpus.sources.base import Source
from scjax.corpus.sources.hdf5 import opened, vector
from scjax.corpus.sources.matrix import Compressed, dense_rows, dense_runs


class H5adSource(Source):
    """An .h5ad file (CSR, CSC or dense). It is opened for each use: thousands of them need no open files."""

    def __init__(self, path: pathlib.Path, name: str, layer: str) -> None:
        self.name, self.file, self.layer, self.path = name, path.name, layer, path
        self.where = f"{path}, {base.title(layer)}"
        self._key = layer if layer == "X" else "raw/X" if layer == "raw" else f"layers/{layer}"
        self._var_key = "raw/var" if layer == "raw" else "var"
        self._frames: dict[str, pd.DataFrame] = {}
        with self._open() as file:
            for key in ("obs", self._var_key):
                if key in file and not isinstance(file[key], h5py.Group):
                    raise ValueError(
                        f"{path}: {key} is in the layout of anndata before 0.7; "
                        "read and write the file once with a current anndata"
                    )
            obs, var = self._frame("obs", file), self._frame(self._var_key, file)
            matrix = file[self._key]
            parts = () if isinstance(matrix, h5py.Dataset) else ("data", "indices", "indptr")
            missing = [part for part in parts if part not in matrix]
            if missing:
                raise ValueError(f"{self.where}: damaged: a sparse matrix without {' and '.join(missing)}")
            shape = matrix.shape if isinstance(matrix, h5py.Dataset) else _attribute(matrix, "shape")
            if shape is None or len(shape) != 2:
                raise ValueError(f"{self.where}: not a matrix (shape {shape})")
            self.shape = base.check_shape(self.where, [int(n) for n in shape], len(obs), len(var))
            stored = matrix if isinstance(matrix, h5py.Dataset) else matrix["data"]
            self.n_stored = int(np.prod(stored.shape))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_frames": {}}

    @contextlib.contextmanager
    def _open(self) -> Iterator[h5py.File]:
        with opened(self.path) as file:
            missing = [key for key in ("obs", "var") if key not in file]
            if missing:
                raise ValueError(
                    f"{self.path}: no {' and no '.join(missing)}, so not an AnnData file; "
                    f"it holds: {', '.join(file)}"
                )
            if self._key not in file or file[self._key].attrs.get("encoding-type") == "null":
                there = [n for n, key in (("X", "X"), ("raw", "raw/X")) if key in file]
                raise base.no_layer(str(self.path), self.layer, [*there, *file.get("layers", ())])
            yield file

    def _frame(self, key: str, file: h5py.File | None = None) -> pd.DataFrame:
        if file is None and key not in self._frames:
            with self._open() as again:
                return self._frame(key, again)
        if key not in self._frames:
            assert file is not None
            try:
                self._frames[key] = ad.io.read_elem(file[key])
            except (KeyError, ValueError, OSError, TypeError) as error:
                raise ValueError(f"{self.path}: cannot read {key} ({error})") from error
        return self._frames[key]

    @property
    def obs(self) -> pd.DataFrame:
        return self._frame("obs")

    @property
    def var(self) -> pd.DataFrame:
        return self._frame(self._var_key)

    @contextlib.contextmanager
    def obsm(self) -> Iterator[Mapping[str, Any]]:
        with self._open() as file:
            yield file.get("obsm", {})

    def sha256(self) -> str:
        return base.hash_files([self.path], self.path.parent)

    def _compressed(self, group: h5py.Group) -> Compressed:
        kind = _attribute(group, "encoding-type")
        if kind not in ("csr_matrix", "csc_matrix"):
            raise ValueError(f"{self.where}: encoding {kind!r}; a matrix is dense, csr_matrix or csc_matrix")
        read = (vector(group[name]) for name in ("data", "indices", "indptr"))
        matrix = Compressed(self.where, self.shape, kind == "csr_matrix", self.n_stored, *read)
        matrix.check(len(group["indices"]), len(group["indptr"]))
        return matrix

    def runs(self, max_elements: int) -> list[tuple[int, int]]:
        with self._open() as file:
            matrix = file[self._key]
            if isinstance(matrix, h5py.Group):
                return self._compressed(matrix).runs(max_elements)
            return dense_runs(self.shape, matrix.chunks[0] if matrix.chunks else 1, max_elements)

    def _rows(self, first: int, last: int, scratch: pathlib.Path | None) -> Iterator[sparse.csr_matrix]:
        with self._open() as file:
            matrix = file[self._key]
            if isinstance(matrix, h5py.Group):
                yield from self._compressed(matrix).rows(first, last, scratch)
            else:
                yield from dense_rows(lambda low, high: matrix[low:high], self.shape[1], first, last)

    def _heads(self) -> dict[str, np.ndarray]:
        heads = {}
        with self._open() as file:
            keys = {"X": "X", "raw": "raw/X", **{name: f"layers/{name}" for name in file.get("layers", ())}}
            for name, key in keys.items():
                matrix = file.get(key)
                if isinstance(matrix, h5py.Dataset):
                    heads[name] = np.asarray(matrix[:100])
                elif matrix is not None and "data" in matrix:
                    heads[name] = matrix["data"][:100_000]
        return heads


def _attribute(group: h5py.Group, name: str) -> Any:
    old = {"encoding-type": "h5sparse_format", "shape": "h5sparse_shape"}[name]  # anndata before 0.7
    if name in group.attrs:
        return group.attrs[name]
    value = group.attrs.get(old)
    return f"{value}_matrix" if isinstance(value, str) else value
