"""scBERT and CellLM: what is their own beside what tests/test_models.py holds for every system."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import GENES, TINY, batch_of, take

from scjax import models
from scjax.nn import bind, buffers_of, initialise, shapes_of

SYSTEMS = ["celllm", "scbert"]


def build(system, **changes):
    model = models.build(system, {**TINY[system], **changes}, GENES, seed=3)
    return model, jax.jit(lambda: initialise(model))()


def method(model, name, train=True):
    """The named method, compiled: (variables, batch, *arguments) -> (its result, the buffers after it)."""

    @jax.jit
    def run(state, batch, *arguments):
        module = bind(model, **state)
        if not train:
            module.eval()
        return getattr(module, name)(batch, *arguments), buffers_of(module)

    return run


def key(seed=0):
    return jax.random.key(seed)


# ------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("system", SYSTEMS)
class TestBoth:
    def test_projections_are_redrawn_in_training_alone(self, system):
        model, state = build(system, redraw_every=3)
        train, evaluate = method(model, "loss"), method(model, "loss", train=False)
        batch, seen = batch_of(), []
        for step in range(8):
            before = state["buffers"]["performer"]["blocks"]["attention"]["projection"]
            _, buffers = train(state, batch, key(step))
            after = buffers["performer"]["blocks"]["attention"]["projection"]
            seen.append(bool((before != after).any()))
            state = {**state, "buffers": buffers}
        assert seen == [False, False, False, True, False, False, True, False]
        assert int(state["buffers"]["calls"]) == 8
        for _ in range(4):
            _, buffers = evaluate(state, batch, key())
            for a, b in zip(jax.tree.leaves(buffers), jax.tree.leaves(state["buffers"]), strict=True):
                np.testing.assert_array_equal(a, b)
        assert method(model, "loss")._cache_size() == 0 and train._cache_size() == 1

    def test_frequencies_are_those_of_the_batches_seen(self, system):
        model, state = build(system, **({"max_length": 100} if system == "celllm" else {}))
        train, counts = method(model, "loss"), np.zeros((GENES, 6))
        for seed in range(2):
            batch = batch_of(seed=seed).replace(weight=np.array([1, 1, 1, 1, 1, 0], np.float32))
            (_, _, metrics), buffers = train(state, batch, key(seed))
            state = {**state, "buffers": buffers}
            for i in range(5):
                value = batch.count[i] / batch.count[i].sum() * 1e4
                token = np.minimum(np.log2(1 + value.astype(np.float64)), 5).astype(int)
                on = (batch.gene_id[i] >= 0) & (token > 0)
                np.add.at(counts, (batch.gene_id[i][on], token[on]), 1)
        np.testing.assert_array_equal(state["buffers"]["bin_count"], counts)
        assert set(metrics) >= {"masked_ce", "frequency_ce"}

    def test_old_batches_fade(self, system):
        model, state = build(system)
        state["buffers"]["bin_count"] = state["buffers"]["bin_count"].at[7, 2].set(2.0**21)
        _, buffers = method(model, "loss")(state, batch_of(), key())
        assert 2**20 <= buffers["bin_count"][7, 2] < 2**20 + 10

    def test_frozen_table(self, system):
        """The table is a buffer: no parameter of genes is left, and the embedding follows the table."""
        model, state = build(system, gene_table={"kind": "frozen"})
        assert "gene" not in state["params"]
        config = models.resolve(system)[1](**TINY[system])
        assert models.resolve(system)[0].tables(config) == {}
        config = dataclasses.replace(config, gene_table=model.make().config.gene_table)
        assert models.resolve(system)[0].tables(config) == {"gene": "vectors"}
        embed, batch = method(model, "embed"), batch_of()
        zeros, _ = embed(state, batch)
        table = jnp.asarray(np.random.default_rng(0).standard_normal((GENES, 16)), jnp.float32)
        state["buffers"]["gene"]["table"] = table
        assert np.abs(embed(state, batch)[0] - zeros).max() > 0.01

    def test_published_head(self, system):
        batch = batch_of()
        for n_outputs in (3, 1):
            model, state = build(system, n_outputs=n_outputs)
            assert "bins" not in state["params"] and "head" in state["params"]
            predict = method(model, "predict_cell")
            together = predict(state, batch)[0]
            assert together.shape == (6, n_outputs) and np.isfinite(together).all()
            alone = predict(state, take(batch, [2]))[0]
            np.testing.assert_allclose(alone[0], together[2], atol=2e-6)
            order = np.random.default_rng(1).permutation(batch.shape[1])
            mixed = batch.replace(gene_id=batch.gene_id[:, order], count=batch.count[:, order])
            np.testing.assert_allclose(predict(state, mixed)[0], together, atol=2e-6)
            with pytest.raises(ValueError, match="no pretraining"):
                method(model, "loss")(state, batch_of(), key())

        def total(params):
            return (bind(model, params, state["buffers"]).predict_cell(batch) ** 2).sum()

        gradient = jax.jit(jax.grad(total))(state["params"])
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
        model, state = build(system)
        with pytest.raises(ValueError, match="n_outputs"):
            method(model, "predict_cell")(state, batch_of())

    def test_hidden_bins_do_not_leak(self, system):
        model, state = build(system, replace_fraction=1.0, **({"dropout": 0.0} if system == "scbert" else {}))
        tokens, _ = method(model, "encode")(state, batch_of(), key())
        assert int(tokens.hidden.sum()) > 5
        hidden = np.asarray(tokens.shown)
        mask = 7 if system == "celllm" else 6
        assert (hidden == mask).sum() == int(tokens.hidden.sum())
        other = dataclasses.replace(tokens, target=(tokens.target + 1) % 6)
        run = method(model, "__call__")
        for a, b in zip(
            jax.tree.leaves(run(state, tokens)[0]), jax.tree.leaves(run(state, other)[0]), strict=True
        ):
            np.testing.assert_array_equal(a, b)

    def test_bfloat16_is_close_to_float32(self, system):
        model, state = build(system)
        half, _ = build(system, dtype="bfloat16")
        a, b = (np.asarray(method(m, "embed")(state, batch_of())[0]) for m in (model, half))
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(b, a, atol=0.05 * np.abs(a).max())

    @pytest.mark.parametrize(
        "changes, told",
        [
            ({"mask_fraction": 0.0}, "mask_fraction = 0.0"),
            ({"replace_fraction": 1.5}, "replace_fraction = 1.5"),
            ({"stabiliser": "cell"}, "stabiliser"),
        ],
    )
    def test_refuses(self, system, changes, told):
        with pytest.raises(ValueError, match=told):
            build(system, **changes)


@pytest.mark.parametrize("system, changes", [("scbert", {}), ("celllm", {"parts": 4})])
def test_the_mesh_changes_nothing(system, changes):
    """Dropout, contrast and all: three steps on data x fsdp x tensor are those on one device."""
    from scjax.parallel import MeshConfig, make_mesh, place
    from scjax.train import OptimizerConfig, abstract_state, init_state, make_optimizer, make_train_step

    def losses(mesh):
        model = models.build(system, TINY[system] | changes, GENES)
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
    np.testing.assert_allclose(losses(make_mesh(MeshConfig(2, 2, 2))), alone, rtol=2e-5)


# ----------------------------------------------------------------------------------------- scBERT


class TestScBERT:
    def test_encode(self):
        model, state = build("scbert")
        batch = batch_of(40)
        tokens, _ = method(model, "encode")(state, batch, key())
        true, shown = np.asarray(tokens.true), np.asarray(tokens.shown)
        assert shown.shape == (40, GENES + 1) and (shown[:, -1] == 0).all()
        for i in range(40):
            value = batch.count[i] / batch.count[i].sum() * 1e4
            dense = np.zeros(GENES, int)
            on = batch.gene_id[i] >= 0
            dense[batch.gene_id[i][on]] = np.minimum(np.log2(1 + value[on].astype(np.float64)), 5)
            np.testing.assert_array_equal(true[i], dense)
            hidden = np.asarray(tokens.gene_id[i])[np.asarray(tokens.hidden[i])]
            assert len(hidden) == np.ceil(0.15 * (dense > 0).sum() - 1e-9)
            np.testing.assert_array_equal(
                np.asarray(tokens.target[i])[np.asarray(tokens.hidden[i])], dense[hidden]
            )
            others = np.setdiff1d(np.arange(GENES), hidden)
            np.testing.assert_array_equal(shown[i, others], dense[others])
            assert np.isin(shown[i, hidden], [6, *dense[hidden]]).all()
        assert 0.8 < (shown == 6).sum() / tokens.hidden.sum() < 0.97

    def test_loss_is_that_of_all_logits(self):
        """Taking the outputs at the hidden genes alone changes nothing."""
        model, state = build("scbert")
        (total, weight, metrics), _ = method(model, "loss")(state, batch_of(), key())
        tokens, _ = method(model, "encode")(state, batch_of(), jax.random.split(key(), 3)[0])
        x, _ = method(model, "__call__")(state, tokens)
        logits = jax.nn.log_softmax(bind(model, **state).predict(x))
        expected = 0.0
        for i in range(6):
            for gene, target, on in zip(tokens.gene_id[i], tokens.target[i], tokens.hidden[i], strict=True):
                expected -= float(logits[i, gene, target]) * bool(on)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert float(weight) == int(tokens.hidden.sum()) and metrics["masked_ce"][1] == weight

    def test_pool(self):
        model, state = build("scbert", pool="cls")
        module = bind(model, **state)
        x = module.norm(module(module.all_genes(batch_of())))
        np.testing.assert_allclose(method(model, "embed")(state, batch_of())[0], x[:, -1], atol=2e-6)
        with pytest.raises(ValueError, match="pool"):
            build("scbert", pool="max")

    def test_an_empty_cell_is_finite(self):
        model, state = build("scbert")
        batch = batch_of()
        empty = batch.replace(gene_id=np.full_like(batch.gene_id, -1), count=np.zeros_like(batch.count))
        assert np.isfinite(method(model, "embed")(state, empty)[0]).all()


# ----------------------------------------------------------------------------------------- CellLM


def whole_gradient(batch, **changes):
    """((objective, (sums, weights)), gradient) of CellLM on a batch."""
    model, state = build("celllm", **changes)

    def total(params):
        sums, weights, _ = bind(model, params, state["buffers"]).loss(batch, key())
        return sum(sums[name] / weights[name] for name in sums), (sums, weights)

    return jax.jit(jax.value_and_grad(total, has_aux=True))(state["params"])


class TestCellLM:
    def test_truncation(self):
        batch = batch_of(20)
        model, state = build("celllm", max_length=9)
        top, _ = method(model, "whole")(state, batch)
        for i, genes in enumerate(np.asarray(top.gene_id)):
            kept = np.isin(batch.gene_id[i], genes)
            assert kept.sum() == 8 and batch.count[i][kept].min() >= batch.count[i][~kept].max()
        model, state = build("celllm", max_length=9, truncate="index")
        first, _ = method(model, "whole")(state, batch)
        for i, genes in enumerate(np.asarray(first.gene_id)):
            np.testing.assert_array_equal(genes, np.sort(batch.gene_id[i][batch.gene_id[i] >= 0])[:8])
            # the bin of a gene is that in the whole cell
            value = dict(zip(batch.gene_id[i], batch.count[i] / batch.count[i].sum() * 1e4, strict=True))
            np.testing.assert_array_equal(
                first.shown[i], [int(min(np.log2(1 + float(value[g])), 5)) for g in genes]
            )

    def test_values_only_mask_pads_to_the_length(self):
        model, state = build("celllm", pad_mask="values", max_length=60)
        tokens, _ = method(model, "whole")(state, batch_of())
        assert tokens.gene_id.shape == (6, 59)

    def test_vectors_of_cls_and_padding(self):
        _, state = build("celllm", gene_table={"kind": "frozen"})
        np.testing.assert_array_equal(state["buffers"]["gene"]["special"], [np.ones(16), np.zeros(16)])

    @pytest.mark.parametrize("remat", ["none", "full"])
    def test_parts_change_nothing(self, remat):
        """The objective and its gradient are those of the whole batch, two dropout views and all."""
        batch = batch_of().replace(weight=np.array([1, 1, 0, 1, 1, 1], np.float32))
        (loss, aux), expected = whole_gradient(batch, parts=1)
        (value, other), found = whole_gradient(batch, parts=3, remat=remat)
        np.testing.assert_allclose(value, loss, rtol=5e-6)
        assert set(aux[0]) == {"masked", "contrast"}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-6), other, aux)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, float(jnp.abs(b).max())))

    def test_views_differ_in_dropout_alone(self):
        """In evaluation one view is both: cosine 1 with itself. Training contrasts two."""
        model, state = build("celllm")
        (_, _, train), _ = method(model, "loss")(state, batch_of(), key())
        (sums, weights, quiet), _ = method(model, "loss", train=False)(state, batch_of(), key())
        assert float(train["masked_ce"][1]) == 2 * float(quiet["masked_ce"][1])
        assert float(train["contrast_ce"][0]) > float(quiet["contrast_ce"][0])
        assert float(weights["contrast"]) == 6 and set(sums) == {"masked", "contrast"}

    def test_without_contrast_one_view(self):
        model, state = build("celllm", contrast_weight=0.0, dropout=0.0)
        (sums, weights, metrics), _ = method(model, "loss")(state, batch_of(), key())
        assert set(sums) == {"masked"} and "contrast_ce" not in metrics
        (_, _, quiet), _ = method(model, "loss", train=False)(state, batch_of(), key())
        np.testing.assert_allclose(metrics["masked_ce"], quiet["masked_ce"], rtol=1e-6)

    def test_tumour(self):
        """Codes 1 and 3 are tumours, 0 and 2 normal, -1 unknown."""
        model, state = build("celllm", label="disease", tumour_codes=(1, 3), contrast_weight=0.0, dropout=0.0)
        state["params"]["tumour"]["bias"] = jnp.array([0.7])
        code = np.array([0, 1, 2, 3, -1, 1], np.int32)
        batch = batch_of().replace(label={"disease": code}, weight=np.array([1, 1, 1, 1, 1, 0], np.float32))
        (sums, weights, _), _ = method(model, "loss")(state, batch, key())
        tokens, _ = method(model, "encode")(state, batch, jax.random.split(key(), 3)[0])
        (cell, _), _ = method(model, "__call__")(state, tokens)
        module = bind(model, **state)
        logit = np.asarray(module.tumour(module.norm(cell))[:, 0], np.float64)
        p = 1 / (1 + np.exp(-logit))
        expected = -np.log([1 - p[0], p[1], 1 - p[2], p[3]]).sum()
        np.testing.assert_allclose(sums["tumour"], expected, rtol=1e-5)
        assert float(weights["tumour"]) == 4
        with pytest.raises(ValueError, match="model.label is 'disease'.*name it in data.labels"):
            method(model, "loss")(state, batch.replace(label={}), key())

    @pytest.mark.parametrize(
        "changes, told",
        [
            ({"dropout": 0.0}, "set contrast_weight = 0"),
            ({"max_length": 1}, "no room for a gene"),
            ({"truncate": "random"}, "truncate"),
            ({"pad_mask": "none"}, "mask is"),
            ({"temperature": 0.0}, "temperature = 0.0"),
            ({"parts": 0}, "parts = 0"),
            ({"label": "disease"}, "goes with its codes"),
            ({"tumour_codes": (1,)}, "goes with its codes"),
        ],
    )
    def test_refuses(self, changes, told):
        with pytest.raises(ValueError, match=told):
            build("celllm", **changes)

    def test_parts_must_divide_the_batch(self):
        model, state = build("celllm", parts=4)
        with pytest.raises(ValueError, match="a batch of 6 cells cannot be encoded in 4 parts"):
            method(model, "loss")(state, batch_of(), key())

    def test_published_shapes(self):
        shapes = shapes_of(models.build("celllm", {}, 100))["params"]
        assert shapes["performer"]["blocks"]["attention"]["qkv"]["kernel"].shape == (10, 512, 3, 16, 64)
