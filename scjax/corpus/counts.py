"""Are these raw counts? The one check that stands before everything that asks for counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import sparse

MAX_COUNT = 2**32 - 1


class CountsError(ValueError):
    """A matrix holds something that is not a raw count."""


def validate_counts(
    x: Any,
    *,
    source: str,
    genes: Sequence[str] | None = None,
    cells: Sequence[str] | None = None,
    first_row: int = 0,
    allow_non_integer: bool = False,
) -> None:
    """Checks that a matrix holds raw counts: finite whole numbers between 0 and 2^32 - 1.

    Args:
      x: cells x genes, dense or any scipy sparse matrix.
      source: what the matrix is (a file, a layer), for the message.
      genes: names of its columns, for the message.
      cells: names of its rows, for the message.
      first_row: row number of ``x[0]`` in the source, for the message.
      allow_non_integer: fractions are intended (ambient-corrected or imputed counts). Negative, NaN and
        infinite values are refused all the same.

    Raises:
      CountsError: names the source, cell, gene and value, and says so if the data look log-normalised.
    """
    values = x.data if sparse.issparse(x) else np.asarray(x)
    if values.dtype.kind not in "biuf":
        raise CountsError(f"{source}: holds {values.dtype} values; raw counts are numbers")
    if values.dtype.kind in "bu" and values.dtype.itemsize <= 4:
        return
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    if sparse.issparse(x) and x.format in ("csr", "csc", "coo"):
        from scjax.corpus.kernels import all_counts  # here, because numba takes a while to import

        if all_counts(values, MAX_COUNT + 1, allow_non_integer):
            return
    good = (values >= 0) & (values < MAX_COUNT + 1)  # NaN fails both; 2^32 is exact in float32
    if values.dtype.kind == "f" and not allow_non_integer:
        good &= np.floor(values) == values
    if good.all():
        return

    rows, columns, value = _first(x, ~good)
    cell = f"row {first_row + rows}" + (f" (cell {cells[rows]!r})" if cells is not None else "")
    gene = f"column {columns}" + (f" (gene {genes[columns]!r})" if genes is not None else "")
    if np.isnan(value):
        what = "is not a number (NaN)"
    elif np.isinf(value):
        what = "is infinite"
    elif value < 0:
        what = "is negative, as in scaled or residual data"
    elif value > MAX_COUNT:
        what = f"is larger than any count a corpus holds ({MAX_COUNT})"
    else:
        what = "is not a whole number" + _looks_like(x)
    raise CountsError(f"{source}: {cell}, {gene}: {value:g} {what}; raw counts are whole numbers >= 0")


def _first(x: Any, bad: np.ndarray) -> tuple[int, int, float]:
    """(row, column, value) of the first bad entry in row order."""
    if not sparse.issparse(x):
        row, column = (int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
        return row, column, float(np.asarray(x)[row, column])
    coo = x.tocoo() if x.format in ("csr", "csc", "coo") else x.tocsr().tocoo()
    where = np.flatnonzero(bad)
    where = where[np.lexsort((coo.col[where], coo.row[where]))[0]]
    return int(coo.row[where]), int(coo.col[where]), float(coo.data[where])


def _looks_like(x: Any) -> str:
    """What made these numbers: undoing it gives whole multiples of the smallest value of each cell."""
    undo: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "the data look log-normalised (log1p of scaled counts)": np.expm1,
        "the data look log-normalised (base 2)": lambda v: np.exp2(v) - 1,
        "the data look normalised by library size": lambda v: v,
    }
    votes = dict.fromkeys(undo, 0)
    tried = 0
    head = sparse.csr_matrix(x[:200])
    for start, end in zip(head.indptr[:-1], head.indptr[1:], strict=True):
        values = head.data[start:end].astype(np.float64)
        values = values[(values > 0) & (values < 30)]  # beyond that no logarithm of a count
        if len(values) < 5 or (values == np.floor(values)).all():
            continue
        tried += 1
        for what, function in undo.items():
            ratio = function(values) / function(values).min()
            votes[what] += bool(np.mean(np.abs(ratio - np.round(ratio)) < 0.02) > 0.95)
    best = max(votes, key=lambda what: votes[what])
    return f": {best}" if tried and votes[best] > tried / 2 else ""
