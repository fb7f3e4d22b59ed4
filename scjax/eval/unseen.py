"""Unseen cell types: does a cell of a type that training lacked stand out as new?"""

from __future__ import annotations

from typing import Any

import numpy as np
import sklearn
from sklearn.covariance import ledoit_wolf
from sklearn.preprocessing import StandardScaler

from scjax.eval import stats
from scjax.eval.annotation import parts_of, representation
from scjax.eval.checks import Cells, require_aligned, select, stratified
from scjax.eval.environment import one_thread
from scjax.eval.probes import fit_logistic, narrow, near
from scjax.eval.results import Results
from scjax.eval.schema import MEAN
from scjax.eval.splits import split

MAX_TYPES = 6  # at most so many types are held out, from the largest to the smallest
MAX_TRAIN, MAX_TEST = 3000, 500  # cells per fold, and per type and held-out group; samples by label
MIN_CELLS = 5  # of the held-out type and of others in a group, else the group does not count for the type
N_NEIGHBORS = 15
C = 0.1
HEADS = ("knn", "mahalanobis", "logistic")
METRICS = ("auroc", "average_precision", "fpr95")


@one_thread
def unseen(
    X: Any,
    labels: Any,
    groups: Any = None,
    *,
    name: str = "embedding",
    kind: str = "model",
    embedding_key: str = "",
    min_class_size: int = 10,
    seed: int = 0,
    n_boot: int = 1000,
) -> Results:
    """Score how well novelty tells cells of a held-out type from those of known types, in held-out groups.

    Whole types are left out of training one at a time (up to six, spread over the sizes), on top of the folds
    of :func:`scjax.eval.annotation`. Novelty of a test cell is, by head: "knn" the mean cosine distance to
    the 15 nearest training cells; "mahalanobis" the distance to the nearest class mean under the shrunken
    covariance within classes (Lee et al. 2018; Ledoit & Wolf 2004); "logistic" 1 − the highest class
    probability. Test cells of other types that the training fold lacks are left out. Representations of more
    than 256 dimensions are reduced to 100 components of the training fold.

    Args:
        X, labels, groups, name, kind, embedding_key, min_class_size, seed, n_boot: as for
            :func:`scjax.eval.annotation`.

    Returns:
        AUROC (0.5: chance), average precision and the false positive rate at 95 % recall: per held-out type
        (``label``), values per group, and their mean.

    Raises:
        ValueError: as :func:`scjax.eval.annotation`; fewer than three labels; no type with five cells in a
            group together with five of other types.
    """
    require_aligned(embedding=X, labels=labels, groups=groups)
    cells = select(labels, groups, min_class_size=min_class_size)
    if len(cells.label_names) < 3:
        raise ValueError(
            f"unseen types need three labels or more: one is held out of {cells.label_names}, which leaves "
            "nothing to tell apart; leave the task 'annotation/unseen' out"
        )
    represent = representation(X, name, cells, len(labels), zero_rows=kind != "model")
    folds, scheme = split(cells, seed)
    size = np.bincount(cells.label)
    at = np.linspace(0, len(size) - 1, min(MAX_TYPES, len(size))).round().astype(int)
    types = np.sort(np.argsort(-size, kind="stable")[at])
    scores: dict[tuple[int, str, str], dict[str, np.ndarray]] = {}  # (type, head, group) → metrics
    parts = parts_of(cells)
    prevalence: dict[tuple[int, str], float] = {}
    for fold in folds:
        Z, _ = narrow(represent(fold.train), fold.train, seed)
        Z = Z.astype(np.float64)
        for held_out in types:
            train = fold.train[cells.label[fold.train] != held_out]
            train = train[stratified(cells.label[train], MAX_TRAIN, seed)]
            known = np.unique(cells.label[train])
            if len(known) < 2:
                continue
            test = {
                g: _test_cells(cells, rows, fold.test, held_out, known, seed) for g, rows in parts.items()
            }
            test = {g: rows for g, rows in test.items() if len(rows)}
            if not test:
                continue
            novelty = _novelty(Z, cells.label, train, np.concatenate(list(test.values())))
            start = 0
            for group, rows in test.items():
                new = cells.label[rows] == held_out
                weights = stats.resample(len(rows), n_boot, seed, f"unseen/{group}/{held_out}")
                prevalence[held_out, group] = float(new.mean())
                for head, value in novelty.items():
                    found = stats.ranking(value[start : start + len(rows)], new, weights)
                    # without groups each fold tests cells of its own: the mean over folds
                    key = (
                        int(held_out),
                        head,
                        group if cells.group is not None else f"{group}/{fold.test[0]}",
                    )
                    scores[key] = found
                start += len(rows)
    if not scores:
        raise ValueError(
            f"no label has {MIN_CELLS} cells beside {MIN_CELLS} of others in a held-out group; leave the "
            "task 'annotation/unseen' out or give larger groups"
        )
    out = Results(
        facts={
            "dropped": cells.dropped,
            "split_scheme": scheme,
            "held_out_types": [cells.label_names[t] for t in types],
        }
    )
    about: dict[str, Any] = {
        "task": "annotation/unseen",
        "model_id": name,
        "model_kind": kind,
        "embedding_key": embedding_key,
        "split_scheme": scheme,
        "n_cells": len(cells),
        "n_groups": len(cells.group_names),
        "metric_impl": f"scjax.eval; scikit-learn=={sklearn.__version__}",
        "note": f"prevalence of held-out types {np.mean(list(prevalence.values())):.3g}",
    }
    _add(out, scores, cells, n_boot, seed, about)
    return out


def _test_cells(
    cells: Cells, rows: np.ndarray, test: np.ndarray, held_out: int, known: np.ndarray, seed: int
) -> np.ndarray:
    """Test cells of a group that are of the held-out type or a known one, a sample; none if there are too
    few.
    """
    rows = np.intersect1d(rows, test)
    rows = rows[np.isin(cells.label[rows], [held_out, *known])]
    new = int((cells.label[rows] == held_out).sum())
    if min(new, len(rows) - new) < MIN_CELLS:
        return rows[:0]
    return rows[stratified(cells.label[rows], MAX_TEST, seed)]


def _novelty(Z: np.ndarray, label: np.ndarray, train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """Novelty of the test cells by each head."""
    distances, _ = near(Z[train], Z[test], N_NEIGHBORS)
    scaler = StandardScaler().fit(Z[train])
    X, new, y = scaler.transform(Z[train]), scaler.transform(Z[test]), label[train]
    means = np.stack([X[y == c].mean(0) for c in np.unique(y)])
    within = X - means[np.unique(y, return_inverse=True)[1]]
    precision = np.linalg.pinv(ledoit_wolf(within, assume_centered=True)[0])
    root = np.linalg.cholesky(precision + 1e-9 * np.eye(len(precision)))
    off = ((new[:, None] @ root - means[None] @ root) ** 2).sum(2)
    sure = fit_logistic(X, y, C).predict_proba(new).max(1)
    return {"knn": distances.mean(1), "mahalanobis": off.min(1), "logistic": 1 - sure}


def _add(
    out: Results,
    scores: dict[tuple[int, str, str], dict[str, np.ndarray]],
    cells: Cells,
    n_boot: int,
    seed: int,
    about: dict[str, Any],
) -> None:
    """Rows per type (mean over groups), per group (mean over types), and of the mean over groups."""
    types, groups = sorted({t for t, _, _ in scores}), sorted({g for _, _, g in scores})
    everything = MEAN if cells.group is not None else "all cells"
    within = "percentile bootstrap over cells" + (" of the held-out group" if cells.group is not None else "")
    for head in HEADS:
        for metric in METRICS:
            values = {(t, g): s[metric] for (t, h, g), s in scores.items() if h == head}
            by_group = {}
            for group in groups:
                found = [v for (_, g), v in values.items() if g == group]
                by_group[group] = _mean(found)
                if cells.group is not None:  # single groups get values, their mean the interval
                    out.add(by_group[group][:1], **about, head=head, metric=metric, group=group)
            if cells.group is not None:
                overall, method = stats.over_groups(
                    list(by_group.values()), n_boot, seed, "annotation groups"
                )
            else:
                overall, method = _mean(list(by_group.values())), within
            out.add(overall, **about, head=head, metric=metric, group=everything, ci_method=method)
            for t in types:
                own = _mean([v for (u, _), v in values.items() if u == t])
                label = cells.label_names[t]
                out.add(
                    own, **about, head=head, metric=metric, group=everything, label=label, ci_method=within
                )


def _mean(scores: list[np.ndarray]) -> np.ndarray:
    """Mean of scores, resample by resample; a resample that lacks a type leaves it out."""
    return stats.row_mean(np.stack(scores, 1))
