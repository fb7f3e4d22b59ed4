"""The laws of log2 bins and of what is hidden among them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scjax import encoding

SLOTS = 24
small = settings(max_examples=60, deadline=None)
cells = st.lists(st.lists(st.integers(0, 9), min_size=SLOTS, max_size=SLOTS), min_size=3, max_size=3).map(
    lambda rows: np.array(rows, np.float32)
)


def keys_of(n: int, seed: int = 0):
    return encoding.row_keys(jax.random.key(seed), jnp.arange(n, dtype=jnp.uint32))


def ids_of(count: np.ndarray) -> np.ndarray:
    """Gene ids that are not slot numbers: 3, 6, 9, ...; -1 where the count is 0."""
    return np.where(count > 0, 3 + 3 * np.arange(count.shape[1]), -1).astype(np.int32)


@small
@given(cells, st.integers(0, 20_000))
def test_bins_are_whole_log2_of_normalised_counts(count, rest):
    total = count.sum(1) + rest
    tokens = np.asarray(encoding.log2_bins(count, total))
    for i in range(3):
        for c, token in zip(count[i].astype(int), tokens[i], strict=True):
            # exact: the largest k with c * 10,000 >= (2^k - 1) * total
            n = max(int(total[i]), 1)
            expected = max(k for k in range(6) if c * 10_000 >= (2**k - 1) * n)
            assert token == expected
            if total[i] and 0 < c and not math.log2(1 + c * 1e4 / total[i]).is_integer():
                assert token == math.floor(min(math.log2(1 + c * 1e4 / total[i]), 5))


def test_thresholds_of_the_published_bins():
    """A library of 10,000 counts: [0, 1), [1, 3), [3, 7), [7, 15), [15, 31), from 31 on."""
    count = np.array([[0, 1, 2, 3, 6, 7, 14, 15, 30, 31, 5000]], np.float32)
    tokens = encoding.log2_bins(count, np.array([10_000.0], np.float32))
    np.testing.assert_array_equal(tokens[0], [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    # expressed, but below one count in 10,000: as if it were not
    assert int(encoding.log2_bins(np.ones((1, 1), np.float32), np.array([10_001.0], np.float32))[0, 0]) == 0


@small
@given(cells, st.randoms(use_true_random=False))
def test_all_genes_have_their_place_whatever_the_order(count, random):
    ids = ids_of(count)
    n = 3 + 3 * SLOTS
    order = list(range(SLOTS))
    random.shuffle(order)
    dense = np.asarray(encoding.to_all_genes(ids[:, order], count[:, order].astype(np.int32), n))
    expected = np.zeros((3, n), np.int32)
    for i in range(3):
        expected[i, ids[i][ids[i] >= 0]] = count[i][ids[i] >= 0]
    np.testing.assert_array_equal(dense, expected)


@small
@given(cells, st.integers(0, 2**31 - 1), st.sampled_from([0.15, 0.3, 0.5]))
def test_exactly_the_share_of_the_candidates_is_chosen(count, seed, fraction):
    ids = ids_of(count)
    candidate = count > 2
    chosen, gene_id, value = (
        np.asarray(x)
        for x in encoding.hidden_first(keys_of(3, seed), fraction, jnp.asarray(candidate), ids, count)
    )
    n = candidate.sum(1)
    np.testing.assert_array_equal(
        chosen.sum(1), [math.ceil(k * round(fraction * 100) / 100 - 1e-9) for k in n]
    )
    assert chosen.sum(1).max() <= encoding.hidden_capacity(SLOTS, fraction)
    for i in range(3):
        k = int(chosen[i].sum())
        assert chosen[i, :k].all()
        of = dict(zip(ids[i].tolist(), count[i].tolist(), strict=True))
        assert (value[i, :k] > 2).all() and len(set(gene_id[i, :k])) == k
        assert sorted(gene_id[i]) == sorted(ids[i])
        assert [of[g] for g in gene_id[i].tolist() if g >= 0] == value[i][gene_id[i] >= 0].tolist()
        # candidates, then other genes, then padding
        kind = np.where(gene_id[i] < 0, 2, np.where(value[i] > 2, 0, 1))
        assert (np.diff(kind) >= 0).all()


@pytest.mark.parametrize("n", [20, 100, 140, 340, 1000])
def test_a_whole_share_is_not_rounded_up(n):
    """0.15 * 100 is 15.000001 in float32."""
    ids = jnp.arange(n)[None]  # of jax: numpy would multiply in float64
    assert int(encoding.hidden_first(keys_of(1), 0.15, ids >= 0, ids)[0].sum()) == n * 15 // 100


def test_the_choice_does_not_depend_on_slots_padding_or_batch():
    rng = np.random.default_rng(0)
    count = rng.integers(0, 9, (3, SLOTS)).astype(np.float32)
    ids = ids_of(count)
    whole = encoding.hidden_first(keys_of(3), 0.3, count > 0, ids, count)
    order = rng.permutation(SLOTS)
    wide = np.pad(ids[:, order], ((0, 0), (0, 5)), constant_values=-1)
    wide_count = np.pad(count[:, order], ((0, 0), (0, 5)))
    for a, b in zip(
        whole, encoding.hidden_first(keys_of(3), 0.3, wide_count > 0, wide, wide_count), strict=True
    ):
        np.testing.assert_array_equal(a, np.asarray(b)[:, :SLOTS])
    alone = encoding.hidden_first(keys_of(3)[1:2], 0.3, count[1:2] > 0, ids[1:2], count[1:2])
    for a, b in zip(whole, alone, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[1:2], b)


def test_equal_draws_are_told_apart_by_gene(monkeypatch):
    """24 random bits do tie now and then; the number of hidden genes stays exact."""
    monkeypatch.setattr("scjax.encoding.bins.gene_uniform", lambda keys, ids: jnp.full(ids.shape, 0.5))
    ids = np.arange(10, dtype=np.int32)[None, ::-1]
    chosen, gene_id = encoding.hidden_first(keys_of(1), 0.15, ids >= 0, ids)
    assert int(chosen.sum()) == 2 and np.asarray(gene_id)[0, :2].tolist() == [0, 1]


@pytest.mark.parametrize("slots", [1, 6, 7, 20, 100, 137])
def test_capacity_is_enough_and_not_too_much(slots):
    exact = -(-slots * 15 // 100)
    assert exact <= encoding.hidden_capacity(slots, 0.15) <= exact + 1


def test_masking_rates():
    """15 % of the candidates to the gene, uniformly; 90 % of those are replaced, the others shown."""
    n, slots = 400, 60
    ids = np.tile(np.arange(slots, dtype=np.int32), (n, 1))
    token = np.where(ids < 40, 1 + ids % 5, 0)
    chosen, gene_id, value = encoding.hidden_first(keys_of(n), 0.15, token > 0, ids, token)
    shown = np.asarray(encoding.replace_hidden(keys_of(n, 1), chosen, gene_id, value, 6, 0.9))
    chosen, gene_id, value = (np.asarray(x) for x in (chosen, gene_id, value))
    assert (chosen.sum(1) == 6).all()
    times = np.bincount(gene_id[chosen], minlength=slots)
    assert (times[40:] == 0).all() and np.abs(times[:40] - 60).max() < 4.5 * np.sqrt(60)
    replaced = shown[chosen] == 6
    assert abs(replaced.mean() - 0.9) < 4 * np.sqrt(0.09 / chosen.sum())
    np.testing.assert_array_equal(shown[chosen][~replaced], value[chosen][~replaced])
    np.testing.assert_array_equal(shown[~chosen], value[~chosen])
