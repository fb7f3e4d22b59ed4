"""The shuffle of a build: every source is read once into buckets (map), every bucket is a part (reduce)."""

from __future__ import annotations

import os
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import rich.progress
import zarr
from scipy import sparse

from scjax.corpus import manifest as manifests
from scjax.corpus.counts import MAX_COUNT, CountsError
from scjax.corpus.format import Layout, index_dtype, write_part, x_dtype
from scjax.corpus.index import write_index
from scjax.corpus.plan import Plan

Cells = dict[str, np.ndarray]  # per-cell columns


class Spill:
    """Buckets of cells in a folder: genes and counts as flat files, per-cell columns as pickled runs."""

    def __init__(self, folder: pathlib.Path, gene_dtype: np.dtype, count_dtype: np.dtype) -> None:
        folder.mkdir()
        self._folder = folder
        self._dtypes = {"genes": gene_dtype, "counts": count_dtype}
        self.n_cells = 0

    @property
    def itemsize(self) -> int:
        """Bytes per stored value."""
        return sum(dtype.itemsize for dtype in self._dtypes.values())

    def add(self, bucket: int, x: sparse.csr_matrix, cells: Cells) -> None:
        """Appends cells; ``cells`` must hold "nnz"."""
        for name, values in (("genes", x.indices), ("counts", x.data)):
            with open(self._folder / f"{bucket}.{name}", "ab") as file:
                file.write(values.astype(self._dtypes[name]).tobytes())
        with open(self._folder / f"{bucket}.cells", "ab") as file:
            file.write(pickle.dumps(cells, protocol=5))
        self.n_cells += x.shape[0]

    def load(self, bucket: int) -> tuple[np.ndarray, np.ndarray, Cells] | None:
        """(genes, counts, cells) of a bucket in the order of arrival, the first two memory-mapped."""
        runs = list(self._runs(bucket))
        if not runs:
            return None
        cells = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
        genes, counts = (
            # As plain arrays: slicing a memmap object costs several times as much.
            np.asarray(np.memmap(self._folder / f"{bucket}.{name}", dtype, "r"))
            for name, dtype in self._dtypes.items()
        )
        return genes, counts, cells

    def _runs(self, bucket: int) -> Iterator[Cells]:
        path = self._folder / f"{bucket}.cells"
        if path.exists():
            with open(path, "rb") as file:
                while file.peek(1):
                    yield pickle.load(file)

    def drop(self, bucket: int) -> None:
        """Frees the disk that a bucket holds."""
        for name in ("genes", "counts", "cells"):
            (self._folder / f"{bucket}.{name}").unlink(missing_ok=True)


def map_sources(
    plan: Plan, spill: Spill, work: pathlib.Path, bar: rich.progress.Progress, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Reads every source once and spills its cells; returns the manifest's entries on data sets."""
    n_genes = len(plan.vocabulary)
    task = bar.add_task("reading", total=sum(map(len, plan.keys)))
    entries = []
    for number, study in enumerate(plan.studies):
        bar.update(task, description=f"reading {study.name}")
        source, match = study.open(), plan.matches[number]
        obs = {f"obs:{name}": values for name, values in plan.schema.encode(source.obs).items()}
        names = source.obs.index.astype(str).to_numpy(object)
        kept, dropped = 0, {"empty": 0, "below_min_genes": 0}
        for first, x in source.counts(allow_non_integer=options["allow_non_integer"], scratch=work):
            total = np.asarray(x.sum(1, dtype=np.float64)).ravel()
            x = _relabel(x, match.ids, n_genes, source.where)
            nnz = np.diff(x.indptr)
            empty, few = total == 0, nnz < options["min_genes"]
            dropped["empty"] += int(empty.sum())
            dropped["below_min_genes"] += int((few & ~empty).sum())
            bucket = plan.buckets[number][first : first + len(nnz)]
            rows = np.flatnonzero(~empty & ~few)
            rows = rows[bucket[rows].argsort(kind="stable")]
            kept += len(rows)
            x, bucket = x[rows], bucket[rows]
            in_source = rows + first
            cells: Cells = {
                "dataset": np.full(len(rows), number, np.int32),
                "row": in_source,
                "key": plan.keys[number][in_source],
                "name": names[in_source],
                "nnz": nnz[rows],
                "total": total[rows],
                **{name: values[in_source] for name, values in obs.items()},
            }
            cuts = np.flatnonzero(np.diff(bucket, prepend=-1, append=-1)) if len(rows) else np.zeros(0, int)
            for low, high in zip(cuts[:-1], cuts[1:], strict=True):
                run = {name: values[low:high] for name, values in cells.items()}
                spill.add(int(bucket[low]), x[low:high], run)
            bar.advance(task, len(nnz))
        entries.append(
            {
                "name": study.name,
                "file": source.file,
                "sha256": source.sha256(),
                "layer": source.layer,
                "species": sorted({plan.vocabulary.species[i] for i in match.ids[match.ids >= 0]}),
                "n_cells_in": source.shape[0],
                "n_cells": kept,
                "dropped": dropped,
                "genes_total": source.shape[1],
                "genes_matched": match.n_matched,
                "matched_by": match.matched_by,
                "genes_unmatched": match.unmatched[:20],  # examples
            }
        )
    if not any(entry["n_cells"] for entry in entries):
        raise ValueError(f"none of the cells has {options['min_genes']} expressed genes of the vocabulary")
    return entries


def _relabel(x: sparse.csr_matrix, ids: np.ndarray, n_genes: int, where: str) -> sparse.csr_matrix:
    """Columns of a study -> vocabulary ids, sorted within a row; columns that are one gene are summed."""
    genes = ids[x.indices]
    kept = genes >= 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[x.indptr]
    y = sparse.csr_matrix((x.data[kept].astype(np.float64), genes[kept], indptr), shape=(x.shape[0], n_genes))
    y.sum_duplicates()
    if y.nnz and y.data.max() > MAX_COUNT:
        raise CountsError(f"{where}: columns of one gene add up to more than {MAX_COUNT}")
    return y


def reduce_buckets(
    plan: Plan, spill: Spill, work: pathlib.Path, bar: rich.progress.Progress, layout: Layout
) -> list[dict[str, Any]]:
    """Turns every bucket into a part; returns the manifest's entries on parts."""
    task = bar.add_task("writing", total=spill.n_cells)
    parts = []
    for bucket, split in enumerate(plan.splits):
        bar.update(task, description=f"writing part {bucket + 1} of {len(plan.splits)}")
        loaded = spill.load(bucket)
        if loaded is not None:  # else all of its cells were dropped
            parts.append(_write_part(plan, split, *loaded, work, layout))
            bar.advance(task, parts[-1]["n_cells"])
        spill.drop(bucket)
    return parts


def _write_part(
    plan: Plan,
    split: str,
    genes: np.ndarray,
    counts: np.ndarray,
    cells: Cells,
    work: pathlib.Path,
    layout: Layout,
) -> dict[str, Any]:
    start = np.cumsum(cells["nnz"], dtype=np.int64) - cells["nnz"]
    order = np.lexsort((cells["row"], cells["dataset"], cells["key"]))
    start, cells = start[order], {name: values[order] for name, values in cells.items()}
    nnz = cells["nnz"].astype(np.uint32)
    indptr = np.concatenate([[0], np.cumsum(nnz, dtype=np.int64)])

    def pieces(values: np.ndarray) -> Iterator[np.ndarray]:
        """The values of all cells in their new order, a shard at a time."""
        for low in range(0, int(indptr[-1]), layout.shard):
            high = min(low + layout.shard, int(indptr[-1]))
            first, last = np.searchsorted(indptr, [low, high - 1], side="right") - 1
            from_ = start[first : last + 1] + np.maximum(low - indptr[first : last + 1], 0)
            to = start[first : last + 1] + np.minimum(high - indptr[first : last + 1], nnz[first : last + 1])
            yield np.concatenate([values[a:b] for a, b in zip(from_, to, strict=True)])

    whole = counts.dtype.kind == "u" or all(
        bool((np.floor(piece) == piece).all()) for piece in pieces(counts)
    )
    dtypes = index_dtype(len(plan.vocabulary)), x_dtype(counts.max(), whole)
    schema, names = plan.schema, [study.name for study in plan.studies]
    obs: dict[str, Any] = {
        name: (cells[f"obs:{name}"], schema.categories[name]) if kind == "category" else cells[f"obs:{name}"]
        for name, kind in schema.kinds.items()
    }
    obs["scjax_dataset"] = cells["dataset"], names
    obs["scjax_source_row"] = cells["row"]
    obs["scjax_cell_id"] = cells["name"]
    path, index = work / "part.zarr", work / "part-index"
    write_part(
        path,
        layout=layout,
        vocabulary=plan.vocabulary,
        indptr=indptr,
        indices=pieces(genes),
        data=pieces(counts),
        dtypes=dtypes,
        obs_index=np.array(
            [f"{names[d]}:{row}" for d, row in zip(cells["dataset"], cells["row"], strict=True)], object
        ),
        obs=obs,
        uns={
            "format": f"{manifests.FORMAT} {manifests.VERSION}",
            "vocabulary": plan.vocabulary.hash,
            "split": split,
        },
    )
    _read_back(path, "indices", pieces(genes), dtypes[0])
    _read_back(path, "data", pieces(counts), dtypes[1])

    columns = {"total": cells["total"], "codes/dataset": cells["dataset"]}
    for name in schema.labels:
        columns[f"codes/{name}"] = schema.label_codes(name, cells[f"obs:{name}"])
    write_index(index, columns, nnz)

    objects = manifests.hash_tree(work, path, index)
    part_id = manifests.digest(objects)
    final = {path.name: f"parts/{part_id}.zarr", index.name: f"index/{part_id}"}
    for name, place in final.items():
        (work.parent / place).parent.mkdir(exist_ok=True)
        os.rename(work / name, work.parent / place)
    placed = {}
    for name, checks in objects.items():
        head, _, rest = name.partition("/")
        placed[f"{final[head]}/{rest}"] = checks
    return {
        "id": part_id,
        "split": split,
        "n_cells": len(nnz),
        "nnz": int(indptr[-1]),
        "max_nnz": int(nnz.max()),
        "index_dtype": dtypes[0].name,
        "x_dtype": dtypes[1].name,
        "objects": placed,
    }


def _read_back(path: pathlib.Path, name: str, pieces: Iterator[np.ndarray], dtype: np.dtype) -> None:
    """What was written is what was meant: decodes every shard again."""
    array = zarr.open_array(path / "X" / name, mode="r")
    start = 0
    for piece in pieces:
        if not np.array_equal(array[start : start + len(piece)], piece.astype(dtype)):
            raise OSError(f"{path}: X/{name} reads back other values than were written: is the disk failing?")
        start += len(piece)
