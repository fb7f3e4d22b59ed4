"""The pass over the counts: padding, genes of another vocabulary, random subsets; and the memory it fills."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import assert_same, build, take, two_studies

from scjax.loader import Loader
from scjax.loader.pack import Rows, Slabs
from scjax.types import FIELDS


@pytest.fixture(scope="module")
def studies():
    return two_studies()


@pytest.fixture(scope="module")
def corpus(studies, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    return build(studies, out, labels=["cell_type"], validation=0.15)


def test_max_genes_keeps_a_random_subset_that_depends_on_seed_epoch_and_row(corpus):
    loader = Loader(corpus, 64, max_genes=40, seed=2)
    assert loader.bucket_lengths[-1] == 40
    n = loader.steps_per_epoch
    batches = take(loader, 2 * n)
    kept = [dict(_genes(batches[e * n : (e + 1) * n])) for e in (0, 1)]
    long = [row for row in kept[0] if len(kept[0][row]) == 40]
    x = corpus.read(np.array(sorted(kept[0]))).X
    stored = {row: set(x[i].indices) for i, row in enumerate(sorted(kept[0]))}
    totals = np.concatenate([part.total for part in corpus.parts])
    for batch in batches:
        real = batch.weight > 0
        np.testing.assert_array_equal(batch.depth[real], totals[batch.row[real]])
        np.testing.assert_array_equal(batch.n_genes, (batch.gene_id >= 0).sum(1))
    for row, genes in kept[0].items():
        assert set(genes) <= stored[row] and len(genes) == min(40, len(stored[row]))
    assert sum(set(kept[0][row]) != set(kept[1][row]) for row in long) > 0.99 * len(long)
    # another order of the same seed keeps the same genes of each cell; another seed does not
    same = dict(_genes(take(Loader(corpus, 96, max_genes=40, seed=2, window=7, lanes=2), 6)))
    assert all(same[row] == kept[0][row] for row in same)
    other = dict(_genes(take(Loader(corpus, 64, max_genes=40, seed=3), n)))
    assert np.mean([other[row] == kept[0][row] for row in long]) < 0.01


def _genes(batches):
    for batch in batches:
        for i in np.flatnonzero(batch.weight):
            yield int(batch.row[i]), batch.gene_id[i, : batch.n_genes[i]].tolist()


def test_a_subset_is_uniform():
    """Every gene of a cell is kept equally often, and every pair."""
    n, keep, draws = 12, 4, 20_000
    genes, counts = np.arange(n, dtype=np.uint16), np.ones(n, np.uint16)
    gene_id, count, n_genes = _padded(
        np.full(draws, n, np.int32), np.zeros(draws, int), genes, counts, keep, max_genes=keep
    )
    assert (n_genes == keep).all() and (np.diff(gene_id, axis=1) > 0).all()
    chosen = np.zeros((draws, n))
    np.put_along_axis(chosen, gene_id, 1, axis=1)
    expected = draws * keep / n
    assert np.abs(chosen.sum(0) - expected).max() < 4.5 * np.sqrt(expected * (1 - keep / n))
    pairs = chosen.T @ chosen
    expected = draws * keep * (keep - 1) / (n * (n - 1))
    assert np.abs(pairs[np.triu_indices(n, 1)] - expected).max() < 5 * np.sqrt(expected)


def _padded(length, begin, genes, counts, width, row=None, lut=None, **options):
    """``Rows.pad`` on rows of two arrays."""
    B = len(length)
    out = np.full((B, width), 7, np.int32), np.full((B, width), 7, np.float32), np.full(B, 7, np.int32)
    row = np.arange(B, dtype=np.uint32) if row is None else row
    at = [
        (np.asarray(begin) * a.itemsize).astype(np.uint64) + np.uint64(a.ctypes.data) for a in (genes, counts)
    ]
    luts = None if lut is None else lut[None]
    Rows(*at, length, row, (genes.dtype, counts.dtype), luts).pad(*out, **options)
    return out


@settings(max_examples=50, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000), with_lut=st.booleans())
def test_packing_equals_its_definition(data, seed, with_lut):
    rng = np.random.default_rng(seed)
    B, vocabulary = data.draw(st.integers(1, 6)), 30
    length = rng.integers(0, 20, B).astype(np.int32)
    begin = np.cumsum(length) - length
    genes = np.concatenate([np.sort(rng.permutation(vocabulary)[:n]) for n in length]).astype(np.uint16)
    counts = rng.integers(1, 9, len(genes)).astype(np.uint16)
    lut = rng.integers(-1, 50, vocabulary).astype(np.int32) if with_lut else None
    width = data.draw(st.integers(20, 25))
    gene_id, count, n_genes = _padded(length, begin, genes, counts, width, lut=lut)
    for b in range(B):
        mine = slice(begin[b], begin[b] + length[b])
        ids = genes[mine].astype(np.int32) if lut is None else lut[genes[mine]]
        known = ids >= 0
        assert n_genes[b] == known.sum()
        np.testing.assert_array_equal(
            gene_id[b], np.pad(ids[known], (0, width - n_genes[b]), constant_values=-1)
        )
        np.testing.assert_array_equal(count[b], np.pad(counts[mine][known], (0, width - n_genes[b])))
    few = data.draw(st.integers(1, 8))
    less_id, less, less_n = _padded(length, begin, genes, counts, width, lut=lut, max_genes=few)
    np.testing.assert_array_equal(less_n, np.minimum(n_genes, few))
    for b in range(B):
        pairs = set(zip(gene_id[b, : n_genes[b]], count[b, : n_genes[b]], strict=True))
        assert set(zip(less_id[b, : less_n[b]], less[b, : less_n[b]], strict=True)) <= pairs
        assert (less_id[b, less_n[b] :] == -1).all() and not less[b, less_n[b] :].any()


# ---- memory


def snapshot(batch):
    fields = {name: np.copy(getattr(batch, name)) for name in FIELDS if name not in ("label", "value")}
    return batch.replace(**fields, label={name: codes.copy() for name, codes in batch.label.items()})


def test_a_batch_that_is_held_never_changes(corpus):
    import jax

    iterator = iter(Loader(corpus, 32, prefetch=3))
    kept, parts, on_device, copies = [], [], [], []
    for step in range(60):
        batch = next(iterator)
        copies.append(snapshot(batch))
        # in turn: the batch, a view of one of its arrays, what JAX made of it, nothing
        kept.append(batch if step % 4 == 0 else None)
        parts.append(batch.count[3:5, ::2] if step % 4 == 1 else None)
        on_device.append(jax.device_put((batch.gene_id, batch.count)) if step % 4 == 2 else None)
        del batch
    iterator.close()
    for copy, batch, part, arrays in zip(copies, kept, parts, on_device, strict=True):
        if batch is not None:
            assert_same(batch, copy)
        if part is not None:
            np.testing.assert_array_equal(part, copy.count[3:5, ::2])
        if arrays is not None:
            np.testing.assert_array_equal(arrays[0], copy.gene_id)
            np.testing.assert_array_equal(arrays[1], copy.count)


def test_memory_of_a_batch_that_was_let_go_is_used_again(corpus):
    iterator = iter(Loader(corpus, 32, n_buckets=1))
    places = set()
    for _ in range(40):
        places.add(next(iterator).count.ctypes.data)
    iterator.close()
    assert len(places) <= 5
    slabs = Slabs(limit=1)
    fields = {"a": ((3, 5), np.int32), "b": ((7,), np.float32)}
    first = slabs.take(fields)
    assert {a.ctypes.data % 64 for a in first.values()} == {0}
    view = first["b"][2:]
    del first
    second = slabs.take(fields)
    assert not np.shares_memory(view, second["b"])
    place = view.ctypes.data
    del view, second
    again = slabs.take(fields)["b"][2:].ctypes.data
    assert again == place
    shorter = slabs.take({"a": ((2, 5), np.int32)})["a"].ctypes.data
    assert shorter == slabs.take(fields)["a"].ctypes.data
