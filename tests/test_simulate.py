"""The simulator of counts, its corpora of links, and the benchmark of loaders on what it makes."""

import json
import pathlib
import subprocess
import sys

import anndata as ad
import numpy as np
import pytest
import simulate_corpus as simulator

from scjax.corpus import Corpus, build_corpus
from scjax.loader import Loader

TOOLS = pathlib.Path(__file__).parent.parent / "tools"
SMALL = {"part_cells": 400, "inner": 2**10, "shard": 2**14, "progress": False}


@pytest.fixture(scope="module")
def study():
    return simulator.plan(1200, 600, datasets=5, types=8, seed=3)


@pytest.fixture(scope="module")
def files(study, tmp_path_factory):
    return simulator.simulate(tmp_path_factory.mktemp("sim"), study)


@pytest.fixture(scope="module")
def corpus(files, tmp_path_factory):
    return build_corpus(files, tmp_path_factory.mktemp("sim") / "corpus", **SMALL)


def counts(study, first=0, last=None):
    n, gene, count = (np.concatenate(x) for x in zip(*simulator.draw(study, first, last), strict=True))
    return n, gene, count


def test_counts_look_like_counts(study):
    n, gene, count = counts(study)
    assert len(n) == 1200 and n.sum() == len(gene) == len(count)
    begins = np.cumsum(n) - n
    within = np.ones(len(gene), bool)
    within[begins] = False
    assert (np.diff(gene.astype(int), prepend=-1)[within] > 0).all() and gene.max() < 600
    total = np.add.reduceat(count.astype(int), begins)
    np.testing.assert_array_equal(total, study.depth)  # no molecule is lost
    assert 0.5 < (count == 1).mean() < 0.85
    # Zipf: the tenth of the genes that is expressed most holds most of the molecules
    by_gene = np.bincount(gene, count, 600)
    assert np.sort(by_gene)[-60:].sum() > 0.4 * by_gene.sum()
    # counts of one cell type vary more than Poisson's would
    x = np.zeros((1200, 600))
    x[np.repeat(np.arange(1200), n), gene] = count
    same = x[study.type_of == np.bincount(study.type_of).argmax()]
    share = same / same.sum(1, keepdims=True)
    top = np.argsort(share.mean(0))[-20:]
    poisson = (share.mean(0) * (1 / same.sum(1)).mean())[top]
    assert np.median(share.var(0)[top] / poisson) > 1.5


def test_cells_lie_as_studies_deliver_them(study):
    obs = study.obs
    codes = obs["dataset"].cat.codes.to_numpy()
    assert (np.diff(codes) >= 0).all() and len(np.unique(codes)) == 5
    sizes = np.bincount(codes)
    assert sizes.max() > 1.5 * sizes.min()
    assert (np.diff(obs["donor"].cat.codes) >= 0).all()
    assert (obs["cell_type"] == "unknown").any() and obs["cell_type"].nunique() > 4
    assert (np.diff(study.type_of[codes == codes[0]]) < 0).any()  # types are mixed


def test_the_seed_decides_and_nothing_else(study):
    whole = counts(study)
    again = counts(simulator.plan(1200, 600, datasets=5, types=8, seed=3))
    other = counts(simulator.plan(1200, 600, datasets=5, types=8, seed=4))
    assert all((a == b).all() for a, b in zip(whole, again, strict=True))
    assert whole[1].shape != other[1].shape or (whole[1] != other[1]).any()
    part = counts(study, 500, 700)
    np.testing.assert_array_equal(part[0], whole[0][500:700])
    low, high = whole[0][:500].sum(), whole[0][:700].sum()
    np.testing.assert_array_equal(part[2], whole[2][low:high])


def test_files_are_as_in_the_wild_and_hold_the_counts(study, files, tmp_path):
    assert len(files) == 5
    parts = [ad.read_h5ad(path) for path in files]
    x = np.concatenate([part.X.toarray() for part in parts])
    n, gene, count = counts(study)
    expected = np.zeros((1200, 600))
    expected[np.repeat(np.arange(1200), n), gene] = count
    np.testing.assert_array_equal(x, expected)
    assert {part.X.dtype for part in parts} == {np.dtype(np.float32)}
    assert {part.X.indices.dtype for part in parts} == {np.dtype(np.int32)}
    assert [name for part in parts for name in part.obs_names] == list(study.obs.index)
    (packed,) = simulator.simulate(tmp_path, study, gzip=True, one_file=True)
    one = ad.read_h5ad(packed)
    np.testing.assert_array_equal(one.X.toarray(), expected)
    assert packed.stat().st_size < sum(path.stat().st_size for path in files)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="every data set needs a cell"):
        simulator.plan(3, 600, datasets=5)


def test_a_corpus_of_links_is_read_like_any_other(corpus, tmp_path):
    out = tmp_path / "virtual"
    cells = simulator.virtual_corpus(corpus.path, out, 10_000)
    virtual = Corpus.open(out)
    assert 10_000 <= cells == len(virtual) < 10_000 + len(corpus)
    assert len({part.id for part in virtual.parts}) == len(virtual.parts)
    times = -(-cells // len(corpus))
    rows = np.array([len(corpus) * (times - 2) + 7, 5, len(corpus) + 6])
    x = virtual.read(rows).X.toarray()
    np.testing.assert_array_equal(x, corpus.read(rows % len(corpus)).X.toarray())
    batch = next(iter(Loader(virtual, 64, prefetch=0)))
    stored = corpus.read(batch.row.astype(np.int64) % len(corpus)).X
    np.testing.assert_array_equal(batch.n_genes, np.diff(stored.indptr))
    np.testing.assert_allclose(batch.depth, stored.toarray().sum(1))
    with pytest.raises(FileExistsError):
        simulator.virtual_corpus(corpus.path, out, 10_000)


def test_the_benchmark_runs_and_tells_what_it_left_out(corpus, files, tmp_path):
    big = tmp_path / "big"
    simulator.virtual_corpus(corpus.path, big, 5000)
    table = tmp_path / "table.md"
    names = "floor,csr,padded,csr-big,backed,scdl"
    command = [sys.executable, TOOLS / "bench_loader.py", corpus.path, "--h5ad", files[0], "--virtual", big]
    command += ["--rounds", "1", "--seconds", "0.1", "--warm-up", "0", "--batch-size", "32"]
    command += ["--slots", "128", "--only", names, "--markdown", table, "--scdl", tmp_path / "scdl"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    by_name = {line["what"]: line for line in lines}
    assert [line["what"] for line in lines] == [*names.split(","), "medians"]
    ran = [name for name in by_name if name != "medians" and "skipped" not in by_name[name]]
    assert set(ran) >= {"floor", "csr", "padded", "csr-big", "backed"}
    assert all(by_name[name]["cells"] > 0 for name in ran)
    assert by_name["csr-big"]["corpus_cells"] >= 5000 > by_name["csr"]["corpus_cells"] == len(corpus)
    medians = by_name["medians"]
    assert set(ran) <= set(medians) and medians["floor"]["cells_per_s_of_floor"] == 1
    rows = table.read_text().splitlines()
    assert len(rows) == 2 + len(ran) and rows[2].startswith("| floor | ")
    if "scdl" not in ran:
        assert "bionemo" in by_name["scdl"]["skipped"]
