"""A hash of every training cell of a corpus, for whoever asks later whether a model has seen a cell.

The file stands alone: it can be published beside a checkpoint, holds no expression value, and is read by
``scjax.eval.overlap``, which imports nothing of this room. What both sides must agree on is written here.

A cell has four hashes, one per quarter of the genes, so that a cell is still known when rare genes were
dropped from one of two copies of a study. The quarter of a gene (its last two bits) and its 64-bit key g come
from BLAKE2b of its name in upper case: the symbol, or the id where the symbol is empty or that of several
genes. The hash of a quarter is the sum over its expressed genes, modulo 2^64, of
mix(g + 0x9E3779B97F4A7C15 · count), where mix is the finaliser of SplitMix64 (Steele, Lea, Flood 2014); sums
do not depend on the order of genes. A quarter in which a cell expresses fewer than 16 genes has none.
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
MIN_GENES = 16
_AT_ONCE = 8192  # cells
_STEP, _MIX1, _MIX2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def gene_keys(gene_id: Sequence[str], symbol: Sequence[str]) -> np.ndarray:
    """uint64 [n_genes]: the key of each gene."""
    often = Counter(s.upper() for s in symbol)
    names = [s if s and often[s.upper()] == 1 else i for i, s in zip(gene_id, symbol, strict=True)]
    digests = (hashlib.blake2b(name.upper().encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def hash_cells(counts: sparse.csr_matrix, keys: np.ndarray) -> np.ndarray:
    """uint64 [cells, 4]: the hashes of each cell, 0 where a quarter has none.

    Args:
      counts: raw counts [cells, genes].
      keys: of its genes, from :func:`gene_keys`.
    """
    counts = sparse.csr_matrix(counts, copy=True)
    counts.eliminate_zeros()
    gene = keys[counts.indices]
    with np.errstate(over="ignore"):
        x = gene + _STEP * np.rint(counts.data).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * _MIX1
        x = (x ^ (x >> np.uint64(27))) * _MIX2
        x ^= x >> np.uint64(31)
        out = np.zeros((counts.shape[0], 4), np.uint64)
        for quarter in range(4):
            here = (gene & np.uint64(3)) == quarter
            total, n = _running(np.where(here, x, np.uint64(0))), _running(here.astype(np.uint64))
            start, end = counts.indptr[:-1], counts.indptr[1:]
            enough = n[end] - n[start] >= MIN_GENES
            out[:, quarter] = np.where(enough, total[end] - total[start], np.uint64(0))
    return out


def _running(x: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, 2, ... values, modulo 2^64."""
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(x, dtype=np.uint64)])


def write_hashes(corpus: Corpus, out: str | os.PathLike[str], progress: bool = True) -> int:
    """Writes the hashes of the training cells, the genes and the names of the data sets to an ``.npz``.

    Reads the corpus once; the file takes 32 bytes a cell. Cells of the validation split are left out: no
    model is trained on them.

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
