"""What must hold for every system in its default settings, and for one that a third party adds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scjax import models
from scjax.config import ConfigError
from scjax.encoding import mask_genes, row_keys
from scjax.models.scgpt import Tokens
from scjax.nn import Buffer, abstract, axes_of, bind, buffers_of, initialise, shapes_of
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
    "scgpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 32, "max_length": 33},
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


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)], ids=str)
def test_the_mesh_changes_nothing(shape):
    """scGPT, dropout and all: the losses of three steps on any layout are those on one device."""
    from scjax.parallel import MeshConfig, make_mesh, place
    from scjax.train import OptimizerConfig, abstract_state, init_state, make_optimizer, make_train_step

    def losses(mesh):
        model = models.build("scgpt", TINY["scgpt"], GENES)
        tx, _ = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), 3, model)
        abstract = abstract_state(model, tx, mesh)
        state, step = init_state(model, tx, abstract), make_train_step(model, tx, abstract, seed=0)
        values = []
        for number in range(3):
            state, metrics = step(state, place(batch_of(16, seed=number), mesh))
            values.append(float(metrics["loss"][0] / metrics["loss"][1]))
        assert step._cache_size() == 1
        return values

    alone = losses(make_mesh(MeshConfig(data=1), devices=jax.devices()[:1]))
    spread = losses(make_mesh(MeshConfig(*shape)))
    np.testing.assert_allclose(spread, alone, rtol=1e-5)


def test_gradients_reach_every_parameter(system):
    model, state = system

    def total(params):
        loss = bind(model, params, state["buffers"]).loss(batch_of(), jax.random.key(0))[0]
        return sum(by_objective(loss).values())

    gradients = jax.jit(jax.grad(total))(state["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@functools.cache
def fresh_state(norm="post"):
    model = models.build("scgpt", {**TINY["scgpt"], "norm": norm}, GENES)
    return jax.jit(lambda: initialise(model))()


def jitted(model, state, method):
    """The named method as a compiled function of a batch and a key; returns (its result, buffers after)."""

    @jax.jit
    def run(batch, *args):
        module = bind(model, **state)
        return getattr(module, method)(batch, *args), buffers_of(module)

    return run


class TestScGPT:
    def build(self, **changes):
        return models.build("scgpt", {**TINY["scgpt"], **changes}, GENES), fresh_state(
            changes.get("norm", "post")
        )

    def test_parameter_count_of_the_published_model(self):
        """51,330,049 with a flag embedding of 2 x 512 that this objective does not have."""
        model = models.build("scgpt", {}, 60_694)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model)["params"]))
        assert count == 51_330_049 - 2 * 512

    def test_axes_name_every_dimension(self):
        model, _ = self.build()
        axes = axes_of(model)["params"]
        assert axes["gene"]["embedding"] == ("vocab", "embed")
        assert axes["transformer"]["blocks"]["attention"]["qkv"]["kernel"] == (
            "layers",
            "embed",
            None,
            "heads",
            "head",
        )
        assert axes["transformer"]["blocks"]["down"]["kernel"] == ("layers", "mlp", "embed")

    @pytest.mark.parametrize("fractions", [(0.5,), (0.25, 0.5, 0.75)])
    def test_encode(self, fractions):
        model, state = self.build(mask_fractions=fractions)
        tokens, _ = jitted(model, state, "encode")(batch_of(200), jax.random.key(0))
        gene_id, hidden = np.asarray(tokens.gene_id), np.asarray(tokens.hidden)
        assert gene_id.shape == (200, 32)
        n, k = (gene_id >= 0).sum(1), hidden.sum(1)
        shares = {f: (k == np.floor(n * f + 1e-4)) for f in fractions}
        assert np.logical_or.reduce(list(shares.values())).all()
        for share in shares.values():
            assert share.mean() > 0.2
        assert not hidden[gene_id < 0].any()
        assert (np.diff(hidden.astype(int), axis=1) <= 0).all()  # hidden ones first
        value, target = np.asarray(tokens.value), np.asarray(tokens.target)
        assert (value[hidden] == -1).all()
        np.testing.assert_array_equal(value[~hidden], target[~hidden])
        assert (target[gene_id >= 0] >= 1).all() and target.max() <= 50

    @pytest.mark.parametrize("changes", [{"value_scale": 1 / 50}, {"values": "log1p"}])
    def test_an_embedding_takes_the_most_expressed_genes(self, changes):
        model, state = self.build(max_length=9, **changes)
        batch = batch_of()
        count = batch.count + np.where(batch.gene_id >= 0, batch.gene_id / 1000, 0).astype(
            np.float32
        )  # no ties
        top = np.argsort(-count, axis=1)[:, :8]
        cut = jax.tree.map(np.asarray, batch.replace(count=count))
        # the same cells, where values of the other genes are needed for the bins but cannot be chosen
        run = jitted(model, state, "embed")
        whole = np.asarray(run(cut)[0])
        longer, _ = self.build(max_length=200, **changes)
        values = np.asarray(bind(longer, **state).values(cut, None))
        module = bind(longer, **state)
        by_hand = Tokens(*(np.take_along_axis(x, top, 1) for x in (cut.gene_id, values, values)), top < 0)
        cell, _ = module(by_hand)
        np.testing.assert_allclose(whole, cell / jnp.linalg.norm(cell, axis=1, keepdims=True), atol=2e-6)

    def test_bins_are_ranks_in_the_whole_cell(self):
        """The bin of a gene does not depend on which other genes are kept."""
        model, state = self.build(tie="mid", max_length=9)
        batch = batch_of()
        tokens, _ = jitted(model, state, "encode")(batch, jax.random.key(0))
        bins = np.asarray(bind(model, **state).values(batch, None))
        for i in range(6):
            of = dict(zip(batch.gene_id[i].tolist(), bins[i].tolist(), strict=True))
            kept = np.asarray(tokens.gene_id[i])
            assert [of[g] for g in kept.tolist()] == np.asarray(tokens.target[i]).tolist()

    def test_hidden_values_do_not_leak(self):
        model, state = self.build(dropout=0.0)
        tokens, _ = jitted(model, state, "encode")(batch_of(), jax.random.key(0))
        changed = dataclasses.replace(tokens, target=jnp.where(tokens.hidden, 7.0, tokens.target))
        run = jitted(model, state, "__call__")
        for a, b in zip(run(tokens)[0], run(changed)[0], strict=True):
            np.testing.assert_array_equal(a, b)

    def test_gene_mean_baseline_is_the_running_mean(self):
        model, state = self.build(tie="mid", max_length=SLOTS + 1, mask_fractions=(0.4,))
        module = bind(model, **state)
        loss = jax.jit(
            lambda buffers, batch: (
                m := bind(model, state["params"], buffers),
                m.loss(batch, jax.random.key(0)),
                buffers_of(m),
            )[2]
        )
        buffers = state["buffers"]
        sums, counts = np.zeros(GENES), np.zeros(GENES)
        for seed in range(3):
            batch = batch_of(seed=seed).replace(weight=np.array([1, 1, 1, 1, 1, 0], np.float32))
            buffers = loss(buffers, batch)
            bins = np.asarray(module.values(batch, None))
            on = (batch.gene_id >= 0) & (batch.weight[:, None] > 0)
            np.add.at(sums, batch.gene_id[on], bins[on])
            np.add.at(counts, batch.gene_id[on], 1)
        np.testing.assert_allclose(buffers["target_sum"], sums, rtol=1e-6)
        np.testing.assert_array_equal(buffers["target_count"], counts)
        seen = np.flatnonzero(counts)
        module = bind(model, state["params"], buffers)
        np.testing.assert_allclose(module.gene_mean(seen), sums[seen] / counts[seen], rtol=1e-6)

    def test_dropout_is_off_for_evaluation(self):
        model, state = self.build(dropout=0.5)
        run = jitted(model, state, "loss")
        noisy = [float(run(batch_of(), jax.random.key(k))[0][0]) for k in (0, 0, 1)]
        assert noisy[0] == noisy[1] != noisy[2]

        @jax.jit
        def evaluate(batch, key):
            module = bind(model, **state)
            module.eval()
            return module.loss(batch, key)[:2]

        quiet, weight = evaluate(batch_of(), jax.random.key(0))
        without, _ = self.build(dropout=0.0)
        expected = jitted(without, state, "loss")(batch_of(), jax.random.key(0))[0][0]
        np.testing.assert_allclose(quiet, expected, rtol=1e-6)
        assert float(quiet) != noisy[0] and float(weight) > 0

    def test_bfloat16_is_close_to_float32(self):
        model, state = self.build()
        half, _ = self.build(dtype="bfloat16")
        a, b = (np.asarray(jitted(m, state, "embed")(batch_of())[0]) for m in (model, half))
        assert b.dtype == np.float32
        assert (a * b).sum(1).min() > 0.999

    @pytest.mark.parametrize(
        "changes",
        [
            {"norm": "pre"},
            {"remat": "full"},
            {"remat": "dots"},
            {"attention": "einsum"},
            {"attention": "cellwise"},
        ],
    )
    def test_variants_have_a_loss_and_gradients(self, changes):
        model, state = self.build(dropout=0.0, **changes)
        plain, _ = self.build(dropout=0.0)

        def total(params, which):
            return bind(which, params, state["buffers"]).loss(batch_of(), jax.random.key(0))[0]

        value, gradient = jax.jit(jax.value_and_grad(lambda p: total(p, model)))(state["params"])
        assert np.isfinite(value)
        if "norm" not in changes:  # the others change how it is computed, not what
            expected, expected_gradient = jax.jit(jax.value_and_grad(lambda p: total(p, plain)))(
                state["params"]
            )
            np.testing.assert_allclose(value, expected, rtol=1e-5)
            for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-3 * max(1.0, float(jnp.abs(b).max())))


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
