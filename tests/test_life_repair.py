"""A damaged corpus is made whole again, byte for byte, or it is said why not; never half."""

import os
import pathlib
import shutil

import anndata as ad
import numpy as np
import pytest
from synthetic import synthetic_adata

from scjax.corpus import Corpus, build_corpus, locks
from scjax.corpus.append import append_corpus
from scjax.corpus.gc import gc_corpus
from scjax.corpus.repair import repair_corpus

TINY = {"part_cells": 64, "inner": 512, "shard": 2048, "progress": False}


def contents(root: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def write(folder: pathlib.Path, **sizes: int) -> list[pathlib.Path]:
    """Sources in files; the second half of the cells of the last repeats the first, its donors are unlike."""
    folder.mkdir(exist_ok=True)
    for seed, (name, n_cells) in enumerate(sizes.items()):
        cells = synthetic_adata(n_cells, 40 + seed, seed=seed)
        cells.obs["dose"], cells.obsm["panel"] = (
            np.arange(n_cells) / 7,
            np.arange(3.0 * n_cells).reshape(-1, 3),
        )
        if seed == len(sizes) - 1:
            cells = ad.concat([cells, cells[: n_cells // 2]], merge="same", index_unique="-")
            cells.obs["donor"] = [f"{name}{i % 5}" for i in range(cells.n_obs)]
        cells.write_h5ad(folder / f"{name}.h5ad")
    return [folder / f"{name}.h5ad" for name in sizes]


OPTIONS = {
    "shuffled": {"validation": 0.2, "seed": 5, "values": ["dose", "panel"]},
    "as stored": {"shuffle": False, "labels": ["cell_type"]},
    "by donor, no duplicates": {"validation": 0.3, "split_by": "donor", "drop_duplicates": True},
}


@pytest.fixture(scope="module", params=list(OPTIONS))
def whole(request, tmp_path_factory) -> pathlib.Path:
    """A folder with sources and the corpus "c" of them, which was added to."""
    folder = tmp_path_factory.mktemp("whole")
    build_corpus(write(folder / "first", one=90, two=80), folder / "c", **TINY, **OPTIONS[request.param])
    append_corpus(folder / "c", write(folder / "more", three=70, four=60), progress=False)
    return folder


@pytest.fixture
def corpus(whole, tmp_path) -> pathlib.Path:
    shutil.copytree(whole / "c", tmp_path / "c")
    return tmp_path / "c"


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def test_nothing_to_repair(corpus):
    before = contents(corpus)
    assert repair_corpus(corpus, progress=False) == [] and contents(corpus) == before


def test_everything_but_the_manifests_comes_back(corpus):
    """All parts, the vocabulary, the measured genes, HEAD: flipped, cut, emptied or gone."""
    before = contents(corpus)
    names = [name for name in before if not name.startswith(("manifests/", "sources/"))]
    for turn, name in enumerate(names):
        path = corpus / name
        damage = (flip, lambda p: os.truncate(p, p.stat().st_size // 2), pathlib.Path.unlink)[turn % 3]
        damage(path)
    if not (corpus / "HEAD").exists():
        (corpus / "HEAD").write_text("")
    assert repair_corpus(corpus, progress=False) == sorted(names)
    assert contents(corpus) == before and not (corpus / ".build").exists()
    assert Corpus.open(corpus).verify(progress=False) == []


def test_one_damaged_object_is_one_replaced(corpus):
    before = contents(corpus)
    parts = Corpus.open(corpus).parts
    for part in (parts[0], parts[-1]):
        for folder in (f"index/{part.id}/total.npy", f"parts/{part.id}.zarr/X/data/c/0"):
            flip(corpus / folder)
            assert Corpus.open(corpus).verify(progress=False)
            assert repair_corpus(corpus, progress=False) == [folder]
            assert contents(corpus) == before


def test_a_missing_part_comes_back_after_gc_has_dropped_the_state_that_it_was_added_to(corpus):
    gc_corpus(corpus, drop_old=True)
    before = contents(corpus)
    part = Corpus.open(corpus).parts[-1]
    shutil.rmtree(part.path)
    shutil.rmtree(part.index)
    assert len(repair_corpus(corpus, progress=False)) > 50
    assert contents(corpus) == before


def test_several_processes_repair_as_one_does(tmp_path):
    root = tmp_path / "c"
    build_corpus(write(tmp_path / "s", one=90, two=80), root, **TINY)
    before = contents(root)
    names = [f"index/{part.id}/total.npy" for part in Corpus.open(root).parts[:2]]
    for name in names:
        flip(root / name)
    assert repair_corpus(root, workers=2, progress=False) == sorted(names)
    assert contents(root) == before


def test_sources_that_moved_changed_or_are_gone(tmp_path):
    sources = write(tmp_path / "here", one=90, two=80)
    root = tmp_path / "c"
    build_corpus(sources, root, **TINY)
    before = contents(root)
    part = Corpus.open(root).parts[0]
    damaged = root / f"index/{part.id}/nnz.npy"
    flip(damaged)
    broken = contents(root)

    moved = tmp_path / "there.h5ad"
    sources[0].rename(moved)
    sources[1].rename(tmp_path / "two.h5ad")
    with pytest.raises(FileNotFoundError, match=r"are gone: one \(.*one.h5ad\), two \(.*sources="):
        repair_corpus(root, progress=False)
    cells = ad.read_h5ad(moved)
    cells.X.data[3] += 1
    cells.write_h5ad(tmp_path / "one.h5ad")
    given = {"one": tmp_path / "one.h5ad", "two": tmp_path / "two.h5ad"}
    with pytest.raises(ValueError, match=r"have changed .* one \(.*one.h5ad\); say with sources="):
        repair_corpus(root, given, progress=False)
    assert contents(root) == broken
    assert repair_corpus(root, given | {"one": moved}, progress=False) == [f"index/{part.id}/nnz.npy"]
    assert contents(root) == before


def test_sources_in_memory_are_asked_for(tmp_path):
    cells, root = synthetic_adata(90, 40), tmp_path / "c"
    build_corpus(cells, root, names=["mine"], **TINY)
    before = contents(root)
    flip(Corpus.open(root).parts[0].index / "nnz.npy")
    with pytest.raises(FileNotFoundError, match=r"mine \(was in memory\)"):
        repair_corpus(root, progress=False)
    repair_corpus(root, {"mine": cells}, progress=False)
    assert contents(root) == before


def test_sources_may_be_given_as_to_a_build(tmp_path):
    """A folder, in which they are found by the names of their files."""
    sources = write(tmp_path / "s", one=90, two=80)
    root = tmp_path / "c"
    build_corpus(sources, root, names=["first", "second"], **TINY)
    before = contents(root)
    flip(Corpus.open(root).parts[0].index / "nnz.npy")
    (tmp_path / "s").rename(tmp_path / "moved")
    assert len(repair_corpus(root, [tmp_path / "moved"], progress=False)) == 1
    assert contents(root) == before


def test_what_comes_out_otherwise_is_not_put_in_place(tmp_path, monkeypatch):
    """As another version of a library would write it."""
    (source,) = write(tmp_path / "s", one=90)
    build_corpus(source, tmp_path / "c", **TINY)
    flip(Corpus.open(tmp_path / "c").parts[0].index / "nnz.npy")
    before = contents(tmp_path / "c")
    monkeypatch.setitem(
        __import__("scjax.corpus.format").corpus.format.CODECS, "fast", {"indices": None, "data": None}
    )
    with pytest.raises(ValueError, match="comes out with other bytes.*nothing was replaced"):
        repair_corpus(tmp_path / "c", progress=False)
    assert contents(tmp_path / "c") == before


def test_head(corpus):
    states = sorted(path.stem for path in (corpus / "manifests").glob("*.json"))
    present = Corpus.open(corpus).manifest_id
    old = next(state for state in states if state != present)
    for said in (present[:-1] + "g", present[:-1], "", "\0" * 13, "complete nonsense"):
        (corpus / "HEAD").write_text(f"{said}\n")
        assert repair_corpus(corpus, progress=False) == ["HEAD"]
        assert Corpus.open(corpus).manifest_id == present
    (corpus / "HEAD").write_text(f"{old[:-1]}g\n")  # one letter from the older state: that it was
    assert repair_corpus(corpus, progress=False) == ["HEAD"]
    assert Corpus.open(corpus).manifest_id == old
    (corpus / "HEAD").unlink()
    assert repair_corpus(corpus, progress=False) == ["HEAD"] and Corpus.open(corpus).manifest_id == present


def test_what_cannot_be_repaired_is_said(corpus, tmp_path):
    present = Corpus.open(corpus).manifest_id
    (old,) = (path for path in (corpus / "manifests").glob("*.json") if path.stem != present)
    with locks.writing(corpus), pytest.raises(FileExistsError, match="another build"):
        repair_corpus(corpus, progress=False)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        repair_corpus(tmp_path / "nowhere")
    flip(old)
    with pytest.raises(ValueError, match=f"manifests cannot be made again: {old.stem}; gc"):
        repair_corpus(corpus, progress=False)
    gc_corpus(corpus, drop_old=True)
    assert repair_corpus(corpus, progress=False) == []
    name = f"index/{Corpus.open(corpus).parts[0].id}/nnz.npy"
    flip(corpus / name)
    shutil.rmtree(corpus / "sources")
    with pytest.raises(ValueError, match=f"nothing tells which sources {name} came from"):
        repair_corpus(corpus, progress=False)
    flip(corpus / "manifests" / f"{present}.json")
    with pytest.raises(ValueError, match=f"{present}.json: damaged"):
        repair_corpus(corpus, progress=False)


def test_a_vocabulary_with_other_names_of_genes_comes_from_the_sources(tmp_path):
    """Parts do not hold the aliases; the sources do, or the user has the file."""
    from scjax.genes import Vocabulary

    (source,) = write(tmp_path / "s", one=90)
    ids = [f"ENSG{g:011d}" for g in range(40)]
    named = Vocabulary(ids, aliases=[[f"OLD{g}"] for g in range(40)])
    root = tmp_path / "c"
    build_corpus(source, root, vocabulary=named, **TINY)
    path = root / Corpus.open(root).manifest["vocabulary"]["file"]
    flip(path)
    with pytest.raises(ValueError, match="copy the file of the vocabulary"):
        repair_corpus(root, progress=False)
    named.to_tsv(path)
    assert repair_corpus(root, progress=False) == [] and np.all(Corpus.open(root).vocabulary.ids == ids)
