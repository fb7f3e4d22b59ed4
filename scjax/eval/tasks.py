"""The tasks: what each asks, how its rows are judged, compared and laid out as a table.

Pure data, see :mod:`scjax.eval.schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scjax.eval.schema import FIXED, ORACLE, SWEEP


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


LABELS = (  # columns of every task that reads labels off a representation
    Columns("macro-F1, logistic regression", ("macro_f1",), {"head": "logistic"}, by_group=True, lead=True),
    Columns("macro-F1, k nearest neighbours", ("macro_f1",), {"head": "knn"}, by_group=True, lead=True),
)

TASKS: dict[str, Task] = {
    "annotation": Task(
        "Annotation",
        "Simple probes read the labels off each frozen representation in groups they have not seen. "
        "Baselines are fitted on the training cells of each fold. Macro-F1 averages over the labels that "
        "occur among the test cells.",
        leading=(Leading("macro_f1", "logistic"),),
        headline=("macro_f1", "balanced_accuracy", "accuracy"),
        columns=(
            *LABELS,
            Columns("macro-F1, multilayer perceptron", ("macro_f1",), {"head": "mlp"}, by_group=True),
            Columns(
                "logistic regression",
                ("macro_f1_seen", "balanced_accuracy", "accuracy", "log_loss", "ece"),
                {"head": "logistic"},
            ),
            Columns("multilayer perceptron", ("balanced_accuracy", "log_loss", "ece"), {"head": "mlp"}),
            Columns(
                "by the ontology, logistic regression",
                ("ontology_exact", "ontology_tolerant", "ontology_lin", "ontology_distance"),
                {"head": "logistic"},
            ),
        ),
        note="Log-loss and calibration error (ECE) belong to a class-balanced probe.",
        blind=("noise", "majority", "depth_only"),
    ),
    "annotation/few-shot": Task(
        "Annotation from few labels",
        "Logistic regression trained on a few cells of each label, drawn five times from the training "
        "groups; macro-F1 in groups it has not seen.",
        leading=(Leading("macro_f1", "logistic", "10 per label"), Leading("macro_f1", "logistic")),
        headline=("macro_f1", "balanced_accuracy", "accuracy"),
        columns=tuple(
            Columns(f"{n} per label", ("macro_f1",), {"setting": f"{n} per label"}, lead=n in (1, 10))
            for n in (1, 5, 10, 50)
        ),
        note="Labels with fewer training cells than asked for give all they have.",
        blind=("noise", "depth_only"),
    ),
    "annotation/unseen": Task(
        "Unseen types",
        "Whole types are left out of training one at a time; novelty should tell their cells from cells of "
        "known types in held-out groups. AUROC of chance is 0.5.",
        leading=(Leading("auroc", "knn"),),
        headline=("auroc", "average_precision", "fpr95"),
        columns=(
            Columns("distance to 15 neighbours", ("auroc", "fpr95"), {"head": "knn"}, lead=True),
            Columns("Mahalanobis distance", ("auroc", "fpr95"), {"head": "mahalanobis"}),
            Columns("1 - highest probability", ("auroc", "fpr95"), {"head": "logistic"}, lead=True),
        ),
        blind=("noise", "depth_only"),
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
                "parts of bio conservation",
                ("silhouette_label", "isolated_labels", "clisi", "kmeans_nmi", "kmeans_ari"),
                {},
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
    # perturbation
    "perturbation": Task(
        "Perturbation prediction",
        "Predicted against real effects of held-out perturbations: mean log1p counts per ten thousand minus "
        "control cells, of which truth and prediction have different halves. Families of measures stand "
        "side by side, since each alone can be gamed. A table for each kind of novelty.",
        leading=(Leading("pearson_delta"),),
        headline=("pearson_delta", "pearson_systema", "rmse", "discrimination", "de_auprc"),
        columns=(
            Columns("direction", ("pearson_delta", "pearson_systema"), lead=True),
            Columns("error", ("rmse",), lead=True),
            Columns("discrimination", ("discrimination",), lead=True),
            Columns("differential expression", ("de_auprc",), lead=True),
            Columns("calibrated Pearson", ("calibrated",), {"setting": "pearson_delta"}, lead=True),
            Columns("calibrated Pearson beyond the mean", ("calibrated",), {"setting": "pearson_systema"}),
            Columns("calibrated RMSE", ("calibrated",), {"setting": "rmse"}),
            Columns("calibrated discrimination", ("calibrated",), {"setting": "discrimination"}),
            Columns("direction", ("cosine_delta", "pearson_top20")),
            Columns("error", ("mae", "wmse")),
            Columns("discrimination", ("discrimination_l1", "discrimination_l2")),
            Columns("differential expression", ("de_overlap", "de_direction", "de_spearman")),
            Columns("called from predicted cells", ("de_precision", "de_recall")),
            Columns("distribution of cells", ("edistance", "mmd")),
            Columns("coverage", ("variance_error", "similarity")),
        ),
        note="Calibrated: (score - mean effect) / (half_split - mean effect), 0 where a prediction that is "
        "blind to the perturbation stands and 1 where the other half of the real cells does; not clipped. "
        "Discrimination is one half by chance. Recall of "
        "called genes rises with exaggeration; read it beside precision. train_mean and context_mean do not "
        "know which perturbation is asked for; shuffled is the truth of another perturbation; linear(random) "
        "has random descriptions of what is perturbed.",
        uncompared=("pearson_delta", "pearson_systema", "rmse", "discrimination"),
        blind=("noise", "shuffled", "linear(random)"),
    ),
    # spatial and modalities
    "spatial/niche": Task(
        "Spatial niches",
        "Probes read the region of tissue off the representation of a single cell or spot. Whole sections or "
        "contiguous blocks with a margin are held out, since neighbouring spots are near copies.",
        leading=(Leading("macro_f1", "logistic"),),
        headline=("macro_f1", "balanced_accuracy", "accuracy"),
        columns=(
            *LABELS,
            Columns("logistic regression", ("balanced_accuracy", "accuracy"), {"head": "logistic"}),
        ),
        note="cell_type_only knows the annotated cell type and nothing else: a region that it predicts may "
        "be defined by its types. coordinates takes the region of the nearest training cells on the slide: "
        "under block splits it shows how much plain adjacency is worth, not what expression knows.",
        blind=("noise", "majority", "depth_only"),
    ),
    "spatial/composition": Task(
        "Spatial neighbourhoods",
        "Ridge regression from the representation of a single cell to the shares of cell types among its "
        "nearest neighbours, in held-out sections or blocks. R² is against the training mean (0).",
        leading=(Leading("composition_r2"),),
        headline=("composition_r2", "composition_jsd"),
        columns=(
            Columns("R²", ("composition_r2",), by_group=True, lead=True),
            Columns("composition", ("composition_jsd", "composition_mae"), lead=True),
            Columns("density of cells", ("density_r2",)),
        ),
        note="cell_type_only knows the type of the cell itself: what a model scores above it is knowledge of "
        "the surroundings. coordinates: nearest training cells on the slide, a detector of leaks.",
        blind=("noise", "train_mean", "depth_only"),
    ),
    "spatial/imputation": Task(
        "Spatial imputation",
        "Expression of genes that were held out, predicted for every cell. Correlations are across the cells "
        "of a held-out section or fold, gene by gene; the median over genes is shown.",
        leading=(Leading("feature_pearson"),),
        headline=("feature_pearson", "feature_spearman", "moran_r"),
        columns=(
            Columns("over genes", ("feature_pearson", "feature_spearman", "feature_nrmse"), lead=True),
            Columns("spatial pattern", ("moran_r", "moran_mae"), lead=True),
        ),
        note="Errors are in units of the spread of the truth: the true mean scores 1. "
        "Moran's I of predictions is usually too high, since they lack the noise of counts. half_split "
        "estimates what the best possible prediction would score, given that noise.",
        blind=("noise", "gene_mean", "depth_only"),
    ),
    "modalities/matching": Task(
        "Matching of modalities",
        "Two modalities of the same cells in one space: how near is a cell's own other half? FOSCTTM is the "
        "share of other cells that are closer, averaged both ways (0.5 by chance); recall@k is among a fixed "
        "number of candidates. Candidates are held-out cells of the same group.",
        leading=(Leading("foscttm"),),
        headline=("foscttm", "recall_at_1", "recall_at_10"),
        columns=(
            Columns("all candidates", ("foscttm",), by_group=True, lead=True),
            Columns("fixed pool", ("recall_at_1", "recall_at_10"), lead=True),
            Columns("from the first modality to the second", ("transfer_f1",)),
        ),
        note="cca is canonical correlation on the training cells; depth_only "
        "matches cells by their total counts.",
        blind=("noise", "depth_only"),
    ),
    "modalities/prediction": Task(
        "Modality prediction",
        "One modality predicted from another, for held-out cells. Correlations are across the cells of a "
        "held-out group or fold, feature by feature; the median over features is shown.",
        leading=(Leading("feature_pearson"),),
        headline=("feature_pearson", "feature_spearman", "feature_nrmse"),
        columns=(
            Columns("over features", ("feature_pearson", "feature_spearman", "feature_nrmse"), lead=True),
        ),
        note="Errors are in units of the spread of the truth: the true mean scores 1. "
        "half_split estimates what the best possible prediction would score, given the noise of counts.",
        blind=("noise", "feature_mean", "depth_only"),
    ),
    # genes and networks
    "genes/property": Task(
        "Gene properties",
        "Linear heads read a property of genes off a table of gene embeddings, for gene families that they "
        "have not seen. All tables are scored on the same genes, folds and resamples of families.",
        leading=(Leading("auroc", "logistic"),),
        headline=("auroc", "average_precision"),
        columns=(
            Columns("logistic regression", ("auroc", "average_precision"), {"head": "logistic"}, lead=True),
            Columns("ridge regression", ("auroc", "average_precision"), {"head": "ridge"}),
        ),
        note="frequency: AUROC one half and an average precision equal to the share of genes with the "
        "property. expression_level: how much and how often a gene is expressed; much annotation follows "
        "it.",
        blind=("random", "frequency"),
    ),
    "genes/sets": Task(
        "Gene sets",
        "Ridge regression from gene embeddings to membership in many gene sets at once, for gene families "
        "that it has not seen. Macro-AP is the mean of the average precision of each set; micro-AP pools all "
        "pairs of gene and set; Fmax is averaged over genes.",
        leading=(Leading("macro_ap", "ridge"),),
        headline=("macro_ap", "micro_ap", "fmax"),
        columns=(
            Columns("ridge regression", ("macro_ap", "micro_ap", "fmax"), {"head": "ridge"}, lead=True),
        ),
        note="frequency gives every gene the sizes of the sets: its micro-AP and Fmax are what large sets "
        "alone are worth.",
        blind=("random", "frequency"),
    ),
    "network": Task(
        "Regulatory networks",
        "Scores of pairs of regulator and target against known edges, in one fixed universe: regulators with "
        "a known target x measured genes, nothing with itself. Average precision counts ties together; the "
        "AUPRC ratio divides it by the share of pairs that are edges. Regulators are resampled.",
        leading=(Leading("auprc_ratio", setting="directed"),),
        headline=("auprc_ratio", "tf_ap"),
        columns=(
            Columns("regulator to target", ("auprc_ratio", "epr"), {"setting": "directed"}, lead=True),
            Columns("regulator to target", ("tf_ap",), {"setting": "directed"}, lead=True),
            Columns("regulator to target", ("average_precision", "edge_direction"), {"setting": "directed"}),
            Columns("either way", ("auprc_ratio", "epr", "average_precision"), {"setting": "undirected"}),
        ),
        note="popularity and degree score a pair without looking at it: by the target's expression or its "
        "other regulators, and by how many other targets the regulator has. They know other edges of the "
        "truth, but a score that does not beat them has shown nothing about pairs. Edges that are not known "
        "may still exist: ratios compare rows, they do not measure a network. Symmetric scores get one half "
        "in direction.",
        uncompared=("undirected",),
        blind=("random",),
    ),
    "network/sign": Task(
        "Activation or repression",
        "Among known edges of known sign: do activating ones score higher than repressing ones?",
        leading=(Leading("auroc"),),
        headline=("auroc", "average_precision"),
        columns=(Columns("sign of edges", ("auroc", "average_precision"), lead=True),),
        note="regulator_sign knows which share of the regulator's other targets it activates.",
        blind=("random",),
    ),
    # diagnostics, masked values, invariance
    "diagnostics": Task(
        "Diagnostics",
        "What can be wrong with a representation whatever it is used for: collapse (a low effective rank, a "
        "uniformity near 0) and a representation that mostly holds sequencing depth. Predicted by a ridge "
        "probe in held-out groups (or cells), depth is partly biology: compare with the PCA.",
        leading=(Leading("effective_rank"),),
        headline=("effective_rank",),
        columns=(
            Columns("directions in use", ("effective_rank", "uniformity"), lead=True),
            Columns("depth in the representation", ("depth_r2", "depth_pcr"), lead=True),
        ),
        note="None of these makes a representation good: noise has the highest rank of all. They say when "
        "something is wrong.",
        uncompared=("",),
        blind=("collapsed",),
    ),
    "masked": Task(
        "Masked values",
        "The pretraining objective against predictors that know nothing of the cell: which share of the "
        "squared error of the mean of each gene is gone at entries hidden from the model? 0: no better.",
        leading=(Leading("masked_gain"),),
        headline=("masked_gain", "feature_spearman"),
        columns=(
            Columns("masked entries", ("masked_gain", "masked_mse"), lead=True),
            Columns("within genes, across cells", ("feature_spearman",), lead=True),
            Columns("masked entries", ("mse_zero", "mse_nonzero")),
        ),
        note="shuffled deals the true values of each gene out to other cells. Across the genes of one cell "
        "the gene means correlate highly already; only the correlation across cells says something.",
        blind=("shuffled", "global_mean"),
    ),
    "invariance": Task(
        "Invariance",
        "Does the embedding of a cell depend on that cell alone? The largest distance that a cell moves, in "
        "units of the spread of the cells, when the same cells are embedded in another way.",
        leading=(Leading("excess"),),
        headline=("excess",),
        columns=(
            Columns("worst", ("excess",), lead=True),
            Columns("one by one", ("deviation",), {"setting": "alone"}, lead=True),
            Columns("other order of cells", ("deviation",), {"setting": "order"}),
            Columns("other order of genes", ("deviation",), {"setting": "genes"}),
            Columns("unexpressed genes added", ("deviation",), {"setting": "zero genes"}),
            Columns("other storage", ("deviation",), {"setting": "storage"}),
            Columns("same call again", ("deviation",), {"setting": "repeat"}),
            Columns("bfloat16", ("deviation",), {"setting": "bfloat16"}),
        ),
        note="Above 1 the tolerance is exceeded. batch_centred is broken on purpose: it subtracts the mean "
        "of the cells that are embedded together.",
        blind=("batch_centred",),
    ),
}
"""Task of a row → what it is, in the order of the report. A task with parts of different kinds is several
entries: "spatial/niche", "spatial/composition", …
"""
