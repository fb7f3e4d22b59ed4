"""Average precision and early precision of rankings of very many pairs, resampled by unit.

What :func:`scjax.eval.stats.ranking` does item by item is done here by the ranks at which something true is
found, of which there are few: a million pairs of genes under a thousand resamples of their regulators cost
one product of matrices.

Items with the same score enter together. Average precision summed item by item along a sorted list depends on
how ties happen to be ordered, and on a sparse score that is nearly all of it.
"""

from __future__ import annotations

import numpy as np

_BLOCK = 20_000_000  # numbers held at once while resampling
THRESHOLDS = 101  # of Fmax


class Ranking:
    """Items with a score (higher: sooner called true), the truth, and the unit that each is resampled with.

    Args:
        score: float[items], finite.
        truth: bool[items]; both values occur.
        unit: int[items], codes below ``n_units``; the weights of the methods are integers [1 + n_boot,
            n_units], the times each unit was drawn (see :func:`scjax.eval.stats.resample`), the first row
            ones.
    """

    def __init__(self, score: np.ndarray, truth: np.ndarray, unit: np.ndarray, n_units: int):
        self.score, self.truth, self.unit, self.n_units = np.asarray(score), truth.astype(bool), unit, n_units
        if not np.isfinite(self.score).all():
            raise ValueError("a ranking needs finite scores")
        if not 0 < self.truth.sum() < len(self.truth):
            raise ValueError("a ranking needs items that are true and items that are not")
        _, rank = np.unique(-self.score, return_inverse=True)  # equal scores, equal rank; 0 is the best
        levels = np.unique(rank[self.truth])  # the ranks at which something true is found
        place = np.searchsorted(levels, rank)  # first such rank that is not better than the item's own
        self.count = self._table(place, len(levels)).cumsum(0)  # items of each unit at this rank or better
        self.hit = self._table(
            np.where(self.truth, place, len(levels)), len(levels)
        )  # true ones at this rank

    def _table(self, place: np.ndarray, n: int) -> np.ndarray:
        """Items by rank and unit, float[n, units]; items at place n are left out."""
        kept = place < n
        flat = np.bincount(place[kept] * self.n_units + self.unit[kept], minlength=n * self.n_units)
        exact = np.float32 if len(self.score) < 2_000_000 else np.float64  # single counts exactly to 2^24
        return flat.reshape(n, self.n_units).astype(exact)

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Σ over ranks of (recall gained) × (precision there), as scikit-learn's; float[1 + n_boot]."""
        W = weights.T.astype(self.count.dtype)
        found = np.zeros(W.shape[1])
        area = np.zeros(W.shape[1])
        for rows in self._blocks(W.shape[1]):
            hits, called = self.hit[rows] @ W, self.count[rows] @ W
            so_far = found + hits.cumsum(0, dtype=np.float64)
            area += (hits * so_far / np.maximum(called, 1)).sum(0)
            found = so_far[-1]
        return area / np.where(found > 0, found, np.nan)

    def _blocks(self, n_weights: int) -> list[slice]:
        step = max(1, _BLOCK // n_weights)
        return [slice(i, i + step) for i in range(0, len(self.hit), step)]

    def prevalence(self, weights: np.ndarray) -> np.ndarray:
        """Share of the items that are true: the average precision of a score that knows nothing."""
        n = weights @ np.bincount(self.unit, minlength=self.n_units).astype(float)
        return weights @ np.bincount(self.unit[self.truth], minlength=self.n_units) / np.where(n > 0, n, 1)

    def early_precision(self, weights: np.ndarray, floor: float = -np.inf) -> np.ndarray:
        """Precision among the K best items over the prevalence, K the number of true ones; float[1 + n_boot].

        Items tied with the K-th enter too, and the precision divides by all that entered; items that score
        ``floor`` or less were not predicted and never enter (Pratapa et al. 2020, BEELINE).
        """
        order = np.argsort(-self.score, kind="stable")
        order = order[self.score[order] > floor]
        out = np.full(len(weights), np.nan)
        K = weights @ np.bincount(self.unit[self.truth], minlength=self.n_units)
        if not len(order):
            return np.where(K > 0, 0.0, np.nan)
        ranked = self.score[order]
        last = np.searchsorted(-ranked, -ranked, side="right") - 1  # where the ties of each item end
        todo, n = np.arange(len(weights)), min(len(order), 4 * int(self.truth.sum()) + 1)
        while len(todo):
            n = int(last[n - 1]) + 1
            left = []
            for part in np.array_split(todo, -(-n * len(todo) // _BLOCK)):
                drawn = weights[part].T[self.unit[order[:n]]]
                called = drawn.cumsum(0, dtype=np.int32)
                hits = (drawn * self.truth[order[:n], None]).cumsum(0, dtype=np.int32)
                enough = (called >= K[part]).any(0) | (n == len(order))
                at = np.where(called[-1] >= K[part], (called >= K[part]).argmax(0), n - 1)
                at = last[at]
                column = np.arange(len(part))
                precision = hits[at, column] / np.maximum(called[at, column], 1)
                out[part[enough]] = precision[enough]
                left.append(part[~enough])
            todo, n = np.concatenate(left), min(len(order), 4 * n)
        return np.where(K > 0, out / np.where(K > 0, self.prevalence(weights), 1), np.nan)

    def curve(self, n: int = 200) -> dict[str, list[float]]:
        """Recall and precision at no more than ``n`` ranks, and the prevalence, for drawing."""
        hits = self.hit.sum(1, dtype=np.float64).cumsum()
        precision = hits / self.count.sum(1, dtype=np.float64)
        at = np.unique(np.linspace(0, len(hits) - 1, n).round().astype(int))
        return {
            "recall": np.round(hits[at] / hits[-1], 4).tolist(),
            "precision": np.round(precision[at], 4).tolist(),
            "prevalence": float(self.truth.mean()),
        }


def fmax(score: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Largest harmonic mean of precision and recall over thresholds, both averaged over genes (Radivojac et
    al. 2013).

    Precision is averaged over the genes for which something is predicted at the threshold, recall over the
    genes with at least one set. ``weights`` are those of the genes, [1 + n_boot, genes].
    """
    known = y.any(1)
    score, y, W = score[known], y[known], weights[:, known].astype(float)
    thresholds = np.unique(np.quantile(score, np.linspace(0, 1, THRESHOLDS) ** 0.25))
    precision, recall = np.zeros((2, len(W), len(thresholds)))
    for i, threshold in enumerate(thresholds):
        called = score >= threshold
        n, hits = called.sum(1), (called & y).sum(1)
        some = W @ (n > 0)
        precision[:, i] = W @ (hits / np.maximum(n, 1)) / np.maximum(some, 1)
        recall[:, i] = W @ (hits / y.sum(1)) / np.maximum(W.sum(1), 1)
    return (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max(1)
