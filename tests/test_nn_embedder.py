"""Gene embeddings: learned, from a table as it is, and from a table under a learned map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scjax import models
from scjax.config import ConfigError, from_config
from scjax.nn import abstract, axes_of, bind, initialise, shapes_of
from scjax.nn.embedder import GeneEmbedder, GeneTable

N, SPECIAL, D, DIM = 12, 2, 6, 4
KNOWN = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1], np.float32)
IDS = np.array([[0, 2, 13, 7], [11, 12, 5, 5]])


@functools.cache
def embedder(kind, special=SPECIAL):
    """(abstract embedder, its variables with the tables filled in)."""
    table = GeneTable(kind, DIM if kind == "projected" else 0)
    init = nnx.initializers.normal(1.0)
    model = abstract(lambda: GeneEmbedder(N, special, D, table, init=init, rngs=nnx.Rngs(0)))
    variables, rng = initialise(model), np.random.default_rng(0)
    if kind != "random":
        vectors = rng.normal(size=variables["buffers"]["table"].shape) * KNOWN[:, None]
        variables["buffers"] |= {"table": jnp.asarray(vectors, jnp.float32), "known": jnp.asarray(KNOWN)}
    if kind == "frozen":
        variables["buffers"]["special"] = jnp.asarray(rng.normal(size=(special, D)), jnp.float32)
    if kind == "projected":
        variables["params"]["projection"]["bias"] = jnp.arange(D, dtype=jnp.float32)
    return model, variables


def rows(kind):
    """The embedding of every id, from the definition."""
    params, buffers = (embedder(kind)[1][name] for name in ("params", "buffers"))
    if kind == "random":
        return np.asarray(params["embedding"])
    if kind == "frozen":
        return np.concatenate([buffers["table"], buffers["special"]])
    out = np.array(params["fallback"])
    projected = buffers["table"] @ params["projection"]["kernel"] + params["projection"]["bias"]
    out[:N][KNOWN > 0] = projected[KNOWN > 0]
    return out


@pytest.mark.parametrize("kind", ["random", "frozen", "projected"])
class TestKinds:
    @pytest.mark.parametrize("repeat", [1, 5], ids=["fewer tokens than genes", "more"])
    def test_looks_up(self, kind, repeat):
        model, variables = embedder(kind)
        ids = np.tile(IDS, (repeat, 1))
        out = jax.jit(lambda ids: bind(model, **variables)(ids))(ids)
        assert out.shape == (*ids.shape, D) and out.dtype == jnp.float32
        np.testing.assert_allclose(out, rows(kind)[ids], atol=1e-6)

    def test_vectors_are_those_of_the_genes(self, kind):
        model, variables = embedder(kind)
        np.testing.assert_allclose(bind(model, **variables).vectors(), rows(kind)[:N], atol=1e-6)

    @pytest.mark.parametrize("repeat", [1, 5])
    def test_gradients(self, kind, repeat):
        """Only what is learned has one; a gene without a vector, and a special token, has its own."""
        model, variables = embedder(kind)
        ids = np.tile(IDS, (repeat, 1))
        weights = np.random.default_rng(1).normal(size=(*ids.shape, D)).astype(np.float32)

        def total(params):
            return (weights * bind(model, params, variables["buffers"])(ids)).sum()

        found = jax.grad(total)(variables["params"])
        at = np.zeros((N + SPECIAL, D), np.float32)
        np.add.at(at, ids, weights)
        if kind == "random":
            np.testing.assert_allclose(found["embedding"], at, atol=1e-5)
        elif kind == "frozen":
            assert found == {}
        else:
            own = np.append(KNOWN == 0, np.ones(SPECIAL, bool))
            np.testing.assert_allclose(found["fallback"], at * own[:, None], atol=1e-5)
            table = np.asarray(variables["buffers"]["table"])
            kernel = table.T @ (at[:N] * KNOWN[:, None])
            np.testing.assert_allclose(found["projection"]["kernel"], kernel, atol=1e-5)

    def test_axes(self, kind):
        model, _ = embedder(kind)
        axes, shapes = axes_of(model), shapes_of(model)
        learned = {"random": "embedding", "projected": "fallback"}.get(kind)
        if learned:
            assert axes["params"][learned] == ("vocab", "embed")
            assert shapes["params"][learned].shape == (N + SPECIAL, D)
        if kind != "random":
            assert axes["buffers"]["table"] == ("vocab", "embed")
            assert shapes["buffers"]["table"].shape == (N, DIM if kind == "projected" else D)


def test_a_new_frozen_table_is_zero_and_fills_later():
    model, _ = embedder("frozen")
    fresh = initialise(model)
    assert fresh["params"] == {} and not jnp.any(bind(model, **fresh)(IDS))


def test_without_special_tokens():
    model, variables = embedder("frozen", special=0)
    np.testing.assert_array_equal(bind(model, **variables)(IDS % N), variables["buffers"]["table"][IDS % N])


class TestConfigs:
    def test_of_a_system(self):
        """By name from a config file, nested."""
        table = from_config(GeneTable, {"kind": "projected", "dim": 200})
        assert table == GeneTable("projected", 200)
        with pytest.raises(ConfigError, match="did you mean 'projected'"):
            from_config(GeneTable, {"kind": "projektd"})

    def test_bad_widths(self):
        def make(table):
            return GeneEmbedder(N, SPECIAL, D, table, init=nnx.initializers.zeros, rngs=nnx.Rngs(0))

        with pytest.raises(
            ValueError, match=r"width of the model, 6, not 4; gene_table.kind = \"projected\""
        ):
            make(GeneTable("frozen", 4))
        with pytest.raises(ValueError, match="gene_table.dim = -1 is negative"):
            GeneTable("projected", -1)
        assert make(GeneTable("frozen", 6)).table[...].shape == (N, 6)
        assert make(GeneTable("projected")).table[...].shape == (N, 6)


@pytest.mark.parametrize(
    "system", [name for name in models.SYSTEMS if hasattr(models.resolve(name)[1](), "gene_table")]
)
def test_every_system_with_a_table_says_what_it_needs(system):
    """With each kind, the buffers that ``tables`` promises to fill are there."""
    model, config = models.resolve(system)
    for kind in ("frozen", "projected", "random"):
        given = {"gene_table": {"kind": kind}}
        needs = model.tables(from_config(config, given))
        buffers = shapes_of(models.build(system, given, 30))["buffers"]
        vectors = [name for name, what in needs.items() if what == "vectors"]
        assert bool(vectors) == (kind != "random")
        for name in vectors:
            assert set(buffers[name]) >= {"table", "known"}
        for name in set(needs) - set(vectors):
            assert needs[name] == "median" and buffers[name].shape == (30,)
