"""Numbers of each cell beside its counts: numeric columns of obs and matrices of obsm, as float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from scipy import sparse

from scjax.corpus.panels import Panel, numbers
from scjax.corpus.sources.base import Source

_ARRAYS = (np.ndarray, h5py.Dataset, zarr.Array)
_GROUPS = (h5py.Group, zarr.Group)


@dataclasses.dataclass(frozen=True)
class Value(Panel):
    """A value of a source.

    Attributes:
      key: of the obs column, or of the obsm matrix.
    """

    key: str


def list_values(source: Source) -> list[str]:
    """Names that ``find_value`` finds: the numeric columns of obs, and the keys of obsm."""
    with source.obsm() as obsm:
        keys = list(obsm)
    return [*(str(name) for name in source.obs if _numeric(source.obs[name].dtype)), *keys]


def find_value(
    source: Source, name: str, column: str | None = None, others: Sequence[str] = ()
) -> Value | None:
    """Looks for an obsm matrix of a name, or an obs column.

    Args:
      name: of the value.
      column: of the obs column, where that is spelt differently.
      others: other names that the matrix may have, the most wanted first.

    Returns:
      None where the source has neither.

    Raises:
      ValueError: it has both; the column does not hold numbers; the matrix has no rows of features, not one
        row for each cell, or two features of one name. Names the source and what was found.
    """
    column = name if column is None else column
    where = f"{source.where}: {name}"
    with source.obsm() as obsm:
        key = next((key for key in (name, *others) if key in obsm), None)
        if key is None:
            if column not in source.obs:
                return None
            dtype = source.obs[column].dtype
            if not _numeric(dtype):
                shown = ", ".join(map(repr, source.obs[column].unique()[:3]))
                raise ValueError(f"{where}: the obs column {column!r} holds no numbers but {dtype}: {shown}")
            return Value(True, (name,), column)
        if key in source.obs:
            raise ValueError(f"{where}: is a column of obs and a matrix of obsm as well; rename one of them")
        matrix = obsm[key]
        features = _features(matrix)
        if features is None:
            raise ValueError(f"{where}: obsm holds {_shown(matrix)}, not a matrix of cells x features")
        rows = _rows(matrix)
    if rows != source.shape[0]:
        raise ValueError(f"{where}: obsm has {rows} rows for {source.shape[0]} cells")
    twice = [feature for feature in features if features.count(feature) > 1] if _repeats(features) else []
    if twice or not features:
        what = f"several features are called {twice[0]!r}" if twice else "obsm has no features"
        raise ValueError(f"{where}: {what}")
    return Value(False, features, key)


def read_value(source: Source, value: Value, first: int = 0, last: int | None = None) -> np.ndarray:
    """The numbers of cells [first, last): float32 [n] of a column, [n, features] of a matrix; NaN is missing.

    Raises:
      ValueError: not numbers, or one that is not finite in float32; names the source, the cell and the
        feature.
    """
    last = source.shape[0] if last is None else last
    where = f"{source.where}: {value.key}"
    try:
        if value.column:
            found = _column(source.obs[value.key].iloc[first:last])
        else:
            with source.obsm() as obsm:
                found = _slice(obsm[value.key], first, last)
        with np.errstate(over="ignore"):
            numbers = np.ascontiguousarray(found, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: not a table of numbers ({error})") from error
    wrong = np.argwhere(np.isinf(numbers))
    if len(wrong):
        row, feature = first + int(wrong[0][0]), value.features[wrong[0][-1] if numbers.ndim > 1 else 0]
        raise ValueError(
            f"{where}: cell {source.obs.index[row]} (row {row}) has {found[tuple(wrong[0])]} for {feature}, "
            f"and {len(wrong) - 1} more are infinite or beyond float32; NaN stands for missing"
        )
    return numbers


def _repeats(features: tuple[str, ...]) -> bool:
    return len(set(features)) < len(features)


def _numeric(dtype: Any) -> bool:
    kinds = pd.api.types
    return kinds.is_numeric_dtype(dtype) and not kinds.is_complex_dtype(dtype)  # truth values are numbers


def _kind(matrix: Any) -> str:
    return str(matrix.attrs.get("encoding-type", "")) if isinstance(matrix, _GROUPS) else ""


def _shown(matrix: Any) -> str:
    shape = getattr(matrix, "shape", None)
    return f"{_kind(matrix) or type(matrix).__name__}{'' if shape is None else f' of shape {shape}'}"


def _features(matrix: Any) -> tuple[str, ...] | None:
    """None for what is no matrix of cells x features."""
    if isinstance(matrix, pd.DataFrame):
        return tuple(map(str, matrix.columns))
    if _kind(matrix) == "dataframe":
        return tuple(map(str, matrix.attrs["column-order"]))
    shape: Any = matrix.attrs.get("shape") if isinstance(matrix, _GROUPS) else getattr(matrix, "shape", ())
    known = (
        isinstance(matrix, _ARRAYS)
        or sparse.issparse(matrix)
        or _kind(matrix) in ("csr_matrix", "csc_matrix")
    )
    if not known or shape is None or len(shape) != 2:
        return None
    if isinstance(matrix, _ARRAYS) and (matrix.dtype.kind not in "biuf"):
        return None
    return numbers(int(shape[1]))


def _rows(matrix: Any) -> int:
    if _kind(matrix) == "dataframe":
        return _rows(matrix[matrix.attrs["_index"]])
    if isinstance(matrix, _GROUPS):
        shape: Any = matrix.attrs.get(
            "shape"
        )  # or it is the index of a table, with a mask of what is missing
        return len(ad.io.read_elem(matrix)) if shape is None else int(shape[0])
    return int(matrix.shape[0])


def _column(values: pd.Series) -> np.ndarray:
    return values.to_numpy(np.float64, na_value=np.nan)


def _slice(matrix: Any, first: int, last: int) -> np.ndarray:
    """Rows of what ``_features`` knows."""
    if isinstance(matrix, pd.DataFrame):
        return np.stack([_column(matrix.iloc[first:last, i]) for i in range(matrix.shape[1])], axis=1)
    if _kind(matrix) == "dataframe":
        columns = (matrix[name] for name in matrix.attrs["column-order"])
        return np.stack([_stored(column, first, last) for column in columns], axis=1)
    if isinstance(matrix, _GROUPS):
        matrix = ad.io.sparse_dataset(matrix)
    elif sparse.issparse(matrix) and matrix.format not in ("csr", "csc"):
        matrix = matrix.tocsr()
    rows = matrix[first:last]
    return rows.toarray() if sparse.issparse(rows) else np.asarray(rows)


def _stored(column: Any, first: int, last: int) -> np.ndarray:
    """A column of a table on disk: as it is, or with a mask where it may be missing."""
    if isinstance(column, _ARRAYS):
        return _column(pd.Series(column[first:last]))
    return _column(pd.Series(ad.io.read_elem(column)).iloc[first:last])
