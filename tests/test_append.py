"""Appending to a corpus: old cells, codes and readers stay; the new ones are their sources'."""

import errno
import subprocess

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from synthetic import synthetic_adata
from test_corpus import same_bytes, same_cells

from scjax.corpus import Corpus, append_corpus, build_corpus, commit, plan
from scjax.genes import Vocabulary

TINY = {"part_cells": 64, "inner": 256, "shard": 1024, "progress": False}


def build(sources, out, **options) -> Corpus:
    return build_corpus(sources, out, **(TINY | options))


def append(out, sources, **options) -> Corpus:
    return append_corpus(out, sources, progress=False, **options)


def study(seed: int, n_cells: int = 100, n_genes: int = 40) -> ad.AnnData:
    return synthetic_adata(n_cells, n_genes, seed=seed)


def test_old_cells_keep_their_place_and_new_ones_come_after(tmp_path):
    one, two, three = study(1), study(2, 80), study(3, 60)
    old = build(one, tmp_path / "c", names=["one"], validation=0.2, seed=4)
    before = old.read(slice(None))
    new = append(tmp_path / "c", [two, three], names=["two", "three"])
    assert new.manifest["parent"] == old.manifest_id and new.manifest_id != old.manifest_id
    assert new.manifest["parts"][: len(old.parts)] == old.manifest["parts"]
    same_cells(new, {"one": one, "two": two, "three": three})
    after = new.read(slice(0, len(old)))
    assert (after.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(after.obs, before.obs)
    assert new.verify(progress=False) == []
    assert sum(part.n_cells for part in new.split("validation")) == 20 + round(0.2 * 140)
    assert new.manifest["totals"]["n_cells"] == 240 == len(new)
    nnz = np.concatenate([part.nnz_per_cell for part in new.parts])
    assert new.manifest["nnz_quantiles"]["0.5"] == np.sort(nnz)[119]
    assert [entry["n_cells"] for entry in new.manifest["datasets"]] == [100, 80, 60]
    # the old state, open or opened again, is what it was
    for corpus in (old, Corpus.open(tmp_path / "c", manifest=old.manifest_id)):
        assert corpus.verify(progress=False) == [] and len(corpus) == 100
        assert (corpus.read(slice(None)).X != before.X).nnz == 0
    again = append(tmp_path / "c", study(4), names=["four"])
    assert again.manifest["parent"] == new.manifest_id and len(again) == 340


def test_labels_grow_at_the_end(tmp_path):
    one, two = study(1), study(2)
    two.obs["cell_type"] = two.obs["cell_type"].cat.rename_categories({"type0": "a new type"})
    two.obs["Tissue"] = "liver"
    del two.obs["batch"]
    old = build(one, tmp_path / "c", names=["one"])
    codes = [part.codes("cell_type") for part in old.parts]
    new = append(tmp_path / "c", two, names=["two"])
    assert new.columns["cell_type"] == ["type0", "type1", "type2", "type3", "a new type"]
    assert new.columns["dataset"] == ["one", "two"] and new.columns["Tissue"] == ["liver"]
    for part, before in zip(new.parts, codes, strict=False):
        np.testing.assert_array_equal(part.codes("cell_type"), before)
        assert (part.codes("Tissue") == -1).all()
    obs = new.obs
    assert obs["Tissue"].isna().sum() == 100 and obs["batch"].isna().sum() == 100
    found = obs["cell_type"][obs["dataset"] == "two"].value_counts().to_dict()
    assert {k: v for k, v in found.items() if v} == two.obs["cell_type"].value_counts().to_dict()
    same = build(one, tmp_path / "d", names=["one"], labels=["cell_type"])
    assert list(append(tmp_path / "d", two, names=["two"]).columns) == list(same.columns)
    more = append(tmp_path / "d", study(3), names=["three"], labels=["cell_type", "donor"])
    assert list(more.columns) == ["dataset", "cell_type", "donor"]


def test_the_vocabulary_stays(tmp_path):
    vocabulary = Vocabulary([f"ENSG{i:011d}" for i in range(30)])
    old = build(study(1, n_genes=30), tmp_path / "c", names=["one"], vocabulary=vocabulary)
    two = study(2, n_genes=50)
    new = append(tmp_path / "c", two, names=["two"])
    assert new.vocabulary == old.vocabulary == vocabulary
    entry = new.manifest["datasets"][1]
    assert (entry["genes_matched"], entry["genes_total"]) == (30, 50)
    assert entry["genes_unmatched"] == [f"GENE{i}" for i in range(30, 50)]
    read = new.read(slice(len(old), None))
    of = read.obs["scjax_source_row"].to_numpy()
    np.testing.assert_array_equal(read.X.toarray(), two.X[of, :30].toarray())
    mouse = study(3)
    mouse.var["ensembl_id"] = [f"ENSMUSG{i:011d}" for i in range(40)]
    mouse.var_names = [f"Gm{i}" for i in range(40)]
    with pytest.raises(ValueError, match="0 of 40 genes match the vocabulary of 30 genes; at least 3"):
        append(tmp_path / "c", mouse, names=["mouse"])
    assert Corpus.open(tmp_path / "c").manifest_id == new.manifest_id
    assert not (tmp_path / "c" / ".build").exists()


def test_groups_stay_in_their_split(tmp_path):
    studies = [synthetic_adata(200, 30, n_batches=4, seed=seed) for seed in (1, 2)]
    studies[1].obs["donor"] = (
        studies[1].obs["donor"].cat.rename_categories({"donor6": "new6", "donor7": "new7"})
    )
    old = build(studies[0], tmp_path / "c", names=["one"], validation=0.3, split_by="donor")
    new = append(tmp_path / "c", studies[1], names=["two"])

    def sides(corpus: Corpus) -> dict[str, set[str]]:
        return {
            name: {
                corpus.columns["donor"][code]
                for part in corpus.split(name)
                for code in np.unique(part.codes("donor"))
            }
            for name in ("train", "validation")
        }

    before, after = sides(old), sides(new)
    assert before["train"] <= after["train"] and before["validation"] <= after["validation"]
    assert not after["train"] & after["validation"]
    assert {"new6", "new7"} <= after["train"] | after["validation"]
    groups = new.manifest["split_groups"]
    assert {side: set(groups[side]) for side in groups} == after
    # one new donor after the other: the share that is held out stays near what was asked for
    for number in range(6):
        more = synthetic_adata(50, 30, seed=10 + number)
        more.obs["donor"] = f"late{number}"
        new = append(tmp_path / "c", more, names=[f"late{number}"])
    held = new.manifest["totals"]["validation"] / len(new)
    assert 0.2 < held < 0.4


def test_duplicates_of_old_cells_are_dropped(tmp_path):
    one, two = study(1), study(2)
    x = two.X.tolil()
    x[3], x[50] = one.X[7], x[20]
    two.X = x.tocsr()
    build(one, tmp_path / "c", names=["one"], drop_duplicates=True)
    new = append(tmp_path / "c", two, names=["two"])
    assert new.manifest["datasets"][1]["dropped"] == {"empty": 0, "below_min_genes": 0, "duplicates": 2}
    rows = new.obs.index[new.obs["dataset"] == "two"]
    assert set(range(100)) - set(new.read(rows).obs["scjax_source_row"]) == {3, 50}
    more = append(tmp_path / "c", two, names=["two again"], drop_duplicates=False)
    assert len(more) == len(new) + 100
    with pytest.raises(ValueError, match="drop_duplicates needs the hashes of the old cells, and part"):
        append(tmp_path / "c", study(5), names=["five"])
    with pytest.raises(ValueError, match="none of the cells .* is not there already"):
        build(one, tmp_path / "d", names=["one"], drop_duplicates=True)
        append(tmp_path / "d", one, names=["two"])
    assert Corpus.open(tmp_path / "d").verify(progress=False) == []


def test_options_are_those_of_the_build(tmp_path):
    one, two = study(1), study(2)
    x = two.X.tolil()
    x[4] = 0
    x[4, 2] = 50
    two.X = x.tocsr() * np.float32(0.5)
    one.X = one.X * np.float32(0.5)
    build(one, tmp_path / "c", names=["one"], min_genes=2, allow_non_integer=True, shuffle=False, seed=9)
    new = append(tmp_path / "c", two, names=["two"])
    assert new.manifest["datasets"][1]["dropped"]["below_min_genes"] == 1
    assert new.manifest["shuffled"] is False and new.manifest["seed"] == 9
    rows = new.read(slice(100, None)).obs["scjax_source_row"].to_numpy()
    assert (np.diff(rows) > 0).all()
    mixed = append(tmp_path / "c", two, names=["three"], min_genes=1, shuffle=True)
    assert mixed.manifest["datasets"][2]["dropped"]["below_min_genes"] == 0
    assert mixed.manifest["options"]["min_genes"] == 2


def test_an_append_in_another_order_does_not_decide_on_later_ones(tmp_path):
    build(study(1), tmp_path / "c", names=["one"])
    other = append(tmp_path / "c", study(2), names=["two"], shuffle=False)
    later = append(tmp_path / "c", study(3), names=["three"])
    assert other.manifest["shuffled"] is False and later.manifest["shuffled"] is False
    rows = later.obs["dataset"].to_numpy()
    order = {name: later.read(np.flatnonzero(rows == name)).obs["scjax_source_row"] for name in set(rows)}
    assert {name for name, row in order.items() if row.is_monotonic_increasing} == {"two"}


def test_names_must_be_new(tmp_path):
    build(study(1), tmp_path / "c", names=["one"])
    with pytest.raises(ValueError, match="holds data sets called one already; give the new ones other names"):
        append(tmp_path / "c", study(2), names=["one"])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        append(tmp_path / "nowhere", study(2))


def test_shares_and_processes_append_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RUN_ELEMENTS", 1500)
    files = []
    for seed in (2, 3):
        files.append(tmp_path / f"s{seed}.h5ad")
        study(seed).write_h5ad(files[-1])
    outs = [tmp_path / name for name in "cde"]
    for out in outs:
        build(study(1), out, names=["one"], drop_duplicates=True)
    append(outs[0], files)
    append(outs[1], files, workers=2)
    rounds = 0
    while True:
        rounds += 1
        found = [append(outs[2], files, task=(share, 3)) for share in (2, 0, 1)]
        if any(corpus is not None for corpus in found):
            break
    assert rounds <= 3
    late = append(outs[2], files, task=(0, 3))
    assert late.manifest_id == Corpus.open(outs[0]).manifest_id
    same_bytes(outs[0], outs[1])
    same_bytes(outs[0], outs[2])


def test_a_corpus_that_changed_meanwhile(tmp_path, monkeypatch):
    """HEAD moved, though the lock should not let it: nothing is committed."""
    old = build(study(1), tmp_path / "c", names=["one"])
    whole = commit._manifest

    def moved(job, *args):
        (tmp_path / "c" / "HEAD").write_text("0123456789ab\n")
        return whole(job, *args)

    with monkeypatch.context() as patch:
        patch.setattr(commit, "_manifest", moved)
        with pytest.raises(FileExistsError, match=f"state is 0123456789ab, not {old.manifest_id} as when"):
            append(tmp_path / "c", study(2), names=["two"])
    assert (tmp_path / "c" / "HEAD").read_text() == "0123456789ab\n"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(
            f"FULL DISK NOT TESTED: this process may not mount a small file system ({mount.stderr.strip()})"
        )
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk(small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RUN_ELEMENTS", 100_000)
    x = sparse.random(5000, 200, 0.9, "csr", rng=np.random.default_rng(0))
    x.data = np.ceil(x.data * 200)
    path = tmp_path / "large.h5ad"
    ad.AnnData(x, var=study(1, 1, 200).var).write_h5ad(path)
    outs = small_disk / "c", tmp_path / "clean"
    for out in outs:
        old = build(study(1, n_genes=200), out, names=["one"], part_cells=1000)
    with pytest.raises(OSError, match="the disk is full: .* the same command goes on from there") as caught:
        append(outs[0], path)
    assert caught.value.errno == errno.ENOSPC
    assert Corpus.open(outs[0]).manifest_id == old.manifest_id
    assert Corpus.open(outs[0]).verify(progress=False) == []
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    append(outs[0], path)
    append(outs[1], path)
    same_bytes(*outs)
