"""The bytes of one corpus part: an AnnData zarr v3 group and its index arrays.

The group is written here directly, not through ``AnnData.write_zarr``: the same cells give the same bytes
whatever the version of anndata, shards are written one at a time, and only encodings that every reader since
anndata 0.8 knows are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numcodecs.blosc
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from scjax.genes import Vocabulary

BLOCK = 1024  # rows per entry of blocks.npy
PART_CELLS = 2**18
INNER = 2**18  # elements per inner chunk: the unit of decoding
SHARD = 2**25  # elements per shard: the unit of storage

# profile -> array -> (compressor, level, shuffle); None stores the bytes as they are.
CODECS: dict[str, dict[str, tuple[str, int, str] | None]] = {
    "fast": {"indices": ("lz4", 3, "shuffle"), "data": ("lz4", 5, "bitshuffle")},
    "balanced": {"indices": ("lz4", 3, "shuffle"), "data": ("zstd", 1, "shuffle")},
    "small": {"indices": ("zstd", 1, "shuffle"), "data": ("zstd", 1, "shuffle")},
    "local": {"indices": None, "data": None},
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the counts of every part of a corpus are stored.

    Attributes:
      codec: a key of CODECS.
      part_cells: most cells in a part.
      inner: elements per inner chunk.
      shard: elements per shard, a multiple of ``inner``.
    """

    codec: str = "fast"
    part_cells: int = PART_CELLS
    inner: int = INNER
    shard: int = SHARD

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec={self.codec!r}: there are {', '.join(CODECS)}")
        if self.part_cells < 1 or self.inner < 1:
            raise ValueError(f"part_cells={self.part_cells} and inner={self.inner} must be at least 1")
        if self.shard < self.inner or self.shard % self.inner:
            raise ValueError(f"shard={self.shard} must be a multiple of inner={self.inner}")


def index_dtype(n_genes: int) -> np.dtype:
    """Smallest of uint16 and uint32 that holds every gene id and one value more (the fill value)."""
    return np.dtype(np.uint16 if n_genes < 2**16 else np.uint32)


def x_dtype(largest: float, whole: bool) -> np.dtype:
    """Smallest of uint16 and uint32 that holds every count; float32 where some are fractions."""
    return np.dtype(np.float32 if not whole else np.uint16 if largest < 2**16 else np.uint32)


def write_part(
    path: pathlib.Path,
    *,
    layout: Layout,
    vocabulary: Vocabulary,
    indptr: np.ndarray,
    indices: Iterable[np.ndarray],
    data: Iterable[np.ndarray],
    dtypes: tuple[np.dtype, np.dtype],
    obs_index: np.ndarray,
    obs: Mapping[str, Any],
    uns: Mapping[str, str],
) -> None:
    """Writes one AnnData group.

    Args:
      path: the new .zarr folder.
      indptr: int64 [n_cells + 1].
      indices, data: the stored elements in pieces of ``layout.shard`` (the last may be shorter).
      dtypes: of indices and data on disk.
      obs_index: names of the cells, unique.
      obs: column -> array (numbers, booleans, object array of str) or (codes, categories).
      uns: written as ``uns["scjax"]``.
    """
    group = zarr.open_group(
        path, mode="w-", zarr_format=3, attributes={"encoding-type": "anndata", "encoding-version": "0.1.0"}
    )
    n_cells, nnz = len(indptr) - 1, int(indptr[-1])
    x = _group(group, "X", "csr_matrix", shape=[n_cells, len(vocabulary)])
    with _one_blosc_thread():
        for name, pieces, dtype, size in (
            ("indptr", [indptr], np.dtype(np.int64), n_cells + 1),
            ("indices", indices, dtypes[0], nnz),
            ("data", data, dtypes[1], nnz),
        ):
            _write_sharded(x, name, pieces, dtype, size, layout)
    _write_frame(group, "obs", obs_index, obs)
    var = {field: np.array(getattr(vocabulary, field), object) for field in ("symbol", "species", "biotype")}
    _write_frame(group, "var", np.array(vocabulary.gene_id, object), var)
    for name in ("layers", "obsm", "varm", "obsp", "varp"):
        _group(group, name, "dict")
    notes = _group(_group(group, "uns", "dict"), "scjax", "dict")
    for name, value in uns.items():
        _write_array(notes, name, np.array(value, object), "string")
    with (
        warnings.catch_warnings()
    ):  # zarr warns that consolidated metadata are not in the v3 specification yet
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(path)


@contextlib.contextmanager
def _one_blosc_thread() -> Iterator[None]:
    """Blosc's threads lay their blocks down in the order in which they finish: one thread, one result."""
    before = numcodecs.blosc.use_threads
    numcodecs.blosc.use_threads = False
    try:
        yield
    finally:
        numcodecs.blosc.use_threads = before


def _write_sharded(
    group: zarr.Group, name: str, pieces: Iterable[np.ndarray], dtype: np.dtype, size: int, layout: Layout
) -> None:
    compressor = CODECS[layout.codec]["data" if name == "data" else "indices"]
    codecs: list[Any] = [Crc32cCodec()]
    if compressor is not None:
        cname, level, shuffle = compressor
        codecs.insert(
            0,
            BloscCodec(cname=cname, clevel=level, shuffle=shuffle, typesize=dtype.itemsize),  # type: ignore[arg-type]
        )
    array = group.create_array(
        name,
        shape=(size,),
        dtype=dtype,
        chunks=(layout.inner,),
        shards=(layout.shard,),
        compressors=codecs,
        filters=None,
        # zarr leaves out a chunk of fill values only: no gene has this id, and no stored count is 0.
        fill_value=int(np.iinfo(dtype).max) if name == "indices" else 0,
    )
    start = 0
    for piece in pieces:
        array[start : start + len(piece)] = piece.astype(dtype, copy=False)
        start += len(piece)
    if start != size:
        raise ValueError(f"{group.path}/{name}: {start} elements written, {size} expected")


def _group(parent: zarr.Group, name: str, kind: str, **attributes: Any) -> zarr.Group:
    version = "0.2.0" if kind in ("dataframe", "categorical") else "0.1.0"
    return parent.create_group(
        name, attributes={"encoding-type": kind, "encoding-version": version, **attributes}
    )


def _write_array(group: zarr.Group, name: str, values: np.ndarray, kind: str | None = None) -> None:
    text = values.dtype == object
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=str if text else values.dtype,
        chunks=tuple(max(1, min(n, 2**16)) for n in values.shape),
        compressors=[ZstdCodec(level=3)],
        fill_value="" if text else 0,
        attributes={
            "encoding-type": kind or ("string-array" if text else "array"),
            "encoding-version": "0.2.0",
        },
    )
    array[...] = values


def _write_frame(group: zarr.Group, name: str, index: np.ndarray, columns: Mapping[str, Any]) -> None:
    attributes = {"_index": "_index", "column-order": list(columns)}
    frame = _group(group, name, "dataframe", **attributes)
    _write_array(frame, "_index", index)
    for column, values in columns.items():
        if isinstance(values, tuple):
            codes, categories = values
            categorical = _group(frame, column, "categorical", ordered=False)
            small = np.min_scalar_type(-max(len(categories), 1))  # signed, holds -1 and every code
            _write_array(categorical, "codes", codes.astype(small))
            _write_array(categorical, "categories", np.array(categories, object))
        else:
            _write_array(frame, column, values)
