"""Bad input, damage, interruption: each a clear error, and never something half-written that looks whole."""

import os
import pathlib
import shutil

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse
from synthetic import synthetic_adata

from scjax.corpus import Corpus, CountsError, build_corpus, open_source, tasks, validate_counts
from scjax.corpus import manifest as manifests
from scjax.corpus.index import write_index
from scjax.genes import Vocabulary

TINY = {"part_cells": 64, "inner": 512, "shard": 2048, "progress": False}


def build(sources, out, **options) -> Corpus:
    return build_corpus(sources, out, **(TINY | options))


def refuse(error, message, sources, out, **options) -> str:
    """The build must fail with that message and leave nothing behind."""
    with pytest.raises(error, match=message) as caught:
        build(sources, out, **options)
    assert not out.exists()
    return str(caught.value)


def spoiled(value: float, cell: int = 17, gene: int = 5) -> ad.AnnData:
    adata = synthetic_adata(80, 30)
    x = adata.X.tolil()
    x[cell, gene] = value
    adata.X = x.tocsr()
    return adata


# -- what is not a count


@pytest.mark.parametrize("form", ["csr", "csc", "dense", "memory"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "-1 is negative"),
        (np.nan, r"nan is not a number \(NaN\)"),
        (np.inf, "inf is infinite"),
        (2.5, "2.5 is not a whole number"),
        (2.0**33, "is larger than any count"),
    ],
)
def test_a_value_that_is_no_count_is_named(tmp_path, form, value, message):
    adata = spoiled(value)
    if form == "csc":
        adata.X = adata.X.tocsc()
    elif form == "dense":
        adata.X = adata.X.toarray()
    if form == "memory":
        source, where = adata, "AnnData 'adata', X"
    else:
        source = tmp_path / "s.h5ad"
        adata.write_h5ad(source)
        where = f"{source}, X"
    text = refuse(CountsError, message, source, tmp_path / "c")
    assert text.startswith(f"{where}: row 17 (cell 'cell17'), column 5 (gene 'GENE5'): ")
    if value != 2.5:  # the flag is for fractions; nothing makes a count of these
        refuse(CountsError, message, source, tmp_path / "c", allow_non_integer=True)


def test_a_bad_value_far_down_the_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("scjax.corpus.sources.base.CHUNK_ELEMENTS", 200)
    adata = spoiled(-3, cell=71, gene=2)
    for form in (adata.X, adata.X.tocsc(), adata.X.toarray()):
        adata.X = form
        adata.write_h5ad(tmp_path / "s.h5ad")
        text = refuse(CountsError, "-3 is negative", tmp_path / "s.h5ad", tmp_path / "c")
        assert "row 71 (cell 'cell71'), column 2 (gene 'GENE2')" in text


def normalised(log=np.log1p) -> ad.AnnData:
    adata = synthetic_adata(80, 60)
    total = np.asarray(adata.X.sum(1))
    x = sparse.csr_matrix(adata.X.multiply(1e4 / total))
    x.data = log(x.data)
    adata.layers["raw_counts"], adata.layers["scaled"] = adata.X.copy(), x * 0.1
    adata.raw = ad.AnnData(adata.X.copy(), obs=adata.obs, var=adata.var)
    adata.X = x
    return adata


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (np.log1p, r"look log-normalised \(log1p of scaled counts\)"),
        (lambda x: np.log2(x + 1), r"look log-normalised \(base 2\)"),
        (lambda x: x / 1e4, "look normalised by library size"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_normalised_data_are_recognised_and_the_counts_pointed_at(tmp_path, law, message, in_memory):
    source = normalised(law)
    if not in_memory:
        source.write_h5ad(tmp_path / "s.h5ad")
        source = tmp_path / "s.h5ad"
    text = refuse(CountsError, message, source, tmp_path / "c")
    assert set(text.split("whole numbers are in: ")[1].split(" (pass")[0].split(", ")) == {
        "raw",
        "raw_counts",
    }
    assert len(build(source, tmp_path / "c", layer="raw_counts")) == 80


def test_the_first_look_spares_the_other_files(tmp_path, monkeypatch):
    """A file of logarithms at the end of the list is refused before the first is read."""
    monkeypatch.setattr(
        tasks, "write_fragment", lambda *_: pytest.fail("counts were read before all were looked at")
    )
    refuse(CountsError, "log-normalised", [synthetic_adata(50, 60), normalised()], tmp_path / "c")


def test_validate_counts_takes_any_matrix():
    good = np.array([[0, 1], [2, 3]])
    for x in (good, good.astype(np.uint8), good.astype(np.float16), good > 1, sparse.coo_matrix(good)):
        validate_counts(x, source="here")
    bad = good * np.float32(-1)
    for x in (
        bad,
        sparse.csr_matrix(bad),
        sparse.csc_matrix(bad),
        sparse.coo_matrix(bad),
        sparse.lil_matrix(bad),
    ):
        x = x.tocsr() if getattr(x, "format", "") == "lil" else x
        with pytest.raises(CountsError, match=r"^here: row 10, column 1 \(gene 'b'\): -1 is negative"):
            validate_counts(x, source="here", genes=["a", "b"], first_row=10)
    with pytest.raises(CountsError, match="holds complex128 values"):
        validate_counts(good * 1j, source="here")
    validate_counts(good / 2, source="here", allow_non_integer=True)


# -- genes


def test_few_matching_genes(tmp_path):
    adata = synthetic_adata(50, 100)
    vocabulary = Vocabulary([f"ENSMUSG{i:011d}" for i in range(200)])
    text = refuse(ValueError, "0 of 100 genes match", adata, tmp_path / "c", vocabulary=vocabulary)
    assert "at least 10 are asked for" in text and "Not matched: GENE0, GENE1" in text
    assert "In the vocabulary: ENSMUSG00000000000" in text
    some = Vocabulary([f"ENSG{i:011d}" for i in range(95, 200)])
    refuse(ValueError, "5 of 100 genes match", adata, tmp_path / "c", vocabulary=some)
    assert len(build(adata, tmp_path / "c", vocabulary=some, min_match=0.05)) > 0


def test_a_small_panel_may_match_a_large_vocabulary(tmp_path):
    vocabulary = Vocabulary([f"ENSG{i:011d}" for i in range(5000)])
    assert len(build(synthetic_adata(50, 20), tmp_path / "c", vocabulary=vocabulary)) == 50


def test_columns_that_are_one_gene(tmp_path):
    adata = synthetic_adata(50, 20)
    adata.var["ensembl_id"] = [f"ENSG{max(g, 1):011d}.{g}" for g in range(20)]
    text = refuse(ValueError, "1 genes are in several columns", adata, tmp_path / "c")
    assert "(ENSG00000000001: GENE0, GENE1); pass duplicates='sum'" in text


def test_genes_without_names(tmp_path):
    with pytest.warns(UserWarning, match="Variable names are not unique"):
        adata = ad.AnnData(synthetic_adata(50, 20).X, var=pd.DataFrame(index=[""] * 20))
    refuse(ValueError, "0 of 20 genes match", adata, tmp_path / "c")


# -- files


def test_files_that_are_no_h5ad(tmp_path):
    out, path = tmp_path / "c", tmp_path / "s.h5ad"
    refuse(FileNotFoundError, "s.h5ad: no such file", path, out)
    refuse(
        ValueError, "no source in this folder .*; a source is an .h5ad file, an AnnData zarr", tmp_path, out
    )
    path.write_text("cell,gene\n")
    refuse(ValueError, "s.h5ad: not an HDF5 file", path, out)
    path.write_bytes(b"")
    refuse(ValueError, "s.h5ad: not an HDF5 file", path, out)
    path.unlink()
    with h5py.File(path, "w") as file:
        file["table"] = [1]
    refuse(ValueError, "no obs and no var, so not an AnnData file; it holds: table", path, out)
    refuse(ValueError, "not int", [3], out)
    refuse(ValueError, "no sources", [], out)


def test_truncated_files(tmp_path):
    path = tmp_path / "s.h5ad"
    synthetic_adata(200, 50).write_h5ad(path)
    size = path.stat().st_size
    for keep in (100, size // 2, size - 1):
        cut = tmp_path / f"cut{keep}.h5ad"
        cut.write_bytes(path.read_bytes()[:keep])
        refuse(
            (OSError, ValueError), f"cut{keep}.h5ad: (damaged or truncated|not an HDF5)", cut, tmp_path / "c"
        )


def test_damaged_content(tmp_path):
    path = tmp_path / "s.h5ad"

    def damage(name: str, change) -> pathlib.Path:
        synthetic_adata(60, 20).write_h5ad(path)
        with h5py.File(path, "a") as file:
            change(file, name)
        return path

    def replace(values):
        def change(file, name):
            old = file[name][:]
            del file[name]
            file[name] = values(old)

        return change

    out = tmp_path / "c"
    refuse(ValueError, "indptr does not describe", damage("X/indptr", replace(lambda v: v[:-1])), out)
    refuse(
        ValueError, "damaged: 645 indices for 644 stored", damage("X/data", replace(lambda v: v[:-1])), out
    )
    refuse(ValueError, r"indices outside 0..19", damage("X/indices", replace(lambda v: v + 10)), out)
    refuse(
        ValueError, "a sparse matrix without indices", damage("X/indices", lambda f, n: f.__delitem__(n)), out
    )
    refuse(
        ValueError,
        "obs has 60 rows and var 20",
        damage("X", lambda f, n: f[n].attrs.modify("shape", [60, 21])),
        out,
    )
    refuse(
        ValueError,
        "encoding 'coo_matrix'",
        damage("X", lambda f, n: f[n].attrs.modify("encoding-type", "coo_matrix")),
        out,
    )
    refuse(ValueError, "cannot read obs", damage("obs/_index", lambda f, n: f.__delitem__(n)), out)


def test_bytes_damaged_in_the_middle(tmp_path):
    """A chunk that does not decompress: found while reading, reported with the file."""
    adata = synthetic_adata(400, 50)
    adata.write_h5ad(tmp_path / "s.h5ad", compression="gzip")
    with h5py.File(tmp_path / "s.h5ad") as file:
        chunk = file["X/data"].id.get_chunk_info(file["X/data"].id.get_num_chunks() - 1)
    with open(tmp_path / "s.h5ad", "r+b") as file:
        file.seek(chunk.byte_offset + chunk.size // 2)
        file.write(b"\xff" * (chunk.size // 4))
    refuse(OSError, "s.h5ad: damaged or truncated", tmp_path / "s.h5ad", tmp_path / "c")


def test_missing_matrices_list_those_there(tmp_path):
    adata = synthetic_adata(50, 20)
    adata.layers["spliced"] = adata.X.copy()
    path, out = tmp_path / "s.h5ad", tmp_path / "c"
    for source in (adata, path):
        adata.write_h5ad(path)
        refuse(KeyError, "no layer 'counts'; there are: X, spliced", source, out, layer="counts")
        refuse(KeyError, "no raw.X; there are: X, spliced", source, out, layer="raw")
    adata.X = None
    adata.write_h5ad(path)
    for source in (adata, path):
        refuse(KeyError, "no X; there are: spliced", source, out)
    refuse(KeyError, "no X; there are: no matrices", ad.AnnData(obs=adata.obs, var=adata.var), out)
    refuse(KeyError, "names data sets that are not there: t; there are: s", path, out, layer={"t": "spliced"})


def test_empty_matrices_and_cells(tmp_path):
    out = tmp_path / "c"
    refuse(ValueError, r"the matrix is empty \(0 cells x 20 genes\)", synthetic_adata(5, 20)[:0], out)
    nothing = ad.AnnData(sparse.csr_matrix((4, 3), dtype=np.float32))
    refuse(ValueError, "none of the cells has 1 expressed genes", nothing, out)


# -- labels, names, options


def test_missing_label_lists_those_there(tmp_path):
    adata, out = synthetic_adata(50, 20), tmp_path / "c"
    text = refuse(
        KeyError, "no obs column 'celltypes' in any source", adata, out, labels=["batch", "celltypes"]
    )
    assert "there are: cell_type, batch, donor, study" in text
    refuse(
        KeyError,
        "no obs column 'site' to split by; there are: cell_type",
        adata,
        out,
        validation=0.2,
        split_by="site",
    )


def test_bad_names(tmp_path):
    a, out = synthetic_adata(20, 20), tmp_path / "c"
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        a.write_h5ad(tmp_path / folder / "s.h5ad")
    files = [tmp_path / "x/s.h5ad", tmp_path / "y/s.h5ad"]
    refuse(ValueError, "called s: give each its own", files, out, names=["s", "s"])
    refuse(ValueError, "1 names for 2 sources", [a, a], out, names=["a"])
    a.obs[7] = "x"
    refuse(ValueError, "the obs column 7 must be renamed: a name is text", a, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "zip"}, "there are fast, balanced, small, local"),
        ({"shard": 700}, "shard=700 must be a multiple of inner=512"),
        ({"part_cells": 0}, "must be at least 1"),
        ({"duplicates": "first"}, "there are error and sum"),
        ({"validation": 1.0}, "at least 0 and below 1"),
        ({"split_by": "donor"}, "needs validation > 0"),
        ({"min_genes": 0}, "min_genes=0 must be at least 1"),
        ({"validation": 0.5, "split_by": "study"}, "1 groups .* cannot be split"),
    ],
)
def test_bad_options(tmp_path, options, message):
    refuse(ValueError, message, synthetic_adata(50, 20, n_batches=1), tmp_path / "c", **options)


# -- the output folder


def test_an_output_that_holds_something_is_left_alone(tmp_path):
    adata, out = synthetic_adata(50, 20), tmp_path / "c"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    (out / "parts").mkdir()
    with pytest.raises(FileExistsError, match=r"c: not empty \(holds parts, thesis.tex\)"):
        build(adata, out)
    assert (out / "thesis.tex").read_text() == "years of work" and (out / "parts").is_dir()
    (out / ".build").mkdir()  # not even where a build seems to have been interrupted
    with pytest.raises(FileExistsError, match=r"not empty \(holds thesis.tex\)"):
        build(adata, out)
    shutil.rmtree(out)
    out.write_text("a file")
    with pytest.raises(FileExistsError, match="is a file"):
        build(adata, out)


def test_a_corpus_is_not_overwritten(tmp_path):
    out = tmp_path / "c"
    out.mkdir()  # an empty folder is fine
    corpus = build(synthetic_adata(50, 20), out)
    with pytest.raises(FileExistsError, match=rf"holds a corpus already \(manifest {corpus.manifest_id}\)"):
        build(synthetic_adata(50, 20, seed=9), out)
    assert Corpus.open(out).verify(progress=False) == []


def test_opening_what_is_no_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/?: no such folder"):
        Corpus.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no file HEAD, so no complete corpus"):
        Corpus.open(tmp_path)
    corpus = build(synthetic_adata(50, 20), tmp_path / "c")
    with pytest.raises(FileNotFoundError, match=f"no manifest '0'; there are: {corpus.manifest_id}"):
        Corpus.open(tmp_path / "c", manifest="0")


# -- damage after the build


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("corpus") / "c"
    build([synthetic_adata(100, 40, seed=1), synthetic_adata(80, 50, seed=2)], out)
    return out


def test_verify_finds_every_damaged_object(whole, tmp_path):
    manifest = Corpus.open(whole).manifest
    objects = [*manifest["objects"], *(name for part in manifest["parts"] for name in part["objects"])]
    assert len(objects) > 100

    def flip(path: pathlib.Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    for number, (damage, found) in enumerate(
        (
            (flip, "its content has changed (crc32c and sha256 differ)"),
            (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes, the manifest says"),
            (lambda path: path.unlink(), "missing"),
        )
    ):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        for name in objects:
            damage(copy / name)
        problems = Corpus.open(copy).verify(progress=False)
        assert [line.split(": ")[0] for line in problems] == objects
        assert all(found in line for line in problems)


def test_a_damaged_manifest_or_vocabulary_is_refused(whole, tmp_path):
    copy = tmp_path / "c"
    shutil.copytree(whole, copy)
    corpus = Corpus.open(copy)
    vocabulary = copy / corpus.manifest["vocabulary"]["file"]
    vocabulary.write_text(vocabulary.read_text().replace("GENE3", "GENE_"))
    with pytest.raises(OSError, match="the vocabulary: .* does not have the checksum"):
        _ = Corpus.open(copy).vocabulary
    path = copy / "manifests" / f"{corpus.manifest_id}.json"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{corpus.manifest_id}.json: damaged"):
        Corpus.open(copy)


def rewritten(whole: pathlib.Path, copy: pathlib.Path, change) -> Corpus:
    """A copy of a corpus in which something is wrong although every checksum is right."""
    shutil.copytree(whole, copy)
    corpus = Corpus.open(copy)
    content = corpus.manifest
    change(corpus, content)
    for entry in content["parts"]:
        entry["objects"] = {name: manifests.hash_object(copy / name) for name in entry["objects"]}
    content["objects"] = {name: manifests.hash_object(copy / name) for name in content["objects"]}
    manifest_id, text = manifests.encode(content)
    (copy / "manifests" / f"{manifest_id}.json").write_bytes(text)
    manifests.commit(copy, manifest_id)
    return Corpus.open(copy)


def test_a_newer_format_is_refused(whole, tmp_path):
    with pytest.raises(
        ValueError, match="version '3.0'; this scjax reads scjax-corpus 2.x: upgrade scjax or"
    ):
        rewritten(whole, tmp_path / "c", lambda corpus, content: content.update(version="3.0"))
    with pytest.raises(ValueError, match="version '1.0'; this scjax reads scjax-corpus 2.x: build the"):
        rewritten(whole, tmp_path / "d", lambda corpus, content: content.update(version="1.0"))
    rewritten(whole, tmp_path / "e", lambda corpus, content: content.update(version="2.7"))


def npy(name: str, change):
    """Changes an index file, and what checks the columns with it."""

    def apply(corpus, content):
        part = corpus.parts[0]
        blocks, columns = part.blocks, {column: part.column(column) for column in part.arrays.names}
        if name == "blocks.npy":
            np.save(part.index / name, change(blocks))
            return
        columns[name.removesuffix(".npy")] = change(columns[name.removesuffix(".npy")])
        write_index(part.index, columns, columns["nnz"])
        np.save(part.index / "blocks.npy", blocks)

    return apply


def shorter(corpus, content):
    path = corpus.parts[0].index / "total.npy"
    np.save(path, np.load(path)[1:])


def stored(name: str, change):
    def apply(corpus, content):
        array = zarr.open_array(corpus.parts[0].path / "X" / name)
        array[:] = change(array[:])

    return apply


def swap_first_two(values):
    values[[0, 1]] = values[[1, 0]]
    return values


def set_first(value):
    def change(values):
        values[0] = value
        return values

    return change


def unmeasure(corpus, content):
    path = corpus.path / content["datasets"][0]["measured"]
    np.save(path, np.load(path) & 0xFE)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (npy("nnz.npy", set_first(3)), "nnz.npy does not agree with the manifest"),
        (npy("blocks.npy", set_first(3)), "blocks.npy does not agree"),
        (npy("total.npy", set_first(0)), "cell 0 has more counts than index/total.npy"),
        (shorter, "total.npy do not have the checksum that the index states"),
        (npy("codes/cell_type.npy", set_first(9)), "codes/cell_type.npy has codes outside its 4 categories"),
        (npy("codes/dataset.npy", lambda v: 1 - v), "obs['scjax_dataset'] does not agree"),
        (stored("indices", swap_first_two), "cell 0 has gene ids that do not rise"),
        (stored("indices", set_first(60000)), "cell 0 has a gene id beyond the vocabulary's 50"),
        (stored("data", set_first(0)), "cell 0 has a stored count that is not above 0"),
        (stored("indptr", set_first(1)), "X/indptr does not agree"),
        (unmeasure, "counts of a gene that its data set did not measure"),
        (lambda c, m: m["datasets"][0].update(n_cells=7), "data set adata0: 100 cells, the manifest says 7"),
        (lambda c, m: m["vocabulary"].update(n_genes=7), "the vocabulary has 50 genes, the manifest says 7"),
    ],
)  # fmt: skip
def test_verify_finds_content_that_breaks_a_promise(whole, tmp_path, change, problem):
    corpus = rewritten(whole, tmp_path / "c", change)
    problems = corpus.verify(progress=False)
    assert any(problem in line for line in problems), problems


def test_reading_a_damaged_part_says_where(whole, tmp_path):
    copy = tmp_path / "c"
    shutil.copytree(whole, copy)
    part = Corpus.open(copy).parts[0]
    shard = part.path / "X" / "data" / "c" / "0"
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)
    with pytest.raises(OSError, match=f"part {part.id}, array X/data, shard 0, chunk 0: its checksum"):
        Corpus.open(copy).read([0])


def test_a_source_can_be_read_on_its_own(tmp_path):
    """What the loader uses to embed a file without a corpus."""
    adata = synthetic_adata(50, 20)
    adata.write_h5ad(tmp_path / "s.h5ad")
    source = open_source(tmp_path / "s.h5ad")
    runs = list(source.counts())
    assert [first for first, _ in runs] == [0] and (runs[0][1] != adata.X).nnz == 0
    assert source.shape == (50, 20) and source.name == "s" and list(source.var.index) == list(adata.var_names)
    assert (
        open_source(adata).sha256() == open_source(adata.copy()).sha256() != open_source(spoiled(9)).sha256()
    )
