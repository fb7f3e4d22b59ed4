"""The laws of the encodings, against numpy and against their own statement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scjax import encoding

SLOTS = 24
small = settings(max_examples=60, deadline=None)
cells = st.lists(st.lists(st.integers(0, 7), min_size=SLOTS, max_size=SLOTS), min_size=4, max_size=4).map(
    lambda rows: np.array(rows, np.float32)
)


def keys_of(n: int, seed: int = 0):
    return encoding.row_keys(jax.random.key(seed), jnp.arange(n, dtype=jnp.uint32))


def ids_of(count: np.ndarray) -> np.ndarray:
    return np.where(count > 0, np.arange(count.shape[1]), -1).astype(np.int32)


def ranks_by_numpy(row: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """(edges below, edges at or below) with edges interpolated in exact fractions."""
    from fractions import Fraction

    values = sorted(int(v) for v in row[row > 0])
    edges = []
    for k in range(n_bins - 1):
        low, rest = divmod(k * (len(values) - 1), n_bins - 2)
        high = values[min(low + 1, len(values) - 1)]
        edges.append(values[low] + Fraction(rest, n_bins - 2) * (high - values[low]))
    r = np.array([sum(e < int(v) for e in edges) for v in row])
    l = np.array([sum(e <= int(v) for e in edges) for v in row])
    return r, l


@small
@given(cells, st.sampled_from([3, 11, 51]))
def test_quantile_ranks_are_exact(count, n_bins):
    r, l = encoding.quantile_ranks(jnp.asarray(count), n_bins)
    for i, row in enumerate(count):
        if (row > 0).any():
            expected = ranks_by_numpy(row, n_bins)
            np.testing.assert_array_equal(np.asarray(r[i])[row > 0], expected[0][row > 0])
            np.testing.assert_array_equal(np.asarray(l[i])[row > 0], expected[1][row > 0])


def test_quantile_ranks_agree_with_numpy_quantiles():
    """numpy's float64 edges are the original's; they differ from exact ones only where n - 1 and the
    number of edges - 1 share a factor, which the sizes here avoid."""
    rng = np.random.default_rng(0)
    for n in (30, 101, 480):
        row = np.concatenate([rng.poisson(2.0, n) + 1, np.zeros(20)]).astype(np.float32)[None]
        edges = np.quantile(row[row > 0].astype(float), np.linspace(0, 1, 50))
        r, l = encoding.quantile_ranks(jnp.asarray(row), 51)
        np.testing.assert_array_equal(np.asarray(l)[row > 0], np.digitize(row[row > 0], edges))
        np.testing.assert_array_equal(np.asarray(r)[row > 0], np.digitize(row[row > 0], edges, right=True))


@small
@given(cells, st.integers(0, 2**31 - 1))
def test_bins_lie_in_their_support(count, seed):
    ids = ids_of(count)
    r, l = (np.asarray(x) for x in encoding.quantile_ranks(jnp.asarray(count), 51))
    on = count > 0
    for tie in ("random", "left", "mid"):
        bins = np.asarray(encoding.bin_quantiles(count, 51, tie=tie, keys=keys_of(4, seed), gene_id=ids))
        assert (bins[~on] == 0).all()
        assert (bins[on] >= np.minimum(r + 1, l)[on]).all() and (bins[on] <= l[on]).all()
    left = np.asarray(encoding.bin_quantiles(count, 51, tie="left"))
    mid = np.asarray(encoding.bin_quantiles(count, 51, tie="mid"))
    first = np.minimum(r + 1, l)
    np.testing.assert_array_equal(left[on], first[on])
    np.testing.assert_array_equal(mid[on], ((first + l) // 2)[on])


def test_ties_are_uniform():
    """A cell of equal counts fills every bin 1..50 equally often."""
    count = np.ones((200, 500), np.float32)
    bins = encoding.bin_quantiles(count, 51, keys=keys_of(200), gene_id=ids_of(count))
    n = np.bincount(np.asarray(bins, int).ravel(), minlength=51)
    assert n[0] == 0
    expected = count.size / 50
    assert ((n[1:] - expected) ** 2 / expected).sum() < 95  # chi-squared with 49 degrees: p = 1e-4


def test_gene_uniform_is_uniform_and_depends_on_key_row_and_gene_only():
    ids = np.tile(np.arange(400, dtype=np.int32), (50, 1))
    u = np.asarray(encoding.gene_uniform(keys_of(50), ids))
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.005
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.03
    order = np.random.default_rng(0).permutation(400)
    np.testing.assert_array_equal(np.asarray(encoding.gene_uniform(keys_of(50), ids[:, order])), u[:, order])
    assert (np.asarray(encoding.gene_uniform(keys_of(50, seed=1), ids)) != u).mean() > 0.99


def test_normalize_total_uses_the_depth_of_the_whole_cell():
    count = np.array([[2.0, 3.0]], np.float32)
    np.testing.assert_allclose(encoding.normalize_total(count, np.array([100.0]), 1000.0), [[20.0, 30.0]])
    np.testing.assert_allclose(encoding.normalize_total(count, np.array([0.0])) * 0, [[0.0, 0.0]])


@pytest.mark.parametrize("method", ["random", "top"])
def test_select_genes(method):
    rng = np.random.default_rng(1)
    count = rng.poisson(3.0, (8, 100)).astype(np.float32)
    ids = ids_of(count)
    gene, value = (np.asarray(x) for x in encoding.select_genes(ids, count, 40, keys_of(8), method=method))
    assert gene.shape == value.shape == (8, 40)
    for i in range(8):
        assert len(set(gene[i])) == 40 and set(gene[i]) <= set(ids[i][ids[i] >= 0])
        np.testing.assert_array_equal(value[i], count[i, gene[i]])
        if method == "top":
            assert value[i].min() >= np.sort(count[i])[-40]
    all_of_it = encoding.select_genes(ids, count, 100, keys_of(8), method=method)
    assert all_of_it[0] is ids


def test_select_genes_is_a_uniform_choice_and_keeps_what_it_must():
    ids = np.tile(np.arange(20, dtype=np.int32), (4000, 1))
    count = np.ones_like(ids, np.float32)
    gene, _ = encoding.select_genes(ids, count, 5, keys_of(4000))
    share = np.bincount(np.asarray(gene).ravel(), minlength=20) / 4000
    assert np.abs(share - 0.25).max() < 0.04
    gene, _ = encoding.select_genes(ids, count, 5, keys_of(4000), keep=np.array([3, 17, -1]))
    share = np.bincount(np.asarray(gene).ravel(), minlength=20) / 4000
    assert share[3] == share[17] == 1.0
    assert np.abs(np.delete(share, [3, 17]) - 3 / 18).max() < 0.03


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e7])
def test_top_and_keep_hold_at_any_scale(scale):
    """Values may be fractions (scaled bins, logarithms): the order is by value first, chance breaks ties."""
    rng = np.random.default_rng(4)
    count = (rng.permuted(np.tile(np.arange(100.0), (8, 1)), axis=1) * scale).astype(np.float32)
    ids = ids_of(count + 1)
    gene, value = encoding.select_genes(ids, count, 10, keys_of(8), method="top")
    np.testing.assert_allclose(value, np.tile(np.arange(99, 89, -1) * scale, (8, 1)), rtol=1e-6)
    lowest = np.array([int(np.argmin(row)) for row in count])
    gene, _ = encoding.select_genes(ids, count, 10, keys_of(8), method="top", keep=lowest)
    for i in range(8):
        assert set(np.unique(lowest)) <= set(np.asarray(gene[i]).tolist())


def test_selection_puts_padding_last():
    count = np.zeros((2, 50), np.float32)
    count[:, ::7] = 1
    gene, value = encoding.select_genes(ids_of(count), count, 12, keys_of(2))
    assert (np.asarray(gene)[:, :8] >= 0).all() and (np.asarray(gene)[:, 8:] == -1).all()
    assert (np.asarray(value)[:, 8:] == 0).all()


def test_mask_genes():
    count = np.zeros((300, 60), np.float32)
    for i in range(300):
        count[i, : 1 + i % 60] = 1
    ids = ids_of(count)
    n = (ids >= 0).sum(1)
    exact = np.asarray(encoding.mask_genes(ids, 0.15, keys_of(300)))
    np.testing.assert_array_equal(exact.sum(1), [int(x * 15 // 100) for x in n])
    assert not exact[ids < 0].any()
    each = np.asarray(encoding.mask_genes(ids, 0.4, keys_of(300), exact=False))
    assert not each[ids < 0].any()
    assert abs(each.sum() / n.sum() - 0.4) < 0.02


def test_everything_follows_the_gene_and_not_the_slot():
    rng = np.random.default_rng(2)
    count = rng.poisson(1.0, (6, 80)).astype(np.float32)
    ids = ids_of(count)
    order = rng.permutation(80)
    widened = np.concatenate([ids[:, order], np.full((6, 16), -1, np.int32)], 1)
    wide_count = np.concatenate([count[:, order], np.zeros((6, 16), np.float32)], 1)

    def run(ids, count):
        bins = encoding.bin_quantiles(count, 51, keys=keys_of(6), gene_id=ids)
        mask = encoding.mask_genes(ids, 0.3, keys_of(6, 1))
        gene, value = encoding.select_genes(ids, bins, 20, keys_of(6, 2))
        table = [
            {(int(g), float(b), bool(m)) for g, b, m in zip(*row, strict=True) if g >= 0}
            for row in zip(np.asarray(ids), np.asarray(bins), np.asarray(mask), strict=True)
        ]
        chosen = [
            set(zip(np.asarray(g), np.asarray(v), strict=True)) for g, v in zip(gene, value, strict=True)
        ]
        return table, chosen

    assert run(ids, count) == run(widened, wide_count)


def test_bad_arguments_are_named():
    count, ids = np.ones((1, 4), np.float32), np.arange(4, dtype=np.int32)[None]
    with pytest.raises(ValueError, match="needs keys"):
        encoding.bin_quantiles(count, 51)
    with pytest.raises(ValueError, match="'middle'"):
        encoding.bin_quantiles(count, 51, tie="middle")
    with pytest.raises(ValueError, match="'best'"):
        encoding.select_genes(ids, count, 2, keys_of(1), method="best")
