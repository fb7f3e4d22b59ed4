"""Which cells a build keeps, the account of those it does not, and the order without a shuffle."""

import anndata as ad
import numpy as np
import pytest
from scipy import sparse
from synthetic import synthetic_adata

from scjax.corpus import Corpus, build_corpus, plan

TINY = {"part_cells": 64, "inner": 256, "shard": 1024, "progress": False}


def test_unshuffled_cells_lie_as_in_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RUN_ELEMENTS", 1500)
    files = []
    for seed, name in enumerate("abc"):
        files.append(tmp_path / f"{name}.h5ad")
        synthetic_adata(90, 40, seed=seed).write_h5ad(files[-1])
    corpus = build_corpus(files, tmp_path / "c", **TINY, shuffle=False, workers=1)
    assert corpus.manifest["shuffled"] is False and len(corpus.parts) > 3
    obs = corpus.read(slice(None)).obs
    assert obs["scjax_dataset"].astype(str).tolist() == ["a"] * 90 + ["b"] * 90 + ["c"] * 90
    assert obs["scjax_source_row"].tolist() == list(range(90)) * 3
    held = build_corpus(files, tmp_path / "d", **TINY, shuffle=False, validation=0.3)
    for split in ("train", "validation"):
        rows = [p.first_row + np.arange(p.n_cells) for p in held.split(split)]
        obs = held.read(np.concatenate(rows)).obs
        place = obs["scjax_dataset"].map({"a": 0, "b": 90, "c": 180}).astype(int) + obs["scjax_source_row"]
        assert (np.diff(place) > 0).all()
    assert build_corpus(files, tmp_path / "e", **TINY).manifest["shuffled"] is True


def with_quality() -> list[ad.AnnData]:
    """Two studies with empty, poor and repeated cells."""
    one, two = synthetic_adata(60, 30, seed=1), synthetic_adata(50, 30, seed=2)
    x, y = one.X.tolil(), two.X.tolil()
    x[5] = 0
    x[9] = 0
    x[9, 3] = 500  # one gene
    x[12] = 0
    x[12, :4] = 1  # four counts
    x[33] = x[20]
    x[44] = x[20]
    y[7] = x[20]  # of another study
    y[8] = y[30]
    one.X, two.X = x.tocsr(), y.tocsr()
    return [one, two]


def test_the_account_of_dropped_cells(tmp_path):
    studies = with_quality()
    corpus = build_corpus(
        studies,
        tmp_path / "c",
        **TINY,
        names=["one", "two"],
        min_genes=2,
        min_counts=10,
        drop_duplicates=True,
    )
    one, two = corpus.manifest["datasets"]
    assert one["dropped"] == {"empty": 1, "below_min_genes": 1, "below_min_counts": 1, "duplicates": 2}
    assert two["dropped"] == {"empty": 0, "below_min_genes": 0, "below_min_counts": 0, "duplicates": 2}
    for entry in (one, two):
        assert entry["n_cells_in"] == entry["n_cells"] + sum(entry["dropped"].values())
    obs = corpus.read(slice(None)).obs
    rows = {name: set(obs["scjax_source_row"][obs["scjax_dataset"] == name]) for name in ("one", "two")}
    assert set(range(60)) - rows["one"] == {5, 9, 12, 33, 44}  # the first of alike cells stays
    assert set(range(50)) - rows["two"] == {7, 30}
    content = np.concatenate([part.column("content") for part in corpus.parts])
    assert content.shape == (len(corpus), 2) and len(np.unique(content, axis=0)) == len(corpus)
    assert corpus.verify(progress=False) == []


def test_content_is_what_a_cell_holds_not_how(tmp_path):
    """The same counts as CSC, as integers, with genes in another order and genes the corpus does not have."""
    one = synthetic_adata(40, 30, seed=1)
    two = one[:, ::-1].copy()
    two.X = two.X.astype(np.int64).tocsc()
    three = synthetic_adata(40, 35, seed=1)
    three.X = sparse.csr_matrix(np.hstack([one.X.toarray(), np.ones((40, 5))]))
    vocabulary = Corpus.open(build_corpus(one, tmp_path / "v", **TINY).path).vocabulary
    corpus = build_corpus(
        [one, two, three], tmp_path / "c", **TINY, vocabulary=vocabulary, drop_duplicates=True
    )
    assert [entry["dropped"]["duplicates"] for entry in corpus.manifest["datasets"]] == [0, 40, 40]


def test_nothing_left(tmp_path):
    with pytest.raises(ValueError, match="none of the cells has 25 expressed genes"):
        build_corpus(synthetic_adata(40, 20), tmp_path / "c", **TINY, min_genes=25)
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="min_counts=-1 must be at least 0"):
        build_corpus(synthetic_adata(40, 20), tmp_path / "c", **TINY, min_counts=-1)
