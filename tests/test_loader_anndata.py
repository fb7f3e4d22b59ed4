"""Batches straight from an AnnData."""

import anndata as ad
import numpy as np
import pytest
from loading import study
from scipy import sparse

from scjax.corpus import CountsError
from scjax.genes import Vocabulary
from scjax.loader import cells


@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "layer", "raw"])
def test_cells_of_an_anndata(kind):
    adata = study(150, 0)
    vocabulary = Vocabulary(["ENSG99999999999", *reversed(adata.var["ensembl_id"].tolist()[:200])])
    x, layer = adata.X.toarray(), None
    if kind in ("layer", "raw"):
        layer = kind if kind == "raw" else "counts"
        adata.layers["counts"] = adata.X.copy()
        adata.raw = adata
        adata.X = sparse.csr_matrix(np.log1p(x))
    elif kind != "csr":
        adata.X = {"csc": sparse.csc_matrix, "dense": np.asarray}[kind](x)
    batches = list(cells(adata, vocabulary, 64, layer=layer, labels=["donor"], row_offset=1000))
    assert [batch.shape[0] for batch in batches] == [64] * 3 and batches[-1].weight.sum() == 150 - 128
    joined = np.concatenate([batch.row[batch.weight > 0] for batch in batches])
    np.testing.assert_array_equal(joined, np.arange(1000, 1150))
    ids = vocabulary.match(adata.var).ids
    for batch in batches:
        assert batch.shape[1] in (64, 128, 256)
        for i in np.flatnonzero(batch.weight):
            row, n = int(batch.row[i]) - 1000, batch.n_genes[i]
            expected = {int(ids[j]): x[row, j] for j in np.flatnonzero(x[row]) if ids[j] >= 0}
            found = dict(zip(batch.gene_id[i, :n].tolist(), batch.count[i, :n].tolist(), strict=True))
            assert found == expected
            assert batch.depth[i] == x[row].sum()
            assert adata.obs["donor"].cat.categories[batch.label["donor"][i]] == adata.obs["donor"].iloc[row]
    filler = batches[-1].weight == 0
    assert not batches[-1].n_genes[filler].any() and (batches[-1].label["donor"][filler] == -1).all()


def test_cells_over_several_runs_of_rows(monkeypatch):
    monkeypatch.setattr("scjax.corpus.sources.base.CHUNK_ELEMENTS", 2000)
    adata = study(700, 0)
    vocabulary = Vocabulary.from_anndata([adata])
    batches = list(cells(adata, vocabulary, 64, bucket_lengths=[80]))
    total = np.concatenate([batch.depth[batch.weight > 0] for batch in batches])
    np.testing.assert_array_equal(total, np.asarray(adata.X.sum(1)).ravel())
    assert {batch.shape[1] for batch in batches} <= {80, 160, 320}
    assert len(batches) == -(-adata.n_obs // 64)


def test_cells_with_several_columns_per_gene():
    adata = study(20, 0)
    vocabulary = Vocabulary.from_anndata([adata])
    expected = adata.X.toarray()
    double = ad.concat([adata, adata], axis=1, index_unique="-")
    double.var["ensembl_id"] = [*adata.var["ensembl_id"]] * 2
    with pytest.raises(ValueError, match=r"300 genes have several columns, such as ENSG.*duplicates="):
        cells(double, vocabulary, 20)
    (batch,) = cells(double, vocabulary, 20, duplicates="sum")
    found = np.zeros((20, len(vocabulary)))
    for i in range(20):
        found[i, batch.gene_id[i, : batch.n_genes[i]]] = batch.count[i, : batch.n_genes[i]]
    np.testing.assert_array_equal(found[:, vocabulary.match(adata.var).ids], 2 * expected)


def test_cells_refuse_what_is_not_counts():
    adata = study(50, 0)
    vocabulary = Vocabulary.from_anndata([adata])
    adata.X.data[:] = np.log1p(adata.X.data)
    with pytest.raises(CountsError, match="not a whole number"):
        list(cells(adata, vocabulary, 32))
    for options, error, message in [
        ({"layer": "counts"}, KeyError, "counts"),
        ({"labels": ["tissue"]}, KeyError, r"no obs column 'tissue'; there are \['cell_type'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"bucket_lengths": [0]}, ValueError, "bucket_lengths are at least 1"),
        ({"duplicates": "drop"}, ValueError, "there are error and sum"),
        (
            {"vocabulary": Vocabulary(["ENSG99999999999"])},
            ValueError,
            "no gene is in the vocabulary: 0 ",
        ),
    ]:
        with pytest.raises(error, match=message):
            cells(adata, **{"vocabulary": vocabulary, "batch_size": 32} | options)
