"""Counts in every layout that people keep them in, written as each tool writes it."""

import gzip
import pickle
import warnings

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse
from synthetic import synthetic_adata

from scjax.corpus.sources import base

CELLS = synthetic_adata(90, 40)
CELLS.obs = CELLS.obs[["cell_type", "donor"]]


# ------------------------------------------------------------------ writing, as each tool lays it out
def write_zarr(adata, path, version):
    with warnings.catch_warnings():  # about what will be the default some day
        warnings.simplefilter("ignore")
        before, ad.settings.zarr_write_format = ad.settings.zarr_write_format, version
        try:
            adata.write_zarr(path)
        finally:
            ad.settings.zarr_write_format = before


def group_10x(file, name, counts, barcodes):
    """Features x barcodes by column, as Cell Ranger has it; counts are cells x features."""
    group, x = file.create_group(name), sparse.csr_matrix(counts)
    group["data"], group["indices"] = x.data.astype("i4"), x.indices.astype("i8")
    group["indptr"], group["shape"] = x.indptr.astype("i8"), np.array(x.shape[::-1], "i4")
    group["barcodes"] = np.array(barcodes, "S")
    return group


def write_v3(path, adata, types=None, genome="GRCh38"):
    with h5py.File(path, "w") as file:
        group = group_10x(file, "matrix", adata.X, list(adata.obs_names))
        features = group.create_group("features")
        features["id"] = np.array(list(adata.var["ensembl_id"]), "S")
        features["name"] = np.array(list(adata.var_names), "S")
        features["feature_type"] = np.array(types or ["Gene Expression"] * adata.n_vars, "S")
        genomes = [genome] * adata.n_vars if isinstance(genome, str) else genome
        features["genome"] = np.array(genomes, "S")
        features["_all_tag_keys"] = np.array(["genome"], "S")


def write_v2(path, genomes):
    """genome -> AnnData"""
    with h5py.File(path, "w") as file:
        for name, adata in genomes.items():
            group = group_10x(file, name, adata.X, list(adata.obs_names))
            group["genes"] = np.array(list(adata.var["ensembl_id"]), "S")
            group["gene_names"] = np.array(list(adata.var_names), "S")


def write_mtx(folder, adata, *, prefix="", zipped=True, old=False, types=None, order="csc"):
    folder.mkdir(exist_ok=True, parents=True)
    rows = zip(
        adata.var["ensembl_id"], adata.var_names, types or ["Gene Expression"] * adata.n_vars, strict=True
    )
    tables = {
        "genes.tsv" if old else "features.tsv": ["\t".join(row[: 2 if old else 3]) for row in rows],
        "barcodes.tsv": list(adata.obs_names),
    }
    for name, lines in tables.items():
        put(folder / f"{prefix}{name}", "".join(f"{line}\n" for line in lines).encode(), zipped)
    x = sparse.coo_matrix(adata.X.T.asformat(order))
    head = "%%MatrixMarket matrix coordinate integer general\n%metadata_json: {}\n"
    head += f"{x.shape[0]} {x.shape[1]} {x.nnz}\n"
    entries = "".join(f"{r + 1} {c + 1} {int(v)}\n" for r, c, v in zip(x.row, x.col, x.data, strict=True))
    put(folder / f"{prefix}matrix.mtx", (head + entries).encode(), zipped)


def put(path, content, zipped):
    path = path.with_name(path.name + ".gz") if zipped else path
    path.write_bytes(gzip.compress(content) if zipped else content)


def changed(x=None, layer=None, raw=None):
    adata = CELLS.copy()
    if layer is not None:
        adata.layers["counts"] = layer
    if raw is not None:
        wide = ad.AnnData(raw, var=CELLS.var)
        adata.raw, adata = wide, adata[:, :10].copy()
        adata.raw = wide
    if x is not None:
        adata.X = x
    return adata


LOGGED = CELLS.X.log1p()
FORMS = {
    "csr": (changed(), None),
    "csc": (changed(CELLS.X.tocsc()), None),
    "dense": (changed(CELLS.X.toarray()), None),
    "int64 layer": (changed(LOGGED, layer=CELLS.X.astype(np.int64)), "counts"),
    "csc raw": (changed(raw=CELLS.X.tocsc()), "raw"),
    "dense layer": (changed(LOGGED, layer=CELLS.X.toarray()), "counts"),
}


def same(source, expected=CELLS.X, obs=None, least=1):
    """All counts, and those of ranges of rows, whether read in one go or in pieces; after pickling, too."""
    source = pickle.loads(pickle.dumps(source))
    n = expected.shape[0]
    for elements in (base.CHUNK_ELEMENTS, max(300, least), least):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "CHUNK_ELEMENTS", elements)
            for first, last in (
                ((0, None), (0, n), (7, n - 20), (n - 1, n), (5, 5)) if elements > 1 else ((3, 9),)
            ):
                wanted, at = expected[first:last], first
                pieces = [sparse.csr_matrix((0, source.shape[1]))]
                for start, rows in source.counts(first, last):
                    assert start == at and rows.has_sorted_indices and (rows.data != 0).all()
                    assert rows.nnz <= 2 * elements + expected.getnnz(1).max()
                    at += rows.shape[0]
                    pieces.append(rows)
                got = sparse.vstack(pieces)
                assert got.shape == wanted.shape and (got != wanted).nnz == 0
    runs = source.runs(500)
    assert [first for first, _ in runs] == [0] + [last for _, last in runs[:-1]] and runs[-1][1] == n
    assert list(source.obs.index) == list(CELLS.obs_names if obs is None else obs)
    return runs
