"""Scores from tables of counts, together with their bootstrap.

A score is an array [1 + n_boot]: the value itself, then its value in each resample (or an array of one,
where there is no bootstrap). Scores here are functions of small tables (confusion counts, cluster
contingencies) or of one number per cell, so that resampling cells is re-weighting them and a thousand
resamples cost one pass. Methods scored under the same weights are compared by subtracting their scores:
nothing more is needed for a paired interval.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

FEW_GROUPS = 10  # with fewer groups than this, groups cannot sensibly be resampled


def resample(n: int, n_boot: int, seed: int, name: str) -> np.ndarray:
    """Weights uint8[1 + n_boot, n]: ones, then how often each of n units is drawn in each resample of size n.

    A function of its arguments alone, so that all methods see the same resamples.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    weights = np.ones((1 + n_boot, n), np.uint8)
    for b in range(n_boot):
        weights[1 + b] = np.bincount(rng.integers(n, size=n), minlength=n)
    return weights


def interval(score: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the resamples of a score."""
    tail = (1 - level) / 2
    low, high = np.nanquantile(score[1:], [tail, 1 - tail])
    return float(low), float(high)


def p_value(difference: np.ndarray) -> float:
    """Two-sided p-value of a paired difference: how often its resamples fall on the other side of zero.

    One is added to both counts, so that it is never below 2 / (resamples + 1).
    """
    resamples = difference[1:][np.isfinite(difference[1:])]
    below, above = ((resamples <= 0).sum(), (resamples >= 0).sum())
    return float(min(1.0, 2 * (1 + min(below, above)) / (1 + len(resamples))))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values corrected for their number, step down (Holm 1979)."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    out = np.empty_like(p)
    out[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    return out


def centred(score: np.ndarray) -> np.ndarray:
    """A score whose resamples are moved to have its value as their mean.

    A resample holds cells several times over, and copies agree with each other: agreement of clusterings and
    shares of variance come out higher in resamples than in the data, by as much as the width of their
    intervals. So does the precision of a ranking, where copies of a hit follow one another.
    """
    known = score[1:][np.isfinite(score[1:])]
    return np.append(score[:1], score[1:] - known.mean() + score[0]) if len(known) else score


def tally(codes: np.ndarray, n_codes: int, weights: np.ndarray) -> np.ndarray:
    """Weighted counts of each code: int64[len(weights), n_codes]."""
    member = np.zeros((len(codes), n_codes), np.float32)
    member[np.arange(len(codes)), codes] = 1
    # single precision counts exactly to 2^24, more cells than are ever resampled
    return (weights.astype(np.float32) @ member).astype(np.int64)


def classification(
    truth: np.ndarray, guess: np.ndarray, seen: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores of guessed classes (codes per cell) of which ``seen`` (bool[classes]) occurred in training.

    F1 and recall are averaged over the classes with support among these cells and nothing else: a class that
    is only ever guessed lowers the recall of the classes it took cells from, but adds no term of its own.
    "macro_f1_seen" averages over the classes that could be learnt.
    """
    hit = truth == guess
    hits = tally(truth[hit], len(seen), weights[:, hit])
    support, guessed = (tally(codes, len(seen), weights) for codes in (truth, guess))
    supported = support > 0
    f1 = np.where(supported, 2 * hits / np.maximum(support + guessed, 1), np.nan)
    recall = np.where(supported, hits / np.maximum(support, 1), np.nan)
    total = support.sum(1)
    return {
        "macro_f1": row_mean(f1),
        "balanced_accuracy": row_mean(recall),
        "accuracy": hits.sum(1) / total,
        "macro_f1_seen": row_mean(np.where(seen, f1, np.nan)),
        "out_of_set_rate": (guessed * ~supported).sum(1) / total,
    }


def agreement(truth: np.ndarray, clusters: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Adjusted Rand index and normalised mutual information (arithmetic mean) of labels and clusters
    (codes).
    """
    shape = (int(truth.max()) + 1, int(clusters.max()) + 1)
    table = tally(truth * shape[1] + clusters, shape[0] * shape[1], weights).reshape(-1, *shape).astype(float)
    n, rows, columns = table.sum((1, 2)), table.sum(2), table.sum(1)

    def pairs(x: np.ndarray) -> np.ndarray:
        return x * (x - 1) / 2

    together, in_rows, in_columns = pairs(table).sum((1, 2)), pairs(rows).sum(1), pairs(columns).sum(1)
    chance = in_rows * in_columns / np.maximum(pairs(n), 1)
    room = (in_rows + in_columns) / 2 - chance
    ari = np.where(room > 0, (together - chance) / np.where(room > 0, room, 1), 1.0)

    def entropy(counts: np.ndarray) -> np.ndarray:
        p = counts.reshape(len(n), -1) / n[:, None]
        return -(p * np.log(np.where(p > 0, p, 1))).sum(1)

    size = (entropy(rows) + entropy(columns)) / 2
    mutual = np.maximum(2 * size - entropy(table), 0)
    nmi = np.where(size > 0, mutual / np.where(size > 0, size, 1), 1.0)
    return {"nmi": centred(nmi), "ari": centred(ari)}


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of one number per cell; cells with NaN are left out."""
    known = np.isfinite(values)
    drawn = weights[:, known].sum(1, dtype=float)
    return weights[:, known] @ values[known] / np.where(drawn > 0, drawn, np.nan)


def mean_over_labels(values: np.ndarray, label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over labels of the mean over their cells; cells with NaN are left out."""
    parts = [
        mean(values[label == i], weights[:, label == i])
        for i in np.unique(label)
        if np.isfinite(values[label == i]).any()
    ]
    return row_mean(np.stack(parts, 1)) if parts else np.full(len(weights), np.nan)


def median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Median of one number per cell; cells with NaN are left out."""
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    mass = np.cumsum(weights[:, order], axis=1, dtype=np.int64)
    middle = [(mass >= (mass[:, -1:] + i) // 2).argmax(1) for i in (1, 2)]
    return values[order][np.stack(middle)].mean(0)


def ranking(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """How well a score ranks positives above the rest: AUROC, average precision (both as in scikit-learn:
    ties count half in the one and share a threshold in the other, so their order is of no account) and the
    false positive rate at the threshold that finds 95 % of the positives.

    NaN where a resample lacks positives or negatives; resamples are centred on the value.

    Args:
        score: [n], higher for positives. positive: bool[n]. weights: [1 + n_boot, n].
    """
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # last of each run of ties
    drawn = weights[:, order].astype(np.float32)  # counts exactly to 2^24
    called = np.cumsum(drawn, axis=1)[:, ends]
    hits = np.cumsum(drawn * positive[order], axis=1)[:, ends]
    misses = called - hits
    positives, negatives = hits[:, -1].astype(float), misses[:, -1].astype(float)
    new_hits, new_misses = np.diff(hits, axis=1, prepend=0), np.diff(misses, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN where there are none
        auroc = np.einsum("bn,bn->b", new_misses, hits - new_hits / 2, dtype=float) / positives / negatives
        precision = hits / np.maximum(called, 1)
        average = np.einsum("bn,bn->b", new_hits, precision, dtype=float) / positives
        at = np.argmax(hits >= (0.95 * positives - 1e-3)[:, None], axis=1)
        fpr95 = misses[np.arange(len(at)), at] / negatives
    undefined = (positives == 0) | (negatives == 0)
    found = {"auroc": auroc, "average_precision": average, "fpr95": fpr95}
    return {name: centred(np.where(undefined, np.nan, value)) for name, value in found.items()}


def over_groups(scores: Sequence[np.ndarray], n_boot: int, seed: int, name: str) -> tuple[np.ndarray, str]:
    """Mean of one score over held-out groups (those where it is undefined left out), and how its resamples
    were drawn: over the groups from ten on, else within each of them.
    """
    defined = [s for s in scores if np.isfinite(s[0])]
    if len(defined) >= FEW_GROUPS:
        weights = resample(len(defined), n_boot, seed, name)
        return mean(np.array([s[0] for s in defined]), weights), "percentile bootstrap over groups"
    score = np.mean(defined, axis=0) if defined else np.array([np.nan])
    return score, f"percentile bootstrap over cells of each group (fewer than {FEW_GROUPS} groups)"


def over_repeats(
    scores: Sequence[np.ndarray], n_boot: int, seed: int, name: str, same_cells: bool = False
) -> np.ndarray:
    """Mean of one score over repeated draws of the data, its resamples over draws and cells.

    Each resample takes as many of the draws as there are, with replacement, and of each one of its resamples:
    that of the same number where all draws were scored on the ``same_cells``, under the same resamples of
    them, any where the draws are samples of cells. A score that has no resamples enters by its value. Draws
    where it is undefined are left out. One draw: its score as it is.
    """
    if len(scores) == 1:
        return scores[0]
    defined = [s for s in scores if np.isfinite(s[0])]
    if not defined:
        return np.array([np.nan])
    value = np.mean([s[0] for s in defined])
    if not n_boot:
        return np.array([value])
    table = np.stack([s[1:] if len(s) > 1 else np.full(n_boot, s[0]) for s in defined])
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    which = rng.integers(len(table), size=(len(table), n_boot))
    resample_of = np.arange(n_boot) if same_cells else rng.integers(n_boot, size=which.shape)
    return np.append(value, table[which, resample_of].mean(0))


def calibration(confidence: np.ndarray, correct: np.ndarray, n_bins: int = 15) -> dict[str, np.ndarray]:
    """Mean confidence, share of correct answers and number of cells in up to 15 bins of equal mass."""
    order = np.argsort(confidence, kind="stable")
    bins = [b for b in np.array_split(order, n_bins) if len(b)]
    return {
        "confidence": np.array([confidence[b].mean() for b in bins]),
        "accuracy": np.array([correct[b].mean() for b in bins]),
        "n": np.array([len(b) for b in bins]),
    }


def calibration_error(confidence: np.ndarray, correct: np.ndarray, n_bins: int = 15) -> float:
    """Expected calibration error with bins of equal mass."""
    bins = calibration(confidence, correct, n_bins)
    return float(np.abs(bins["confidence"] - bins["accuracy"]) @ bins["n"] / len(confidence))


def row_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each row without its NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    n = known.sum(1)
    return np.where(known, values, 0).sum(1) / np.where(n > 0, n, np.nan)
