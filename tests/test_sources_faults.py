"""Which sources a folder holds; what is damaged or misnamed is told, with what would be right."""

import contextlib
import pathlib
import shutil

import h5py
import numpy as np
import pytest
from layouts import (
    CELLS,
    LOGGED,
    changed,
    put,
    same,
    write_mtx,
    write_v3,
    write_zarr,
)

from scjax.corpus import CountsError, list_sources, open_source
from scjax.corpus.plan import Study, fingerprint
from scjax.corpus.sources import base


# ------------------------------------------------------------------ finding sources
def test_everything_below_a_folder_by_unique_names(tmp_path, monkeypatch):
    for place in ("a/x.h5ad", "b/x.h5ad", "b/y.h5ad"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        CELLS.write_h5ad(tmp_path / place)
    write_zarr(CELLS, tmp_path / "b" / "y.zarr", 3)
    write_zarr(CELLS, tmp_path / "z" / "deep" / "inside.zarr", 2)
    write_mtx(tmp_path / "s1" / "filtered_feature_bc_matrix", CELLS)
    write_mtx(tmp_path / "s2" / "filtered_feature_bc_matrix", CELLS, old=True, zipped=False)
    write_v3(tmp_path / "ten.h5", CELLS)
    with h5py.File(tmp_path / "molecule_info.h5", "w") as file:  # is no matrix
        file["barcodes"], file["count"] = np.zeros(3), np.zeros(3)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".hidden").mkdir()
    CELLS.write_h5ad(tmp_path / ".hidden" / "w.h5ad")

    found = list_sources(tmp_path)
    assert {name: str(path.relative_to(tmp_path)) for name, path in found.items()} == {
        "a/x": "a/x.h5ad",
        "b/x": "b/x.h5ad",
        "y.h5ad": "b/y.h5ad",
        "y.zarr": "b/y.zarr",
        "s1/filtered_feature_bc_matrix": "s1/filtered_feature_bc_matrix",
        "s2/filtered_feature_bc_matrix": "s2/filtered_feature_bc_matrix",
        "ten": "ten.h5",
        "inside": "z/deep/inside.zarr",
    }
    for name, path in found.items():
        source = open_source(path, name=name)
        assert source.name == name and source.shape == (90, 40)
        assert all(pathlib.Path(file).is_file() for file, _, _ in fingerprint(Study(path, name, None)))
    assert list(list_sources(str(tmp_path / "*" / "x.h5ad"))) == ["a/x", "b/x"]
    assert list(list_sources([str(tmp_path / "**" / "y.*"), tmp_path / "ten.h5"])) == [
        "y.h5ad",
        "y.zarr",
        "ten",
    ]
    assert list(list_sources([tmp_path / "z", CELLS])) == ["inside", "adata"]
    assert list(list_sources([CELLS, tmp_path / "ten.h5", CELLS])) == ["adata0", "ten", "adata2"]
    monkeypatch.chdir(tmp_path / "b")
    assert list(list_sources(["x.h5ad", "../a"])) == ["b/x", "a/x"]
    assert open_source(tmp_path / "z").name == "z" and open_source(tmp_path / "z").shape == (90, 40)


def test_folders_that_are_refused(tmp_path):
    write_mtx(tmp_path / "outs" / "filtered_feature_bc_matrix", CELLS)
    write_v3(tmp_path / "outs" / "filtered_feature_bc_matrix.h5", CELLS)
    problem = "outs: holds the same cells several times .filtered_feature_bc_matrix, filtered_.*h5"
    with pytest.raises(ValueError, match=problem):
        list_sources(tmp_path)
    assert list(list_sources(str(tmp_path / "*" / "filtered*.h5"))) == ["filtered_feature_bc_matrix"]
    for name in ("raw", "filtered"):
        write_mtx(tmp_path / "Solo.out" / "Gene" / name, CELLS, zipped=False)
    with pytest.raises(ValueError, match=r"Gene: holds the same cells several times \(filtered, raw\)"):
        list_sources(tmp_path / "Solo.out")
    (tmp_path / "multi").mkdir()
    for name in ("a", "b"):  # two samples are two samples
        write_v3(tmp_path / "multi" / f"{name}_filtered_feature_bc_matrix.h5", CELLS)
    assert len(list_sources(tmp_path / "multi")) == 2
    write_v3(tmp_path / "multi" / "a_raw_feature_bc_matrix.h5", CELLS)
    with pytest.raises(ValueError, match=r"several times \(a_filtered_feature_bc_matrix.h5, a_raw_"):
        list_sources(tmp_path / "multi")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme").write_text("")
    with pytest.raises(
        ValueError, match=r"empty: no source in this folder \(holds: readme\); a source is an .h5ad"
    ):
        list_sources(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        list_sources(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"\*.h5ad: nothing matches"):
        list_sources(str(tmp_path / "*.h5ad"))
    CELLS.write_h5ad(tmp_path / "empty" / "x.h5ad")
    with pytest.raises(ValueError, match="named twice among the sources.*x.h5ad"):
        list_sources([tmp_path / "empty", tmp_path / "empty" / "x.h5ad"])
    with pytest.raises(ValueError, match="no sources"):
        list_sources([])
    with pytest.raises(ValueError, match="a source is a path or an AnnData, not int"):
        list_sources([3])
    corpus = tmp_path / "corpus"
    (corpus / "manifests").mkdir(parents=True)
    (corpus / "HEAD").write_text("x")
    with pytest.raises(ValueError, match="corpus: is a corpus, not a source"):
        list_sources(corpus)


# ------------------------------------------------------------------ damage, and wrong names
def damaged_mtx(folder, change):
    write_mtx(folder, CELLS, zipped=False)
    change(folder)
    return folder


def edit(name, old, new, times=1):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, times))

    return change


def cut(name, n):
    def change(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:n])

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: (f / "barcodes.tsv").unlink(), r"mtx: no barcodes.tsv\[.gz\] .*; a 10x folder holds"),
        (lambda f: (f / "features.tsv").unlink(), r"no features.tsv\[.gz\] or genes.tsv\[.gz\] of the same"),
        (lambda f: (f / "genes.tsv").write_text(""), None),
        (edit("features.tsv", "GENE3\t", "GENE3 "), "features.tsv: lines of 2 and 3 fields"),
        (edit("features.tsv", "ENSG00000000000\t", "id\tname\ttype\nENSG00000000000\t"), "41 feat.* header"),
        (edit("barcodes.tsv", "cell7\n", ""), r"40 x 90, but features.* has 40 .* \(rows\), barcodes.* 89"),
        (edit("matrix.mtx", "40 90 ", "90 40 "), "90 x 40, .*the matrix looks transposed"),
        (edit("matrix.mtx", "%%MatrixMarket", "MatrixMarket"), "matrix.mtx: not a Matrix Market file"),
        (edit("matrix.mtx", "coordinate integer", "array integer"), "holds matrix array integer general"),
        (edit("matrix.mtx", "integer", "pattern"), "holds matrix coordinate pattern general; counts are"),
        (edit("matrix.mtx", "40 90 ", "40 ninety "), "matrix.mtx: no line with rows, columns and entries"),
        (cut("matrix.mtx", 5000), "matrix.mtx: (truncated or damaged: its header|damaged between entries)"),
        (edit("matrix.mtx", "\n2 1 ", "\n41 1 "), "matrix.mtx: damaged between entries 1 and"),
        (edit("matrix.mtx", "\n2 1 ", "\n2 x "), "matrix.mtx: damaged between entries 1 and"),
        (edit("matrix.mtx", "\n2 1 ", "\n2 1 -"), r"row 0 .*cell0.*, column 1 .*GENE1.*: -\d+ is neg"),
        (edit("features.tsv", "Gene Expression", "Peaks", 40), "no feature is of type 'Gene Expression'"),
        (lambda f: (f / "barcodes.tsv").write_bytes(b"\xff\xfe"), "barcodes.tsv: not text"),
    ],
)  # fmt: skip
def test_damaged_10x_folders(tmp_path, change, problem):
    folder = damaged_mtx(tmp_path / "sample", change)
    if problem is None:  # a table too many does no harm: features.tsv is the newer one
        same(open_source(folder))
        return
    with pytest.raises((ValueError, OSError), match=problem):
        list(open_source(folder).counts())


@pytest.mark.parametrize("name", ["matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_gzip_names_the_file(tmp_path, name, damage):
    write_mtx(tmp_path / "sample", CELLS)
    content = bytearray((tmp_path / "sample" / name).read_bytes())
    content[-6] ^= 1  # in the checksum
    (tmp_path / "sample" / name).write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    with pytest.raises(OSError, match=f"{name}: damaged or truncated gzip file"):
        list(open_source(tmp_path / "sample").counts())


def test_gzip_is_told_by_content_not_by_name(tmp_path):
    write_mtx(tmp_path / "s", CELLS)
    for path in sorted((tmp_path / "s").iterdir()):
        path.rename(path.with_suffix(""))
    same(open_source(tmp_path / "s"))


@pytest.mark.parametrize("end", [b"", b"\n\n", b"\n" * 5000, b"\r\n"])
def test_how_the_last_line_ends_does_not_matter(tmp_path, end):
    write_mtx(tmp_path / "s", CELLS, zipped=False)
    path = tmp_path / "s" / "matrix.mtx"
    path.write_bytes(path.read_bytes().rstrip() + end)
    same(open_source(tmp_path / "s"))


def test_an_entry_out_of_order_far_down(tmp_path, monkeypatch):
    write_mtx(tmp_path / "s", CELLS, zipped=False)
    lines = (tmp_path / "s" / "matrix.mtx").read_text().splitlines()
    lines[500], lines[2000] = lines[2000], lines[500]
    (tmp_path / "s" / "matrix.mtx").write_text("\n".join(lines))
    (_, rows), *_ = open_source(tmp_path / "s").counts()  # in one piece it is sorted
    assert (rows != CELLS.X).nnz == 0
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 240)
    with pytest.raises(ValueError, match=r"matrix.mtx: sorted by barcode up to entry \d+, but not after"):
        list(open_source(tmp_path / "s").counts(0, 5))


def spoil(key, change):
    def damage(path):
        with h5py.File(path, "a") as file:
            values = change(file[key][:])
            del file[key]
            file[key] = values

    return damage


def drop(key):
    def damage(path):
        with h5py.File(path, "a") as file:
            del file[key]

    return damage


def at(i, value):
    def change(values):
        values = values.copy()
        values[i] = value
        return values

    return change


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (drop("matrix/data"), "ten.h5: damaged: matrix without data"),
        (drop("matrix/features/id"), "ten.h5: damaged: matrix/features without id"),
        (spoil("matrix/barcodes", lambda v: v[1:]), "is 40 x 90, but there are 40 features and 89"),
        (spoil("matrix/features/name", lambda v: v[1:]), "the columns of matrix/features differ in length"),
        (spoil("matrix/indices", lambda v: v[1:]), r"damaged: \d+ indices for \d+ stored values"),
        (spoil("matrix/indices", at(3, 40)), "damaged: indices outside 0..39"),
        (spoil("matrix/indptr", at(3, 0)), "damaged: indptr does not describe"),
        (spoil("matrix/indptr", at(slice(1, 5), 0)), r"row 4 has \d+ stored values, more than the 40"),
        (spoil("matrix/features/feature_type", at(slice(None), b"Peaks")), "no feature is of type 'Gene Exp"),
        (spoil("matrix/data", at(0, -1)), "is negative"),
        (lambda p: p.write_bytes(p.read_bytes()[:3000]), "ten.h5: damaged or truncated"),
        (lambda p: p.write_bytes(b"no"), "ten.h5: not an HDF5 file; a source is an .h5ad file"),
        (drop("matrix"), "ten.h5: no obs and no var, so not an AnnData file"),
    ],
)  # fmt: skip
def test_damaged_10x_h5(tmp_path, damage, problem):
    write_v3(tmp_path / "ten.h5", CELLS)
    damage(tmp_path / "ten.h5")
    with pytest.raises((ValueError, OSError), match=problem):
        list(open_source(tmp_path / "ten.h5").counts())


def test_layers_that_are_not_there(tmp_path):
    write_v3(tmp_path / "t.h5", CELLS)
    write_mtx(tmp_path / "m", CELLS)
    write_zarr(changed(layer=CELLS.X), tmp_path / "z.zarr", 3)
    for name in ("t.h5", "m"):
        with pytest.raises(KeyError, match=f"{name}: no layer 'spliced'; there are: X"):
            open_source(tmp_path / name, layer="spliced")
    with pytest.raises(KeyError, match="z.zarr: no raw.X; there are: X, counts"):
        open_source(tmp_path / "z.zarr", layer="raw")


@pytest.mark.parametrize("version", [2, 3])
def test_a_zarr_store_that_lost_a_file_or_half_of_one(tmp_path, version):
    """Every file of X, lost or cut in half: an error or, at most, the right counts."""
    write_zarr(CELLS, tmp_path / "z.zarr", version)
    files = [p for p in (tmp_path / "z.zarr" / "X").rglob("*") if p.is_file()]
    assert len(files) > 6
    for path in files:
        content = path.read_bytes()
        for bad in (None, content[: len(content) // 2]):
            path.unlink() if bad is None else path.write_bytes(bad)
            got = None
            with contextlib.suppress(ValueError, OSError, KeyError):
                got = list(open_source(tmp_path / "z.zarr").counts())
            assert got is None or (got[0][1] != CELLS.X).nnz == 0, path
            path.write_bytes(content)
    shutil.rmtree(tmp_path / "z.zarr" / "var")
    with pytest.raises(ValueError, match="z.zarr: no var, so not an AnnData store"):
        open_source(tmp_path / "z.zarr")


def test_log_values_name_a_layer_that_holds_counts(tmp_path):
    write_zarr(changed(LOGGED, layer=CELLS.X), tmp_path / "z.zarr", 3)
    source = open_source(tmp_path / "z.zarr")
    with pytest.raises(CountsError, match=r"z.zarr, X: row 0 .*log-normalised.*whole numbers are in: counts"):
        source.check_head()
    open_source(tmp_path / "z.zarr", layer="counts").check_head()


def test_fingerprint_and_hash_follow_the_files(tmp_path):
    write_mtx(tmp_path / "m", CELLS)
    source = open_source(tmp_path / "m")
    look, digest = fingerprint(Study(tmp_path / "m", "m", None)), source.sha256()
    assert [pathlib.Path(path).name for path, _, _ in look] == [
        "barcodes.tsv.gz",
        "features.tsv.gz",
        "matrix.mtx.gz",
    ]
    shutil.copytree(tmp_path / "m", tmp_path / "n")
    assert open_source(tmp_path / "n").sha256() == digest
    put(tmp_path / "m" / "barcodes.tsv", "".join(f"{n}x\n" for n in CELLS.obs_names).encode(), True)
    again = open_source(tmp_path / "m")
    edited = fingerprint(Study(tmp_path / "m", "m", None))
    assert edited != look and again.sha256() != digest
    # the matrix by its own name: its tables lie beside it
    assert fingerprint(Study(tmp_path / "m" / "matrix.mtx.gz", "m", None)) == edited
    assert fingerprint(Study(CELLS, "a", None)) == fingerprint(Study(CELLS.copy(), "a", None))
