"""Several modalities of the same cells: are both halves of a cell found together, and can one be predicted
from the other?

Tasks "modalities/matching" and "modalities/prediction", for RNA with surface proteins or any second table of
numbers per cell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scjax.eval import checks, features, joint_space, regression, stats
from scjax.eval.baselines import Expression, find_counts
from scjax.eval.compare import finish
from scjax.eval.environment import one_thread
from scjax.eval.features import Entry, Scores
from scjax.eval.progress import each
from scjax.eval.representations import obsm, twin_names
from scjax.eval.results import Results
from scjax.eval.splits import folds

MATCHING, PREDICTION = "modalities/matching", "modalities/prediction"
Second: TypeAlias = "str | pd.DataFrame"


@one_thread
def matching(
    adata: ad.AnnData,
    second: Second,
    embeddings: Mapping[str, tuple[Any, Any] | joint_space.Joint],
    *,
    label_key: str | None = None,
    group_key: str | None = None,
    pool: int = 50,
    counts: str | None = None,
    twins: Mapping[str, str] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
    dataset: str = "",
    pretrain_overlap: str = "unknown",
) -> Results:
    """Score joint spaces: is a cell's own other half nearer than those of other cells?

    FOSCTTM is the mean over cells of the share of other cells whose half is closer (Euclidean; ties count
    half), averaged both ways: 0 at best, 0.5 by chance. Recall@k is among ``pool`` candidates, since it falls
    with their number. Candidates are held-out cells of the cell's own group only: groups are shared by both
    modalities, and telling them apart is not matching. With labels, a classifier (15 neighbours) trained on
    the first modality of the training cells also labels the second modality of the held-out ones.

    Mixing of the modalities alone is cheap; to see it, stack both halves and give
    :func:`scjax.eval.integration` the modality as batch.

    Always beside them: ``cca`` (canonical correlation of principal components, fitted on the training cells),
    ``depth_only`` (total counts of each modality), ``noise``, and the oracle.

    Args:
        adata: cells with raw counts of the first modality.
        second: the other modality: an obsm key, or a table [cells, features] with names of cells. Counts are
            centred log ratios thereafter (see :func:`modality_prediction`).
        embeddings: name → the two halves in one space, each an array [cells, dimensions] or an obsm key; or a
            function that takes the rows of a training fold, fits itself on them and returns both halves of
            all cells, such as :func:`scjax.eval.joint_space.canonical` makes of two representations.
        label_key, group_key: obs columns of cell types and of donors or batches.
        pool: number of candidates of recall@k, the true one among them.
        twins: name of an embedding → name of its random-initialised twin among ``embeddings``.
        n_boot: resamples behind the 95 % intervals: of groups from ten on, else of cells.

    Raises:
        KeyError, ValueError: keys that are absent, halves that do not fit each other or the cells, or fewer
            held-out cells than ``pool``.
    """
    started = time.perf_counter()
    if not embeddings:
        raise ValueError("no embeddings to evaluate: give {name: (first half, second half)}")
    twins = dict(twins or {})
    halves = {name: _joint(adata, name, given) for name, given in embeddings.items()}
    if lost := {*twins, *twins.values()} - set(halves):
        raise KeyError(f"twins names {sorted(lost)[0]!r}, which is not among {', '.join(halves)}")
    raw, _ = _second(adata, second)
    group, group_names = _groups(adata, group_key)
    n = adata.n_obs
    if group is None and n < 2 * pool:
        raise ValueError(
            f"{n} cells are too few for a pool of {pool} among held-out ones; lower pool to {n // 2}"
        )
    n_folds = 5 if group is not None else max(2, min(5, n // pool))
    plan, scheme = folds(n, group, seed, n_folds=n_folds, unit="cells")
    sets = joint_space.candidates(plan, group)
    if max(map(len, sets)) < pool:
        raise ValueError(
            f"the largest held-out group has {max(map(len, sets))} cells, fewer than pool={pool}; lower pool"
        )
    labels = None
    if label_key is not None:
        labels, _ = checks.encode(checks.column(adata.obs, label_key, "label"), "labels", n)
    ways: dict[str, tuple[str, joint_space.Joint | str]] = {
        name: ("control" if name in twins.values() else "model", joint) for name, joint in halves.items()
    }
    known_as = features.shown(twins)
    ways = {known_as.get(name, name): way for name, way in ways.items()}
    ways |= _rivals(adata, raw, counts, seed)
    draws = joint_space.pools(sets, pool, seed)
    units = features.Units(group, group_names, n, n_boot, seed, MATCHING)
    out = Results()
    for name in each(ways, MATCHING):
        kind, joint = ways[name]
        about = {
            "task": MATCHING,
            "model_id": name,
            "model_kind": kind,
            "split_scheme": scheme,
            "n_groups": len(group_names),
            "metric_impl": features.implementation(),
        }
        if isinstance(joint, str):
            out.skip(joint, **about, metric="foscttm")
            continue
        spaces = [joint(fold.train) for fold in plan]
        for metric, values in joint_space.scores(spaces, plan, sets, draws).items():
            note = f"pool of {pool}" if metric.startswith("recall") else ""
            units.add(out, _mean_of(values), **about, metric=metric, note=note)
        if labels is not None:
            guess = joint_space.transferred(spaces, plan, labels)
            units.add(out, _macro_f1(labels, guess), **about, metric="transfer_f1")
    small = int(sum(len(s) for s in sets if len(s) < pool))
    return finish(
        out,
        twin_names(twins),
        started=started,
        dataset=dataset,
        pretrain_overlap=pretrain_overlap,
        n_cells=n,
        dropped={f"no recall: fewer than {pool} candidates": small} if small else {},
        group_key=group_key,
        n_groups=len(units.names),
        label_key=label_key,
        second=_described(raw, _is_counts(raw)),
        pool=pool,
        split_scheme=scheme,
        n_boot=n_boot,
        seed=seed,
    )


@one_thread
def modality_prediction(
    adata: ad.AnnData,
    second: Second,
    predictions: Mapping[str, pd.DataFrame | ad.AnnData] | None = None,
    *,
    embeddings: Sequence[str] = (),
    group_key: str | None = None,
    counts: str | None = None,
    twins: Mapping[str, str] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
    dataset: str = "",
    pretrain_overlap: str = "unknown",
) -> Results:
    """Score predictions of one modality from another, feature by feature.

    Counts of the second modality become centred log ratios: log1p minus its mean over the features of the
    cell; predictions are on that scale. Other values are taken as they are. Scores: Pearson and Spearman
    correlation across the cells of each held-out group (or fold) and error in units of the spread of the
    feature, median over features.

    Always beside them, fitted on the training cells: ``pca`` (ridge regression on principal components of
    the first modality), ``neighbours`` (mean of the 15 most similar cells), ``feature_mean``, ``depth_only``,
    ``noise``, and as ceiling ``half_split`` (what the noise of counts leaves to predict), or ``oracle`` (the
    truth with a tenth of its spread as noise) where the second modality is not counts.

    Args:
        adata: cells with raw counts of the first modality.
        second: the other modality: an obsm key, or a table [cells, features] with names of cells.
        predictions: name → table [cells, all features], cells by name. Whatever made them must not have
            seen the second modality of these cells.
        embeddings: obsm keys, made from the first modality alone; read by ridge regression in the same folds.
        group_key: obs column of donors or batches; None: folds over cells, and named so.
        counts: where raw counts of the first modality are, as in :func:`scjax.eval.run`.
        twins: name of a prediction or embedding → name of its random-initialised twin among them.
        n_boot: resamples behind the 95 % intervals: of groups from ten on, else of cells.

    Raises:
        KeyError, ValueError: keys, cells or features that are absent, values that are not finite or on
            another scale, or nothing to score.
    """
    started = time.perf_counter()
    if not predictions and not len(embeddings):
        raise ValueError(
            "nothing to score: give predictions ({name: cells x features}) or embeddings (obsm keys)"
        )
    twins = dict(twins or {})
    raw, names = _second(adata, second)
    counted = _is_counts(raw)
    truth = _log_ratio(raw) if counted else raw
    still = np.ptp(truth, axis=0) == 0
    dropped = {"features without variation": int(still.sum())} if still.any() else {}
    if still.all():
        raise ValueError("no feature of the second modality varies; is it the right table?")
    truth, names = truth[:, ~still], [f for f, s in zip(names, still, strict=True) if not s]
    scale = "centred log ratios (log1p minus the mean over features of the cell)" if counted else "that scale"
    given = {
        name: features.table(p, name, adata.obs_names, names, truth, scale)
        for name, p in (predictions or {}).items()
    }
    group, group_names = _groups(adata, group_key)
    plan, scheme = folds(adata.n_obs, group, seed, unit="cells")
    units = features.Units(group, group_names, adata.n_obs, n_boot, seed, PREDICTION)
    parts = units.parts if group is not None else {f"fold {i + 1}": f.test for i, f in enumerate(plan)}
    ways = features.given(given, twins)
    for key in embeddings:
        predict = regression.by_ridge(regression.fixed(obsm(adata, key)), truth, group, seed)
        ways[key] = Entry("control" if key in twins.values() else "model", predict, key)
    ways |= features.rivals(_expression(adata, counts, seed), truth, group, seed, mean="feature_mean")
    features.check_twins(twins, ways)
    ways = features.named(ways, twins)
    if not counted:
        noise = np.random.default_rng([seed, 8]).normal(size=truth.shape) * truth.std(0)
        ways["oracle"] = Entry("oracle", regression.as_given(truth + 0.1 * noise))
    about = {
        "task": PREDICTION,
        "split_scheme": scheme,
        "n_groups": len(group_names),
        "n_cells": adata.n_obs,
        "metric_impl": features.implementation(),
    }
    out = Results()
    panel: dict[str, list[float | None]] = {}

    def add(name: str, way: Entry, score: Callable[[dict[str, np.ndarray], np.ndarray], Scores]) -> None:
        whole = score(parts, np.ones((1, adata.n_obs)))
        note = features.spread_note(whole["feature_pearson"][0])
        row = {**about, "model_id": name, "model_kind": way.kind, "embedding_key": way.key}
        for metric, values in units.over_features(score, parts).items():
            method = units.method + ", centred" * (units.groups is None)
            out.add(values, **row, metric=metric, ci_method=method, note=note)
            if metric != "feature_nrmse":
                for feature, value in zip(names, whole[metric][0], strict=True):
                    out.add([value], **row, metric=metric, label=feature)
        panel[name] = features.listed(whole["feature_pearson"][0])

    for name in each(ways, PREDICTION):
        way = ways[name]
        if way.absent:
            out.skip(way.absent, **about, model_id=name, model_kind=way.kind, metric="feature_pearson")
            continue
        assert way.predict is not None
        guess = regression.cross_predict(way.predict, plan, truth.shape)
        add(name, way, partial(regression.per_feature, truth, guess))
    if counted:
        whole = raw.astype(np.int64)
        first = np.random.default_rng([seed, 6]).binomial(whole, 0.5)
        one, other = (_log_ratio(half)[:, ~still] for half in (first, whole - first))
        add("half_split", Entry("oracle", None), partial(regression.ceiling, one, other))
    out.panels.append({"panel": "features", "task": PREDICTION, "track": "", "names": names, "value": panel})
    return finish(
        out,
        twin_names(twins),
        started=started,
        dataset=dataset,
        pretrain_overlap=pretrain_overlap,
        n_cells=adata.n_obs,
        dropped=dropped,
        group_key=group_key,
        n_groups=len(group_names),
        second=_described(raw, counted),
        split_scheme=scheme,
        n_boot=n_boot,
        seed=seed,
    )


def _mean_of(values: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda rows, weights: stats.mean(values[rows], weights)


def _macro_f1(labels: np.ndarray, guess: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Macro-F1 over the cells that have a label."""

    def score(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        named = labels[rows] >= 0
        at, every = rows[named], np.ones(labels.max() + 1, bool)
        if not len(at):
            return np.array([np.nan])
        return stats.classification(labels[at], guess[at], every, weights[:, named])["macro_f1"]

    return score


def _groups(adata: ad.AnnData, key: str | None) -> tuple[np.ndarray | None, list[str]]:
    if key is None:
        return None, []
    codes, names = checks.encode(checks.column(adata.obs, key, "group"), "group", adata.n_obs)
    if (codes < 0).any():
        raise ValueError(
            f"{int((codes < 0).sum())} of {adata.n_obs} cells have no group ({key!r}); drop them"
        )
    return codes, names


def _joint(adata: ad.AnnData, name: str, given: Any) -> joint_space.Joint:
    """An embedding as a function of the training rows; halves that are given are checked at once."""
    if callable(given):
        return lambda train: _checked(name, given(train), adata.n_obs)
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(f"embedding {name!r}: two halves (first modality, second modality) are needed")
    first, second = (obsm(adata, half) if isinstance(half, str) else half for half in given)
    return joint_space.fixed(*_checked(name, (first, second), adata.n_obs))


def _checked(name: str, pair: tuple[Any, Any], n: int) -> joint_space.Halves:
    """Both halves as arrays; a ValueError where they do not fit the cells or each other."""
    # A function of the training rows may rightly find nothing to share, and then returns zeros.
    first, second = (
        checks.matrix(half, f"{name} ({which} half)", n, zero_rows=True)
        for half, which in zip(pair, ("first", "second"), strict=True)
    )
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"embedding {name!r}: its halves have {first.shape[1]} and {second.shape[1]} dimensions; both "
            "must lie in one space"
        )
    return first, second


def _second(adata: ad.AnnData, second: Second) -> tuple[np.ndarray, list[str]]:
    """The other modality as float64[cells, features], cells in the order of ``adata``, and its features."""
    title = f"obsm[{second!r}]" if isinstance(second, str) else "the table of the second modality"
    if isinstance(second, str):
        if second not in adata.obsm:
            raise KeyError(f"obsm has no {second!r}; it holds: {', '.join(adata.obsm) or 'nothing'}")
        second = adata.obsm[second]
    table: Any = second
    if not isinstance(table, pd.DataFrame):
        values = table.toarray() if sp.issparse(table) else np.asarray(table)
        table = pd.DataFrame(values, index=adata.obs_names)
    rows = features.positions(list(adata.obs_names), table.index, "cell", f"the rows of {title}")
    X = table.to_numpy(np.float64)[rows]
    if bad := int((~np.isfinite(X)).any(1).sum()):
        raise ValueError(f"{title}: {bad} of {len(X)} cells hold NaN or infinite values; drop them")
    return X, [str(c) for c in table.columns]


def _is_counts(X: np.ndarray) -> bool:
    return bool(X.min() >= 0 and (X == np.rint(X)).all() and X.max() > 1)


def _log_ratio(X: np.ndarray) -> np.ndarray:
    """Centred log ratio of counts [cells, features]: log1p minus its mean over the features of the cell."""
    log = np.log1p(np.asarray(X, np.float64))
    return log - log.mean(1, keepdims=True)


def _described(X: np.ndarray, counted: bool) -> str:
    return f"{X.shape[1]} features, " + ("counts, as centred log ratios" if counted else "values as given")


def _expression(adata: ad.AnnData, counts: str | None, seed: int) -> Expression | str:
    """Expression of the first modality, or why there is none."""
    try:
        X, genes = find_counts(adata, counts)
    except (KeyError, ValueError) as error:
        if counts is not None:
            raise
        return f"{error.args[0]}; say where they are with counts="
    return Expression(X, genes, seed)


def _rivals(
    adata: ad.AnnData, raw: np.ndarray, counts: str | None, seed: int
) -> dict[str, tuple[str, joint_space.Joint | str]]:
    """Joint spaces that every evaluation has beside those under test."""
    expression = _expression(adata, counts, seed)
    cca: joint_space.Joint | str
    depth: joint_space.Joint | str
    if isinstance(expression, str):
        cca = depth = expression
    else:
        values = _log_ratio(raw) if _is_counts(raw) else raw
        cca = joint_space.canonical(expression.pca, joint_space.components(values))
        total = np.log1p(np.asarray(expression.counts.sum(1), np.float64).ravel())
        depth = joint_space.by_depth(total, np.log1p(np.maximum(raw, 0).sum(1)))
    rng = np.random.default_rng([seed, 9])
    here, there, truth = (rng.normal(size=(adata.n_obs, 10)) for _ in range(3))
    oracle = joint_space.fixed(truth, truth + 0.1 * rng.normal(size=truth.shape))
    return {
        "cca": ("baseline", cca),
        "depth_only": ("control", depth),
        "noise": ("control", joint_space.fixed(here, there)),
        "oracle": ("oracle", oracle),
    }
