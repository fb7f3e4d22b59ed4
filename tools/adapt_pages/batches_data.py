"""The four blood studies as ``batches.py`` and ``batches_rivals.py`` score them: the same cells and genes."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
from common import BLOOD, blood

import scjax.eval

PER_STUDY, N_GENES, LABEL, BATCH = 1000, 1000, "cell_type_harmonised", "dataset"


def cells(data: Path, seed: int = 0) -> ad.AnnData:
    """Up to 1,000 cells of each study, raw counts of all shared genes; labelled cells first."""
    everything = blood(data)
    rng = np.random.default_rng(seed)
    known = (everything.obs[LABEL].astype(str) != "unlabelled").to_numpy()
    rows = []
    for study in BLOOD:
        own = rng.permutation(np.flatnonzero(everything.obs["study"] == study))
        rows.append(np.sort(own[np.argsort(~known[own], kind="stable")][:PER_STUDY]))
    chosen = everything[np.concatenate(rows)].copy()
    chosen.obs[BATCH] = chosen.obs["study"].astype(str)
    return chosen


def scored(adata: ad.AnnData, name: str, X: np.ndarray, pca: np.ndarray, kind: str = "model") -> dict:
    """{metric: (value, low, high)} of ``scjax.eval.integration``."""
    labels = adata.obs[LABEL].astype(str).replace("unlabelled", None)
    results = scjax.eval.integration(
        X, labels, adata.obs[BATCH], pre=pca, name=name, kind=kind, repeats=3, max_cells=2000, n_boot=300
    )
    rows = [r for r in results.rows if r["label"] == "" and r["value"] is not None]
    return {r["metric"]: (r["value"], r["ci_low"], r["ci_high"]) for r in rows}
