"""Building and reading a corpus: every cell is its source's, the order is a shuffle, the bytes are a function
of the sources."""

import filecmp
import io
import pathlib
import pickle

import anndata as ad
import h5py
import hypothesis
import numpy as np
import pandas as pd
import pytest
import rich.console
import zarr
from hypothesis import strategies as st
from scipy import sparse
from synthetic import synthetic_adata

import scjax
from scjax.corpus import Corpus, build_corpus
from scjax.corpus.sources import base
from scjax.genes import Vocabulary

# Several parts, shards and chunks out of a few hundred cells.
TINY = {"part_cells": 128, "inner": 512, "shard": 2048, "progress": False}


def build(sources, out, **options) -> Corpus:
    return build_corpus(sources, out, **(TINY | options))


def same_cells(corpus: Corpus, studies: dict[str, ad.AnnData]) -> None:
    """Every cell of the corpus holds the counts, name and labels of its source, and every cell is there."""
    whole = corpus.read(slice(None))
    assert sum(len(study) for study in studies.values()) == len(corpus) == whole.n_obs
    for name, study in studies.items():
        rows = np.flatnonzero(whole.obs["scjax_dataset"] == name)
        of = whole.obs["scjax_source_row"].to_numpy()[rows]
        assert sorted(of) == list(range(study.n_obs))
        genes = corpus.vocabulary.match(study.var).ids
        expected = np.zeros((len(rows), len(corpus.vocabulary)))
        x = study.X[of]
        np.add.at(expected.T, genes, np.asarray(x.todense() if sparse.issparse(x) else x).T)
        np.testing.assert_array_equal(whole.X[rows].toarray(), expected)
        assert whole.obs["scjax_cell_id"].to_numpy()[rows].tolist() == study.obs_names[of].tolist()
        for column in study.obs:
            assert whole.obs[column].astype(str).to_numpy()[rows].tolist() == list(
                study.obs[column].astype(str).to_numpy()[of]
            )


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Corpus, dict[str, ad.AnnData]]:
    """Two studies in one corpus; the second has genes that the first did not measure."""
    studies = {"one": synthetic_adata(300, 100, seed=1), "two": synthetic_adata(200, 130, seed=2)}
    out = tmp_path_factory.mktemp("corpus") / "c"
    options = {"names": list(studies), "validation": 0.1, "seed": 3}
    return build(list(studies.values()), out, **options), studies


def test_every_cell_is_its_source_s(two):
    same_cells(*two)


def test_every_part_opens_in_plain_anndata(two):
    corpus, _ = two
    assert len(corpus.parts) > 3
    for part in corpus.parts:
        adata = ad.read_zarr(part.path)
        rows = corpus.read(slice(part.first_row, part.first_row + part.n_cells))
        assert adata.X.dtype == part.x_dtype == np.uint16 and adata.X.has_sorted_indices
        assert (adata.X != rows.X).nnz == 0
        pd.testing.assert_frame_equal(adata.obs, rows.obs)
        assert adata.var_names.tolist() == corpus.vocabulary.ids
        assert adata.uns["scjax"]["vocabulary"] == corpus.vocabulary.hash


def test_parts_are_sharded_zarr_v3_with_checksums(two):
    part = two[0].parts[0]
    array = zarr.open_array(part.path / "X" / "indices", mode="r")
    assert array.metadata.zarr_format == 3 and array.dtype == np.uint16 == part.index_dtype
    assert array.chunks == (512,) and array.shards == (2048,) and part.inner == 512
    inner = [type(codec).__name__ for codec in array.metadata.codecs[0].codecs]
    assert inner == ["BytesCodec", "BloscCodec", "Crc32cCodec"]
    assert len(list((part.path / "X" / "indices" / "c").iterdir())) == -(-part.nnz // 2048) > 1


def test_index_arrays(two):
    corpus, studies = two
    first = 0
    for part in corpus.parts:
        adata = corpus.read(slice(first, first + part.n_cells))
        assert part.first_row == first and part.n_cells <= 128
        nnz = np.diff(adata.X.indptr)
        np.testing.assert_array_equal(part.nnz_per_cell, nnz)
        assert part.nnz_per_cell.dtype == np.uint32 and part.max_nnz == nnz.max() and part.nnz == nnz.sum()
        np.testing.assert_array_equal(part.total, np.asarray(adata.X.sum(1)).ravel())
        assert part.total.dtype == np.float64
        assert part.blocks.tolist() == [0, part.nnz] and part.blocks.dtype == np.int64
        for column, categories in corpus.columns.items():
            codes = part.codes(column)
            assert codes.dtype == np.int32
            obs = adata.obs["scjax_dataset" if column == "dataset" else column].astype(str)
            assert [categories[code] for code in codes] == obs.tolist()
        first += part.n_cells
    with pytest.raises(KeyError, match="no label column 'celltype'; there are: batch, cell_type, dataset"):
        corpus.parts[0].codes("celltype")


def test_blocks_of_1024_rows(tmp_path):
    corpus = build(synthetic_adata(2500, 10), tmp_path / "c", part_cells=3000)
    (part,) = corpus.parts
    starts = np.concatenate([[0], np.cumsum(part.nnz_per_cell)])
    assert part.blocks.tolist() == [0, starts[1024], starts[2048], part.nnz]


def test_columns_and_obs(two):
    corpus, studies = two
    assert corpus.columns["dataset"] == ["one", "two"] == corpus.datasets
    assert corpus.columns["cell_type"] == ["type0", "type1", "type2", "type3"]
    obs = corpus.obs
    assert list(obs.columns) == ["dataset", "cell_type", "batch", "donor", "study"] and len(obs) == 500
    assert obs["dataset"].value_counts().to_dict() == {"one": 300, "two": 200}
    for column in ("cell_type", "donor"):
        expected = pd.concat([study.obs[column].astype(str) for study in studies.values()]).value_counts()
        assert obs[column].astype(str).value_counts().to_dict() == expected.to_dict()


def test_measured_genes(two):
    corpus, studies = two
    table = corpus.measured_table()
    assert table.shape == (2, 130) and table.dtype == bool
    for i, (name, study) in enumerate(studies.items()):
        measured = {corpus.vocabulary.ids[g] for g in np.flatnonzero(corpus.measured(name))}
        assert measured == set(study.var["ensembl_id"])
        np.testing.assert_array_equal(table[i], corpus.measured(i))
    with pytest.raises(KeyError, match="no data set 'three'; there are: one, two"):
        corpus.measured("three")


def test_read_any_rows_in_any_order(two):
    corpus, _ = two
    whole = corpus.read(slice(None))
    rows = np.random.default_rng(0).integers(0, len(corpus), 700)
    for asked in (rows, rows[:1], [], [5, 5, 2], np.arange(0, 500, 60), 7):
        got = corpus.read(asked)
        at = np.atleast_1d(np.asarray(asked, int))
        assert got.shape == (len(at), 130) and got.obs_names.is_unique
        assert (got.X != whole.X[at]).nnz == 0
        assert got.obs["scjax_cell_id"].tolist() == whole.obs["scjax_cell_id"].iloc[at].tolist()
    mask = whole.obs["cell_type"] == "type1"
    assert (corpus.read(mask).X != whole.X[mask.to_numpy()]).nnz == 0
    for bad in ([500], [-1]):
        with pytest.raises(IndexError, match=rf"row {bad[0]}: the corpus has rows 0 to 499"):
            corpus.read(bad)
    with pytest.raises(IndexError, match="rows of a corpus are whole numbers, not float64"):
        corpus.read([1.5])


def test_splits(two):
    corpus, _ = two
    assert [part.split for part in corpus.parts] == ["train"] * 4 + ["validation"]
    assert sum(part.n_cells for part in corpus.split("validation")) == 50
    assert corpus.split("train") == corpus.parts[:4]
    with pytest.raises(ValueError, match="split 'test': there are train and validation"):
        corpus.split("test")


def test_split_by_group_keeps_groups_whole(tmp_path):
    studies = [synthetic_adata(200, 50, n_batches=3, seed=seed) for seed in (1, 2)]
    corpus = build(studies, tmp_path / "c", validation=0.2, split_by="donor")
    sides = {
        name: {
            corpus.columns["donor"][code]
            for part in corpus.split(name)
            for code in np.unique(part.codes("donor"))
        }
        for name in ("train", "validation")
    }
    assert sides["validation"] and sides["train"] and not sides["validation"] & sides["train"]
    held = sum(part.n_cells for part in corpus.split("validation")) / len(corpus)
    assert 0.2 <= held < 0.55
    by_study = build(studies, tmp_path / "d", validation=0.2, split_by="dataset")
    assert {len(set(part.codes("dataset"))) for part in by_study.parts} == {1}


def test_cells_are_shuffled_globally(two):
    corpus, _ = two
    for part in corpus.split("train"):
        share = float((part.codes("dataset") == 0).mean())
        assert 0.45 < share < 0.75  # 300 of 500 cells are of the first data set
    rows = corpus.read(slice(0, 128)).obs["scjax_source_row"].to_numpy()
    assert abs(np.corrcoef(rows, np.arange(128))[0, 1]) < 0.35
    runs = np.diff(corpus.parts[0].codes("dataset")) != 0
    assert runs.mean() > 0.3


def test_seed_and_names_decide_the_order(tmp_path):
    adata = synthetic_adata(150, 40)
    order = {
        tag: build(adata, tmp_path / tag, **options).read(slice(None)).obs["scjax_source_row"].tolist()
        for tag, options in {"a": {}, "b": {"seed": 1}, "c": {"names": ["other"]}}.items()
    }
    assert order["a"] != order["b"] and order["a"] != order["c"]
    assert sorted(order["a"]) == sorted(order["b"]) == list(range(150))


def same_bytes(a: pathlib.Path, b: pathlib.Path) -> None:
    """All files alike, but for the note on where the sources were."""
    files = [
        sorted(
            name
            for p in root.rglob("*")
            if p.is_file() and not (name := p.relative_to(root).as_posix()).startswith("sources/")
        )
        for root in (a, b)
    ]
    assert set(files[0]) ^ set(files[1]) == set() and len(files[0]) > 30
    match, mismatch, errors = filecmp.cmpfiles(a, b, files[0], shallow=False)
    assert not mismatch and not errors


@pytest.mark.parametrize("codec", ["fast", "balanced", "small", "local"])
def test_rebuilds_are_byte_identical(tmp_path, codec):
    for where in ("x", "y"):
        (tmp_path / where).mkdir()
        path = tmp_path / where / "study.h5ad"
        synthetic_adata(200, 60).write_h5ad(path)
        build([path], tmp_path / where / "c", codec=codec, validation=0.1)
    same_bytes(tmp_path / "x" / "c", tmp_path / "y" / "c")
    assert Corpus.open(tmp_path / "x" / "c").verify(progress=False) == []
    same_cells(Corpus.open(tmp_path / "x" / "c"), {"study": synthetic_adata(200, 60)})


def test_build_does_not_depend_on_how_the_source_is_read(tmp_path, monkeypatch):
    path = tmp_path / "study.h5ad"
    synthetic_adata(200, 60).write_h5ad(path)
    build(path, tmp_path / "whole")
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 300)
    build(path, tmp_path / "pieces")
    same_bytes(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize("pieces", [False, True], ids=["in one go", "in pieces"])
@pytest.mark.parametrize("form", ["csr", "csc", "dense", "float64", "int32", "raw", "layer", "legacy csr"])
def test_every_form_of_h5ad_gives_the_same_counts(tmp_path, monkeypatch, form, pieces):
    if pieces:
        monkeypatch.setattr(base, "CHUNK_ELEMENTS", 500)
    adata = synthetic_adata(120, 40)
    stored, layer = adata.copy(), None
    if form in ("csc", "dense"):
        stored.X = stored.X.tocsc() if form == "csc" else stored.X.toarray()
    elif form in ("float64", "int32"):
        stored.X = stored.X.astype(form)
    elif form in ("raw", "layer"):
        layer = "raw" if form == "raw" else "counts"
        if form == "raw":
            stored.raw = stored
        else:
            stored.layers["counts"] = stored.X.copy()
        stored.X = stored.X.log1p()
    stored.write_h5ad(tmp_path / "s.h5ad")
    if form == "legacy csr":
        with h5py.File(tmp_path / "s.h5ad", "a") as file:
            shape = file["X"].attrs["shape"]
            for name in list(file["X"].attrs):
                del file["X"].attrs[name]
            file["X"].attrs.update({"h5sparse_format": "csr", "h5sparse_shape": shape})
    for sources, name in ((tmp_path / "s.h5ad", "s"), (stored, "adata")):
        corpus = build(sources, tmp_path / name, layer=layer)
        same_cells(corpus, {name: adata})
        assert corpus.manifest["datasets"][0]["layer"] == (layer or "X")
        assert corpus.manifest["datasets"][0]["file"] == ("s.h5ad" if name == "s" else None)


def test_layers_by_data_set(tmp_path):
    plain, logged = synthetic_adata(60, 30, seed=1), synthetic_adata(50, 30, seed=2)
    truth = logged.copy()
    logged.layers["counts"] = logged.X.copy()
    logged.X = logged.X.log1p()
    corpus = build([plain, logged], tmp_path / "c", names=["a", "b"], layer={"b": "counts"})
    same_cells(corpus, {"a": plain, "b": truth})


def test_backed_anndata_and_view(tmp_path):
    adata = synthetic_adata(80, 30)
    adata.write_h5ad(tmp_path / "s.h5ad")
    backed = ad.read_h5ad(tmp_path / "s.h5ad", backed="r")
    same_cells(build(backed, tmp_path / "backed"), {"adata": adata})
    backed.file.close()
    same_cells(build(adata[::2], tmp_path / "view"), {"adata": adata[::2].copy()})


def test_explicit_zeros_unsorted_and_repeated_entries(tmp_path):
    data = np.array([1, 0, 2, 3, 4, 5], np.float32)
    x = sparse.csr_matrix((data, np.array([3, 1, 0, 2, 2, 1]), np.array([0, 3, 6])), shape=(2, 4))
    corpus = build(ad.AnnData(x), tmp_path / "c", min_match=0)
    (row,) = np.flatnonzero(corpus.read(slice(None)).obs["scjax_source_row"] == 1)
    assert corpus.read([row, 1 - row]).X.toarray().tolist() == [[0, 5, 7, 0], [2, 0, 0, 1]]
    assert corpus.verify(progress=False) == []


def test_large_counts_promote_a_part_to_uint32(tmp_path):
    x = sparse.csr_matrix(np.array([[1, 65535], [2, 3]], np.int64))
    assert build(ad.AnnData(x), tmp_path / "small").parts[0].x_dtype == np.uint16
    x[0, 1] = 2**32 - 1
    corpus = build(ad.AnnData(x), tmp_path / "large")
    assert corpus.parts[0].x_dtype == np.uint32
    assert sorted(corpus.read([0, 1]).X.data.tolist()) == [1, 2, 3, 2**32 - 1]


def test_large_vocabularies_promote_indices_to_uint32(tmp_path):
    names = [f"g{i:06d}" for i in range(65536)]
    adata = ad.AnnData(
        sparse.csr_matrix(([7.0], ([0], [65535])), shape=(1, 65536)), var=pd.DataFrame(index=names)
    )
    corpus = build(adata, tmp_path / "c")
    assert corpus.parts[0].index_dtype == np.uint32 and corpus.read([0]).X[0, 65535] == 7
    smaller = build(adata[:, 1:].copy(), tmp_path / "d")
    assert smaller.parts[0].index_dtype == np.uint16 and smaller.read([0]).X[0, 65534] == 7


def test_fractions_on_request(tmp_path):
    adata = synthetic_adata(100, 30)
    adata.X = adata.X * np.float32(0.5)
    corpus = build(adata, tmp_path / "c", allow_non_integer=True)
    assert corpus.parts[0].x_dtype == np.float32
    same_cells(corpus, {"adata": adata})
    whole = build(synthetic_adata(100, 30), tmp_path / "d", allow_non_integer=True)
    assert whole.parts[0].x_dtype == np.uint16 and whole.verify(progress=False) == []


def test_a_given_vocabulary_selects_genes_but_total_counts_all(tmp_path):
    adata = synthetic_adata(100, 50)
    vocabulary = Vocabulary([f"ENSG{i:011d}" for i in range(0, 20)])
    corpus = build(adata, tmp_path / "c", vocabulary=vocabulary)
    assert corpus.vocabulary == vocabulary
    read = corpus.read(slice(None))
    of = read.obs["scjax_source_row"].to_numpy()
    np.testing.assert_array_equal(read.X.toarray(), adata.X[of, :20].toarray())
    np.testing.assert_array_equal(corpus.parts[0].total, np.asarray(adata.X[of].sum(1)).ravel())
    entry = corpus.manifest["datasets"][0]
    assert (entry["genes_matched"], entry["genes_total"]) == (20, 50)
    assert entry["genes_unmatched"] == [f"GENE{i}" for i in range(20, 40)]


def test_columns_of_one_gene_are_summed_on_request(tmp_path):
    adata = synthetic_adata(60, 20)
    adata.var["ensembl_id"] = [f"ENSG{g // 2:011d}" for g in range(20)]
    corpus = build(adata, tmp_path / "c", duplicates="sum")
    assert len(corpus.vocabulary) == 10
    same_cells(corpus, {"adata": adata})


def test_empty_and_poor_cells_are_dropped_and_counted(tmp_path):
    adata = synthetic_adata(60, 20)
    x = adata.X.tolil()
    x[3], x[10] = 0, 0
    x[20] = 0
    x[20, 5] = 9
    adata.X = x.tocsr()
    corpus = build(adata, tmp_path / "c", min_genes=2)
    entry = corpus.manifest["datasets"][0]
    assert entry["dropped"] == {"empty": 2, "below_min_genes": 1}
    assert (entry["n_cells_in"], entry["n_cells"], len(corpus)) == (60, 57, 57)
    kept = corpus.read(slice(None)).obs["scjax_source_row"]
    assert set(range(60)) - set(kept) == {3, 10, 20}


def test_labels_and_obs_of_unlike_studies(tmp_path):
    a, b = synthetic_adata(40, 20, seed=1), synthetic_adata(30, 20, seed=2)
    a.obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(["B"] * 20 + ["unlabelled"] * 20),
            "cluster": np.arange(40) % 3,
            "depth": np.arange(40) / 2,
            "note": [f"text {i}" for i in range(40)],
            "doublet": np.arange(40) % 2 == 0,
            "dataset": "another name",
        },
        index=a.obs_names,
    )
    b.obs = pd.DataFrame(
        {
            "cell_type": ["T", None] * 15,
            "cluster": pd.array([1, None] * 15, dtype="Int64"),
            "age": np.arange(30),
        },
        index=b.obs_names,
    )
    corpus = build([a, b], tmp_path / "c", names=["a", "b"], labels=["cell_type", "cluster", "doublet"])
    assert corpus.columns == {
        "dataset": ["a", "b"],
        "cell_type": ["B", "T"],
        "cluster": ["0", "1", "2"],
        "doublet": ["False", "True"],
    }
    obs = corpus.obs
    assert obs["cell_type"].isna().sum() == 20 + 15 and obs["doublet"].isna().sum() == 30
    assert obs.loc[obs["dataset"] == "b", "cluster"].dropna().tolist() == ["1"] * 15
    read = corpus.read(slice(None)).obs.set_index("scjax_cell_id", append=True)
    from_a = read[read["scjax_dataset"] == "a"].sort_values("scjax_source_row")
    assert from_a["depth"].tolist() == a.obs["depth"].tolist()
    assert from_a["note"].tolist() == a.obs["note"].tolist()
    assert from_a["dataset"].tolist() == ["another name"] * 40 and from_a["age"].isna().all()
    assert from_a["cell_type"].tolist() == a.obs["cell_type"].tolist()  # the text stays, only the code is -1
    from_b = read[read["scjax_dataset"] == "b"].sort_values("scjax_source_row")
    assert from_b["age"].tolist() == list(range(30)) and from_b["depth"].isna().all()
    assert from_b["cell_type"].isna().tolist() == [False, True] * 15
    auto = build([a, b], tmp_path / "d", names=["a", "b"])
    assert list(auto.columns) == ["dataset", "cell_type", "note", "doublet"]


def test_a_text_column_with_many_values_stays_text(tmp_path, monkeypatch):
    adata = synthetic_adata(50, 20)
    adata.obs["barcode"] = [f"ACGT{i}" for i in range(50)]
    monkeypatch.setattr(scjax.corpus.obs, "MAX_CATEGORIES", 20)
    corpus = build(adata, tmp_path / "c")
    assert "barcode" not in corpus.columns and "cell_type" in corpus.columns
    same_cells(corpus, {"adata": adata})
    assert len(build(adata, tmp_path / "d", labels=["barcode"]).columns["barcode"]) == 50


def test_cells_of_one_name_stay_apart(tmp_path):
    adata = synthetic_adata(40, 20)
    adata.obs_names = ["cell"] * 40
    adata.write_h5ad(tmp_path / "s.h5ad")
    corpus = build([tmp_path / "s.h5ad"], tmp_path / "c")
    same_cells(corpus, {"s": adata})
    assert corpus.read(slice(None)).obs_names.is_unique


def test_open_earlier_manifest_and_pickle(two, tmp_path):
    corpus, _ = two
    again = Corpus.open(corpus.path, manifest=corpus.manifest_id)
    assert again.manifest == corpus.manifest and len(again) == 500
    corpus.parts[0].codes("donor")  # reads the index
    assert pickle.loads(pickle.dumps(corpus.parts[0])).n_cells == corpus.parts[0].n_cells
    assert repr(corpus).endswith(f"500 cells, 130 genes, 5 parts, manifest {corpus.manifest_id})")


def test_manifest_says_what_there_is(two):
    corpus, studies = two
    manifest = corpus.manifest
    assert manifest["format"] == "scjax-corpus" and manifest["version"] == "2.0" and manifest["seed"] == 3
    assert manifest["totals"]["n_cells"] == 500 and manifest["totals"]["validation"] == 50
    nnz = np.concatenate([part.nnz_per_cell for part in corpus.parts])
    assert manifest["nnz_quantiles"]["1.0"] == nnz.max() and manifest["totals"]["nnz"] == nnz.sum()
    assert manifest["nnz_quantiles"]["0.5"] == np.sort(nnz)[249]
    listed = {name for part in manifest["parts"] for name in part["objects"]} | set(manifest["objects"])
    there = {p.relative_to(corpus.path).as_posix() for p in corpus.path.rglob("*") if p.is_file()}
    own = {"HEAD", f"manifests/{corpus.manifest_id}.json", f"sources/{corpus.manifest_id}.json"}
    assert there - listed == own and not listed - there


def test_info_prints(two):
    console = rich.console.Console(width=100, file=io.StringIO())
    console.print(two[0].info())
    text = console.file.getvalue()
    for expected in (
        "500 cells (450 train, 50 validation)",
        "130 genes",
        "100 of 100",
        "type0, type1",
        "bytes per",
    ):
        assert expected in text


counts = st.lists(
    st.lists(st.sampled_from([0, 0, 1, 2, 300, 70000]), min_size=5, max_size=5), min_size=1, max_size=12
)


@hypothesis.given(st.lists(counts, min_size=1, max_size=3), st.integers(0, 5), st.sampled_from([1, 4, 100]))
@hypothesis.settings(deadline=None, max_examples=8)
def test_any_counts_come_back(tmp_path_factory, tables, seed, part_cells):
    studies = [
        ad.AnnData(
            sparse.csr_matrix(np.array(table, np.float32)),
            var=pd.DataFrame(index=[f"g{(i + k) % 7}" for i in range(5)]),
        )
        for k, table in enumerate(tables)
    ]
    kept = [study[np.asarray(study.X.sum(1)).ravel() > 0] for study in studies]
    out = tmp_path_factory.mktemp("corpus") / "c"
    options = TINY | {"part_cells": part_cells, "inner": 3, "shard": 6, "seed": seed}
    if not sum(len(study) for study in kept):
        with pytest.raises(ValueError, match="none of the cells has 1 expressed genes"):
            build_corpus(studies, out, **options)
        return
    corpus = build_corpus(studies, out, **options)
    assert corpus.verify(progress=False) == []
    assert max(part.n_cells for part in corpus.parts) <= part_cells
    whole = corpus.read(slice(None))
    seen = {
        (dataset, row): x
        for dataset, row, x in zip(
            whole.obs["scjax_dataset"], whole.obs["scjax_source_row"], whole.X.toarray(), strict=True
        )
    }
    expected = {}
    for name, study in zip(corpus.datasets, studies, strict=True):
        ids = corpus.vocabulary.match(study.var).ids
        for row, x in enumerate(study.X.toarray()):
            if x.sum():
                expected[name, row] = np.zeros(len(corpus.vocabulary))
                expected[name, row][ids] = x
    assert seen.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_array_equal(seen[key], x)
