"""Is a corpus whole? Every object against its checksums, every count against what the format promises."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import zarr

from scjax.corpus.format import BLOCK
from scjax.corpus.manifest import hash_object
from scjax.corpus.progress import cell_progress
from scjax.corpus.reader import PartReader
from scjax.corpus.store import CorruptDataError

if TYPE_CHECKING:
    from scjax.corpus.corpus import Corpus, Part

RUN_ELEMENTS = 2**22  # stored values looked at in one go


def verify(corpus: Corpus, progress: bool) -> list[str]:
    """See ``Corpus.verify``."""
    problems = [*_objects(corpus.path, corpus.manifest["objects"])]
    problems = problems or [*_vocabulary(corpus)]
    sound = not problems
    with cell_progress(progress) as bar:
        task = bar.add_task("checking", total=len(corpus))
        for number, (part, entry) in enumerate(zip(corpus.parts, corpus.manifest["parts"], strict=True)):
            bar.update(task, description=f"checking part {number + 1} of {len(corpus.parts)}")
            found = list(_objects(corpus.path, entry["objects"]))
            if not found and sound:  # the content is worth a look only where the bytes are right
                try:
                    found = [f"part {part.id}: {what}" for what in _content(corpus, part)]
                except CorruptDataError as error:
                    found = [str(error)]
            problems += found
            bar.advance(task, part.n_cells)
    return problems or [*_datasets(corpus)]


def _objects(root: pathlib.Path, objects: dict[str, dict[str, object]]) -> Iterator[str]:
    for name, expected in objects.items():
        path = root / name
        if not path.is_file():
            yield f"{name}: missing"
        elif path.stat().st_size != expected["bytes"]:
            yield f"{name}: {path.stat().st_size} bytes, the manifest says {expected['bytes']}"
        else:
            found = hash_object(path)
            wrong = [kind for kind in ("crc32c", "sha256") if found[kind] != expected[kind]]
            if wrong:
                yield f"{name}: its content has changed ({' and '.join(wrong)} differ)"


def _vocabulary(corpus: Corpus) -> Iterator[str]:
    try:
        n_genes = len(corpus.vocabulary)
    except ValueError as error:
        yield str(error)
        return
    stated = corpus.manifest["vocabulary"]["n_genes"]
    if n_genes != stated:
        yield f"the vocabulary has {n_genes} genes, the manifest says {stated}"


def _datasets(corpus: Corpus) -> Iterator[str]:
    names = corpus.datasets
    if corpus.columns.get("dataset") != names:
        yield "the categories of the column dataset are not the names of the data sets"
        return
    cells = np.zeros(len(names), np.int64)
    for part in corpus.parts:
        cells += np.bincount(part.codes("dataset"), minlength=len(names))
    for entry, n in zip(corpus.manifest["datasets"], cells, strict=True):
        if entry["n_cells"] != n:
            yield f"data set {entry['name']}: {n} cells, the manifest says {entry['n_cells']}"


def _content(corpus: Corpus, part: Part) -> Iterator[str]:
    """What is wrong within one part whose bytes are those that were written."""
    nnz, total = part.nnz_per_cell, part.total
    indptr = np.concatenate([[0], np.cumsum(nnz, dtype=np.int64)])
    if (len(nnz), int(indptr[-1]), int(nnz.max())) != (part.n_cells, part.nnz, part.max_nnz):
        yield "index/nnz.npy does not agree with the manifest's cells, nnz and max_nnz"
        return
    lengths = {"total.npy": len(total)} | {f"codes/{c}.npy": len(part.codes(c)) for c in corpus.columns}
    wrong = [
        f"index/{name} has {n} cells, not {part.n_cells}" for name, n in lengths.items() if n != part.n_cells
    ]
    if wrong:
        yield from wrong
        return
    if not np.array_equal(part.blocks, np.append(indptr[:-1:BLOCK], indptr[-1])):
        yield "index/blocks.npy does not agree with index/nnz.npy"
    group: Any = zarr.open_group(part.path, mode="r")
    shape = [part.n_cells, len(corpus.vocabulary)]
    if list(group["X"].attrs["shape"]) != shape:
        yield f"X has shape {group['X'].attrs['shape']}, not {shape}"
    if not np.array_equal(group["X/indptr"][:], indptr):
        yield "X/indptr does not agree with index/nnz.npy"
    obs, var = ad.io.read_elem(group["obs"]), ad.io.read_elem(group["var"])
    if list(var.index) != corpus.vocabulary.ids:
        yield "var is not the vocabulary"
    if len(obs) != part.n_cells or not obs.index.is_unique:
        yield "obs does not have one row, with its own name, per cell"
    elif list(obs["scjax_dataset"].cat.codes) != list(part.codes("dataset")):
        yield "obs['scjax_dataset'] does not agree with index/codes/dataset.npy"
    for column, categories in corpus.columns.items():
        codes = part.codes(column)
        if codes.min() < -1 or codes.max() >= len(categories):
            yield f"index/codes/{column}.npy has codes outside its {len(categories)} categories"
    yield from _counts(corpus, part, indptr)


def _counts(corpus: Corpus, part: Part, indptr: np.ndarray) -> Iterator[str]:
    n_genes, measured, dataset = len(corpus.vocabulary), corpus.measured_table(), part.codes("dataset")
    reader, total = PartReader(part), part.total
    first = 0
    while first < part.n_cells:
        end = max(first + 1, int(np.searchsorted(indptr, indptr[first] + RUN_ELEMENTS, side="right")) - 1)
        low, high = int(indptr[first]), int(indptr[end])
        genes, counts = np.empty(high - low, np.int64), np.empty(high - low, np.float64)
        reader.read_spans([(low, high)], genes, counts)
        cell = np.repeat(np.arange(first, end), np.diff(indptr[first : end + 1]))
        for wrong, what in (
            (genes >= n_genes, f"a gene id beyond the vocabulary's {n_genes}"),
            (np.append(False, (np.diff(genes) <= 0) & (np.diff(cell) == 0)), "gene ids that do not rise"),
            (~(counts > 0) | ~np.isfinite(counts), "a stored count that is not above 0"),
        ):
            if wrong.any():
                yield f"cell {cell[wrong.argmax()]} has {what}"
                return
        unmeasured = ~measured[dataset[cell], genes]
        if unmeasured.any():
            yield f"cell {cell[unmeasured.argmax()]} has counts of a gene that its data set did not measure"
        sums = np.bincount(cell - first, counts, minlength=end - first)
        short = sums > total[first:end] * (1 + 1e-6)  # counts that are fractions were rounded to float32
        if short.any():
            yield f"cell {first + short.argmax()} has more counts than index/total.npy says"
        first = end
