"""Where counts come from: an .h5ad file or an AnnData in memory, read in runs of rows."""

from __future__ import annotations

import abc
import contextlib
import errno
import hashlib
import pathlib
import tempfile
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from scjax.corpus.counts import CountsError, validate_counts

CHUNK_ELEMENTS = 2**23  # stored values held in memory at a time


class Source(abc.ABC):
    """One study: cells x genes of counts, with ``obs`` and ``var``.

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

    @abc.abstractmethod
    def sha256(self) -> str:
        """Hash of the file's bytes, or of the counts and names of an AnnData in memory."""

    @abc.abstractmethod
    def _rows(self, scratch: pathlib.Path | None) -> Iterator[sparse.csr_matrix]:
        """All rows in order, at most about CHUNK_ELEMENTS stored values at a time."""

    @abc.abstractmethod
    def _heads(self) -> dict[str, np.ndarray]:
        """Layer -> some of its first stored values, for every matrix of the study."""

    def check_head(self) -> None:
        """A quick look, before hours of reading: raises CountsError if the first values are no counts."""
        head = self._heads().get(self.layer)
        if head is None or not _whole(head):
            with contextlib.closing(self.counts()) as counts:
                next(counts)

    def counts(
        self, *, allow_non_integer: bool = False, scratch: pathlib.Path | None = None
    ) -> Generator[tuple[int, sparse.csr_matrix], None, None]:
        """Yields (first row, counts of a run of rows), checked, indices sorted, no stored zeros.

        Args:
          allow_non_integer: see ``validate_counts``.
          scratch: folder for temporary files (a large CSC matrix is turned there); default: the system's.

        Raises:
          CountsError: the matrix does not hold counts; names cell and gene, and a layer that does.
          OSError, ValueError: the file is damaged.
        """
        genes, cells = self.var.index, self.obs.index
        first = 0
        for rows in self._rows(scratch):
            try:
                validate_counts(
                    rows,
                    source=self.where,
                    genes=genes,
                    cells=cells[first : first + rows.shape[0]],
                    first_row=first,
                    allow_non_integer=allow_non_integer,
                )
            except CountsError as error:
                heads = self._heads()
                others = [name for name in heads if name != self.layer and _whole(heads[name])]
                hint = f"; whole numbers are in: {', '.join(others)} (pass layer=...)" if others else ""
                raise CountsError(f"{error}{hint}") from None
            rows.sum_duplicates()
            rows.eliminate_zeros()
            yield first, rows
            first += rows.shape[0]


def open_source(data: Any, *, name: str | None = None, layer: str | None = None) -> Source:
    """Opens an .h5ad file (CSR, CSC or dense) or takes an AnnData.

    Args:
      data: path or AnnData.
      name: data set name; default: the file's stem, "adata" in memory.
      layer: where the counts are: None or "X", "raw", or the name of a layer.

    Raises:
      FileNotFoundError, OSError, ValueError, KeyError: no such file, not HDF5, truncated, not an AnnData,
        no such matrix (those there are are listed).
    """
    if isinstance(data, ad.AnnData):
        return MemorySource(data, name or default_name(data), layer or "X")
    if isinstance(data, str | pathlib.Path):
        return H5adSource(pathlib.Path(data), name or default_name(data), layer or "X")
    raise ValueError(f"a source is a path to an .h5ad file or an AnnData, not {type(data).__name__}")


def default_name(data: Any) -> str:
    """The name of a data set that was given none."""
    return pathlib.Path(data).stem if isinstance(data, str | pathlib.Path) else "adata"


def _check_shape(where: str, shape: Sequence[int], obs: int, var: int) -> tuple[int, int]:
    if tuple(shape) != (obs, var):
        raise ValueError(
            f"{where}: the matrix is {shape[0]} x {shape[1]}, but obs has {obs} rows and var {var}"
        )
    if not obs or not var:
        raise ValueError(f"{where}: the matrix is empty ({obs} cells x {var} genes)")
    return obs, var


def _plain(values: np.ndarray) -> np.ndarray:
    """Values of a type that scipy can work with: native byte order, no half floats, no booleans."""
    same = {"float16": np.float32, "bool": np.uint8}.get(values.dtype.name, values.dtype.newbyteorder("="))
    return values.astype(same, copy=False)


def _whole(values: np.ndarray) -> bool:
    if values.dtype.kind not in "biuf":
        return False
    return bool(((values >= 0) & (values < np.inf) & (np.floor(values) == values)).all())


class MemorySource(Source):
    """An AnnData in memory, or backed by a file."""

    def __init__(self, adata: ad.AnnData, name: str, layer: str) -> None:
        self.name, self.file, self.layer = name, None, layer
        self.where = f"AnnData {name!r}, {_title(layer)}"
        self._adata = adata
        if layer == "X":
            self._matrix = adata.X
        elif layer == "raw":
            self._matrix = None if adata.raw is None else adata.raw.X
        else:
            self._matrix = adata.layers[layer] if layer in adata.layers else None
        if self._matrix is None:
            there = [
                n
                for n, m in (("X", adata.X), ("raw", adata.raw), *adata.layers.items())
                if n and m is not None
            ]
            raise KeyError(
                f"AnnData {name!r}: no {_title(layer)}; there are: {', '.join(there) or 'no matrices'}"
            )
        self.shape = _check_shape(self.where, self._matrix.shape, len(self.obs), len(self.var))
        self.n_stored = self._matrix.nnz if sparse.issparse(self._matrix) else self.shape[0] * self.shape[1]

    @property
    def obs(self) -> pd.DataFrame:
        return self._adata.obs

    @property
    def var(self) -> pd.DataFrame:
        return self._adata.raw.var if self.layer == "raw" else self._adata.var

    def sha256(self) -> str:
        digest = hashlib.sha256("\n".join([*self.var.index, "", *self.obs.index]).encode())
        for rows in self._rows(None):
            rows.sort_indices()
            for part in (
                np.diff(rows.indptr).astype("<i8"),
                rows.indices.astype("<i8"),
                rows.data.astype("<f8"),
            ):
                digest.update(part.tobytes())
        return digest.hexdigest()

    def _rows(self, scratch: pathlib.Path | None) -> Iterator[sparse.csr_matrix]:
        matrix = self._matrix
        if sparse.issparse(matrix):
            matrix = matrix.tocsr()
            density = matrix.nnz / self.shape[0]
        else:
            density = self.shape[1]
        step = max(1, int(CHUNK_ELEMENTS / max(density, 1)))
        for start in range(0, self.shape[0], step):
            rows = sparse.csr_matrix(matrix[start : start + step], copy=True)
            rows.data = _plain(rows.data)
            yield rows

    def _heads(self) -> dict[str, np.ndarray]:
        matrices = {**self._adata.layers, "X": self._adata.X}
        matrices.pop(None, None)  # what anndata 0.13 calls X among the layers
        if self._adata.raw is not None:
            matrices["raw"] = self._adata.raw.X
        heads = {}
        for name, matrix in matrices.items():
            if matrix is not None:
                head = matrix[:100]
                heads[name] = head.data if sparse.issparse(head) else np.asarray(head)
        return heads


class H5adSource(Source):
    """An .h5ad file. It is opened for each use, so that thousands of sources need no open files."""

    def __init__(self, path: pathlib.Path, name: str, layer: str) -> None:
        self.name, self.file, self.layer, self.path = name, path.name, layer, path
        self.where = f"{path}, {_title(layer)}"
        self._key = layer if layer == "X" else "raw/X" if layer == "raw" else f"layers/{layer}"
        self._var_key = "raw/var" if layer == "raw" else "var"
        with self._open() as file:
            for key in ("obs", self._var_key):
                if key in file and not isinstance(file[key], h5py.Group):
                    raise ValueError(
                        f"{path}: {key} is in the layout of anndata before 0.7; "
                        "read and write the file once with a current anndata"
                    )
            self._obs, self._var = self._frame(file, "obs"), self._frame(file, self._var_key)
            matrix = file[self._key]
            parts = () if isinstance(matrix, h5py.Dataset) else ("data", "indices", "indptr")
            missing = [part for part in parts if part not in matrix]
            if missing:
                raise ValueError(f"{self.where}: damaged: a sparse matrix without {' and '.join(missing)}")
            shape = matrix.shape if isinstance(matrix, h5py.Dataset) else _sparse_attribute(matrix, "shape")
            if shape is None or len(shape) != 2:
                raise ValueError(f"{self.where}: not a matrix (shape {shape})")
            self.shape = _check_shape(self.where, [int(n) for n in shape], len(self._obs), len(self._var))
            stored = matrix if isinstance(matrix, h5py.Dataset) else matrix["data"]
            self.n_stored = int(np.prod(stored.shape))

    @contextlib.contextmanager
    def _open(self) -> Iterator[h5py.File]:
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file")
        if self.path.is_dir():
            raise ValueError(f"{self.path}: is a folder; a source is an .h5ad file")
        if not h5py.is_hdf5(self.path):
            raise ValueError(f"{self.path}: not an HDF5 file; a source is an .h5ad file written by anndata")
        try:
            file = h5py.File(self.path, "r")
        except OSError as error:
            raise OSError(f"{self.path}: damaged or truncated, HDF5 cannot open it ({error})") from error
        with file:
            missing = [key for key in ("obs", "var") if key not in file]
            if missing:
                raise ValueError(
                    f"{self.path}: no {' and no '.join(missing)}, so not an AnnData file; "
                    f"it holds: {', '.join(file)}"
                )
            if self._key not in file or file[self._key].attrs.get("encoding-type") == "null":
                there = [n for n, key in (("X", "X"), ("raw", "raw/X")) if key in file]
                there += list(file.get("layers", ()))
                raise KeyError(
                    f"{self.path}: no {_title(self.layer)}; there are: {', '.join(there) or 'no matrices'}"
                )
            try:
                yield file
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of the scratch folder, not of this file
                    raise
                raise OSError(f"{self.path}: damaged or truncated, reading failed ({error})") from error

    def _frame(self, file: h5py.File, key: str) -> pd.DataFrame:
        try:
            return ad.io.read_elem(file[key])
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise ValueError(f"{self.path}: cannot read {key} ({error})") from error

    @property
    def obs(self) -> pd.DataFrame:
        return self._obs

    @property
    def var(self) -> pd.DataFrame:
        return self._var

    def sha256(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _rows(self, scratch: pathlib.Path | None) -> Iterator[sparse.csr_matrix]:
        with self._open() as file:
            matrix = file[self._key]
            if isinstance(matrix, h5py.Dataset):
                step = max(1, CHUNK_ELEMENTS // self.shape[1])
                for start in range(0, self.shape[0], step):
                    yield sparse.csr_matrix(_plain(matrix[start : start + step]))
                return
            kind = _sparse_attribute(matrix, "encoding-type")
            if kind not in ("csr_matrix", "csc_matrix"):
                raise ValueError(
                    f"{self.where}: encoding {kind!r}; a matrix is dense, csr_matrix or csc_matrix"
                )
            major, minor = self.shape if kind == "csr_matrix" else self.shape[::-1]
            indptr = matrix["indptr"][:].astype(np.int64)
            n = matrix["data"].shape[0]
            if len(indptr) != major + 1 or indptr[0] != 0 or indptr[-1] != n or (np.diff(indptr) < 0).any():
                raise ValueError(f"{self.where}: damaged: indptr does not describe the {n} stored values")

            runs = _runs(indptr, CHUNK_ELEMENTS)
            pieces = (self._piece(matrix, indptr, minor, start, end) for start, end in runs)
            yield from pieces if kind == "csr_matrix" else _turn(pieces, self.shape, n, scratch)

    def _piece(
        self, matrix: h5py.Group, indptr: np.ndarray, minor: int, start: int, end: int
    ) -> sparse.csr_matrix:
        """Rows (of a CSC matrix: columns) start..end as CSR."""
        low, high = indptr[start], indptr[end]
        indices = matrix["indices"][low:high]
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < minor:
            raise ValueError(
                f"{self.where}: damaged: indices outside 0..{minor - 1} between {start} and {end}"
            )
        parts = _plain(matrix["data"][low:high]), indices.astype(np.int32), indptr[start : end + 1] - low
        return sparse.csr_matrix(parts, shape=(end - start, minor))

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


def _title(layer: str) -> str:
    return {"X": "X", "raw": "raw.X"}.get(layer, f"layer {layer!r}")


def _sparse_attribute(group: h5py.Group, name: str) -> Any:
    old = {"encoding-type": "h5sparse_format", "shape": "h5sparse_shape"}[name]  # anndata before 0.7
    if name in group.attrs:
        return group.attrs[name]
    value = group.attrs.get(old)
    return f"{value}_matrix" if isinstance(value, str) else value


def _runs(indptr: np.ndarray, elements: int) -> Iterator[tuple[int, int]]:
    """Cuts rows into runs of at most ``elements`` stored values (at least one row)."""
    start, n = 0, len(indptr) - 1
    while start < n:
        end = int(np.searchsorted(indptr, indptr[start] + elements, side="right")) - 1
        end = min(max(end, start + 1), n)
        yield start, end
        start = end


def _turn(
    columns: Iterator[sparse.csr_matrix], shape: tuple[int, int], nnz: int, scratch: pathlib.Path | None
) -> Iterator[sparse.csr_matrix]:
    """Column runs of a CSC matrix -> runs of rows, through temporary files where memory would not do."""
    step = max(1, int(shape[0] * CHUNK_ELEMENTS / max(nnz, 1)))
    groups = -(-shape[0] // step)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="turn-") as folder:
        first = 0
        held: list[list[np.ndarray]] = [[] for _ in range(groups)]
        dtype: Any = None
        for run in columns:
            part = sparse.coo_matrix(run)
            rows, genes = part.col, part.row + first
            first, dtype = first + run.shape[0], part.data.dtype
            record = np.empty(len(rows), [("row", "i4"), ("gene", "i4"), ("value", dtype)])
            record["row"], record["gene"], record["value"] = rows, genes, part.data
            record = record[np.argsort(rows // step, kind="stable")]
            cuts = np.searchsorted(record["row"] // step, np.arange(groups + 1))
            for group in range(groups):
                piece = record[cuts[group] : cuts[group + 1]]
                if nnz <= CHUNK_ELEMENTS:
                    held[group].append(piece)
                elif len(piece):
                    with open(f"{folder}/{group}", "ab") as file:
                        file.write(piece.tobytes())
        for group in range(groups):
            path = pathlib.Path(folder, str(group))
            record = (
                np.fromfile(path, record.dtype)
                if path.exists()
                else np.concatenate(held[group] or [record[:0]])
            )
            size = min(step, shape[0] - group * step), shape[1]
            yield sparse.csr_matrix(
                (record["value"], (record["row"] - group * step, record["gene"])), shape=size
            )
            path.unlink(missing_ok=True)
