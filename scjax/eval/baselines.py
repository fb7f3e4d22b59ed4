"""Simple baselines made from raw counts: depth, highly variable genes, principal components.

A foundation model has to beat these before anything else is said. Whatever is estimated (which genes vary,
the components) is estimated on the rows that the caller names, so that a probe can fit it on its training
fold alone.
"""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA

N_GENES, N_COMPONENTS = 2000, 50


def _is_counts(X: Any) -> bool:
    values = X.data if sp.issparse(X) else np.asarray(X)
    return bool(
        values.size and np.isfinite(values).all() and values.min() >= 0 and (values == np.rint(values)).all()
    )


def find_counts(adata: ad.AnnData, layer: str | None = None) -> tuple[Any, list[str]]:
    """Raw counts [cells, genes] and gene names: of ``layer`` ("X", "raw" or a layer), else of X, layer
    "counts" or raw.

    Raises KeyError for a missing layer and ValueError where the values are not non-negative integers.
    """
    places: dict[str, Any] = {"X": adata.X}
    places |= {str(name): X for name, X in adata.layers.items() if name is not None}
    if adata.raw is not None:
        places["raw"] = adata.raw.X
    places = {name: X for name, X in places.items() if X is not None}
    if layer is not None and layer not in places:
        raise KeyError(
            f"counts={layer!r} is neither 'X', 'raw' nor a layer; there are: {', '.join(places) or 'none'}"
        )
    for name in [layer] if layer is not None else [name for name in ("X", "counts", "raw") if name in places]:
        if _is_counts(places[name]):
            return places[name], [str(v) for v in (adata.raw.var_names if name == "raw" else adata.var_names)]
    where = (
        f"counts={layer!r} does not hold"
        if layer is not None
        else "neither X nor layer 'counts' nor raw holds"
    )
    raise ValueError(f"{where} raw counts (non-negative integers, not all zero)")


def highly_variable(counts: sp.csr_matrix, n_top: int = N_GENES) -> np.ndarray:
    """Columns of the ``n_top`` genes whose variance lies furthest above the trend over the mean (sorted).

    Variance of counts standardised by a quadratic trend of log variance over log mean, each value clipped at
    √n standard deviations: the rule of Stuart et al. 2019 ("seurat v3") with a polynomial in place of loess.
    """
    n = counts.shape[0]
    mean = np.asarray(counts.mean(0), np.float64).ravel()
    variance = np.asarray(counts.multiply(counts).mean(0), np.float64).ravel() - mean**2
    usable = np.flatnonzero(variance > 0)
    if len(usable) <= n_top:
        return usable
    x, y = np.log10(mean[usable]), np.log10(variance[usable])
    trend = np.zeros_like(mean)
    trend[usable] = np.sqrt(10 ** np.polyval(np.polyfit(x, y, 2), x))
    clipped = counts.tocsc().astype(np.float64)
    gene = np.repeat(np.arange(counts.shape[1]), np.diff(clipped.indptr))
    clipped.data = np.minimum(clipped.data, (mean + trend * np.sqrt(n))[gene])
    squares = np.asarray(clipped.multiply(clipped).sum(0)).ravel()
    sums = np.asarray(clipped.sum(0)).ravel()
    excess = np.full_like(mean, -np.inf)
    excess[usable] = ((n * mean**2 + squares - 2 * mean * sums)[usable] / trend[usable] ** 2) / max(n - 1, 1)
    return np.sort(np.argsort(-excess, kind="stable")[:n_top])


class Expression:
    """Raw counts of the cells to score and the baselines made of them."""

    def __init__(self, counts: Any, genes: list[str], seed: int = 0):
        self.counts = sp.csr_matrix(counts).astype(np.float32)
        self.genes, self.seed = genes, seed
        self._fitted: dict[bytes, np.ndarray] = {}  # components by training rows: several tasks share folds
        total = np.asarray(self.counts.sum(1), np.float64).ravel()
        scale = np.repeat(1e4 / np.where(total > 0, total, 1), np.diff(self.counts.indptr))
        self.log = self.counts.copy()
        self.log.data = np.log1p(self.counts.data * scale).astype(
            np.float32
        )  # log1p of counts per ten thousand

    def hvg(self, train: np.ndarray) -> np.ndarray:
        """log1p CP10K of the highly variable genes of the ``train`` rows, float32[cells, genes]."""
        return self.log[:, highly_variable(self.counts[train])].toarray()

    def pca(self, train: np.ndarray) -> np.ndarray:
        """Principal components of ``hvg``, fitted on the ``train`` rows, float32[cells, 50 or fewer]."""
        rows = np.asarray(train).tobytes()
        if rows not in self._fitted:
            log = self.log[:, highly_variable(self.counts[train])]
            n = min(N_COMPONENTS, len(train) - 1, log.shape[1] - 1)
            model = PCA(n, svd_solver="arpack", random_state=self.seed).fit(log[train])
            self._fitted[rows] = np.asarray(model.transform(log), np.float32)
        return self._fitted[rows]

    def depth(self, train: np.ndarray) -> np.ndarray:
        """log total counts, log number of genes and the mitochondrial share (if any), standardised by
        ``train``.
        """
        total = np.asarray(self.counts.sum(1)).ravel()
        columns = [np.log1p(total), np.log1p(np.diff(self.counts.indptr))]
        mitochondrial = [i for i, g in enumerate(self.genes) if g.upper().startswith("MT-")]
        if mitochondrial:
            columns.append(np.asarray(self.counts[:, mitochondrial].sum(1)).ravel() / np.maximum(total, 1))
        X = np.stack(columns, 1).astype(np.float32)
        return (X - X[train].mean(0)) / np.maximum(X[train].std(0), 1e-6)
