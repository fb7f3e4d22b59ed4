"""Building a corpus: plan -> map -> reduce -> commit.

Plan reads the headers, matches the genes and gives every cell its place by a hash of (seed, data set, row).
Map reads each source once, in runs of rows, and appends its cells to one bucket per part. Reduce turns each
bucket into a part. Commit writes the manifest, then HEAD. A hidden folder marks the output as unfinished
until then, so a build that fails or is killed leaves nothing that looks like a corpus.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import rich.progress
import zarr
from scipy import sparse

import scjax
from scjax.corpus import manifest as manifests
from scjax.corpus.corpus import Corpus
from scjax.corpus.counts import MAX_COUNT, CountsError
from scjax.corpus.format import BLOCK, INNER, PART_CELLS, SHARD, Layout, index_dtype, write_part, x_dtype
from scjax.corpus.plan import Plan, list_studies, make_plan
from scjax.corpus.progress import cell_progress
from scjax.corpus.spill import Cells, Spill
from scjax.genes import Vocabulary

WORK = ".build"  # in the output folder while a build is under way, or after one was killed
_FOLDERS = ("parts", "index", "vocab", "manifests")
UNKNOWN = ("", "nan", "unknown", "unlabelled")


def build_corpus(
    sources: Any,
    out: str | pathlib.Path,
    *,
    vocabulary: Vocabulary | None = None,
    layer: str | Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    validation: float = 0.0,
    split_by: str | None = None,
    seed: int = 0,
    min_genes: int = 1,
    min_match: float = 0.1,
    allow_non_integer: bool = False,
    duplicates: str = "error",
    unknown: Sequence[str] = UNKNOWN,
    codec: str = "fast",
    part_cells: int = PART_CELLS,
    inner: int = INNER,
    shard: int = SHARD,
    progress: bool = True,
) -> Corpus:
    """Builds a corpus of raw counts from one or many studies.

    The same sources and options give the same bytes. Memory stays bounded: rows are read in runs, a part is
    written shard by shard; the disk needs two to three times the size of the finished corpus while building.

    Args:
      sources: path of an .h5ad file (CSR, CSC or dense), AnnData, or a list of them.
      out: new or empty folder.
      vocabulary: genes to keep; default: all genes of all sources.
      layer: where the counts are: None or "X", "raw" or the name of a layer; or data set name -> layer.
      labels: obs columns to keep as label columns; default: all categorical and text columns with at most
        4,096 values. Data sets that lack one have the code -1 there.
      names: data set names, unique; default: the file's stem.
      validation: fraction of the cells in the "validation" split, chosen by hash.
      split_by: obs column (or "dataset") whose groups go to one split as a whole: groups in the order of
        their hash until they hold ``validation`` of the cells. Cells of unknown group go to "train".
      seed: of the order of cells and of the split.
      min_genes: cells with fewer expressed genes of the vocabulary are dropped, and counted in the manifest.
      min_match: least fraction of a study's genes (or of the vocabulary, if that is smaller) that must match.
      allow_non_integer: keep fractions, as float32.
      duplicates: several columns of one study that are one gene: "error", or "sum" their counts.
      unknown: label values that mean "not known"; their code is -1. The text stays in the parts' obs.
      codec: "fast", "balanced", "small" or "local" (uncompressed).
      part_cells, inner, shard: most cells in a part, elements per inner chunk and per shard.
      progress: show a progress bar.

    Returns:
      The corpus, opened.

    Raises:
      FileExistsError: ``out`` holds something already.
      CountsError (a ValueError): a source does not hold raw counts; names file, cell, gene and value.
      ValueError, KeyError, FileNotFoundError, OSError: bad source, label or option; the message says which.
    """
    layout = Layout(codec, part_cells, inner, shard)
    if duplicates not in ("error", "sum"):
        raise ValueError(f"duplicates={duplicates!r}: there are error and sum")
    if not 0 <= validation < 1:
        raise ValueError(f"validation={validation}: a fraction of the cells, at least 0 and below 1")
    if split_by is not None and not validation:
        raise ValueError(f"split_by={split_by!r} needs validation > 0, the fraction to hold out")
    if min_genes < 1:
        raise ValueError(f"min_genes={min_genes} must be at least 1: an empty cell is nothing to learn from")
    labels = [labels] if isinstance(labels, str) else labels
    options: dict[str, Any] = {
        "min_genes": min_genes,
        "allow_non_integer": allow_non_integer,
        "duplicates": duplicates,
        "validation": validation,
        "split_by": split_by,
        "unknown": list(unknown),
    }
    studies = list_studies(sources, names, layer)
    root = pathlib.Path(out)
    with _workplace(root) as work, cell_progress(progress) as bar:
        plan = make_plan(
            studies,
            vocabulary,
            labels=labels,
            unknown=unknown,
            min_match=min_match,
            sum_duplicates=duplicates == "sum",
            allow_non_integer=allow_non_integer,
            validation=validation,
            split_by=split_by,
            seed=seed,
            part_cells=part_cells,
        )
        count_dtype = np.dtype(np.float64 if allow_non_integer else np.uint32)
        spill = Spill(work / "spill", index_dtype(len(plan.vocabulary)), count_dtype)
        with _disk(root, plan.n_stored * spill.itemsize):
            entries = _map(plan, spill, work, bar, options)
            parts = _reduce(plan, spill, work, bar, layout)
            _commit(root, plan, entries, parts, layout, seed, options)
    return Corpus.open(root)


@contextlib.contextmanager
def _workplace(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """The hidden folder to build in. Clears what a killed build left; on failure takes all back."""
    if root.exists() and not root.is_dir():
        raise FileExistsError(f"{root}: is a file; a corpus is a folder")
    new = not root.exists()
    there = [] if new else sorted(os.listdir(root))
    work = root / WORK
    if "HEAD" in there:
        head = (root / "HEAD").read_text().strip()
        raise FileExistsError(f"{root}: holds a corpus already (manifest {head}); choose another folder")
    foreign = [name for name in there if name not in (WORK, *_FOLDERS)] if WORK in there else there
    if foreign:
        raise FileExistsError(
            f"{root}: not empty (holds {', '.join(foreign[:5])}); a corpus needs a new folder"
        )
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it however the process ends
        except BlockingIOError:
            raise FileExistsError(f"{root}: another build is writing there now") from None
        try:
            for path in [root / name for name in _FOLDERS] + [p for p in work.iterdir() if p.name != "lock"]:
                if path.exists():
                    shutil.rmtree(path)
            yield work
        except BaseException:
            for name in (*_FOLDERS, WORK):
                shutil.rmtree(root / name, ignore_errors=True)
            if new:
                root.rmdir()
            raise
    shutil.rmtree(work)


@contextlib.contextmanager
def _disk(root: pathlib.Path, spill_bytes: int) -> Iterator[None]:
    """A full disk is reported with what was there and what the build needs."""
    free = shutil.disk_usage(root).free
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"the disk is full: building needs about {1.6 * spill_bytes / 2**20:,.0f} MiB under {root}, "
            f"{free / 2**20:,.0f} MiB were free at the start; nothing was kept",
        ) from error


def _map(
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
            starts = np.flatnonzero(np.r_[True, bucket[1:] != bucket[:-1]]) if len(rows) else []
            for low, high in zip(starts, [*starts[1:], len(rows)], strict=True):
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


def _reduce(
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

    (index / "codes").mkdir(parents=True)
    np.save(index / "nnz.npy", nnz)
    np.save(index / "total.npy", cells["total"])
    np.save(index / "blocks.npy", np.append(indptr[:-1:BLOCK], indptr[-1]))
    np.save(index / "codes" / "dataset.npy", cells["dataset"])
    for name in schema.labels:
        np.save(index / "codes" / f"{name}.npy", schema.label_codes(name, cells[f"obs:{name}"]))

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


def _commit(
    root: pathlib.Path,
    plan: Plan,
    datasets: list[dict[str, Any]],
    parts: list[dict[str, Any]],
    layout: Layout,
    seed: int,
    options: Mapping[str, Any],
) -> None:
    """Writes vocabulary, measured genes and manifest, then HEAD."""
    for name in ("vocab", "manifests", "index/measured"):
        (root / name).mkdir(parents=True, exist_ok=True)
    vocabulary = plan.vocabulary
    vocabulary_file = f"vocab/{vocabulary.short_hash}.tsv"
    vocabulary.to_tsv(root / vocabulary_file)
    for entry, match in zip(datasets, plan.matches, strict=True):
        measured = np.zeros(len(vocabulary), np.uint8)
        measured[match.ids[match.ids >= 0]] = 1
        packed = np.packbits(measured, bitorder="little")
        entry["measured"] = f"index/measured/{manifests.digest(packed.tobytes())}.npy"
        np.save(root / entry["measured"], packed)

    columns = {"dataset": [study.name for study in plan.studies], **plan.schema.labels}
    nnz = np.concatenate([np.load(root / "index" / part["id"] / "nnz.npy") for part in parts])
    quantiles = {
        str(q): int(np.quantile(nnz, q, method="inverted_cdf")) for q in (0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
    }
    cells = {
        split: sum(p["n_cells"] for p in parts if p["split"] == split) for split in ("train", "validation")
    }
    sizes = [check["bytes"] for part in parts for check in part["objects"].values()]
    manifest_id, content = manifests.encode(
        {
            "format": manifests.FORMAT,
            "version": manifests.VERSION,
            "scjax": scjax.__version__,
            "parent": None,
            "seed": seed,
            "options": dict(options),
            "vocabulary": {"hash": vocabulary.hash, "file": vocabulary_file, "n_genes": len(vocabulary)},
            "codec": layout.codec,
            "part_cells": layout.part_cells,
            "inner": layout.inner,
            "shard": layout.shard,
            "totals": {
                "n_cells": len(nnz),
                **cells,
                "nnz": int(nnz.sum(dtype=np.int64)),
                "bytes": sum(sizes),
            },
            "nnz_quantiles": quantiles,
            "columns": columns,
            "datasets": datasets,
            "objects": manifests.hash_tree(root, root / "vocab", root / "index" / "measured"),
            "parts": parts,
        }
    )
    manifests.write_durably(root / "manifests" / f"{manifest_id}.json", content)
    manifests.commit(root, manifest_id)
