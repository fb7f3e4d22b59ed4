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

import scjax
from scjax.corpus import manifest as manifests
from scjax.corpus.corpus import Corpus
from scjax.corpus.format import INNER, PART_CELLS, SHARD, Layout, index_dtype
from scjax.corpus.plan import Plan, list_studies, make_plan
from scjax.corpus.progress import cell_progress
from scjax.corpus.shuffle import Spill, map_sources, reduce_buckets
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
            entries = map_sources(plan, spill, work, bar, options)
            parts = reduce_buckets(plan, spill, work, bar, layout)
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
        if (root / "HEAD").exists():  # another build ended while this one looked around
            raise FileExistsError(f"{root}: holds a corpus already; choose another folder")
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
            "shuffled": True,
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
    os.sync()  # the parts are on the disk before anything says so
    manifests.write_durably(root / "manifests" / f"{manifest_id}.json", content)
    manifests.commit(root, manifest_id)
