"""Annotation, clustering and integration on every labelled set of the development data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import anndata as ad
from eval_pages.common import Page, embedded, read

import scjax.eval
from scjax.eval import Results
from scjax.eval.baselines import Expression

# file → what the page is called, label column, group column (never cut by a split), batch column
SETS: dict[str, tuple[str, str, str | None, str | None]] = {
    "kang_ctrl_8donors_10x": ("Blood of eight donors", "cell_type", "donor", "donor"),
    "kang_ifnb_labelled_10x": ("Blood, with and without interferon", "cell_type", "donor", "condition"),
    "breast_cancer_31lines_dropseq": ("Thirty-one breast cancer cell lines", "cell_type", None, None),
    "lymph_node_ref_330": ("Lymph node, tonsil and spleen", "cell_type", None, None),
    "pollen_cell_types_299": ("Cell lines and fetal cortex, full-length reads", "cell_type", None, None),
    "pancreas_baron_cross_species_350": ("Pancreas of man and mouse", "cell_type", "donor", "batch"),
    "pancreas_baron_mouse_indrop": ("Mouse pancreas, two mice", "cell_type", "donor", "donor"),
    "pancreas_e15_mouse_velocity_739": ("Embryonic mouse pancreas", "cell_type", None, None),
    "paul15_myeloid_marsseq": ("Mouse myeloid progenitors", "cell_type", "batch", "batch"),
    "tabula_muris_facs_865": ("Mouse tissues, full-length reads", "cell_type", "donor", None),
    "mesc_2batches_fluidigm": ("Mouse embryonic stem cells, two batches", "cell_type", "batch", "batch"),
    "merfish_mouse_brain_1k": ("Mouse brain, MERFISH", "cell_type", None, None),
    "osmfish_mouse_ssp": ("Mouse cortex, osmFISH", "cell_type", None, None),
    "starmap_mouse_mpfc_3sections": ("Mouse prefrontal cortex, STARmap", "cell_type", "section", "section"),
}
FURTHER = {"merfish_mouse_brain_1k": ("X_transcriptformer_exemplar",)}  # published embeddings in the file
BLOOD = ("pbmc3k_10xv1", "pbmc4k_10xv2", "pbmc_facs_10xv1", "kang_ifnb_2k_10x")


def pages(data: Path, model: Path | None) -> Iterator[Page]:
    """One page per data set."""
    yield "blood_four_studies", "Blood of four studies", partial(_blood, data, model)
    for name, (title, *keys) in SETS.items():
        yield name, title, partial(_set, data, model, name, *keys)


LABELS = "cell_type_harmonised"


def blood(data: Path) -> ad.AnnData:
    """The four studies of blood on their shared genes: unstimulated cells, labels renamed onto one list."""
    studies = {name: read(data, name) for name in BLOOD}
    kang = studies["kang_ifnb_2k_10x"]
    studies["kang_ifnb_2k_10x"] = kang[kang.obs["condition"].isin(["control", "ctrl"])].copy()
    return ad.concat(studies, label="study", join="inner", index_unique="-", merge="same")


def _blood(data: Path, model: Path | None) -> Results:
    return _score(data, model, blood(data), "four blood studies", LABELS, "study", "study")


def _set(
    data: Path, model: Path | None, name: str, label: str, group: str | None, batch: str | None
) -> Results:
    return _score(data, model, read(data, name), name, label, group, batch, *FURTHER.get(name, ()))


def _score(
    data: Path,
    model: Path | None,
    adata: ad.AnnData,
    dataset: str,
    label: str,
    group: str | None,
    batch: str | None,
    *further: str,
) -> Results:
    subject = embedded(data, adata, model, *further)
    if not subject.embeddings:  # no model knows this panel: its genes as they are, beside the same baselines
        adata.obsm["X_all_genes"] = Expression(adata.X, list(adata.var_names)).log.toarray()
        subject.embeddings.append("X_all_genes")
    results = scjax.eval.run(
        adata,
        subject.embeddings,
        label_key=label,
        group_key=group,
        batch_key=batch,
        controls=subject.controls,
        dataset=dataset,
        maps=False,
        progress=True,
    )
    results.facts |= subject.facts
    return results
