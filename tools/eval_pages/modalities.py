"""Matching of RNA with surface proteins, and prediction of the proteins, on the CITE-seq sets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from eval_pages.common import MODEL, TWIN, Page, embedded, read

import scjax.eval
from scjax.eval import Results, joint_space
from scjax.eval.baselines import Expression

SETS = {
    "citeseq_ctcl_pbmc_10x": "Blood of a lymphoma patient and a control, 49 proteins",
    "citeseq_bcells_ibex": "B cells, 189 proteins",
    "citeseq_tcells_trex": "T cells, 37 proteins",
    "citeseq_pbmc10k_v3_200cells": "Blood, 14 proteins",
    "citeseq_pbmc5k_v3_200cells": "Blood, 29 proteins",
}


def pages(data: Path, model: Path | None) -> Iterator[Page]:
    """Matching and prediction of a data set on one page."""
    for name, title in SETS.items():
        yield name, title, partial(_set, data, model, name)


def _set(data: Path, model: Path | None, name: str) -> Results:
    adata = read(data, name)
    subject = embedded(data, adata, model)
    keys, twins = list(subject.embeddings), {}
    if TWIN in adata.obsm:
        keys, twins = [MODEL, TWIN], {MODEL: TWIN}
    if not keys:  # no model: highly variable genes as they are, beside the same baselines
        adata.obsm["X_hvg"] = Expression(adata.X, list(adata.var_names)).hvg(np.arange(adata.n_obs))
        keys = ["X_hvg"]
    log = np.log1p(adata.obsm["protein"].to_numpy(np.float64))
    proteins = joint_space.components(log - log.mean(1, keepdims=True))
    # A model of one modality has no joint space: it is led there in the same way as principal components.
    joint = {
        key: joint_space.canonical(joint_space.components(np.asarray(adata.obsm[key], np.float64)), proteins)
        for key in keys
    }
    results = scjax.eval.matching(adata, "protein", joint, twins=twins, dataset=name)
    predicted = scjax.eval.modality_prediction(adata, "protein", embeddings=keys, twins=twins, dataset=name)
    results.extend(predicted)
    results.facts = predicted.facts | results.facts | subject.facts
    results.facts["wall_s"] = {
        "matching": results.facts["wall_s"]["all"],
        "prediction": predicted.facts["wall_s"]["all"],
    }
    return results
