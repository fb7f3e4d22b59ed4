"""The small real data that ship with scjax (sources, licences and what was changed: LICENSES.md here), and a
simulated experiment."""

from __future__ import annotations

import pathlib

import anndata as ad
import numpy as np
from scipy import sparse

from scjax.datasets.perturbed import perturbed

__all__ = ["pbmc", "pbmc_paths", "perturbed"]

_FOLDER = pathlib.Path(__file__).parent


def pbmc_paths() -> dict[str, pathlib.Path]:
    """Study -> its .h5ad file, e.g. to build a corpus from: raw counts as CSC, the columns of ``pbmc``."""
    return {study: _FOLDER / f"{study}.h5ad" for study in ("pbmc3k", "pbmc_facs")}


def pbmc() -> ad.AnnData:
    """Human blood cells from two studies: 6,574 cells x 12,881 genes, raw counts (float32 CSR).

    obs:
      - ``study``: "pbmc3k" (2,700 cells of one donor, labelled by clustering) or "pbmc_facs" (3,874 cells of
        another donor, each sorted by surface markers, which gives the label).
      - ``cell_type``: one list for both studies. Shared: B, CD4 T, CD8 T, NK, CD14 monocyte. Only in pbmc3k:
        FCGR3A monocyte, dendritic, megakaryocyte, and 62 cells "unlabelled". Only in pbmc_facs: CD34+
        progenitor.
      - ``cell_type_fine`` and ``cell_type_source``: the finest and the main label of the source, as they are.
      - ``batch``: the study. ``library``: the sorted library within pbmc_facs, one per ``cell_type_fine``: a
        batch correction over libraries would remove the cell types.
      - ``donor``, ``organism``, ``technology``.

    var: index = symbol, ``ensembl_id``; genes that both studies measured and at least 10 cells express.

    The labels of the two studies are of different kinds. pbmc3k's come from clusters of the same counts.
    pbmc_facs's come from sorting, but its cells were also chosen by what they express (no cell of the B
    library has a count of CD3D or CD3E), so types are easier to tell apart there than in blood as it comes.

    Returns:
      A new AnnData each time; change it as you like.
    """
    studies = [ad.read_h5ad(path) for path in pbmc_paths().values()]
    for adata in studies:
        adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    return ad.concat(studies, merge="same")
