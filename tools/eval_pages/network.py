"""Known regulons: co-expression, gene tables and the gene embeddings of a model against curated edges."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from eval_pages.common import MODEL, TWIN, Page, read
from eval_pages.genes import BLOOD, BREAST, LINES, coexpression, embeddings

import scjax.eval
from scjax.eval import Results, gene_sets
from scjax.eval.baselines import Expression
from scjax.eval.regulation import similarity

DETECTION = 0.05
TRUTH = {"TRRUST": "tf_target_trrust_2015_human.tsv.gz", "OmniPath": "tf_target_omnipath_human.tsv.gz"}


def pages(data: Path, model: Path | None) -> Iterator[Page]:
    """Regulons among genes expressed in blood; then among those of them that a model knows."""
    yield "regulons", "Regulons among genes expressed in blood", partial(_blood, data)
    if model is not None:
        yield "regulons_model", "Regulons among a model's genes", partial(_model, data, model)


def _blood(data: Path) -> Results:
    """Co-expression in another tissue, as such and by way of its leading eigenvectors."""
    blood, truth = read(data, BLOOD), _truth(data)
    regulators = sorted({g for edges in truth.values() for g in edges["source"]})
    lines = read(data, LINES)
    lines = lines[:, lines.var_names.isin(_detected(blood))].copy()
    log = pd.DataFrame(Expression(lines.X, list(lines.var_names)).log.toarray(), columns=lines.var_names)
    log = log.loc[:, log.std() > 0]
    standard = (log - log.mean()) / log.std(ddof=0)
    held = [g for g in regulators if g in standard.columns]
    scores = {
        "breast_lines_pearson": standard[held].T @ standard / len(standard),
        BREAST: similarity(coexpression(data), regulators, list(standard.columns)),
    }
    return scjax.eval.network(
        scores,
        truth,
        expression=blood,
        min_detection=DETECTION,
        signed=["breast_lines_pearson"],
        dataset="10x PBMC 3k",
        n_boot=500,
    )


def _model(data: Path, model: Path) -> Results:
    """Cosine of gene embeddings, among genes that the model knows and the cells express."""
    blood, truth = read(data, BLOOD), _truth(data)
    tables = embeddings(model)
    known = [g for g in _detected(blood) if g in tables[MODEL].index]
    scores = {name: similarity(table, known, known) for name, table in tables.items()}
    return scjax.eval.network(
        scores,
        truth,
        expression=blood,
        universe=known,
        twins={MODEL: TWIN},
        dataset="10x PBMC 3k",
        n_boot=500,
    )


def _truth(data: Path) -> dict[str, pd.DataFrame]:
    return {name: gene_sets.read_edges(data / "genes" / file) for name, file in TRUTH.items()}


def _detected(cells: ad.AnnData) -> list[str]:
    share = np.bincount(cells.X.tocsr().indices, minlength=cells.n_vars) / cells.n_obs
    return list(cells.var_names[share >= DETECTION])
