"""Which genes tell cells apart: a short vocabulary for models that cannot read every gene."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from scjax.genes import Vocabulary

if TYPE_CHECKING:
    from scjax.corpus.corpus import Corpus
    from scjax.corpus.mixture import Mixture

STRETCHES = 256  # of neighbouring cells, as a read costs whole chunks


def variable_genes(corpus: Corpus | Mixture, n: int, *, max_cells: int = 50_000) -> Vocabulary:
    """The ``n`` genes that vary most beyond what their mean explains, ranked within each data set.

    Normalised dispersion of log counts per 10,000 (scanpy's "seurat" flavour), genes ordered by the
    number of data sets in which they are among the ``n`` most variable, then by median rank. Labels are not
    looked at and validation cells are left out. Give the result to a run as ``config.data.genes``.

    Args:
      corpus: where the cells are; of many training cells, stretches from all over the corpus are read.
      n: genes to keep.
      max_cells: size of that sample.

    Returns:
      The chosen genes as a vocabulary, in the order of the corpus's.

    Raises:
      ImportError: scanpy is missing (``pip install 'scjax[eval]'``).
      ValueError: the corpus has no more than ``n`` genes.
    """
    try:
        import scanpy
    except ImportError as error:
        raise ImportError("choosing variable genes needs scanpy: pip install 'scjax[eval]'") from error
    if n >= len(corpus.vocabulary):
        raise ValueError(f"asked for {n:,} of {len(corpus.vocabulary):,} genes: there is nothing to choose")
    sample = corpus.read(_sample(corpus, max_cells))
    sample.X = sample.X.astype(np.float32)
    scanpy.pp.filter_genes(sample, min_cells=10)
    scanpy.pp.normalize_total(sample, target_sum=1e4)
    scanpy.pp.log1p(sample)
    several = sample.obs["scjax_dataset"].nunique() > 1
    sample.obs["scjax_dataset"] = sample.obs["scjax_dataset"].astype("category")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The inplace keyword")  # scanpy 1.12 on pandas 3.1
        scanpy.pp.highly_variable_genes(sample, n_top_genes=n, batch_key="scjax_dataset" if several else None)
    chosen = set(sample.var_names[sample.var["highly_variable"]])
    whole = corpus.vocabulary.to_dict()
    keep = [i for i, name in enumerate(corpus.vocabulary.ids) if name in chosen]
    return Vocabulary.from_dict({field: [values[i] for i in keep] for field, values in whole.items()})


def _sample(corpus: Corpus | Mixture, n: int) -> np.ndarray:
    """int64: row numbers of at most ``n`` training cells, in stretches that are evenly far apart.

    Training cells are not the first ones of a corpus that was appended to, nor is a part of one that was
    not shuffled like another.
    """
    rows = np.concatenate([np.arange(p.first_row, p.first_row + p.n_cells) for p in corpus.split("train")])
    if len(rows) <= n:
        return rows
    stretch = max(1, n // STRETCHES)
    starts = np.linspace(0, len(rows) - stretch, n // stretch).astype(np.int64)
    return rows[np.unique(starts[:, None] + np.arange(stretch))]
