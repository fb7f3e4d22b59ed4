"""Measures of predicted against real effects of perturbations, on plain arrays.

Effects are differences of mean log1p expression from control cells. Functions of profiles take truths
[B, genes] (a value and its resamples, or one row) and predictions [K, genes] and give [B, K].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.stats
from scipy.spatial.distance import cdist
from sklearn.metrics import average_precision_score

FDR = 0.05
EPSILON = 1e-9  # added to both means of a fold change


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length one; rows of (nearly) nothing become zero."""
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.where(norm > 1e-9, x / np.where(norm > 1e-9, norm, 1), 0.0)


def cosine(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Cosine of effects, [B, K]; 0 for a prediction of no effect."""
    return _unit(truth) @ _unit(predicted).T


def pearson(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Pearson correlation over genes, [B, K]; 0 where a side is constant, since it says nothing of genes."""
    return cosine(
        truth - np.mean(truth, -1, keepdims=True), predicted - np.mean(predicted, -1, keepdims=True)
    )


def rmse(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Root of the mean squared difference over genes, [B, K]."""
    return cdist(np.asarray(truth, np.float64), np.asarray(predicted, np.float64)) / np.sqrt(truth.shape[-1])


def mae(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Mean absolute difference over genes, [B, K]."""
    return cdist(truth, predicted, "cityblock") / truth.shape[-1]


def weighted_mse(truth: np.ndarray, predicted: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Mean squared difference, [B, K], under weights (|score| scaled to [0, 1])²: genes with a clear effect.

    ``score`` [genes]: how clearly the real condition changes each gene (WMSE of CellSimBench).
    """
    size = np.abs(score)
    weight = ((size - size.min()) / max(float(np.ptp(size)), 1e-12)) ** 2
    square = (np.asarray(truth, np.float64)[:, None] - np.asarray(predicted, np.float64)[None]) ** 2
    return square @ weight / max(float(weight.sum()), 1e-12)


def rank_score(distance: np.ndarray, own: int) -> np.ndarray:
    """1 − rank/n of the own condition among n candidates (last axis) by distance; ties share their rank.

    1: nearest of all; (n + 1)/2n: chance (discrimination score of cell-eval).
    """
    mine = distance[..., own : own + 1]
    others = np.delete(distance, own, -1)
    rank = (others < mine).sum(-1) + 0.5 * (others == mine).sum(-1)
    return 1 - rank / distance.shape[-1]


@dataclass(frozen=True)
class Changed:
    """Differential expression of a condition: effect (log2 fold change or difference of means), p and q."""

    effect: np.ndarray
    p: np.ndarray
    q: np.ndarray

    @property
    def significant(self) -> np.ndarray:
        return self.q < FDR


def differential(cells: np.ndarray, control: np.ndarray) -> Changed:
    """Mann-Whitney test per gene (log1p expression, [cells, genes]) with Benjamini-Hochberg q-values.

    The effect is the log2 ratio of geometric means of counts, exp(mean) − 1, as in pdex.
    """
    x, y = np.asarray(cells, np.float64), np.asarray(control, np.float64)
    p = np.ones(x.shape[1])
    varies = (np.ptp(x, axis=0) > 0) | (np.ptp(y, axis=0) > 0) | (x[0] != y[0])
    if varies.any():
        p[varies] = scipy.stats.mannwhitneyu(
            x[:, varies], y[:, varies], axis=0, method="asymptotic"
        ).pvalue.clip(0, 1)
    means = np.expm1(x.mean(0)) + EPSILON, np.expm1(y.mean(0)) + EPSILON
    return Changed(np.log2(means[0] / means[1]), p, scipy.stats.false_discovery_control(p))


def _top(effect: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Genes of ``among`` (bool), largest effect first."""
    at = np.flatnonzero(among)
    return at[np.argsort(-np.abs(effect[at]), kind="stable")]


def de_overlap(real: Changed, effect: np.ndarray, significant: np.ndarray | None = None) -> float:
    """Share of the N significant genes that are among the N genes with the largest predicted effect.

    ``significant``: only these predicted genes count (overlap_at_N of cell-eval). NaN without significant
    genes; a predicted effect of zero is none.
    """
    real_top = _top(real.effect, real.significant)
    theirs = _top(effect, np.abs(effect) > 0 if significant is None else significant)[: len(real_top)]
    return len(np.intersect1d(real_top, theirs)) / len(real_top) if len(real_top) else np.nan


def de_precision(real: Changed, predicted: Changed) -> float:
    """Share of the predicted significant genes that are among as many most changed real ones (cell-eval's
    precision_at_N); 0 where nothing is predicted.
    """
    theirs = _top(predicted.effect, predicted.significant)
    if not len(theirs):
        return 0.0
    return len(np.intersect1d(_top(real.effect, real.significant)[: len(theirs)], theirs)) / len(theirs)


def de_recall(real: Changed, predicted: Changed) -> float:
    """Share of the significant genes that the predicted cells call significant; NaN without any."""
    n = real.significant.sum()
    return float((real.significant & predicted.significant).sum() / n) if n else np.nan


def de_direction(real: Changed, effect: np.ndarray) -> float:
    """Share of the significant genes whose predicted effect has the real sign; no effect has none."""
    at = real.significant
    return float((np.sign(effect[at]) == np.sign(real.effect[at])).mean()) if at.any() else np.nan


def de_spearman(real: Changed, effect: np.ndarray) -> float:
    """Rank correlation of effects over the significant genes; 0 for a constant prediction, NaN for fewer
    than three genes.
    """
    at = real.significant
    if at.sum() < 3:
        return np.nan
    ranks = [scipy.stats.rankdata(e[at])[None] for e in (real.effect, effect)]
    return float(pearson(*ranks)[0, 0])


def de_auprc(real: Changed, score: np.ndarray) -> float:
    """Average precision of the significant genes ranked by ``score`` (ties shared); NaN if there are none."""
    labels = real.significant
    return float(average_precision_score(labels, score)) if 0 < labels.sum() < len(labels) else np.nan


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Energy distance of two samples [n, d], the unbiased form: pairs of a cell with itself do not count.

    2 E|x−y| − E|x−x'| − E|y−y'|, Euclidean. The form that counts self-pairs grows as samples shrink
    (0.04 at 500 cells, 1.0 at 20, of one distribution), which would rank perturbations by their cell numbers.
    """
    within = [cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(2 * cdist(x, y).mean() - sum(within))


def mmd(x: np.ndarray, y: np.ndarray, width: float) -> float:
    """Squared maximum mean discrepancy (Gretton et al. 2012), unbiased, Gaussian kernel of this width."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-cdist(a, b, "sqeuclidean") / (2 * width**2))

    within = [(kernel(z, z).sum() - len(z)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(sum(within) - 2 * kernel(x, y).mean())


def variance_error(real: np.ndarray, predicted: np.ndarray) -> float:
    """Median over genes of |log2(predicted variance / real variance)| between cells: 0 where the spread is
    right; genes that do not vary in the real cells are left out.
    """
    a, b = np.var(real, axis=0, ddof=1), np.var(predicted, axis=0, ddof=1)
    known = a > 1e-6
    return float(np.median(np.abs(np.log2(np.maximum(b[known], 1e-6) / a[known])))) if known.any() else np.nan


def similarity(effects: np.ndarray) -> float:
    """Mean Pearson correlation between the effects [n, genes] of different conditions: near 1 says that one
    answer is given to every question; NaN for fewer than two.
    """
    n = len(effects)
    if n < 2:
        return np.nan
    r = pearson(effects, effects)
    return float((r.sum() - np.trace(r)) / (n * (n - 1)))
