"""The objectives of scGPT's fine-tuning, known-to-unknown attention and batch normalisation by domain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from scjax.nn.attention import attention
from scjax.nn.batchnorm import DomainBatchNorm
from scjax.nn.branch import switch_loss
from scjax.objectives import (
    elastic_cell_similarity,
    expressed_nll,
    label_cross_entropy,
    reverse_gradient,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestElasticCellSimilarity:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
    def test_is_the_published_mean(self, n, threshold, seed):
        cell = normal(n, 5, seed=seed)
        unit = cell / np.linalg.norm(cell, axis=1, keepdims=True)
        cosine = unit @ unit.T
        np.fill_diagonal(cosine, 0)
        expected = np.mean(1 - (np.maximum(cosine, 0) - threshold) ** 2)
        total, weight = elastic_cell_similarity(cell, np.ones(n, np.float32), threshold)
        np.testing.assert_allclose(total / weight, expected, rtol=1e-5)
        # neither length nor rows that fill the batch matter
        more = np.concatenate([cell * 7, normal(2, 5)])
        again = elastic_cell_similarity(more, np.r_[np.ones(n), 0, 0].astype(np.float32), threshold)
        np.testing.assert_allclose(again, (total, weight), rtol=1e-4)

    def test_pairs_above_the_threshold_attract_and_below_repel(self):
        def loss(cell):
            return elastic_cell_similarity(cell, jnp.ones(2), 0.6)[0]

        for cosine, closer in ((0.9, True), (0.3, False)):
            cell = jnp.array([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]])
            moved = cell - 0.01 * jax.grad(loss)(cell)
            after = moved[0] @ moved[1] / jnp.linalg.norm(moved[0]) / jnp.linalg.norm(moved[1])
            assert (after > cosine) == closer

    def test_a_cell_of_zeros_has_a_finite_gradient(self):
        gradient = jax.grad(lambda x: elastic_cell_similarity(x, jnp.ones(3), 0.3)[0])(jnp.zeros((3, 4)))
        assert np.isfinite(gradient).all()


def test_the_gradient_is_reversed():
    x = normal(4)
    np.testing.assert_array_equal(reverse_gradient(x), x)
    f = lambda x: (x**3).sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(lambda x: f(reverse_gradient(x)))(x), -jax.grad(f)(x))


def test_label_cross_entropy():
    logits, label = normal(4, 3), np.array([2, -1, 0, 1], np.int32)
    weight = np.array([1, 1, 1, 0], np.float32)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    total, n = label_cross_entropy(logits, label, weight)
    np.testing.assert_allclose(total, -(log_p[0, 2] + log_p[2, 0]), rtol=1e-5)
    assert n == 2
    assert np.isnan(label_cross_entropy(logits, np.array([3, 0, 0, 0]), weight)[0])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99))
def test_expressed_nll_is_that_of_bernoulli(seed):
    logit, target = normal(3, 5, seed=seed), np.maximum(normal(3, 5, seed=seed + 1), 0)
    mask = normal(3, 5, seed=seed + 2) > 0
    p = 1 / (1 + np.exp(-logit.astype(float)))
    expected = -np.log(np.where(target > 0, p, 1 - p))[mask].sum()
    total, n = expressed_nll(logit, target, mask)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert n == mask.sum()
    assert np.isfinite(expressed_nll(jnp.full((1, 1), -200.0), jnp.ones((1, 1)), jnp.ones((1, 1)))[0])


class TestAttention:
    def dense(self, q, k, v, valid, unknown):
        """In float64, under a mask of all pairs."""
        b, s, h, d = q.shape
        may = np.zeros((s, s), bool)
        may[:, unknown:] = True
        may[:unknown, :unknown] = np.eye(unknown, dtype=bool)
        may = may & (valid[:, None, :] | np.eye(s, dtype=bool)[None] & (np.arange(s) < unknown))
        scores = np.einsum("bshd,bthd->bhst", q.astype(float), k) / d**0.5
        scores = np.where(may[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("bhst,bthd->bshd", weights, v)

    @pytest.mark.parametrize("backend", ["einsum", "cellwise"])
    @pytest.mark.parametrize("unknown", [0, 3, 6])
    def test_is_dense_attention_under_a_mask(self, backend, unknown):
        q, k, v = (normal(2, 7, 2, 4, seed=i) * 2 for i in range(3))
        valid = np.ones((2, 7), bool)
        valid[1, [1, 5]] = False
        found = attention(q, k, v, valid, unknown=unknown, backend=backend)
        np.testing.assert_allclose(found, self.dense(q, k, v, valid, unknown), atol=2e-6)

    def test_scores_beyond_the_range_of_exp(self):
        """A score of itself far above and far below the others'."""
        for scale in (300.0, -300.0):
            q = np.ones((1, 3, 1, 4), np.float32)
            k = np.ones((1, 3, 1, 4), np.float32)
            k[:, 0] *= scale
            v = normal(1, 3, 1, 4)
            found = attention(q, k, v, np.ones((1, 3), bool), unknown=1, backend="einsum")
            expected = v[0, 0, 0] if scale > 0 else v[0, 1:, 0].mean(0)
            np.testing.assert_allclose(found[0, 0, 0], expected, rtol=1e-5)


class TestDomainBatchNorm:
    def layer(self, **options):
        layer = DomainBatchNorm(4, 3, affine=False, **options)
        layer.mean[...], layer.var[...] = normal(3, 4), normal(3, 4, seed=1) ** 2 + 0.5
        return layer

    def test_a_cell_is_normalised_within_its_own_domain(self):
        x, domain = normal(5, 6, 4, seed=2) * 3 + 1, np.array([0, 2, 0, 2, 2])
        valid = np.arange(6) < np.array([6, 4, 3, 6, 2])[:, None]
        layer = self.layer()
        before = np.asarray(layer.mean[...]), np.asarray(layer.var[...])
        y = np.asarray(layer(x, valid, domain, train=True))
        for d in (0, 2):
            tokens = (domain == d)[:, None] & valid
            np.testing.assert_allclose(y[tokens].mean(0), 0, atol=1e-5)
            np.testing.assert_allclose(y[tokens].std(0), 1, atol=1e-4)
            np.testing.assert_allclose(
                layer.mean[...][d], 0.9 * before[0][d] + 0.1 * x[tokens].mean(0), rtol=1e-5
            )
            np.testing.assert_allclose(
                layer.var[...][d], 0.9 * before[1][d] + 0.1 * x[tokens].var(0, ddof=1), rtol=1e-5
            )
        np.testing.assert_array_equal(layer.mean[...][1], before[0][1])  # no cell of it
        np.testing.assert_array_equal(layer.var[...][1], before[1][1])

    def test_evaluation_depends_on_the_cell_alone(self):
        x, domain, layer = normal(4, 6, 4), np.array([0, 1, 2, -1]), self.layer()
        together = layer(x, np.ones((4, 6)), domain, train=False)
        for i in range(4):
            alone = layer(x[i : i + 1], np.ones((1, 6)), domain[i : i + 1], train=False)
            np.testing.assert_allclose(alone[0], together[i], atol=1e-6)
        mean, var = layer.mean[...].mean(0), layer.var[...].mean(0)
        np.testing.assert_allclose(together[3], (x[3] - mean) / np.sqrt(var + 6.1e-5), rtol=1e-4, atol=1e-5)

    def test_the_accident(self):
        """All cells as of the first one's domain, padding in the statistics."""
        x, domain = normal(4, 6, 4), np.array([1, 0, 2, 0])
        layer = self.layer(first_domain=True)
        before = np.asarray(layer.mean[...])
        y = np.asarray(layer(x, np.zeros((4, 6)), domain, train=True))
        np.testing.assert_allclose(y.reshape(-1, 4).mean(0), 0, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(layer.mean[...])[[0, 2]], before[[0, 2]])
        assert np.abs(layer.mean[...][1] - before[1]).max() > 1e-3


def test_switch_loss_has_the_gradient_of_the_branch_taken():
    """Also at another slope, and none for what is given."""
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    x, given = normal(4, 3), (np.arange(4), jax.random.key(0))

    def branches(wide):
        def one(module, x, given):
            return (module(x) ** 2).sum() * wide, {"rows": given[0].sum()}

        return one

    def switched(state, x, index):
        module = nnx.merge(graphdef, state)
        value, aux = switch_loss(index, [branches(1.0), branches(3.0)], module, x, given)
        return 2 * value, aux

    def plain(state, x, wide):
        return 2 * branches(wide)(nnx.merge(graphdef, state), x, given)[0]

    run = jax.jit(jax.value_and_grad(switched, argnums=(0, 1), has_aux=True))
    for index, wide in ((0, 1.0), (1, 3.0)):
        (value, aux), gradient = run(state, x, index)
        expected, expected_gradient = jax.value_and_grad(plain, argnums=(0, 1))(state, x, wide)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert int(aux["rows"]) == 6
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(switched)(state, x, 1)[0], plain(state, x, 3.0), rtol=1e-5)
