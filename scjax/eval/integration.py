"""Batch integration: are cells of one type together whatever their batch, and do types stay apart?

Two axes that are never summed: a representation of pure noise mixes batches perfectly. The measures are
those of scib-metrics (Luecken et al. 2022; BRAS: Rautenstrauch & Ohler 2025; CiLISI: Andreatta et al. 2024),
computed here per cell in NumPy, so that they need no accelerator library, cost a second and have intervals;
the tests hold them to scib-metrics' values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import sklearn
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors

from scjax.eval import stats
from scjax.eval.checks import matrix, require_aligned, require_shared_labels, samples, select, sharing
from scjax.eval.environment import missing, one_thread, version
from scjax.eval.results import Results

N_LISI, N_GRAPH, N_KBET = 90, 15, 50  # neighbours, the cell itself included
MIN_CELLS = 10  # per batch and label, for measures within a label
NO_BATCH_SIGNAL = 3.0  # times the variance that random batches explain: less leaves no effect to remove


@one_thread
def integration(
    X: Any,
    labels: Any,
    batch: Any,
    *,
    pre: Any = None,
    name: str = "embedding",
    kind: str = "model",
    embedding_key: str = "",
    kbet: bool = False,
    min_class_size: int = 10,
    max_cells: int = 3000,
    repeats: int = 5,
    seed: int = 0,
    n_boot: int = 1000,
) -> Results:
    """Bio conservation and batch mixing of a representation, side by side.

    Bio: silhouette by label, that of isolated labels (which lie in the fewest batches; undefined where all
    lie in equally many), cLISI, k-means NMI and ARI. Batch: BRAS, iLISI, CiLISI (iLISI within each label),
    graph connectivity and, given ``pre``, the principal-component-regression comparison. All lie in [0, 1]
    (ARI from −0.5), higher is better. The axes "bio" and "batch" are the plain means of their measures; the
    lenient silhouette by batch and kBET are given but belong to no axis. iLISI of a perfect mixture is below
    1; its row says what random batches would score.

    Args:
        X: representation [cells, dimensions].
        labels, batch: of each cell; cells without one of them are dropped.
        pre: representation before any integration, such as principal components of all cells.
        kbet: also kBET per label, through scib-metrics (slow).
        max_cells: at most about this many cells are scored at once, samples stratified by label and batch.
        repeats: samples drawn of larger data; scores are their means.
        n_boot: resamples of cells, neighbours kept as they are, and of the samples, behind the 95 %
            percentile intervals. Graph connectivity and kBET have no interval within a sample and enter as
            constants.

    Raises:
        ValueError: X, labels or batch cannot be used, or batch and labels are confounded.
    """
    require_aligned(embedding=X, labels=labels, batch=batch)
    cells = select(labels, batch=batch, min_class_size=min_class_size)
    require_shared_labels(cells)
    assert cells.batch is not None
    features = matrix(X, name, len(labels), zero_rows=kind != "model")[cells.rows]
    before = None
    if pre is not None:
        before = matrix(pre, "pre-integration representation", len(labels), zero_rows=True)[cells.rows]
    absent = missing("scib_metrics") if kbet else ""
    drawn = samples(cells.label * len(cells.batch_names) + cells.batch, max_cells, repeats, seed)
    found: dict[str, list[np.ndarray]] = {}
    for r, at in enumerate(drawn):
        scores = _measure(
            features[at],
            cells.label[at],
            cells.batch[at],
            None if before is None else before[at],
            stats.resample(len(at), n_boot, seed, "integration" if r == 0 else f"integration/{r}"),
            seed,
            kbet and not absent,
        )
        for metric, score in scores.items():
            found.setdefault(metric, []).append(score)
    merged = {m: stats.over_repeats(s, n_boot, seed, "integration samples") for m, s in found.items()}

    out = Results(facts={"dropped": cells.dropped, "integration_samples": len(drawn)})
    over = f" and over {len(drawn)} samples" if len(drawn) > 1 else ""
    common: dict[str, Any] = {
        "task": "integration",
        "model_id": name,
        "model_kind": kind,
        "embedding_key": embedding_key,
        "n_cells": len(drawn[0]),
        "n_groups": len(cells.batch_names),
        "metric_impl": f"scjax.eval; scikit-learn=={sklearn.__version__}",
        "ci_method": f"percentile bootstrap over cells, neighbours fixed,{over}".rstrip(","),
    }
    for axis, metrics in AXES.items():
        defined = [m for m in metrics if m in merged and np.isfinite(merged[m][0])]
        score = np.mean(np.broadcast_arrays(*(merged[m] for m in defined)), 0)
        out.add(score, **common, axis=axis, metric=axis, note=f"mean of {', '.join(defined)}")
    null = f"a random mixture would score {merged.pop('ilisi of random batches')[0]:.3f}"
    notes = {"ilisi": null, "silhouette_batch": "lenient: to the nearest other batch; in no axis"}
    for key, score in merged.items():
        metric, _, label = key.partition(" of ")
        note = notes.get(key, "") if np.isfinite(score[0]) else _UNDEFINED[metric]
        about = {**common, "axis": _AXIS[metric], "metric": metric, "note": note}
        if metric == "kbet":
            about["metric_impl"] = f"scib-metrics=={version('scib_metrics')}"
        out.add(score, **about, label=cells.label_names[int(label)] if label else "")
    if absent:
        out.skip(absent, **common, axis="batch", metric="kbet")
    return out


AXES = {
    "bio": ("silhouette_label", "isolated_labels", "clisi", "kmeans_nmi", "kmeans_ari"),
    "batch": ("bras", "ilisi", "cilisi", "graph_connectivity", "pcr"),
}
"""What each axis is the mean of, where it is defined."""

_AXIS = {m: axis for axis, metrics in AXES.items() for m in metrics} | dict.fromkeys(
    ("silhouette_batch", "kbet"), "batch"
)

_UNDEFINED = {
    "isolated_labels": "all labels lie in equally many batches: none is isolated",
    "pcr": "before integration batches explain no more variance than random ones would",
    "bras": "no label has two batches",
    "silhouette_batch": "no label has two batches",
    "cilisi": f"no label has {MIN_CELLS} cells in each of two batches",
    "kbet": "no label has enough cells in two batches",
}


def _measure(
    X: np.ndarray,
    y: np.ndarray,
    b: np.ndarray,
    before: np.ndarray | None,
    weights: np.ndarray,
    seed: int,
    kbet: bool,
) -> dict[str, np.ndarray]:
    """All scores of one sample of cells by metric; "cilisi of 3" is that of label 3."""
    X = X.astype(np.float64)  # of distances between close cells single precision leaves three digits
    neighbours = _neighbours(X, max(N_LISI, N_GRAPH))
    n_labels, n_batches = int(y.max()) + 1, int(b.max()) + 1
    within = _cilisi(X, y, b)
    width = (silhouette_samples(X, y) + 1) / 2
    clusters = KMeans(n_labels, n_init=3, random_state=seed).fit_predict(X)
    mixed = np.random.default_rng([seed, 4]).permutation(b)
    found = {
        "silhouette_label": stats.mean(width, weights),
        "isolated_labels": stats.mean_over_labels(np.where(_isolated(y, b), width, np.nan), y, weights),
        "clisi": stats.median((n_labels - _lisi(*neighbours, y)) / (n_labels - 1), weights),
        **{f"kmeans_{metric}": score for metric, score in stats.agreement(y, clusters, weights).items()},
        "bras": stats.mean_over_labels(_bras(X, y, b), y, weights),
        "silhouette_batch": stats.mean_over_labels(_silhouette_batch(X, y, b), y, weights),
        "ilisi": stats.median((_lisi(*neighbours, b) - 1) / (n_batches - 1), weights),
        "ilisi of random batches": stats.median(
            (_lisi(*neighbours, mixed) - 1) / (n_batches - 1), weights[:1]
        ),
        "cilisi": stats.mean_over_labels(within, y, weights),
        "graph_connectivity": np.array([_graph_connectivity(neighbours[1][:, :N_GRAPH], y)]),
    }
    if before is not None:
        found["pcr"] = _pcr(before, X, b, weights)
    if kbet:
        found["kbet"] = np.array([_kbet(*neighbours, y, b)])
    for label in np.unique(y[np.isfinite(within)]):
        found[f"cilisi of {label}"] = stats.mean(np.where(y == label, within, np.nan), weights)
    return found


def _isolated(y: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cells of the labels that occur in the fewest batches; none where all occur in equally many."""
    batches = sharing(y, b).sum(1)
    return (batches[y] == batches.min()) & (batches.min() < batches.max())


def _silhouette_batch(X: np.ndarray, y: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 − |silhouette by batch| per cell among its label, Euclidean, against the nearest other batch."""
    value = np.full(len(X), np.nan)
    for rows in _within_labels(y, b, 1).values():
        if len(np.unique(b[rows])) < len(rows):
            value[rows] = 1 - np.abs(silhouette_samples(X[rows], b[rows]))
    return value


def _neighbours(X: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact Euclidean neighbours: distances and indices [cells, k], the cell itself first."""
    k = min(k, len(X))
    return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(X).kneighbors(X)


def _lisi(distances: np.ndarray, indices: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Local inverse Simpson index per cell (Korsunsky et al. 2019): the effective number of categories
    around it.

    Neighbours are weighted by a Gaussian kernel in the distance whose width gives every cell the same
    perplexity, a third of its number of neighbours; found by bisection.
    """
    k = distances.shape[1]
    others = indices != np.arange(len(indices))[:, None]
    target = np.log(np.floor(k / 3))
    beta = np.ones(len(distances))
    low, high = np.full(len(distances), -np.inf), np.full(len(distances), np.inf)
    for _ in range(50):
        P = np.exp(-distances * beta[:, None]) * others
        total = P.sum(1)
        safe = np.where(total > 0, total, 1)
        entropy = np.where(total > 0, np.log(safe) + beta * (distances * P).sum(1) / safe, 0)
        gap = entropy - target
        if (np.abs(gap) < 1e-5).all():
            break
        active, wide = np.abs(gap) >= 1e-5, gap > 0
        low, high = np.where(active & wide, beta, low), np.where(active & ~wide, beta, high)
        up = np.where(np.isinf(high), beta * 2, (beta + np.where(np.isinf(high), beta, high)) / 2)
        down = np.where(np.isinf(low), beta / 2, (beta + np.where(np.isinf(low), beta, low)) / 2)
        beta = np.where(active, np.where(wide, up, down), beta)
    P /= safe[:, None]
    shares = np.stack([(P * (codes[indices] == c)).sum(1) for c in range(codes.max() + 1)])
    simpson = (shares**2).sum(0)
    return np.where(simpson > 0, 1 / np.where(simpson > 0, simpson, 1), np.nan)


def _within_labels(y: np.ndarray, b: np.ndarray, at_least: int) -> dict[int, np.ndarray]:
    """Positions of each label's cells, for labels with two or more batches of at least so many cells (those
    batches).
    """
    found = {}
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        size = np.bincount(b[rows])
        rows = rows[size[b[rows]] >= at_least]
        if len(np.unique(b[rows])) > 1:
            found[int(label)] = rows
    return found


def _cilisi(X: np.ndarray, y: np.ndarray, b: np.ndarray) -> np.ndarray:
    """iLISI of each cell among the cells of its label, scaled to [0, 1]; NaN where the label lacks two
    batches.
    """
    value = np.full(len(X), np.nan)
    for rows in _within_labels(y, b, MIN_CELLS).values():
        batches = np.unique(b[rows], return_inverse=True)[1]
        value[rows] = (_lisi(*_neighbours(X[rows], N_LISI), batches) - 1) / np.max(batches)
    return value


def _bras(X: np.ndarray, y: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 − |silhouette by batch| per cell among its label, cosine distance, against all other batches; NaN
    where undefined.
    """
    unit = X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)
    value = np.full(len(X), np.nan)
    for rows in _within_labels(y, b, 1).values():
        batches = np.unique(b[rows], return_inverse=True)[1]
        n_batches = int(np.max(batches)) + 1
        if n_batches == len(rows):
            continue
        member = np.eye(n_batches)[batches]
        distance = (1 - unit[rows] @ unit[rows].T).clip(0).astype(np.float64)
        np.fill_diagonal(distance, 0)
        sums, size = distance @ member, member.sum(0)
        own = (sums * member).sum(1)
        inside = own / np.maximum(size[batches] - 1, 1)
        outside = (sums.sum(1) - own) / (len(rows) - size[batches])
        widest = np.maximum(inside, outside)
        silhouette = np.where(widest > 0, (outside - inside) / np.where(widest > 0, widest, 1), 0)
        value[rows] = 1 - np.abs(np.where(size[batches] > 1, silhouette, 0))
    return value


def _graph_connectivity(indices: np.ndarray, y: np.ndarray) -> float:
    """Mean over labels of the share of cells in the largest strongly connected piece of the neighbour
    graph.
    """
    n, k = indices.shape
    graph = sp.csr_matrix(
        (np.ones(n * k, np.int8), indices.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n)
    )
    shares = []
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        pieces = connected_components(graph[rows][:, rows], connection="strong")[1]
        shares.append(np.max(np.bincount(pieces)) / len(rows))
    return float(np.mean(shares))


def _batch_share(X: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the total variance that lies between batches, float64[len(weights)].

    This is principal component regression over all components: a rotation changes neither the sum of squares
    nor its part between batches.
    """
    X = X.astype(np.float64) - X.mean(0, dtype=np.float64)
    between, overall = np.zeros(len(weights)), np.zeros((len(weights), X.shape[1]))
    for code in np.unique(b):
        part = weights[:, b == code].astype(np.float64)
        sums = part @ X[b == code]
        between += (sums**2).sum(1) / np.maximum(part.sum(1), 1)
        overall += sums
    centre = (overall**2).sum(1) / weights.sum(1, dtype=np.float64)
    total = weights @ (X**2).sum(1) - centre
    return (between - centre) / np.where(total > 0, total, 1)


def _pcr(before: np.ndarray, after: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """By which part of itself the batch share of variance has fallen; not below 0, NaN if there was none."""
    pre, post = _batch_share(before, b, weights), _batch_share(after, b, weights)
    by_chance = (len(np.unique(b)) - 1) / (len(b) - 1)
    if pre[0] < NO_BATCH_SIGNAL * by_chance:
        return np.array([np.nan])
    return stats.centred(np.clip((pre - post) / pre, 0, 1))


def _kbet(distances: np.ndarray, indices: np.ndarray, y: np.ndarray, b: np.ndarray) -> float:
    from scib_metrics import kbet_per_label
    from scib_metrics.nearest_neighbors import NeighborsResults

    neighbours = NeighborsResults(indices=indices[:, :N_KBET], distances=distances[:, :N_KBET])
    return float(kbet_per_label(neighbours, b, y))
