"""Probes: simple classifiers that read labels off a frozen representation, and the folds they are judged
on.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from scjax.eval.checks import Cells

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MAX_ITER = 500
N_NEIGHBORS = 15
LEAVE_ONE_OUT = 5  # up to so many groups, every group is held out alone
RARE = "The least populated class"  # scikit-learn's warning about labels rarer than the number of folds


class Fold(NamedTuple):
    """Positions of the cells to train on and to test on."""

    train: np.ndarray
    test: np.ndarray


def split(cells: Cells, seed: int) -> tuple[list[Fold], str]:
    """Folds that keep groups whole where there are groups, and the name of the scheme."""
    splitter: Any
    if cells.group is None:
        n = max(2, min(5, int(np.min(np.bincount(cells.label)))))
        splitter, scheme = (
            StratifiedKFold(n, shuffle=True, random_state=seed),
            f"{n}-fold over CELLS, not groups",
        )
    elif len(cells.group_names) <= LEAVE_ONE_OUT:
        splitter, scheme = LeaveOneGroupOut(), "each group held out in turn"
    else:
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        scheme = "stratified 5-fold over groups"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=RARE, category=UserWarning)
        folds = [Fold(*f) for f in splitter.split(np.zeros((len(cells), 1)), cells.label, cells.group)]
    known = 0
    for train, test in folds:
        classes = np.unique(cells.label[train])
        if len(classes) < 2:
            held_out = (
                [cells.group_names[g] for g in np.unique(cells.group[test])]
                if cells.group is not None
                else []
            )
            only = cells.label_names[classes[0]]
            raise ValueError(
                f"holding out {', '.join(held_out)} leaves a single label to train on ({only!r})"
            )
        known += int(np.isin(cells.label[test], classes).sum())
    if not known:
        raise ValueError(
            "no label occurs in two groups: labels and groups are confounded, nothing can be predicted"
        )
    return folds, scheme


def logistic(Z: np.ndarray, cells: Cells, fold: Fold, seed: int) -> tuple[np.ndarray, str]:
    """Class-balanced logistic regression on standardised features; C chosen within the training fold."""
    scaler = StandardScaler().fit(Z[fold.train])
    X, y = scaler.transform(Z[fold.train]), cells.label[fold.train]
    C = _choose_C(X, y, None if cells.group is None else cells.group[fold.train], seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told in the note instead
        model = _model(C).fit(X, y)
    stopped = f"; stopped after {MAX_ITER} iterations" if model.n_iter_.max() >= MAX_ITER else ""
    return model.predict_proba(scaler.transform(Z[fold.test])), f"C={C:g}{stopped}"


def _model(C: float, warm_start: bool = False) -> LogisticRegression:
    return LogisticRegression(C=C, class_weight="balanced", max_iter=MAX_ITER, warm_start=warm_start)


def _choose_C(X: np.ndarray, y: np.ndarray, group: np.ndarray | None, seed: int) -> float:
    """The C with the best macro-F1 in up to three inner folds, over groups if there are several; ties:
    smaller.
    """
    splitter: Any
    if group is not None and len(np.unique(group)) > 1:
        splitter = StratifiedGroupKFold(min(3, len(np.unique(group))), shuffle=True, random_state=seed)
    else:
        splitter, group = StratifiedKFold(3, shuffle=True, random_state=seed), None
    scores = np.zeros(len(C_GRID))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=RARE, category=UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        for fit, check in splitter.split(X, y, group):
            if len(np.unique(y[fit])) < 2 or not len(check):
                continue
            model = _model(C_GRID[0], warm_start=True)  # each C starts from the solution of the one before
            for i, C in enumerate(C_GRID):
                guess = model.set_params(C=C).fit(X[fit], y[fit]).predict(X[check])
                judged = np.unique(y[check])
                scores[i] += f1_score(y[check], guess, labels=judged, average="macro", zero_division=0)
    return C_GRID[int(np.argmax(scores))]


def knn(Z: np.ndarray, cells: Cells, fold: Fold, seed: int) -> tuple[np.ndarray, str]:
    """Votes of the 15 nearest training cells by cosine distance, weighted by its inverse."""
    k = min(N_NEIGHBORS, len(fold.train))
    model = KNeighborsClassifier(k, metric="cosine", weights="distance", algorithm="brute")
    return model.fit(Z[fold.train], cells.label[fold.train]).predict_proba(Z[fold.test]), f"k={k}"


def majority(Z: np.ndarray, cells: Cells, fold: Fold, seed: int) -> tuple[np.ndarray, str]:
    """The frequencies of the training labels, whatever the cell."""
    size = np.bincount(cells.label[fold.train])
    return np.tile(size[size > 0] / len(fold.train), (len(fold.test), 1)), ""


HEADS = {"logistic": logistic, "knn": knn, "majority": majority}
"""Probe → function of (features of all cells, cells, fold, seed) that returns class probabilities of the test
cells, [test cells, classes in the training fold], and a note.
"""
