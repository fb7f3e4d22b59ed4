"""Synthetic cells with a planted truth, shared by the tests."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse


def synthetic_adata(
    n_cells: int = 300, n_genes: int = 100, n_types: int = 4, n_batches: int = 2, seed: int = 0
) -> ad.AnnData:
    """Raw counts (float32 CSR, whole numbers) of cells drawn from planted types.

    A cell's counts are Poisson with mean depth x profile, where the profile is that of its cell type
    (marker genes of the type are about eight times higher) times a mild batch effect, and the depth
    is lognormal. Every cell expresses at least one gene.

    obs: ``cell_type`` ("type0", ...), ``batch`` ("batch0", ...), ``donor`` (two per batch),
    ``study`` ("study0" | "study1", whole batches). var: index = symbol, ``ensembl_id``.
    """
    rng = np.random.default_rng([seed, 2024])
    # The biology does not depend on the seed of the cells: two calls make two studies of one tissue.
    biology = np.random.default_rng([n_genes, n_types])
    base = biology.lognormal(0.0, 1.0, n_genes)
    profile = np.tile(base, (n_types, 1))
    marker_of = biology.permutation(n_genes) % (2 * n_types)  # half of the genes mark one type each
    for cell_type in range(n_types):
        profile[cell_type, marker_of == cell_type] *= 8.0
    effect = rng.lognormal(0.0, 0.2, (n_batches, n_genes))

    cell_type = rng.integers(0, n_types, n_cells)
    batch = rng.integers(0, n_batches, n_cells)
    mean = profile[cell_type] * effect[batch]
    depth = rng.lognormal(np.log(2.0 * n_genes), 0.4, n_cells)
    counts = rng.poisson(mean / mean.sum(1, keepdims=True) * depth[:, None])
    counts[np.arange(n_cells), counts.argmax(1)] += 1

    donor = 2 * batch + rng.integers(0, 2, n_cells)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([f"type{t}" for t in cell_type]),
            "batch": pd.Categorical([f"batch{b}" for b in batch]),
            "donor": pd.Categorical([f"donor{d}" for d in donor]),
            "study": pd.Categorical([f"study{b % 2}" for b in batch]),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(
        {"ensembl_id": [f"ENSG{g:011d}" for g in range(n_genes)]}, index=[f"GENE{g}" for g in range(n_genes)]
    )
    return ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)
