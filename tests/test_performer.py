"""FAVOR+: that it approximates softmax attention, and what its stabilisers and masks promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scjax.nn import Buffer
from scjax.nn.attention import attention
from scjax.nn.performer import PerformerBlock, draw_projection, favor, n_features, redraw
from scjax.parallel import Layout, MeshConfig, batch_sharding, make_mesh

D = 8


def qkv(seed: int = 0, b: int = 3, s: int = 20, h: int = 2, scale: float = 0.7):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(scale * jax.random.normal(k, (b, s, h, D)) for k in keys)


def length_mask(*lengths: int, s: int = 20):
    return jnp.arange(s) < jnp.array(lengths)[:, None]


@pytest.fixture(scope="module")
def projection():
    return draw_projection(jax.random.key(7), 40, D)


class TestProjection:
    def test_published_number_of_features(self):
        assert n_features(64) == 266

    def test_rows_are_orthogonal_in_blocks_and_as_long_as_gaussian_vectors(self):
        w = np.asarray(draw_projection(jax.random.key(0), 3 * D + 2, D))
        assert w.shape == (3 * D + 2, D)
        for start in range(0, len(w), D):
            unit = w[start : start + D] / np.linalg.norm(w[start : start + D], axis=1, keepdims=True)
            np.testing.assert_allclose(unit @ unit.T, np.eye(len(unit)), atol=1e-5)
        lengths = np.linalg.norm(np.asarray(draw_projection(jax.random.key(1), 4000, D)), axis=1)
        assert abs((lengths**2).mean() - D) < 4 * np.sqrt(2 * D / 4000)  # chi squared with D degrees
        assert abs((lengths**2).var() - 2 * D) < 2.5

    def test_the_law_does_not_prefer_a_direction(self):
        w = np.asarray(draw_projection(jax.random.key(2), 8000, D))
        np.testing.assert_allclose(w.mean(0), 0, atol=0.06)
        np.testing.assert_allclose(w.T @ w / 8000, np.eye(D), atol=0.06)


class TestFavor:
    def test_is_softmax_attention_in_the_limit_of_many_features(self):
        q, k, v = qkv(scale=0.5)
        exact = attention(q, k, v, jnp.ones((3, 20), bool), backend="einsum")

        def error(m, seeds):
            w = [draw_projection(jax.random.key(s), m, D) for s in range(seeds)]
            out = jnp.stack([favor(q, k, v, x) for x in w])
            return float(jnp.sqrt(((out - exact) ** 2).mean())), float(jnp.abs(out.mean(0) - exact).max())

        few, _ = error(32, 8)
        many, _ = error(2048, 8)
        assert many < 0.01 < few and few / many > 4  # the error falls as 1 / sqrt(m): by 8
        # and it is small in the mean over draws although a single draw is noisy
        assert error(256, 64)[1] < 0.02

    def test_headwise_and_einsum_agree(self, projection):
        q, k, v = qkv()
        for valid in (None, length_mask(20, 11, 1)):
            for stabiliser in ("head", "global"):
                for mask in ("keys", "values"):

                    def total(q, k, v, backend, valid=valid, stabiliser=stabiliser, mask=mask):
                        out = favor(
                            q, k, v, projection, valid, stabiliser=stabiliser, mask=mask, backend=backend
                        )
                        return (out**2).sum(), out

                    run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True), static_argnums=3)
                    (_, out), gradients = run(q, k, v, "einsum")
                    (_, other), others = run(q, k, v, "headwise")
                    np.testing.assert_allclose(other, out, atol=3e-6)
                    for a, b in zip(others, gradients, strict=True):
                        np.testing.assert_allclose(a, b, atol=3e-5)

    @pytest.mark.parametrize("stabiliser", ["head", "global"])
    @pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
    def test_a_mesh_changes_nothing(self, projection, sizes, stabiliser):
        q, k, v = qkv(b=8)
        valid = length_mask(20, 11, 1, 20, 7, 3, 19, 2)

        @jax.jit
        def run(q, k, v, valid):
            def total(q, k, v):
                out = favor(q, k, v, projection, valid, stabiliser=stabiliser)
                return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

            return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

        due = run(q, k, v, valid)
        mesh = make_mesh(MeshConfig(*sizes))
        rows = batch_sharding(mesh)
        jax.clear_caches()  # the layout is no argument
        with Layout(mesh).active():
            placed = [jax.device_put(x, rows) for x in (q, k, v, valid)]
            found, text = run(*placed), run.lower(*placed).compile().as_text()
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
        if sizes == (8, 1, 1):  # each device computes its own cells
            assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))

    @pytest.mark.parametrize("backend", ["einsum", "headwise"])
    def test_against_its_formula_in_numpy(self, projection, backend):
        q, k, v = (np.asarray(x, np.float64) for x in qkv(scale=1.5))
        w, valid = np.asarray(projection, np.float64), np.asarray(length_mask(20, 11, 1))
        out = favor(*qkv(scale=1.5), projection, valid, backend=backend)
        for b in range(3):
            n = valid[b].sum()
            for h in range(2):
                x, y = q[b, :, h] * D**-0.25, k[b, :n, h] * D**-0.25
                a = x @ w.T
                phi_q = np.exp(a - (x**2).sum(1, keepdims=True) / 2 - a.max(1, keepdims=True)) + 1e-4
                a = y @ w.T
                phi_k = np.exp(a - (y**2).sum(1, keepdims=True) / 2 - a.max()) + 1e-4
                weights = phi_q @ phi_k.T
                expected = weights @ v[b, :n, h] / weights.sum(1, keepdims=True)
                np.testing.assert_allclose(out[b, :, h], expected, atol=2e-5)

    def test_head_stabiliser_sees_one_cell_and_one_head(self, projection):
        q, k, v = qkv(scale=2.0)
        together = favor(q, k, v, projection)
        np.testing.assert_allclose(favor(q[1:2], k[1:2], v[1:2], projection)[0], together[1], atol=2e-6)
        louder = k.at[0].mul(3.0).at[:, :, 1].mul(2.0)  # another cell, another head
        np.testing.assert_allclose(favor(q, louder, v, projection)[1:, :, 0], together[1:, :, 0], atol=2e-6)

    def test_global_stabiliser_does_not(self, projection):
        """The accident that it restores: a cell's result depends on its batch."""
        q, k, v = qkv(scale=2.0)
        louder = k.at[0].mul(3.0)
        a, b = (favor(q, x, v, projection, stabiliser="global")[1:] for x in (k, louder))
        assert float(jnp.abs(a - b).max()) > 1e-2

    def test_padding_is_not_there(self, projection):
        q, k, v = qkv(scale=2.0)
        valid = length_mask(13, 13, 13)
        noise = jnp.where(valid[..., None, None], 0, 50.0)
        padded = favor(q, k + noise, v + noise, projection, valid)[:, :13]
        np.testing.assert_allclose(padded, favor(q[:, :13], k[:, :13], v[:, :13], projection), atol=2e-6)

    def test_values_only_mask_thins_out(self, projection):
        """The accident that it restores: padding counts in the denominator."""
        q, k, v = qkv()
        v = jnp.ones_like(v)
        valid = length_mask(13, 13, 13)
        np.testing.assert_allclose(favor(q, k, v, projection, valid), 1, atol=1e-5)
        thin = favor(q, k, v, projection, valid, mask="values")
        assert 0.4 < float(thin.min()) and float(thin.max()) < 0.9  # 13 of 20 keys have a value
        whole = favor(q, k, jnp.where(valid[..., None, None], v, 0), projection)
        np.testing.assert_allclose(thin, whole, atol=1e-6)

    def test_extreme_inputs_stay_finite(self, projection):
        q, k, v = qkv(scale=100.0)
        out, gradient = jax.value_and_grad(lambda q: (favor(q, k, v, projection) ** 2).sum())(q)
        assert np.isfinite(out) and np.isfinite(gradient).all()

    def test_features_are_not_kept_for_the_backward_pass(self, projection):
        """What is kept grows with S x D, not with the S x M of the features."""
        _, pullback = jax.vjp(lambda *x: favor(*x, projection), *qkv(s=64))
        kept = sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf is not projection)
        assert (
            3 * 3 * 64 * 2 * D <= kept < 3 * 64 * 2 * len(projection)
        )  # more than q, k, v, less than features

    def test_unknown_backend(self, projection):
        with pytest.raises(ValueError, match='"headwise", not "pairs"'.replace('"pairs"', "'pairs'")):
            favor(*qkv(), projection, backend="pairs")


class TestRedraw:
    def test_schedule(self):
        old = jnp.stack([draw_projection(jax.random.key(s), 16, D) for s in range(3)])
        run = jax.jit(lambda calls: redraw(old, jax.random.key(5), calls, 4))
        changed = [bool((run(jnp.int32(calls)) != old).all()) for calls in range(13)]
        assert [i for i, c in enumerate(changed) if c] == [4, 8, 12]
        kept = [bool((run(jnp.int32(calls)) == old).all()) for calls in range(13)]
        assert kept == [not c for c in changed]
        first, second = run(jnp.int32(4)), run(jnp.int32(8))
        assert bool((first != second).all()) and bool((first[0] != first[1]).all())

    def test_never(self):
        old = jnp.ones((1, 16, D))
        assert redraw(old, jax.random.key(0), jnp.int32(7), 0) is old


class TestBlock:
    def block(self, **changes):
        return PerformerBlock(12, 2, D, 24, rngs=nnx.Rngs(0), **changes)

    def test_projection_is_a_buffer_and_inner_width_is_free(self):
        block = self.block()
        assert isinstance(block.attention.projection, Buffer)
        assert block.attention.projection[...].shape == (n_features(D), D)
        assert block.attention.qkv.kernel[...].shape == (12, 3, 2, D)
        assert self.block(qkv_bias=True).attention.qkv.bias[...].shape == (3, 2, D)

    def test_dropout_by_cell_key(self):
        block = self.block(dropout=0.5)
        x = jax.random.normal(jax.random.key(0), (3, 10, 12))
        keys = jax.random.split(jax.random.key(1), 3)
        run = jax.jit(lambda x, keys: block(x, None, keys))
        noisy = run(x, keys)
        np.testing.assert_allclose(run(x[1:2], keys[1:2])[0], noisy[1], atol=2e-6)
        assert float(jnp.abs(noisy - block(x)).max()) > 0.1

    @pytest.mark.parametrize("changes", [{"stabiliser": "cell"}, {"mask": "queries"}])
    def test_refuses(self, changes):
        with pytest.raises(ValueError, match="|".join(changes)):
            self.block(**changes)
