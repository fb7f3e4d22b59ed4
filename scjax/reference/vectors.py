"""Embedded cells: which model made them, exact search among them, and the votes of neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scjax.api import Model, load

if TYPE_CHECKING:
    import anndata


def as_model(model: Model | str | Path) -> Model:
    return model if isinstance(model, Model) else load(model)


def identity(model: Model) -> dict[str, Any]:
    """Which model embeds: where it is, and what tells it from another."""
    from scjax.nn.module import flatten
    from scjax.train.tables import hash_of

    arrays = flatten(model.params) | flatten(model.buffers)
    return {
        "model": str(Path(model.path).resolve()),
        "system": model.system,
        "step": model.step,
        "vocabulary": model.vocabulary.hash,
        "parameters": hash_of({path: np.asarray(value) for path, value in arrays.items()}),
    }


def gene_overlap(model: Model, adata: anndata.AnnData, layer: str | None) -> dict[str, int]:
    match = model.match(adata, layer)
    return {"matched": match.n_matched, "in data": len(match.names), "in model": len(model.vocabulary)}


def obsm_of(adata: anndata.AnnData, key: str, width: int | None = None) -> np.ndarray:
    if key not in adata.obsm:
        raise ValueError(f"no obsm matrix {key!r}; there are {sorted(adata.obsm.keys())}")
    vectors = np.asarray(adata.obsm[key], np.float32)
    if vectors.ndim != 2 or (width is not None and vectors.shape[1] != width):
        raise ValueError(f"obsm[{key!r}] has the shape {vectors.shape}; the reference has {width} dimensions")
    return vectors


def scaled(vectors: np.ndarray, metric: str) -> np.ndarray:
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f'metric = {metric!r}: "cosine" or "euclidean"')
    vectors = np.asarray(vectors, np.float32)
    if len(bad := np.flatnonzero(~np.isfinite(vectors).all(1))):
        raise ValueError(f"{len(bad)} cells have embeddings that are not finite, the first is row {bad[0]}")
    if metric == "euclidean":
        return vectors
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    if len(bad := np.flatnonzero(length == 0)):
        raise ValueError(f'row {bad[0]} has an embedding of zeros, which metric "cosine" cannot place')
    return vectors / length


def label_column(column: pd.Series, unlabelled: str) -> pd.Categorical:
    names = column.astype(object).where(column.notna(), None)
    return pd.Categorical([None if x is None or str(x) == unlabelled else str(x) for x in names])


def nearest(index: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.neighbors import NearestNeighbors

    k = min(k, len(index))
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(np.asarray(index, np.float32))
    return search.kneighbors(np.asarray(query, np.float32))


def votes_of(distance: np.ndarray, code: np.ndarray, n: int) -> np.ndarray:
    square = distance.astype(np.float64) ** 2
    weight = np.exp(-square / np.maximum(square.mean(1, keepdims=True), 1e-24)) * (code >= 0)
    share = np.zeros((len(code), n))
    np.add.at(share, (np.arange(len(code))[:, None], np.maximum(code, 0)), weight)
    return share / np.maximum(share.sum(1, keepdims=True), 1e-24)
