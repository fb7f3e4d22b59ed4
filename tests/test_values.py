"""Numbers beside the counts: what sources hold of them, and batches straight from an AnnData."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from layouts import write_zarr
from loading import study
from scipy import sparse

from scjax.corpus import open_source
from scjax.corpus.sources.values import find_value, list_values, read_value
from scjax.genes import Vocabulary
from scjax.loader import cells


def valued(n_cells: int, seed: int, panel: tuple[str, ...] = ("CD3", "CD4", "CD8")) -> ad.AnnData:
    """Synthetic cells with a dose, coordinates, a table of proteins and a sparse panel of peaks."""
    adata = study(n_cells, seed)
    rng = np.random.default_rng([seed, 7])
    dose = rng.lognormal(size=n_cells)
    dose[rng.random(n_cells) < 0.2] = np.nan
    adata.obs["dose"], adata.obs["age"] = dose, rng.integers(20, 90, n_cells)
    adata.obsm["spatial"] = rng.normal(size=(n_cells, 2))
    counts = rng.poisson(5.0, (n_cells, len(panel)))
    adata.obsm["protein"] = pd.DataFrame(counts, index=adata.obs_names, columns=list(panel))
    adata.obsm["peaks"] = sparse.random(n_cells, 40, 0.1, "csr", np.float32, rng)
    return adata


KINDS = ["memory", "backed", "h5ad", "zarr", "csc"]


@pytest.fixture(params=KINDS)
def source(request, tmp_path):
    adata = valued(150, 0)
    adata.obsm["protein"]["CD4"] = adata.obsm["protein"]["CD4"].astype("Int32").mask(lambda v: v > 6)
    if request.param == "csc":
        adata.obsm["peaks"] = sparse.csc_matrix(adata.obsm["peaks"])
    path = tmp_path / f"study.{'zarr' if request.param == 'zarr' else 'h5ad'}"
    if request.param == "zarr":
        write_zarr(adata, path, 3)
    elif request.param in ("h5ad", "backed"):
        adata.write_h5ad(path)
    data = {"memory": adata, "csc": adata}.get(request.param, path)
    return adata, open_source(ad.read_h5ad(path, backed="r") if request.param == "backed" else data)


def test_every_source_gives_the_same_numbers(source):
    adata, source = source
    assert {"dose", "age", "spatial", "protein", "peaks"} <= set(list_values(source))
    assert "cell_type" not in list_values(source) and find_value(source, "none") is None
    expected = {
        "dose": adata.obs["dose"].to_numpy(),
        "age": adata.obs["age"].to_numpy(),
        "spatial": adata.obsm["spatial"],
        "protein": adata.obsm["protein"].to_numpy(np.float64, na_value=np.nan),
        "peaks": adata.obsm["peaks"].toarray(),
    }
    for name, table in expected.items():
        value = find_value(source, name)
        found = np.concatenate([read_value(source, value, *span) for span in ((0, 64), (64, 65), (65, 150))])
        np.testing.assert_array_equal(found, table.astype(np.float32))
        assert found.dtype == np.float32
    assert find_value(source, "protein").features == ("CD3", "CD4", "CD8")
    assert find_value(source, "protein").named and not find_value(source, "spatial").named


def test_cells_carry_values_and_codes_of_known_categories():
    adata = valued(150, 0)
    vocabulary = Vocabulary.from_anndata([adata])
    adata.obs["state"] = pd.Categorical(["A", None, "unknown"] * 50)
    names = ["Z", "A", *adata.obs["cell_type"].cat.categories]
    batches = list(
        cells(
            adata,
            vocabulary,
            64,
            labels=["state", "donor"],
            categories={"state": names},
            values={"dose": None, "spatial": None, "protein": ["CD8", "CD19", "CD3"]},
        )
    )
    whole = {
        name: np.concatenate([b.value[name][b.weight > 0] for b in batches]) for name in batches[0].value
    }
    np.testing.assert_array_equal(whole["dose"], adata.obs["dose"].to_numpy(np.float32))
    np.testing.assert_array_equal(whole["spatial"], adata.obsm["spatial"].astype(np.float32))
    protein = adata.obsm["protein"]
    np.testing.assert_array_equal(whole["protein"][:, [0, 2]], protein[["CD8", "CD3"]].to_numpy(np.float32))
    assert np.isnan(whole["protein"][:, 1]).all()
    for batch in batches:
        filler = batch.weight == 0
        assert all(np.isnan(table[filler]).all() for table in batch.value.values())
        expected = [1 if text == "A" else -1 for text in adata.obs["state"].iloc[batch.row[~filler]]]
        assert (
            batch.label["state"][~filler].tolist() == expected and (batch.label["state"][filler] == -1).all()
        )
    plain = next(iter(cells(adata, vocabulary, 64)))
    assert plain.value == {}


def test_errors_say_what_and_where():
    adata = valued(50, 0)
    vocabulary = Vocabulary.from_anndata([adata])
    adata.obs["level"] = pd.Categorical(["high", "low"] * 25)
    adata.obsm["infinite"] = np.where(np.arange(100).reshape(50, 2) == 33, np.inf, 0.0)
    adata.obsm["cube"] = np.zeros((50, 2, 2))
    adata.obsm["words"] = pd.DataFrame({"a": ["x"] * 50}, index=adata.obs_names)
    adata.obs["spatial_"], adata.obs["age"] = 1.0, adata.obs["age"]
    adata.obs["spatial"] = 1.0
    for options, error, message in [
        (
            {"values": ["doze"]},
            KeyError,
            r"no obs column or obsm 'doze'; with numbers there are \['dose', 'age'",
        ),
        ({"values": ["level"]}, ValueError, "'level' holds no numbers but category: 'high', 'low'"),
        ({"values": ["infinite"]}, ValueError, r"infinite: cell cell16 \(row 16\) has inf for 1, and 0 more"),
        (
            {"values": ["cube"]},
            ValueError,
            r"ndarray of shape \(50, 2, 2\), not a matrix of cells x features",
        ),
        ({"values": ["words"]}, ValueError, "words: not a table of numbers"),
        ({"values": ["spatial"]}, ValueError, "is a column of obs and a matrix of obsm as well"),
        ({"values": {"peaks": ["a", "b"]}}, ValueError, "has 40 features without names, not the 2"),
        (
            {"values": {"protein": ["CD3_", "P2"]}},
            ValueError,
            "none of the 3 .* mean 'CD3_'",
        ),
        ({"values": {"dose": ["a", "b"]}}, ValueError, "'dose' is an obs column, not the 2 features"),
        (
            {"labels": ["level"], "categories": {"level": ["High", "lower"]}},
            ValueError,
            r"obs column 'level' has 'high' and 1 more, not among its 2 categories \(High, lower\); did you",
        ),
    ]:
        with pytest.raises(error, match=message):
            list(cells(adata, vocabulary, 32, **options))
