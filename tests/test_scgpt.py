"""scGPT: its two objectives, the law of what sees what, and the heads of fine-tuning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import GENES, SLOTS, TINY, batch_of

from scjax import models
from scjax.encoding.unknown import unknown_room
from scjax.models.scgpt import Tokens
from scjax.nn import axes_of, bind, buffers_of, initialise, shapes_of
from scjax.objectives import masked_mse

THREE = (0.25, 0.5, 0.75)


@functools.cache
def _state(shape):
    """Jittered variables of a model; its config as a tuple, so that models alike in shape share them."""
    model = models.build("scgpt", dict(shape), GENES)
    state = jax.jit(lambda: initialise(model))()
    rng = np.random.default_rng(0)
    state["params"] = jax.tree.map(
        lambda x: x + 0.1 * jnp.asarray(rng.standard_normal(x.shape), x.dtype), state["params"]
    )
    return state


# what changes the variables of a model
SHAPING = (
    "objective norm second_pass_after mvc_weight zero_probability zeros n_batches batch_decoder batch_norm "
    "dab_weight n_outputs"
).split()


def build(**changes):
    config = {**TINY["scgpt"], **changes}
    shape = {**TINY["scgpt"], **{k: v for k, v in changes.items() if k in SHAPING}}
    return models.build("scgpt", config, GENES), _state(tuple(sorted(shape.items())))


def masked(**changes):
    return build(objective="masked", **changes)


def jitted(model, state, method):
    """The named method as a compiled function of a batch and a key; returns (its result, buffers after)."""

    @jax.jit
    def run(batch, *args):
        module = bind(model, **state)
        return getattr(module, method)(batch, *args), buffers_of(module)

    return run


def loss_and_gradient(model):
    """(params, buffers, key) -> ((loss per weight, (metrics, buffers after)), gradient)."""

    def run(params, buffers, key):
        module = bind(model, params, buffers)
        total, weight, metrics = module.loss(batch_of(), key)
        return total / weight, (metrics, buffers_of(module))

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def assert_trees_close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(1e-3, float(np.abs(y).max()))
        np.testing.assert_allclose(x, y, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


class TestConfig:
    def test_parameter_counts_of_the_published_models(self):
        """51,330,049 as pretrained, flag embedding included; 51,856,898 with the head of one class in its
        place, as the class for fine-tuning has it."""
        for changes, expected in (
            ({}, 51_330_049),
            ({"objective": "masked", "n_outputs": 1}, 51_856_898),
        ):
            model = models.build("scgpt", changes, 60_694)
            assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model)["params"])) == expected

    @pytest.mark.parametrize(
        "changes, told",
        [
            ({"zero_probability": True}, "needs zeros"),
            ({"batch_decoder": True}, "need n_batches"),
            ({"dab_weight": 1.0, "objective": "masked"}, "need n_batches"),
            ({"ecs_weight": 10.0}, "ecs_weight = 10.0 goes with"),
        ],
    )
    def test_what_does_not_go_together(self, changes, told):
        with pytest.raises(ValueError, match=told):
            build(**changes)

    def test_a_missing_batch_label_is_told(self):
        model, state = build(n_batches=2, batch_decoder=True, batch_label="donor")
        with pytest.raises(ValueError, match="n_batches = 2, but batches have no label 'donor'"):
            bind(model, **state).loss(batch_of(), jax.random.key(0))

    def test_axes_name_every_dimension(self):
        model, _ = build()
        axes = axes_of(model)["params"]
        assert axes["gene"]["embedding"] == ("vocab", "embed")
        blocks = axes["transformer"]["blocks"]
        assert blocks["attention"]["qkv"]["kernel"] == ("layers", "embed", None, "heads", "head")
        assert blocks["down"]["kernel"] == ("layers", "mlp", "embed")


class TestGenerative:
    def test_encode(self):
        """Each step has one fraction; a cell's unknown genes are that share of it, and no gene is lost."""
        model, state = build(mask_fractions=THREE, max_length=SLOTS + 1, tie="mid")
        batch = batch_of(20)
        values = np.asarray(bind(model, **state).values(batch, None))
        encode, seen = jitted(model, state, "encode"), []
        for seed in range(12):
            tokens = jax.tree.map(np.asarray, encode(batch, jax.random.key(seed))[0])
            fraction = THREE[int(tokens.fraction)]
            seen.append(fraction)
            n, k = (tokens.gene_id >= 0).sum(1), tokens.hidden.sum(1)
            np.testing.assert_array_equal(n, (batch.gene_id >= 0).sum(1))
            np.testing.assert_array_equal(k, np.floor(n * fraction + 1e-4))
            room = unknown_room(SLOTS, fraction)
            assert not tokens.hidden[:, room:].any() and (tokens.gene_id[:, :room] >= 0).sum() == k.sum()
            assert (tokens.value[tokens.hidden] == -1).all()
            for i in range(20):
                of = dict(zip(batch.gene_id[i].tolist(), values[i].tolist(), strict=True)) | {-1: 0.0}
                genes = tokens.gene_id[i].tolist()
                assert sorted(g for g in genes if g >= 0) == sorted(g for g in of if g >= 0)
                assert [of[g] for g in genes] == tokens.target[i].tolist()
        assert set(seen) == set(THREE)
        sets = [frozenset(t) for s in (0, 1) for t in [unknown_of(encode, batch, s)]]
        assert sets[0] != sets[1]

    def test_evaluation_takes_the_middle_fraction(self):
        model, state = build(mask_fractions=THREE)
        module = bind(model, **state)
        module.eval()
        assert {int(module.encode(batch_of(), jax.random.key(seed)).fraction) for seed in range(5)} == {1}

    def test_unknown_tokens_never_influence_one_another(self):
        """Nor the cell. Each is influenced by itself and by what is known."""
        model, state = build(dropout=0.0, max_length=9)
        tokens, _ = jitted(model, state, "encode")(batch_of(1), jax.random.key(0))
        run = jitted(model, state, "__call__")
        (cell, genes), _ = run(tokens)
        assert (tokens.gene_id >= 0).all()  # no padding between the unknown and the known
        unknown = np.flatnonzero(np.asarray(tokens.hidden)[0])
        known = np.flatnonzero(np.asarray((tokens.gene_id >= 0) & ~tokens.hidden)[0])
        absent = np.setdiff1d(np.arange(GENES), tokens.gene_id[0])

        def changed(slot, **what):
            arrays = {name: getattr(tokens, name).at[0, slot].set(value) for name, value in what.items()}
            (other_cell, other), _ = run(dataclasses.replace(tokens, **arrays))
            return np.abs(other_cell - cell).max(), np.abs(other - genes).max(-1)[0]

        for slot in unknown:
            moved_cell, moved = changed(slot, gene_id=absent[0])
            assert moved_cell == 0 and moved[slot] > 1e-3
            assert np.delete(moved, slot).max() == 0
            moved_cell, moved = changed(slot, gene_id=-1)  # nor does it matter how many there are
            assert moved_cell == 0 and np.delete(moved, slot).max() == 0
        moved_cell, moved = changed(known[0], value=30.0)
        assert moved_cell > 1e-4 and moved[np.r_[unknown, known]].min() > 1e-5

    def test_true_values_do_not_leak(self):
        model, state = build(dropout=0.0)
        tokens, _ = jitted(model, state, "encode")(batch_of(), jax.random.key(0))
        other = dataclasses.replace(
            tokens,
            target=jnp.where(tokens.hidden, 7.0, tokens.target),
            value=jnp.where(tokens.hidden, 9.0, tokens.value),
        )
        run = jitted(model, state, "__call__")
        for a, b in zip(run(tokens)[0], run(other)[0], strict=True):
            np.testing.assert_array_equal(a, b)

    def test_a_fraction_among_three_is_that_fraction_alone(self):
        """The branch that is taken gives the loss, metrics and gradient of a model that knows no other."""
        model, state = build(mask_fractions=THREE, dropout=0.0, tie="mid")
        run, seen = loss_and_gradient(model), set()
        encode = jitted(model, state, "encode")
        for seed in range(20):
            key = jax.random.key(seed)
            drawn = int(encode(batch_of(), jax.random.split(key)[0])[0].fraction)
            if drawn in seen:
                continue
            seen.add(drawn)
            (value, (metrics, _)), gradient = run(state["params"], state["buffers"], key)
            alone, _ = build(mask_fractions=(THREE[drawn],), dropout=0.0, tie="mid")
            (expected, (metrics2, _)), gradient2 = loss_and_gradient(alone)(
                state["params"], state["buffers"], key
            )
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            assert_trees_close(metrics, metrics2)
            assert_trees_close(gradient, gradient2)
            if len(seen) == 2:
                return
        raise AssertionError(f"only {seen} was ever drawn")

    def test_the_second_pass_starts_when_it_should(self):
        model, state = build(second_pass_after=2, dropout=0.0)
        without, _ = build(second_pass_after=0, dropout=0.0)
        bare = {name: x for name, x in state["buffers"].items() if name != "calls"}
        run, buffers, second, key = loss_and_gradient(model), state["buffers"], [], jax.random.key(0)
        for call in range(4):
            (value, (metrics, after)), gradient = run(state["params"], buffers, key)
            assert int(after["calls"]) == call + 1
            second.append(tuple(map(float, metrics["second_mse"])))
            if call == 0:
                (expected, _), other = loss_and_gradient(without)(state["params"], bare, key)
                np.testing.assert_allclose(value, expected, rtol=1e-6)
                assert_trees_close(gradient, other)
            buffers = {**state["buffers"], "calls": after["calls"]}
        assert second[0] == second[1] == (0.0, 0.0)
        assert second[2] == second[3] and min(second[2]) > 0

    def test_the_second_pass_starts_from_the_cell_embedding(self):
        """Its error and gradient are those of plain differentiation through a network fed by hand."""
        model, state = build(second_pass_after=1, dropout=0.0)
        buffers = {**state["buffers"], "calls": jnp.int32(5)}
        batch = batch_of()

        def by_hand(params):
            module = bind(model, params, buffers)
            tokens = module.encode(batch, jax.random.split(jax.random.key(0))[0])
            unknown = unknown_room(tokens.gene_id.shape[1], 0.5)
            x, gene, valid = module._inputs(tokens, unknown, None, None, False)
            mask, target = tokens.hidden[:, :unknown], tokens.target[:, :unknown]
            total = 0.0
            cell, states = module._transform(x, valid, x.shape[1], unknown, None)
            total += masked_mse(module.decoder(states[:, :unknown])[0], target, mask)[0]
            total += masked_mse(module.mvc(gene[:, :unknown], cell)[0], target, mask)[0]
            parts = (x[:, :unknown], jax.lax.stop_gradient(cell)[:, None], x[:, unknown + 1 :])
            _, states = module._transform(jnp.concatenate(parts, 1), valid, x.shape[1], unknown, None)
            total += masked_mse(module.decoder(states[:, :unknown])[0], target, mask)[0]
            return total / mask.sum()

        expected, expected_gradient = jax.jit(jax.value_and_grad(by_hand))(state["params"])
        (value, _), gradient = loss_and_gradient(model)(state["params"], buffers, jax.random.key(0))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert_trees_close(gradient, expected_gradient)

    def test_evaluation_counts_no_calls(self):
        model, state = build()

        @jax.jit
        def calls():
            module = bind(model, **state)
            module.eval()
            module.loss(batch_of(), jax.random.key(0))
            return module.calls[...]

        assert int(calls()) == 0

    @pytest.mark.parametrize(
        "changes",
        [{"norm": "pre"}, {"remat": "dots", "dtype": "bfloat16"}, {"attention": "cellwise"}],
        ids=str,
    )
    def test_variants(self, changes):
        """How it is computed changes nothing but rounding; "pre" is another network."""
        model, state = build(dropout=0.0, second_pass_after=1, **changes)
        buffers = {**state["buffers"], "calls": jnp.int32(1)}
        key = jax.random.key(0)
        (value, _), gradient = loss_and_gradient(model)(state["params"], buffers, key)
        assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
        if "norm" not in changes:
            plain, _ = build(dropout=0.0, second_pass_after=1, attention="einsum")
            (expected, _), other = loss_and_gradient(plain)(state["params"], buffers, key)
            rough = "dtype" in changes
            np.testing.assert_allclose(value, expected, rtol=2e-2 if rough else 1e-5)
            assert_trees_close(gradient, other, 0.2 if rough else 1e-4)

    def test_three_fractions_on_a_mesh(self):
        """The losses of three steps on a mesh, each with the fraction it draws, are those on one device."""
        from scjax.parallel import MeshConfig, make_mesh, place
        from scjax.train import OptimizerConfig, abstract_state, init_state, make_optimizer, make_train_step

        def losses(mesh):
            model, _ = build(mask_fractions=THREE, n_layers=1, second_pass_after=1)
            tx, _ = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), 3, model)
            abstract = abstract_state(model, tx, mesh)
            state = init_state(model, tx, abstract)
            step = make_train_step(model, tx, abstract, seed=0)
            values = []
            for number in range(3):
                state, metrics = step(state, place(batch_of(16, seed=number), mesh))
                values.append(float(metrics["loss"][0] / metrics["loss"][1]))
            assert step._cache_size() == 1
            assert int(state["buffers"]["calls"]) == 3
            return values

        alone = losses(make_mesh(MeshConfig(data=1), devices=jax.devices()[:1]))
        np.testing.assert_allclose(losses(make_mesh(MeshConfig(2, 2, 2))), alone, rtol=1e-5)


def unknown_of(encode, batch, seed):
    tokens = encode(batch, jax.random.key(seed))[0]
    return np.asarray(tokens.gene_id)[0][np.asarray(tokens.hidden)[0]].tolist()


class TestHeads:
    def labelled(self, **changes):
        return batch_of(**changes).replace(label={"dataset": np.array([0, 1, 1, 0, 1, -1], np.int32)})

    def everything(self, **changes):
        return masked(
            n_batches=2,
            batch_decoder=True,
            dab_weight=1.0,
            batch_norm="domain",
            ecs_weight=10.0,
            zeros=True,
            zero_probability=True,
            n_outputs=3,
            max_length=GENES + 1,
            dropout=0.0,
            **changes,
        )

    def test_gradients_reach_every_parameter(self):
        model, state = self.everything()
        batch = self.labelled()

        def total(params):
            module = bind(model, params, state["buffers"])
            totals, weights, _ = module.loss(batch, jax.random.key(0))
            assert set(totals) == set(weights) == {"values", "ecs", "dab"}
            return sum(totals.values()) + module.predict_cell(batch).sum()

        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(total))(state["params"])):
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)

    def test_the_discriminator_learns_what_the_network_unlearns(self):
        """Without reversal the discriminator's gradient is the same, the network's has the other sign."""
        batch = self.labelled()
        model, state = masked(n_batches=2, dab_weight=1.0, dropout=0.0)

        def dab(params):
            return bind(model, params, state["buffers"]).loss(batch, jax.random.key(0))[0]["dab"]

        def plain(params):
            module = bind(model, params, state["buffers"])
            tokens = module.encode(batch, jax.random.split(jax.random.key(0))[0])
            log_p = jax.nn.log_softmax(module.discriminator(module(tokens)[0]))
            return -sum(log_p[i, label] for i, label in enumerate(batch.label["dataset"]) if label >= 0)

        value, gradient = jax.jit(jax.value_and_grad(dab))(state["params"])
        expected, expected_gradient = jax.jit(jax.value_and_grad(plain))(state["params"])
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        own = expected_gradient.pop("discriminator")
        assert_trees_close(gradient.pop("discriminator"), own)
        assert_trees_close(gradient, jax.tree.map(jnp.negative, expected_gradient), 2e-5)

    def test_a_cell_of_zeros_has_all_genes(self):
        model, state = self.everything(tie="mid")
        batch = batch_of()
        tokens, _ = jitted(model, state, "encode")(batch, jax.random.key(0))
        assert (np.sort(tokens.gene_id, axis=1) == np.arange(GENES)).all()
        expressed = np.zeros((6, GENES), bool)
        for row, genes in zip(expressed, batch.gene_id, strict=True):
            row[genes[genes >= 0]] = True
        np.testing.assert_array_equal(
            np.take_along_axis(expressed, np.asarray(tokens.gene_id), 1), tokens.target > 0
        )

    def test_an_unknown_batch_embeds_and_a_wrong_one_is_nan(self):
        model, state = self.everything()
        run = jitted(model, state, "loss")
        wrong = self.labelled()
        wrong.label["dataset"][0] = 2
        assert np.isfinite(run(self.labelled(), jax.random.key(0))[0][0]["values"])
        assert np.isnan(run(wrong, jax.random.key(0))[0][0]["values"])
        assert np.isfinite(jitted(model, state, "embed")(batch_of())[0]).all()
        assert jitted(model, state, "predict_cell")(batch_of())[0].shape == (6, 3)

    def test_batch_norm_learns_in_training_alone(self):
        model, state = self.everything()
        batch = self.labelled()
        _, after = jitted(model, state, "loss")(batch, jax.random.key(0))
        assert np.abs(after["domain_norm"]["mean"] - state["buffers"]["domain_norm"]["mean"]).max() > 1e-3
        _, after = jitted(model, state, "embed")(batch)
        np.testing.assert_array_equal(after["domain_norm"]["mean"], 0)

    def test_mean_pooling_leaves_padding_out(self):
        model, state = build(pool="mean")
        careless, _ = build(pool="mean", pool_pads=True)
        batch = batch_of()
        wide = batch.replace(
            gene_id=np.pad(batch.gene_id[:, :30], ((0, 0), (0, 2)), constant_values=-1),
            count=np.pad(batch.count[:, :30], ((0, 0), (0, 2))),
        )
        narrow = batch.replace(gene_id=batch.gene_id[:, :30], count=batch.count[:, :30])
        for which, same in ((model, True), (careless, False)):
            embed = jitted(which, state, "embed")
            assert np.allclose(embed(wide)[0], embed(narrow)[0], atol=2e-6) == same

    def test_cls_may_be_hidden_as_upstream_does(self):
        model, state = masked(mask_cls=True, cls_value=0.0, mask_fractions=(0.5,))
        tokens, _ = jitted(model, state, "encode")(batch_of(200), jax.random.key(0))
        assert 0.35 < np.asarray(tokens.cls_hidden).mean() < 0.65
        (_, weight, _), _ = jitted(model, state, "loss")(batch_of(200), jax.random.key(0))
        n = (np.asarray(tokens.gene_id) >= 0).sum(1) + 1
        assert float(weight) == np.floor(n * 0.5 + 1e-4).sum()

    def test_no_hidden_gene_is_left_out_where_cls_may_be_hidden(self):
        """Of CLS and 9 genes 4 are hidden, so 4 genes where CLS is not: more than 0.4 of 9."""
        model, state = masked(mask_cls=True, mask_fractions=(0.4,), max_length=10, dropout=0.0)
        batch, key = batch_of(50), jax.random.key(0)

        @jax.jit
        def by_hand():
            module = bind(model, **state)
            tokens = module.encode(batch, jax.random.split(key)[0])
            cell, genes = module(tokens)
            of_cls = masked_mse(module.decoder(cell)[0], module.config.cls_value, tokens.cls_hidden)[0]
            return tokens.hidden.sum(1), of_cls + masked_mse(
                module.decoder(genes)[0], tokens.target, tokens.hidden
            )[0]

        hidden, expected = by_hand()
        assert set(hidden.tolist()) == {3, 4}
        (_, weight, metrics), _ = jitted(model, state, "loss")(batch, key)
        assert float(weight) == 4 * 50
        np.testing.assert_allclose(metrics["masked_mse"][0], expected, rtol=1e-5)

    def test_random_genes_for_an_embedding_depend_on_the_row(self):
        batch = batch_of()
        other = batch.replace(row=batch.row + np.uint32(1))
        for method, same in (("top", True), ("random", False)):
            embed = jitted(*build(embed_genes=method, max_length=9), "embed")
            assert np.array_equal(embed(batch)[0], embed(other)[0]) == same


class TestMasked:
    @pytest.mark.parametrize("fractions", [(0.5,), (0.25, 0.5, 0.75)])
    def test_encode(self, fractions):
        model, state = masked(mask_fractions=fractions)
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
        model, state = masked(max_length=9, **changes)
        batch = batch_of()
        count = batch.count + np.where(batch.gene_id >= 0, batch.gene_id / 1000, 0).astype(
            np.float32
        )  # no ties
        top = np.argsort(-count, axis=1)[:, :8]
        cut = jax.tree.map(np.asarray, batch.replace(count=count))
        # the same cells, where values of the other genes are needed for the bins but cannot be chosen
        run = jitted(model, state, "embed")
        whole = np.asarray(run(cut)[0])
        longer, _ = masked(max_length=200, **changes)
        values = np.asarray(bind(longer, **state).values(cut, None))
        module = bind(longer, **state)
        by_hand = Tokens(*(np.take_along_axis(x, top, 1) for x in (cut.gene_id, values, values)), top < 0)
        cell, _ = module(by_hand)
        np.testing.assert_allclose(whole, cell / jnp.linalg.norm(cell, axis=1, keepdims=True), atol=2e-6)

    def test_bins_are_ranks_in_the_whole_cell(self):
        """The bin of a gene does not depend on which other genes are kept."""
        model, state = masked(tie="mid", max_length=9)
        batch = batch_of()
        tokens, _ = jitted(model, state, "encode")(batch, jax.random.key(0))
        bins = np.asarray(bind(model, **state).values(batch, None))
        for i in range(6):
            of = dict(zip(batch.gene_id[i].tolist(), bins[i].tolist(), strict=True))
            kept = np.asarray(tokens.gene_id[i])
            assert [of[g] for g in kept.tolist()] == np.asarray(tokens.target[i]).tolist()

    def test_hidden_values_do_not_leak(self):
        model, state = masked(dropout=0.0)
        tokens, _ = jitted(model, state, "encode")(batch_of(), jax.random.key(0))
        changed = dataclasses.replace(tokens, target=jnp.where(tokens.hidden, 7.0, tokens.target))
        run = jitted(model, state, "__call__")
        for a, b in zip(run(tokens)[0], run(changed)[0], strict=True):
            np.testing.assert_array_equal(a, b)

    def test_gene_mean_baseline_is_the_running_mean(self):
        model, state = masked(tie="mid", max_length=SLOTS + 1, mask_fractions=(0.4,))
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
        np.testing.assert_allclose(buffers["gene_mean"]["total"], sums, rtol=1e-6)
        np.testing.assert_array_equal(buffers["gene_mean"]["count"], counts)
        seen = np.flatnonzero(counts)
        module = bind(model, state["params"], buffers)
        np.testing.assert_allclose(module.gene_mean(seen), sums[seen] / counts[seen], rtol=1e-6)

    def test_dropout_is_off_for_evaluation(self):
        model, state = masked(dropout=0.5)
        run = jitted(model, state, "loss")
        noisy = [float(run(batch_of(), jax.random.key(k))[0][0]) for k in (0, 0, 1)]
        assert noisy[0] == noisy[1] != noisy[2]

        @jax.jit
        def evaluate(batch, key):
            module = bind(model, **state)
            module.eval()
            return module.loss(batch, key)[:2]

        quiet, weight = evaluate(batch_of(), jax.random.key(0))
        without, _ = masked(dropout=0.0)
        expected = jitted(without, state, "loss")(batch_of(), jax.random.key(0))[0][0]
        np.testing.assert_allclose(quiet, expected, rtol=1e-6)
        assert float(quiet) != noisy[0] and float(weight) > 0

    def test_bfloat16_is_close_to_float32(self):
        model, state = masked()
        half, _ = masked(dtype="bfloat16")
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
        model, state = masked(dropout=0.0, **changes)
        plain, _ = masked(dropout=0.0)

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
