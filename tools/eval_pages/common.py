"""What the pages share: reading the development data, embedding cells with a model and its random twin."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from scjax.eval import Results
from scjax.eval.overlap import Overlap, pretrain_overlap

MODEL, TWIN = "X_scjax", "X_scjax_random_init"
Page = tuple[str, str, Callable[[], Results]]  # file name without suffix, title, what makes the results


def read(data: Path, name: str) -> ad.AnnData:
    """A file of the development data, raw counts in X."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ad.read_h5ad(data / f"{name}.h5ad")


def human_symbols(data: Path, adata: ad.AnnData) -> pd.Index:
    """Gene names under which a human model knows these genes: mouse genes by their one human orthologue."""
    if "human" in set(adata.obs["organism"]):
        return adata.var_names
    table = pd.read_csv(data / "genes" / "orthologs_human_mouse_ensembl105.tsv.gz", sep="\t")
    mouse, human = table["mouse_symbol"], table["human_symbol"]
    pairs = table[~mouse.duplicated(keep=False) & ~human.duplicated(keep=False)].dropna()
    known = dict(zip(pairs["mouse_symbol"], pairs["human_symbol"], strict=True))
    return pd.Index([known.get(str(name), f"mouse {name}") for name in adata.var_names])


@dataclass
class Subject:
    """What is scored of a data set: obsm keys under test, their controls, further facts for the data card."""

    embeddings: list[str] = field(default_factory=list)
    controls: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def seen(model: Path | None, adata: ad.AnnData) -> Overlap:
    """Whether the corpus that a run was trained on holds these cells; unknown where it is not at hand."""
    from scjax.corpus import Corpus, write_hashes
    from scjax.train import read_run

    try:
        corpus = Corpus.open(read_run(model).config["data"]["corpus"]) if model else None
    except (OSError, ValueError):
        corpus = None
    if corpus is None:
        return Overlap("unknown", np.nan, "the corpus of the model is not at hand")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hashes.npz"
        write_hashes(corpus, file, progress=False)
        return pretrain_overlap(adata, file)


def embedded(data: Path, adata: ad.AnnData, model: Path | None, *further: str) -> Subject:
    """Put the embeddings of ``model`` and of its random twin into obsm, if it knows enough of the genes.

    ``further``: obsm keys that are there already and are to be scored too.
    """
    subject = Subject(list(further))
    if model is None:
        return subject
    import scjax

    handle = scjax.load(model)
    cells = ad.AnnData(adata.X, obs=adata.obs[[]], var=pd.DataFrame(index=human_symbols(data, adata)))
    if cells.var_names.has_duplicates:
        cells = cells[:, ~cells.var_names.duplicated()].copy()
    known = sum(name in set(handle.vocabulary.symbol) for name in cells.var_names)
    subject.facts["genes known to the model"] = f"{known:,} of {adata.n_vars:,}"
    try:
        scjax.embed(cells, handle, key_added=MODEL)
        scjax.embed(cells, handle.random_twin(), key_added=TWIN)
    except ValueError as error:
        subject.facts["model"] = f"left out: {error}"
        return subject
    for key in (MODEL, TWIN):
        adata.obsm[key] = cells.obsm[key]
    overlap = seen(model, cells)
    subject.facts |= {"pretrain_overlap": overlap.verdict, "overlap of cells": overlap.note}
    subject.embeddings.append(MODEL)
    subject.controls["random_init"] = {MODEL: TWIN}
    return subject
