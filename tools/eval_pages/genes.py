"""Gene properties and gene sets: tables made of expression, and the gene embeddings of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from eval_pages.common import MODEL, TWIN, Page, read

import scjax.eval
from scjax.eval import Results, gene_sets
from scjax.eval.baselines import Expression
from scjax.eval.genes import expression_tables

BLOOD, LINES = "pbmc3k_10xv1", "breast_cancer_31lines_dropseq"
BREAST = "breast_lines_coexpression"
DETECTED = 0.01
COLLECTIONS = {
    "GO biological process": "go_biological_process_human.gmt.gz",
    "GO cellular component": "go_cellular_component_human.gmt.gz",
    "Reactome and WikiPathways": "reactome_wikipathways_msigdb_v7.5.1.gmt.gz",
}


def pages(data: Path, model: Path | None) -> Iterator[Page]:
    """All genes expressed in blood, judged by co-expression in another tissue; then those a model knows."""
    yield "gene_properties", "Properties of genes expressed in blood", partial(_properties, data, None)
    yield "gene_sets", "Gene sets among genes expressed in blood", partial(_sets, data, None)
    if model is not None:
        yield "gene_properties_model", "Properties of a model's genes", partial(_properties, data, model)
        yield "gene_sets_model", "Gene sets among a model's genes", partial(_sets, data, model)


def _properties(data: Path, model: Path | None) -> Results:
    lists = gene_sets.read_lists(data / "genes" / "gene_property_lists_human.tsv.gz")
    sparing = [
        g for name, of in lists.items() if "haploinsufficiency" in name or "clingen" in name for g in of
    ]
    regulators = set((data / "genes" / "tf_list_human_curated.txt").read_text().split())
    tables, rest = _tables(data, model)
    known = {g for table in tables.values() for g in table.index}
    labels = {
        "dominant or recessive disease": gene_sets.contrast(lists["all_ad"], lists["all_ar"]),
        "essential in the mouse": _among(lists["mgi_essential"], known),
        "essential in cell lines": _among(lists["CEGv2_subset_universe"], known),
        "transcription factor": _among(regulators, known),
    }
    if model is None:
        tolerant = lists["homozygous_lof_tolerant_twohit"]
        labels["haploinsufficient or tolerant to loss"] = gene_sets.contrast(sparing, tolerant)
    return _scored(tables, labels, dataset="gene property lists", **rest)


def _sets(data: Path, model: Path | None) -> Results:
    tables, rest = _tables(data, model)
    files = {name: gene_sets.read_gmt(data / "genes" / file) for name, file in COLLECTIONS.items()}
    return _scored(tables, None, collections=files, max_sets=50, dataset="gene sets", **rest)


def _among(listed: Any, known: set[str]) -> dict[str, int]:
    """1 for the genes listed, 0 for all others that are known."""
    return gene_sets.contrast(set(listed) & known, known - set(listed))


def _tables(data: Path, model: Path | None) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Gene tables, and what stands beside them. All are limited to genes expressed in blood."""
    blood = read(data, BLOOD)
    detected = np.bincount(blood.X.tocsr().indices, minlength=blood.n_vars) / blood.n_obs
    blood = blood[:, detected >= DETECTED].copy()
    breast = coexpression(data)
    held = set(blood.var_names)
    rest: dict[str, Any] = {"expression": blood}
    if model is None:
        return {BREAST: breast[breast.index.isin(held)]}, rest
    found = embeddings(model)
    tables = {name: table[table.index.isin(held)] for name, table in found.items()}
    return tables, rest | {"twins": {MODEL: TWIN}}


def coexpression(data: Path) -> pd.DataFrame:
    """Leading eigenvectors of the correlation of genes over breast cancer cell lines."""
    lines = read(data, LINES)
    detected = np.bincount(lines.X.tocsr().indices, minlength=lines.n_vars) / lines.n_obs
    at = np.flatnonzero(detected >= DETECTED)
    expression = Expression(lines.X, [str(v) for v in lines.var_names])
    table = expression_tables(expression, at, 0)["coexpression"][at]
    return pd.DataFrame(table, index=lines.var_names[at])


def embeddings(model: Path) -> Mapping[str, pd.DataFrame]:
    """Gene embeddings of a model and of its random twin, by symbol."""
    import scjax

    handle = scjax.load(model)
    out = {}
    for name, one in ((MODEL, handle), (TWIN, handle.random_twin())):
        table = pd.DataFrame(
            np.asarray(one.gene_embedding()), index=[str(s) for s in handle.vocabulary.symbol]
        )
        out[name] = table[~table.index.duplicated()]
    return out


def _scored(tables: Mapping[str, pd.DataFrame], labels: Any, **rest: Any) -> Results:
    return scjax.eval.genes(tables, labels, n_boot=500, **rest)
