"""Folds: which rows train and which test. Groups stay whole, and what is chosen is chosen inside the training
rows.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    LeaveOneGroupOut,
    StratifiedGroupKFold,
    StratifiedKFold,
)

from scjax.eval.checks import Cells

LEAVE_ONE_OUT = 5  # up to so many groups, every group is held out alone
N_FOLDS, N_INNER = 5, 3
RARE = "The least populated class"  # scikit-learn's warning about labels rarer than the number of folds


class Fold(NamedTuple):
    """Positions of the rows to train on and to test on."""

    train: np.ndarray
    test: np.ndarray


def folds(
    n: int,
    groups: np.ndarray | None,
    seed: int,
    *,
    label: np.ndarray | None = None,
    n_folds: int = N_FOLDS,
    unit: str = "rows",
) -> tuple[list[Fold], str]:
    """Folds over n rows and the name of the scheme.

    Up to five groups: each is held out in turn. More: ``n_folds`` folds of whole groups. No groups: folds
    over rows, named so in capitals, since related rows then lie on both sides. With ``label`` (codes) folds
    hold labels in like proportions.

    Args:
        groups: a code or name per row.
        unit: what rows are, for the name of the scheme: "cells", "genes", "spots".

    Raises:
        ValueError: fewer than two groups, or fewer rows than folds.
    """
    splitter: Any
    y = np.zeros(n, int) if label is None else label
    if groups is None:
        if label is not None:
            n_folds = max(2, min(n_folds, int(np.min(np.bincount(label)[np.unique(label)]))))
        if n < n_folds:
            raise ValueError(
                f"{n} {unit} cannot be split into {n_folds} folds; at least {n_folds} are needed"
            )
        kind = KFold if label is None else StratifiedKFold
        splitter = kind(n_folds, shuffle=True, random_state=seed)
        scheme = f"{n_folds}-fold over {unit.upper()}, not groups"
    else:
        n_groups = len(np.unique(groups))
        if n_groups < 2:
            raise ValueError(
                "only one group: nothing can be held out; name the column that tells donors or studies "
                f"apart, or give no groups to split over {unit} instead (an easier task, and marked so)"
            )
        if n_groups <= LEAVE_ONE_OUT:
            splitter, scheme = LeaveOneGroupOut(), "each group held out in turn"
        elif label is None:
            n_folds = min(n_folds, n_groups)
            splitter = GroupKFold(n_folds, shuffle=True, random_state=seed)
            scheme = f"{n_folds}-fold over groups"
        else:
            n_folds = min(n_folds, n_groups)
            splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
            scheme = f"stratified {n_folds}-fold over groups"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=RARE, category=UserWarning)
        return [Fold(*f) for f in splitter.split(np.zeros((n, 1)), y, groups)], scheme


def split(cells: Cells, seed: int) -> tuple[list[Fold], str]:
    """Folds over cells (see :func:`folds`), refused where a training fold cannot teach anything.

    Raises:
        ValueError: a training fold holds a single label, or no label of any test fold occurs in training.
    """
    found, scheme = folds(len(cells), cells.group, seed, label=cells.label, unit="cells")
    known = 0
    for train, test in found:
        classes = np.unique(cells.label[train])
        if len(classes) < 2:
            groups: Any = [] if cells.group is None else np.unique(cells.group[test])
            held_out = ", ".join(cells.group_names[g] for g in groups)
            raise ValueError(
                f"holding out {held_out} leaves a single label to train on "
                f"({cells.label_names[classes[0]]!r}); leave that group out, or give groups that share labels"
            )
        known += int(np.isin(cells.label[test], classes).sum())
    if not known:
        raise ValueError(
            "no label occurs in two groups: labels and groups are confounded, nothing can be predicted; give "
            "groups that share labels, or no groups to split over cells instead"
        )
    return found, scheme


def inner(label: np.ndarray, groups: np.ndarray | None, seed: int, n_folds: int = N_INNER) -> list[Fold]:
    """Folds within a training fold, to choose hyper-parameters by: over groups where there are several.

    Folds that would train on a single label or test on nothing are left out.

    Args:
        label, groups: of the training rows.
    """
    n_groups = 0 if groups is None else len(np.unique(groups))
    splitter: Any
    if n_groups > 1:
        splitter = StratifiedGroupKFold(min(n_folds, n_groups), shuffle=True, random_state=seed)
    elif np.bincount(label).max() < n_folds:
        return []
    else:
        splitter = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=RARE, category=UserWarning)
        found = [
            Fold(*f)
            for f in splitter.split(np.zeros((len(label), 1)), label, groups if n_groups > 1 else None)
        ]
    return [f for f in found if len(np.unique(label[f.train])) > 1 and len(f.test)]
