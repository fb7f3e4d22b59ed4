"""Writes eval_cell_eval.npz beside it: scores by cell-eval of planted perturbations, and their input.

Needs cell-eval (the extra ``perturb``): python tests/golden/eval_cell_eval.py
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

METRICS = (
    "pearson_delta", "mse", "mae", "mse_delta", "mae_delta", "discrimination_score_l1",
    "discrimination_score_l2", "discrimination_score_cosine", "overlap_at_N", "precision_at_N",
    "de_spearman_lfc_sig", "de_direction_match", "de_sig_genes_recall", "pr_auc",
)  # fmt: skip


def cells() -> dict[str, np.ndarray]:
    """Real and predicted cells (log1p of counts per ten thousand) of eight genes' perturbations."""
    rng = np.random.default_rng(0)
    genes = np.array([f"g{i}" for i in range(40)])
    names = np.repeat(["control", *genes[:8]], 40)
    base = rng.gamma(1.0, 4.0, 40) + 0.5
    shared, own = rng.normal(0, 0.3, 40), rng.normal(0, 0.3, (8, 40))
    out: dict[str, np.ndarray] = {"genes": genes, "names": names}
    for side, noise in (("real", 0.0), ("predicted", 0.6)):
        effect = np.vstack([np.zeros(40), shared + own + rng.normal(0, noise, (8, 40)) * (noise > 0)])
        counts = rng.poisson(base * np.exp(np.repeat(effect, 40, axis=0)))
        out[side] = np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).astype(np.float32)
    return out


def made() -> dict[str, np.ndarray]:
    """Everything in the file: input, cell-eval's scores (NaN where it gives none), versions."""
    from cell_eval import MetricsEvaluator

    out = cells()
    obs = pd.DataFrame({"name": out["names"]}, index=[str(i) for i in range(len(out["names"]))])
    sides = {
        side: ad.AnnData(out[side], obs.copy(), pd.DataFrame(index=out["genes"]))
        for side in ("real", "predicted")
    }
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            evaluator = MetricsEvaluator(
                sides["predicted"], sides["real"], control_pert="control", pert_col="name", num_threads=1,
                outdir=folder,
            )  # fmt: skip
            scores, _ = evaluator.compute(
                "full", skip_metrics=["clustering_agreement"], write_csv=False, break_on_error=True
            )
    table = scores.to_pandas().set_index("perturbation").loc[list(out["genes"][:8])]
    scores = {f"score_{m}": table[m].to_numpy(np.float64) for m in METRICS}
    packages = [f"{p}=={version(p)}" for p in ("cell-eval", "pdex", "scikit-learn", "numpy")]
    return out | scores | {"versions": np.array(packages)}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **made())
    sys.stdout.write(f"{Path(__file__).with_suffix('.npz')}\n")
