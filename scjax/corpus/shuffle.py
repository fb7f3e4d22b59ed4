"""The second half of a build: the cells of one part are collected from all fragments and written.

Fragments are sorted as the part will be, so the cells of a shard lie in one stretch of each: memory is
bounded by a shard, not by a part, and no file is mapped.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import zarr

from scjax.corpus import manifest as manifests
from scjax.corpus.format import index_dtype, x_dtype
from scjax.corpus.fragments import Cells, Fragment
from scjax.corpus.frames import add_group, new_part, one_blosc_thread, write_frames
from scjax.corpus.index import write_index
from scjax.corpus.plan import Plan
from scjax.corpus.shards import ShardWriter
from scjax.corpus.values import BITS


@dataclasses.dataclass(frozen=True)
class _Row:
    """Where each cell of a part is, in the part's order.

    Attributes:
      fragment: position in the list of fragments.
      start: element in that fragment at which it begins.
      length: its stored values.
      place: how many cells come before it in that fragment.
    """

    fragment: np.ndarray
    start: np.ndarray
    length: np.ndarray
    place: np.ndarray

    def of_width(self, width: int, at: slice) -> _Row:
        """Where some of them are in a table with that many elements for each cell."""
        place = self.place[at]
        return _Row(self.fragment[at], place * width, np.full(len(place), width, np.int64), place)


def write_part(
    folder: pathlib.Path,
    plan: Plan,
    part: int,
    fragments: Sequence[Fragment],
    duplicates: Mapping[int, np.ndarray],
    advance: Callable[[int], None],
) -> None:
    """Writes a part into ``folder``: ``part.zarr``, ``index`` and ``record.json``, the manifest's entry.

    Args:
      part: its position in ``plan.places.splits``.
      fragments: of all runs, in order.
      duplicates: position of a fragment -> its rows that are to be left out.
      advance: told how many cells were written since it was last told.

    Raises:
      OSError: the disk is full or failing, a fragment is damaged.
    """
    cells, rows = _collect(part, fragments, duplicates)
    if not len(rows.length):  # all of its cells were dropped
        (folder / "record.json").write_text("{}\n")
        return
    schema, names = plan.schema, [study.name for study in plan.studies]
    whole = bool(cells["whole"].all())
    dtypes = index_dtype(len(plan.vocabulary)), x_dtype(cells["largest"].max(), whole)
    indptr = np.concatenate([[0], np.cumsum(rows.length)])
    split = plan.places.splits[part]

    path, index = folder / "part.zarr", folder / "index"
    group = new_part(path)
    with one_blosc_thread():
        objects = _write_counts(group, plan, rows, indptr, cells, dtypes, fragments, advance)
        objects |= _write_values(group, plan, rows, cells, fragments)
    obs: dict[str, Any] = {
        name: (cells[f"obs:{name}"], schema.categories[name]) if kind == "category" else cells[f"obs:{name}"]
        for name, kind in schema.kinds.items()
    }
    obs["scjax_dataset"] = cells["dataset"], names
    obs["scjax_source_row"] = cells["row"]
    obs["scjax_cell_id"] = cells["name"]
    write_frames(
        group,
        path,
        vocabulary=plan.vocabulary,
        obs_index=np.array(
            [
                f"{names[d]}:{row}"
                for d, row in zip(cells["dataset"].tolist(), cells["row"].tolist(), strict=True)
            ],
            object,
        ),
        obs=obs,
        uns={
            "format": f"{manifests.FORMAT} {manifests.VERSION}",
            "vocabulary": plan.vocabulary.hash,
            "split": split,
        },
        features={name: panel.features for name, panel in plan.values.items() if panel.named},
    )
    columns = {"total": cells["total"], "codes/dataset": cells["dataset"] + plan.first_dataset}
    columns |= {
        f"codes/{name}": schema.label_codes(name, cells[f"obs:{name}"], plan.columns[name])
        for name in schema.labels
    }
    columns |= {
        f"values/{name}": cells[f"value:{name}"] for name, panel in plan.values.items() if panel.column
    }
    if plan.options.drop_duplicates:
        columns["content"] = cells["content"]
    write_index(index, columns, rows.length.astype(np.uint32))

    shards = {f"part.zarr/{name}": checks for name, checks in objects.items()}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if name not in shards:
            shards[name] = manifests.hash_object(file)
    shards = dict(sorted(shards.items()))
    part_id = manifests.digest(shards)
    final = {"part.zarr": f"parts/{part_id}.zarr", "index": f"index/{part_id}"}
    record = {
        "id": part_id,
        "split": split,
        "n_cells": len(rows.length),
        "nnz": int(indptr[-1]),
        "max_nnz": int(rows.length.max()),
        "index_dtype": dtypes[0].name,
        "x_dtype": dtypes[1].name,
        "objects": {
            f"{final[head]}/{rest}": shards[f"{head}/{rest}"]
            for head, _, rest in (name.partition("/") for name in shards)
        },
    }
    (folder / "record.json").write_text(json.dumps(record) + "\n")


def _collect(
    part: int, fragments: Sequence[Fragment], duplicates: Mapping[int, np.ndarray]
) -> tuple[Cells, _Row]:
    """The columns of a part's cells, and where their counts are, in the part's order."""
    found: list[Cells] = []
    for number, fragment in enumerate(fragments):
        cells = fragment.cells(part)
        if cells is None:
            continue
        nnz = cells["nnz"].astype(np.int64)
        cells["start"] = int(fragment.head.elements[part]) + np.cumsum(nnz) - nnz
        cells["fragment"] = np.full(len(nnz), number, np.int32)
        first = int(fragment.head.rows[part])
        cells["place"] = first + np.arange(len(nnz))
        if number in duplicates:
            stay = np.ones(len(nnz), bool)
            gone = duplicates[number] - first
            stay[gone[(gone >= 0) & (gone < len(nnz))]] = False
            cells = {name: values[stay] for name, values in cells.items()}
        found.append(cells)
    if not found:
        none = np.zeros(0, np.int64)
        return {}, _Row(none, none, none, none)
    cells = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
    order = np.lexsort((cells["row"], cells["dataset"], cells["key"]))
    cells = {name: values[order] for name, values in cells.items()}
    where = cells.pop("fragment"), cells.pop("start"), cells["nnz"].astype(np.int64), cells.pop("place")
    return cells, _Row(*where)


def _write_counts(
    group: zarr.Group,
    plan: Plan,
    rows: _Row,
    indptr: np.ndarray,
    cells: Cells,
    dtypes: tuple[np.dtype, np.dtype],
    fragments: Sequence[Fragment],
    advance: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """Writes X; returns the checksums of its shards."""
    layout, nnz = plan.layout, int(indptr[-1])
    x = add_group(group, "X", "csr_matrix", shape=[len(rows.length), len(plan.vocabulary)])
    pointers = ShardWriter(x, "indptr", np.dtype(np.int64), len(indptr), layout)
    for low in range(0, len(indptr), layout.shard):
        pointers.write(indptr[low : low + layout.shard])
    writers = [
        ShardWriter(x, name, dtype, nnz, layout)
        for name, dtype in zip(("indices", "data"), dtypes, strict=True)
    ]
    collectors = [
        _Collector("genes", [dtypes[0]] * len(fragments), dtypes[0], fragments),
        _Collector("counts", [fragment.head.dtype for fragment in fragments], dtypes[1], fragments),
    ]
    done = 0
    for low in range(0, nnz, layout.shard):
        high = min(low + layout.shard, nnz)
        first, last = (int(v) for v in np.searchsorted(indptr, [low, high - 1], side="right") - 1)
        at = slice(first, last + 1)
        some = _Row(rows.fragment[at], rows.start[at], rows.length[at], rows.place[at])
        skip = low - int(indptr[first])
        for collector, writer in zip(collectors, writers, strict=True):
            values = collector.collect(some, cells[f"check:{collector.name}"][at])
            writer.write(values[skip : skip + high - low])
        advance(last + (high == nnz) - done)
        done = last
    return {name: checks for writer in (pointers, *writers) for name, checks in writer.objects.items()}


def _write_values(
    group: zarr.Group, plan: Plan, rows: _Row, cells: Cells, fragments: Sequence[Fragment]
) -> dict[str, dict[str, Any]]:
    """Writes obsm; returns the checksums of its shards."""
    obsm, n = add_group(group, "obsm", "dict"), len(rows.length)
    objects: dict[str, dict[str, Any]] = {}
    for turn, (name, panel) in enumerate(plan.values.items()):
        if panel.column:
            continue
        width, part = len(panel.features), f"values-{turn}"
        writer = ShardWriter(obsm, name, np.dtype(np.float32), n, plan.layout, width)
        collector = _Collector(part, [BITS] * len(fragments), BITS, fragments)
        step = writer.shard // width
        for low in range(0, n, step):
            at = slice(low, low + step)
            found = collector.collect(rows.of_width(width, at), cells[f"check:{part}"][at])
            writer.write(found.view(np.float32))
        objects |= writer.objects
    return objects


class _Collector:
    """Rows out of many fragments, one after the other, in buffers that are reused."""

    def __init__(
        self, name: str, stored: Sequence[np.dtype], dtype: np.dtype, fragments: Sequence[Fragment]
    ) -> None:
        self.name, self._stored, self._fragments = name, stored, fragments
        self._staged = np.empty(0, np.uint8)
        self._out = np.empty(0, dtype)

    def collect(self, rows: _Row, expected: np.ndarray) -> np.ndarray:
        """The stored values of these rows; valid until the next call.

        Raises:
          OSError: a row does not have the check sum that it was written with.
        """
        from scjax.corpus.kernels import gather  # here, because numba takes a while to import

        used, which = np.unique(rows.fragment, return_inverse=True)
        low = np.full(len(used), np.iinfo(np.int64).max)
        high = np.zeros(len(used), np.int64)
        np.minimum.at(low, which, rows.start)
        np.maximum.at(high, which, rows.start + rows.length)
        itemsize = np.array([self._stored[number].itemsize for number in used])
        room = -(-(high - low) * itemsize // 8) * 8  # every stretch begins where its type may
        begin = np.cumsum(room) - room
        self._staged = _grown(self._staged, int(room.sum()))
        for number, at, first, last in zip(used.tolist(), begin.tolist(), low, high, strict=True):
            dtype = self._stored[number]
            out = self._staged[at : at + (last - first) * dtype.itemsize].view(dtype)
            self._fragments[number].read(self.name, int(first), out)

        ends = np.cumsum(rows.length)
        self._out = _grown(self._out, int(ends[-1]))
        address = self._staged.ctypes.data + begin[which] + (rows.start - low[which]) * itemsize[which]
        check = np.empty(len(ends), np.uint64)
        kinds = np.array([self._stored[number].char for number in used])[which]
        for kind in np.unique(kinds):
            some = np.flatnonzero(kinds == kind) if (kinds != kind).any() else slice(None)
            sums = np.empty(len(ends[some]), np.uint64)
            gather(
                address[some].astype(np.uint64),
                rows.length[some],
                (ends - rows.length)[some],
                np.empty(0, kind),
                self._out,
                sums,
            )
            check[some] = sums
        if not np.array_equal(check, expected):
            wrong = self._fragments[int(rows.fragment[(check != expected).argmax()])].folder
            raise OSError(f"{wrong}: {self.name} have changed since they were written; remove it and go on")
        return self._out[: int(ends[-1])]


def _grown(buffer: np.ndarray, size: int) -> np.ndarray:
    return buffer if len(buffer) >= size else np.empty(size + size // 16, buffer.dtype)
