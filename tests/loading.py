"""A small corpus on disk, and ways to look at batches, for the tests of the loader."""

import pathlib
from typing import Any

import anndata as ad
import numpy as np
from scipy import sparse
from synthetic import synthetic_adata

from scjax.corpus import Corpus, build_corpus
from scjax.corpus.manifest import hash_object
from scjax.types import FIELDS

SMALL = {"part_cells": 300, "inner": 2**9, "shard": 2**12, "progress": False}


def hash_tree(root: pathlib.Path, *folders: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Path relative to ``root`` (with "/") -> checksums, for every file under ``folders``, sorted."""
    files = sorted(p.relative_to(root).as_posix() for f in folders for p in f.rglob("*") if p.is_file())
    return {name: hash_object(root / name) for name in files}


def study(n_cells: int, seed: int) -> ad.AnnData:
    """Synthetic cells that express from a handful to all of 300 genes."""
    adata = synthetic_adata(n_cells=n_cells, n_genes=300, seed=seed)
    rng = np.random.default_rng(seed)
    x = rng.binomial(adata.X.toarray().astype(int), rng.uniform(0.02, 0.9, (n_cells, 1)))
    x[np.arange(n_cells), rng.integers(0, 300, n_cells)] += 1
    x[7] += 1
    adata.X = sparse.csr_matrix(x.astype(np.float32))
    return adata


def two_studies() -> dict[str, ad.AnnData]:
    first, second = study(700, 0), study(500, 1)
    second.X.data[0] = 70_000  # one part stores its counts as uint32, the others as uint16
    return {"first": first, "second": second}


def build(studies, out, **options) -> Corpus:
    return build_corpus(list(studies.values()), out, names=list(studies), **SMALL | options)


def take(loader, n, state=None):
    """The next n batches, which may be kept."""
    iterator = iter(loader)
    if state is not None:
        iterator.set_state(state)
    batches = [next(iterator) for _ in range(n)]
    iterator.close()
    return batches


def join(batches):
    """The shares of several processes -> the global batch."""
    arrays = [name for name in FIELDS if name not in ("label", "value")]
    fields = {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in arrays}
    label = {name: np.concatenate([batch.label[name] for batch in batches]) for name in batches[0].label}
    return batches[0].replace(**fields, label=label)


def assert_same(a, b):
    for name in FIELDS:
        if isinstance(getattr(a, name), dict):
            assert list(getattr(a, name)) == list(getattr(b, name))
            for key, values in getattr(a, name).items():
                np.testing.assert_array_equal(values, getattr(b, name)[key])
        else:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
            assert getattr(a, name).dtype == getattr(b, name).dtype
