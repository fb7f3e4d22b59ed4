"""Runs that begin with the weights of another."""

import pathlib
from contextlib import closing

import jax
import numpy as np
import pandas as pd
import pytest
import runs
from finetuning import base_handle
from synthetic import synthetic_adata

import scjax
from scjax import models
from scjax.config import ConfigError
from scjax.corpus import open_corpus
from scjax.loader import Loader
from scjax.models.wrapper import Wrapper
from scjax.nn import abstract, flatten
from scjax.train import as_begun, checkpoint_steps, start_from

FEW = {"train__steps": 4, "train__checkpoint_every": 2}
TINY = "tests/tiny_config.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("start")
    runs.build_corpus(directory / "corpus")
    runs.pretrain(
        TINY, directory / "first", cache=directory / "cache", data__corpus=directory / "corpus", **FEW
    )
    return directory


def test_continued_pretraining_begins_where_the_other_ended(place):
    options = {"cache": place / "cache", "data__corpus": place / "corpus", "start": place / "first"}
    # a rate that moves nothing: what is found afterwards is what the run began with
    still = {"optimizer__learning_rate": 1e-30, "optimizer__weight_decay": 0.0}
    output = runs.pretrain(TINY, place / "second", **options, **FEW, **still)
    assert f"begins with {place / 'first'}" in output
    first, second = scjax.load(place / "first"), scjax.load(place / "second")
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert second.categories["dataset"] == ["study"]
    # resumed with other weights to begin with, it is another run
    runs.pretrain(TINY, place / "other", **options | {"start": place / "second"}, **FEW)
    output = runs.pretrain(
        TINY, place / "second", **options | {"start": place / "other"}, **FEW, succeed=False
    )
    assert "start: " in output.splitlines()[-1]
    assert checkpoint_steps(place / "second" / "checkpoints") == [2, 4]


def test_a_start_that_does_not_fit_is_told(place):
    first = scjax.load(place / "first")
    n = len(first.vocabulary)
    with pytest.raises(ConfigError, match=r"has the shape \(49, 16\).*and \(48, 16\)"):
        start_from(models.build(first.system, first.config, n - 1), first.params, first.buffers)
    more = first.params | {"surplus": {"kernel": np.zeros(3)}}
    with pytest.raises(ConfigError, match="surplus/kernel, which the model as configured has not"):
        start_from(models.build(first.system, first.config, n), more, first.buffers)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two, of other tissues, and with the panel in another order."""
    folder, paths = tmp_path_factory.mktemp("numbers"), []
    for i, tissues in enumerate((["lung", "blood"], ["bone", "lung"])):
        cells = synthetic_adata(40, 48, seed=i)
        cells.obs["tissue"] = np.array(tissues)[np.arange(40) % 2]
        counts = {"CD3": np.arange(40.0), "CD4": -np.arange(40.0)}
        cells.obsm["protein"] = pd.DataFrame(counts, cells.obs_names)
        paths.append(folder / f"c{i}")
        scjax.build_corpus(
            [cells],
            paths[-1],
            names=["s"],
            labels=["tissue"],
            values=["protein"],
            progress=False,
            workers=1,
        )
    return paths


class TestNumbersOfTheOther:
    """Codes and places in panels are those that the model to begin with was trained with."""

    TOKENS = {"tissue": {"kind": "label", "size": 3}, "protein": {"kind": "features", "size": 2}}
    KNOWN = {"tissue": ["blood", "lung"], "protein": ["CD4", "CD3"]}

    def read(self, corpus, labels=("tissue",)):
        """(tissues of the cells by the names that a model with these categories has, batches)"""
        loader = Loader(corpus, 20, labels=labels, values=["protein"], epochs=1, seed=0)
        codes, values, rows = [], [], []
        for batch in loader:
            there = batch.weight > 0
            codes.append(batch.label["tissue"][there].copy())
            values.append(batch.value["protein"][there].copy())
            rows.append(batch.row[there].copy())
        order = np.argsort(np.concatenate(rows))
        return np.concatenate(codes)[order], np.concatenate(values)[order]

    def test_codes_are_those_of_the_other(self, corpora):
        config = {"context": self.TOKENS}
        for paths in (corpora[1], corpora):  # a corpus, a mixture
            corpus = open_corpus(paths)
            found = as_begun(corpus, config, config, self.KNOWN)
            assert found.columns["tissue"] == ["blood", "lung", "bone"] and len(found) == len(corpus)
            codes, values = self.read(found)
            names = corpus.obs["tissue"].astype(str).to_numpy()
            assert (np.array(found.columns["tissue"])[codes] == names).all()
            assert (found.obs["tissue"].astype(str) == names).all() and set(names) >= {"lung", "bone"}
            own = self.read(corpus)[1]  # CD3, CD4
            np.testing.assert_array_equal(values, own[:, ::-1])
            # the same cells in the same order, and a cursor of the one is one of the other
            assert (
                Loader(found, 20, labels=["tissue"])._recipe == Loader(corpus, 20, labels=["tissue"])._recipe
            )

    def test_what_is_not_known_is_told(self, corpora):
        corpus, full = open_corpus(corpora[1]), {"context": {"tissue": {"kind": "label", "size": 2}}}
        with pytest.raises(ConfigError, match="'bone', which the model .* nor is there room"):
            as_begun(corpus, full, full, {"tissue": ["blood", "lung"]})
        roomy = {"context": self.TOKENS}
        with pytest.raises(ConfigError, match="has 'bone'.*did you mean 'bones'"):
            as_begun(corpus, roomy, roomy, {"tissue": ["bones", "lung"]}, lambda field: False)
        with pytest.raises(ConfigError, match="does not say which category of 'tissue'"):
            as_begun(corpus, roomy, roomy, {})
        with pytest.raises(
            ConfigError, match="none of the 2 features of 'protein' in the corpus, such as 'CD3'"
        ):
            as_begun(corpus, roomy, roomy, self.KNOWN | {"protein": ["CD19", "CD20"]})
        assert as_begun(corpus, roomy, {"context": {}}, {}) is corpus  # the token is new

    def test_a_label_that_the_corpus_lacks_is_unknown(self, corpora):
        token = {"context": {"assay": {"kind": "label", "size": 2}}}
        found = as_begun(open_corpus(corpora[1]), token, token, {"assay": ["a", "b"]})
        loader = Loader(found, 20, labels=["assay", "tissue"])
        with closing(iter(loader)) as batches:
            assert (next(batches).label["assay"] == -1).all()


def test_continued_pretraining_keeps_the_numbers_of_the_other(place, corpora, tmp_path):
    told = {"context": {"tissue": {"kind": "label", "size": 3}}}
    known = {"tissue": ["lung", "blood"], "assay": ["10x"]}
    base = base_handle(tmp_path, told, known)
    scjax.export_pretrained(base, tmp_path / "base")
    config = pathlib.Path(tmp_path / "config.py")
    fields = {"system": "scgpt", "model": dict(base.config), "start": str(tmp_path / "base"), "seed": 0}
    fields["data"] = {"corpus": str(corpora[1]), "batch_size": 20, "labels": ("tissue",)}
    fields |= {"optimizer": {"learning_rate": 1e-3}, "train": {"steps": 1}}
    config.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({fields!r})\n"
    )
    runs.pretrain(str(config), tmp_path / "run", cache=place / "cache")
    # of bone and lung, which the corpus has, lung is what it was; bone is new
    found = scjax.load(tmp_path / "run")
    assert found.categories == {"tissue": ["lung", "blood", "bone"], "assay": ["10x"]}
    moved = [np.abs(x["context"]["token"]["tissue"]["embedding"]) for x in (found.params, base.params)]
    assert ((moved[0] != moved[1]).any(1) == [True, False, True]).all()


def test_a_wrapper_holds_its_base_at_the_same_paths(place):
    from flax import nnx

    first = scjax.load(place / "first")
    n = len(first.vocabulary)

    class Headed(Wrapper):
        def __init__(self, rngs):
            super().__init__(first.system, first.config, n, rngs=rngs)
            self.head = nnx.Linear(2, 3, rngs=rngs)

    start = start_from(abstract(lambda: Headed(nnx.Rngs(0))), first.params, first.buffers, prefix="base/")
    assert start.values.keys() == {f"base/{path}" for path in flatten(first.params) | flatten(first.buffers)}
    assert set(start.fresh) == {"head/kernel", "head/bias"} and "head/kernel" in start.note
