"""Every layout that counts come in gives the same counts."""

import contextlib
import sys

import anndata as ad
import h5py
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from layouts import (
    CELLS,
    FORMS,
    same,
    write_mtx,
    write_v2,
    write_v3,
    write_zarr,
)
from scipy import sparse
from synthetic import synthetic_adata

from scjax.corpus import list_sources, open_source
from scjax.corpus.sources import base


# ------------------------------------------------------------------ every layout
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("store", ["memory", "h5ad", "h5ad gzip", "h5ad lzf", "zarr 2", "zarr 3"])
def test_every_layout_of_an_anndata(tmp_path, form, store):
    adata, layer = FORMS[form]
    if store == "memory":
        source = open_source(adata, layer=layer)
    elif store.startswith("h5ad"):
        adata.write_h5ad(tmp_path / "cells.h5ad", compression=store[5:] or None)
        source = open_source(tmp_path / "cells.h5ad", layer=layer)
    else:
        write_zarr(adata, tmp_path / "cells.zarr", int(store[-1]))
        source = open_source(tmp_path / "cells.zarr", layer=layer)
    runs = same(source)
    by_column = "csc" in form
    assert by_column or len(runs) > 1
    assert list(source.var["ensembl_id"]) == list(CELLS.var["ensembl_id"]) and source.account == {}
    assert list(source.obs["donor"]) == list(CELLS.obs["donor"])
    assert source.name == ("adata" if store == "memory" else "cells")
    assert [n for first, last in runs for n in range(first, last)] == list(range(90))


def test_a_zarr_store_of_small_sharded_chunks(tmp_path):
    write_zarr(CELLS, tmp_path / "cells.zarr", 3)
    import zarr

    group = zarr.open_group(tmp_path / "cells.zarr", mode="a", use_consolidated=False)
    for name in ("data", "indices"):
        values = group[f"X/{name}"][:]
        del group[f"X/{name}"]
        group["X"].create_array(name, shape=values.shape, dtype=values.dtype, chunks=(64,), shards=(256,))
        group[f"X/{name}"][:] = values
    same(open_source(tmp_path / "cells.zarr"))
    (tmp_path / "cells.zarr" / "X" / "data" / "c" / "1").unlink()
    with pytest.raises(ValueError, match=r"cells.zarr: damaged: elements 256 to 512 of X/data are missing"):
        list(open_source(tmp_path / "cells.zarr").counts())


@pytest.mark.parametrize(
    "types", [None, ["Gene Expression"] * 30 + ["Antibody Capture"] * 7 + ["Custom"] * 3]
)
@pytest.mark.parametrize("layout", ["v3 h5", "mtx.gz", "mtx", "mtx by gene"])
def test_10x_layouts(tmp_path, layout, types):
    path = tmp_path / "sample"
    if layout == "v3 h5":
        path = tmp_path / "sample.h5"
        write_v3(path, CELLS, types)
    else:
        order = "csr" if layout == "mtx by gene" else "csc"
        write_mtx(path, CELLS, zipped=layout == "mtx.gz", types=types, order=order)
    source = open_source(path)
    genes = 40 if types is None else 30
    runs = same(source, CELLS.X[:, :genes], least=1000 if layout == "mtx by gene" else 1)
    assert len(runs) > 1 or layout != "v3 h5"
    assert list(source.var.index) == list(CELLS.var_names[:genes])
    assert list(source.var["gene_ids"]) == list(CELLS.var["ensembl_id"][:genes])
    left = {"features of type 'Antibody Capture'": 7, "features of type 'Custom'": 3}
    assert source.account == ({} if types is None else left)
    assert source.name == "sample" and source.shape == (90, genes)


@pytest.mark.parametrize("old", [False, True])
def test_prefixed_10x_files_beside_each_other(tmp_path, old):
    write_mtx(tmp_path, CELLS[:50], prefix="GSM1_", zipped=not old, old=old)
    write_mtx(tmp_path, CELLS[50:], prefix="GSM2_rep1.", old=old)
    found = list_sources(tmp_path)
    assert list(found) == ["GSM1", "GSM2_rep1"]
    same(open_source(found["GSM1"]), CELLS.X[:50], CELLS.obs_names[:50])
    same(open_source(found["GSM2_rep1"]), CELLS.X[50:], CELLS.obs_names[50:])


def test_cell_ranger_2_with_one_genome(tmp_path):
    write_v2(tmp_path / "old.h5", {"hg19": CELLS})
    source = open_source(tmp_path / "old.h5")
    assert len(same(source)) > 1
    assert list(source.var.columns) == ["gene_ids"]


def mixed_species():
    """40 human genes and as many of mouse, as Cell Ranger names them."""
    man, mouse = CELLS.copy(), synthetic_adata(90, 40, seed=5)
    mouse.var["ensembl_id"] = [f"ENSMUSG{i:011d}" for i in range(40)]
    mouse.var_names = [f"Gene{i}" for i in range(40)]
    mouse.X = sparse.csr_matrix(mouse.X.toarray() * (np.arange(90) % 4 > 0)[:, None])  # some without any
    marked = [man.copy(), mouse.copy()]
    for adata, mark in zip(marked, ("GRCh38_", "mm10___"), strict=True):
        adata.var_names = mark + adata.var_names
        adata.var["ensembl_id"] = mark + adata.var["ensembl_id"].astype(object)
    return man, mouse, *marked


def test_several_genomes(tmp_path):
    man, mouse, marked_man, marked_mouse = mixed_species()
    both = ad.concat([marked_man, marked_mouse], axis=1, merge="first")
    write_v3(tmp_path / "v3.h5", both, genome=["GRCh38"] * 40 + ["mm10"] * 40)
    write_v2(tmp_path / "v2.h5", {"GRCh38": marked_man, "mm10": marked_mouse})
    for name in ("v3", "v2"):
        source = open_source(tmp_path / f"{name}.h5")
        assert len(same(source, sparse.hstack([man.X, mouse.X], format="csr"))) > 1
        assert list(source.var.index) == [*man.var_names, *mouse.var_names]
        assert list(source.var["gene_ids"]) == [*man.var["ensembl_id"], *mouse.var["ensembl_id"]]
        assert list(source.var["genome"]) == ["GRCh38"] * 40 + ["mm10"] * 40


def test_genomes_that_called_other_cells(tmp_path):
    """The filtered matrix of Cell Ranger 2 has other barcodes for every genome."""
    man, mouse, *marked = mixed_species()
    write_v2(tmp_path / "v2.h5", {"GRCh38": marked[0][:60], "mm10": marked[1][40:]})
    source = open_source(tmp_path / "v2.h5")
    cells = sorted(man.obs_names)
    expected = sparse.hstack([man.X, mouse.X], format="lil")
    expected[60:, :40], expected[:40, 40:] = 0, 0
    order = [man.obs_names.get_loc(cell) for cell in cells]
    same(source, expected.tocsr()[order], cells)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.data())
def test_any_matrix_in_any_layout_by_any_runs(tmp_path_factory, data):
    """Random counts, read run by run as the workers of a build do it, are the counts that were written."""
    draw = data.draw
    n, genes = draw(st.integers(1, 30), "cells"), draw(st.integers(1, 12), "genes")
    rng = np.random.default_rng(draw(st.integers(0, 99), "seed"))
    counts = rng.poisson(draw(st.sampled_from([0.05, 0.5, 3.0]), "mean"), (n, genes)).astype("f4")
    counts[0, 0] = 300
    folder = tmp_path_factory.mktemp("any")
    layout = draw(st.sampled_from(["csr", "csc", "dense", "zarr", "10x", "mtx", "mtx by gene"]), "layout")
    x = (
        counts
        if layout == "dense"
        else sparse.csr_matrix(counts).asformat("csc" if layout == "csc" else "csr")
    )
    adata = ad.AnnData(x)
    adata.var["ensembl_id"] = [f"ENSG{i:011d}" for i in range(genes)]
    if layout == "zarr":
        write_zarr(adata, path := folder / "s.zarr", draw(st.sampled_from([2, 3]), "version"))
    elif layout == "10x":
        write_v3(path := folder / "s.h5", adata)
    elif layout.startswith("mtx"):
        write_mtx(path := folder / "s", adata, zipped=False, order="csr" if "gene" in layout else "csc")
    else:
        adata.write_h5ad(path := folder / "s.h5ad", compression=draw(st.sampled_from([None, "gzip"]), "zip"))
    with pytest.MonkeyPatch.context() as patch:
        most = draw(st.sampled_from([8000, 40, 3]), "elements") if "gene" not in layout else 8000
        patch.setattr(base, "CHUNK_ELEMENTS", most)
        source = open_source(path)
        got = np.full((n, genes), -1.0)
        for first, last in source.runs(draw(st.integers(1, 60), "run")):
            for start, rows in source.counts(first, last):
                assert first <= start and start + rows.shape[0] <= last
                assert (got[start : start + rows.shape[0]] == -1).all()  # no row twice
                got[start : start + rows.shape[0]] = rows.toarray()
        np.testing.assert_array_equal(got, counts)  # and none missing


def test_sources_that_read_as_a_whole_come_in_runs_that_memory_holds(tmp_path):
    x = sparse.csc_matrix(np.random.default_rng(0).poisson(1.0, (50, 20)).astype("f4"))
    ad.AnnData(x).write_h5ad(tmp_path / "s.h5ad")
    source = open_source(tmp_path / "s.h5ad")
    assert source.runs(x.nnz) == [(0, 50)]
    runs = source.runs(x.nnz // 40)
    assert len(runs) > 8 and [first for first, _ in runs[1:]] == [last for _, last in runs[:-1]]
    rows = [rows for first, last in runs for _, rows in source.counts(first, last)]
    assert (sparse.vstack(rows) != x).nnz == 0


# ------------------------------------------------------------------ reading gzip is reading by h5py
@pytest.mark.parametrize("isal", [True, False])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<i2", "<u1", "<i8", "<f8", "<f2"])
@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (100,)},
        {"chunks": (100,), "compression": "gzip"},
        {"chunks": (100,), "compression": "gzip", "shuffle": True},
        {"chunks": (100,), "compression": "gzip", "shuffle": True, "fletcher32": True},
        {"chunks": (100,), "compression": "lzf", "shuffle": True},
        {"chunks": (2000,), "maxshape": (None,), "compression": "gzip", "compression_opts": 9},
        {},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "contiguous",
)
def test_vectors_read_as_h5py_reads_them(tmp_path, monkeypatch, options, dtype, isal):
    from scjax.corpus.sources.hdf5 import vector

    if not isal:
        monkeypatch.setitem(sys.modules, "isal", None)
    values = np.random.default_rng(0).integers(0, 200, 1234).astype(dtype)
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.create_dataset("v", data=values, **options)
        file.create_dataset("unwritten", (1234,), dtype, fillvalue=3, **options)
        if "chunks" in options:
            file["unwritten"][:150] = values[:150]
    with h5py.File(tmp_path / "v.h5") as file:
        for name in ("v", "unwritten"):
            read = vector(file[name])
            for low, high in (
                (0, 1234),
                (0, 0),
                (99, 101),
                (100, 200),
                (1233, 1234),
                (250, 777),
                (1200, 2000),
            ):
                got = read(low, high)
                np.testing.assert_array_equal(got, file[name][low:high])
                assert got.dtype == file[name].dtype


@pytest.mark.parametrize("isal", [True, False])
def test_a_chunk_whose_filter_was_skipped(tmp_path, monkeypatch, isal):
    from scjax.corpus.sources.hdf5 import vector

    if not isal:
        monkeypatch.setitem(sys.modules, "isal", None)
    with h5py.File(tmp_path / "v.h5", "w") as file:
        data = file.create_dataset("v", (300,), "<i4", chunks=(100,), compression="gzip")
        data[:] = np.arange(300)
        data.id.write_direct_chunk((100,), np.arange(100, 200, dtype="<i4").tobytes(), filter_mask=1)
        np.testing.assert_array_equal(vector(data)(0, 300), np.arange(300))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_flipped_bit_in_gzip_is_an_error(tmp_path, shuffle):
    """Wherever it is: HDF5 has no checksum of its own here, gzip has."""
    CELLS.write_h5ad(tmp_path / "s.h5ad")
    with h5py.File(tmp_path / "s.h5ad", "a") as file:
        values = file["X/data"][:]
        del file["X/data"]
        data = file["X"].create_dataset(
            "data", data=values, chunks=(500,), compression="gzip", shuffle=shuffle
        )
        info = data.id.get_chunk_info(1)
    content = (tmp_path / "s.h5ad").read_bytes()
    for byte in range(info.byte_offset, info.byte_offset + info.size, 7):
        bad = bytearray(content)
        bad[byte] ^= 0x10
        (tmp_path / "bad.h5ad").write_bytes(bad)
        with contextlib.suppress(OSError):
            (_, rows), *_ = open_source(tmp_path / "bad.h5ad").counts()
            # what decodes all the same must be what it was (bits that gzip does not use)
            assert (rows != CELLS.X).nnz == 0, byte - info.byte_offset
