"""Imputation in space: expression of held-out genes, predicted for every cell of a section (task
"spatial/imputation"), gene by gene and in its spatial pattern.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scjax.eval import features, regression, space, stats
from scjax.eval.baselines import Expression, find_counts
from scjax.eval.compare import finish
from scjax.eval.environment import one_thread
from scjax.eval.features import Entry
from scjax.eval.neighbourhoods import COORDINATES
from scjax.eval.progress import each
from scjax.eval.representations import obsm, twin_names
from scjax.eval.results import Results
from scjax.eval.splits import Fold, folds

TASK = "spatial/imputation"
GRAPH_NEIGHBOURS = 6  # of the graph of Moran's I


@one_thread
def imputation(
    real: ad.AnnData,
    predictions: Mapping[str, pd.DataFrame | ad.AnnData] | None = None,
    *,
    genes: Sequence[str],
    embeddings: Sequence[str] = (),
    section_key: str | None = None,
    group_key: str | None = None,
    coordinates: str = "spatial",
    counts: str | None = None,
    twins: Mapping[str, str] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
    dataset: str = "",
    pretrain_overlap: str = "unknown",
) -> Results:
    """Score predicted expression of held-out genes against what was measured.

    All values are log1p of counts per ten thousand of all genes of ``real``. Scores: Pearson and Spearman
    correlation across the cells of each held-out section (or fold), median over genes; error in units of the
    spread of the gene; Moran's I of predictions against that of the truth: its correlation over genes and its
    mean absolute error.

    Always beside them, fitted on training sections or blocks, where the held-out genes are known, from the
    other genes: ``pca`` (ridge regression), ``neighbours`` (mean of the 15 cells of most similar expression),
    ``gene_mean``, ``depth_only``, ``noise``, ``coordinates`` (nearest training cells on the slide: shows what
    adjacency alone is worth) and ``half_split``, the ceiling that the noise of counts leaves.

    Args:
        real: cells with raw counts of all genes and coordinates in obsm.
        predictions: name → table [cells, at least ``genes``], on the scale above, cells by name.
        genes: the held-out genes. Whatever made the predictions must not have seen them in these cells.
        embeddings: obsm keys, made without the held-out genes; read by ridge regression in the same folds.
        section_key, group_key, coordinates: as in :func:`scjax.eval.spatial`.
        counts: where raw counts are, as in :func:`scjax.eval.run`.
        twins: name of a prediction or embedding → name of its random-initialised twin among them.
        n_boot: resamples of genes behind the 95 % intervals; none with fewer than ten genes.

    Raises:
        KeyError: genes, cells or keys that are absent. ValueError: no counts, predictions that are not finite
            or on another scale, genes that do not vary, or nothing to score.
    """
    started = time.perf_counter()
    if not predictions and not len(embeddings):
        raise ValueError(
            "nothing to score: give predictions ({name: cells x genes}) or embeddings (obsm keys)"
        )
    place = space.locate(real, coordinates, section_key, group_key)
    X, names = find_counts(real, counts)
    genes = list(dict.fromkeys(genes))
    column = features.positions(genes, names, "gene", "the measured genes")
    X = sp.csr_matrix(X).astype(np.float64)
    inputs = np.setdiff1d(np.arange(len(names)), column)
    if len(inputs) < 2:
        raise ValueError(
            f"{len(genes)} of {len(names)} genes are held out; at least two must be left to predict from"
        )
    truth = _normalised(X, column)
    if flat := [g for g, spread in zip(genes, np.ptp(truth, axis=0), strict=True) if spread == 0]:
        raise ValueError(
            f"held-out genes without any variation: {', '.join(flat[:5])}; leave them out of genes="
        )
    given = {
        name: features.table(p, name, real.obs_names, genes, truth, "log1p of counts per ten thousand")
        for name, p in (predictions or {}).items()
    }
    held_out = place.unit
    plan, scheme = folds(len(place), held_out, seed, unit="cells")
    if place.held_out == "block":
        plan = [Fold(place.away_from(f.train, f.test), f.test) for f in plan]
        margin = f", training cells within {space.MARGIN:g} spacings of a held-out one left out"
        scheme = scheme.replace("group", "contiguous block") + margin
        parts = {f"fold {i + 1}": f.test for i, f in enumerate(plan)}
    else:
        scheme = scheme.replace("group", place.held_out)
        parts = {n: np.flatnonzero(held_out == i) for i, n in enumerate(place.unit_names)}
    expression = Expression(X[:, inputs], [names[i] for i in inputs], seed)
    twins = dict(twins or {})
    ways: dict[str, Entry] = features.given(given, twins)
    for key in embeddings:
        represent = regression.fixed(obsm(real, key))
        kind = "control" if key in twins.values() else "model"
        ways[key] = Entry(kind, regression.by_ridge(represent, truth, held_out, seed), key)
    ways |= features.rivals(expression, truth, held_out, seed, mean="gene_mean")
    nearest = regression.by_neighbours(regression.fixed(place.scaled), truth, metric="euclidean")
    ways[COORDINATES] = Entry("control", nearest)
    features.check_twins(twins, ways)
    ways = features.named(ways, twins)

    graphs = {}
    for part, rows in parts.items():
        graphs[part] = _graph(place.xy[rows], place.section[rows])
    pattern = _pattern(truth, parts, graphs)
    enough = len(genes) >= stats.FEW_GROUPS
    weights = stats.resample(len(genes), n_boot if enough else 0, seed, TASK)
    method = "percentile bootstrap over genes"
    about = {
        "task": TASK,
        "split_scheme": scheme,
        "n_groups": len(genes),
        "n_cells": len(place),
        "metric_impl": features.implementation(),
    }
    out = Results()

    def add(name: str, kind: str, key: str, found: dict[str, np.ndarray], moran: np.ndarray | None) -> None:
        row = {**about, "model_id": name, "model_kind": kind, "embedding_key": key}
        note = features.spread_note(found["feature_pearson"][0]) + (
            "" if enough else "; too few genes for intervals"
        )
        for metric, values in found.items():
            score = stats.median(values[0], weights) if np.isfinite(values[0]).any() else [np.nan]
            out.add(score, **row, metric=metric, ci_method=method, note=note)
            if metric != "feature_nrmse":
                for gene, value in zip(genes, values[0], strict=True):
                    out.add([value], **row, metric=metric, label=gene)
        if moran is not None:
            r = regression.correlation(moran[:, None], pattern[:, None], weights)[:, 0]
            out.add(r, **row, metric="moran_r", ci_method=method)
            gap = stats.mean(np.abs(moran - pattern), weights)
            out.add(gap, **row, metric="moran_mae", ci_method=method)

    panel: dict[str, list[float | None]] = {}
    everyone = np.ones((1, len(place)))
    for name in each(ways, TASK):
        way = ways[name]
        if way.absent:
            out.skip(way.absent, **about, model_id=name, model_kind=way.kind, metric="feature_pearson")
            continue
        assert way.predict is not None
        guess = regression.cross_predict(way.predict, plan, truth.shape)
        found = regression.per_feature(truth, guess, parts, everyone)
        add(name, way.kind, way.key, found, _pattern(guess, parts, graphs))
        panel[name] = features.listed(found["feature_pearson"][0])
    first, second = (_normalised(half, column) for half in _halves(X, seed))
    add("half_split", "oracle", "", regression.ceiling(first, second, parts, everyone), None)
    out.panels.append({"panel": "features", "task": TASK, "track": "", "names": genes, "value": panel})
    return finish(
        out,
        twin_names(twins),
        started=started,
        dataset=dataset,
        pretrain_overlap=pretrain_overlap,
        n_cells=len(place),
        dropped={},
        held_out_genes=genes,
        input_genes=len(inputs),
        sections=dict(zip(place.section_names, np.bincount(place.section).tolist(), strict=True)),
        split_scheme=scheme,
        n_boot=n_boot,
        seed=seed,
    )


def _normalised(counts: sp.csr_matrix, column: np.ndarray) -> np.ndarray:
    """log1p of counts per ten thousand of all genes, of these columns: float64[cells, columns]."""
    total = np.asarray(counts.sum(1)).ravel()
    return np.log1p(counts[:, column].toarray() * (1e4 / np.where(total > 0, total, 1))[:, None])


def _halves(counts: sp.csr_matrix, seed: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Each count thrown, one by one, into one of two halves."""
    first = counts.copy()
    first.data = (
        np.random.default_rng([seed, 6]).binomial(counts.data.astype(np.int64), 0.5).astype(np.float64)
    )
    return first, sp.csr_matrix(counts - first)


def _graph(xy: np.ndarray, section: np.ndarray) -> sp.csr_matrix:
    """Graph of the six nearest cells of the same section, for Moran's I; sections too small for it have no
    edges.
    """
    rows, columns = [], []
    for s in np.unique(section):
        at = np.flatnonzero(section == s)
        if len(at) > GRAPH_NEIGHBOURS:
            index = space.neighbours(xy[at], section[at], GRAPH_NEIGHBOURS)[1]
            rows.append(np.repeat(at, GRAPH_NEIGHBOURS))
            columns.append(at[index].ravel())
    i, j = (np.concatenate(x) if x else np.zeros(0, np.int64) for x in (rows, columns))
    return sp.csr_matrix((np.ones(len(i)), (i, j)), shape=(len(xy), len(xy)))


def _pattern(values: np.ndarray, parts: Mapping[str, np.ndarray], graphs: Mapping[str, Any]) -> np.ndarray:
    """Moran's I of each gene: the mean over parts."""
    found = [space.morans_i(values[rows], graphs[part]) for part, rows in parts.items()]
    return np.asarray(np.mean(found, axis=0))
