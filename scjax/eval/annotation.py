"""Cell-type annotation: how well simple probes read the labels off a frozen representation, in unseen
groups.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sklearn

from scjax.eval import stats
from scjax.eval.checks import Cells, matrix, require_aligned, select
from scjax.eval.environment import one_thread
from scjax.eval.ontology import Ontology, Relations, read_ontology, relations
from scjax.eval.probes import HEADS
from scjax.eval.results import Results
from scjax.eval.schema import MEAN
from scjax.eval.splits import split

ALL_CELLS = "all cells"  # stands for the group where there are none


@one_thread
def annotation(
    X: Any,
    labels: Any,
    groups: Any = None,
    *,
    name: str = "embedding",
    kind: str = "model",
    embedding_key: str = "",
    heads: Sequence[str] = ("logistic", "knn", "mlp"),
    ontology: Ontology | str | os.PathLike[str] | None = None,
    min_class_size: int = 10,
    seed: int = 0,
    n_boot: int = 1000,
) -> Results:
    """Score how well labels can be read off a frozen representation in held-out groups.

    Args:
        X: representation [cells, dimensions]; or a function that takes the rows of a training fold, fits
            itself on them and returns such an array for all cells; or None for the head "majority", which
            looks at no features.
        labels: label of each cell; cells without one are dropped and counted.
        groups: donor, study, … of each cell. Up to five groups: each is held out in turn. More: stratified
            group 5-fold. None: stratified 5-fold over cells, and named so, since cells of one donor then lie
            on both sides.
        name, kind, embedding_key: what the rows are to be called.
        heads: "logistic" (class-balanced logistic regression on standardised features), "knn" (cosine
            neighbours, weighted by inverse distance), "mlp" (one hidden layer), "majority" (the most frequent
            training label). C, k, width and number of steps are chosen by inner folds over training groups,
            or over cells where one group is all there is; see :mod:`scjax.eval.probes`.
        ontology: an OBO file or a table of pairs child, parent, whose terms the labels are (by identifier,
            name or synonym): also count answers that are an ancestor or descendant of the truth, and give
            the mean distance and Lin similarity of answer and truth. Labels that are no term are listed in
            ``facts``; cells whose true label is none are left out of these scores.
        min_class_size: labels with fewer cells are left out.
        seed: of folds and resamples.
        n_boot: resamples behind the 95 % percentile intervals. They resample groups from ten groups on; below
            that, the cells of each held-out group.

    Returns:
        Scores per held-out group and their mean, F1 per class (``n_cells`` = support), confusion counts and
        calibration curves as panels.

    Raises:
        ValueError: X, labels or groups cannot be used, no label of a held-out group occurs outside it, a
            head is unknown, or fewer than two labels are terms of the ontology.
    """
    if unknown := [head for head in heads if head not in HEADS]:
        raise ValueError(f"unknown head {unknown[0]!r}; there are: {', '.join(HEADS)}")
    require_aligned(embedding=X, labels=labels, groups=groups)
    cells = select(labels, groups, min_class_size=min_class_size)
    tree = None if ontology is None else relations(read_ontology(ontology), cells.label_names)
    represent = representation(X, name, cells, len(labels), zero_rows=kind != "model")
    folds, scheme = split(cells, seed)
    shape = (len(cells), len(cells.label_names))
    proba = {head: np.zeros(shape) for head in heads}
    notes: dict[str, list[str]] = {head: [] for head in heads}
    seen = np.zeros(shape, bool)  # labels in the training fold that served each cell
    for fold in folds:
        Z = represent(fold.train)
        present = np.unique(cells.label[fold.train])
        seen[np.ix_(fold.test, present)] = True
        for head in heads:
            proba[head][np.ix_(fold.test, present)], note = HEADS[head](Z, cells, fold, seed)
            notes[head].append(note)
    parts = parts_of(cells)
    unseen = {
        g: [cells.label_names[i] for i in np.unique(cells.label[r]) if not seen[r, i].any()]
        for g, r in parts.items()
    }
    unseen = {g: names for g, names in unseen.items() if names}
    out = Results(facts={"dropped": cells.dropped, "split_scheme": scheme, "unseen_labels": unseen})
    if tree is not None:
        out.facts["labels_not_in_ontology"] = tree.unmatched
    common: dict[str, Any] = {
        "task": "annotation",
        "model_id": name,
        "model_kind": kind,
        "embedding_key": embedding_key,
        "split_scheme": scheme,
        "n_groups": len(cells.group_names),
        "metric_impl": f"scjax.eval; probe scikit-learn=={sklearn.__version__}",
    }
    for head in heads:
        about = {**common, "head": head, "note": "; ".join(dict.fromkeys(filter(None, notes[head])))}
        scores = _score(out, cells, parts, proba[head], seen, bool(unseen), tree, n_boot, seed, about)
        if cells.group is not None:
            _mean_over_groups(out, scores, len(cells), n_boot, seed, about)
    return out


def representation(
    X: Any, name: str, cells: Cells, n_cells: int, zero_rows: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """Features of the selected cells as a function of the training positions among them."""
    if callable(X):
        return lambda train: X(cells.rows[train])[cells.rows]
    if X is None:
        return lambda train: np.zeros((len(cells), 0), np.float32)
    features = matrix(X, name, n_cells, zero_rows=zero_rows)[cells.rows]
    return lambda train: features


def parts_of(cells: Cells) -> dict[str, np.ndarray]:
    """Positions of the cells that are scored together: each group, or all."""
    if cells.group is None:
        return {ALL_CELLS: np.arange(len(cells))}
    return {name: np.flatnonzero(cells.group == g) for g, name in enumerate(cells.group_names)}


def _score(
    out: Results,
    cells: Cells,
    parts: dict[str, np.ndarray],
    proba: np.ndarray,
    seen: np.ndarray,
    any_unseen: bool,
    tree: Relations | None,
    n_boot: int,
    seed: int,
    about: dict[str, Any],
) -> dict[str, dict[str, np.ndarray]]:
    """Add the scores of one probe in each part, with intervals over its cells; returns them by part and
    metric.
    """
    method = "percentile bootstrap over cells" + (" of the held-out group" if cells.group is not None else "")
    n_labels = len(cells.label_names)
    who = {k: about[k] for k in ("model_id", "model_kind", "head")}
    scores: dict[str, dict[str, np.ndarray]] = {}
    for group, rows in parts.items():
        truth, guess, known = cells.label[rows], proba[rows].argmax(1), seen[rows].any(0)
        weights = stats.resample(len(rows), n_boot, seed, f"annotation/{group}")
        found = stats.classification(truth, guess, known, weights)
        if not any_unseen:
            del found["macro_f1_seen"]
        if about["head"] != "majority":
            found |= _probabilities(proba[rows], truth, known)
            bins = stats.calibration(proba[rows].max(1), truth == guess)
            curve = {name: np.round(values, 4).tolist() for name, values in bins.items()}
            out.panels.append({"panel": "calibration", "group": group, **curve, **who})
        if tree is not None:
            found |= _near_misses(tree, truth, guess, weights)
        scores[group] = found
        for metric, score in found.items():
            out.add(
                score,
                **about,
                metric=metric,
                group=group,
                n_cells=len(rows),
                ci_method=method,
            )
        counts = stats.tally(truth * n_labels + guess, n_labels**2, np.ones((1, len(rows)), int)).reshape(
            n_labels, -1
        )
        support = counts.sum(1)
        for i in np.flatnonzero(support):
            f1 = 2 * counts[i, i] / (support[i] + counts[:, i].sum())
            out.add(
                [f1], **about, metric="f1", group=group, label=cells.label_names[i], n_cells=int(support[i])
            )
        panel = {"panel": "confusion", "group": group, "labels": cells.label_names, "counts": counts.tolist()}
        out.panels.append({**panel, **who})
    return scores


def _mean_over_groups(
    out: Results,
    scores: dict[str, dict[str, np.ndarray]],
    n_cells: int,
    n_boot: int,
    seed: int,
    about: dict[str, Any],
) -> None:
    """Add the mean over held-out groups of each metric (groups where it is undefined left out)."""
    for metric in next(iter(scores.values())):
        of_groups = [s[metric] for s in scores.values()]
        score, method = stats.over_groups(of_groups, n_boot, seed, "annotation groups")
        out.add(score, **about, metric=metric, group=MEAN, n_cells=n_cells, ci_method=method)


def _near_misses(
    tree: Relations, truth: np.ndarray, guess: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores by an ontology, over the cells whose true label is a term of it."""
    at = tree.known[truth]
    if not at.any():
        return {f"ontology_{m}": np.array([np.nan]) for m in ("exact", "tolerant", "lin", "distance")}
    pairs, drawn = (truth[at], guess[at]), weights[:, at]
    return {
        "ontology_exact": stats.mean((pairs[0] == pairs[1]).astype(float), drawn),
        "ontology_tolerant": stats.mean(tree.related[pairs].astype(float), drawn),
        "ontology_lin": stats.mean(tree.similarity[pairs], drawn),
        "ontology_distance": stats.mean(tree.distance[pairs], drawn),
    }


def _probabilities(proba: np.ndarray, truth: np.ndarray, known: np.ndarray) -> dict[str, np.ndarray]:
    """Log-loss (nats, over cells whose label was seen in training) and calibration error of class
    probabilities.
    """
    learnt = known[truth]
    own = np.maximum(proba[np.arange(len(truth)), truth][learnt], 1e-15)
    loss = -np.log(own).mean() if learnt.any() else np.nan
    error = stats.calibration_error(proba.max(1), proba.argmax(1) == truth)
    return {"log_loss": np.array([loss]), "ece": np.array([error])}
