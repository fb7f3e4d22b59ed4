"""Modalities beside RNA: what is hidden, what a cell's result hangs on, layouts, resuming, bad input."""

import functools
from contextlib import closing

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from multimodal import FEATURES, batch_of, config, drawn, fresh, handle, run, simulate, trainer

from scjax import models
from scjax.config import ConfigError, from_config
from scjax.models.modalities import MultimodalConfig, attach, embed, predict
from scjax.nn import bind
from scjax.train import Checkpoints

SYSTEM = "scjax.models.modalities:Multimodal"


@functools.cache
def built(system="scgpt"):
    of = trainer(system=system)
    params, buffers = fresh(of)
    names = ("hide", "embed", "predict", "loss")
    run = {
        name: jax.jit(lambda *given, name=name: getattr(bind(of.model, params, buffers), name)(*given))
        for name in names
    }
    return lambda name, *given: jax.tree.map(np.asarray, run[name](*given))


@functools.cache
def some():
    batch = batch_of(simulate(12))
    protein = batch.value["protein"].copy()
    protein[3], protein[4, 2] = np.nan, np.nan  # a cell without, and a study that lacks one
    return batch.replace(value=batch.value | {"protein": protein})


def take(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


# ------------------------------------------------------------------------------- what is hidden
def test_every_cell_keeps_one_of_its_modalities():
    batch = batch_of(simulate(300))
    batch.value["protein"][:50] = np.nan
    shown, hidden = built()("hide", batch, jax.random.key(3))
    rna = (shown.gene_id >= 0).any(1)
    seen = {name: ~np.isnan(shown.value[name]) for name in FEATURES}
    kept = np.stack([rna, seen["protein"].any(1), seen["chromatin"].any(1)])
    assert kept.any(0).all() and not kept[1, :50].any()
    whole = [1 - rna.mean(), 1 - kept[1, 50:].mean(), 1 - kept[2].mean()]
    assert all(0.2 < share < 0.45 for share in whole), whole  # a third always stays, of the others half
    alone = ~seen["chromatin"][kept[2]]
    assert 0.25 < alone.mean() < 0.35  # single features of those that are not hidden
    assert (shown.depth[~rna] == 0).all() and (shown.count[~rna] == 0).all()
    np.testing.assert_array_equal(hidden["rna"][:, 0], ~rna)
    only = batch.replace(value={name: np.full_like(x, np.nan) for name, x in batch.value.items()})
    assert not built()("hide", only, jax.random.key(3))[1]["rna"].any()
    other = built()("hide", batch, jax.random.key(4))[0]
    assert (other.gene_id != shown.gene_id).any()


def test_what_is_hidden_is_not_seen():
    """Whatever a hidden count is, cells look the same; but their likelihood does not."""
    batch = batch_of(simulate(300))
    shown, hidden = built()("hide", batch, jax.random.key(0))
    wild = {name: np.where(hidden[name], x + 7, x) for name, x in batch.value.items()}
    again, _ = built()("hide", batch.replace(value=wild), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, again, shown)


# ------------------------------------------------------------------------------- invariances
def test_a_cell_hangs_on_itself():
    batch = some()
    together = built()("embed", batch)
    assert np.isfinite(together).all()
    order = np.random.default_rng(0).permutation(batch.gene_id.shape[1])
    wide = {"gene_id": np.pad(batch.gene_id, ((0, 0), (0, 5)), constant_values=-1)}
    wide["count"] = np.pad(batch.count, ((0, 0), (0, 5)))
    for other in (
        take(batch, np.arange(12)[::-1]),
        batch.replace(gene_id=batch.gene_id[:, order], count=batch.count[:, order]),
        batch.replace(**wide),
    ):
        found = built()("embed", other)
        found = found[::-1] if other.row[0] != batch.row[0] else found
        np.testing.assert_allclose(found, together, atol=5e-6)
    # a value that is not there is one that is unknown
    chromatin = batch.value["chromatin"]
    unknown = {"protein": np.full_like(batch.value["protein"], np.nan), "chromatin": chromatin}
    without = built()("embed", batch.replace(value={"chromatin": chromatin}))
    np.testing.assert_allclose(built()("embed", batch.replace(value=unknown)), without, atol=5e-6)
    np.testing.assert_allclose(without[3], together[3], atol=5e-6)
    assert np.abs(without[0] - together[0]).max() > 1e-3


def test_the_loss_is_the_sum_over_cells():
    batch, key = some(), jax.random.key(1)
    total, weight, metrics = built()("loss", batch, key)
    halves = [take(batch, rows) for rows in (slice(0, 6), slice(6, 12))]
    apart = [built()("loss", half, key) for half in halves]
    assert set(total) == {"rna", "protein", "chromatin", "base_objective"}
    for name in total:
        np.testing.assert_allclose(sum(a[0][name] for a in apart), total[name], rtol=2e-5)
        assert sum(a[1][name] for a in apart) == weight[name] > 0
    filled = jax.tree.map(lambda x: np.concatenate([x, x[:2]]), batch)
    filled = filled.replace(weight=np.r_[np.ones(12), 0, 0].astype(np.float32))
    again = built()("loss", filled, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), again[:2], (total, weight))
    for name in metrics:
        np.testing.assert_allclose(again[2][name], metrics[name], rtol=2e-5, err_msg=name)


@pytest.mark.full
@pytest.mark.parametrize("system", sorted(set(models.SYSTEMS) - {"scgpt"}))
def test_any_system_is_a_base(system):
    """Also in cells of which no RNA is known."""
    total, weight, _ = built(system)("loss", some(), jax.random.key(1))
    assert {"rna", "protein", "chromatin"} < set(total)
    assert all(np.isfinite(x) for x in (*total.values(), *weight.values()))
    batch = some()
    dark = batch.replace(
        gene_id=np.full_like(batch.gene_id, -1), count=0 * batch.count, depth=0 * batch.depth
    )
    found = built(system)("embed", dark)
    assert np.isfinite(found).all() and np.abs(found[0] - found[1]).max() > 1e-3


# ------------------------------------------------------------------- layouts, parts, resuming
@functools.cache
def cells():
    return list(drawn(batch_of(simulate(80)), 4, size=16))


@functools.cache
def whole():
    of = trainer(objective_weight=0.0)
    return of, *run(of, cells())


def test_the_layout_changes_nothing():
    losses = run(trainer((2, 2, 2), objective_weight=0.0), cells())[0]
    np.testing.assert_allclose(losses, whole()[1], rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("accumulate", [1, 2])
def test_neither_do_parts_of_a_batch_nor_the_base_s_own_objective(accumulate):
    losses = run(trainer((4, 2, 1), accumulate=accumulate), cells())[0]
    np.testing.assert_allclose(losses, run(trainer(), cells())[0], rtol=1e-5)


def test_resumes_exactly(tmp_path):
    of, losses, state = whole()
    _, half = run(of, cells()[:2])
    with closing(Checkpoints(tmp_path / "checkpoints", {})) as checkpoints:
        checkpoints.save(2, half, {})
        checkpoints.wait()
        restored = checkpoints.restore(of.abstract)
    rest, resumed = run(of, cells()[2:], restored.state)
    assert rest == losses[2:]
    jax.tree.map(np.testing.assert_array_equal, resumed, state)


# ------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "changes, says",
    [
        ({"modalities": {}}, "at least one"),
        ({"modalities": {"rna": {"size": 3}}}, "'rna' stands for the genes"),
        ({"base": {"system": "scgpt"}}, r"model.base has \['system'\]"),
        ({"dropout": 1.5}, "model.dropout = 1.5"),
        ({"modalities": {"protein": {"sizes": 3}}}, "did you mean 'size'"),
        ({"modalities": {"protein": {"size": 0}}}, "size = 0"),
        ({"modalities": {"p": {"size": 3, "likelihood": "bernoulli", "background": True}}}, "background"),
    ],
)
def test_configs_that_cannot_be(changes, says):
    with pytest.raises(ConfigError, match=says):
        from_config(MultimodalConfig, config() | changes, where="config.model")


def test_batches_that_lack_a_modality_or_have_another_panel():
    batch, key = some(), jax.random.key(0)
    with pytest.raises(ConfigError, match=r"has 'protein', but batches carry the values \['proteins'\]"):
        built()("loss", batch.replace(value={"proteins": batch.value["protein"]}), key)
    value = batch.value | {"protein": batch.value["protein"][:, :5]}
    with pytest.raises(ConfigError, match=r"5 features in the data; model.modalities.protein.size is 6"):
        built()("loss", batch.replace(value=value), key)
    protein = batch.value["protein"].copy()
    protein[0] = 1.5
    total, _, _ = built()("loss", batch.replace(value=batch.value | {"protein": protein}), key)
    assert np.isnan(total["protein"]) and np.isfinite(total["chromatin"])


def test_modalities_of_other_cells():
    cells = simulate(20)
    table = cells.obsm["protein"]
    with pytest.raises(ValueError, match=r"no cell of 'adt' is in adata: .*'x-cell0'.*'cell0'"):
        attach(cells, table.rename(index="x-{}".format), "adt")
    with pytest.raises(ValueError, match="'cell3' is there more than once"):
        attach(cells, table.iloc[[3, 3, 4]], "adt")
    for bad in (-2.0, 0.5, np.inf):
        wrong = table.copy()
        wrong.loc["cell5", "P1"] = bad
        with pytest.raises(ValueError, match=f"adt: cell 'cell5' has {bad:g} for 'P1'"):
            attach(cells, wrong, "adt")
    assert "adt" not in cells.obsm
    other = ad.AnnData(table.iloc[10:].to_numpy(), table.iloc[10:][[]], pd.DataFrame(index=table.columns))
    attach(cells, other[::-1].copy(), "adt")
    np.testing.assert_array_equal(cells.obsm["adt"].iloc[10:], table.iloc[10:])
    assert cells.obsm["adt"].iloc[:10].isna().all(axis=None)


def test_all_that_embeds_reads_all_modalities():
    """``scjax.embed``, reference indices and evaluation go by ``Model.embed``."""
    of = trainer()
    params, buffers = fresh(of)
    model = handle(of, {"params": params, "buffers": buffers, "step": jnp.zeros(())})
    cells = simulate(20)
    own = cells.copy()
    embed(own, model, key_added="joint")
    np.testing.assert_allclose(model.embed(cells), own.obsm["joint"], atol=1e-5)
    assert np.abs(model.embed(cells, context=False) - own.obsm["joint"]).max() > 1e-3


def test_predictions_that_cannot_be():
    of = trainer()
    params, buffers = fresh(of)
    model = handle(of, {"params": params, "buffers": buffers, "step": jnp.zeros(())})
    cells = simulate(20)
    with pytest.raises(ValueError, match="not 'proteins'; did you mean 'protein'"):
        predict(cells, model, "proteins")
    with pytest.raises(ValueError, match="is to be foretold and is among the sources"):
        predict(cells, model, "rna", sources=["rna"])
    with pytest.raises(ValueError, match="'adt' is not to be read: the model knows"):
        predict(cells, model, "rna", sources=["adt"])
    cells.obsm["protein"] = cells.obsm["protein"].rename(columns={"P3": "P33"})
    with pytest.raises(
        ValueError, match=r"1 features that the model does not know, as 'P33'; did you mean 'P3'"
    ):
        predict(cells, model, "rna")
    cells.obsm["protein"] = np.full((20, 6), 0.5)
    with pytest.raises(ValueError, match="cell 'cell0' has 0.5 for 'P0'"):
        predict(cells, model, "rna")
    del cells.obsm["protein"], cells.obsm["chromatin"]
    with pytest.raises(ValueError, match="nothing to read"):
        predict(cells, model, "rna")
