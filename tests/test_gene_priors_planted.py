"""Planted truth: a graph prior helps exactly when the graph is the one that the cells were made from."""

from __future__ import annotations

import functools

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score
from tabled_model import Tabled, TabledConfig

from scjax.genes import Vocabulary, graph_of, shuffled, spectral
from scjax.genes.autoencoder import _auroc, masked_autoencoder
from scjax.loader import cells
from scjax.models import build
from scjax.nn import bind
from scjax.parallel import MeshConfig, make_mesh
from scjax.train import OptimizerConfig, abstract_state, init_state, make_optimizer, make_train_step


class CentredConfig(TabledConfig):
    pass


class Centred(Tabled):
    """Values are those above the mean of the cell, so that all there is to learn is what goes together."""

    def encode(self, batch, key):
        ids, value, hidden = super().encode(batch, key)
        used = batch.gene_id >= 0
        mean = value.sum(1, keepdims=True) / jnp.maximum(used.sum(1, keepdims=True), 1)
        return ids, jnp.where(used, value - mean, 0.0), hidden


MODULES, OF_EACH, DIM, STEPS = 6, 15, 8, 300
N = MODULES * OF_EACH
NAMES = [f"GENE{i}" for i in range(N)]
MODULE = np.arange(N) % MODULES
UNSEEN = np.arange(N) // MODULES >= 11  # 4 of the 15 genes of each module: never in a training cell


def graph(seed=0, within=0.4, between=0.01):
    rng = np.random.default_rng(seed)
    chance = np.where(MODULE[:, None] == MODULE, within, between)
    a, b = np.nonzero(np.triu(rng.random((N, N)) < chance, 1))
    return graph_of([(NAMES[i], NAMES[j]) for i, j in zip(a, b, strict=True)])


def in_order(network, vectors):
    """[N, dim] of the genes in their order; every gene has an edge."""
    at = {name: i for i, name in enumerate(network.names)}
    return vectors[[at[name] for name in NAMES]]


@functools.cache
def tissue():
    """Training batches without the unseen genes, and test batches; genes of a module go together."""
    rng = np.random.default_rng(1)
    activity = rng.normal(size=(512 + 96, MODULES))
    counts = rng.poisson(np.exp(2.5 + activity[:, MODULE] + 0.3 * rng.normal(size=N)))
    vocabulary, batches = Vocabulary(NAMES), []
    for rows, genes in ((slice(0, 512), ~UNSEEN), (slice(512, None), np.ones(N, bool))):
        X = sparse.csr_matrix(counts[rows] * genes, dtype=np.float32)
        adata = ad.AnnData(X)
        adata.var_names = NAMES
        made = cells(adata, vocabulary, 32, bucket_lengths=[N])
        batches.append([jax.tree.map(np.array, batch) for batch in made])
    return batches


@functools.cache
def compiled():
    config = {"d_model": 16, "dropout": 0.0, "gene_table": {"kind": "projected", "dim": DIM}}
    model = build(f"{__name__}:Centred", config, N)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    tx, _ = make_optimizer(OptimizerConfig(1e-2, warmup_steps=20, schedule="cosine"), STEPS, model)
    abstract = abstract_state(model, tx, mesh)

    @jax.jit
    def predicted(state, batch):
        module = bind(model, state["params"], state["buffers"])
        ids, value, hidden = module.encode(batch, jax.random.key(5))
        cell = module(ids, jnp.where(hidden, 0.0, value))
        return ids, hidden, value, jnp.einsum("ble,be->bl", module.gene(ids), module.query(cell))

    return model, tx, abstract, make_train_step(model, tx, abstract, seed=0), predicted


@functools.cache
def agreement(table: str) -> float:
    """Mean over unseen genes of the correlation, over cells, of hidden values with those predicted."""
    network = graph() if table == "planted" else shuffled(graph(), 3)
    vectors = np.random.default_rng(4).normal(size=(N, DIM)) if table == "noise" else None
    vectors = in_order(network, spectral(network, DIM)) if vectors is None else vectors
    model, tx, abstract, step, predicted = compiled()
    train, test = tissue()
    state = init_state(model, tx, abstract, {"gene/table": vectors, "gene/known": np.ones(N)})
    for i in range(STEPS):
        state, _ = step(state, train[i % len(train)])
    ids, hidden, target, guess = (
        np.concatenate(x) for x in zip(*(predicted(state, b) for b in test), strict=True)
    )
    found = []
    for gene in np.flatnonzero(UNSEEN):
        here = hidden.astype(bool) & (ids == gene)
        found.append(np.corrcoef(target[here], guess[here])[0, 1])
    return float(np.mean(found))


def test_the_planted_graph_helps():
    assert agreement("planted") > 0.6


@pytest.mark.parametrize("control", ["shuffled", "noise"])
def test_its_shuffled_edges_do_not(control):
    assert abs(agreement(control)) < 0.3


@functools.cache
def separation(method: str, shuffle: bool) -> float:
    """How often the gene nearest to a gene is of its module."""
    network = shuffled(graph()) if shuffle else graph()
    if method == "spectral":
        vectors = spectral(network, DIM)
    else:
        vectors, _ = masked_autoencoder(network, 32, steps=150)
    vectors = in_order(network, vectors)
    vectors = vectors - vectors.mean(0)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    near = (unit @ unit.T - 2 * np.eye(N)).argmax(1)
    return float((MODULE[near] == MODULE).mean())


@pytest.mark.parametrize("method", ["spectral", "masked"])
def test_vectors_hold_the_modules_of_the_graph(method):
    assert separation(method, False) > 0.8
    assert separation(method, True) < 0.4


@pytest.mark.parametrize("n", [400, 300_000])
def test_auroc_of_few_and_of_many_edges(n):
    """Against scikit-learn; counts of pairs are beyond int32."""
    rng = np.random.default_rng(0)
    yes, no = rng.normal(0.5, 1, n).astype(np.float32), rng.normal(0, 1, n).astype(np.float32)
    hide, free = rng.random((2, n)) < 0.5
    truth = np.repeat([1, 0], [hide.sum(), free.sum()])
    wanted = roc_auc_score(truth, np.concatenate([yes[hide], no[free]]))
    assert float(_auroc(yes, hide, no, free)) == pytest.approx(wanted, abs=1e-5)


def test_the_autoencoder_is_a_function_of_graph_and_seed():
    small = graph_of([(NAMES[i], NAMES[j]) for i in range(8) for j in range(i) if (i + j) % 3])
    first, again, other = (masked_autoencoder(small, 4, seed, steps=5)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (8, 4) and not jnp.allclose(first, other)
    assert np.square(first).mean() == pytest.approx(1, rel=1e-4)
    with pytest.raises(ValueError, match="it takes 10 edges or more"):
        masked_autoencoder(graph_of([("A", "B")]), 4)
    with pytest.raises(ValueError, match="hidden = 1, steps"):
        masked_autoencoder(small, 4, hidden=1.0)
