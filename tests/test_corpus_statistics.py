"""Statistics of genes against numpy's on the same cells."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import sparse
from synthetic import synthetic_adata

from scjax.cli.main import main
from scjax.corpus import Corpus, build_corpus
from scjax.corpus import statistics as module

TINY = {"part_cells": 128, "inner": 512, "shard": 2048, "progress": False}


def exact(corpus: Corpus) -> dict[str, np.ndarray]:
    """The definitions, with every value in memory."""
    train = corpus.read(np.concatenate([p.first_row + np.arange(p.n_cells) for p in corpus.split("train")]))
    total = np.concatenate([part.total for part in corpus.split("train")])
    x = train.X.toarray() * (1e4 / total)[:, None]
    codes = train.obs["scjax_dataset"].map(corpus.datasets.index).to_numpy(int)
    measured = corpus.measured_table()[codes]
    n_cells, n_detected = measured.sum(0), (x > 0).sum(0)
    median = np.array([np.median(v[v > 0]) if (v > 0).any() else np.nan for v in x.T])
    with np.errstate(invalid="ignore"):
        mean = x.sum(0) / n_cells
    return {"n_cells": n_cells, "n_detected": n_detected, "mean": mean, "median": median}


@pytest.fixture
def two(tmp_path) -> Corpus:
    """Two studies, the second with 30 genes that the first did not measure; validation cells apart."""
    studies = [synthetic_adata(300, 100, seed=1), synthetic_adata(201, 130, seed=2)]
    studies[0].X = studies[0].X.multiply(np.arange(100) != 7).tocsr()  # a gene that is measured, never seen
    studies[1].X = studies[1].X.multiply(np.arange(130) != 7).tocsr()
    return build_corpus(studies, tmp_path / "c", names=["one", "two"], validation=0.1, seed=3, **TINY)


def test_against_numpy(two, monkeypatch):
    monkeypatch.setattr(module, "RUN_ELEMENTS", 1500)  # several runs a part
    found, expected = two.statistics(progress=False), exact(two)
    for name in ("n_cells", "n_detected"):
        np.testing.assert_array_equal(getattr(found, name), expected[name])
    np.testing.assert_allclose(found.mean, expected["mean"], rtol=1e-12)
    np.testing.assert_allclose(found.median, expected["median"], rtol=module.TOLERANCE)
    assert np.isnan(found.median[7]) and found.mean[7] == 0 == found.detection[7]
    assert len(set(found.n_cells.tolist())) == 2  # the genes of one study and those of both
    np.testing.assert_allclose(found.detection, expected["n_detected"] / expected["n_cells"])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.integers(1, 60), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 30.0, 1e6]))
def test_medians_of_any_cells(n_cells, seed, spread):
    """Few values and many, near together and orders of magnitude apart: both middle values of an even
    number may lie in one bin or in two."""
    rng = np.random.default_rng(seed)
    counts = np.ceil(spread ** rng.uniform(0, 1, (n_cells, 5)) * rng.integers(0, 3, (n_cells, 5)))
    x = sparse.csr_matrix(counts.astype(np.uint32))
    scale = 1e4 / rng.integers(counts.sum(1) + 1, counts.sum(1) + 50)

    @dataclasses.dataclass
    class Cells:  # as much of a corpus as the passes look at
        manifest = {"vocabulary": {"n_genes": 5}}
        datasets = ("one",)

        def measured(self, dataset):
            return np.ones(5, bool)

        def split(self, name):
            return (self,)

        def codes(self, column):
            return np.zeros(n_cells, np.int32)

    cells = Cells()
    cells.n_cells = n_cells
    original = module._runs
    module._runs = lambda part: iter([(x.indices, x.data, x.indptr.astype(np.int64), scale)])
    try:
        found = module._compute(cells, False)
    finally:
        module._runs = original
    value = counts * scale[:, None]
    expected = [np.median(v[v > 0]) if (v > 0).any() else np.nan for v in value.T]
    np.testing.assert_allclose(found.median, expected, rtol=module.TOLERANCE)


class TestCache:
    def test_is_read_and_leaves_the_corpus_whole(self, two, monkeypatch):
        first = two.statistics(progress=False)
        assert two.verify(progress=False) == []
        monkeypatch.setattr(module, "_compute", None)
        again = Corpus.open(two.path).statistics(progress=False)
        for a, b in zip(dataclasses.astuple(first), dataclasses.astuple(again), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_belongs_to_one_state_of_the_corpus(self, two):
        first = two.statistics(progress=False)
        grown = Corpus(
            two.path, "0123456789ab", {**two.manifest, "parts": two.manifest["parts"][1:]}, two.store
        )
        assert grown.statistics(progress=False).n_cells.max() < first.n_cells.max()
        assert len(list((two.path / "statistics").iterdir())) == 2

    @pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", None])
    def test_a_damaged_one_is_counted_anew(self, two, damage):
        first = two.statistics(progress=False)
        (path,) = (two.path / "statistics").iterdir()
        path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
        np.testing.assert_array_equal(two.statistics(progress=False).median, first.median)

    def test_a_corpus_that_cannot_be_written_to(self, two, monkeypatch):
        def refuse(*_):
            raise PermissionError("read-only")

        monkeypatch.setattr(module, "_write_cache", refuse)
        assert np.isfinite(two.statistics(progress=False).mean).all()
        assert not (two.path / "statistics").exists()


def test_command_line(two, tmp_path, capsys):
    table = tmp_path / "genes.tsv"
    assert main(["corpus", "statistics", str(two.path), "--out", str(table)]) == 0
    lines = table.read_text().splitlines()
    assert lines[0].split("\t") == [
        "gene_id",
        "symbol",
        "mean",
        "detection",
        "median",
        "n_detected",
        "n_cells",
    ]
    assert len(lines) == 1 + len(two.vocabulary)
    top = int(two.statistics(progress=False).mean.argmax())
    assert two.vocabulary.ids[top] in capsys.readouterr().out
    assert main(["corpus", "statistics", str(two.path), "--out", str(table)]) == 2  # not without --force
