"""Runs that begin with the weights of another."""

import jax
import numpy as np
import pytest
import runs

import scjax
from scjax import models
from scjax.config import ConfigError
from scjax.models.wrapper import Wrapper
from scjax.nn import abstract, flatten
from scjax.train import checkpoint_steps, start_from

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
