"""Doors for embeddings made elsewhere: files keyed by cell, and embedders that packages register.

Rows are matched by the names of cells, never by position: a file in another order gives the same scores, and
one of other cells is refused.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import anndata as ad
import numpy as np
import pandas as pd

from scjax.eval.environment import missing

ENTRY_POINTS = "scjax.embedders"
FORMATS = ".npz, .npy (names beside it), .parquet, .csv, .tsv, .h5ad"
NAMES = ("obs_names", "names", "cells", "cell_id", "barcodes", "index")  # of an array of names in an .npz


@runtime_checkable
class Embedder(Protocol):
    """Whatever turns cells into vectors.

    An embedder may also have ``random_twin()``, the same network before training: the control that shows what
    pretraining did is then scored beside it.
    """

    def embed(self, adata: ad.AnnData) -> np.ndarray:
        """Float [n_obs, dimensions]: one vector a cell, in the order of ``adata``."""
        ...


def load_embedding(
    path: str | os.PathLike[str], obs_names: Sequence[str] | None = None, *, key: str | None = None
) -> pd.DataFrame:
    """An embedding from a file.

    Args:
        path: one of

            - ``.npz``: an array [cells, dimensions] and an array of names of cells (called "obs_names",
              "names", "cells", "cell_id", "barcodes" or "index");
            - ``.npy``: an array [cells, dimensions]; the names, one a line, in ``NAME.txt`` or
              ``NAME.names.txt`` beside ``NAME.npy``;
            - ``.parquet``, ``.csv``, ``.tsv`` (also ``.gz``): names in the index or first column, then
              numbers;
            - ``.h5ad``: obsm["key"], or the only entry of obsm.
        obs_names: the cells that are wanted, in this order; None: all of the file, as they lie there. Cells
            of the file that are not asked for are left out.
        key: which array of an ``.npz`` or which obsm key of an ``.h5ad``, where there are several.

    Returns:
        float32, one row a cell, with the names as index. Whether the values can be scored is checked by the
        tasks.

    Raises:
        FileNotFoundError: no such file, or no names beside a ``.npy``. KeyError: no such ``key``.
        ValueError: a format that is not known, a shape that does not fit, names that occur twice, or cells
        that the file does not have. ImportError: pyarrow is missing for ``.parquet``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    readers: dict[str, Callable[[], tuple[Any, Any]]] = {
        ".npz": lambda: _npz(path, key),
        ".npy": lambda: _npy(path),
        ".parquet": lambda: _frame(path, _parquet(path)),
        ".csv": lambda: _frame(path, pd.read_csv(path, index_col=0)),
        ".tsv": lambda: _frame(path, pd.read_csv(path, index_col=0, sep="\t")),
        ".h5ad": lambda: _h5ad(path, key),
    }
    if kind not in readers:
        raise ValueError(
            f"{path}: embeddings are read from {FORMATS}, not from {kind or 'a file without suffix'}"
        )
    values, names = readers[kind]()
    values = np.asarray(values)
    index = pd.Index([n.decode() if isinstance(n, bytes) else str(n) for n in np.asarray(names, object)])
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise ValueError(
            f"{path}: the embedding has shape {values.shape} of {values.dtype}; numbers [cells, "
            "dimensions] are needed"
        )
    if len(index) != len(values):
        raise ValueError(f"{path}: {len(index)} names of cells for {len(values)} rows of the embedding")
    if index.has_duplicates:
        twice = index[index.duplicated()].unique()
        raise ValueError(
            f"{path}: {len(twice)} names of cells occur more than once, the first is {twice[0]!r}; make them "
            "unique before embedding (adata.obs_names_make_unique())"
        )
    table = pd.DataFrame(values.astype(np.float32), index=index)
    return table if obs_names is None else _align(table, pd.Index([str(n) for n in obs_names]), path)


def _align(table: pd.DataFrame, wanted: pd.Index, path: Path) -> pd.DataFrame:
    at = table.index.get_indexer(wanted)
    absent = wanted[at < 0]
    if len(absent):

        def bare(names: pd.Index) -> list[str]:
            return [re.sub(r"(-\d+)+$", "", n) for n in names]

        same = (
            ""
            if len(absent) < len(wanted) or not set(bare(wanted)) & set(bare(table.index))
            else ("; they differ in the suffix of the barcode only: rename the cells on one side")
        )
        raise ValueError(
            f"{path}: {len(absent)} of {len(wanted)} cells have no row there; the first is {absent[0]!r}, "
            f"names in the file look like {list(table.index[:2])}{same}"
        )
    return table.iloc[at]


def _npz(path: Path, key: str | None) -> tuple[Any, Any]:
    with np.load(path, allow_pickle=False) as file:
        try:
            arrays = {name: file[name] for name in file.files}
        except ValueError as error:
            raise ValueError(
                f"{path}: holds Python objects, which are not read ({error}); save names as text "
                "(np.asarray(names, str))"
            ) from None
    names = [n for n in NAMES if n in arrays and n != key]
    tables = [n for n, a in arrays.items() if a.ndim == 2 and a.dtype.kind in "fiu"]
    if not names:
        raise ValueError(f"{path}: no names of cells among {sorted(arrays)}; save them as 'obs_names'")
    if key is None and len(tables) != 1:
        raise ValueError(f"{path}: {len(tables)} arrays [cells, dimensions] ({tables}); say which with key=")
    if key is not None and key not in arrays:
        raise KeyError(f"{path} has no array {key!r}; it holds: {', '.join(sorted(arrays))}")
    return arrays[tables[0] if key is None else key], arrays[names[0]]


def _npy(path: Path) -> tuple[Any, Any]:
    places = [path.with_suffix(".txt"), path.with_suffix(".names.txt")]
    for place in places:
        if place.is_file():
            return np.load(path, allow_pickle=False), place.read_text().split("\n")[: _lines(place)]
    told = " or ".join(p.name for p in places)
    raise FileNotFoundError(f"{path}: the names of its cells are missing: one a line in {told} beside it")


def _lines(path: Path) -> int:
    return len(path.read_text().rstrip("\n").split("\n"))


def _parquet(path: Path) -> pd.DataFrame:
    if absent := missing("pyarrow"):
        raise ImportError(f"{path}: reading parquet needs pyarrow, which is {absent}")
    table = pd.read_parquet(path)
    if (
        isinstance(table.index, pd.RangeIndex)
        and table.shape[1]
        and not pd.api.types.is_numeric_dtype(table.dtypes.iloc[0])
    ):
        table = table.set_index(table.columns[0])
    return table


def _frame(path: Path, table: pd.DataFrame) -> tuple[Any, Any]:
    wrong = [str(c) for c in table.columns if not pd.api.types.is_numeric_dtype(table[c])]
    if wrong:
        raise ValueError(
            f"{path}: column {wrong[0]!r} is not numeric; names first, then one column a dimension"
        )
    if isinstance(table.index, pd.RangeIndex):
        raise ValueError(f"{path}: has no names of cells; save them as the index")
    return table.to_numpy(), table.index


def _h5ad(path: Path, key: str | None) -> tuple[Any, Any]:
    adata = ad.read_h5ad(path, backed="r")
    try:
        there = list(adata.obsm)
        if key is None and len(there) != 1:
            raise ValueError(f"{path}: obsm holds {', '.join(there) or 'nothing'}; say which with key=")
        if key is not None and key not in there:
            raise KeyError(f"{path}: obsm has no {key!r}; it holds: {', '.join(there) or 'nothing'}")
        values = adata.obsm[there[0] if key is None else key]
        values = values.toarray() if hasattr(values, "toarray") else values
        return np.asarray(values), list(adata.obs_names)
    finally:
        adata.file.close()


def embedder(name: str) -> Embedder:
    """The embedder that a package has registered under ``name``.

    A package registers one with an entry point of the group "scjax.embedders", in its ``pyproject.toml``::

        [project.entry-points."scjax.embedders"]
        mymodel = "mymodel.scjax:load"

    where ``load`` is called with what stands after the colon of the name ("mymodel:weights/v2", for a path or
    a size), or with nothing, and returns something with ``embed(adata)``.

    Raises:
        KeyError: nothing of that name is registered (lists what is). ValueError: a source is missing, or
        given where none is wanted. TypeError: what was made has no ``embed``.
    """
    short, _, source = name.partition(":")
    found = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if short not in found:
        raise KeyError(
            f"no embedder {short!r} is registered; there are: {', '.join(sorted(found)) or 'none'}. A "
            f"package registers one by an entry point of the group {ENTRY_POINTS!r}"
        )
    make = found[short].load()
    given = (source,) if source else ()
    try:
        inspect.signature(make).bind(*given)
    except TypeError:
        right = f"plain {short!r}" if source else f"'{short}:SOURCE', where SOURCE is its path or name"
        raise ValueError(f"the embedder {name!r} cannot be made so; write {right}") from None
    made = make(*given)
    if not isinstance(made, Embedder):
        raise TypeError(
            f"the embedder {short!r} ({found[short].value}) gave a {type(made).__name__} without embed(adata)"
        )
    return made
