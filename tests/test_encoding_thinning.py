"""Depth thinning: its law, and that it follows the cell and the gene."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scjax import encoding
from scjax.encoding import thin_counts, thinning_rate

CELLS, GENES = 400, 250
small = settings(max_examples=40, deadline=None)
thin = jax.jit(thin_counts)


def keys_of(n: int, seed: int = 0):
    return encoding.row_keys(jax.random.key(seed), jnp.arange(n, dtype=jnp.uint32))


def ids_of(n: int, genes: int):
    return jnp.broadcast_to(jnp.arange(genes, dtype=jnp.int32), (n, genes))


def draws(n: int, p: float, seed: int = 0) -> np.ndarray:
    """100,000 draws of Binomial(n, p)."""
    count = jnp.full((CELLS, GENES), float(n))
    out = thin(count, jnp.full(CELLS, p), keys_of(CELLS, seed), ids_of(CELLS, GENES))
    return np.asarray(out).ravel()


# means below and above 10 (inversion and rejection), from either side of one half, 1 to 10,000
@pytest.mark.parametrize(
    "n, p",
    [
        (1, 0.3),
        (7, 0.5),
        (18, 0.9),
        (25, 0.38),
        (25, 0.42),
        (60, 0.45),
        (150, 0.04),
        (400, 0.2),
        (10_000, 0.77),
    ],
)
def test_the_law_is_binomial(n, p):
    out = draws(n, p)
    low, high = stats.binom.ppf([0.0002, 0.9998], n, p)
    edges = np.unique(np.linspace(low, high, 25).round())  # bins (edge, next edge]
    bins = np.concatenate([[-1], edges, [n]])
    observed = np.diff([np.sum(out <= edge) for edge in bins])
    expected = np.diff(stats.binom.cdf(bins, n, p)) * out.size
    on = expected > 5
    chi2 = ((observed - expected)[on] ** 2 / expected[on]).sum()
    assert chi2 < stats.chi2.ppf(1 - 1e-4, max(on.sum() - 1, 1))
    se = np.sqrt(n * p * (1 - p) / out.size)
    assert abs(out.mean() - n * p) < 4.5 * se
    assert abs(out.var() / (n * p * (1 - p)) - 1) < 0.025


def test_genes_are_independent():
    """The sum over the genes of a cell has the variance of one big binomial."""
    out = draws(4, 0.3).reshape(CELLS, GENES).sum(1)
    z = (out - 4 * GENES * 0.3) / np.sqrt(4 * GENES * 0.3 * 0.7)
    assert stats.kstest(z, "norm").pvalue > 1e-3


@small
@given(
    st.lists(st.integers(0, 60) | st.integers(0, 5000), min_size=12, max_size=12),
    st.floats(0, 1, width=32),
    st.integers(0, 2**31 - 1),
)
def test_support_determinism_and_order(counts, rate, seed):
    count = jnp.asarray([counts, counts[::-1]], jnp.float32)
    ids, keys, rate = ids_of(2, 12), keys_of(2, seed), jnp.full(2, rate)
    out = np.asarray(thin(count, rate, keys, ids))
    assert (out >= 0).all() and (out <= count).all() and (out == np.round(out)).all()
    np.testing.assert_array_equal(thin(count, rate, keys, ids), out)
    order = np.random.default_rng(seed).permutation(12)
    np.testing.assert_array_equal(thin(count[:, order], rate, keys, ids[:, order]), out[:, order])
    # a gene's draw does not depend on the other genes or cells
    alone = thin(
        jnp.pad(count[1:, 3:4], ((0, 1), (0, 11))),
        rate,
        keys[np.array([1, 0])],
        ids[:, order.argsort()] * 0 + 3,
    )
    assert alone[0, 0] == out[1, 3]


def test_rates_of_none_and_all():
    count = jnp.asarray(np.random.default_rng(0).integers(0, 4000, (2, 50)), jnp.float32)
    out = thin(count, jnp.array([1.0, 0.0]), keys_of(2), ids_of(2, 50))
    np.testing.assert_array_equal(out[0], count[0])
    np.testing.assert_array_equal(out[1], 0)


def test_rate_of_cells():
    """Half of the deep cells draw a Beta(2, 2), shallow ones and the other half stay whole."""
    depth = jnp.concatenate([jnp.full(20_000, 5000.0), jnp.full(500, 1000.0)])
    rate = np.asarray(jax.jit(thinning_rate)(depth, keys_of(20_500)))
    assert (rate[20_000:] == 1).all()
    deep = rate[:20_000]
    assert abs((deep == 1).mean() - 0.5) < 0.015
    assert stats.kstest(deep[deep < 1], stats.beta(2, 2).cdf).pvalue > 1e-3
    never = thinning_rate(depth, keys_of(20_500), probability=0.0)
    assert (np.asarray(never) == 1).all()


def test_totals_keep_their_law():
    """A thinned cell's total is beta-binomial: one share for all its genes, molecules by themselves."""
    n, genes = 4000, 60
    rng = np.random.default_rng(1)
    count = rng.multinomial(1500, rng.dirichlet(np.ones(genes)))  # the same cell n times
    counts = jnp.broadcast_to(jnp.asarray(count, jnp.float32), (n, genes))
    keys = keys_of(n, 5)
    rate = thinning_rate(counts.sum(1), keys, probability=1.0)
    out = np.asarray(thin(counts, rate, keys, ids_of(n, genes)))
    law = stats.betabinom(1500, 2, 2)
    assert stats.kstest(out.sum(1), law.cdf).pvalue > 1e-3
    assert abs(out.sum(1).mean() / law.mean() - 1) < 0.03
    big = int(np.argmax(count))
    assert stats.kstest(out[:, big], stats.betabinom(count[big], 2, 2).cdf).pvalue > 1e-3
    # were the shares drawn by gene, the variance of the total would be that of independent genes
    assert out.sum(1).var() > 3 * out.var(0).sum() / 2


def test_depth_token():
    total = jnp.array([0.0, 1.0, 100.0, 5000.0])
    same = np.log10([1, 1, 100, 5000])
    for target, expected in (
        ("same", same),
        ("f1", same),
        ("f5", same + np.log10(5)),
        ("a5", same + 5),
        ("t4", np.full(4, 4.0)),
        ("t4.5", np.full(4, 4.5)),
    ):
        np.testing.assert_allclose(encoding.depth_token(total, target), expected, rtol=1e-6)
    for target in ("", "4", "x5", "t", "f0", "t-1", "same5"):
        with pytest.raises(ValueError, match="target is"):
            encoding.depth_token(total, target)
