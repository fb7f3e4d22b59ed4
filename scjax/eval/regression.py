"""Predicting many numbers per cell: ridge probes, simple rivals, and scores per feature.

What spatial imputation, modality prediction and neighbourhood composition have in common. A score per feature
looks across cells: across features within a cell, the plain mean of every feature already correlates highly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import rankdata
from sklearn.neighbors import KNeighborsRegressor

from scjax.eval.splits import Fold, folds

ALPHAS = tuple(float(a) for a in 10.0 ** np.arange(-2, 5))  # times the number of training cells / 1000
NEIGHBOURS = 15
SAMPLE = 1000

Predictor = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(rows to train on, rows to predict) → predictions [rows to predict, features]."""


def ridge(
    X: np.ndarray, Y: np.ndarray, group: np.ndarray | None, seed: int
) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Ridge regression of Y [n, features] on standardised X [n, dimensions], all features under one penalty.

    The penalty is chosen inside these rows, by squared error of standardised features in folds over
    groups (over cells where there is one group). One eigendecomposition serves all penalties.

    Returns:
        The fitted function of X, and the penalty.
    """
    several = group is not None and len(np.unique(group)) > 1
    inner, _ = folds(len(X), group if several else None, seed, n_folds=3)
    scale = np.maximum(Y.std(0), 1e-12)
    error = np.zeros(len(ALPHAS))
    for fit, check in inner:
        for i, predict in enumerate(_path(X[fit], Y[fit] / scale)):
            error[i] += ((predict(X[check]) - Y[check] / scale) ** 2).sum()
    best = len(ALPHAS) - 1 - int(np.argmin(error[::-1]))  # ties: the stronger penalty
    chosen = ALPHAS[best] * len(X) / SAMPLE
    return _path(X, Y)[best], chosen


def _path(X: np.ndarray, Y: np.ndarray) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Ridge regression under every penalty of the grid."""
    centre, spread, level = X.mean(0, dtype=np.float64), X.std(0, dtype=np.float64), Y.mean(0)
    spread = np.where(spread > 1e-9, spread, 1.0)
    Z = (X - centre) / spread
    if Z.shape[1] <= len(Z):
        values, vectors = np.linalg.eigh(Z.T @ Z)
        inside = vectors.T @ (Z.T @ (Y - level))
        basis = vectors
    else:  # more dimensions than cells: the same solution from the cells' side
        values, vectors = np.linalg.eigh(Z @ Z.T)
        inside = vectors.T @ (Y - level)
        basis = Z.T @ vectors

    def predictor(alpha: float) -> Callable[[np.ndarray], np.ndarray]:
        weights = basis @ (inside / (np.maximum(values, 0) + alpha * len(Z) / SAMPLE)[:, None])
        return lambda new: (new - centre) / spread @ weights + level

    return [predictor(alpha) for alpha in ALPHAS]


def by_ridge(
    represent: Callable[[np.ndarray], np.ndarray], Y: np.ndarray, group: np.ndarray | None, seed: int
) -> Predictor:
    """Ridge regression on a representation, a function that fits itself on the training rows."""

    def predict(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        X = represent(train)
        model, _ = ridge(X[train], Y[train], None if group is None else group[train], seed)
        return model(X[test])

    return predict


def by_neighbours(
    represent: Callable[[np.ndarray], np.ndarray], Y: np.ndarray, metric: str = "cosine"
) -> Predictor:
    """Mean of the 15 nearest training cells."""

    def predict(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        X = represent(train)
        model = KNeighborsRegressor(min(NEIGHBOURS, len(train)), metric=metric, algorithm="brute")
        return np.asarray(model.fit(X[train], Y[train]).predict(X[test]))

    return predict


def fixed(X: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A representation in which nothing is fitted."""
    return lambda train: X


def as_given(X: np.ndarray) -> Predictor:
    """Predictions that were made elsewhere."""
    return lambda train, test: X[test]


def by_mean(Y: np.ndarray) -> Predictor:
    """Mean of the training cells, whatever the cell."""
    return lambda train, test: np.tile(Y[train].mean(0), (len(test), 1))


def by_chance(Y: np.ndarray, seed: int) -> Predictor:
    """Normal noise with the mean and the spread that each feature has among the training cells."""

    def predict(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([seed, 4, int(test[0])])
        return Y[train].mean(0) + Y[train].std(0) * rng.normal(size=(len(test), Y.shape[1]))

    return predict


def cross_predict(predict: Predictor, splits: Sequence[Fold], shape: tuple[int, ...]) -> np.ndarray:
    """Predictions of every cell from the fold that held it out."""
    out = np.full(shape, np.nan)
    for train, test in splits:
        out[test] = predict(train, test)
    return out


def correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted Pearson correlation of the columns of x and y [n, features]: float64[len(weights), features].

    NaN where y is constant (nothing to predict), 0 where only x is (nothing was predicted).
    """
    w = weights.astype(np.float64)
    w /= w.sum(1, keepdims=True)
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    size = [np.maximum(np.abs(a).max(0), 1e-300) for a in (x, y)]
    x, y = x - x.mean(0), y - y.mean(0)
    mx, my = w @ x, w @ y
    vx, vy = np.maximum(w @ x**2 - mx**2, 0), np.maximum(w @ y**2 - my**2, 0)
    flat_x, flat_y = vx <= 1e-14 * size[0] ** 2, vy <= 1e-14 * size[1] ** 2
    r = (w @ (x * y) - mx * my) / np.sqrt(np.where(flat_x | flat_y, 1, vx * vy))
    return np.where(flat_y, np.nan, np.where(flat_x, 0.0, r))


def per_feature(
    truth: np.ndarray, guess: np.ndarray, parts: Mapping[str, np.ndarray], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores of each feature across cells: {metric: float64[len(weights), features]}.

    Pearson and Spearman correlation, and root mean squared error in units of the spread of the truth, so that
    1 is the error of the true mean. Each within every part (held-out group or fold; pooled over parts, the
    means of different training folds would correlate negatively with the truth), then the mean over parts.
    Under resamples, ranks and spread stay those of the whole part. NaN for features without variation.
    """
    found: dict[str, list[np.ndarray]] = {"feature_pearson": [], "feature_spearman": [], "feature_nrmse": []}
    for rows in parts.values():
        t, g, w = truth[rows], guess[rows], weights[:, rows]
        r = correlation(g, t, w)
        found["feature_pearson"].append(r)
        found["feature_spearman"].append(correlation(rankdata(g, axis=0), rankdata(t, axis=0), w))
        share = w / np.maximum(w.sum(1, keepdims=True, dtype=np.float64), 1)
        spread = t.std(0)
        error = np.sqrt(share @ (g - t) ** 2) / np.where(spread > 0, spread, 1)
        found["feature_nrmse"].append(np.where(np.isfinite(r), error, np.nan))
    return {name: _mean(np.stack(values)) for name, values in found.items()}


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where nothing is left."""
    n = np.isfinite(values).sum(0)
    return np.where(np.isfinite(values), values, 0).sum(0) / np.where(n > 0, n, np.nan)


def ceiling(
    first: np.ndarray, second: np.ndarray, parts: Mapping[str, np.ndarray], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """What the best possible prediction would score, estimated from two halves of the same counts.

    If r is the correlation of the halves, the whole has reliability R = 2r / (1 + r) (Spearman 1910, Brown
    1910); a prediction of the expectation correlates √R with the truth and errs by √(1 − R) of its spread.
    Exact for sums of both halves; logarithms of small counts make it too high by some hundredths.
    """
    halves = per_feature(second, first, parts, weights)

    def reliability(r: np.ndarray) -> np.ndarray:
        r = np.clip(r, 0, 1)
        return 2 * r / (1 + r)

    out = {name: np.sqrt(reliability(halves[name])) for name in ("feature_pearson", "feature_spearman")}
    return out | {"feature_nrmse": np.sqrt(1 - reliability(halves["feature_pearson"]))}
