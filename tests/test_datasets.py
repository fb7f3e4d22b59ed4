"""The data that ship: what they hold, and that they are the counts and labels of their sources."""

import pathlib
import subprocess
import sys

import anndata as ad
import numpy as np
import pytest

import scjax
from scjax.corpus import build_corpus, validate_counts

SHARED = {"B", "CD4 T", "CD8 T", "NK", "CD14 monocyte"}
ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SOURCES = {"pbmc3k": "pbmc3k_10xv1.h5ad", "pbmc_facs": "pbmc_facs_10xv1.h5ad"}


@pytest.fixture(scope="module")
def pbmc() -> ad.AnnData:
    return scjax.datasets.pbmc()


def test_two_studies_of_raw_counts(pbmc):
    assert pbmc.shape == (6574, 12881) and pbmc.X.format == "csr" and pbmc.X.dtype == np.float32
    validate_counts(pbmc.X, source="pbmc")
    assert pbmc.obs["study"].value_counts().to_dict() == {"pbmc_facs": 3874, "pbmc3k": 2700}
    assert pbmc.obs_names.is_unique and pbmc.var_names.is_unique and pbmc.var["ensembl_id"].is_unique
    assert ((pbmc.X > 0).sum(0) >= 10).all()
    assert not pbmc.obs.isna().any(axis=None)


def test_labels_are_shared_across_the_studies(pbmc):
    types = {study: set(frame["cell_type"]) for study, frame in pbmc.obs.groupby("study", observed=True)}
    assert types["pbmc3k"] & types["pbmc_facs"] == SHARED
    assert types["pbmc3k"] - SHARED == {"FCGR3A monocyte", "dendritic", "megakaryocyte", "unlabelled"}
    assert types["pbmc_facs"] - SHARED == {"CD34+ progenitor"}
    assert (pbmc.obs["cell_type"] == "unlabelled").sum() == 62
    # a fine label is of one type, so nothing was mixed up in renaming
    assert pbmc.obs.groupby(["study", "cell_type_fine"], observed=True)["cell_type"].nunique().max() == 1


@pytest.mark.parametrize(
    ("cell_type", "marker"),
    [("B", "MS4A1"), ("NK", "GNLY"), ("CD14 monocyte", "LYZ"), ("CD8 T", "CD8A"), ("CD4 T", "IL7R")],
)
def test_markers_peak_in_their_type_in_both_studies(pbmc, cell_type, marker):
    for study in ("pbmc3k", "pbmc_facs"):
        cells = pbmc[(pbmc.obs["study"] == study) & pbmc.obs["cell_type"].isin(SHARED)]
        share = np.asarray(cells[:, marker].X.todense()).ravel() / np.asarray(cells.X.sum(1)).ravel()
        means = {t: share[(cells.obs["cell_type"] == t).to_numpy()].mean() for t in SHARED}
        assert max(means, key=means.get) == cell_type, (study, means)


def test_every_call_gives_a_new_object(pbmc):
    again = scjax.datasets.pbmc()
    again.X.data[:] = 0
    assert scjax.datasets.pbmc().X.sum() == pbmc.X.sum() > 0


def test_a_corpus_can_be_built_from_the_files(tmp_path):
    paths = scjax.datasets.pbmc_paths()
    assert sum(path.stat().st_size for path in paths.values()) < 8 * 2**20
    corpus = build_corpus(paths.values(), tmp_path / "c", validation=0.1, progress=False)
    assert len(corpus) == 6574 and len(corpus.vocabulary) == 12881
    assert corpus.datasets == ["pbmc3k", "pbmc_facs"] and "unlabelled" not in corpus.columns["cell_type"]
    assert corpus.measured_table().all()


def test_licences_and_provenance_are_beside_the_data():
    text = (ROOT / "scjax" / "datasets" / "LICENSES.md").read_text()
    for needed in (
        "CC BY 4.0",
        "Permission is hereby granted",
        "Redistribution and use",
        "ncomms14049",
        "10x Genomics",
    ):
        assert needed in text


@pytest.mark.skipif(not DATA.is_dir(), reason=f"SOURCES OF THE DATA NOT COMPARED: no folder {DATA}")
def test_the_script_makes_these_files_from_their_sources(tmp_path, pbmc):
    sources = [DATA / name for name in SOURCES.values()]
    command = [sys.executable, ROOT / "tools" / "make_pbmc.py", *sources, "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    for study, path in scjax.datasets.pbmc_paths().items():
        made, shipped, source = (
            ad.read_h5ad(p) for p in (tmp_path / f"{study}.h5ad", path, DATA / SOURCES[study])
        )
        assert made.obs.astype(str).equals(shipped.obs.astype(str)) and made.var.equals(shipped.var)
        assert (made.X != shipped.X).nnz == 0
        # no cell and no count is anything but the source's
        assert shipped.obs_names.equals(source.obs_names)
        assert (shipped.X.tocsr() != source[:, shipped.var_names].X).nnz == 0
        known = shipped.obs["cell_type"].astype(str) == source.obs["cell_type_harmonised"].astype(str)
        assert known.all()
