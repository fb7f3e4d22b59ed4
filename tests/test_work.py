"""Tokens and useful operations of a step: what each system says of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scjax import models
from scjax.models.geneformer import GeneformerConfig
from scjax.models.scgpt import ScGPTConfig
from scjax.nn import abstract, bind, initialise
from scjax.nn.work import weights_of, work_of
from scjax.types import CellBatch

SMALL = {"d_model": 8, "n_heads": 2, "n_layers": 3, "d_ff": 16}
WIDE = {"d_model": 64, "n_heads": 2, "n_layers": 4, "d_ff": 128}
DECODER = {"decoder_d_model": 64, "decoder_n_heads": 2, "decoder_d_head": 32, "decoder_n_layers": 4}
TINY = {
    "geneformer": WIDE,
    "scgpt": WIDE | {"mask_fractions": (0.5,), "second_pass_after": 0},
    "scfoundation": WIDE | DECODER | {"decoder_d_ff": 128, "thinning": 0.0},
    "scbert": WIDE | {"d_head": 32},
    "celllm": WIDE | {"d_head": 32},
}


def cell_batch(rng, n_genes):
    """Two cells that express every gene."""
    count = rng.poisson(20.0, (2, n_genes)).astype(np.float32) + 1
    n = np.full(2, n_genes, np.int32)
    gene_id = np.tile(np.arange(n_genes, dtype=np.int32), (2, 1))
    rows, ones = np.arange(2, dtype=np.uint32), np.ones(2, np.float32)
    return CellBatch(gene_id, count, count.sum(1), n, rows, {}, {}, ones)


def work(system, config, n_genes, cells, weight=1.0):
    model = models.build(system, config, n_genes)
    variables = jax.jit(lambda: initialise(model))()
    module = bind(model, variables["params"], variables["buffers"])
    return [float(x) for x in work_of(model, module, np.asarray(cells), weight)]


def test_operations_of_one_layer_of_geneformer():
    """Six for each weight and token, 12 d n for the attention of a token, the head at the hidden tokens."""
    config = {"d_model": 8, "n_heads": 2, "n_layers": 1, "d_ff": 16, "embed_layer": 0, "mask_fraction": 0.1}
    expected = 10 * (6 * (4 * 64 + 2 * 128) + 12 * 8 * 10) + 6 * (64 + 8 * 102)
    assert work("geneformer", config, 100, [10]) == [10, expected]
    assert work("geneformer", config, 100, [10, 10, 3], [1.0, 1.0, 0.0]) == [20, 2 * expected]
    long = GeneformerConfig().max_length + 500  # what is cut away costs nothing
    assert work("geneformer", config, 100, [long]) == work("geneformer", config, 100, [long - 500])


def test_unknown_genes_are_attended_to_by_none():
    config = SMALL | {"mask_fractions": (0.5,), "mvc_weight": 0.0, "second_pass_after": 0}
    d, n, layers = 8, 40, 3
    known = n / 2 + 1
    stack = layers * ((n + 1) * (6 * (3 * d * d + 2 * d * 16) + 12 * d * known) + known * 6 * d * d)
    heads, values = 6 * (n / 2) * (2 * d * d + d), 6 * known * d * d
    assert work("scgpt", config, 100, [n]) == [n + 1, pytest.approx(stack + heads + values)]
    twice = work("scgpt", config | {"second_pass_after": 5}, 100, [n])
    assert twice == work("scgpt", config, 100, [n]), "the second pass has not begun"
    assert ScGPTConfig().second_pass_after


def products(jaxpr) -> float:
    """Operations of the matrix products in a jaxpr, loops as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * np.prod([shape[i] for i in contracted])
            continue
        inner = [
            products(j) for j in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr) if is_jaxpr(j)
        ]
        if eqn.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * eqn.params.get("length", 1)
    return total


def is_jaxpr(x):
    return hasattr(x, "eqns")


@pytest.mark.parametrize("system", models.SYSTEMS)
def test_what_is_counted_is_what_is_computed(system):
    """A third of it, that is: the forward pass, on a cell without padding, by its matrix products."""
    n_genes = 96
    model = models.build(system, TINY[system], n_genes)
    variables = jax.jit(lambda: initialise(model))()
    rng = np.random.default_rng(0)
    batch = cell_batch(rng, n_genes)

    def loss(batch):
        return bind(model, variables["params"], variables["buffers"]).loss(batch, jax.random.key(0))

    computed = products(jax.make_jaxpr(loss)(batch).jaxpr)
    module = bind(model, variables["params"], variables["buffers"])
    counted = float(work_of(model, module, (batch.gene_id >= 0).sum(1))[1]) / 3
    assert 0.8 < counted / computed <= 1


class Plain(nnx.Module):
    def __init__(self, *, rngs):
        self.gene = nnx.Param(jnp.zeros((50, 4)), axes=("vocab", "embed"))
        self.dense = nnx.Linear(4, 4, rngs=rngs)


def test_a_model_that_tells_nothing():
    model = abstract(lambda: Plain(rngs=nnx.Rngs(0)))
    assert weights_of(model) == 20
    assert [float(x) for x in work_of(model, Plain(rngs=nnx.Rngs(0)), np.array([3, 4]))] == [7, 6 * 7 * 20]
