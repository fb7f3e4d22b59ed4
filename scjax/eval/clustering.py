"""Clustering: do the neighbourhoods of a representation follow the labels, without having seen them?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import sklearn
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score

from scjax.eval import stats
from scjax.eval.checks import matrix, require_aligned, samples, select
from scjax.eval.environment import missing, one_thread, version
from scjax.eval.results import Results
from scjax.eval.schema import FIXED, ORACLE, SWEEP

RESOLUTIONS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)
N_NEIGHBORS = 15


@one_thread
def clustering(
    X: Any,
    labels: Any,
    *,
    name: str = "embedding",
    kind: str = "model",
    embedding_key: str = "",
    resolutions: Sequence[float] = RESOLUTIONS,
    min_class_size: int = 10,
    max_cells: int = 3000,
    repeats: int = 5,
    seed: int = 0,
    n_boot: int = 1000,
) -> Results:
    """Agreement of unsupervised clusters with labels: ARI, NMI (arithmetic), AMI.

    Leiden (igraph, modularity) on the graph of 15 Euclidean neighbours at resolution 1.0, which is the score
    to compare; the mean over a sweep of resolutions; and the best of the sweep by NMI, an oracle's choice
    because it looks at the labels. k-means with as many clusters as labels beside it. Without scanpy and
    igraph the Leiden rows are skipped.

    Args:
        X: representation [cells, dimensions].
        labels: label of each cell; cells without one are dropped.
        max_cells: at most about this many cells are clustered at once, samples stratified by label.
        repeats: samples drawn of larger data; scores are their means.
        n_boot: resamples of cells, clusters kept as they are, and of the samples, behind the 95 % percentile
            intervals.

    Raises:
        ValueError: X or labels cannot be used.
    """
    require_aligned(embedding=X, labels=labels)
    cells = select(labels, min_class_size=min_class_size)
    features = matrix(X, name, len(labels), zero_rows=kind != "model")[cells.rows]
    drawn = samples(cells.label, max_cells, repeats, seed)
    reason = missing("scanpy", "igraph", "umap")
    found: dict[tuple[str, str, str], list[np.ndarray]] = {}  # (head, setting, metric)
    chosen: list[float] = []
    for r, at in enumerate(drawn):
        y = cells.label[at]
        weights = stats.resample(len(at), n_boot, seed, "clustering" if r == 0 else f"clustering/{r}")
        scores = {("kmeans", ""): _score(y, _kmeans(features[at], y, seed), weights)}
        if not reason:
            swept, best = _sweep(features[at], y, {*resolutions, 1.0}, weights, seed)
            scores |= {("leiden", setting): of_setting for setting, of_setting in swept.items()}
            chosen.append(best)
        for place, of_place in scores.items():
            for metric, score in of_place.items():
                found.setdefault((*place, metric), []).append(score)

    out = Results(facts={"dropped": cells.dropped, "clustering_samples": len(drawn)})
    over = f", {len(drawn)} samples" if len(drawn) > 1 else ""
    common: dict[str, Any] = {
        "task": "clustering",
        "model_id": name,
        "model_kind": kind,
        "embedding_key": embedding_key,
        "n_cells": len(drawn[0]),
        "ci_method": f"percentile bootstrap over cells{over}, clusters fixed, centred",
    }
    impl = {
        "kmeans": f"scjax.eval; scikit-learn=={sklearn.__version__}",
        "leiden": f"scjax.eval; scanpy=={version('scanpy')}, igraph=={version('igraph')}",
    }
    tried = ", ".join(f"{r:g}" for r in sorted({*resolutions, 1.0}))
    notes = {
        ("kmeans", ""): f"k = {len(cells.label_names)}, the number of labels",
        (
            "leiden",
            ORACLE,
        ): f"resolution {', '.join(f'{r:g}' for r in sorted(set(chosen)))}, chosen with the labels",
        ("leiden", SWEEP): f"resolutions {tried}",
    }
    for (head, setting, metric), scores_of in found.items():
        score = stats.over_repeats(scores_of, n_boot, seed, "clustering samples")
        about = {"head": head, "setting": setting, "metric": metric, "metric_impl": impl[head]}
        out.add(score, **common, **about, note=notes.get((head, setting), ""))
    if reason:
        out.skip(reason, **common, head="leiden", setting=FIXED, metric="nmi")
    return out


def _kmeans(X: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    return KMeans(len(np.unique(y)), n_init=3, random_state=seed).fit_predict(X)


def _score(y: np.ndarray, clusters: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Agreement of labels and clusters; AMI and the number of clusters without resamples."""
    ami = adjusted_mutual_info_score(y, clusters)
    found = stats.agreement(y, clusters, weights)
    return found | {"ami": np.array([ami]), "n_clusters": np.array([len(np.unique(clusters))])}


def _sweep(
    X: np.ndarray, y: np.ndarray, resolutions: set[float], weights: np.ndarray, seed: int
) -> tuple[dict[str, dict[str, np.ndarray]], float]:
    """Scores of Leiden by setting, and the resolution that the labels favour."""
    graph = neighbour_graph(X, seed)
    sweep = {r: leiden(graph, r, seed) for r in sorted(resolutions)}
    curve = {r: _score(y, clusters, weights[:1]) for r, clusters in sweep.items()}
    best = max(curve, key=lambda r: curve[r]["nmi"][0])
    return {
        FIXED: _score(y, sweep[1.0], weights),
        ORACLE: _score(y, sweep[best], weights),
        SWEEP: {m: np.mean([found[m] for found in curve.values()], axis=0) for m in curve[best]},
    }, best


def neighbour_graph(X: np.ndarray, seed: int) -> ad.AnnData:
    """An AnnData that holds scanpy's graph of 15 neighbours of ``X``."""
    import scanpy as sc

    holder = ad.AnnData(np.zeros((len(X), 1), np.float32))
    holder.obsm["X"] = X
    sc.pp.neighbors(holder, n_neighbors=min(N_NEIGHBORS, len(X) - 1), use_rep="X", random_state=seed)
    return holder


def leiden(graph: ad.AnnData, resolution: float, seed: int) -> np.ndarray:
    """Leiden clusters of a neighbour graph, as codes."""
    import scanpy as sc

    sc.tl.leiden(
        graph, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed
    )
    return graph.obs["leiden"].cat.codes.to_numpy().astype(np.int64)


def umap(X: np.ndarray, seed: int) -> np.ndarray:
    """UMAP coordinates float32[cells, 2] of a representation, for looking at only."""
    import scanpy as sc

    graph = neighbour_graph(X, seed)
    sc.tl.umap(graph, random_state=seed)
    return np.asarray(graph.obsm["X_umap"], np.float32)
