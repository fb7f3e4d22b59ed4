"""The contrast of two views, and its exact gradient at the memory of a part of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scjax.encoding import row_keys
from scjax.nn.layers import dropout
from scjax.objectives import divide_and_conquer, info_nce

N, WIDE, TAU = 16, 12, 0.5


def params_of(seed=0, wide=WIDE):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"a": jax.random.normal(keys[0], (5, wide)), "b": jax.random.normal(keys[1], (wide, 6))}


def cells_of(n=N, seed=1):
    return jax.random.normal(jax.random.key(seed), (n, 5)), jnp.arange(n, dtype=jnp.uint32)


def encode(params, x, row):
    """Two dropout views [n, 2, 6] of each row, and a sum over rows."""

    def view(number):
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys(jax.random.key(9), row), number)
        return dropout(jnp.tanh(x @ params["a"]), 0.3, keys) @ params["b"]

    views = jnp.stack([view(0), view(1)], 1)
    return views, (views**2).sum()


def whole_loss(params, x, row, weight, parts=1):
    views, extra = divide_and_conquer(lambda rows: encode(params, *rows), (x, row), parts)
    total, n = info_nce(views[:, 0], views[:, 1], weight, TAU)
    return total / n + 1e-3 * extra


class TestInfoNCE:
    def test_by_hand(self):
        """Two cells at a right angle, each its own twin: -log(e^2 / (e^2 + 1)) at temperature 1/2."""
        a = jnp.array([[3.0, 0.0], [0.0, 0.1]])
        total, weight = info_nce(a, 7 * a, jnp.ones(2), 0.5)
        np.testing.assert_allclose(total, 2 * np.log1p(np.exp(-2.0)), rtol=1e-6)
        assert float(weight) == 2

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 1000), st.lists(st.booleans(), min_size=8, max_size=8))
    def test_rows_without_weight_take_no_part(self, seed, kept):
        a, b = jax.random.normal(jax.random.key(seed), (2, 8, 4))
        kept = np.array(kept)
        total, weight = info_nce(a, b, jnp.asarray(kept, jnp.float32), 0.1)
        alone, _ = info_nce(a[kept], b[kept], jnp.ones(kept.sum()), 0.1)
        np.testing.assert_allclose(total, alone, rtol=1e-5, atol=1e-6)
        assert float(weight) == kept.sum()
        gradient = jax.grad(lambda a, b: info_nce(a, b, jnp.asarray(kept, jnp.float32), 0.1)[0], (0, 1))(a, b)
        for g in gradient:
            assert np.isfinite(g).all() and (np.asarray(g)[~kept] == 0).all()

    def test_chance_is_log_of_the_batch(self):
        same = jnp.ones((32, 4))
        total, weight = info_nce(same, same, jnp.ones(32), 0.05)
        np.testing.assert_allclose(total / weight, np.log(32), rtol=1e-5)


class TestDivideAndConquer:
    @pytest.mark.parametrize("parts", [2, 4, 16])
    def test_gradient_is_that_of_the_whole_batch(self, parts):
        x, row = cells_of()
        weight = jnp.ones(N).at[3].set(0)
        gradient = jax.jit(jax.value_and_grad(whole_loss), static_argnums=4)
        (loss, expected), (value, found) = (gradient(params_of(), x, row, weight, n) for n in (1, parts))
        np.testing.assert_allclose(value, loss, rtol=1e-6)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6)

    def test_averaging_the_losses_of_parts_is_something_else(self):
        x, row = cells_of()
        gradient = jax.jit(jax.grad(whole_loss))
        expected = gradient(params_of(), x, row, jnp.ones(N))
        each = [gradient(params_of(), x[i::4], row[i::4], jnp.ones(N // 4)) for i in range(4)]
        naive = jax.tree.map(lambda *g: sum(g) / 4, *each)
        off = max(float(jnp.abs(naive[n] - expected[n]).max()) for n in expected)
        assert off > 1e-2

    def test_outputs_and_sums_are_in_the_order_of_the_rows(self):
        x, row = cells_of()
        whole = encode(params_of(), x, row)
        cut = divide_and_conquer(lambda rows: encode(params_of(), *rows), (x, row), 4)
        for a, b in zip(cut, whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_memory_is_that_of_one_part(self):
        """Four times the cells in four times the parts: the temporary memory is nearly that of the part.
        In one part it is four times as much."""

        def memory(n, parts):
            x, row = cells_of(n)
            run = jax.jit(jax.grad(whole_loss), static_argnums=4)
            compiled = run.lower(params_of(wide=4096), x, row, jnp.ones(n), parts).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        one = memory(64, 1)
        assert memory(256, 1) > 3 * one
        assert memory(256, 4) < 1.3 * one
        # but for the similarities of all pairs, a few numbers each
        assert memory(1024, 16) < 1.3 * one + 2 * 4 * 1024**2 < memory(1024, 1) / 4

    @pytest.mark.parametrize("parts", [1, 2])
    def test_on_a_mesh(self, parts):
        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        x, row = cells_of()
        place = lambda v: jax.device_put(v, NamedSharding(mesh, PartitionSpec("data")))  # noqa: E731
        gradient = jax.jit(jax.grad(whole_loss), static_argnums=4)
        expected = gradient(params_of(), x, row, jnp.ones(N), 1)
        found = gradient(params_of(), place(x), place(row), place(jnp.ones(N)), parts)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6)

    @pytest.mark.parametrize("parts", [0, 3])
    def test_parts_must_divide(self, parts):
        with pytest.raises(ValueError, match=f"a batch of 16 cells cannot be encoded in {parts} parts"):
            divide_and_conquer(lambda rows: (rows, rows.sum()), jnp.ones(16), parts)
