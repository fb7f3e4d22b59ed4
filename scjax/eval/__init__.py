"""Evaluation of cell embeddings, whoever made them: arrays and AnnData in, scores and a report out.

    results = scjax.eval.run(adata, embeddings=["X_model"], label_key="cell_type", batch_key="study",
                             group_key="study", controls={"random_init": "X_untrained"}) print(results);
                             results.report("report.html"); results.to_jsonl("results.jsonl")

The tasks also run on plain arrays: :func:`annotation`, :func:`clustering`, :func:`integration`. This room
imports nothing else of scjax and neither JAX nor Flax; NumPy, SciPy, pandas, scikit-learn and AnnData
suffice, and what further packages would add (Leiden, maps, the report) is marked as skipped where they are
missing.
"""

from scjax.eval.annotation import annotation
from scjax.eval.clustering import clustering
from scjax.eval.diagnostics import diagnostics
from scjax.eval.doors import Embedder, embedder, load_embedding
from scjax.eval.genes import genes
from scjax.eval.imputation import imputation
from scjax.eval.integration import integration
from scjax.eval.invariance import invariance
from scjax.eval.leaderboard import compare, leaderboard
from scjax.eval.masked import masked_error
from scjax.eval.modalities import matching, modality_prediction
from scjax.eval.network import network
from scjax.eval.perturbation import perturbation
from scjax.eval.results import Results
from scjax.eval.runner import run
from scjax.eval.spatial import spatial
from scjax.eval.verdict import Gate

__all__ = [
    "Embedder",
    "Gate",
    "Results",
    "annotation",
    "clustering",
    "compare",
    "diagnostics",
    "embedder",
    "genes",
    "imputation",
    "integration",
    "invariance",
    "leaderboard",
    "load_embedding",
    "masked_error",
    "matching",
    "modality_prediction",
    "network",
    "perturbation",
    "run",
    "spatial",
]
