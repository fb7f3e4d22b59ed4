"""Annotation from few labels: how good is a probe that saw 1, 5, 10 or 50 cells of each label?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import sklearn
from sklearn.preprocessing import StandardScaler

from scjax.eval import stats
from scjax.eval.annotation import parts_of, representation
from scjax.eval.checks import Cells, require_aligned, select
from scjax.eval.environment import one_thread
from scjax.eval.probes import fit_logistic
from scjax.eval.results import Results
from scjax.eval.schema import MEAN
from scjax.eval.splits import Fold, split

BUDGETS = (1, 5, 10, 50)
N_DRAWS = 5
C = 1.0  # on features of unit mean square length; there are no cells to choose it by
METRICS = ("macro_f1", "balanced_accuracy", "accuracy")


@one_thread
def few_shot(
    X: Any,
    labels: Any,
    groups: Any = None,
    *,
    name: str = "embedding",
    kind: str = "model",
    embedding_key: str = "",
    budgets: Sequence[int] = BUDGETS,
    min_class_size: int = 10,
    seed: int = 0,
    n_boot: int = 1000,
) -> Results:
    """Score a probe trained on a few cells of each label, in held-out groups.

    Folds are those of :func:`scjax.eval.annotation`. From each training fold the given number of cells per
    label is drawn five times (all cells of labels that have fewer); each draw contains the smaller ones. The
    probe is class-balanced logistic regression with a fixed C on features standardised by the whole training
    fold, which takes no labels. Values are means over draws; resamples redraw the draws and the test cells
    of each group, or the groups where there are ten.

    Args:
        X, labels, groups, name, kind, embedding_key, min_class_size, seed, n_boot: as for
            :func:`scjax.eval.annotation`.
        budgets: cells per label.

    Returns:
        Macro-F1, balanced accuracy and accuracy, ``setting`` "5 per label": values per held-out group, and
        their mean with an interval.

    Raises:
        ValueError: as :func:`scjax.eval.annotation`.
    """
    require_aligned(embedding=X, labels=labels, groups=groups)
    cells = select(labels, groups, min_class_size=min_class_size)
    represent = representation(X, name, cells, len(labels), zero_rows=kind != "model")
    folds, scheme = split(cells, seed)
    guess = np.zeros((len(budgets), N_DRAWS, len(cells)), np.int64)
    seen = np.zeros((len(cells), len(cells.label_names)), bool)
    short: list[set[str]] = [set() for _ in budgets]
    for i, fold in enumerate(folds):
        Z = represent(fold.train)
        scaler = StandardScaler().fit(Z[fold.train])
        Z = scaler.transform(Z) / np.sqrt(Z.shape[1])
        seen[np.ix_(fold.test, np.unique(cells.label[fold.train]))] = True
        for draw in range(N_DRAWS):
            order = _shuffled_by_label(cells, fold, [seed, 5, i, draw])
            for j, budget in enumerate(budgets):
                taken = np.concatenate([rows[:budget] for rows in order.values()])
                guess[j, draw, fold.test] = _guess(Z[taken], cells.label[taken], Z[fold.test])
                short[j] |= {cells.label_names[c] for c, rows in order.items() if len(rows) < budget}
    out = Results(facts={"dropped": cells.dropped, "split_scheme": scheme, "few_shot_draws": N_DRAWS})
    about: dict[str, Any] = {
        "task": "annotation/few-shot",
        "model_id": name,
        "model_kind": kind,
        "embedding_key": embedding_key,
        "head": "logistic",
        "split_scheme": scheme,
        "n_groups": len(cells.group_names),
        "metric_impl": f"scjax.eval; probe scikit-learn=={sklearn.__version__}",
    }
    parts = parts_of(cells)
    weights = {g: stats.resample(len(rows), n_boot, seed, f"annotation/{g}") for g, rows in parts.items()}
    for j, budget in enumerate(budgets):
        fewer = f"; fewer cells than asked for of {', '.join(sorted(short[j]))}" if short[j] else ""
        about |= {"setting": f"{budget} per label", "note": f"mean of {N_DRAWS} draws{fewer}"}
        scores = {
            group: [
                stats.classification(
                    cells.label[rows], guess[j, draw, rows], seen[rows].any(0), weights[group]
                )
                for draw in range(N_DRAWS)
            ]
            for group, rows in parts.items()
        }
        _add(out, scores, parts, cells, n_boot, seed, about)
    return out


def _shuffled_by_label(cells: Cells, fold: Fold, seed: Sequence[int]) -> dict[int, np.ndarray]:
    """The training cells of each label in random order, the same for all representations."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(fold.train)
    return {int(c): order[cells.label[order] == c] for c in np.unique(cells.label[fold.train])}


def _guess(X: np.ndarray, y: np.ndarray, X_test: np.ndarray) -> np.ndarray:
    if X.shape[1] > len(
        X
    ):  # the solution lies in the span of the few training cells: the same in fewer columns
        basis = np.linalg.qr(X.T)[0]
        X, X_test = X @ basis, X_test @ basis
    return fit_logistic(X, y, C).predict(X_test)


def _add(
    out: Results,
    scores: dict[str, list[dict[str, np.ndarray]]],
    parts: dict[str, np.ndarray],
    cells: Cells,
    n_boot: int,
    seed: int,
    about: dict[str, Any],
) -> None:
    """Rows of one budget: each group, and their mean."""

    def combined(draws: list[np.ndarray]) -> np.ndarray:
        name = f"few-shot/{about['setting']}"
        return stats.over_repeats(draws, n_boot, seed, name, same_cells=True)

    over = "percentile bootstrap over draws and"
    for metric in METRICS:
        for group, draws in scores.items():
            alone = cells.group is None  # single groups get values, their mean the interval
            score = combined([d[metric] for d in draws])[: None if alone else 1]
            of = {"metric": metric, "group": group, "n_cells": len(parts[group])}
            out.add(score, **about, **of, ci_method=f"{over} cells")
        if cells.group is not None:
            means, method = [], ""
            for draw in range(N_DRAWS):
                of_groups = [draws[draw][metric] for draws in scores.values()]
                mean, method = stats.over_groups(of_groups, n_boot, seed, "annotation groups")
                means.append(mean)
            method = method.replace("percentile bootstrap over", over)
            out.add(combined(means), **about, metric=metric, group=MEAN, n_cells=len(cells), ci_method=method)
