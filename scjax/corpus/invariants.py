"""What holds within every part of a corpus, checked where the bytes are already known to be those written."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd

from scjax.corpus.compiled import compiled
from scjax.corpus.format import BLOCK
from scjax.corpus.index import column_layout
from scjax.corpus.kernels import content_hash
from scjax.corpus.panels import Panel
from scjax.corpus.reader import PartReader

if TYPE_CHECKING:
    from scjax.corpus.corpus import Corpus, Part

RUN_ELEMENTS = 2**22  # stored values looked at in one go
_WRONG = (
    "",
    "has a gene id beyond the vocabulary's {n_genes}",
    "has gene ids that do not rise",
    "has a stored count that is not above 0",
    "has counts of a gene that its data set did not measure",
    "has more counts than index/total.npy says",
)


@dataclasses.dataclass(frozen=True)
class Promises:
    """What every part of a corpus has to fit.

    Attributes:
      gene_ids: of the vocabulary.
      measured: uint8 [n_datasets, n_genes / 8], a bit per gene, lowest first.
      columns: label column -> its categories.
      values: what it holds of each cell besides.
    """

    gene_ids: list[str]
    measured: np.ndarray
    columns: dict[str, list[str]]
    values: dict[str, Panel]

    @classmethod
    def of(cls, corpus: Corpus) -> Promises:
        measured = [np.packbits(corpus.measured(i), bitorder="little") for i in range(len(corpus.datasets))]
        return cls(list(corpus.vocabulary.ids), np.stack(measured), dict(corpus.columns), corpus.panels)


def check_part(part: Part, promises: Promises, advance: Callable[[int], None]) -> Iterator[str]:
    """What is wrong within one part; ``advance`` is told of cells as they are done.

    Raises:
      CorruptDataError: something does not even decode.
    """
    nnz = part.column("nnz")
    indptr = np.concatenate([[0], np.cumsum(nnz, dtype=np.int64)])
    if (int(indptr[-1]), int(nnz.max())) != (part.nnz, part.max_nnz):
        yield "index/nnz.npy does not agree with the manifest's cells, nnz and max_nnz"
        return
    if not np.array_equal(part.blocks, np.append(indptr[:-1:BLOCK], indptr[-1])):
        yield "index/blocks.npy does not agree with index/nnz.npy"
        return
    for name in part.arrays.names:
        dtype, width = column_layout(name)
        shape = (part.n_cells,) if width == 1 else (part.n_cells, width)
        part.column(name)  # against its checksums
        stored = np.load(io.BytesIO(part.store.read(f"index/{part.id}/{name}.npy")), allow_pickle=False)
        if stored.dtype != dtype or stored.shape != shape:
            yield f"index/{name}.npy holds {stored.dtype} {list(stored.shape)}, not {dtype} {list(shape)}"
    for column, categories in promises.columns.items():
        codes = part.codes(column)
        if codes.min() < (0 if column == "dataset" else -1) or codes.max() >= len(categories):
            yield f"index/codes/{column}.npy has codes outside its {len(categories)} categories"
            if column == "dataset":
                return
    yield from _values(part, promises)
    yield from _frames(part, promises, indptr)
    yield from _counts(part, promises, indptr, advance)


def _values(part: Part, promises: Promises) -> Iterator[str]:
    reader, obs = PartReader(part), None
    for name, panel in promises.values.items():
        if panel.column:
            obs = ad.io.read_elem(part.group("obs")["obs"]) if obs is None else obs
            values = part.column(f"values/{name}")
            if pd.api.types.is_numeric_dtype(obs.get(name)) and not np.array_equal(
                obs[name].to_numpy(np.float32), values, equal_nan=True
            ):
                yield f"index/values/{name}.npy does not agree with obs[{name!r}]"
            wrong = np.isinf(values).any()
        else:
            array, shape = reader.matrix(name), (part.n_cells, len(panel.features))
            if array.n != math.prod(shape) or array.dtype != np.float32:
                yield f"obsm[{name!r}] holds {array.n} {array.dtype}, not float32 {list(shape)}"
                continue
            step = max(1, RUN_ELEMENTS // shape[1])
            tables = (reader.value(name, i, min(i + step, shape[0])) for i in range(0, shape[0], step))
            wrong = any(np.isinf(table).any() for table in tables)
        if wrong:
            yield f"value {name} has numbers that are not finite"


def _frames(part: Part, promises: Promises, indptr: np.ndarray) -> Iterator[str]:
    group = part.group("X/indptr", "obs", "var")
    shape = [part.n_cells, len(promises.gene_ids)]
    if list(group["X"].attrs["shape"]) != shape:
        yield f"X has shape {group['X'].attrs['shape']}, not {shape}"
    if not np.array_equal(group["X/indptr"][:], indptr):
        yield "X/indptr does not agree with index/nnz.npy"
    obs, var = ad.io.read_elem(group["obs"]), ad.io.read_elem(group["var"])
    if list(var.index) != promises.gene_ids:
        yield "var is not the vocabulary"
    if len(obs) != part.n_cells or not obs.index.is_unique:
        yield "obs does not have one row, with its own name, per cell"
        return
    names = np.array(promises.columns["dataset"], object)
    if not np.array_equal(obs["scjax_dataset"].to_numpy(object), names[part.codes("dataset")]):
        yield "obs['scjax_dataset'] does not agree with index/codes/dataset.npy"


def _counts(
    part: Part, promises: Promises, indptr: np.ndarray, advance: Callable[[int], None]
) -> Iterator[str]:
    reader, total, dataset = PartReader(part), part.column("total"), part.codes("dataset")
    n_genes = len(promises.gene_ids)
    # of fractions the hash was taken before they were rounded to float32
    content = part.column("content") if "content" in part.arrays.names and part.x_dtype.kind == "u" else None
    first = 0
    while first < part.n_cells:
        end = max(first + 1, int(np.searchsorted(indptr, indptr[first] + RUN_ELEMENTS, side="right")) - 1)
        low, high = int(indptr[first]), int(indptr[end])
        genes, counts = np.empty(high - low, part.index_dtype), np.empty(high - low, part.x_dtype)
        reader.read_spans([(low, high)], genes, counts)
        starts = indptr[first : end + 1] - low
        run = slice(first, end)
        wrong, cell = _look(starts, genes, counts, dataset[run], total[run], promises.measured, n_genes)
        if wrong:
            yield f"cell {first + cell} {_WRONG[wrong].format(n_genes=n_genes)}"
            return
        if content is not None:
            hashes = np.empty((end - first, 2), np.uint64)
            content_hash(genes, counts, np.diff(starts).astype(np.uint32), hashes)
            other = (hashes != content[run]).any(1)
            if other.any():
                yield f"cell {first + other.argmax()} has another hash than index/content.npy says"
                return
        advance(end - first)
        first = end


@compiled
def _look(starts, genes, counts, dataset, total, measured, n_genes):
    """(number in _WRONG, cell) of the first cell that breaks a promise; (0, 0) where all keep them."""
    for cell in range(dataset.size):
        before, depth = np.int64(-1), 0.0
        for k in range(starts[cell], starts[cell + 1]):
            gene, count = np.int64(genes[k]), np.float64(counts[k])
            if gene >= n_genes:
                return 1, cell
            if gene <= before:
                return 2, cell
            if not 0.0 < count < np.inf:
                return 3, cell
            if not (measured[dataset[cell], gene >> 3] >> (gene & 7)) & 1:
                return 4, cell
            before = gene
            depth += count
        if depth > total[cell] * (1 + 1e-6):  # counts that are fractions were rounded to float32
            return 5, cell
    return 0, 0
