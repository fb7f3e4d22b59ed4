"""What must hold for every system in its default settings, and for one that a third party adds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scjax import models
from scjax.config import ConfigError, from_config
from scjax.encoding import mask_genes, row_keys
from scjax.nn import Buffer, abstract, bind, buffers_of, initialise
from scjax.train import RunConfig, decay_mask
from scjax.types import CellBatch

GENES, SLOTS = 60, 48
TINY = {
    "celllm": {"d_model": 16, "n_heads": 2, "d_head": 8, "n_layers": 2, "d_ff": 32, "max_length": 25},
    "geneformer": {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 32, "max_length": 64},
    "scbert": {"d_model": 16, "n_heads": 2, "d_head": 8, "n_layers": 2, "d_ff": 32},
    "scfoundation": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "d_ff": 32,
        "encoder_length": 25,
        "decoder_d_model": 16,
        "decoder_n_heads": 2,
        "decoder_d_head": 8,
        "decoder_n_layers": 2,
        "decoder_d_ff": 32,
        "zero_mask_fraction": 0.2,
        "thinning_min_depth": 50.0,
    },
    "scgpt": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "d_ff": 32,
        "max_length": 33,
        "mask_fractions": (0.5,),
    },
    "test_models:MeanModel": {},
}


@dataclasses.dataclass(frozen=True)
class MeanModelConfig:
    d_model: int = 8


class MeanModel(nnx.Module):
    """The smallest system: hidden log counts predicted from the mean embedding of the shown genes."""

    def __init__(self, config: MeanModelConfig, n_genes: int, *, rngs: nnx.Rngs):
        self.gene = nnx.Embed(n_genes, config.d_model, rngs=rngs)
        self.head = nnx.Linear(2 * config.d_model, 1, rngs=rngs)

    def encode(self, batch, key):
        hidden = mask_genes(batch.gene_id, 0.3, row_keys(key, batch.row))
        return batch.gene_id, jnp.log1p(batch.count), hidden

    def __call__(self, inputs, keys=None):
        gene_id, value, hidden = inputs
        shown = ((gene_id >= 0) & ~hidden) * value
        genes = self.gene(jnp.maximum(gene_id, 0))
        cell = jnp.einsum("bl,ble->be", shown, genes) / jnp.maximum(shown.sum(1, keepdims=True), 1e-6)
        both = jnp.concatenate([genes, jnp.broadcast_to(cell[:, None], genes.shape)], -1)
        return cell, self.head(both)[..., 0]

    def loss(self, batch, key):
        inputs = self.encode(batch, key)
        weight = inputs[2] * batch.weight[:, None]
        error = (weight * (self(inputs)[1] - inputs[1]) ** 2).sum()
        return error, weight.sum(), {"masked_mse": (error, weight.sum())}

    def embed(self, batch):
        return self((batch.gene_id, jnp.log1p(batch.count), batch.gene_id < -1))[0]


def test_every_system_is_tested_here():
    assert set(models.SYSTEMS) <= set(TINY)


def batch_of(n: int = 6, seed: int = 0, slots: int = SLOTS) -> CellBatch:
    rng = np.random.default_rng(seed)
    gene_id = np.full((n, slots), -1, np.int32)
    count = np.zeros((n, slots), np.float32)
    for i in range(n):
        k = rng.integers(10, SLOTS - 4)
        gene_id[i, :k] = rng.choice(GENES, k, replace=False)
        count[i, :k] = rng.poisson(2.0, k) + 1
    return CellBatch(
        gene_id,
        count,
        count.sum(1) + 50,
        (gene_id >= 0).sum(1).astype(np.int32),
        np.arange(100, 100 + n, dtype=np.uint32),
        {},
        {},
        np.ones(n, np.float32),
    )


@pytest.fixture(scope="module", params=sorted(TINY))
def system(request):
    """(abstract model, parameters and buffers with every entry jittered)."""
    model = models.build(request.param, TINY[request.param], GENES, seed=3)
    state = jax.jit(lambda: initialise(model))()
    rng = np.random.default_rng(0)
    state["params"] = jax.tree.map(
        lambda x: x + 0.1 * jnp.asarray(rng.standard_normal(x.shape), x.dtype), state["params"]
    )
    return model, state


@pytest.fixture(scope="module")
def embed(system):
    model, state = system
    jitted = jax.jit(lambda batch: bind(model, state["params"], state["buffers"]).embed(batch))
    return lambda batch: np.asarray(jitted(batch))


@pytest.fixture(scope="module")
def loss(system):
    """batch -> (sums and weights by objective, metric values), dropout as in training."""
    model, state = system

    def run(batch, key):
        total, weight, metrics = bind(model, state["params"], state["buffers"]).loss(batch, key)
        return by_objective(total), by_objective(weight), metrics

    jitted = jax.jit(run)
    return lambda batch, seed=0: jax.tree.map(float, jitted(batch, jax.random.key(seed)))


def by_objective(value):
    return value if isinstance(value, dict) else {"loss": value}


def take(batch: CellBatch, rows) -> CellBatch:
    return jax.tree.map(lambda x: x[rows], batch)


class TestInvariance:
    """A cell's embedding is the same alone, in any batch, under padding and in any order of its genes."""

    def test_batch(self, embed):
        batch = batch_of()
        together = embed(batch)
        assert np.isfinite(together).all() and np.abs(together).max() > 0.05
        np.testing.assert_allclose(embed(take(batch, [2]))[0], together[2], atol=2e-6)
        other = batch_of(seed=9)
        mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), batch, other)
        np.testing.assert_allclose(embed(mixed)[0], together[0], atol=2e-6)
        assert np.abs(embed(mixed)[1] - together[1]).max() > 1e-3

    def test_row_number(self, embed):
        batch = batch_of()
        np.testing.assert_array_equal(embed(batch.replace(row=batch.row + np.uint32(7))), embed(batch))

    def test_padding(self, embed):
        batch = batch_of()
        wide = batch.replace(
            gene_id=np.pad(batch.gene_id, ((0, 0), (0, 20)), constant_values=-1),
            count=np.pad(batch.count, ((0, 0), (0, 20))),
        )
        np.testing.assert_allclose(embed(wide), embed(batch), atol=2e-6)

    def test_gene_order(self, embed):
        batch = batch_of()
        order = np.random.default_rng(1).permutation(SLOTS)
        shuffled = batch.replace(gene_id=batch.gene_id[:, order], count=batch.count[:, order])
        np.testing.assert_allclose(embed(shuffled), embed(batch), atol=2e-6)

    def test_loss_of_a_cell(self, loss):
        """Masks, bins and dropout follow the cell: the loss of a batch is the sum over its cells.

        But for a contrast, which is between the cells of a batch."""
        batch = batch_of()
        total, weight, _ = loss(batch)
        apart = [loss(take(batch, [i])) for i in range(6)]
        for name in set(total) - {"contrast"}:
            np.testing.assert_allclose(sum(a[0][name] for a in apart), total[name], rtol=1e-5)
            assert sum(a[1][name] for a in apart) == weight[name]
        order = np.random.default_rng(1).permutation(SLOTS)
        shuffled = batch.replace(gene_id=batch.gene_id[:, order], count=batch.count[:, order])
        assert loss(shuffled)[1] == weight

    def test_filler_rows_count_for_nothing(self, loss):
        batch = batch_of()
        filled = jax.tree.map(lambda a: np.concatenate([a, a[:2]]), batch)
        filled = filled.replace(weight=np.r_[np.ones(6), 0, 0].astype(np.float32))
        a, b = loss(batch), loss(filled)
        for name in a[0]:
            np.testing.assert_allclose(b[0][name], a[0][name], rtol=1e-5)
        assert b[1] == a[1]
        for name in a[2]:
            np.testing.assert_allclose(b[2][name], a[2][name], rtol=1e-5)

    def test_another_key_is_another_loss(self, loss):
        batch = batch_of()
        assert loss(batch) == loss(batch)
        assert loss(batch, seed=1)[0] != loss(batch)[0]


def test_gradients_reach_every_parameter(system):
    model, state = system

    def total(params):
        loss = bind(model, params, state["buffers"]).loss(batch_of(), jax.random.key(0))[0]
        return sum(by_objective(loss).values())

    gradients = jax.jit(jax.grad(total))(state["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


class TestErrors:
    def test_unknown_system(self):
        with pytest.raises(ValueError, match="did you mean 'scgpt'"):
            models.build("scgtp", {}, GENES)

    def test_unknown_key(self):
        with pytest.raises(ConfigError, match=r"model\.d_modle is unknown; did you mean 'd_model'"):
            models.build("scgpt", {"d_modle": 3}, GENES)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"n_heads": 3}, "n_heads = 3 does not divide"),
            ({"mask_fractions": (0.5, 1.5)}, "between 0 and 1"),
            ({"max_length": 1}, "no room for a gene"),
            ({"norm": "middle"}, "norm"),
        ],
    )
    def test_bad_values(self, changes, message):
        with pytest.raises(ValueError, match=message):
            models.build("scgpt", {**TINY["scgpt"], **changes}, GENES)


@pytest.mark.parametrize(
    "system, changes, message",
    [
        ("scgpt", {"n_bins": 2}, "model.n_bins = 2; it must be at least 3"),
        ("geneformer", {"dropout": 1.0}, "model.dropout = 1.0; it must be from 0 to 0.99"),
        ("celllm", {"dropout": -0.5}, "model.dropout"),
        ("scbert", {"redraw_every": -5}, "model.redraw_every = -5; it must be at least 0"),
        ("scfoundation", {"thinning": 3.0}, "model.thinning"),
        ("scfoundation", {"thinning_beta": (0.0, 1.0)}, "thinning_beta"),
        ("celllm", {"label": "disease", "tumour_codes": (-1,)}, "codes count from 0"),
    ],
)
def test_values_out_of_range(system, changes, message):
    with pytest.raises(ValueError, match=message):
        models.build(system, TINY[system] | changes, GENES)


@pytest.mark.parametrize("system", sorted(models.SYSTEMS))
def test_a_sample_of_genes_is_for_those_that_can_read_one(system):
    config = {"system": system, "model": {}, "data": {"corpus": "x", "batch_size": 8, "max_genes": 100},
              "optimizer": {"learning_rate": 1.0}, "train": {"steps": 1}}  # fmt: skip
    if system in ("scgpt", "geneformer"):
        from_config(RunConfig, config)
    else:
        with pytest.raises(ConfigError, match="reads all genes of a cell"):
            from_config(RunConfig, config)


@pytest.mark.parametrize("system", sorted(models.SYSTEMS))
def test_tables_that_are_looked_up_do_not_decay(system):
    mask = decay_mask(models.build(system, TINY[system], GENES))
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert decays == name.endswith("/kernel"), name
    assert not any(jax.tree.leaves(mask["gene"]))


def test_module_round_trip():
    """Module -> dicts -> module, with buffers apart from parameters and paths free of Flax."""

    class Net(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            self.lin = nnx.Linear(2, 3, rngs=rngs)
            self.seen = Buffer(jnp.zeros(()))

        def __call__(self, x):
            self.seen[...] = self.seen[...] + 1
            return self.lin(x)

    model = abstract(lambda: Net(rngs=nnx.Rngs(0)))
    state = initialise(model)
    assert set(state["params"]) == {"lin"} and set(state["buffers"]) == {"seen"}
    module = bind(model, **state)
    module(jnp.ones((1, 2)))
    assert float(buffers_of(module)["seen"]) == 1 and float(state["buffers"]["seen"]) == 0
