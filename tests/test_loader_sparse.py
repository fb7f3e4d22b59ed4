"""Batches of sparse rows: the same cells, in the same order, from the same cursor as padded ones."""

import numpy as np
import pytest
from loading import build, take, two_studies
from scipy import sparse

from scjax.genes import Vocabulary
from scjax.loader import Loader
from scjax.types import CellBatch, SparseBatch


@pytest.fixture(scope="module")
def studies():
    return two_studies()


@pytest.fixture(scope="module")
def corpus(studies, tmp_path_factory):
    return build(studies, tmp_path_factory.mktemp("corpus") / "corpus", labels=["cell_type"])


def assert_same_cells(rows: SparseBatch, padded: CellBatch):
    assert isinstance(rows, SparseBatch) and isinstance(padded, CellBatch)
    for name in ("depth", "n_genes", "row", "weight"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(padded, name), err_msg=name)
        assert getattr(rows, name).dtype == getattr(padded, name).dtype
    assert list(rows.label) == list(padded.label)
    for name, codes in rows.label.items():
        np.testing.assert_array_equal(codes, padded.label[name])
    used = padded.gene_id >= 0
    np.testing.assert_array_equal(np.diff(rows.indptr), padded.n_genes)
    np.testing.assert_array_equal(rows.gene_id, padded.gene_id[used])  # row by row, in the same order
    np.testing.assert_array_equal(rows.count, padded.count[used])
    # as narrow as the corpus has them; one of its cells has a count above 65,535
    assert (rows.gene_id.dtype, rows.count.dtype, rows.indptr.dtype) == (np.uint16, np.uint32, np.int64)
    assert rows.indptr[0] == 0 and rows.indptr[-1] == rows.gene_id.size == rows.count.size
    assert len(rows) == len(padded.row)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_genes": 40}, {"group_lengths": True}, {"shuffle": False, "lanes": 1}, {"labels": []}],
    ids=lambda options: ",".join(options) or "plain",
)
def test_sparse_rows_are_those_of_the_padded_batches(corpus, options):
    padded = Loader(corpus, 96, seed=3, **options)
    n = padded.steps_per_epoch + 3  # over the end of an epoch, with its filler
    batches = take(padded, n)
    for rows, batch in zip(take(Loader(corpus, 96, seed=3, sparse=True, **options), n), batches, strict=True):
        assert_same_cells(rows, batch)
    assert min(batch.weight.min() for batch in batches) == 0


def test_sparse_rows_are_the_stored_ones(corpus):
    n_genes = len(corpus.vocabulary)
    for batch in take(Loader(corpus, 64, sparse=True), 5):
        x = sparse.csr_matrix((batch.count, batch.gene_id, batch.indptr), shape=(64, n_genes))
        stored = corpus.read(batch.row).X
        assert (
            np.diff(batch.gene_id.astype(int))[np.diff(np.repeat(np.arange(64), batch.n_genes)) == 0] > 0
        ).all()
        assert (x != stored).nnz == 0 and x.nnz == stored.nnz


def test_a_vocabulary_drops_genes_of_sparse_rows_too(corpus):
    wanted = Vocabulary(corpus.vocabulary.ids[::-2])
    sparse_rows = take(Loader(corpus, 48, vocabulary=wanted, sparse=True), 4)
    for rows, batch in zip(sparse_rows, take(Loader(corpus, 48, vocabulary=wanted), 4), strict=True):
        assert_same_cells(rows, batch)
        assert rows.gene_id.max() < len(wanted)


def test_one_cursor_serves_both_kinds(corpus):
    iterator = iter(Loader(corpus, 64, seed=1))
    for _ in range(4):
        next(iterator)
    state, following = iterator.get_state(), next(iterator)
    iterator.close()
    assert_same_cells(take(Loader(corpus, 64, seed=1, sparse=True), 1, state)[0], following)


def test_hosts_share_a_batch_of_sparse_rows(corpus):
    whole = take(Loader(corpus, 64, sparse=True), 6)
    shares = [take(Loader(corpus, 64, sparse=True, process_index=i, process_count=2), 6) for i in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for name in ("gene_id", "count", "n_genes", "row", "weight"):
            np.testing.assert_array_equal(
                getattr(batch, name), np.concatenate([getattr(part, name) for part in parts])
            )


def test_memory_of_sparse_batches_is_used_again_and_never_while_held(corpus):
    iterator = iter(Loader(corpus, 32, sparse=True, prefetch=2))
    kept, copies, places = [], [], set()
    for step in range(40):
        batch = next(iterator)
        places.add(batch.depth.ctypes.data)  # stands first in the memory of a batch
        if step % 8 == 0:
            kept.append(batch.count[:100:2])
            copies.append(kept[-1].copy())
        del batch
    iterator.close()
    for view, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(view, copy)
    assert len(places) < 20
