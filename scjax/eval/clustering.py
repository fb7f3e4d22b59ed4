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
from scjax.eval.checks import matrix, select, stratified
from scjax.eval.environment import missing, one_thread, version
from scjax.eval.results import Results, row
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
        max_cells: at most about this many cells are clustered, a stratified sample by label.
        n_boot: resamples of cells, clusters kept as they are, behind the 95 % percentile intervals.

    Raises:
        ValueError: X or labels cannot be used.
    """
    cells = select(labels, min_class_size=min_class_size)
    cells = cells.take(stratified(cells.label, max_cells, seed))
    features = matrix(X, name, len(labels), zero_rows=kind != "model")[cells.rows]
    out = Results(facts={"dropped": cells.dropped})
    common: dict[str, Any] = {
        "task": "clustering",
        "model_id": name,
        "model_kind": kind,
        "embedding_key": embedding_key,
        "n_cells": len(cells),
        "ci_method": "percentile bootstrap over cells, clusters fixed, centred",
    }
    weights = stats.resample(len(cells), n_boot, seed, "clustering")

    def score(clusters: np.ndarray, weights: np.ndarray = weights) -> dict[str, np.ndarray]:
        found = stats.agreement(cells.label, clusters, weights)
        ami = adjusted_mutual_info_score(cells.label, clusters)
        return found | {"ami": np.array([ami]), "n_clusters": np.array([len(np.unique(clusters))])}

    def add(scores: dict[str, np.ndarray], **about: Any) -> None:
        for metric, value in scores.items():
            out.add(value, **common, **about, metric=metric)

    k = len(cells.label_names)
    clusters = KMeans(k, n_init=3, random_state=seed).fit_predict(features)
    impl = f"scjax.eval; scikit-learn=={sklearn.__version__}"
    add(score(clusters), head="kmeans", metric_impl=impl, note=f"k = {k}, the number of labels")
    if reason := missing("scanpy", "igraph", "umap"):
        out.rows.append(
            row(**common, head="leiden", setting=FIXED, metric="nmi", status="skipped", note=reason)
        )
        return out
    impl = f"scjax.eval; scanpy=={version('scanpy')}, igraph=={version('igraph')}"
    graph = neighbour_graph(features, seed)
    sweep = {r: leiden(graph, r, seed) for r in sorted({*resolutions, 1.0})}
    curve = {r: score(clusters, weights[:1]) for r, clusters in sweep.items()}
    best = max(curve, key=lambda r: curve[r]["nmi"][0])
    swept = {metric: np.mean([found[metric] for found in curve.values()], axis=0) for metric in curve[best]}
    chosen = f"resolution {best:g}, chosen with the labels"
    add(score(sweep[1.0]), head="leiden", setting=FIXED, metric_impl=impl)
    add(score(sweep[best]), head="leiden", setting=ORACLE, metric_impl=impl, note=chosen)
    add(
        swept,
        head="leiden",
        setting=SWEEP,
        metric_impl=impl,
        note=f"resolutions {', '.join(f'{r:g}' for r in curve)}",
    )
    return out


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
