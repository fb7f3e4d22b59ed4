"""Diagnostics of a representation that need no labels: has it collapsed, does it mostly hold the depth?

None of these says that a representation is good; each can say that something is wrong with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import sklearn

from scjax.eval import checks, regression, splits, stats
from scjax.eval.baselines import find_counts
from scjax.eval.compare import finish
from scjax.eval.environment import one_thread
from scjax.eval.progress import each
from scjax.eval.representations import Representation, controls_of, gather, twin_names
from scjax.eval.results import Results

PAIRED = 2000  # cells of which all pairs are looked at


@one_thread
def diagnostics(
    adata: ad.AnnData,
    embeddings: Sequence[str],
    *,
    group_key: str | None = None,
    controls: Mapping[str, str | Mapping[str, str]] | None = None,
    counts: str | None = None,
    max_cells: int = 5000,
    n_boot: int = 1000,
    seed: int = 0,
    dataset: str = "",
    pretrain_overlap: str = "unknown",
) -> Results:
    """Diagnose embeddings that lie in ``adata.obsm`` beside the usual baselines and controls.

    ``collapsed`` (all cells nearly one vector), ``noise`` and ``depth_only`` show what each number looks like
    at its end of the range.

    Args:
        adata: cells with embeddings in obsm. No labels are needed. embeddings: obsm keys. group_key: obs
        column (donor, study) that the depth probe must not cut through. None: folds over cells. controls,
        counts: as in :func:`scjax.eval.run`. Without counts the depth is not known and what needs it
            is marked as skipped.
        max_cells: larger data are sampled.
        n_boot: resamples behind the interval of the depth probe.

    Returns:
        Rows of the task "diagnostics"; see :func:`diagnose`.

    Raises:
        KeyError, ValueError: as :func:`scjax.eval.run`.
    """
    started = time.perf_counter()
    embeddings = [embeddings] if isinstance(embeddings, str) else list(embeddings)
    codes = np.zeros(adata.n_obs, int)
    if group_key is not None:
        codes, _ = checks.encode(checks.column(adata.obs, group_key, "group"), "group", adata.n_obs)
    known = np.flatnonzero(codes >= 0)
    rows = known[checks.stratified(codes[known], max_cells, seed)]
    group = None if group_key is None else codes[rows]
    representations = gather(adata, rows, embeddings, controls, counts, seed)
    depth, absent = None, ""
    try:
        depth = np.asarray(find_counts(adata, counts)[0][rows].sum(1), np.float64).ravel()
    except ValueError as error:
        absent = str(error)
    size = representations[0].fitted(np.arange(len(rows))).shape
    jitter = np.random.default_rng([seed, 5]).normal(size=size)
    representations.append(Representation("collapsed", "control", (1 + 1e-3 * jitter).astype(np.float32)))
    results = Results()
    for r in each(representations, "diagnostics", name=lambda r: r.name):
        about = {"task": "diagnostics", "model_id": r.name, "model_kind": r.kind}
        if r.absent:
            results.skip(r.absent, metric="effective_rank", **about)
            continue
        X = r.fitted(np.arange(len(rows)))
        found = diagnose(
            X, depth, group, name=r.name, kind=r.kind, embedding_key=r.key, n_boot=n_boot, seed=seed
        )
        results.extend(found)
        results.facts |= found.facts
        if depth is None:
            results.skip(absent, metric="depth_r2", **about)
    twins, _ = controls_of(embeddings, controls or {})
    return finish(
        results,
        twin_names(twins),
        started=started,
        dataset=dataset,
        pretrain_overlap=pretrain_overlap,
        n_cells_in=adata.n_obs,
        n_cells=len(rows),
        dropped={"no group": adata.n_obs - len(known)} if len(known) < adata.n_obs else {},
        group_key=group_key,
        n_groups=0 if group is None else len(np.unique(group)),
        n_boot=n_boot,
        seed=seed,
    )


@one_thread
def diagnose(
    X: Any,
    depth: Any = None,
    groups: Any = None,
    *,
    name: str = "embedding",
    kind: str = "model",
    embedding_key: str = "",
    n_boot: int = 1000,
    seed: int = 0,
) -> Results:
    """Diagnose one representation.

    - "effective_rank": exp of the entropy of its singular values, taken as shares; between 1 (collapsed) and
      the number of dimensions. Roy & Vetterli 2007; of embeddings (RankMe): Garrido et al. 2023. Not centred,
      as there: a large common vector counts as collapse.
    - "uniformity": log of the mean of exp(−2 d²) over pairs of cells scaled to length 1; 0 for one single
      direction, −4 at best. Wang & Isola 2020.
    - "depth_r2": R² of log total counts, predicted from the representation in cells (or groups) held out, by
      a ridge regression whose penalty is chosen inside the training folds. Some is biology: cell types differ
      in depth.
    - "depth_pcr": share of the variance of the representation that a linear fit on log total counts explains;
      the principal component regression of Büttner et al. 2019 over all components, which needs none.

    Args:
        X: [cells, dimensions].
        depth: total counts of each cell; None: only the first two are computed.
        groups: donor, study, … of each cell, kept whole in the folds of the depth probe.
        name, kind, embedding_key: what the rows are to be called.

    Raises:
        ValueError: fewer than 10 cells, values that are not finite, a constant representation, depths that
        are not positive, a single group.
    """
    X = checks.matrix(X, name, len(X), zero_rows=True)
    if len(X) < 10:
        raise ValueError(f"{len(X)} cells; at least 10 are needed")
    about = {
        "task": "diagnostics",
        "model_id": name,
        "model_kind": kind,
        "embedding_key": embedding_key,
        "n_cells": len(X),
    }
    results = Results()
    results.add([effective_rank(X)], **about, metric="effective_rank", note=f"of {X.shape[1]} dimensions")
    results.add([uniformity(X, seed)], **about, metric="uniformity")
    if depth is None:
        return results
    depth = np.asarray(depth, np.float64)
    if depth.shape != (len(X),) or not (np.isfinite(depth) & (depth > 0)).all():
        raise ValueError(
            f"depth has shape {depth.shape} and {int((~(depth > 0)).sum())} values that are not positive; "
            f"the total counts of each of {len(X)} cells are needed (drop empty cells)"
        )
    log_depth = np.log(depth)
    results.add([depth_pcr(X, log_depth)], **about, metric="depth_pcr")
    group = None if groups is None else np.unique(np.asarray(groups).astype(str), return_inverse=True)[1]
    score, scheme, method, n_groups = _depth_r2(X, log_depth, group, n_boot, seed)
    results.add(
        score,
        **about,
        metric="depth_r2",
        head="ridge",
        split_scheme=scheme,
        ci_method=method,
        n_groups=n_groups,
        metric_impl=f"scikit-learn=={sklearn.__version__}",
    )
    results.facts = {"depth_probe": scheme}
    return results


def effective_rank(X: np.ndarray) -> float:
    """exp of the entropy of the singular values of X as shares (see :func:`diagnose`)."""
    X = np.asarray(X, np.float64)
    gram = X.T @ X if X.shape[1] <= len(X) else X @ X.T
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    share = singular[singular > 0] / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def uniformity(X: np.ndarray, seed: int = 0) -> float:
    """log mean exp(−2 d²) over pairs of different cells on the unit sphere, of at most 2,000 cells."""
    rng = np.random.default_rng([seed, 6])
    X = np.asarray(X[rng.permutation(len(X))[:PAIRED]], np.float64)
    X = X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-300)
    near = np.exp(-2 * np.maximum(2 - 2 * X @ X.T, 0))
    n = len(X)
    return float(np.log((near.sum() - np.trace(near)) / (n * (n - 1))))


def depth_pcr(X: np.ndarray, log_depth: np.ndarray) -> float:
    """Share of the variance of X that lies along log depth."""
    X = np.asarray(X, np.float64) - X.mean(0, dtype=np.float64)
    d = log_depth - log_depth.mean()
    return float(((d @ X) ** 2).sum() / max((d @ d) * (X**2).sum(), 1e-300))


def _depth_r2(
    X: np.ndarray, log_depth: np.ndarray, group: np.ndarray | None, n_boot: int, seed: int
) -> tuple[np.ndarray, str, str, int]:
    """R² of held-out cells with its resamples; scheme of the folds; what was resampled; number of groups."""
    found, scheme = splits.folds(len(X), group, seed, unit="cells")
    Y = log_depth[:, None]
    predict = regression.by_ridge(regression.fixed(np.asarray(X, np.float64)), Y, group, seed)
    wrong = (regression.cross_predict(predict, found, Y.shape) - Y)[:, 0] ** 2
    about = np.empty(len(X))
    for fold in found:  # R² against the best constant that was known in training
        about[fold.test] = (log_depth[fold.test] - log_depth[fold.train].mean()) ** 2
    n_groups = 0 if group is None else int(group.max()) + 1
    if group is not None and n_groups >= stats.FEW_GROUPS:
        weights = stats.resample(n_groups, n_boot, seed, "diagnostics")[:, group]
        method = "percentile bootstrap over groups"
    else:
        weights = stats.resample(len(X), n_boot, seed, "diagnostics")
        method = "percentile bootstrap over cells"
    return 1 - stats.mean(wrong, weights) / stats.mean(about, weights), scheme, method, n_groups
