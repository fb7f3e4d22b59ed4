"""Shared layers: dropout by row, LayerNorm and its gradient by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scjax.encoding import row_keys
from scjax.nn.layers import dropout, fold, layer_norm


def keys_of(rows, seed=0):
    return row_keys(jax.random.key(seed), jnp.asarray(rows, jnp.uint32))


def test_dropout_keeps_the_right_share_and_the_mean():
    x = jnp.ones((4, 200, 128))
    kept = dropout(x, 0.2, keys_of(range(4)))
    for cell in np.asarray(kept):
        assert abs((cell == 0).mean() - 0.2) < 0.01  # five standard deviations are 0.0125 / 2
        np.testing.assert_allclose(cell[cell != 0], 1.25, rtol=1e-6)


def test_dropout_of_a_cell_does_not_depend_on_the_batch():
    x = jnp.ones((5, 30, 16))
    together = dropout(x, 0.5, keys_of([7, 3, 9, 4, 1]))
    alone = dropout(x[:1], 0.5, keys_of([9]))
    np.testing.assert_array_equal(together[2], alone[0])


def test_dropout_is_independent_between_cells_layers_entries_and_neighbours():
    x = jnp.ones((2, 300, 64))
    keys = keys_of([0, 1])
    draws = [np.asarray(dropout(x, 0.5, k))[i] != 0 for k in (keys, fold(keys, 1)) for i in (0, 1)]
    pairs = [(a, b) for i, a in enumerate(draws) for b in draws[:i]]
    pairs += [(draws[0][1:], draws[0][:-1]), (draws[0][:, 1:], draws[0][:, :-1])]
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


def test_no_dropout_without_keys_or_rate():
    x = jnp.ones((2, 3, 4))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, keys_of([0, 1])) is x


def test_layer_norm_and_its_gradient():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 5, 24)) + 2, jnp.float32)
    weight = jnp.asarray(rng.standard_normal((3, 5, 24)), jnp.float32)
    norm = layer_norm(24, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(norm)
    state = jax.tree.map(lambda p: p + jnp.asarray(rng.standard_normal(p.shape), p.dtype), state)

    def plain(state, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        module = nnx.merge(graphdef, state)
        return scaled * module.scale[...] + module.bias[...]

    def ours(state, x):
        return nnx.merge(graphdef, state)(x)

    np.testing.assert_allclose(ours(state, x), plain(state, x), atol=1e-5)
    found, due = (
        jax.grad(lambda s, x, f=f: (f(s, x) * weight).sum(), argnums=(0, 1))(state, x) for f in (ours, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    half = ours(state, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    assert jax.grad(lambda x: ours(state, x).sum())(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
