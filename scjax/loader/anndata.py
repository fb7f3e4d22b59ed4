"""Batches straight from an AnnData, in its order: for embedding and scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from scjax.config import nearest
from scjax.corpus.build import UNKNOWN
from scjax.corpus.obs import categorise
from scjax.corpus.panels import place
from scjax.corpus.sources.values import find_value, list_values, read_value
from scjax.loader.buckets import bucket_of, round_up
from scjax.types import CellBatch

if TYPE_CHECKING:
    import anndata as ad

    from scjax.corpus.sources import Source
    from scjax.genes import Vocabulary

Read = Callable[[int, int], np.ndarray]  # values of the cells [first, last)

_GENE, _COUNT = np.dtype(np.uint32), np.dtype(np.float32)


def cells(
    adata: ad.AnnData,
    vocabulary: Vocabulary,
    batch_size: int,
    *,
    layer: str | None = None,
    bucket_lengths: Sequence[int] | None = None,
    labels: Sequence[str] = (),
    categories: Mapping[str, Sequence[str]] | None = None,
    values: Sequence[str] | Mapping[str, Sequence[str] | None] = (),
    row_offset: int = 0,
    duplicates: str = "error",
) -> Iterator[CellBatch]:
    """The cells of an AnnData as batches, in order; the last is filled up with rows of weight 0.

    Args:
      adata: raw counts, in memory or backed.
      vocabulary: gives genes their ids. Genes that it does not have are left out, and still count in
        ``depth``, the total over all genes of the AnnData.
      batch_size: rows of every batch.
      layer: where the counts are: None for X, "raw", or the name of a layer.
      bucket_lengths: the values L may take; by default 64, 128, 256, ... A batch whose cells need more than
        the largest is padded to a power-of-two multiple of it: nothing is ever cut.
      labels: columns of ``obs`` to pass on as categorical codes, -1 where missing.
      categories: label -> its categories, as ``Corpus.columns`` or a model's ``categories`` has them: the
        codes are by these, and -1 as well where the text is one of ``unknown`` of ``build_corpus``. Other
        labels are coded by the categories of the AnnData.
      values: numeric columns of ``obs`` and matrices of ``obsm`` to pass on as float32, [B] or [B, features];
        NaN where missing. A mapping gives the features wanted of each, as ``Corpus.values`` has them: columns
        are then put in that order by name, NaN where the AnnData has none.
      row_offset: row number of the first cell.
      duplicates: several columns that are the same gene: "error", or "sum" their counts.

    Raises:
      CountsError, a ValueError: the matrix does not hold raw counts.
      ValueError: no gene is in the vocabulary, or several columns are the same gene.
      ValueError: a text that is not among the categories (names the nearest); a value that is not numbers, or
        is infinite, has none of the features wanted, or another number of them without names.
      KeyError: no such layer, obs column or value; lists those there are.
    """
    from scjax.corpus.sources import open_source

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if duplicates not in ("error", "sum"):
        raise ValueError(f"duplicates={duplicates!r}: there are error and sum")
    lengths = sorted(bucket_lengths or [round_up(1)])
    if lengths[0] < 1:
        raise ValueError(f"bucket_lengths are at least 1, not {lengths[0]}")
    source = open_source(adata, layer=layer)
    match = vocabulary.match(source.var)
    if not match.n_matched:
        raise ValueError(f"{source.where}: no gene is in the vocabulary: {match.summary()}")
    if match.duplicates and duplicates == "error":
        gene, columns = next(iter(match.duplicates.items()))
        raise ValueError(
            f"{source.where}: {len(match.duplicates)} genes have several columns, such as {gene}: {columns}; "
            'pass duplicates="sum" to add them up'
        )
    codes = {name: _codes(source, name, (categories or {}).get(name)) for name in labels}
    wanted = values if isinstance(values, Mapping) else dict.fromkeys(values)
    numbers = {name: _numbers(source, name, features) for name, features in wanted.items()}
    while lengths[-1] < match.n_matched:
        lengths.append(2 * lengths[-1])
    return _batches(source, match.ids, batch_size, lengths, codes, numbers, row_offset)


def _codes(source: Source, name: str, categories: Sequence[str] | None) -> np.ndarray:
    if name not in source.obs:
        raise KeyError(f"{source.where}: no obs column {name!r}; there are {list(source.obs.columns)}")
    if categories is None:
        return source.obs[name].astype("category").cat.codes.to_numpy().astype(np.int32)
    codes, texts = categorise(source.obs[name])
    known = {text: code for code, text in enumerate(categories)}
    strange = [text for text in texts if text not in known and text not in UNKNOWN]
    if strange:
        raise ValueError(
            f"{source.where}: obs column {name!r} has {strange[0]!r}"
            + (f" and {len(strange) - 1} more" if len(strange) > 1 else "")
            + f", not among its {len(known)} categories ({', '.join(list(known)[:5])}"
            + f"{', ...' if len(known) > 5 else ''});{nearest(strange[0], known)} Missing values are fine"
        )
    return np.array([*(known.get(text, -1) for text in texts), -1], np.int32)[codes]


def _numbers(source: Source, name: str, features: Sequence[str] | None) -> tuple[tuple[int, ...], Read]:
    """(shape behind that of the batch, function that reads a range of cells) of a value."""
    value = find_value(source, name)
    if value is None:
        raise KeyError(
            f"{source.where}: no obs column or obsm {name!r}; with numbers there are {list_values(source)}"
        )
    if features is None or (value.column and len(features) == 1):
        shape = () if value.column else (len(value.features),)
        return shape, lambda first, last: read_value(source, value, first, last)
    if value.column or (not value.named and len(value.features) != len(features)):
        has = "is an obs column" if value.column else f"has {len(value.features)} features without names"
        raise ValueError(
            f"{source.where}: {name!r} {has}, not the {len(features)} features that are wanted "
            f"({', '.join(features[:3])}, ...); a table (DataFrame) in obsm may have any of them, by name"
        )
    own = value.features if value.named else features
    if not set(own) & set(features):
        raise ValueError(
            f"{source.where}: none of the {len(own)} features of {name!r}, such as {own[0]!r}, is among the "
            f"{len(features)} that are wanted ({', '.join(features[:3])}, ...);"
            f"{nearest(str(own[0]), features)} Rename them, or leave {name!r} out"
        )
    return (len(features),), lambda first, last: place(read_value(source, value, first, last), own, features)


def _batches(
    source: Source,
    ids: np.ndarray,
    batch_size: int,
    lengths: Sequence[int],
    codes: dict[str, np.ndarray],
    numbers: dict[str, tuple[tuple[int, ...], Read]],
    row_offset: int,
) -> Iterator[CellBatch]:
    from scjax.loader.pack import Rows, Slabs  # numba takes a while to import

    slabs = Slabs(limit=3)
    for first, depth, x in _rebatch(source, ids, batch_size):
        n = x.shape[0]
        expressed = np.zeros(batch_size, np.int32)
        expressed[:n] = np.diff(x.indptr)
        L = bucket_of(int(expressed.max()), lengths)
        fields: dict[str, Any] = {
            "gene_id": ((batch_size, L), np.int32),
            "count": ((batch_size, L), np.float32),
            "n_genes": ((batch_size,), np.int32),
            "depth": ((batch_size,), np.float32),
            "row": ((batch_size,), np.uint32),
            "weight": ((batch_size,), np.float32),
        }
        fields |= {f"label {name}": ((batch_size,), np.int32) for name in codes}
        fields |= {
            f"value {name}": ((batch_size, *shape), np.float32) for name, (shape, _) in numbers.items()
        }
        out = slabs.take(fields)
        label = {name: out.pop(f"label {name}") for name in codes}
        for name, column in label.items():
            column[:n], column[n:] = codes[name][first : first + n], -1
        value = {name: out.pop(f"value {name}") for name in numbers}
        for name, table in value.items():
            table[:n], table[n:] = numbers[name][1](first, first + n), np.nan
        out["depth"][:n], out["depth"][n:] = depth, 0
        out["row"][:n], out["row"][n:] = np.arange(n) + (first + row_offset), 0
        out["weight"][:n], out["weight"][n:] = 1, 0

        genes, counts = x.indices.astype(_GENE, copy=False), x.data.astype(_COUNT, copy=False)
        at = np.zeros(batch_size, np.uint64)
        at[:n] = x.indptr[:-1]
        Rows(
            at * np.uint64(_GENE.itemsize) + np.uint64(genes.ctypes.data),
            at * np.uint64(_COUNT.itemsize) + np.uint64(counts.ctypes.data),
            expressed,
            out["row"],
            (_GENE, _COUNT),
        ).pad(out["gene_id"], out["count"], out["n_genes"])
        yield CellBatch(**out, label=label, value=value)
        del out, label, value  # or this generator would itself keep the memory from being reused


def _rebatch(
    source: Source, ids: np.ndarray, batch_size: int
) -> Iterator[tuple[int, np.ndarray, sparse.csr_matrix]]:
    """(first row, depth, counts by vocabulary id) of ``batch_size`` cells at a time."""
    known = np.flatnonzero(ids >= 0)
    width = int(ids.max()) + 1
    waiting: list[tuple[np.ndarray, sparse.csr_matrix]] = []
    done = 0
    for _, rows in source.counts():
        depth = np.asarray(rows.sum(axis=1, dtype=np.float64)).ravel()
        rows = rows[:, known]
        genes = ids[known][rows.indices]
        rows = sparse.csr_matrix((rows.data, genes, rows.indptr), shape=(rows.shape[0], width))
        rows.sum_duplicates()
        waiting.append((depth, rows))
        depth = np.concatenate([d for d, _ in waiting])
        rows = sparse.vstack([x for _, x in waiting], format="csr") if len(waiting) > 1 else rows
        whole = len(depth) // batch_size * batch_size
        for start in range(0, whole, batch_size):
            yield done + start, depth[start : start + batch_size], rows[start : start + batch_size]
        waiting = [(depth[whole:], rows[whole:])]
        done += whole
    for depth, rows in waiting:
        if len(depth):
            yield done, depth, rows
