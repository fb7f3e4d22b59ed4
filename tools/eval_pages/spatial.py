"""Regions, neighbourhoods and imputation on the spatial sets of the development data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from eval_pages.common import MODEL, TWIN, Page, Subject, embedded, read

import scjax.eval
from scjax.eval import Results
from scjax.eval.baselines import Expression, highly_variable

# file → title, region column, cell type column, section column, group column, values that are no region
TISSUES: dict[str, tuple[str, str, str | None, str | None, str | None, str]] = {
    "starmap_mouse_mpfc_3sections": ("Mouse prefrontal cortex", "layer", "cell_type", "section", None, ""),
    "osmfish_mouse_ssp": ("Mouse somatosensory cortex", "region", "cell_type", None, None, ""),
    "st_her2_breast_8sections": ("Breast tumours", "region", None, "section", "donor", "undetermined"),
    "st_mouse_spinal_cord_als_1863g": ("Mouse spinal cord", "region", None, "section", "donor", "Undefined"),
}
# file → title, section column, number of genes held out
PANELS: dict[str, tuple[str, str | None, int]] = {
    "starmap_mouse_mpfc_3sections": ("Mouse prefrontal cortex", "section", 40),
    "osmfish_mouse_ssp": ("Mouse somatosensory cortex", None, 11),
    "st_her2_breast_8sections": ("Breast tumours", "section", 50),
    "st_mouse_olfactory_bulb": ("Mouse olfactory bulb", "section", 50),
}


def pages(data: Path, model: Path | None) -> Iterator[Page]:
    """Regions and neighbourhoods, then imputation, a page per data set."""
    for name, (title, *keys) in TISSUES.items():
        yield (
            f"{name}_regions",
            f"{title}: regions and neighbourhoods",
            partial(_tissue, data, model, name, *keys),
        )
    for name, (title, section, n) in PANELS.items():
        yield f"{name}_imputation", f"{title}: imputation", partial(_panel, data, model, name, section, n)


def _tissue(
    data: Path,
    model: Path | None,
    name: str,
    region: str,
    label: str | None,
    section: str | None,
    group: str | None,
    none: str,
) -> Results:
    adata = _once(read(data, name), section)
    adata = adata[adata.obs[region] != none].copy()
    subject = _subject(data, adata, model)
    results = scjax.eval.spatial(
        adata,
        subject.embeddings,
        region_key=region,
        label_key=label,
        section_key=section,
        group_key=group,
        controls=subject.controls,
        dataset=name,
    )
    results.facts |= subject.facts
    return results


def _panel(data: Path, model: Path | None, name: str, section: str | None, n: int) -> Results:
    """Genes at random among those detected often enough to be worth predicting."""
    adata = _once(read(data, name), section)
    often = np.flatnonzero(np.asarray((adata.X > 0).mean(0)).ravel() > 0.1)
    if len(often) > 10 * n:
        often = often[np.isin(often, highly_variable(adata.X.tocsr(), 10 * n))]
    genes = adata.var_names[np.sort(np.random.default_rng(0).choice(often, n, replace=False))]
    blind = adata[:, ~adata.var_names.isin(genes)].copy()
    blind.obs["total"] = np.asarray(blind.X.sum(1)).ravel()
    adata, blind = (a[blind.obs["total"].to_numpy() > 0].copy() for a in (adata, blind))
    subject = _subject(data, blind, model)
    keys = [*subject.embeddings, *([TWIN] if TWIN in blind.obsm else [])]
    for key in keys:
        adata.obsm[key] = blind.obsm[key]
    results = scjax.eval.imputation(
        adata,
        genes=list(genes),
        embeddings=keys,
        section_key=section,
        twins={MODEL: TWIN} if TWIN in keys else {},
        dataset=name,
    )
    results.facts |= subject.facts
    return results


def _once(adata: ad.AnnData, section: str | None) -> ad.AnnData:
    """Cells that are listed twice (overlaps of fields of view) kept once."""
    place = pd.DataFrame(np.asarray(adata.obsm["spatial"]))
    place["section"] = adata.obs[section].to_numpy() if section else ""
    return adata[~place.duplicated().to_numpy()].copy()


def _subject(data: Path, adata: ad.AnnData, model: Path | None) -> Subject:
    subject = embedded(data, adata, model)
    if not subject.embeddings:  # no model knows this panel: its genes as they are, beside the same baselines
        log = Expression(adata.X, list(adata.var_names)).log
        adata.obsm["X_all_genes"] = log[:, np.asarray(log.sum(0)).ravel() > 0].toarray()[:, :2000]
        subject.embeddings.append("X_all_genes")
    return subject
