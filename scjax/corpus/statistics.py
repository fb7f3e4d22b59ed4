"""What the genes of a corpus are like: how often and how strongly each is expressed.

The median of a gene's non-zero counts per 10,000 is what Geneformer's rank-value encoding divides by. It is
found without ever holding a gene's values: one pass over the cells counts them in wide logarithmic bins, a
second one cuts the bin that holds each gene's median into narrow ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import rich.table

from scjax.corpus.compiled import compiled
from scjax.corpus.progress import cell_progress
from scjax.corpus.reader import PartReader

if TYPE_CHECKING:
    from scjax.corpus.corpus import Corpus, Part

TARGET = 1e4  # counts a cell after normalisation
TOLERANCE = 5e-5  # relative error of a median, at most
VERSION = 1  # of the law below; a cache of another one is not read
RUN_ELEMENTS = 2**22  # stored values held at a time

# Counts per 10,000 lie below 2**14; in a cell of fewer than 2.6e9 counts none lies below 2**-18, and values
# that do, where counts are fractions, share the lowest bin.
_FIRST_OCTAVE, _OCTAVES, _WIDE = -18, 32, 16
_BINS = _OCTAVES * _WIDE
_NARROW = 512  # pieces that a wide bin is cut into: each is 2**(1/8192), or 8.5e-5, wide


@dataclasses.dataclass(frozen=True)
class GeneStatistics:
    """Statistics of the training cells, one entry a gene of the vocabulary.

    A cell whose study did not measure a gene has no part in that gene's numbers: absent is not zero.
    Counts per 10,000 are relative to all counts of the cell, those of unmatched genes included.

    Attributes:
      n_cells: int64, cells whose study measured the gene.
      n_detected: int64, cells that express it.
      mean: float64, mean counts per 10,000 over ``n_cells``; NaN where that is 0.
      median: float64, median counts per 10,000 over ``n_detected``, to a relative 5e-5; NaN where that is 0.
    """

    n_cells: np.ndarray
    n_detected: np.ndarray
    mean: np.ndarray
    median: np.ndarray

    @property
    def detection(self) -> np.ndarray:
        """float64, share of the cells that express the gene; NaN where no study measured it."""
        return _quotient(self.n_detected, self.n_cells)

    def frame(self, corpus: Corpus) -> pd.DataFrame:
        """The statistics as a table with the gene ids and symbols of ``corpus``."""
        columns = {"symbol": list(corpus.vocabulary.symbol), "mean": self.mean, "detection": self.detection}
        columns |= {"median": self.median, "n_detected": self.n_detected, "n_cells": self.n_cells}
        return pd.DataFrame(columns, index=pd.Index(corpus.vocabulary.ids, name="gene_id"))

    def table(self, corpus: Corpus, n: int = 20) -> rich.table.Table:
        """The ``n`` genes of the highest mean, to print with rich."""
        frame = self.frame(corpus).sort_values("mean", ascending=False, kind="stable").head(n)
        seen = int((self.n_detected > 0).sum())
        title = f"{seen:,} of {len(self.mean):,} genes are expressed; the {len(frame)} most expressed:"
        table = rich.table.Table(title=title, title_justify="left")
        for name in ("gene", "symbol", "mean", "detected", "median", "cells"):
            table.add_column(name, justify="left" if name in ("gene", "symbol") else "right")
        for gene, row in frame.iterrows():
            numbers = f"{row['mean']:.3f}", f"{row['detection']:.1%}", f"{row['median']:.3f}"
            table.add_row(str(gene), str(row["symbol"]), *numbers, f"{row['n_cells']:,}")
        table.caption = (
            "mean and median in counts per 10,000; the median is over the cells that express a gene"
        )
        return table


def statistics(corpus: Corpus, *, progress: bool = True) -> GeneStatistics:
    """See ``Corpus.statistics``."""
    name = f"statistics/{corpus.manifest_id}.npz"
    kept = corpus.store.kept
    known = None if kept is None else _read_cache(kept / name, corpus.manifest["vocabulary"]["n_genes"])
    if known is None:
        known = _compute(corpus, progress)
        if kept is not None:
            # a corpus on a medium that cannot be written to is counted anew each time
            with contextlib.suppress(OSError):
                _write_cache(kept / name, known)
    return known


def _compute(corpus: Corpus, progress: bool) -> GeneStatistics:
    n_genes = corpus.manifest["vocabulary"]["n_genes"]
    parts = corpus.split("train")
    in_study = np.zeros(len(corpus.datasets), np.int64)
    for part in parts:
        in_study += np.bincount(part.codes("dataset"), minlength=len(in_study))
    n_cells = np.zeros(n_genes, np.int64)
    for dataset, n in enumerate(in_study):
        n_cells += n * corpus.measured(dataset)

    sums, wide = np.zeros(n_genes), np.zeros((n_genes, _BINS), np.uint32)
    with cell_progress(progress) as bar:
        task = bar.add_task("counting", total=2 * sum(part.n_cells for part in parts))

        def add(fill: Callable[..., None], *into: np.ndarray) -> None:
            for part in parts:
                for genes, counts, indptr, scale in _runs(part):
                    fill(genes, counts, indptr, scale, *into)
                    bar.advance(task, len(scale))

        add(_fill_wide, sums, wide)
        n_detected = wide.sum(1, dtype=np.int64)
        below = np.cumsum(wide, axis=1, dtype=np.uint32)
        del wide
        middle = np.maximum(n_detected - 1, 0) // 2, n_detected // 2  # of n values in order, from 0
        low, high = (_first_above(below, at) for at in middle)
        before = np.where(low > 0, below[np.arange(n_genes), np.maximum(low - 1, 0)], 0).astype(np.int64)
        del below
        narrow = np.zeros((n_genes, _NARROW), np.uint32)
        largest, smallest = np.full(n_genes, -np.inf), np.full(n_genes, np.inf)
        add(_fill_narrow, low, high, narrow, largest, smallest)

    largest[n_detected == 0] = smallest[n_detected == 0] = np.nan
    within = np.cumsum(narrow, axis=1, dtype=np.uint32)
    places = [low + (_first_above(within, at - before) + 0.5) / _NARROW for at in middle]
    inside = sum(2.0 ** (place / _WIDE + _FIRST_OCTAVE) for place in places) / 2
    # two middle values in two wide bins are the largest of the one and the smallest of the other
    median = np.where(low == high, inside, (largest + smallest) / 2)
    median[n_detected == 0] = np.nan
    return GeneStatistics(n_cells, n_detected, _quotient(sums, n_cells), median)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0)


def _first_above(cumulative: np.ndarray, at: np.ndarray) -> np.ndarray:
    """int64 [n]: first column of each row of ``cumulative`` that is above ``at``; 0 where none is."""
    return np.argmax(cumulative > np.asarray(at)[:, None], axis=1)


def _runs(part: Part) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(genes, counts, where each cell starts in these, 10,000 / depth) of one run of cells after another."""
    indptr = np.concatenate([[0], np.cumsum(part.nnz_per_cell, dtype=np.int64)])
    reader = PartReader(part)
    total = part.total

    def read(first: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        low, high = int(indptr[first]), int(indptr[end])
        genes, counts = np.empty(high - low, part.index_dtype), np.empty(high - low, part.x_dtype)
        reader.read_spans([(low, high)], genes, counts)
        scale = TARGET / np.maximum(total[first:end], 1.0)
        return genes, counts, indptr[first : end + 1] - low, scale

    def cuts() -> Iterator[tuple[int, int]]:
        first = 0
        while first < part.n_cells:
            fits = int(np.searchsorted(indptr, indptr[first] + RUN_ELEMENTS, side="right")) - 1
            yield first, max(first + 1, fits)
            first = max(first + 1, fits)

    with ThreadPoolExecutor(1) as pool:  # reads the next run while this one is counted
        coming = None
        for cut in cuts():
            read_now, coming = coming, pool.submit(read, *cut)
            if read_now is not None:
                yield read_now.result()
        if coming is not None:
            yield coming.result()


@compiled
def _place(x: float) -> float:
    """Where a value lies, in wide bins from the lowest."""
    return (np.log2(x) - _FIRST_OCTAVE) * _WIDE


@compiled
def _bin(place: float) -> int:
    return min(max(int(np.floor(place)), 0), _BINS - 1)


@compiled
def _fill_wide(genes, counts, indptr, scale, sums, wide):
    for cell in range(scale.size):
        for k in range(indptr[cell], indptr[cell + 1]):
            x = counts[k] * scale[cell]
            sums[genes[k]] += x
            wide[genes[k], _bin(_place(x))] += 1


@compiled
def _fill_narrow(genes, counts, indptr, scale, low, high, narrow, largest, smallest):
    for cell in range(scale.size):
        for k in range(indptr[cell], indptr[cell + 1]):
            gene = genes[k]
            x = counts[k] * scale[cell]
            place = _place(x)
            at = _bin(place)
            if at == low[gene]:
                narrow[gene, min(max(int((place - at) * _NARROW), 0), _NARROW - 1)] += 1
                largest[gene] = max(largest[gene], x)
            if at == high[gene]:
                smallest[gene] = min(smallest[gene], x)


def _write_cache(path: pathlib.Path, found: GeneStatistics) -> None:
    """Whole or not at all, whoever else writes it at the same time."""
    content = io.BytesIO()
    np.savez_compressed(content, version=np.array(VERSION), **dataclasses.asdict(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.getvalue())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_cache(path: pathlib.Path, n_genes: int) -> GeneStatistics | None:
    """None where there is none that can be read."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            if int(file["version"]) != VERSION:
                return None
            found = {field.name: file[field.name] for field in dataclasses.fields(GeneStatistics)}
    # whatever a damaged archive makes zipfile say; its checksums let no other numbers through
    except (OSError, KeyError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
    return GeneStatistics(**found) if all(x.shape == (n_genes,) for x in found.values()) else None
