"""Steps compiled before the first batch: the same step, one executable a length, no other shape."""

import itertools
import math
from contextlib import closing

import jax
import numpy as np
import pytest
from flax import nnx
from synthetic import synthetic_adata
from tiny_model import Tiny, TinyConfig

from scjax import build_corpus
from scjax.loader import Loader
from scjax.nn import abstract as abstract_model
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import (
    OptimizerConfig,
    abstract_state,
    compile_ahead,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = tmp_path_factory.mktemp("ahead") / "corpus"
    corpus = build_corpus([synthetic_adata(300, 200)], path, labels=["cell_type"], progress=False)
    loader = Loader(corpus, 16, labels=["cell_type"], n_buckets=2, group_lengths=True)
    assert len(loader.bucket_lengths) == 2
    mesh = make_mesh(MeshConfig(2, 2, 2))
    model = abstract_model(lambda: Tiny(TinyConfig(), len(corpus.vocabulary), rngs=nnx.Rngs(0)))
    tx, _ = make_optimizer(OptimizerConfig(1e-2), 50, model)
    abstract = abstract_state(model, tx, mesh)
    step = make_train_step(model, tx, abstract, seed=0)
    with closing(iter(loader)) as data:
        batches = [place(batch, mesh) for batch in itertools.islice(data, 4)]
    return model, tx, abstract, step, loader, batches


def test_the_same_step(prepared):
    model, tx, abstract, step, loader, batches = prepared
    ahead = compile_ahead(step, abstract, loader)
    assert [length for _, length in ahead.compiled] == list(loader.bucket_lengths)
    states = [init_state(model, tx, abstract) for _ in range(2)]
    for batch in batches:
        before = states[1]
        results = [run(state, batch) for run, state in zip((step, ahead), states, strict=True)]
        states = [state for state, _ in results]
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get(results))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before["params"])), "it is donated"
    assert step._cache_size() == len({batch.shape for batch in batches})


def test_what_a_device_needs(prepared):
    _, _, abstract, step, loader, batches = prepared
    ahead = compile_ahead(step, abstract, loader)
    for length, sizes in ahead.bytes().items():
        batch = next(key for key in ahead.compiled if key[1] == length)
        assert batch == (loader.batch_size, length)
        shards = [
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(abstract)
        ]
        cells = loader.batch_size // 4 * (8 * length + 3 * 4)  # of a quarter of the rows what is read
        assert sizes["arguments"] == sum(shards) + cells
        assert sizes["temporaries"] > 0 and sizes["all"] == sum(sizes.values()) - sizes["all"]
        assert f"{length}: {sizes['all'] / 2**30:.2f}" in str(ahead)


def test_an_unforeseen_shape_is_refused(prepared):
    model, tx, abstract, _, loader, batches = prepared
    ahead = compile_ahead(make_eval_step(model, abstract, seed=0), abstract, loader)
    state = init_state(model, tx, abstract)
    longer = batches[0].replace(gene_id=np.zeros((16, 999), np.int32), count=np.zeros((16, 999), np.float32))
    with pytest.raises(ValueError, match=r"16 x 999.*compiled ahead for 16 x \d+"):
        ahead(state, longer)
    with pytest.raises(ValueError, match=r"labels \[\].*with \['cell_type'\]"):
        ahead(state, batches[0].replace(label={}))
    assert ahead(state, batches[0])["loss"]
