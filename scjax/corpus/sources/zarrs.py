"""An AnnData zarr store, version 2 or 3, as a source."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from scipy import sparse

from scjax.corpus.sources import base
from scjax.corpus.sources.base import Source
from scjax.corpus.sources.matrix import Compressed, Read, dense_rows, dense_runs


def is_group(path: pathlib.Path) -> bool:
    """Whether a folder is a zarr group."""
    return (path / "zarr.json").is_file() or (path / ".zgroup").is_file()


def is_store(path: pathlib.Path) -> bool:
    """Whether a folder is meant as an AnnData zarr store: a group with obs, var or a matrix X."""
    return is_group(path) and any((path / name).is_dir() for name in ("obs", "var", "X"))


class ZarrSource(Source):
    """A folder that anndata wrote with ``write_zarr`` (X, raw and layers; CSR, CSC or dense)."""

    def __init__(self, path: pathlib.Path, name: str, layer: str) -> None:
        self.name, self.file, self.layer, self.path = name, path.name, layer, path
        self.where = f"{path}, {base.title(layer)}"
        self._key = layer if layer == "X" else "raw/X" if layer == "raw" else f"layers/{layer}"
        self._var_key = "raw/var" if layer == "raw" else "var"
        self._frames: dict[str, pd.DataFrame] = {}
        with self._open() as group:
            matrix = group[self._key]
            if isinstance(matrix, zarr.Group):
                missing = [part for part in ("data", "indices", "indptr") if part not in matrix]
                if missing:
                    raise ValueError(
                        f"{self.where}: damaged: a sparse matrix without {' and '.join(missing)}"
                    )
                shape: Any = matrix.attrs.get("shape")
                self.n_stored = int(matrix["data"].shape[0])  # type: ignore[union-attr]
            else:
                shape = matrix.shape
                self.n_stored = int(np.prod(shape))
            if shape is None or len(shape) != 2:
                raise ValueError(f"{self.where}: not a matrix (shape {shape})")
        self.shape = base.check_shape(self.where, [int(n) for n in shape], len(self.obs), len(self.var))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_frames": {}}

    @contextlib.contextmanager
    def _open(self) -> Iterator[zarr.Group]:
        """The store. What goes wrong while it is read names the folder."""
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder")
        try:
            group = zarr.open_group(self.path, mode="r", use_consolidated=False)
            missing = [key for key in ("obs", "var") if key not in group]
            if missing:
                raise ValueError(
                    f"{self.path}: no {' and no '.join(missing)}, so not an AnnData store; "
                    f"it holds: {', '.join(sorted(group))}"
                )
            if self._key not in group or group[self._key].attrs.get("encoding-type") == "null":
                there = [n for n, key in (("X", "X"), ("raw", "raw/X")) if key in group]
                layers: Any = group["layers"] if "layers" in group else ()
                raise base.no_layer(str(self.path), self.layer, [*there, *sorted(layers)])
            yield group
        except (KeyError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the scratch folder, or the disk
                raise
            if str(self.path) in str(error):
                raise
            raise ValueError(f"{self.path}: damaged: reading failed ({_short(error)})") from error
        except RuntimeError as error:  # what a codec says of bytes that it cannot decode
            raise OSError(f"{self.path}: damaged: reading failed ({_short(error)})") from error

    def _frame(self, key: str) -> pd.DataFrame:
        if key not in self._frames:
            with self._open() as group:
                try:
                    self._frames[key] = ad.io.read_elem(group[key])
                except (KeyError, ValueError, OSError, TypeError, RuntimeError) as error:
                    raise ValueError(f"{self.path}: cannot read {key} ({_short(error)})") from error
        return self._frames[key]

    @property
    def obs(self) -> pd.DataFrame:
        return self._frame("obs")

    @property
    def var(self) -> pd.DataFrame:
        return self._frame(self._var_key)

    @contextlib.contextmanager
    def obsm(self) -> Iterator[Mapping[str, Any]]:
        with self._open() as group:
            found: Any = dict(group["obsm"].members()) if "obsm" in group else {}  # type: ignore[union-attr]
            yield found

    def _files(self) -> list[pathlib.Path]:
        return sorted(path for path in self.path.rglob("*") if path.is_file())

    def sha256(self) -> str:
        return base.hash_files(self._files(), self.path)

    def _compressed(self, group: zarr.Group) -> Compressed:
        kind = group.attrs.get("encoding-type")
        if kind not in ("csr_matrix", "csc_matrix"):
            raise ValueError(f"{self.where}: encoding {kind!r}; a matrix is dense, csr_matrix or csc_matrix")
        arrays: Any = [group[name] for name in ("data", "indices", "indptr")]
        data, indices, indptr = (self._vector(array) for array in arrays)

        def checked(low: int, high: int) -> np.ndarray:
            # A chunk of zeros alone is not stored, and zarr reads a chunk that is lost as zeros. Of gene
            # numbers, zeros alone are a lost chunk where any row has two of them.
            for start, end in self._missing(arrays[1], low, high):
                if (np.diff(np.clip(indptr(0, arrays[2].shape[0]), start, end)) > 1).any():
                    raise self._lost(arrays[1], start, end)
            return indices(low, high)

        def stored(low: int, high: int) -> np.ndarray:
            for start, end in self._missing(arrays[0], low, high):
                raise self._lost(arrays[0], start, end)
            return data(low, high)

        by_row = kind == "csr_matrix"
        matrix = Compressed(self.where, self.shape, by_row, self.n_stored, stored, checked, indptr)
        matrix.check(arrays[1].shape[0], arrays[2].shape[0])
        return matrix

    @staticmethod
    def _vector(array: Any) -> Read:
        return lambda low, high: np.asarray(array[low:high])

    def _missing(self, array: Any, low: int, high: int) -> Iterator[tuple[int, int]]:
        """The ranges of elements within [low, high) whose file is not there."""
        length = (array.shards or array.chunks)[0]
        for chunk in range(low // length, -(-high // length)):
            if not (self.path / array.path / array.metadata.encode_chunk_key((chunk,))).is_file():
                yield chunk * length, min((chunk + 1) * length, array.shape[0])

    def _lost(self, array: Any, start: int, end: int) -> ValueError:
        return ValueError(f"{self.path}: damaged: elements {start} to {end} of {array.path} are missing")

    def runs(self, max_elements: int) -> list[tuple[int, int]]:
        with self._open() as group:
            matrix: Any = group[self._key]
            if isinstance(matrix, zarr.Group):
                return self._compressed(matrix).runs(max_elements)
            return dense_runs(self.shape, (matrix.shards or matrix.chunks)[0], max_elements)

    def _rows(self, first: int, last: int, scratch: pathlib.Path | None) -> Iterator[sparse.csr_matrix]:
        with self._open() as group:
            matrix: Any = group[self._key]
            if isinstance(matrix, zarr.Group):
                yield from self._compressed(matrix).rows(first, last, scratch)
            else:
                yield from dense_rows(lambda low, high: matrix[low:high], self.shape[1], first, last)

    def _heads(self) -> dict[str, np.ndarray]:
        heads = {}
        with self._open() as group:
            layers: Any = group["layers"] if "layers" in group else ()
            keys = {"X": "X", "raw": "raw/X", **{name: f"layers/{name}" for name in layers}}
            for name, key in keys.items():
                matrix: Any = group[key] if key in group else None
                if isinstance(matrix, zarr.Array):
                    heads[name] = np.asarray(matrix[:100])
                elif matrix is not None and "data" in matrix:
                    heads[name] = matrix["data"][:100_000]
        return heads


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
