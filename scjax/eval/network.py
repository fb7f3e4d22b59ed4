"""Regulatory networks: how well scores of pairs of regulator and target recover known edges."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import sklearn
from sklearn.metrics import average_precision_score

from scjax.eval import environment, gene_sets, regulation, stats
from scjax.eval.baselines import Expression, find_counts
from scjax.eval.compare import finish
from scjax.eval.progress import each
from scjax.eval.ranking import Ranking
from scjax.eval.regulation import MIN_EDGES, Scores, Universe
from scjax.eval.representations import twin_names
from scjax.eval.results import Results

TASK, SIGN = "network", "network/sign"
DIRECTED, UNDIRECTED = "directed", "undirected"
FROM_EXPRESSION = ("pearson", "spearman", "popularity", "expression_level")
RESERVED = (*FROM_EXPRESSION, "degree", "regulator_sign", "random", "oracle")
MIN_TARGETS, MAX_LABELS = 5, 40  # of a regulator to have a score of its own; regulators shown


@environment.one_thread
def network(
    scores: Mapping[str, pd.DataFrame],
    truth: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    expression: ad.AnnData | None = None,
    counts: str | None = None,
    universe: Iterable[str] | None = None,
    min_detection: float = 0.05,
    signed: Sequence[str] = (),
    baselines: Sequence[str] = (),
    twins: Mapping[str, str] | None = None,
    dataset: str = "",
    pretrain_overlap: str = "unknown",
    n_boot: int = 1000,
    seed: int = 0,
) -> Results:
    """Score networks against known regulatory edges, in one fixed universe and beside rivals that ignore
    pairs.

    The universe is regulators x targets without pairs of a gene with itself. Targets are ``universe``, else
    the genes detected in ``min_detection`` of the cells of ``expression``, else the genes that every score
    matrix has; regulators are those of them with at least one known edge to a target. Pairs that a model does
    not score rank last, tied. Beside the scores given stand ``pearson`` and ``spearman`` (size of the
    correlation of log1p counts-per-10,000), ``expression_level`` (mean of regulator x mean of target),
    ``popularity`` (mean of target x known targets of the regulator), ``degree`` (known regulators of the
    target x known targets of the regulator), ``random`` and ``oracle``. Degrees are counted on folds of
    regulators and targets that do not hold the pair.

    Args:
        scores: name → matrix [regulators, targets] by gene, or edges with columns ``source``, ``target`` and
            a score as third (or called ``score``). Larger means more likely an edge.
        truth: known edges (see :func:`scjax.eval.gene_sets.edges`), or name → edges: a track each.
        expression: cells with raw counts; without it the rivals made of it are skipped.
        counts: where its raw counts are ("X", "raw" or a layer); None: wherever integers are found.
        signed: names of scores whose sign tells activation (+) from repression (−). They are ranked by size,
            and their signs are scored on the known edges of known sign.
        baselines: names of scores that are rivals and not models.
        twins: model → the scores of the same architecture before training, "random_init" in the rows.
        n_boot: resamples of regulators behind the 95 % percentile intervals; of targets where there are fewer
            than ten regulators.

    Returns:
        Rows of the task "network", setting "directed" and "undirected": average precision, AUPRC ratio
        (average precision / share of pairs that are edges), EPR (early precision ratio, ties expanded), mean
        of the average precision of each regulator with five or more targets, and how often an edge between
        two regulators scores higher than its reverse. Rows of the task "network/sign". Precision-recall
        curves as panels. ``facts["universe"]`` tells the size of each universe.

    Raises:
        ValueError: scores or truth cannot be used, or too few names match. KeyError: ``signed``,
            ``baselines`` or ``twins`` name scores that are not there.
    """
    started = time.perf_counter()
    tracks = {"": truth} if isinstance(truth, pd.DataFrame) else dict(truth)
    kinds = _kinds(scores, signed, baselines, twins or {})
    known_as = {(twins or {})[model]: name for model, name in twin_names(twins or {}).items()}
    twins = {model: known_as[twin] for model, twin in (twins or {}).items()}
    matrices = {name: regulation.matrix(table, name) for name, table in scores.items()}
    rivals: Any = None
    if expression is not None:
        X, symbols = find_counts(expression, counts)
        if (names := pd.Index(symbols)).has_duplicates:
            raise ValueError(f"expression: gene {names[names.duplicated()][0]!r} is there twice in var_names")
        rivals = Expression(X, symbols, seed)
    genes = regulation.targets(matrices, rivals, universe, min_detection)
    out = Results()
    facts: dict[str, Any] = {}
    for track in each(tracks, TASK):
        table = tracks[track]
        edges = gene_sets.edges(table, track or "truth")
        space = regulation.universe(edges, genes, track or "truth")
        n_pairs, n_edges = int(space.pair.sum()), int(space.truth.sum())
        facts[track or "truth"] = {
            "regulators": len(space.regulators),
            "targets": len(space.targets),
            "pairs": n_pairs,
            "edges": n_edges,
            "prevalence": round(n_edges / n_pairs, 6),
            "edges outside": len(edges) - n_edges,
        }
        lines = [
            regulation.align(table, known_as.get(name, name), kinds[name], space, name in signed)
            for name, table in matrices.items()
        ]
        lines += regulation.rivals(space, rivals, seed)
        _score(out, track, space, lines, n_boot, seed)
        if signed:
            _score_signs(out, track, space, lines, n_boot, seed)
        if rivals is None:
            note = "expression data were not given (expression=): the simplest rivals are missing"
            for name in FROM_EXPRESSION:
                about = {"task": TASK, "track": track, "setting": DIRECTED, "metric": "auprc_ratio"}
                out.skip(note, **about, model_id=name, model_kind="baseline")
    return finish(
        out,
        twins,
        started=started,
        dataset=dataset,
        pretrain_overlap=pretrain_overlap,
        universe=facts,
        min_detection=min_detection if universe is None and expression is not None else None,
        n_cells=0 if expression is None else expression.n_obs,
        dropped={},
        seed=seed,
        n_boot=n_boot,
        split_scheme="none: scores are judged as they are; degrees by folds of regulators and targets",
    )


def _kinds(
    scores: Mapping[str, Any], signed: Sequence[str], baselines: Sequence[str], twins: Mapping[str, str]
) -> dict[str, str]:
    """Kind of each score given."""
    if not scores:
        raise ValueError("no scores were given")
    for role, names in (("signed", signed), ("baselines", baselines), ("twins", [*twins, *twins.values()])):
        if unknown := [n for n in names if n not in scores]:
            raise KeyError(f"{role}: {unknown[0]!r} is not one of the scores {', '.join(scores)}")
    if taken := set(RESERVED) & set(scores):
        raise ValueError(f"the name {sorted(taken)[0]!r} is taken by scores that are made here; rename yours")
    kinds = dict.fromkeys(scores, "model") | dict.fromkeys(baselines, "baseline")
    return kinds | dict.fromkeys(twins.values(), "control")


def _score(
    out: Results, track: str, space: Universe, lines: Sequence[Scores], n_boot: int, seed: int
) -> None:
    """Add average precision and its kin for every line."""
    few = len(space.regulators) < stats.FEW_GROUPS
    n_units = len(space.targets) if few else len(space.regulators)
    weights = stats.resample(n_units, n_boot, seed, f"network/{track}")
    over = f"targets (fewer than {stats.FEW_GROUPS} regulators)" if few else "regulators"
    method = f"percentile bootstrap over {over}"
    rich = np.flatnonzero((space.truth & space.pair).sum(1) >= MIN_TARGETS)
    n_targets = (space.truth & space.pair).sum(1)
    shown = set(rich[np.argsort(-n_targets[rich], kind="stable")[:MAX_LABELS]])
    for line in lines:
        if line.name == "regulator_sign":
            continue
        about: dict[str, Any] = {
            "task": TASK,
            "track": track,
            "model_id": line.name,
            "model_kind": line.kind,
            "n_groups": len(space.regulators),
            "ci_method": method,
            "metric_impl": f"scjax.eval; scikit-learn=={sklearn.__version__}",
            "note": line.note,
        }
        draws = line.strength if line.strength.ndim == 3 else line.strength[None]
        for setting in (DIRECTED, UNDIRECTED):
            found = [_pooled(space, draw, line.floor, setting, few, weights) for draw in draws]
            n = int(space.pair.sum()) if setting == DIRECTED else len(space.either_way(draws[0])[0])
            for metric in found[0][0]:
                score = np.mean([values[metric] for values, _ in found], axis=0)
                out.add(score, metric=metric, setting=setting, n_cells=n, **about)
            if setting == DIRECTED:
                panel = {"panel": "pr_curve", "task": TASK, "track": track, "model_id": line.name}
                out.panels.append(panel | {"model_kind": line.kind} | found[0][1].curve())
        row = {**about, "setting": DIRECTED}
        if len(rich):
            of_each = np.full(len(space.regulators), np.nan)
            for t in rich:
                mine = space.pair[t]
                known = space.truth[t, mine]
                of_each[t] = np.mean([average_precision_score(known, draw[t, mine]) for draw in draws])
                if t in shown:
                    label = {"label": space.regulators[t], "n_cells": int(n_targets[t])}
                    out.add(of_each[[t]], metric="tf_ap", **{**row, **label})
            score = of_each[rich].mean(keepdims=True) if few else stats.mean(of_each, weights)
            out.add(score, metric="tf_ap", **{**row, "n_cells": len(rich)})
        _direction(out, space, draws, row, None if few else weights)


def _pooled(
    space: Universe, strength: np.ndarray, floor: float, setting: str, few: bool, weights: np.ndarray
) -> tuple[dict[str, np.ndarray], Ranking]:
    """Scores of one ranking of all pairs, ordered or not, and the ranking."""
    if setting == UNDIRECTED:
        score, edge, first, second = space.either_way(strength)
    else:
        first, second = np.nonzero(space.pair)
        score, edge = strength[first, second], space.truth[first, second]
    ranking = Ranking(score, edge, second if few else first, weights.shape[1])
    precision = ranking.average_precision(weights)
    found = {
        "average_precision": precision,
        "auprc_ratio": precision / ranking.prevalence(weights),
        "epr": ranking.early_precision(weights, floor),
    }
    return found, ranking


def _direction(
    out: Results, space: Universe, draws: np.ndarray, row: Mapping[str, Any], weights: np.ndarray | None
) -> None:
    """Add how often an edge between two regulators scores higher than its reverse, ties half."""
    i, j = np.nonzero(space.truth & space.pair)
    back = space.as_regulator[j]
    i, j, back = (x[back >= 0] for x in (i, j, back))
    one_way = ~space.truth[back, space.as_target[i]]
    i, j, back = i[one_way], j[one_way], back[one_way]
    if len(i) >= MIN_EDGES:
        gap = draws[:, i, j] - draws[:, back, space.as_target[i]]
        gap = np.where(np.abs(gap) < 1e-6, 0, gap)  # equal but for rounding
        right = ((np.sign(gap) + 1) / 2).mean(0)
        score = right.mean(keepdims=True) if weights is None else stats.mean(right, weights[:, i])
        out.add(score, metric="edge_direction", **{**row, "n_cells": len(i)})


def _score_signs(
    out: Results, track: str, space: Universe, lines: Sequence[Scores], n_boot: int, seed: int
) -> None:
    """Add how well signed scores tell activating from repressing edges."""
    i, j = np.nonzero((space.sign != 0) & space.pair)
    positive = space.sign[i, j] > 0
    if min(positive.sum(), (~positive).sum()) < MIN_EDGES:
        return
    few = len(np.unique(i)) < stats.FEW_GROUPS
    unit = np.arange(len(i)) if few else i
    weights = stats.resample(int(unit.max()) + 1, n_boot, seed, f"network/sign/{track}")[:, unit]
    for line in lines:
        if line.signed is not None:
            about: dict[str, Any] = {
                "task": SIGN,
                "track": track,
                "model_id": line.name,
                "model_kind": line.kind,
                "n_cells": len(i),
                "n_groups": len(np.unique(i)),
                "ci_method": f"percentile bootstrap over {'edges (few regulators)' if few else 'regulators'}",
                "metric_impl": "scjax.eval",
                "note": line.note,
            }
            draws = line.signed if line.signed.ndim == 3 else line.signed[None]
            found = [stats.ranking(draw[i, j], positive, weights) for draw in draws]
            for metric in ("auroc", "average_precision"):
                out.add(np.mean([f[metric] for f in found], axis=0), metric=metric, **about)
