"""scFoundation's encoding, objective and outputs; what holds for every system is in test_models.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scjax import models
from scjax.models.scfoundation import ScFoundation, ScFoundationConfig
from scjax.nn import bind, buffers_of, initialise
from scjax.nn.embedder import GeneTable
from scjax.nn.soft_bins import SoftBins
from scjax.types import CellBatch

GENES, SLOTS = 60, 40
TINY = {
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 1,
    "d_ff": 32,
    "dropout": 0.0,
    "decoder_d_model": 16,
    "decoder_n_heads": 2,
    "decoder_d_head": 8,
    "decoder_n_layers": 2,
    "decoder_d_ff": 32,
    "n_bins": 12,
    "zero_mask_fraction": 0.2,
    "thinning_min_depth": 50.0,
}


def batch_of(n=6, seed=0):
    rng = np.random.default_rng(seed)
    gene_id, count = np.full((n, SLOTS), -1, np.int32), np.zeros((n, SLOTS), np.float32)
    for i in range(n):
        k = rng.integers(10, SLOTS)
        gene_id[i, :k] = rng.choice(GENES, k, replace=False)
        count[i, :k] = rng.poisson(3.0, k) + 1
    n_genes, row = (gene_id >= 0).sum(1).astype(np.int32), np.arange(n, dtype=np.uint32)
    return CellBatch(gene_id, count, count.sum(1) + 9, n_genes, row, {}, {}, np.ones(n, np.float32))


@functools.cache
def state_of(**changes):
    model = models.build("scfoundation", {**TINY, **changes}, GENES)
    state = jax.jit(lambda: initialise(model))()
    rng = np.random.default_rng(0)
    noisy = lambda x: x + 0.2 * jnp.asarray(rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    return {"params": jax.tree.map(noisy, state["params"]), "buffers": state["buffers"]}


def module_of(**changes):
    """The same parameters whatever is changed that does not shape them."""
    shaping = {k: v for k, v in changes.items() if k in ("n_outputs", "gene_table")}
    module = bind(models.build("scfoundation", {**TINY, **changes}, GENES), **state_of(**shaping))
    module.eval()
    return module


def encoded(n=300, seed=0, **changes):
    module = module_of(**changes)
    batch = batch_of(n)
    return batch, jax.tree.map(np.asarray, jax.jit(module.encode)(batch, jax.random.key(seed)))


def call(module, name, *args, **options):
    """The named method, compiled; eagerly its loops would be compiled one by one."""
    return jax.tree.map(np.asarray, jax.jit(lambda: getattr(module, name)(*args, **options))())


def lognorm(batch):
    dense = np.zeros((len(batch.count), GENES))
    for row, ids, count in zip(dense, batch.gene_id, batch.count, strict=True):
        row[ids[ids >= 0]] = count[ids >= 0]
    return np.log1p(dense / dense.sum(1, keepdims=True) * 1e4)


class TestEncode:
    def test_hidden_and_shown_genes(self):
        """Without thinning: 3 in 10 expressed genes, rounded up, 2 in 10 others, rounded down, are hidden."""
        batch, tokens = encoded(thinning=0.0)
        truth = lognorm(batch)
        for i in range(300):
            ids = tokens.direct_id[i]
            assert len(set(ids[ids >= 0])) == (ids >= 0).sum()
            expressed = set(batch.gene_id[i][batch.gene_id[i] >= 0])
            hidden, zeros = set(ids[ids >= 0]) & expressed, set(ids[ids >= 0]) - expressed
            assert len(hidden) == np.ceil(0.3 * len(expressed) - 1e-4)
            assert len(zeros) == np.floor(0.2 * (GENES - len(expressed)) + 1e-4)
            shown = tokens.gene_id[i][tokens.gene_id[i] >= 0]
            assert len(set(shown)) == len(shown) and set(shown) == expressed - hidden
            on = tokens.gene_id[i] >= 0
            np.testing.assert_allclose(tokens.value[i][on], truth[i, shown], rtol=1e-5)
            np.testing.assert_allclose(tokens.target[i][ids >= 0], truth[i, ids[ids >= 0]], rtol=1e-5)
        total = np.log10(batch.count.sum(1))
        np.testing.assert_allclose(tokens.depth, np.stack([total, total], 1), rtol=1e-6)

    def test_every_gene_is_hidden_equally_often(self):
        batch, tokens = encoded(2000, thinning=0.0)
        truth = lognorm(batch)
        hidden = np.zeros((2000, GENES + 1), bool)
        np.put_along_axis(hidden, tokens.direct_id, True, 1)
        for on, share in ((truth > 0, 0.3), (truth == 0, 0.2)):
            rate = (hidden[:, :GENES] & on).sum(0) / on.sum(0)
            assert abs(rate.mean() - share) < 0.04 and rate.std() < 0.03

    def test_what_the_decoder_is_shown(self):
        batch, tokens = encoded(2000, thinning=0.0)
        truth, on = lognorm(batch), tokens.direct_id >= 0
        own = np.isclose(tokens.direct_value, np.take_along_axis(truth, np.maximum(tokens.direct_id, 0), 1))
        hidden, left = tokens.direct_hidden & on, ~tokens.direct_hidden & on
        assert abs(hidden.sum() / on.sum() - 0.8) < 0.01
        assert abs((left & own).sum() / on.sum() - 0.1) < 0.01
        random = (left & ~own) * tokens.direct_value / truth.max(1, keepdims=True)
        assert random.max() < 1 and abs(random[random > 0].mean() - 0.5) < 0.02

    def test_thinned_cells(self):
        """Targets and T are those of the whole cell, inputs and S of the thinned one."""
        batch, tokens = encoded(thinning=1.0)
        truth, total = lognorm(batch), batch.count.sum(1)
        deep = total > 50
        assert 0 < deep.sum() < 300
        t, s = tokens.depth.T
        np.testing.assert_allclose(t, np.log10(total), rtol=1e-6)
        np.testing.assert_allclose(s[~deep], t[~deep], rtol=1e-6)
        assert (s[deep] <= t[deep]).all() and (s[deep] < t[deep] - 0.1).mean() > 0.5
        on = tokens.direct_id[:, : tokens.target.shape[1]] >= 0
        expected = np.take_along_axis(truth, np.maximum(tokens.direct_id, 0), 1)
        np.testing.assert_allclose(tokens.target[on], expected[on], rtol=1e-5)
        # some of the genes that lost their last count are among the zeros to predict
        others = tokens.direct_id[:, 13:] >= 0  # the first 13 of 40 slots are for expressed genes
        assert ((tokens.target[:, 13:] > 0) & others)[deep].any()
        assert not ((tokens.target[:, 13:] > 0) & others)[~deep].any()

    def test_genes_beyond_the_encoder(self):
        batch = batch_of()
        module = module_of(encoder_length=8)
        tokens = call(module, "whole", batch)
        truth = lognorm(batch)
        assert tokens.gene_id.shape == (6, 8) and not tokens.direct_hidden.any()
        for i in range(6):
            rest = tokens.direct_id[i][tokens.direct_id[i] >= 0]
            assert set(rest) | set(tokens.gene_id[i]) == set(np.flatnonzero(truth[i]))
            assert truth[i, tokens.gene_id[i]].min() >= truth[i, rest].max()
            np.testing.assert_allclose(
                tokens.direct_value[i][tokens.direct_id[i] >= 0], truth[i, rest], rtol=1e-5
            )
        _, tokens = encoded(thinning=0.0, encoder_length=8)
        assert tokens.target.shape[1] < tokens.direct_id.shape[1]
        assert (tokens.direct_value[:, tokens.target.shape[1] :] > 0).any()


class TestNetwork:
    def test_hidden_values_do_not_leak(self):
        module = module_of()
        tokens = jax.jit(module.encode)(batch_of(), jax.random.key(0))
        value = jnp.where(tokens.direct_hidden, 7.0, tokens.direct_value)
        run = jax.jit(lambda t: module(t)[1])
        same = dataclasses.replace(tokens, direct_value=value, target=tokens.target + 1)
        np.testing.assert_array_equal(run(tokens), run(same))
        other = dataclasses.replace(tokens, direct_value=value + 1)
        assert np.abs(run(tokens) - run(other)).max() > 1e-3

    def test_maps_over_cells_change_nothing(self):
        batch, params = batch_of(), state_of()["params"]

        def run(decoding):
            model = models.build("scfoundation", {**TINY, "decoding": decoding}, GENES)
            total = lambda p: bind(model, p, state_of()["buffers"]).loss(batch, jax.random.key(0))[0]  # noqa: E731
            return jax.jit(jax.value_and_grad(total))(params)

        (a, da), (b, db) = run("batched"), run("cellwise")
        np.testing.assert_allclose(a, b, rtol=1e-5)
        for x, y in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4 * max(1.0, float(jnp.abs(x).max())))

    def test_depth_to_be_thought_of(self):
        module, batch = module_of(), batch_of()
        own = call(module, "embed", batch)
        np.testing.assert_allclose(call(module, "embed", batch, target="f1"), own, atol=1e-6)
        deep = call(module, "embed", batch, target="t4")
        np.testing.assert_allclose(call(module_of(target="t4"), "embed", batch), deep, atol=1e-6)
        assert np.abs(deep - own).max() > 1e-3
        found = [call(module, "predict_expression", batch, target) for target in ("same", "f5")]
        assert found[0].shape == (6, GENES) and np.abs(found[1] - found[0]).max() > 1e-3

    def test_cell_embedding_is_made_of_the_states(self):
        module, batch = module_of(), batch_of()
        tokens = call(module, "whole", batch)
        states = call(module, "encoder_states", tokens)
        cell, tops = call(module, "embed", batch), call(module_of(pool="max"), "embed", batch)
        assert cell.shape == (6, 64)
        for i, ids in enumerate(tokens.gene_id):
            genes = states[i, :-2][ids >= 0]
            expected = np.concatenate([states[i, -1], states[i, -2], genes.max(0), genes.mean(0)])
            np.testing.assert_allclose(cell[i], expected, atol=2e-6)
            np.testing.assert_allclose(tops[i], np.maximum(genes.max(0), states[i, -2:].max(0)), atol=2e-6)

    def test_pooling_over_pads_is_a_switch(self):
        """By default the embedding does not depend on padding: test_models.py."""
        batch = batch_of()
        wide = batch.replace(
            gene_id=np.pad(batch.gene_id, ((0, 0), (0, 9)), constant_values=-1),
            count=np.pad(batch.count, ((0, 0), (0, 9))),
        )
        pads = module_of(pool_pads=True)
        assert np.abs(call(pads, "embed", wide) - call(pads, "embed", batch)).max() > 1e-3

    def test_a_cell_without_counts(self):
        batch = batch_of(2)
        empty = batch.replace(gene_id=np.full_like(batch.gene_id, -1), count=0 * batch.count)
        for pool in ("all", "max"):
            cell = call(module_of(pool=pool), "embed", empty)
            assert np.isfinite(cell).all()
            assert pool == "max" or (cell[:, 32:] == 0).all()
        assert np.isfinite(call(module_of(), "loss", empty, jax.random.key(0))[0])

    def test_the_head_learns_its_statistics(self):
        batch = batch_of()
        top = call(module_of(n_outputs=3, pool="max"), "embed", batch)

        @functools.partial(jax.jit, static_argnums=0)
        def run(train):
            module = module_of(n_outputs=3)
            module.deterministic = not train
            return module.predict_cell(batch), module.head.norm.mean[...][0]

        logits, mean = run(False)
        assert logits.shape == (6, 3) and (np.asarray(mean) == 0).all()
        np.testing.assert_allclose(run(True)[1], 0.1 * top.mean(0), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("kind", ["frozen", "projected"])
    def test_gene_tables(self, kind):
        table = {"kind": kind}
        assert ScFoundation.tables(ScFoundationConfig(gene_table=GeneTable(kind))) == {"gene": "vectors"}
        model = models.build("scfoundation", {**TINY, "gene_table": table}, GENES)

        @jax.jit
        def loss(vectors):
            state = initialise(model)
            state["buffers"]["gene"] |= {"table": vectors, "known": jnp.ones(GENES)}
            state["params"]["to_value"]["kernel"] = jnp.arange(16.0)[:, None]
            return bind(model, **state).loss(batch_of(), jax.random.key(0))[0]

        vectors = np.random.default_rng(1).normal(size=(GENES, 16)).astype(np.float32)
        assert np.isfinite(loss(vectors)) and loss(vectors) != loss(-vectors)


class TestTraining:
    def steps(self, calls, every=3):
        """Buffers after a training loss that was the given call."""
        model = models.build("scfoundation", {**TINY, "redraw_every": every}, GENES)
        state = state_of()

        @jax.jit
        def run(calls):
            module = bind(model, state["params"], {**state["buffers"], "calls": calls})
            module.loss(batch_of(), jax.random.key(7))
            return buffers_of(module)

        return [run(jnp.asarray(n, jnp.int32)) for n in calls]

    def test_projections_are_drawn_anew(self):
        before = np.asarray(state_of()["buffers"]["decoder"]["blocks"]["attention"]["projection"])
        found = lambda after: np.asarray(after["decoder"]["blocks"]["attention"]["projection"])  # noqa: E731
        for calls, after in zip(range(7), self.steps(range(7)), strict=True):
            assert after["calls"] == calls + 1
            assert (found(after) != before).any() == (calls in (3, 6)), calls
        np.testing.assert_array_equal(found(self.steps([6], every=0)[0]), before)

    def test_evaluation_changes_no_buffer(self):
        @jax.jit
        def run():
            module = module_of(redraw_every=1)
            module.loss(batch_of(), jax.random.key(0))
            return buffers_of(module)

        for a, b in zip(jax.tree.leaves(state_of()["buffers"]), jax.tree.leaves(run()), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_the_baseline_is_the_running_mean_of_hidden_values(self):
        model, state = models.build("scfoundation", TINY, GENES), state_of()

        @jax.jit
        def run(buffers, batch, key):
            module = bind(model, state["params"], buffers)
            tokens = module.encode(batch, jax.random.split(key, 3)[0])
            mean = module.gene_mean(jnp.arange(GENES))
            _, weight, metrics = module.loss(batch, key)
            after = module.gene_mean(jnp.arange(GENES))
            return jax.tree.map(jnp.asarray, (tokens, mean, weight, metrics, after)), buffers_of(module)

        buffers = state["buffers"]
        sums, counts = np.zeros(GENES), np.zeros(GENES)
        for seed in range(3):
            batch = batch_of(seed=seed).replace(weight=np.array([1, 1, 1, 1, 1, 0], np.float32))
            found, buffers = run(buffers, batch, jax.random.key(seed))
            tokens, mean, weight, metrics, after = jax.tree.map(np.asarray, found)
            on = (tokens.direct_id >= 0) & (batch.weight[:, None] > 0)
            ids, target = tokens.direct_id[on], tokens.target[on]
            np.testing.assert_allclose(
                metrics["gene_mean_mse"][0], ((mean[ids] - target) ** 2).sum(), rtol=1e-4
            )
            assert weight == metrics["gene_mean_mse"][1] == on.sum()
            np.add.at(sums, ids, target)
            np.add.at(counts, ids, 1)
        seen = counts > 0
        np.testing.assert_allclose(after[seen], sums[seen] / counts[seen], rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_fraction": 1.0}, "between 0 and 1"),
        ({"zero_mask_fraction": -0.1}, "between 0 and 1"),
        ({"replace_fraction": 0.95}, "shares of the hidden"),
        ({"encoder_length": 0}, "needs a gene"),
        ({"pool": "mean"}, "pool"),
        ({"target": "x4"}, "target is"),
        ({"decoding": "cellwise", "stabiliser": "global"}, "looks at all cells"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        models.build("scfoundation", {**TINY, **changes}, GENES)


class TestSoftBins:
    def bins(self):
        return SoftBins(10, 6, alpha=0.5, rngs=nnx.Rngs(0))

    def test_by_the_formula(self):
        bins, value = self.bins(), np.array([[0.0, 1.5], [102.0, 103.0]], np.float32)
        a = value[..., None] * np.asarray(bins.up.kernel[...])[0] + np.asarray(bins.up.bias[...])
        a = np.where(a > 0, a, 0.1 * a)
        z = 0.5 * a + a @ np.asarray(bins.mix.kernel[...]) + np.asarray(bins.mix.bias[...])
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        np.testing.assert_allclose(bins.weights(value), p, atol=1e-5)
        # the numbers that stood for hidden and padding upstream are numbers like others
        np.testing.assert_allclose(bins(value), p @ np.asarray(bins.table[...]), atol=1e-5)

    def test_flags(self):
        bins, value = self.bins(), jnp.arange(4.0)
        hidden, padding = np.array([0, 1, 0, 0], bool), np.array([0, 0, 1, 0], bool)
        out, plain = bins(value, hidden=hidden, padding=padding), bins(value)
        np.testing.assert_array_equal(out[np.array([0, 3])], plain[np.array([0, 3])])
        np.testing.assert_array_equal(out[1:3], bins.special[...])
