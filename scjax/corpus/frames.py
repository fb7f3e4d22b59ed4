"""The AnnData group of a part, all but the counts.

The group is written here directly, not through ``AnnData.write_zarr``: the same cells give the same bytes
whatever the version of anndata, and only encodings that every reader since anndata 0.8 knows are used.
"""

from __future__ import annotations

import contextlib
import pathlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numcodecs.blosc
import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from scjax.genes import Vocabulary


def new_part(path: pathlib.Path) -> zarr.Group:
    """The new group of a part, empty."""
    return zarr.open_group(
        path, mode="w-", zarr_format=3, attributes={"encoding-type": "anndata", "encoding-version": "0.1.0"}
    )


def write_frames(
    group: zarr.Group,
    path: pathlib.Path,
    *,
    vocabulary: Vocabulary,
    obs_index: np.ndarray,
    obs: Mapping[str, Any],
    uns: Mapping[str, str],
    features: Mapping[str, Sequence[str]],
) -> None:
    """Writes everything beside X and obsm, which must be there already, and finishes the group.

    Args:
      group, path: the group and its folder.
      obs_index: names of the cells, unique.
      obs: column -> array (numbers, booleans, object array of str) or (codes, categories).
      uns: written as ``uns["scjax"]``.
      features: key of obsm -> names of its columns, written as ``uns["scjax"]["features"]``.
    """
    _write_frame(group, "obs", obs_index, obs)
    var = {field: np.array(getattr(vocabulary, field), object) for field in ("symbol", "species", "biotype")}
    _write_frame(group, "var", np.array(vocabulary.gene_id, object), var)
    for name in ("layers", "varm", "obsp", "varp"):
        add_group(group, name, "dict")
    notes = add_group(add_group(group, "uns", "dict"), "scjax", "dict")
    for name, value in uns.items():
        _write_array(notes, name, np.array(value, object), "string")
    if features:
        tables = add_group(notes, "features", "dict")
        for name, names in features.items():
            _write_array(tables, name, np.array(names, object))
    # zarr warns that consolidated metadata are not in the v3 specification yet; the filter is the process's
    with _warnings_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(path)


_warnings_lock = threading.Lock()
_blosc_lock = threading.Lock()
_blosc_users: list[bool | None] = []  # what was set before, once for everybody who is inside


@contextlib.contextmanager
def one_blosc_thread() -> Iterator[None]:
    """Blosc's threads lay their blocks down in the order in which they finish: one thread, one result.

    The setting is the process's, so it stays until the last of several threads has left.
    """
    with _blosc_lock:
        _blosc_users.append(numcodecs.blosc.use_threads)
        numcodecs.blosc.use_threads = False
    try:
        yield
    finally:
        with _blosc_lock:
            first = _blosc_users[0]
            _blosc_users.pop()
            if not _blosc_users:
                numcodecs.blosc.use_threads = first


def add_group(parent: zarr.Group, name: str, kind: str, **attributes: Any) -> zarr.Group:
    """A new group below another, with the attributes by which AnnData knows its kind."""
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
    frame = add_group(group, name, "dataframe", **attributes)
    _write_array(frame, "_index", index)
    for column, values in columns.items():
        if isinstance(values, tuple):
            codes, categories = values
            categorical = add_group(frame, column, "categorical", ordered=False)
            small = np.min_scalar_type(-max(len(categories), 1))  # signed, holds -1 and every code
            _write_array(categorical, "codes", codes.astype(small))
            _write_array(categorical, "categories", np.array(categories, object))
        else:
            _write_array(frame, column, values)
