"""Which genes are unknown, and in which slots they stand."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import batch_of

from scjax.encoding import row_keys
from scjax.encoding.unknown import split_unknown, unknown_room, with_zeros

FRACTIONS = (0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9)


def split(gene_id, length, drawn, seed=0, rows=None):
    rows = np.arange(len(gene_id), dtype=np.uint32) if rows is None else rows
    keys = row_keys(jax.random.key(seed), rows)
    value = jnp.where(gene_id >= 0, gene_id + 0.5, 0.0)
    return jax.tree.map(np.asarray, split_unknown(gene_id, value, length, FRACTIONS, drawn, keys))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    length=st.integers(1, 48),
    drawn=st.integers(0, len(FRACTIONS) - 1),
    seed=st.integers(0, 99),
)
def test_every_gene_has_a_slot(sizes, length, drawn, seed):
    """floor(n * fraction) genes of a cell are unknown, the slots are enough for any n, and values follow."""
    rng = np.random.default_rng(seed)
    gene_id = np.full((len(sizes), 40), -1, np.int32)
    for row, n in zip(gene_id, sizes, strict=True):
        row[rng.choice(40, n, replace=False)] = rng.choice(1000, n, replace=False)
    found, value, unknown = split(gene_id, length, drawn, seed)
    width, fraction = min(40, length), FRACTIONS[drawn]
    assert found.shape == (len(sizes), width)
    room = unknown_room(width, fraction)
    for given_ids, ids, v, u, n in zip(gene_id, found, value, unknown, sizes, strict=True):
        kept = ids[ids >= 0]
        n = min(n, width)
        assert len(kept) == n == len(set(kept)) and set(kept) <= set(given_ids)
        assert u.sum() == int(n * fraction + 1e-4) == (ids[:room] >= 0).sum()
        assert u[: u.sum()].all() and (v == np.where(ids >= 0, ids + 0.5, 0)).all()


def test_each_gene_is_unknown_equally_often():
    gene_id = np.tile(np.arange(20, dtype=np.int32), (4000, 1))
    for length in (20, 10):  # all genes, and a choice of them
        found, _, unknown = split(gene_id, length, FRACTIONS.index(0.25))
        share = np.bincount(found[unknown], minlength=20) / 4000
        expected = int(length * 0.25) / 20
        assert np.abs(share - expected).max() < 4 * (expected * (1 - expected) / 4000) ** 0.5


def test_a_cell_is_split_alike_anywhere():
    """In any order of its genes, under any padding and beside any cell."""
    batch = batch_of(4)
    drawn = FRACTIONS.index(0.5)
    order = np.random.default_rng(0).permutation(batch.gene_id.shape[1])
    whole = split(batch.gene_id, 99, drawn)
    for other in (
        split(batch.gene_id[:, order], 99, drawn),
        split(batch.gene_id[2:], 99, drawn, rows=np.array([2, 3], np.uint32)),
        split(np.pad(batch.gene_id, ((0, 0), (0, 9)), constant_values=-1), 99, drawn),
    ):
        for ids, unknown, theirs, their_unknown in zip(
            whole[0][-len(other[0]) :], whole[2][-len(other[0]) :], other[0], other[2], strict=True
        ):
            assert set(ids[unknown]) == set(theirs[their_unknown])
            assert set(ids) - {-1} == set(theirs) - {-1}
    assert any(
        set(a[u]) != set(b[v])
        for a, u, b, v in zip(*whole[::2], *split(batch.gene_id, 99, drawn, 1)[::2], strict=True)
    )


def test_zeros_are_genes_too():
    batch = batch_of(4)
    batch.gene_id[3], batch.count[3] = -1, 0  # a row that fills the batch
    full = jax.tree.map(np.asarray, with_zeros(batch, 60))
    assert full.gene_id.shape == (4, 60) and (full.gene_id[:3] == np.arange(60)).all()
    assert (full.gene_id[3] == -1).all() and full.count[3].sum() == 0
    for ids, count, dense in zip(batch.gene_id[:3], batch.count, full.count, strict=False):
        expected = np.zeros(60)
        expected[ids[ids >= 0]] = count[ids >= 0]
        np.testing.assert_array_equal(dense, expected)
