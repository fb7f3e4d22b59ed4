"""Geneformer's own laws: which tokens a cell becomes, what is hidden, where the embedding comes from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import GENES, SLOTS, TINY, batch_of

from scjax import models
from scjax.models.geneformer import places
from scjax.nn import bind, buffers_of, initialise
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import OptimizerConfig, abstract_state, init_state, make_optimizer, make_train_step
from scjax.types import CellBatch

PAD, MASK, CLS, EOS = range(GENES, GENES + 4)
KEY = jax.random.key(0)


@functools.cache
def build(**changes):
    """(abstract model, state with every parameter jittered)."""
    model = models.build("geneformer", {**TINY["geneformer"], **changes}, GENES)
    state = jax.jit(lambda: initialise(model))()
    rng = np.random.default_rng(0)
    noise = lambda x: x + 0.1 * jnp.asarray(rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    return model, {**state, "params": jax.tree.map(noise, state["params"])}


@functools.cache
def jitted(method, **changes):
    model, state = build(**changes)

    @jax.jit
    def run(buffers, *args):
        module = bind(model, state["params"], buffers)
        return getattr(module, method)(*args), buffers_of(module)

    return run


def call(method, *args, buffers=None, **changes):
    """(result of the method, buffers after it)."""
    return jitted(method, **changes)(buffers or build(**changes)[1]["buffers"], *args)


def cells(n: int, genes: int) -> CellBatch:
    """Cells that express genes 0 .. genes-1 with unlike counts, each in an order of its own."""
    rng = np.random.default_rng(0)
    gene_id = np.stack([rng.permutation(genes) for _ in range(n)]).astype(np.int32)
    count = 1 + rng.random((n, genes), np.float32)
    full = np.full(n, genes, np.int32)
    return CellBatch(gene_id, count, count.sum(1), full, np.arange(n, dtype=np.uint32), {}, {}, np.ones(n))


class TestSequence:
    def test_v1(self):
        batch = batch_of()
        median = np.random.default_rng(3).lognormal(size=GENES).astype(np.float32)
        _, state = build()
        token, _ = call("sequence", batch, buffers={**state["buffers"], "median": median})
        for i in range(6):
            on = batch.gene_id[i] >= 0
            genes, value = batch.gene_id[i][on], batch.count[i][on] / median[batch.gene_id[i][on]]
            expected = genes[np.lexsort((genes, -value))]
            assert token[i, : on.sum()].tolist() == expected.tolist()
            assert (token[i, on.sum() :] == PAD).all()

    @pytest.mark.parametrize("max_length", [64, 20])
    def test_v2_has_a_beginning_and_an_end(self, max_length):
        batch = batch_of()
        plain, _ = call("sequence", batch)
        token, _ = call("sequence", batch, specials=True, max_length=max_length)
        assert token.shape[1] == min(SLOTS + 2, max_length)
        for i in range(6):
            n = min(int(batch.n_genes[i]), max_length - 2)
            assert token[i, : n + 2].tolist() == [CLS, *plain[i, :n].tolist(), EOS]
            assert (token[i, n + 2 :] == PAD).all()

    def test_v1_is_cut_to_its_foremost_genes(self):
        whole, _ = call("sequence", batch_of())
        short, _ = call("sequence", batch_of(), max_length=9)
        np.testing.assert_array_equal(short, whole[:, :9])


class TestMasks:
    def encode(self, n=400, genes=GENES, **changes):
        batch = cells(n, genes)
        tokens, _ = call("encode", batch, KEY, **changes)
        token, _ = call("sequence", batch, **changes)
        return jax.tree.map(np.asarray, tokens), np.asarray(token)

    def at(self, tokens, values):
        return np.take_along_axis(values, tokens.position, 1)

    def test_rates(self):
        """15 % of the genes; of these 80 % are <mask>, 10 % some gene and 10 % as they were."""
        tokens, token = self.encode()
        n = tokens.hidden.sum()
        assert abs(n / token.size - 0.15) < 4 * np.sqrt(0.15 * 0.85 / token.size)
        seen, was = self.at(tokens, tokens.token)[tokens.hidden], tokens.target[tokens.hidden]
        np.testing.assert_array_equal(was, self.at(tokens, token)[tokens.hidden])
        same = 0.1 + 0.1 / GENES  # a random gene may be the gene itself
        for share, expected in (((seen == MASK).mean(), 0.8), ((seen == was).mean(), same)):
            assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
        other = seen[(seen != MASK) & (seen != was)]
        assert other.max() < GENES
        assert len(np.unique(other)) > 0.9 * GENES and np.bincount(other).max() < 4 * len(other) / GENES

    def test_what_is_not_hidden_is_as_it_was(self):
        tokens, token = self.encode()
        hidden = np.zeros(token.shape, bool)
        np.put_along_axis(hidden, tokens.position, tokens.hidden, 1)
        np.testing.assert_array_equal(tokens.token[~hidden], token[~hidden])
        assert (np.diff(tokens.hidden.astype(int), axis=1) <= 0).all()  # places in use come first

    def test_a_cell_with_more_than_there_is_room_for(self, monkeypatch):
        """The surplus stays as it was: it is not hidden without being asked for."""
        assert places(2048, 0.15) == 372 and places(3, 0.15) == 3
        monkeypatch.setattr("scjax.models.geneformer.places", lambda *_: 5)
        model, state = build(mask_fraction=0.2)  # another model than the other tests compile
        batch = cells(200, GENES)
        tokens = jax.tree.map(np.asarray, bind(model, **state).encode(batch, KEY))
        token = np.asarray(bind(model, **state).sequence(batch))
        assert tokens.position.shape[1] == 5 and tokens.hidden.all(1).mean() > 0.9
        asked = np.zeros(token.shape, bool)
        np.put_along_axis(asked, tokens.position, tokens.hidden, 1)
        np.testing.assert_array_equal(tokens.token[~asked], token[~asked])
        assert (tokens.token[asked] == MASK).mean() > 0.7

    def test_special_tokens_are_left_alone(self):
        tokens, token = self.encode(specials=True)
        assert (tokens.token[token >= GENES] == token[token >= GENES]).all()
        assert tokens.target[tokens.hidden].max() < GENES
        seen = self.at(tokens, tokens.token)[tokens.hidden]
        assert set(seen[seen >= GENES].tolist()) == {MASK}

    def test_upstream_s_special_tokens(self):
        changes = {"specials": True, "maskable_specials": True, "random_specials": True}
        tokens, _ = self.encode(2000, **changes)
        assert {CLS, EOS} <= set(tokens.target[tokens.hidden].tolist())
        assert PAD not in tokens.target[tokens.hidden]
        seen = self.at(tokens, tokens.token)[tokens.hidden]
        assert {PAD, CLS, EOS} <= set(seen.tolist())
        assert tokens.real.all()  # a <pad> that stands for a random token is read like any other

    def test_follow_the_gene_and_not_its_place(self):
        """Cells of one row number have the same genes hidden, whatever their order and their medians."""
        batch, (_, state) = cells(20, GENES), build()
        median = np.random.default_rng(1).lognormal(size=GENES).astype(np.float32)
        hidden = []
        for m in (np.ones(GENES, np.float32), median):
            tokens, _ = call("encode", batch, KEY, buffers={**state["buffers"], "median": m})
            on = np.asarray(tokens.hidden)
            hidden.append([set(t[o].tolist()) for t, o in zip(np.asarray(tokens.target), on, strict=True)])
        assert hidden[0] == hidden[1]


class TestLoss:
    def test_baseline_is_the_frequency_of_tokens_so_far(self):
        counts = np.r_[np.ones(GENES), 0, 0]  # special tokens are never asked for
        _, state = build()
        buffers = state["buffers"]
        for seed in range(3):
            batch = batch_of(seed=seed).replace(weight=np.array([1, 1, 1, 1, 1, 0], np.float32))
            tokens, _ = call("encode", batch, jax.random.split(KEY)[0], buffers=buffers)
            (_, _, metrics), buffers = call("loss", batch, KEY, buffers=buffers)
            target = np.asarray(tokens.target)[:5][np.asarray(tokens.hidden)[:5]]
            expected = -np.log(counts[target] / counts.sum()).sum()
            np.testing.assert_allclose(metrics["frequency_ce"][0], expected, rtol=1e-5)
            np.add.at(counts, batch.gene_id[:5][batch.gene_id[:5] >= 0], 1)
        np.testing.assert_allclose(buffers["token_count"], counts - np.r_[np.ones(GENES), 0, 0])

    def test_old_counts_give_way_before_float32_stops_counting(self):
        _, state = build()
        buffers = {**state["buffers"], "token_count": jnp.full(GENES + 2, 2.0**23).at[3].set(100.0)}
        _, after = call("loss", batch_of(), KEY, buffers=buffers)
        assert 2**22 <= float(after["token_count"].max()) < 2**22 + 10
        assert 50 <= float(after["token_count"][3]) <= 53

    def test_dropout_is_off_for_evaluation(self):
        model, state = build(dropout=0.5)

        @jax.jit
        def loss(key):
            noisy, quiet = bind(model, **state), bind(model, **state)
            quiet.eval()
            return noisy.loss(batch_of(), key)[0], quiet.loss(batch_of(), key)[0]

        still, _ = call("loss", batch_of(), KEY, dropout=0.0)
        noisy, quiet = loss(KEY)
        np.testing.assert_allclose(quiet, still[0], rtol=1e-6)
        assert float(noisy) != float(quiet)

    def test_dropout_is_where_bert_has_it(self):
        """Not within the feed-forward layer, where other systems have it."""
        model, state = build(dropout=0.5)
        blocks = bind(model, **state).transformer.blocks
        assert (blocks.rate, blocks.inner_rate) == (0.5, 0.0)

    def test_bfloat16_is_close_to_float32(self):
        exact, _ = call("loss", batch_of(), KEY, dropout=0.0)
        model, _ = build(dtype="bfloat16", dropout=0.0)
        _, state = build()
        total, weight, _ = jax.jit(lambda: bind(model, **state).loss(batch_of(), KEY))()
        assert float(weight) == float(exact[1])
        np.testing.assert_allclose(total, exact[0], rtol=0.02)

    def test_the_mesh_changes_nothing(self):
        def losses(mesh):
            model, _ = build(specials=True)
            tx, _ = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), 3, model)
            abstract = abstract_state(model, tx, mesh)
            state, step = init_state(model, tx, abstract), make_train_step(model, tx, abstract, seed=0)
            values = []
            for number in range(2):
                state, metrics = step(state, place(batch_of(16, seed=number), mesh))
                values.append(float(metrics["loss"][0] / metrics["loss"][1]))
            assert step._cache_size() == 1
            return values

        alone = losses(make_mesh(MeshConfig(data=1), devices=jax.devices()[:1]))
        np.testing.assert_allclose(losses(make_mesh(MeshConfig(2, 2, 2))), alone, rtol=1e-5)


class TestEmbedding:
    def test_is_the_mean_over_the_genes_of_the_layer_before_the_last(self):
        for changes in ({}, {"specials": True}, {"embed_layer": 0}, {"embed_layer": -2}):
            batch = batch_of()
            token = np.asarray(call("sequence", batch, **changes)[0])
            model, state = build(**changes)
            x = np.asarray(bind(model, **state).run(token, layers=2 + changes.get("embed_layer", -1)))
            expected = [x[i][token[i] < GENES].mean(0) for i in range(6)]
            np.testing.assert_allclose(call("embed", batch, **changes)[0], expected, atol=2e-6)

    def test_cls(self):
        token, _ = call("sequence", batch_of(), specials=True)
        model, state = build(specials=True)
        expected = bind(model, **state).run(token, layers=1)[:, 0]
        np.testing.assert_allclose(
            call("embed", batch_of(), specials=True, pool="cls")[0], expected, atol=2e-6
        )

    def test_the_layers_that_are_not_needed_are_not_run(self):
        """Their parameters may be anything."""
        model, state = build()
        broken = jax.tree.map(lambda x: x, state["params"])
        blocks = jax.tree.map(lambda x: x.at[1:].set(jnp.nan), broken["transformer"]["blocks"])
        broken["transformer"] = {"blocks": blocks}
        found = jax.jit(lambda: bind(model, broken, state["buffers"]).embed(batch_of()))()
        np.testing.assert_allclose(found, call("embed", batch_of())[0], atol=1e-6)

    def test_a_cell_without_genes_has_one(self):
        batch = batch_of()
        batch = batch.replace(count=np.where(np.arange(6)[:, None] == 2, 0, batch.count).astype(np.float32))
        for specials in (False, True):
            found = np.asarray(call("embed", batch, specials=specials)[0])
            assert np.isfinite(found).all() and (found[2] == 0).all()
            (total, weight, _), _ = call("loss", batch, KEY, specials=specials)
            assert np.isfinite(total) and weight > 0


class TestGeneTables:
    @pytest.mark.parametrize("kind", ["frozen", "projected"])
    def test_vectors_from_outside_are_read_and_predicted(self, kind):
        table = {"kind": kind, "dim": 16 if kind == "frozen" else 5}
        config = {**TINY["geneformer"], "gene_table": table, "dropout": 0.0}
        model = models.build("geneformer", config, GENES)
        state = jax.jit(lambda: initialise(model))()
        assert float(jnp.abs(state["buffers"]["gene"].get("special", jnp.ones(1))).max()) > 0
        vectors = np.random.default_rng(0).standard_normal((GENES, table["dim"])).astype(np.float32)
        gene = {**state["buffers"]["gene"], "table": vectors, "known": np.ones(GENES, np.float32)}

        def loss(params, gene):
            return bind(model, params, {**state["buffers"], "gene": gene}).loss(batch_of(), KEY)[0]

        both = jax.jit(jax.value_and_grad(loss))
        value, gradient = both(state["params"], gene)
        assert np.isfinite(value) and value != both(state["params"], {**gene, "table": 2 * vectors})[0]
        assert ("gene" in gradient) == (kind == "projected")


class TestHeads:
    def test_are_there_when_asked_for(self):
        cell, _ = call("predict_cell", batch_of(), n_outputs=4)
        assert cell.shape == (6, 4)
        (gene_id, scores), _ = call("predict_genes", batch_of(), n_outputs=4, head="gene", specials=True)
        assert scores.shape == (6, SLOTS + 2, 4) and gene_id[:, 0].tolist() == [-1] * 6
        on = batch_of().gene_id >= 0
        assert [set(r[r >= 0].tolist()) for r in np.asarray(gene_id)] == [
            set(r[o].tolist()) for r, o in zip(batch_of().gene_id, on, strict=True)
        ]

    @pytest.mark.parametrize(
        "method, changes",
        [
            ("predict_cell", {}),
            ("predict_genes", {"n_outputs": 2}),
            ("predict_cell", {"n_outputs": 2, "head": "gene"}),
        ],
    )
    def test_are_missed_when_not(self, method, changes):
        with pytest.raises(ValueError, match="no such head"):
            call(method, batch_of(), **changes)

    def test_a_classifier_is_not_pretrained(self):
        with pytest.raises(ValueError, match="only one without it is pretrained"):
            call("loss", batch_of(), KEY, n_outputs=2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_fraction": 0.0}, "between 0 and 1"),
        ({"embed_layer": -3}, "0 is the last of 2 layers"),
        ({"max_length": 2, "specials": True}, "no room for a gene"),
        ({"pool": "cls"}, "there is no <cls>"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        models.build("geneformer", {**TINY["geneformer"], **changes}, GENES)
