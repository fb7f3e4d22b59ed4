"""Harmony on principal components and scVI on the cells of ``batches.py``, scored as there.

    python -m venv rivals && rivals/bin/pip install -e . torch==2.13.0 scvi-tools harmonypy
    rivals/bin/python tools/adapt_pages/batches_rivals.py

A step of its own, since scVI brings PyTorch; ``batches.py`` reads the scores that it leaves in
benchmarks/adapt/batches_rivals.json and works without them. What cannot be imported is left out and named.
"""

from __future__ import annotations

import json
from importlib.metadata import version

import anndata as ad
import numpy as np
from batches_data import BATCH, N_GENES, cells, scored
from common import arguments

from scjax.eval.baselines import Expression, highly_variable


def harmony(adata: ad.AnnData, pca: np.ndarray, seed: int) -> np.ndarray:
    import harmonypy

    fitted = np.asarray(harmonypy.run_harmony(pca, adata.obs, BATCH, random_state=seed).Z_corr)
    return fitted if len(fitted) == adata.n_obs else fitted.T


def scvi(adata: ad.AnnData, pca: np.ndarray, seed: int) -> np.ndarray:
    import scvi

    scvi.settings.seed = seed
    genes = highly_variable(adata.X.tocsr().astype(np.float32), N_GENES)
    panel = ad.AnnData(adata.X.tocsr()[:, genes].astype(np.float32), obs=adata.obs[[BATCH]].copy())
    scvi.model.SCVI.setup_anndata(panel, batch_key=BATCH)
    model = scvi.model.SCVI(panel, n_layers=2, n_latent=30, gene_likelihood="nb")
    model.train(max_epochs=100, accelerator="cpu", enable_progress_bar=False, logger=False)
    return model.get_latent_representation()


def main() -> None:
    args = arguments(__doc__, seed=0)
    adata = cells(args.data)
    pca = Expression(adata.X, list(adata.var_names)).pca(np.arange(adata.n_obs))
    scores, used, lacking = {}, [], []
    for name, package, run in (("Harmony on PCA", "harmonypy", harmony), ("scVI", "scvi-tools", scvi)):
        try:
            X = run(adata, pca, args.seed)
        except ImportError as error:
            lacking.append(f"{name} ({error})")
            continue
        scores[name] = scored(adata, name, np.asarray(X, np.float32), pca, "baseline")
        used.append(f"{package} {version(package)}")
        print(name, scores[name], flush=True)
    note = f"Made with {', '.join(used)}" + (
        f"; could not be installed: {', '.join(lacking)}" if lacking else ""
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "batches_rivals.json").write_text(
        json.dumps({"note": note, "scores": scores}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
