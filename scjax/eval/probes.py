"""Probes: simple classifiers that read labels off a frozen representation.

Each is fitted on the training fold and nothing else: its scaler, its components, and its one hyper-parameter
(C, k, hidden units and epochs), which is chosen by the macro-F1 of inner folds over the training groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from scjax.eval import stats
from scjax.eval.checks import Cells, stratified
from scjax.eval.splits import Fold, inner

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
K_GRID = (5, 15, 50)
HIDDEN_GRID = (32, 128)
MAX_ITER = 500
MAX_EPOCHS, PATIENCE = 40, 10
CHOOSE_CELLS = 3000  # a hyper-parameter is chosen on at most about so many training cells
WIDE, NARROW = 256, 100  # representations wider than the one are reduced to the other where cost demands it

Probe = tuple[np.ndarray, str]


def logistic(Z: np.ndarray, cells: Cells, fold: Fold, seed: int) -> Probe:
    """Class-balanced logistic regression on standardised features; C chosen within the training fold."""
    train, test = _standardised(Z, fold)
    y = cells.label[fold.train]
    at = stratified(y, CHOOSE_CELLS, seed)
    inside = inner(y[at], _groups(cells, fold.train[at]), seed)
    C = C_GRID[_choose(_logistic_curve, train[at], y[at], inside, seed)]
    model = fit_logistic(train, y, C)
    stopped = f"; stopped after {MAX_ITER} iterations" if model.n_iter_.max() >= MAX_ITER else ""
    return model.predict_proba(test), f"C={C:g}{stopped}"


def fit_logistic(X: np.ndarray, y: np.ndarray, C: float) -> LogisticRegression:
    """Logistic regression with balanced class weights; where it stopped early is told by its ``n_iter_``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=C, class_weight="balanced", max_iter=MAX_ITER).fit(X, y)


def knn(Z: np.ndarray, cells: Cells, fold: Fold, seed: int) -> Probe:
    """Votes of the nearest training cells by cosine distance, weighted by its inverse; k chosen within the
    training fold.
    """
    y = cells.label[fold.train]
    at = stratified(y, CHOOSE_CELLS, seed)
    inside = inner(y[at], _groups(cells, fold.train[at]), seed)
    k = min(K_GRID[_choose(_knn_curve, Z[fold.train[at]], y[at], inside, seed)], len(fold.train))
    distances, indices = near(Z[fold.train], Z[fold.test], k)
    classes, code = np.unique(y, return_inverse=True)
    return votes(distances, code[indices], len(classes)), f"k={k}"


def near(train: np.ndarray, test: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine distances to the k nearest training rows, and which they are: [test rows, k], nearest first."""
    train, test = (X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12) for X in (train, test))
    model = NearestNeighbors(n_neighbors=min(k, len(train)), algorithm="brute").fit(train)
    distances, indices = model.kneighbors(test)
    return distances**2 / 2, indices  # for unit vectors; scikit-learn is several times slower by cosine


def votes(distances: np.ndarray, classes: np.ndarray, n_classes: int) -> np.ndarray:
    """Shares of the classes among neighbours weighted by inverse distance, [rows, n_classes].

    A neighbour at no distance outvotes all others.
    """
    same = distances <= 0
    weight = np.where(same.any(1, keepdims=True), same, 1 / np.where(same, 1, distances))
    out = np.zeros((len(distances), n_classes))
    np.add.at(out, (np.arange(len(distances))[:, None], classes), weight)
    return out / out.sum(1, keepdims=True)


def mlp(Z: np.ndarray, cells: Cells, fold: Fold, seed: int) -> Probe:
    """One hidden layer of rectified units on standardised features, trained by Adam.

    Its width and the number of gradient steps are chosen on an inner fold; wide representations are first
    reduced to 100 principal components of the training fold. Classes are not re-weighted, so that its
    probabilities have the frequencies of the training fold.
    """
    Z, note = narrow(Z, fold.train, seed)
    train, test = _standardised(Z, fold)
    y = cells.label[fold.train]
    at = stratified(y, CHOOSE_CELLS, seed)
    inside = inner(y[at], _groups(cells, fold.train[at]), seed)[:1]
    best, n_fit = _choose(_mlp_curve, train[at], y[at], inside, seed), len(inside[0].train) if inside else 0
    hidden, epochs = HIDDEN_GRID[best // MAX_EPOCHS], best % MAX_EPOCHS + 1
    if inside:  # as many gradient steps as were found best there
        epochs = max(1, round(epochs * _steps(n_fit) / _steps(len(y))))
    model, classes = _network(hidden, len(y), seed), np.unique(y)
    for _ in range(epochs):
        model.partial_fit(train, y, classes=classes)
    return model.predict_proba(test), f"hidden={hidden}, {epochs} epochs{note}"


def narrow(Z: np.ndarray, train: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """A wide representation in 100 principal components of its training rows, and a note that says so."""
    n = min(NARROW, len(train) - 1)
    if Z.shape[1] <= WIDE or n < 2:
        return Z, ""
    model = PCA(n, svd_solver="randomized", random_state=seed).fit(Z[train])
    return model.transform(Z), f", {n} components"


def majority(Z: np.ndarray, cells: Cells, fold: Fold, seed: int) -> Probe:
    """The frequencies of the training labels, whatever the cell."""
    size = np.bincount(cells.label[fold.train])
    return np.tile(size[size > 0] / len(fold.train), (len(fold.test), 1)), ""


HEADS: dict[str, Callable[[np.ndarray, Cells, Fold, int], Probe]] = {
    "logistic": logistic,
    "knn": knn,
    "mlp": mlp,
    "majority": majority,
}
"""Probe → function of (features of all cells, cells, fold, seed) that returns class probabilities of the test
cells, [test cells, classes in the training fold], and a note.
"""


def _standardised(Z: np.ndarray, fold: Fold) -> tuple[np.ndarray, np.ndarray]:
    scaler = StandardScaler().fit(Z[fold.train])
    return scaler.transform(Z[fold.train]), scaler.transform(Z[fold.test])


def _groups(cells: Cells, rows: np.ndarray) -> np.ndarray | None:
    return None if cells.group is None else cells.group[rows]


Curve = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], Sequence[float]]


def _choose(curve: Curve, X: np.ndarray, y: np.ndarray, inside: Sequence[Fold], seed: int) -> int:
    """Which candidate has the best macro-F1, summed over these inner folds; ties: the first."""
    total: np.ndarray | None = None
    for fit, check in inside:
        scores = np.asarray(curve(X[fit], y[fit], X[check], y[check], seed))
        total = scores if total is None else total + scores
    return 0 if total is None else int(np.argmax(total))


def _macro_f1(truth: np.ndarray, guess: np.ndarray) -> float:
    known = np.ones(1 + max(truth.max(), guess.max()), bool)
    return float(stats.classification(truth, guess, known, np.ones((1, len(truth))))["macro_f1"][0])


def _logistic_curve(
    X: np.ndarray, y: np.ndarray, X_check: np.ndarray, y_check: np.ndarray, seed: int
) -> Sequence[float]:
    scores = []
    # each C starts from the solution of the one before
    model = LogisticRegression(class_weight="balanced", max_iter=MAX_ITER, warm_start=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for C in C_GRID:
            scores.append(_macro_f1(y_check, model.set_params(C=C).fit(X, y).predict(X_check)))
    return scores


def _knn_curve(
    X: np.ndarray, y: np.ndarray, X_check: np.ndarray, y_check: np.ndarray, seed: int
) -> Sequence[float]:
    distances, indices = near(X, X_check, K_GRID[-1])
    classes, code = np.unique(y, return_inverse=True)
    return [
        _macro_f1(y_check, classes[votes(distances[:, :k], code[indices[:, :k]], len(classes)).argmax(1)])
        for k in K_GRID
    ]


def _mlp_curve(
    X: np.ndarray, y: np.ndarray, X_check: np.ndarray, y_check: np.ndarray, seed: int
) -> Sequence[float]:
    """Macro-F1 after each epoch of each width; epochs after the patience has run out count as no better."""
    scores = np.full((len(HIDDEN_GRID), MAX_EPOCHS), -1.0)
    for i, hidden in enumerate(HIDDEN_GRID):
        model, best, classes = _network(hidden, len(X), seed), 0, np.unique(y)
        for epoch in range(MAX_EPOCHS):
            scores[i, epoch] = _macro_f1(y_check, model.partial_fit(X, y, classes=classes).predict(X_check))
            best = epoch if scores[i, epoch] > scores[i, best] else best
            if epoch - best >= PATIENCE:
                break
        scores[i, epoch + 1 :] = scores[i, best] - 0.05
    return scores.ravel().tolist()


def _network(hidden: int, n: int, seed: int) -> MLPClassifier:
    return MLPClassifier(
        (hidden,), alpha=1e-3, batch_size=_batch(n), learning_rate_init=3e-3, random_state=seed
    )


def _batch(n: int) -> int:
    """Cells per gradient step: few enough for ten steps an epoch."""
    return min(n, 64, max(8, n // 10))


def _steps(n: int) -> int:
    return -(-n // _batch(n))
