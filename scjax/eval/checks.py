"""Input checks: refuse what would otherwise give a plausible number on broken input.

Several published metrics return ordinary-looking scores for a NaN cell, a constant embedding or a batch that
is confounded with the labels. Everything that enters a task passes through here first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

UNLABELLED = frozenset({"", "na", "nan", "none", "unassigned", "unknown", "unlabeled", "unlabelled"})
"""Values (compared in lower case) that mean "no label"; such cells are dropped and counted."""


def matrix(
    X: Any, name: str, n_cells: int, cells: Sequence[str] | None = None, zero_rows: bool = False
) -> np.ndarray:
    """An embedding as a dense float32 array [cells, dimensions], or a ValueError that says what is wrong.

    Refused: wrong shape, values that are not finite, no variation at all, and all-zero rows unless
    ``zero_rows`` (an embedding has none, the genes of a poor cell may). ``cells`` are names to use in
    messages.
    """
    X = X.to_numpy() if isinstance(X, pd.DataFrame) else X
    X = X.toarray() if sp.issparse(X) else X
    try:
        X = np.asarray(X, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"embedding {name!r} is not numeric: {error}") from None
    if X.ndim != 2 or X.shape[1] == 0:
        raise ValueError(f"embedding {name!r} has shape {X.shape}; [cells, dimensions] is needed")
    if len(X) != n_cells:
        raise ValueError(f"embedding {name!r} has {len(X)} rows for {n_cells} cells")

    def refuse(bad: np.ndarray, what: str) -> None:
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            named = f" ({cells[first]})" if cells is not None else ""
            count = f"{int(bad.sum())} of {len(X)} cells"
            raise ValueError(f"embedding {name!r}: {count} {what}; the first is row {first}{named}")

    refuse(~np.isfinite(X).all(1), "hold NaN or infinite values")
    if len(X) and (X == X[0]).all():
        raise ValueError(f"embedding {name!r} is constant: every cell has the same vector")
    refuse(~X.any(1) & (not zero_rows), "have an all-zero vector (were they embedded?)")
    return X


def require_aligned(**inputs: Any) -> None:
    """Refuse pandas inputs whose indices name other cells, or the same in another order.

    A plain array, and an index that only counts from 0, say nothing about names and fit whatever has their
    length.
    """
    first: tuple[str, pd.Index] | None = None
    for name, values in inputs.items():
        index = values.index if isinstance(values, pd.Series | pd.DataFrame) else None
        if index is None or isinstance(index, pd.RangeIndex):
            continue
        if first is None:
            first = (name, index)
        elif not index.equals(first[1]):
            other, named = first
            if len(index) == len(named):
                at = int(np.argmax(index.to_numpy() != named.to_numpy()))
                where = f"row {at} is {named[at]!r} in {other} and {index[at]!r} in {name}"
            else:
                where = f"{other} has {len(named)} rows and {name} {len(index)}"
            raise ValueError(f"{other} and {name} name different cells: {where}; align them with .reindex()")


def column(obs: pd.DataFrame, key: str, role: str) -> pd.Series:
    """Column ``key`` of ``obs``, or a KeyError that lists the columns that could serve."""
    if key not in obs:
        usable = [c for c in obs if not pd.api.types.is_float_dtype(obs[c]) and 1 < obs[c].nunique() <= 1000]
        raise KeyError(
            f"{role} column {key!r} is not in obs; columns that could serve: {', '.join(usable) or 'none'}"
        )
    return obs[key]


def encode(values: Any, name: str, n_cells: int) -> tuple[np.ndarray, list[str]]:
    """Codes (int64, −1 where there is no label) and the sorted names of the labels."""
    series = pd.Series(np.asarray(values, dtype=object))
    if len(series) != n_cells:
        raise ValueError(f"{name} has {len(series)} values for {n_cells} cells")
    text = series.map(lambda v: "" if pd.isna(v) else str(v))
    text = text.where(~text.str.strip().str.lower().isin(UNLABELLED), "")
    names = sorted(set(text) - {""})
    return pd.Index(names, dtype=object).get_indexer(text.to_numpy(object)), names


@dataclass(frozen=True)
class Cells:
    """The cells that can be scored, with their labels as codes; made by :func:`select`."""

    rows: np.ndarray  # int64[n]: positions in the input
    label: np.ndarray  # int64[n]
    label_names: list[str]
    group: np.ndarray | None = None
    group_names: list[str] = field(default_factory=list)
    batch: np.ndarray | None = None
    batch_names: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)  # reason → cells

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, at: np.ndarray) -> Cells:
        """The cells at these positions (of this selection)."""
        group = None if self.group is None else self.group[at]
        batch = None if self.batch is None else self.batch[at]
        return Cells(
            self.rows[at],
            self.label[at],
            self.label_names,
            group,
            self.group_names,
            batch,
            self.batch_names,
            self.dropped,
        )


def select(labels: Any, groups: Any = None, batch: Any = None, min_class_size: int = 10) -> Cells:
    """Drop (and count) cells without a label, group or batch, and labels with fewer than ``min_class_size``
    cells.
    """
    n = len(labels)
    label, names = encode(labels, "labels", n)
    keep, dropped = label >= 0, {}
    dropped["no label"] = int(n - keep.sum())
    sides: dict[str, tuple[np.ndarray, list[str]]] = {}
    for role, values in (("group", groups), ("batch", batch)):
        if values is not None:
            sides[role] = encode(values, role, n)
            missing = keep & (sides[role][0] < 0)
            dropped[f"no {role}"] = int(missing.sum())
            keep &= ~missing
    size = np.bincount(label[keep], minlength=len(names))
    for i in np.flatnonzero(size < max(min_class_size, 1)):
        if size[i]:
            dropped[f"label {names[i]!r} has fewer than {min_class_size} cells"] = int(size[i])
        keep &= label != i
    rows = np.flatnonzero(keep)
    if len(np.unique(label[rows])) < 2:
        raise ValueError(
            f"fewer than two labels with at least {min_class_size} cells are left of {len(names)} labels and "
            f"{n} cells (dropped: {dropped}); give another label column or a smaller min_class_size"
        )
    out: dict[str, Any] = {}
    for role, (codes, side_names) in sides.items():
        used = np.unique(codes[rows])
        if len(used) < 2:
            left = f"only one {role} is left ({side_names[used[0]]!r})" if len(used) else f"no {role} is left"
            remedy = {
                "group": "give the column that tells donors or studies apart, or none to split over cells",
                "batch": "give the column that tells batches apart, or leave the task 'integration' out",
            }
            raise ValueError(f"{left}; at least two are needed: {remedy[role]} (dropped: {dropped})")
        out[role] = np.searchsorted(used, codes[rows])
        out[f"{role}_names"] = [side_names[i] for i in used]
    used = np.unique(label[rows])
    return Cells(
        rows,
        np.searchsorted(used, label[rows]),
        [names[i] for i in used],
        dropped={k: v for k, v in dropped.items() if v},
        **out,
    )


def sharing(label: np.ndarray, side: np.ndarray) -> np.ndarray:
    """bool[labels, batches]: which label occurs in which batch."""
    seen = np.zeros((label.max() + 1, side.max() + 1), bool)
    seen[label, side] = True
    return seen


def require_shared_labels(cells: Cells) -> None:
    """Batch mixing can only be judged within labels: at least two batches must share at least two labels."""
    if cells.batch is None:
        raise ValueError("integration needs a batch for every cell (batch_key)")
    seen = sharing(cells.label, cells.batch).astype(int)
    shared = seen.T @ seen
    np.fill_diagonal(shared, 0)
    if shared.max() < 2:
        raise ValueError(
            "batch is confounded with the labels: no two batches share two labels; "
            "technical and biological differences cannot be told apart: leave the task 'integration' out"
        )


def stratified(strata: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Sorted positions of at most about ``n`` cells, each stratum in proportion and none lost."""
    if len(strata) <= n:
        return np.arange(len(strata))
    rng = np.random.default_rng([seed, 1])
    take = []
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        quota = max(min(len(members), 10), round(n * len(members) / len(strata)))
        take.append(rng.choice(members, quota, replace=False))
    return np.sort(np.concatenate(take))


def samples(strata: np.ndarray, n: int, repeats: int, seed: int) -> list[np.ndarray]:
    """Positions of all cells where they are at most ``n``, else several stratified samples of about that
    many.
    """
    if len(strata) <= n:
        return [np.arange(len(strata))]
    return [stratified(strata, n, seed + 7919 * r) for r in range(max(repeats, 1))]
