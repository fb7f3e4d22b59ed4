"""Two halves of each cell in one space: how near they are, and canonical correlation as the simple way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from scjax.eval.splits import Fold

KS = (1, 10)  # of recall@k
DRAWS = 5  # random partitions of held-out cells into pools
BLOCK = 1000  # rows of a distance matrix made at a time
COMPONENTS = 20  # of each modality, for canonical correlation
NEIGHBOURS = 15

Halves = tuple[np.ndarray, np.ndarray]
Joint = Callable[[np.ndarray], Halves]
"""Training rows → both halves of all cells [cells, dimensions] in one space."""


def fixed(first: np.ndarray, second: np.ndarray) -> Joint:
    """A joint space in which nothing is fitted."""
    return lambda train: (first, second)


def canonical(first: Callable[[np.ndarray], np.ndarray], second: Callable[[np.ndarray], np.ndarray]) -> Joint:
    """Canonical correlation (Hotelling 1936) of two representations whose columns are ordered by importance.

    Fitted on the training rows: up to 20 columns of each side (one for ten training cells) are whitened, the
    singular vectors of their covariance are the shared directions, and each direction is weighted by its
    correlation, so that those which are not shared play no part in distances.
    """

    def joint(train: np.ndarray) -> Halves:
        most = max(1, min(COMPONENTS, len(train) // 10))
        sides = [_whitened(represent(train)[:, :most], train) for represent in (first, second)]
        u, correlation, vt = np.linalg.svd(
            sides[0][train].T @ sides[1][train] / len(train), full_matrices=False
        )
        weight = np.clip(correlation, 0, 1)
        return sides[0] @ u * weight, sides[1] @ vt.T * weight

    return joint


def _whitened(X: np.ndarray, train: np.ndarray) -> np.ndarray:
    X = np.asarray(X, np.float64)
    X = X - X[train].mean(0)
    values, vectors = np.linalg.eigh(X[train].T @ X[train] / len(train))
    keep = values > 1e-9 * max(values.max(), 1e-300)
    return np.asarray(X @ vectors[:, keep] / np.sqrt(values[keep]))


def components(X: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Principal components of the columns of X, standardised and fitted on the training rows."""

    def represent(train: np.ndarray) -> np.ndarray:
        spread = X[train].std(0)
        Z = (X - X[train].mean(0)) / np.where(spread > 0, spread, 1)
        n = min(COMPONENTS, Z.shape[1], len(train) - 1)
        return np.asarray(PCA(n, svd_solver="full").fit(Z[train]).transform(Z))

    return represent


def by_depth(first: np.ndarray, second: np.ndarray) -> Joint:
    """One dimension: how deep each half was sequenced, standardised by the training rows."""

    def joint(train: np.ndarray) -> Halves:
        a, b = ((x - x[train].mean()) / max(float(x[train].std()), 1e-12) for x in (first, second))
        return a[:, None], b[:, None]

    return joint


def candidates(plan: Sequence[Fold], group: np.ndarray | None) -> list[np.ndarray]:
    """Sets of held-out cells within which partners are sought: those of one fold and one group."""
    if group is None:
        return [fold.test for fold in plan]
    return [fold.test[group[fold.test] == g] for fold in plan for g in np.unique(group[fold.test])]


def pools(sets: Sequence[np.ndarray], size: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pools of exactly ``size`` cells of one set and which of their members are scored in them (bool).

    Every set of that size or more is cut into random pools five times; the last pool is filled up with
    further cells of the set, which are not scored in it.
    """
    rng = np.random.default_rng([seed, 7])
    out = []
    for members in sets:
        for _ in range(DRAWS if len(members) >= size else 0):
            order = rng.permutation(members)
            for start in range(0, len(order), size):
                own = order[start : start + size]
                fill = order[: size - len(own)]
                out.append((np.concatenate([own, fill]), np.arange(size) < len(own)))
    return out


def scores(
    spaces: Sequence[Halves],
    plan: Sequence[Fold],
    sets: Sequence[np.ndarray],
    draws: Sequence[tuple[np.ndarray, np.ndarray]],
) -> dict[str, np.ndarray]:
    """FOSCTTM and recall@k of each cell, averaged both ways: float64[cells]; NaN where there are too few
    candidates.

    Args:
        spaces: the joint space of each fold. sets, draws: see :func:`candidates`, :func:`pools`.
    """
    n = len(spaces[0][0])
    fold_of = np.zeros(n, np.int64)
    for f, fold in enumerate(plan):
        fold_of[fold.test] = f
    found = {"foscttm": np.full(n, np.nan)} | {f"recall_at_{k}": np.zeros(n) for k in KS}
    for members in sets:
        if len(members) > 1:
            first, second = (half[members] for half in spaces[fold_of[members[0]]])
            share = [(closer + ties / 2) / (len(members) - 1) for closer, ties in _both_ways(first, second)]
            found["foscttm"][members] = np.mean(share, axis=0)
    drawn = np.zeros(n)
    for members, scored in draws:
        first, second = (half[members] for half in spaces[fold_of[members[0]]])
        ranks = _both_ways(first, second)
        at = members[scored]
        drawn[at] += 1
        for k in KS:
            hit = [
                np.clip((k - closer) / (ties + 1), 0, 1) for closer, ties in ranks
            ]  # ties: in random order
            found[f"recall_at_{k}"][at] += np.mean(hit, axis=0)[scored]
    for k in KS:
        found[f"recall_at_{k}"] /= np.where(drawn > 0, drawn, np.nan)
    return found


def _both_ways(first: np.ndarray, second: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each cell, how many other halves are closer than its own, and how many just as far: from the first
    modality to the second, and back.
    """
    n = len(first)
    out = []
    for a, b in ((first, second), (second, first)):
        closer, ties = np.zeros((2, n))
        for start in range(0, n, BLOCK):
            rows = np.arange(start, min(start + BLOCK, n))
            distance = cdist(a[rows], b)
            own = distance[np.arange(len(rows)), rows][:, None]
            closer[rows] = (distance < own).sum(1)
            ties[rows] = (distance == own).sum(1) - 1
        out.append((closer, ties))
    return out


def transferred(spaces: Sequence[Halves], plan: Sequence[Fold], code: np.ndarray) -> np.ndarray:
    """Labels of held-out cells read off their second half by neighbours among the first halves of training
    cells; −1 in ``code`` (int64[cells]) is no label.
    """
    guess = np.full(len(code), -1)
    for (first, second), fold in zip(spaces, plan, strict=True):
        train = fold.train[code[fold.train] >= 0]
        model = KNeighborsClassifier(min(NEIGHBOURS, len(train))).fit(first[train], code[train])
        guess[fold.test] = model.predict(second[fold.test])
    return guess
