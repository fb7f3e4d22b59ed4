"""What a result row holds and what is measured: the one place that names fields, metrics and heads.

Pure data. A task's module adds rows; tables, gates, differences and the report read here and in
:mod:`scjax.eval.tasks` how to show and compare them, and know nothing of any single task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

SCHEMA_VERSION = "2"

BLANK: dict[str, Any] = {
    "schema_version": SCHEMA_VERSION,
    "dataset": "",  # what was scored, in the user's words
    "task": "",  # key of TASKS
    "track": "",  # part of a task with its own table: a gene set, a truth network, a kind of perturbation
    "model_id": "",  # name of the row in tables
    "model_kind": "model",  # model | baseline | control | oracle
    "embedding_key": "",  # obsm key or file, where the representation came from one
    "head": "",  # what reads the representation: logistic, knn, mlp, majority, leiden, kmeans, ridge, ...
    "setting": "",  # of that head: which resolution, how many cells per label
    "axis": "",  # family of the metric: bio | batch, error | direction | discrimination | de | distribution
    "metric": "",  # key of METRICS
    "direction": "max",
    "group": "",  # held-out group, or the mean over groups; "" where the task has no groups
    "label": "",  # class, perturbation, gene, transcription factor, feature: values of single units
    "versus": "",  # a difference: value = model_id minus this one
    "versus_role": "",  # best simple baseline | random-initialised twin
    "value": None,
    "ci_low": None,
    "ci_high": None,
    "ci_method": "",
    "n_boot": 0,
    "p_value": None,  # of a difference, two-sided, from its paired resamples
    "p_holm": None,  # the same, corrected over all models, partners and tracks of the task
    "n_cells": 0,  # cells, or whatever the task counts: genes, pairs, spots
    "n_groups": 0,  # units that were resampled or held out
    "split_scheme": "",
    "metric_impl": "",
    "pretrain_overlap": "unknown",
    "status": "ok",  # ok | nan | skipped
    "note": "",
}
"""Fields of a row and their default values."""

KEY = ("model_id", "task", "track", "head", "setting", "metric", "group", "label")
"""The fields that tell one score from another within an evaluation."""

MEAN = "mean of groups"
FIXED, SWEEP, ORACLE = "resolution 1.0", "sweep mean", "best NMI (oracle)"  # settings of Leiden


@dataclass(frozen=True)
class Metric:
    """A measure: its name in tables, which way is better, and the ends of its range (None: unbounded)."""

    title: str
    direction: Literal["max", "min"] = "max"
    low: float | None = 0.0
    high: float | None = 1.0


def _error(title: str) -> Metric:
    return Metric(title, "min", 0.0, None)


def _gain(title: str) -> Metric:
    """A ratio to what chance gives."""
    return Metric(title, "max", 0.0, None)


METRICS: dict[str, Metric] = {
    # annotation
    "macro_f1": Metric("macro-F1"),
    "macro_f1_seen": Metric("macro-F1, classes seen in training"),
    "accuracy": Metric("accuracy"),
    "balanced_accuracy": Metric("balanced accuracy"),
    "f1": Metric("F1"),
    "out_of_set_rate": Metric("out-of-set rate", "min"),
    "log_loss": _error("log-loss"),
    "ece": Metric("ECE", "min"),
    "fpr95": Metric("false positives at 95 % recall", "min"),
    "ontology_exact": Metric("exact"),
    "ontology_tolerant": Metric("ancestor or descendant"),
    "ontology_lin": Metric("Lin similarity"),
    "ontology_distance": _error("steps from the truth"),
    # clustering
    "nmi": Metric("NMI"),
    "ari": Metric("ARI", low=-0.5),
    "ami": Metric("AMI", low=None),
    "n_clusters": Metric("clusters", low=1.0, high=None),
    # integration
    "bio": Metric("bio conservation"),
    "batch": Metric("batch mixing"),
    "clisi": Metric("cLISI"),
    "silhouette_label": Metric("silhouette (label)"),
    "isolated_labels": Metric("isolated labels"),
    "silhouette_batch": Metric("silhouette (batch)"),
    "bras": Metric("BRAS"),
    "ilisi": Metric("iLISI"),
    "cilisi": Metric("CiLISI"),
    "graph_connectivity": Metric("graph connectivity"),
    "pcr": Metric("PCR comparison"),
    "kbet": Metric("kBET"),
    "kmeans_nmi": Metric("k-means NMI"),
    "kmeans_ari": Metric("k-means ARI", low=-0.5),
    # spatial
    "composition_r2": Metric("R² of composition", low=None),
    "composition_jsd": Metric("Jensen-Shannon divergence", "min"),
    "composition_mae": Metric("mean absolute error", "min"),
    "density_r2": Metric("R² of density", low=None),
    "moran_r": Metric("Moran's I, correlation over genes", low=-1.0),
    "moran_mae": _error("Moran's I, mean absolute error"),
    # predictions of features per cell (spatial imputation, modalities)
    "feature_pearson": Metric("Pearson, median of features", low=-1.0),
    "feature_spearman": Metric("Spearman, median of features", low=-1.0),
    "feature_nrmse": _error("error / spread, median of features"),
    # modalities
    "foscttm": Metric("FOSCTTM", "min"),
    "recall_at_1": Metric("recall@1"),
    "recall_at_10": Metric("recall@10"),
    "transfer_f1": Metric("label transfer, macro-F1"),
    # genes and networks
    "average_precision": Metric("average precision"),
    "auroc": Metric("AUROC"),
    "macro_ap": Metric("macro-AP over sets"),
    "micro_ap": Metric("micro-AP"),
    "fmax": Metric("Fmax"),
    "auprc_ratio": _gain("AUPRC ratio"),
    "epr": _gain("early precision ratio"),
    "tf_ap": Metric("AP, mean of regulators"),
    "edge_direction": Metric("direction of edges between regulators"),
    # perturbation
    "pearson_delta": Metric("Pearson of effects", low=-1.0),
    "pearson_systema": Metric("Pearson beyond the mean effect", low=-1.0),
    "pearson_top20": Metric("Pearson, 20 most changed genes", low=-1.0),
    "cosine_delta": Metric("cosine of effects", low=-1.0),
    "rmse": _error("RMSE"),
    "mae": _error("mean absolute error"),
    "wmse": _error("squared error, weighted by DE"),
    "discrimination": Metric("discrimination (cosine)"),
    "discrimination_l1": Metric("discrimination (L1)"),
    "discrimination_l2": Metric("discrimination (L2)"),
    "de_auprc": Metric("AUPRC of DE genes"),
    "de_overlap": Metric("overlap of top DE genes"),
    "de_direction": Metric("sign of DE genes"),
    "de_spearman": Metric("Spearman over DE genes", low=-1.0),
    "de_precision": Metric("precision of called genes"),
    "de_recall": Metric("recall of called genes"),
    "edistance": Metric("E-distance", "min", None, None),
    "mmd": Metric("MMD²", "min", None, None),
    "variance_error": _error("|log2 variance ratio|"),
    "similarity": Metric("similarity of predictions", "min", -1.0),
    "calibrated": Metric("share of the reachable", low=None, high=None),
    # diagnostics, masked values, invariance
    "effective_rank": Metric("effective rank", low=1.0, high=None),
    "uniformity": Metric("uniformity", "min", -4.0, 0.0),
    "depth_r2": Metric("depth, R² of a ridge probe", "min", low=None),
    "depth_pcr": Metric("variance along depth", "min"),
    "masked_gain": Metric("error of gene means removed", low=None),
    "masked_mse": _error("squared error"),
    "mse_zero": _error("squared error, zeros"),
    "mse_nonzero": _error("squared error, expressed"),
    "deviation": _error("deviation"),
    "excess": _error("deviation / tolerance"),
}
"""Metric of a row → what it is."""

HEADS = {
    "logistic": "logistic regression",
    "knn": "k nearest neighbours",
    "mlp": "multilayer perceptron",
    "majority": "majority class",
    "mahalanobis": "Mahalanobis distance",
    "leiden": "Leiden",
    "kmeans": "k-means",
    "ridge": "ridge regression",
    "frequency": "frequency of the label",
}
"""Head of a row → its name in tables."""
