"""Rank-value encoding against a plain sort of the definition."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from scjax.encoding import rank_genes

GENES = 40
run = jax.jit(rank_genes, static_argnums=3)


def cells(seed, n=4, slots=24, whole=True):
    """(gene_id, count, depth, median); counts of few values, so that ties are common."""
    rng = np.random.default_rng(seed)
    gene_id = np.full((n, slots), -1, np.int32)
    count = np.zeros((n, slots), np.float32)
    for i in range(n):
        k = rng.integers(0, slots)
        gene_id[i, :k] = rng.choice(GENES, k, replace=False)
        count[i, :k] = rng.integers(0, 4, k) if whole else rng.random(k)
    median = 2.0 ** rng.integers(-2, 3, GENES)
    return gene_id, count, count.sum(1) + rng.integers(1, 99, n), median.astype(np.float32)


def definition(gene_id, count, depth, median, length):
    """Genes by falling count / depth * 1e4 / median, ties by rising id, in float64."""
    out = np.full((len(gene_id), min(length, gene_id.shape[1])), -1)
    for i in range(len(gene_id)):
        on = (gene_id[i] >= 0) & (count[i] > 0)
        genes = gene_id[i][on]
        value = count[i][on].astype(np.float64) / float(depth[i]) * 1e4 / median[genes]
        order = genes[np.lexsort((genes, -value))][:length]
        out[i, : len(order)] = order
    return out


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([5, 16, 60]), st.booleans())
def test_order(seed, length, whole):
    gene_id, count, depth, median = cells(seed, whole=whole)
    expected = definition(gene_id, count, depth, median, length)
    np.testing.assert_array_equal(run(gene_id, count, median, length), expected)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_neither_slots_nor_padding_nor_depth_matter(seed):
    gene_id, count, _, median = cells(seed)
    expected = np.asarray(run(gene_id, count, median, 16))
    order = np.random.default_rng(seed).permutation(gene_id.shape[1])
    np.testing.assert_array_equal(run(gene_id[:, order], count[:, order], median, 16), expected)
    np.testing.assert_array_equal(run(gene_id, 3 * count, median, 16), expected)
    wide = np.pad(gene_id, ((0, 0), (0, 8)), constant_values=-1), np.pad(count, ((0, 0), (0, 8)))
    np.testing.assert_array_equal(run(*wide, median, 16), expected)


def test_a_gene_without_a_median_is_left_out():
    gene_id, count = np.array([[0, 1, 2, 3, 4, -1]], np.int32), np.array([[1, 9, 9, 9, 2, 0]], np.float32)
    median = np.array([1, 0, np.nan, np.inf, 1, 1], np.float32)
    assert run(gene_id, count, median, 4).tolist() == [[4, 0, -1, -1]]
    gradient = jax.grad(lambda c: jnp.where(rank_genes(gene_id, c, median, 4) > 0, 1.0, 0.0).sum())(count)
    assert np.isfinite(gradient).all()


def test_the_order_of_a_cell_with_published_medians():
    """The medians of four genes in 30 million cells."""
    median = np.array([2.0012, 3.2282, 2.2189, 3.7923], np.float32)
    counts = np.array([[3, 2, 2, 1]], np.float32)
    assert run(np.arange(4, dtype=np.int32)[None], counts, median, 4).tolist() == [[0, 2, 1, 3]]
