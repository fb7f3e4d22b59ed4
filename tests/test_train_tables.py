"""Tables of genes in a run: read, refused, recorded, resumed, and in the checkpoint when it is loaded."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

import scjax
from scjax import models
from scjax.config import ConfigError
from scjax.corpus import Corpus
from scjax.genes import Vocabulary
from scjax.nn import shapes_of
from scjax.parallel import MeshConfig, make_mesh
from scjax.train import OptimizerConfig, abstract_state, gene_tables, init_state, make_optimizer

SYSTEM = "tabled_model:Tabled"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a corpus, a file of vectors for 40 of its 48 genes and one of medians for 3."""
    folder = tmp_path_factory.mktemp("tables")
    runs.build_corpus(folder / "corpus")
    symbols = Corpus.open(folder / "corpus").vocabulary.symbols
    write_vectors(folder / "vectors.tsv", symbols[:40])
    (folder / "medians.json").write_text(json.dumps(dict(zip(symbols, (2.0, 3.0, 4.0), strict=False))))
    return folder


def write_vectors(path, names, width=5, seed=0):
    values = np.random.default_rng(seed).normal(size=(len(names), width)).astype(np.float32)
    rows = ("\t".join([name, *map(repr, row.tolist())]) for name, row in zip(names, values, strict=True))
    path.write_text("\n".join(rows) + "\n")
    return values


def read(place, sources, config=None, vocabulary=None, system=SYSTEM):
    corpus = Corpus.open(place / "corpus")
    vocabulary = vocabulary or corpus.vocabulary
    model = models.build(system, config or {}, len(vocabulary))
    sources = {name: source and str(source) for name, source in sources.items()}
    return gene_tables(system, config or {}, sources, model, vocabulary, corpus), model, vocabulary


class TestReading:
    def test_vectors_and_the_medians_of_the_corpus(self, place):
        tables, model, vocabulary = read(place, {"gene": place / "vectors.tsv"})
        shapes = shapes_of(model)["buffers"]
        assert set(tables.buffers) == {"median", "gene/table", "gene/known"}
        assert tables.buffers["gene/table"].shape == shapes["gene"]["table"].shape == (48, 5)
        assert tables.buffers["gene/known"].sum() == 40
        names = vocabulary.symbols[:40]
        rows = tables.buffers["gene/table"][[vocabulary.id_of(name) for name in names]]
        np.testing.assert_array_equal(rows, write_vectors(place / "again.tsv", names))
        expected = Corpus.open(place / "corpus").statistics().median
        seen = np.isfinite(expected)
        np.testing.assert_allclose(tables.buffers["median"][seen], expected[seen], rtol=1e-6)
        assert len(np.unique(expected[seen])) > 20
        assert "40 of 48 genes" in tables.notes[0] and "corpus" in tables.notes[1]

    def test_medians_of_the_corpus_in_another_vocabulary(self, place):
        """Some of the genes, in another order, by symbol, and one that the corpus does not have."""
        there = Corpus.open(place / "corpus").vocabulary
        pick = [30, 2, 17]
        genes = [*(there.symbols[i] for i in pick), "ELSEWHERE"]
        tables, _, _ = read(place, {}, {"gene_table": {"kind": "random"}}, Vocabulary(genes))
        expected = Corpus.open(place / "corpus").statistics().median[pick]
        np.testing.assert_allclose(tables.buffers["median"], [*expected, 0.0], rtol=1e-6)

    def test_medians_of_a_file(self, place):
        sources = {"median": place / "medians.json"}
        tables, _, vocabulary = read(place, sources, {"gene_table": {"kind": "random"}})
        assert set(tables.buffers) == {"median"}
        at = [vocabulary.id_of(name) for name in json.loads((place / "medians.json").read_text())]
        assert tables.buffers["median"][at].tolist() == [2, 3, 4]
        assert tables.buffers["median"].sum() == 9  # 0 where there is none

    def test_a_system_without_tables(self, place):
        tables, _, _ = read(place, {"gene": None}, system="tiny_model:Tiny")
        assert tables.buffers == {} and tables.sources == {} and tables.notes == ()

    def test_the_hash_is_of_the_values(self, place):
        """Another place, format and order of the same vectors is the same table; another value is not."""
        here, _, vocabulary = read(place, {"gene": place / "vectors.tsv"})
        names = vocabulary.symbols[:40]
        values = write_vectors(place / "again.tsv", names)
        np.savez(place / "moved.npz", names=np.array(names[::-1]), vectors=values[::-1])
        moved, _, _ = read(place, {"gene": place / "moved.npz"})
        values[3, 2] += 1e-3
        np.savez(place / "changed.npz", names=np.array(names), vectors=values)
        changed, _, _ = read(place, {"gene": place / "changed.npz"})
        hashes = [t.sources["gene"]["sha256"] for t in (here, moved, changed)]
        assert hashes[0] == hashes[1] != hashes[2]
        assert [t.sources["median"]["source"] for t in (here, moved)] == ["corpus", "corpus"]
        assert moved.sources["gene"]["source"] == str(place / "moved.npz")

    def test_errors(self, place, monkeypatch):
        def computed(self, **_):
            raise AssertionError("nothing is computed before everything else is known to be right")

        monkeypatch.setattr(Corpus, "statistics", computed)
        for source in (None, "", "corpus"):
            with pytest.raises(ConfigError, match=r"needs a vector.*--config.tables.gene=FILE"):
                read(place, {"gene": source})
        with pytest.raises(ConfigError, match="config.tables.gen is not a table .* did you mean 'gene'"):
            read(place, {"gen": place / "vectors.tsv"})
        with pytest.raises(ConfigError, match=r"config.tables.gene is not .* it takes none"):
            read(place, {"gene": place / "vectors.tsv"}, system="tiny_model:Tiny")
        with pytest.raises(ValueError, match=r"vectors of width 5, the model as configured takes 7"):
            read(place, {"gene": place / "vectors.tsv"}, {"gene_table": {"dim": 7, "kind": "projected"}})
        with pytest.raises(FileNotFoundError, match=r"nowhere.tsv: no such file"):
            read(place, {"gene": place / "nowhere.tsv"})


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_state_starts_with_them(place, shape):
    tables, model, _ = read(place, {"gene": place / "vectors.tsv"})
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    tx, _ = make_optimizer(OptimizerConfig(1e-3, warmup_steps=1), 3, model)
    abstract = abstract_state(model, tx, mesh)
    state = init_state(model, tx, abstract, tables.buffers)
    np.testing.assert_array_equal(state["buffers"]["gene"]["table"], tables.buffers["gene/table"])
    np.testing.assert_array_equal(state["buffers"]["median"], tables.buffers["median"])
    same = jax.tree.map(lambda x, a: x.dtype == a.dtype and x.sharding == a.sharding, state, abstract)
    assert jax.tree.all(same)
    plain = init_state(model, tx, abstract)
    assert not jnp.any(plain["buffers"]["gene"]["table"])
    jax.tree.map(np.testing.assert_array_equal, plain["params"], state["params"])


def options_of(place, **overrides):
    base = {"cache": place / "cache", "data__corpus": place / "corpus", "train__steps": 4}
    return base | {"train__checkpoint_every": 2, "tables__gene": place / "vectors.tsv"} | overrides


@pytest.fixture(scope="module")
def run(place):
    workdir = place / "run"
    output = runs.pretrain("tests/tabled_config.py", workdir, **options_of(place))
    assert f"table gene: {place / 'vectors.tsv'}: 40 of 48 genes (40 by symbol)" in output
    return workdir


class TestARun:
    def test_is_loaded_without_the_file(self, place, run, tmp_path):
        import shutil

        alone = tmp_path / "run"
        shutil.copytree(run, alone)
        shutil.rmtree(alone / "checkpoints" / "2")
        model = scjax.load(alone)
        tables, _, _ = read(place, {"gene": place / "vectors.tsv"})
        np.testing.assert_array_equal(model.buffers["gene"]["table"], tables.buffers["gene/table"])
        np.testing.assert_array_equal(model.buffers["median"], tables.buffers["median"])
        about = json.loads((run / "model.json").read_text())["tables"]
        assert about["gene"]["source"] == str(place / "vectors.tsv") and about == tables.sources

        from synthetic import synthetic_adata

        twin, cells = model.random_twin(), synthetic_adata(5, 48)
        jax.tree.map(np.testing.assert_array_equal, twin.buffers, model.buffers)
        assert not np.allclose(
            twin.params["gene"]["projection"]["kernel"], model.params["gene"]["projection"]["kernel"]
        )
        assert np.abs(twin.embed(cells) - model.embed(cells)).max() > 1e-3
        assert twin._embed is model._embed
        assert model._embed._cache_size() == 1  # the twin is the same function of other arrays
        vectors = model.gene_embedding()
        assert vectors.shape == (48, 16)
        known = tables.buffers["gene/known"] > 0
        projection = model.params["gene"]["projection"]
        expected = tables.buffers["gene/table"] @ projection["kernel"] + projection["bias"]
        np.testing.assert_allclose(vectors[known], expected[known], atol=1e-6)
        np.testing.assert_array_equal(vectors[~known], model.params["gene"]["fallback"][:48][~known])

    def test_is_not_resumed_with_another_table(self, place, run):
        names = Corpus.open(place / "corpus").vocabulary.symbols
        write_vectors(place / "other.tsv", names[:40], seed=1)
        before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
        options = options_of(place, tables__gene=place / "other.tsv")
        output = runs.pretrain("tests/tabled_config.py", run, succeed=False, **options)
        assert "tables.gene: sha256 " in output.splitlines()[-1] and "median" not in output.splitlines()[-1]
        options = options_of(place, tables__median=place / "medians.json")
        output = runs.pretrain("tests/tabled_config.py", run, succeed=False, **options)
        assert "tables.median: sha256 " in output.splitlines()[-1]
        assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before
        # the same table elsewhere goes on
        (place / "moved.tsv").write_bytes((place / "vectors.tsv").read_bytes())
        options = options_of(place, tables__gene=place / "moved.tsv", train__steps=6)
        assert "steps 4 to 6" in runs.pretrain("tests/tabled_config.py", run, **options)

    def test_needs_its_table(self, place):
        options = options_of(place)
        del options["tables__gene"]
        output = runs.pretrain("tests/tabled_config.py", place / "never", succeed=False, **options)
        assert "--config.tables.gene=FILE" in output.splitlines()[-1]
        assert not (place / "never").exists()
