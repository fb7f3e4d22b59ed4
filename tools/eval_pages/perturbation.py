"""Genetic, drug and interferon perturbation: every simple predictor, and those that a model's genes or cells
make possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from eval_pages.common import MODEL, TWIN, Page, embedded, read
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

import scjax.eval
from scjax.eval import Results
from scjax.eval.baselines import Expression
from scjax.eval.perturbation_data import lognormalise

GENETIC = "perturb_norman_mcfaline_500g"
NEIGHBOURS = 15
BLOOD_PCA = "genes_by_pca"


def pages(data: Path, model: Path | None) -> Iterator[Page]:
    """One page per experiment."""
    yield "norman_k562", "Genes activated or silenced in K562", partial(_k562, data, model)
    yield "mcfaline_glioma", "Genes silenced in three glioma lines", partial(_glioma, data, model)
    drug = ("gbm_panobinostat_300g", "donor", "chemical")
    yield "panobinostat", "A drug in five patients' gliomas", partial(_transfer, data, model, *drug)
    stimulus = ("kang_ifnb_labelled_10x", "cell_type", "environmental")
    yield "interferon", "Interferon in five types of blood cells", partial(_transfer, data, model, *stimulus)


# ------------------------------------------------------- what embeddings of genes say about unseen genes
def _k562(data: Path, model: Path | None) -> Results:
    cells = read(data, GENETIC)
    cells = cells[cells.obs["cell_type"] == "k562"].copy()
    return _by_genes(data, model, cells, "Norman and McFaline-Figueroa, K562", None)


def _glioma(data: Path, model: Path | None) -> Results:
    cells = read(data, GENETIC)
    cells = cells[cells.obs["cell_type"] != "k562"].copy()
    return _by_genes(data, model, cells, "McFaline-Figueroa, glioma lines", "cell_type")


def _by_genes(
    data: Path, model: Path | None, cells: ad.AnnData, dataset: str, context: str | None
) -> Results:
    """Each perturbation, or each line, held out in turn; nothing of a model is used but its gene table."""
    tables = {BLOOD_PCA: _genes_by_pca(data)}
    twins = {}
    facts: dict[str, Any] = {}
    if model is not None:
        import scjax

        handle = scjax.load(model)
        symbols = [str(s) for s in handle.vocabulary.symbol]
        for name, one in ((MODEL, handle), (TWIN, handle.random_twin())):
            table = pd.DataFrame(np.asarray(one.gene_embedding(), np.float64), index=symbols)
            tables[name] = table[~table.index.duplicated()]
        twins = {MODEL: TWIN}
        targets = {g for p in cells.obs["perturbation"].unique() for g in p.split("+")} - {"control"}
        facts["perturbed genes known to the model"] = f"{len(targets & set(symbols))} of {len(targets)}"
    results = scjax.eval.perturbation(
        cells,
        {},
        context_key=context,
        gene_embeddings=tables,
        twins=twins,
        baselines=[BLOOD_PCA],
        dataset=dataset,
    )
    results.facts |= facts
    return results


def _genes_by_pca(data: Path) -> pd.DataFrame:
    """Genes by their loadings on fifty components of blood cells that are no part of these experiments."""
    blood = read(data, "pbmc3k_10xv1")
    blood = blood[:, np.asarray((blood.X > 0).sum(0)).ravel() >= 10].copy()
    fitted = PCA(50, svd_solver="arpack", random_state=0).fit(lognormalise(blood.X))
    loadings = fitted.components_.T * np.sqrt(fitted.explained_variance_)
    return pd.DataFrame(loadings, index=blood.var_names.astype(str))


# ------------------------------------------------------- what embeddings of cells say about unseen contexts
def _transfer(data: Path, model: Path | None, name: str, context: str, kind: Any) -> Results:
    """Each donor or cell type held out in turn: its effect is that of the others, weighted by how near their
    control cells lie in each representation.
    """
    cells = read(data, name)
    subject = embedded(data, cells, model)
    expression = Expression(cells.X, list(cells.var_names))
    control = np.flatnonzero(cells.obs["perturbation"] == "control")
    spaces = {"pca": expression.pca(control), "hvg": expression.hvg(control)}
    twins = {}
    if subject.embeddings:
        spaces |= {key: np.asarray(cells.obsm[key]) for key in (MODEL, TWIN)}
        twins = {MODEL: TWIN}
    predictions = {space: _weighted(cells, expression, context, X) for space, X in spaces.items()}
    results = scjax.eval.perturbation(
        cells,
        predictions,
        context_key=context,
        kind=kind,
        twins=twins,
        baselines=["pca", "hvg"],
        dataset=name,
    )
    results.facts |= subject.facts
    return results


def _weighted(cells: ad.AnnData, expression: Expression, context: str, X: np.ndarray) -> pd.DataFrame:
    """Predicted mean profiles of every context from the effects in the others."""
    of, treated = cells.obs[context].astype(str).to_numpy(), cells.obs["perturbation"].to_numpy() != "control"
    treatment = cells.obs["perturbation"][treated].iloc[0]

    def mean(rows: np.ndarray) -> np.ndarray:
        return np.asarray(expression.log[rows].mean(0), np.float64).ravel()

    start: Mapping[str, np.ndarray] = {c: mean((of == c) & ~treated) for c in np.unique(of)}
    effect = {c: mean((of == c) & treated) - start[c] for c in start}
    X = normalize(X)
    rows = {}
    for held in start:
        others, own = np.flatnonzero((of != held) & ~treated), np.flatnonzero((of == held) & ~treated)
        near = (
            NearestNeighbors(n_neighbors=NEIGHBOURS).fit(X[others]).kneighbors(X[own], return_distance=False)
        )
        share = pd.Series(of[others][near].ravel()).value_counts(normalize=True)
        rows[(treatment, held)] = start[held] + sum(w * effect[c] for c, w in share.items())
        rows[("control", held)] = start[held]
    table = pd.DataFrame(rows, index=list(cells.var_names)).T
    return table.set_axis(pd.MultiIndex.from_tuples(rows, names=["perturbation", context]))
