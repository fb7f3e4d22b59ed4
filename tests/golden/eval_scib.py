"""Values of scib-metrics and scikit-learn to hold scjax.eval to: python tests/golden/eval_scib.py OUT.npz

Needs scib-metrics; runs JAX in double precision, so that the values are those of the formulas.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys

os.environ["JAX_ENABLE_X64"] = "1"

import numpy as np
import scib_metrics as scib
import sklearn.metrics as sk
from scib_metrics.nearest_neighbors import NeighborsResults
from sklearn.neighbors import NearestNeighbors

VERSIONS = ("scib-metrics", "scikit-learn", "jax", "numpy")


def cells() -> dict[str, np.ndarray]:
    """150 cells of three types in three batches, one type in two of them; before and after."""
    rng = np.random.default_rng(3)
    label, batch = rng.integers(3, size=150), rng.integers(3, size=150)
    batch[label == 2] %= 2
    X = np.eye(3, 12)[label] * 3 + 0.9 * rng.normal(size=(150, 12))
    shift = np.eye(3, 12, 9)[batch]
    return {
        "label": label,
        "batch": batch,
        "after": (X + 0.8 * shift).astype(np.float32),
        "before": (X + 3 * shift).astype(np.float32),
        "guess": np.where(rng.random(150) < 0.7, label, rng.integers(3, size=150)),
        "clusters": np.where(rng.random(150) < 0.6, label, rng.integers(5, size=150)),
        "score": np.round(rng.normal(size=150) + (label == 1), 1),  # with ties
    }


def near(X: np.ndarray, k: int) -> NeighborsResults:
    distances, indices = NearestNeighbors(n_neighbors=min(k, len(X)), algorithm="brute").fit(X).kneighbors(X)
    return NeighborsResults(indices=indices, distances=distances)


def values(c: dict[str, np.ndarray]) -> dict[str, float]:
    X, before, y, b = c["after"].astype(float), c["before"].astype(float), c["label"], c["batch"]
    graph = near(X, 90)
    within = [
        np.mean((scib.lisi_knn(near(X[y == i], 90), b[y == i]) - 1) / b[y == i].max()) for i in range(3)
    ]
    fpr, tpr, _ = sk.roc_curve(y == 1, c["score"], drop_intermediate=False)
    return {
        "silhouette_label": scib.silhouette_label(X, y),
        "silhouette_batch": scib.silhouette_batch(X, y, b),
        "isolated_labels": scib.isolated_labels(X, y, b),
        "clisi": scib.clisi_knn(graph, y),
        "bras": scib.bras(X, y, b),
        "ilisi": scib.ilisi_knn(graph, b),
        "cilisi": float(np.mean(within)),
        "graph_connectivity": scib.graph_connectivity(graph.subset_neighbors(15), y),
        "pcr": scib.pcr_comparison(before, X, b, categorical=True),
        "macro_f1": sk.f1_score(y, c["guess"], average="macro"),
        "balanced_accuracy": sk.balanced_accuracy_score(y, c["guess"]),
        "accuracy": sk.accuracy_score(y, c["guess"]),
        "ari": sk.adjusted_rand_score(y, c["clusters"]),
        "nmi": sk.normalized_mutual_info_score(y, c["clusters"]),
        "ami": sk.adjusted_mutual_info_score(y, c["clusters"]),
        "auroc": sk.roc_auc_score(y == 1, c["score"]),
        "average_precision": sk.average_precision_score(y == 1, c["score"]),
        "fpr95": fpr[np.argmax(tpr >= 0.95)],
    }


if __name__ == "__main__":
    made = cells()
    found = values(made)
    versions = [f"{p}=={importlib.metadata.version(p)}" for p in VERSIONS]
    np.savez_compressed(
        sys.argv[1], **made, names=list(found), values=[float(v) for v in found.values()], versions=versions
    )
