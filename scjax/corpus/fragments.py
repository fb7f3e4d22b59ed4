"""Fragments: what a map task makes of a run of rows, sorted so that every part has its cells in one stretch.

A fragment is a folder: ``genes`` and ``counts`` hold the cells one after the other, sorted by (part, key,
row), ``values-<n>`` their rows of the n-th value; ``cells`` the columns of its cells, pickled part by part;
``head.pkl`` says where each part's stretch begins. It gets its name when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import pickle
import shutil
import uuid
from collections.abc import Callable, Iterator

import numpy as np

from scjax.corpus.counts import MAX_COUNT, CountsError
from scjax.corpus.format import index_dtype
from scjax.corpus.plan import Facts, Plan
from scjax.corpus.sources import Source
from scjax.corpus.values import BITS, read_panel

Cells = dict[str, np.ndarray]  # per-cell columns
_COPY = 2**20  # elements put in order at a time


@dataclasses.dataclass(frozen=True)
class Head:
    """What a fragment says of itself.

    Attributes:
      dtype: of the counts.
      rows, elements, cells: int64 [parts + 1], where each part's stretch begins, in rows, stored values and
        bytes of ``cells``.
      dropped: why -> how many cells of the run are not in it.
    """

    dtype: np.dtype
    rows: np.ndarray
    elements: np.ndarray
    cells: np.ndarray
    dropped: dict[str, int]


@contextlib.contextmanager
def whole_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder that has the name ``path`` once the block ended well, and is gone if it did not.

    Of two that make the same at once the first wins; the other's, which holds the same, is dropped.
    """
    partial = path.with_name(f"tmp-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            os.rename(partial, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_fragment(
    folder: pathlib.Path,
    plan: Plan,
    facts: Facts,
    source: Source,
    run: tuple[int, int, int],
    scratch: pathlib.Path,
    advance: Callable[[int], None],
) -> None:
    """Reads a run of rows of a source and leaves them as a fragment in ``folder``.

    Args:
      run: number of the source, first row, last row.
      scratch: folder for temporary files.
      advance: told how many cells were read since it was last told.
    """
    number, first, last = run
    pieces, cells = _read(plan, facts, source, run, scratch, advance)
    options = plan.options
    empty = cells["total"] == 0
    few = ~empty & (cells["nnz"] < options.min_genes)
    poor = ~empty & ~few & (cells["total"] < options.min_counts)
    dropped = {
        "empty": int(empty.sum()),
        "below_min_genes": int(few.sum()),
        "below_min_counts": int(poor.sum()),
    }
    kept = np.flatnonzero(~(empty | few | poor))
    key = plan.places.keys(number, first, last)
    held = plan.places.held(number, first, last, facts.held)
    part = plan.places.parts(key, held)
    if plan.only is not None:
        kept = kept[np.isin(part[kept], plan.only)]
    order = kept[np.lexsort((key[kept], part[kept]))]

    cells = {name: values[order] for name, values in cells.items()}
    cells["dataset"] = np.full(len(order), number, np.int32)
    cells["key"], cells["row"] = key[order], order + first
    obs = source.obs.iloc[first:last]
    cells["name"] = obs.index.astype(str).to_numpy(object)[order]
    for name, values in plan.schema.encode(obs).items():
        cells[f"obs:{name}"] = values[order]

    for turn, (name, panel) in enumerate(plan.values.items()):
        table = read_panel(source, facts.values.get(name), panel, first, last)
        if panel.column:
            cells[f"value:{name}"] = table[order]
        else:
            address = (table.ctypes.data + order * (table.itemsize * table.shape[1])).astype(np.uint64)
            width = np.full(len(order), table.shape[1], np.int64)
            check = _write(folder / f"values-{turn}", address, width, table.view(BITS), BITS)
            cells[f"check:values-{turn}"] = check

    n_parts = len(plan.places.splits)
    rows = np.searchsorted(part[order], np.arange(n_parts + 1))
    starts = np.concatenate([[0], np.cumsum(cells["nnz"], dtype=np.int64)])
    dtype = _count_dtype(cells)
    for name, which, to in (("genes", 0, pieces[0][0].dtype), ("counts", 1, dtype)):
        address = cells.pop(f"{name}_at")
        cells[f"check:{name}"] = _write(folder / name, address, cells["nnz"], pieces[0][which], to)
    places = [0]
    with open(folder / "cells", "wb") as file:
        for low, high in zip(rows[:-1], rows[1:], strict=True):
            if high > low:
                stretch = {name: values[low:high] for name, values in cells.items()}
                pickle.dump(stretch, file, protocol=5)
            places.append(file.tell())
    if options.drop_duplicates:
        np.save(folder / "content.npy", cells["content"])
        np.save(folder / "row.npy", cells["row"])
    head = Head(dtype, rows, starts[rows], np.array(places), dropped)
    (folder / "head.pkl").write_bytes(pickle.dumps(head, protocol=5))


def _read(
    plan: Plan,
    facts: Facts,
    source: Source,
    run: tuple[int, int, int],
    scratch: pathlib.Path,
    advance: Callable[[int], None],
) -> tuple[list[tuple[np.ndarray, np.ndarray]], Cells]:
    """The genes and counts of a run in pieces, and columns of its cells, among them where each begins."""
    from scjax.corpus.kernels import content_hash, relabel  # here, because numba takes a while to import

    options, n_genes = plan.options, len(plan.vocabulary)
    gene_dtype = index_dtype(n_genes)
    count_dtype = np.dtype(np.float64 if options.allow_non_integer else np.uint32)
    ordered = bool((np.diff(facts.ids[facts.ids >= 0]) > 0).all())
    dense, seen = np.zeros(n_genes), np.zeros(n_genes // 64 + 1, np.uint64)
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    columns: list[Cells] = []
    for first, x in source.counts(
        run[1], run[2], allow_non_integer=options.allow_non_integer, scratch=scratch
    ):
        n = x.shape[0]
        genes, counts = np.empty(x.nnz, gene_dtype), np.empty(x.nnz, count_dtype)
        cells: Cells = {
            "nnz": np.empty(n, np.uint32),
            "total": np.empty(n),
            "largest": np.empty(n),
            "whole": np.empty(n, bool),
        }
        wrong = relabel(
            *(x.indptr, x.indices, x.data, facts.ids, ordered, MAX_COUNT + 1.0, options.allow_non_integer),
            *(genes, counts, *cells.values(), dense, seen),
        )
        if wrong >= 0:
            raise CountsError(
                f"{source.where}: row {first + wrong}: columns of one gene add up to more than {MAX_COUNT}"
            )
        if options.drop_duplicates:
            cells["content"] = np.empty((n, 2), np.uint64)
            content_hash(genes, counts, cells["nnz"], cells["content"])
        starts = np.cumsum(cells["nnz"], dtype=np.int64) - cells["nnz"]
        cells["genes_at"] = (genes.ctypes.data + starts * genes.itemsize).astype(np.uint64)
        cells["counts_at"] = (counts.ctypes.data + starts * counts.itemsize).astype(np.uint64)
        pieces.append((genes, counts))
        columns.append(cells)
        advance(n)
    return pieces, {name: np.concatenate([cells[name] for cells in columns]) for name in columns[0]}


def _count_dtype(cells: Cells) -> np.dtype:
    """The smallest type that holds the counts of all these cells."""
    if not cells["whole"].all():
        return np.dtype(np.float64)
    largest = cells["largest"].max() if len(cells["largest"]) else 0
    return np.dtype(np.uint8 if largest < 2**8 else np.uint16 if largest < 2**16 else np.uint32)


def _write(
    path: pathlib.Path, address: np.ndarray, length: np.ndarray, like: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Copies rows from memory to a file in their new order; returns their check sums."""
    from scjax.corpus.kernels import gather  # here, because numba takes a while to import

    check = np.empty(len(length), np.uint64)
    length = length.astype(np.int64)
    ends = np.cumsum(length)
    buffer = np.empty(0, dtype)
    first = 0
    with open(path, "wb") as file:
        while first < len(length):
            begin = ends[first] - length[first]
            last = max(first + 1, int(np.searchsorted(ends, begin + _COPY, side="right")))
            size = int(ends[last - 1] - begin)
            if len(buffer) < size:
                buffer = np.empty(max(size, min(_COPY, int(ends[-1]))), dtype)
            at = slice(first, last)
            to = ends[at] - length[at] - begin
            gather(address[at], length[at], to, like[:0], buffer, check[at])
            file.write(buffer[:size].data)
            first = last
    return check


class Fragment:
    """Reads a fragment."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.head: Head = pickle.loads((folder / "head.pkl").read_bytes())

    def cells(self, part: int) -> Cells | None:
        """The columns of the cells that go to a part; None if there are none."""
        low, high = (int(v) for v in self.head.cells[part : part + 2])
        if low == high:
            return None
        with open(self.folder / "cells", "rb") as file:
            file.seek(low)
            return pickle.loads(file.read(high - low))

    def read(self, name: str, low: int, out: np.ndarray) -> None:
        """Fills ``out`` with stored values of "genes", "counts" or "values-<n>" from element ``low`` on."""
        raw = out.view(np.uint8)
        done = 0
        file = os.open(self.folder / name, os.O_RDONLY)
        try:
            while done < raw.size:
                n = os.preadv(file, [raw[done:].data], low * out.itemsize + done)
                if n == 0:
                    raise OSError(f"{self.folder / name}: cut short; remove {self.folder} and go on")
                done += n
        finally:
            os.close(file)
