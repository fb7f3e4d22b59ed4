"""A hash of every training cell of a corpus, for whoever asks later whether a model has seen a cell.

The file stands alone: it can be published beside a checkpoint, holds no expression value, and is read by
``scjax.eval.overlap``, which imports nothing of this room. What both sides must agree on is written here.

Genes are dealt into 16 hands, and a cell has a hash in each, so that it is still known when some genes were
dropped or renamed in one of two copies of a study. The key g of a gene comes from 64 bits of BLAKE2b of its
name in upper case: the symbol, or the id where the symbol is empty or that of several genes; its hand is
g modulo 16. The hash of a hand is the sum over its expressed genes, modulo 2^64, of
mix(g + 0x9E3779B97F4A7C15 · count), where mix is the finaliser of SplitMix64 (Steele, Lea, Flood 2014); sums
do not depend on the order of genes. A hand in which a cell expresses fewer than 16 genes has none.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from scjax.corpus.corpus import Corpus
from scjax.corpus.progress import cell_progress

FORMAT = "scjax-cell-hashes-1"
HANDS, MIN_GENES = 16, 16
_AT_ONCE = 8192  # cells
_STEP, _MIX1, _MIX2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def gene_keys(gene_id: Sequence[str], symbol: Sequence[str]) -> np.ndarray:
    """uint64 [n_genes]: the key of each gene."""
    often = Counter(s.upper() for s in symbol)
    names = [s if s and often[s.upper()] == 1 else i for i, s in zip(gene_id, symbol, strict=True)]
    digests = (hashlib.blake2b(name.upper().encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def hash_cells(counts: sparse.csr_matrix, keys: np.ndarray) -> np.ndarray:
    """uint64 [cells, 16]: the hashes of each cell, 0 where a hand has none.

    Args:
      counts: raw counts [cells, genes].
      keys: of its genes, from :func:`gene_keys`.
    """
    counts = sparse.csr_matrix(counts, copy=True)
    counts.eliminate_zeros()
    gene = keys[counts.indices]
    hand = (gene % np.uint64(HANDS)).astype(np.int64)
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    out = np.zeros((counts.shape[0], HANDS), np.uint64)
    with np.errstate(over="ignore"):
        x = gene + _STEP * np.rint(counts.data).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * _MIX1
        x = (x ^ (x >> np.uint64(27))) * _MIX2
        np.add.at(out, (row, hand), x ^ (x >> np.uint64(31)))
    n = np.bincount(HANDS * row + hand, minlength=out.size).reshape(out.shape)
    return np.where(n >= MIN_GENES, out, np.uint64(0))


def write_hashes(corpus: Corpus, out: str | os.PathLike[str], progress: bool = True) -> int:
    """Writes the hashes of the training cells, the genes and the names of the data sets to an ``.npz``.

    Reads the corpus once; the file takes up to 128 bytes a cell. Cells of the validation split are left out:
    no model is trained on them.

    Returns:
      The number of cells.
    """
    vocabulary = corpus.vocabulary
    keys = gene_keys(vocabulary.ids, vocabulary.symbols)
    n_cells, expressed, found = 0, np.zeros(len(keys), np.int64), []
    parts = corpus.split("train")
    with cell_progress(progress) as bar:
        task = bar.add_task("hashing", total=sum(part.n_cells for part in parts))
        for part in parts:
            for first in range(0, part.n_cells, _AT_ONCE):
                last = min(first + _AT_ONCE, part.n_cells)
                counts = corpus.read(slice(part.first_row + first, part.first_row + last)).X
                expressed += np.bincount(counts.indices, minlength=len(keys))
                hashes = hash_cells(counts, keys)
                found.append(np.unique(hashes[hashes > 0]))
                n_cells += last - first
                bar.update(task, advance=last - first)
    with pathlib.Path(out).open("wb") as file:
        np.savez(
            file,
            format=np.array(FORMAT),
            manifest=np.array(corpus.manifest_id),
            datasets=np.array(corpus.datasets, str),
            n_cells=np.array(n_cells),
            gene_id=np.array(vocabulary.ids, str),
            symbol=np.array(vocabulary.symbols, str),
            detection=(expressed / max(n_cells, 1)).astype(np.float32),
            hashes=np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64),
        )
    return n_cells
