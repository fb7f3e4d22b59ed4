"""Neighbourhoods: which cell types surround a cell, and how densely, read off a representation of the cell
alone (task "spatial/composition").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn
from scipy.spatial.distance import jensenshannon

from scjax.eval import checks, regression, space, stats
from scjax.eval.representations import Representation
from scjax.eval.results import Results
from scjax.eval.space import Space
from scjax.eval.splits import Fold

TASK = "spatial/composition"
COORDINATES = "coordinates"


@dataclass(frozen=True)
class Surroundings:
    """What lies around each cell."""

    shares: np.ndarray  # float64[n, types]: of each type among its neighbours
    density: np.ndarray | None  # float64[n]; None where cells lie on a grid

    def take(self, at: np.ndarray) -> Surroundings:
        return Surroundings(self.shares[at], None if self.density is None else self.density[at])


def surroundings(place: Space, cells: checks.Cells, k: int) -> Surroundings:
    """Composition and density of the k nearest neighbours of each cell within its section."""
    distance, index = space.neighbours(place.xy, place.section, k)
    shares = space.composition(cells.label, len(cells.label_names), index)
    return Surroundings(shares, space.density(distance, place.section))


def score(
    out: Results,
    cells: checks.Cells,
    place: Space,
    folds: Sequence[Fold],
    scheme: str,
    representations: Sequence[Representation],
    *,
    lying: Surroundings,
    seed: int,
    n_boot: int,
) -> None:
    """Score every representation on what surrounds these cells: ridge regression, fold by fold."""
    n_types = len(cells.label_names)
    target = lying.shares if lying.density is None else np.column_stack([lying.shares, lying.density])
    if lying.density is None:
        out.facts["density"] = "not scored: cells lie on a grid"
    oracle = jittered(target, seed)
    ways: list[tuple[Representation, regression.Predictor | None]] = [
        (r, None if r.absent else regression.by_ridge(r.fitted, target, cells.group, seed))
        for r in [*representations, cell_type_only(np.array(cells.label_names, dtype=object)[cells.label])]
        if r.name != "hvg"  # thousands of features would be most of the cost; pca stands for them
    ]
    nearest = regression.by_neighbours(regression.fixed(place.scaled), target, metric="euclidean")
    ways += [
        (Representation("train_mean", "control", None), regression.by_mean(target)),
        (Representation(COORDINATES, "control", None), nearest),
        (Representation("oracle", "oracle", None), regression.as_given(oracle)),
    ]
    weights = space.resampled(place, n_boot, seed, TASK)
    level = regression.cross_predict(regression.by_mean(target), folds, target.shape)
    everyone = np.ones((1, len(cells)))
    for r, predict in ways:
        about = fields(TASK, r, scheme, place)
        if predict is None:
            out.skip(r.absent, **about, metric="composition_r2")
            continue
        guess = regression.cross_predict(predict, folds, target.shape)
        scores: dict[str, dict[str, np.ndarray]] = {}
        for part, rows in weights.parts.items():
            found = _score(target[rows], guess[rows], level[rows], n_types, weights.cells[:, rows])
            for metric, of_part in found.items():
                scores.setdefault(metric, {})[part] = of_part
        weights.add(out, scores, **about)
        for i, name in enumerate(cells.label_names):
            r2 = _r2(target[:, [i]], guess[:, [i]], level[:, [i]], everyone)
            out.add(r2, **about, metric="composition_r2", label=name, n_cells=len(cells))


def _score(
    truth: np.ndarray, guess: np.ndarray, level: np.ndarray, n_types: int, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores of predicted compositions (first ``n_types`` columns) and density (a further column, if any).

    R² is against the mean of the training cells (``level``), which thereby scores 0. For the divergence
    (Jensen-Shannon, in bits) and the error, predictions are clipped and scaled to shares that sum to one.
    """
    t, g = truth[:, :n_types], np.maximum(guess[:, :n_types], 0)
    total = g.sum(1, keepdims=True)
    shares = np.where(total > 0, g / np.where(total > 0, total, 1), 1 / n_types)
    divergence = np.nan_to_num(jensenshannon(t, shares, base=2, axis=1)) ** 2  # rounding below 0 makes NaN
    found = {
        "composition_r2": _r2(t, guess[:, :n_types], level[:, :n_types], weights),
        "composition_jsd": stats.mean(divergence, weights),
        "composition_mae": stats.mean(np.abs(shares - t).mean(1), weights),
    }
    if truth.shape[1] > n_types:
        found["density_r2"] = _r2(truth[:, n_types:], guess[:, n_types:], level[:, n_types:], weights)
    return found


def _r2(truth: np.ndarray, guess: np.ndarray, level: np.ndarray, weights: np.ndarray) -> np.ndarray:
    wrong = weights @ ((truth - guess) ** 2).sum(1)
    spread = weights @ ((truth - level) ** 2).sum(1)
    return np.where(spread > 0, 1 - wrong / np.where(spread > 0, spread, 1), np.nan)


def fields(task: str, r: Representation, scheme: str, place: Space) -> dict[str, Any]:
    """What all rows of a representation share."""
    return {
        "task": task,
        "model_id": r.name,
        "model_kind": r.kind,
        "embedding_key": r.key,
        "split_scheme": scheme,
        "n_groups": len(place.unit_names),
        "metric_impl": f"scjax.eval; scikit-learn=={sklearn.__version__}",
    }


def cell_type_only(types: np.ndarray) -> Representation:
    """The annotated type of each cell and nothing else, one-hot; "none" is a type too."""
    codes, names = checks.encode(types, "labels", len(types))
    return Representation("cell_type_only", "baseline", np.eye(len(names) + 1, dtype=np.float32)[codes])


def jittered(truth: np.ndarray, seed: int) -> np.ndarray:
    """The truth with a little noise: what an oracle would know."""
    return truth + 0.01 * np.random.default_rng([seed, 5]).normal(size=truth.shape)
