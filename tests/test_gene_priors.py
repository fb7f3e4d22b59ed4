"""Several tables of gene vectors at once: one embedder mixes them, whatever they lack falls back."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scjax import models
from scjax.config import ConfigError, from_config
from scjax.nn import abstract, bind, initialise, shapes_of
from scjax.nn.embedder import GeneEmbedder, GeneTable

N, SPECIAL, D, DIM = 12, 2, 6, 4
KNOWN = {"graph": np.arange(N) % 3 > 0, "text": np.arange(N) > 4}
IDS = np.array([[0, 2, 13, 7], [11, 12, 5, 5]])
CONFIG = {
    "kind": "mixed",
    "mix": {"text": {"kind": "frozen"}, "graph": {"kind": "projected", "dim": DIM}},
}


@functools.cache
def mixture():
    """(abstract embedder, its variables with the tables filled in and unequal weights)."""
    table, init = from_config(GeneTable, CONFIG), nnx.initializers.normal(1.0)
    model = abstract(lambda: GeneEmbedder(N, SPECIAL, D, table, init=init, rngs=nnx.Rngs(0)))
    variables, rng = initialise(model), np.random.default_rng(0)
    for name, known in KNOWN.items():
        buffers = variables["buffers"]["mixed"][name]
        vectors = 30 * rng.normal(size=buffers["table"].shape) * known[:, None]
        buffers |= {"table": jnp.asarray(vectors, jnp.float32), "known": jnp.asarray(known, jnp.float32)}
    variables["params"]["weight"] = jnp.asarray([0.5, -1.0, 1.0])  # learned vector, graph, text
    return model, variables


def by_hand(params, buffers):
    """Rows of all ids from the definition."""
    mixed, out = buffers["mixed"], np.array(params["fallback"])
    table = np.asarray(mixed["graph"]["table"])
    table = table / np.sqrt(np.square(table[KNOWN["graph"]]).mean())
    mapped = params["mixed"]["graph"]["projection"]
    given = {"graph": table @ mapped["kernel"] + mapped["bias"], "text": np.asarray(mixed["text"]["table"])}
    weight = np.exp(np.asarray(params["weight"]))
    for gene in range(N):
        parts = [(weight[0], out[gene])]
        parts += [(weight[1 + i], given[s][gene]) for i, s in enumerate(given) if KNOWN[s][gene]]
        total = sum(w for w, _ in parts)
        out[gene] = sum(w * v for w, v in parts) / total
    return out


class TestMixture:
    @pytest.mark.parametrize("repeat", [1, 5], ids=["fewer tokens than genes", "more"])
    def test_is_the_weighted_mean_of_what_is_known(self, repeat):
        model, variables = mixture()
        ids = np.tile(IDS, (repeat, 1))
        found = jax.jit(lambda ids: bind(model, **variables)(ids))(ids)
        assert found.shape == (*ids.shape, D)
        np.testing.assert_allclose(found, by_hand(**variables)[ids], rtol=1e-5, atol=1e-5)

    def test_what_no_table_has_is_its_learned_vector(self):
        model, variables = mixture()
        every = jnp.arange(N + SPECIAL)
        without = np.append(~(KNOWN["graph"] | KNOWN["text"]), np.ones(SPECIAL, bool))
        assert 1 < without.sum() < N
        same = (bind(model, **variables)(every) == variables["params"]["fallback"]).all(1)
        np.testing.assert_array_equal(same, without)

    def test_a_table_can_be_put_aside(self):
        """With all the weight on one table, genes that it knows have its vectors alone."""
        model, variables = mixture()
        params = variables["params"] | {"weight": jnp.asarray([0.0, 0.0, 60.0])}
        found = bind(model, params, variables["buffers"]).vectors()
        text = variables["buffers"]["mixed"]["text"]["table"]
        np.testing.assert_allclose(found[KNOWN["text"]], text[KNOWN["text"]], rtol=1e-5)

    def test_gradients(self):
        """Reach the weights, the map and the learned vectors, all finite; tables have none."""
        model, variables = mixture()
        loss = lambda params: jnp.square(bind(model, params, variables["buffers"])(IDS)).sum()  # noqa: E731
        found = jax.grad(loss)(variables["params"])
        assert set(found) == {"mixed", "weight", "fallback"} and set(found["mixed"]) == {"graph"}
        for leaf in jax.tree.leaves(found):
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
        untouched = np.setdiff1d(np.arange(N + SPECIAL), IDS)
        assert not found["fallback"][untouched].any()

    def test_the_units_of_a_table_do_not_matter(self):
        model, variables = mixture()
        graph = variables["buffers"]["mixed"]["graph"]
        scaled = variables["buffers"]["mixed"] | {"graph": graph | {"table": graph["table"] / 700}}
        moved = bind(model, variables["params"], {"mixed": scaled})(IDS)
        np.testing.assert_allclose(moved, bind(model, **variables)(IDS), rtol=1e-4, atol=1e-5)


class TestConfigs:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"kind": "mixed"}, 'names no table; tables are named for "mixed"'),
            ({"kind": "frozen", "mix": CONFIG["mix"]}, r"kind = 'frozen' and gene_table.mix names \['graph'"),
            ({"kind": "mixed", "mix": {"a": {"kind": "random"}}}, r"mix.a.kind = 'random'; \"frozen\" or"),
            ({"kind": "mixed", "mix": {"a": {"knd": "frozen"}}}, "mix.a.knd is unknown; did you mean 'kind'"),
            ({"kind": "mixed", "mix": {"median": {"kind": "frozen"}}}, "mix.median: .* not gene or median"),
        ],
    )
    def test_errors(self, given, message):
        with pytest.raises(ConfigError, match=message):
            from_config(GeneTable, given)

    def test_what_is_given_stays_as_it_is(self):
        given = {"a": {"kind": "frozen"}}
        assert GeneTable("mixed", mix=given) == GeneTable("mixed", mix={"a": GeneTable("frozen")})
        assert given == {"a": {"kind": "frozen"}}

    def test_a_frozen_part_has_the_width_of_the_model(self):
        table = GeneTable("mixed", mix={"a": GeneTable("frozen", 5)})
        with pytest.raises(ValueError, match="width of the model, 6, not 5"):
            GeneEmbedder(N, SPECIAL, D, table, init=nnx.initializers.zeros, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("system", sorted(models.SYSTEMS))
def test_every_system_can_mix(system):
    """The buffers that ``tables`` promises to fill are there, and no others are promised."""
    model, config = models.resolve(system)
    needs = model.tables(from_config(config, {"gene_table": CONFIG | {"mix": MIX}}))
    buffers = shapes_of(models.build(system, {"gene_table": {"kind": "mixed", "mix": MIX}}, 30))["buffers"]
    places = {name: what.partition(":")[2] for name, what in needs.items() if name != "median"}
    assert set(places) == set(MIX) == set(buffers["gene"]["mixed"])
    for name, place in places.items():
        assert place == f"gene/mixed/{name}"
        assert set(buffers["gene"]["mixed"][name]) == {"table", "known"}


MIX = {"graph": {"kind": "projected", "dim": 5}, "text": {"kind": "projected", "dim": 7}}
