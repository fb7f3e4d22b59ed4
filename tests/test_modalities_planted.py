"""One modality is foretold from another where both follow one truth, and not where cells are shuffled."""

import functools

import jax
import numpy as np
import pytest
from multimodal import FEATURES, GENES, batch_of, drawn, handle, run, simulate, trainer

from scjax.models.modalities import predict
from scjax.nn import bind

STEPS = 250


@functools.cache
def shared():
    return trainer(steps=STEPS, objective_weight=0.0)


@functools.cache
def trained(shuffled):
    of = shared()
    losses, state = run(of, drawn(batch_of(simulate(600, shuffled=shuffled)), STEPS, size=32))
    assert np.isfinite(losses).all() and of.step._cache_size() == 1
    return state


@functools.cache
def held_out():
    return simulate(250, seed=9)


@functools.cache
def function():
    def both(params, buffers, batch):
        module = bind(shared().model, params, buffers)
        module.eval()
        return module.predict(batch), module.embed(batch)

    return jax.jit(both)


@functools.cache
def foretold(shuffled, *sources):
    """(predictions by name, embedding) of held-out cells of which only the sources are known."""
    batch, state = batch_of(held_out()), trained(shuffled)
    if "rna" not in sources:
        nothing = {name: np.zeros_like(getattr(batch, name)) for name in ("count", "depth", "n_genes")}
        batch = batch.replace(gene_id=np.full_like(batch.gene_id, -1), **nothing)
    value = {name: x if name in sources else np.full_like(x, np.nan) for name, x in batch.value.items()}
    found = function()(state["params"], state["buffers"], batch.replace(value=value))
    return jax.tree.map(np.asarray, found)


def truth_of(name):
    counts = (held_out().to_df() if name == "rna" else held_out().obsm[name]).to_numpy()
    return counts if name == "chromatin" else log_ratio(counts)


def log_ratio(counts):
    return np.log1p(counts) - np.log1p(counts).mean(1, keepdims=True)


def kind():
    return held_out().obs["cell_type"].cat.codes.to_numpy()


def correlation(guess, truth):
    """Median over features of the correlation across held-out cells."""
    return float(np.median([np.corrcoef(g, t)[0, 1] for g, t in zip(guess.T, truth.T, strict=True)]))


def quality(shuffled, name, sources):
    """(correlation, error as a share of that of these very cells' means)"""
    guess, truth = foretold(shuffled, *sources)[0][name], truth_of(name)
    guess = guess if name == "chromatin" else log_ratio(guess)
    return correlation(guess, truth), ((truth - guess) ** 2).mean() / ((truth - truth.mean(0)) ** 2).mean()


@pytest.mark.parametrize(
    "name, sources", [("protein", ("rna",)), ("chromatin", ("rna",)), ("rna", ("protein", "chromatin"))]
)
def test_foretold_from_the_other_and_not_where_cells_are_shuffled(name, sources):
    truth = truth_of(name)
    oracle = np.stack([truth[kind() == k].mean(0) for k in range(4)])[kind()]
    best = correlation(oracle, truth)  # what knowing the type, and nothing else to know, would give
    found, error = quality(False, name, sources)
    assert found > 0.7 * best and error < 0.85, (found, best, error)
    found, error = quality(True, name, sources)
    assert abs(found) < 0.25 * best and error > 0.95, (found, best, error)


def test_the_embedding_joins_what_there_is():
    """Types are told apart from either modality, and with both no worse than from one."""
    kept = {}
    for sources in (("rna",), ("protein",), ("rna", "protein", "chromatin")):
        X = foretold(False, *sources)[1]
        near = ((X[125:, None] - X[None, :125]) ** 2).sum(-1).argmin(1)
        kept[sources] = float((kind()[:125][near] == kind()[125:]).mean())
    assert min(kept.values()) > 0.6, kept
    assert kept["rna", "protein", "chromatin"] >= max(kept.values()) - 0.05, kept


def test_the_face_reads_anndata_and_writes_tables():
    cells, model = held_out().copy(), handle(shared(), trained(False))
    predict(cells, model, "protein", sources=["rna"], batch_size=128)
    guess = cells.obsm["scjax_protein"]
    assert list(guess.columns) == FEATURES["protein"] and list(guess.index) == list(cells.obs_names)
    np.testing.assert_allclose(guess, foretold(False, "rna")[0]["protein"], rtol=1e-4)
    total = guess.sum(axis=1)
    assert np.ptp(total) < 1e-3 * total.mean()  # how deep a cell is sequenced is not foretold
    assert 0.5 < total.mean() / cells.obsm["protein"].sum(axis=1).median() < 2
    del cells.obsm["scjax_protein"], cells.obsm["chromatin"]
    cells.X = cells.X.log1p()  # what is foretold is not read
    predict(cells, model, "rna", batch_size=250, key_added="guess")
    assert cells.obsm["guess"].shape == (250, GENES)
    assert list(cells.obsm["guess"].columns) == model.vocabulary.ids
    np.testing.assert_allclose(cells.obsm["guess"], foretold(False, "protein")[0]["rna"], rtol=1e-4)
