"""The fused cross-entropy against the plain formula."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from scjax.objectives import linear_cross_entropy
from scjax.parallel import MeshConfig, make_mesh


def inputs(b=3, k=7, d=5, v=11, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    x, table, bias = (
        jnp.asarray(scale * rng.standard_normal(s), jnp.float32) for s in ((b, k, d), (v, d), v)
    )
    target = jnp.asarray(rng.integers(0, v, (b, k)), jnp.int32)
    weight = jnp.asarray(rng.random((b, k)) * (rng.random((b, k)) < 0.6), jnp.float32)
    return x, table, bias, target, weight


def plain(x, table, bias, target, weight):
    logits = jnp.einsum("bkd,vd->bkv", x, table, precision="highest") + bias
    own = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    loss = (weight * (jax.nn.logsumexp(logits, -1) - own)).sum()
    return loss, (weight * (logits.argmax(-1) == target)).sum()


def gradients(function, *arguments):
    """Of 3 x the loss, so that a cotangent that is lost shows."""
    scaled = lambda x, table, bias: 3 * function(x, table, bias, *arguments[3:])[0]  # noqa: E731
    return jax.jit(jax.grad(scaled, (0, 1, 2)))(*arguments[:3])


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(1, 12)),
    st.one_of(st.none(), st.integers(1, 12)),
    st.integers(0, 1000),
    st.sampled_from([0.1, 1.0, 20.0]),
)
def test_values_and_gradients(shape, chunk, seed, scale):
    arguments = inputs(*shape, seed, scale)
    found, expected = linear_cross_entropy(*arguments, chunk), plain(*arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    fused = lambda *a: linear_cross_entropy(*a, chunk)  # noqa: E731
    for a, b in zip(gradients(fused, *arguments), gradients(plain, *arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)
    # the loss that comes with gradients is the one that comes without
    value = jax.value_and_grad(lambda x: fused(x, *arguments[1:]), has_aux=True)(arguments[0])[0]
    np.testing.assert_allclose(value, found, rtol=1e-6)


def test_positions_without_weight_count_for_nothing():
    x, table, bias, target, weight = inputs(k=6)
    weight = weight.at[:, 4:].set(0)
    far = (x.at[:, 4:].set(jnp.inf), table, bias, target, weight)  # two whole chunks
    found = gradients(lambda *a: linear_cross_entropy(*a, 2), *far)
    for a, b in zip(found, gradients(plain, x, table, bias, target, weight), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    none = linear_cross_entropy(x, table, bias, target, 0 * weight)
    assert [float(n) for n in none] == [0, 0]


def test_bfloat16_has_a_softmax_in_float32():
    """With 2,000 classes a sum of exponentials in bfloat16 would stop growing at 256."""
    x, table, bias, target, weight = inputs(v=2000, scale=0.3)
    half = (x.astype(jnp.bfloat16), table, bias, target, weight)
    loss, expected = linear_cross_entropy(*half), plain(*half)
    assert loss[0].dtype == jnp.float32
    np.testing.assert_allclose(loss[0], expected[0], rtol=2e-3)
    dx, dtable, dbias = gradients(linear_cross_entropy, *half)
    assert dx.dtype == jnp.bfloat16 and dtable.dtype == dbias.dtype == jnp.float32
    for a, b in zip((dx, dtable, dbias), gradients(plain, x, table, bias, target, weight), strict=True):
        np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(b).max()))


def test_no_array_of_all_logits():
    """Neither forward nor backward holds B x K x V numbers; the largest array is a chunk or the table."""
    b, k, d, v, chunk = 2, 64, 4, 50, 8
    arguments = inputs(b, k, d, v)

    def largest(jaxpr):
        sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
        inner = [largest(sub) for e in jaxpr.eqns for sub in jaxprs_in_params(e.params)]
        return max([*sizes, *inner], default=0)

    jaxpr = jax.make_jaxpr(lambda *a: gradients(lambda *c: linear_cross_entropy(*c, chunk), *a))(*arguments)
    assert largest(jaxpr.jaxpr) <= max(b * chunk * v, b * k * d, v * d) < b * k * v


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 1, 4), (2, 2, 2)], ids=str)
def test_on_a_mesh_with_the_table_split_over_its_classes(shape):
    mesh = make_mesh(MeshConfig(*shape))
    x, table, bias, target, weight = inputs(8, 6, 4, 16)
    rows, classes = PartitionSpec(("data", "fsdp")), PartitionSpec("tensor")
    specs = (rows, classes, classes, rows, rows)
    spread = [
        jax.device_put(a, NamedSharding(mesh, s))
        for a, s in zip((x, table, bias, target, weight), specs, strict=True)
    ]
    fused = lambda *a: linear_cross_entropy(*a, 2)  # noqa: E731
    np.testing.assert_allclose(jax.jit(fused)(*spread), fused(x, table, bias, target, weight), rtol=1e-5)
    alone = gradients(plain, x, table, bias, target, weight)
    for a, b in zip(gradients(fused, *spread), alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
