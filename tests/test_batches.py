"""Batch correction: an adversary on any system, normalisation by each cell's own batch, their config."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import optax
import pandas as pd
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from synthetic import synthetic_adata

import scjax
from scjax import models
from scjax.api import Model
from scjax.loader import cells
from scjax.nn import bind, initialise

SCGPT = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16, "max_length": 33, "dropout": 0.0}
SCGPT |= {"value_scale": 0.02, "tie": "mid", "objective": "masked"}
BY_BATCH = {"batch_norm": "domain", "n_batches": 2, "batch_label": "batch"}
N_GENES = 100


def two_batches(n: int = 256, seed: int = 0):
    """Four planted types in two batches, the second of which reads a third of all genes far higher."""
    adata = synthetic_adata(n, seed=seed)
    counts = adata.X.toarray()
    second = (adata.obs["batch"] == "batch1").to_numpy()
    counts[np.ix_(second, np.arange(0, N_GENES, 3))] *= 4
    adata.X = sparse.csr_matrix(counts)
    return adata


def as_batch(adata):
    vocabulary = scjax.Vocabulary.from_anndata([adata])
    return next(cells(adata, vocabulary, adata.n_obs, labels=["batch"])), vocabulary


def read_off(X: np.ndarray, y: pd.Series) -> float:
    """Accuracy of a linear probe on the other half of the cells."""
    half = len(X) // 2
    X = (X - X.mean(0)) / (X.std(0) + 1e-6)
    return LogisticRegression(max_iter=500).fit(X[:half], y[:half]).score(X[half:], y[half:])


def test_an_adversary_hides_the_batch_and_leaves_the_types():
    """For a system that knows nothing of batches; without the reversal the same head brings the batch out."""
    adata = two_batches()
    batch, _ = as_batch(adata)
    found = {}
    for reverse in (0.0, 1.0):
        task = {"kind": "classes", "size": 2, "hidden": (16,), "reverse": reverse, "weight": 0.3}
        config = {
            "base": {"system": "tiny_model:Tiny", "model": {"d_model": 16, "dropout": 0.0}},
            "tasks": {"batch": task},
            "train": "all",
            "objective_weight": 1.0,
        }
        model = models.build("scjax.finetune.model:Finetuned", config, N_GENES)
        state = initialise(model)
        tx = optax.adam(5e-3)

        def loss(params, buffers, key, model=model):
            sums, weights, _ = bind(model, params, buffers).loss(batch, key)
            return sum(sums[name] / weights[name] for name in sums)

        @jax.jit
        def train(params, buffers, tx=tx, loss=loss):
            def step(carry, key):
                params, opt = carry
                updates, opt = tx.update(jax.grad(loss)(params, buffers, key), opt, params)
                return (optax.apply_updates(params, updates), opt), None

            keys = jax.random.split(jax.random.key(1), 300)
            return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

        module = bind(model, train(state["params"], state["buffers"]), state["buffers"])
        module.eval()
        X = np.asarray(module.embed(batch))
        found[reverse] = {name: read_off(X, adata.obs[name]) for name in ("batch", "cell_type")}
    assert found[0.0]["batch"] > 0.97
    assert found[1.0]["batch"] < found[0.0]["batch"] - 0.1
    assert found[1.0]["cell_type"] > 0.9


@pytest.fixture(scope="module")
def by_batch():
    """A model that normalises by batch, its running statistics brought up to the cells of two batches."""
    adata = two_batches(32)
    batch, vocabulary = as_batch(adata)
    model = models.build("scgpt", SCGPT | BY_BATCH, N_GENES)
    state = initialise(model)

    @jax.jit
    def after(buffers):
        module = bind(model, state["params"], buffers)
        module.loss(batch, jax.random.key(0))
        return {name: getattr(module.domain_norm, name)[...] for name in ("mean", "var")}

    buffers = state["buffers"]
    for _ in range(40):
        moved = after(buffers)
        buffers = buffers | {"domain_norm": moved}
    handle = Model("scgpt", SCGPT | BY_BATCH, vocabulary, state["params"], buffers, 1, Path("."))
    return adata, handle


def test_each_cell_is_normalised_by_its_own_batch_whoever_stands_beside_it(by_batch):
    """Upstream normalised all cells as of the batch of the first."""
    adata, model = by_batch
    told = {"labels": ["batch"], "categories": {"batch": ["batch0", "batch1"]}}
    mixed = next(cells(adata, model.vocabulary, 64, **told))
    assert {0, 1} <= set(np.asarray(mixed.label["batch"]).tolist())
    together = np.asarray(model._embed(model.params, model.buffers, mixed))
    backwards = jax.tree.map(lambda x: x[::-1], mixed)
    np.testing.assert_allclose(
        np.asarray(model._embed(model.params, model.buffers, backwards))[::-1], together, atol=2e-6
    )
    swapped = mixed.replace(label={"batch": 1 - np.asarray(mixed.label["batch"])})
    other = np.asarray(model._embed(model.params, model.buffers, swapped))
    assert np.abs(other - together)[: adata.n_obs].max() > 1e-3  # the batch is read, and read per row


def test_embed_tells_the_model_the_batches_of_an_anndata(by_batch):
    adata, model = by_batch
    model.categories.update(batch=["batch1", "batch0"])  # codes of the run, not of the AnnData
    scjax.embed(adata, model, key_added="told")
    scjax.embed(adata, model, key_added="untold", context=False)
    told = {"labels": ["batch"], "categories": model.categories}
    batch = next(cells(adata, model.vocabulary, 64, **told))  # as many at a time as scjax.embed takes
    expected = np.asarray(model._embed(model.params, model.buffers, batch))[: adata.n_obs]
    np.testing.assert_allclose(adata.obsm["told"], expected, atol=2e-6)
    assert np.abs(adata.obsm["told"] - adata.obsm["untold"]).max() > 1e-3
    wrong = adata[:4].copy()
    wrong.obs["batch"] = "batch2"
    with pytest.raises(ValueError, match="batch2"):
        scjax.embed(wrong, model)


@pytest.mark.parametrize("arg", ["none", "token", "dab", "norm", "token+dab+norm", "smoke"])
def test_the_config_builds_what_its_argument_names(arg):
    file = Path(__file__).parents[1] / "configs" / "batches.py"
    spec = importlib.util.spec_from_file_location("batches_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    paths = paths_of(config)
    everything = arg in ("smoke", "token+dab+norm")
    assert any("context" in path for path in paths) == (everything or arg == "token")
    assert any("heads/dataset" in path for path in paths) == (everything or arg == "dab")
    assert any("domain_norm" in path for path in paths) == (everything or arg == "norm")
    with pytest.raises(ValueError, match="joined by"):
        module.get_config("none+token")


def paths_of(config) -> list[str]:
    """Paths of the parameters and buffers of the model of a config file."""
    from scjax.nn.module import flatten, shapes_of

    shapes = shapes_of(models.build(config.system, config.model.to_dict(), 50))
    return [*flatten(shapes["params"]), *flatten(shapes["buffers"])]
