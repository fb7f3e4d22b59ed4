"""What a result row holds and what the tasks measure: the one place that names fields, metrics and tables.

Pure data. A task's module adds rows; tables, gates, differences and the report read here how to show and
compare them, and know nothing of any single task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    "bras": Metric("BRAS"),
    "ilisi": Metric("iLISI"),
    "cilisi": Metric("CiLISI"),
    "graph_connectivity": Metric("graph connectivity"),
    "pcr": Metric("PCR comparison"),
    "kbet": Metric("kBET"),
    "kmeans_nmi": Metric("k-means NMI"),
    "kmeans_ari": Metric("k-means ARI", low=-0.5),
}
"""Metric of a row → what it is."""

HEADS = {
    "logistic": "logistic regression",
    "knn": "k nearest neighbours",
    "mlp": "multilayer perceptron",
    "majority": "majority class",
    "leiden": "Leiden",
    "kmeans": "k-means",
    "ridge": "ridge regression",
}
"""Head of a row → its name in tables."""


@dataclass(frozen=True)
class Columns:
    """Columns of a task's table under one heading: these metrics of the rows with these fields.

    ``by_group``: one column per held-out group, their mean first, where the groups are few. ``lead``: also in
    the compact tables (terminal, notebook).
    """

    over: str
    metrics: tuple[str, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    by_group: bool = False
    lead: bool = False


@dataclass(frozen=True)
class Leading:
    """The rows by which models are judged: a metric and, where the task has them, head and setting."""

    metric: str
    head: str = ""
    setting: str = ""


@dataclass(frozen=True)
class Task:
    """How the rows of a task are shown, judged and compared.

    Args:
        title: heading.
        intro: what is asked and how, one or two sentences under the heading.
        leading: the score by which models are judged, and what stands in where it was skipped.
        headline: metrics whose paired differences are computed, the leading one first.
        columns: of the table, in order.
        note: how to read the table.
        uncompared: settings for which no differences are computed.
        blind: controls that know nothing of what is asked; a model must score above them.
    """

    title: str
    intro: str
    leading: tuple[Leading, ...]
    headline: tuple[str, ...]
    columns: tuple[Columns, ...]
    note: str = ""
    uncompared: tuple[str, ...] = ()
    blind: tuple[str, ...] = ()


TASKS: dict[str, Task] = {
    "annotation": Task(
        "Annotation",
        "Simple probes read the labels off each frozen representation in groups they have not seen. "
        "Baselines are fitted on the training cells of each fold. Macro-F1 averages over the labels that "
        "occur among the test cells.",
        leading=(Leading("macro_f1", "logistic"),),
        headline=("macro_f1", "balanced_accuracy", "accuracy"),
        columns=(
            Columns(
                "macro-F1, logistic regression", ("macro_f1",), {"head": "logistic"}, by_group=True, lead=True
            ),
            Columns(
                "macro-F1, k nearest neighbours", ("macro_f1",), {"head": "knn"}, by_group=True, lead=True
            ),
            Columns(
                "logistic regression",
                ("macro_f1_seen", "balanced_accuracy", "accuracy", "log_loss", "ece"),
                {"head": "logistic"},
            ),
        ),
        note="Log-loss and calibration error (ECE): lower is better; they belong to a class-balanced probe.",
        blind=("noise", "majority", "depth_only"),
    ),
    "clustering": Task(
        "Clustering",
        "Do clusters found without labels follow the labels? Compare at the fixed resolution.",
        leading=(Leading("nmi", "leiden", FIXED), Leading("nmi", "kmeans")),
        headline=("nmi", "ari"),
        columns=(
            Columns(
                "Leiden, resolution 1.0", ("nmi", "ari"), {"head": "leiden", "setting": FIXED}, lead=True
            ),
            Columns("Leiden, resolution 1.0", ("ami",), {"head": "leiden", "setting": FIXED}),
            Columns("Leiden, mean of the sweep", ("nmi", "ari"), {"head": "leiden", "setting": SWEEP}),
            Columns("Leiden, best of the sweep*", ("nmi", "ari"), {"head": "leiden", "setting": ORACLE}),
            Columns("k-means", ("nmi", "ari"), {"head": "kmeans"}, lead=True),
        ),
        note="* Best of the sweep is chosen with the labels in hand, as some published scores are; it is an "
        "upper bound, not a result. k-means is told the number of labels.",
        uncompared=(SWEEP, ORACLE),
        blind=("noise", "depth_only"),
    ),
    "integration": Task(
        "Integration",
        "Two axes, never one total: noise mixes batches perfectly and conserves nothing. Only a "
        "representation above noise and collapsed in bio conservation has a batch score worth reading.",
        leading=(Leading("bio"),),
        headline=("bio", "batch"),
        columns=(
            Columns("axes", ("bio", "batch"), lead=True),
            Columns(
                "parts of bio conservation", ("silhouette_label", "clisi", "kmeans_nmi", "kmeans_ari"), {}
            ),
            Columns(
                "parts of batch mixing", ("bras", "ilisi", "cilisi", "graph_connectivity", "pcr", "kbet"), {}
            ),
        ),
        note="Each axis is the plain mean of its parts. iLISI of a perfect mixture stays below 1 (see noise "
        "and oracle). Graph connectivity also falls when biology is lost. PCR comparison: by how much the "
        "share of variance between batches fell from that of the PCA.",
        blind=("noise", "collapsed", "depth_only"),
    ),
}
"""Task of a row → what it is, in the order of the report. A task with parts of different kinds is several
entries: "spatial/niche", "spatial/composition", …
"""
