"""Is a corpus whole? Every object against its checksums, every count against what the format promises."""

from __future__ import annotations

import hashlib
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from scjax.corpus.gc import unreferenced
from scjax.corpus.manifest import read_manifest
from scjax.corpus.progress import cell_progress, counted
from scjax.corpus.store import CorruptDataError, Store

if TYPE_CHECKING:
    from scjax.corpus.corpus import Corpus, Part
    from scjax.corpus.invariants import Promises

_PIECE = 2**22  # bytes read in one go
_memory = threading.local()


class Findings(list[str]):
    """What is wrong with a corpus, one line each.

    Attributes:
      notes: what is worth knowing and not wrong: leftovers that ``gc`` would remove.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []


def verify(corpus: Corpus, progress: bool, workers: int | None = None) -> Findings:
    """See ``Corpus.verify``. Reading, hashing and decoding release the GIL: threads use all cores.

    Args:
      corpus: local or remote.
      progress: show a progress bar.
      workers: parts that are checked side by side; by default as many as there are cores, at most 8.
    """
    from scjax.corpus.invariants import Promises  # here, because numba takes a while to import

    findings = Findings()
    findings += damaged(corpus.store, corpus.manifest["objects"]).values()
    findings += [] if findings else _totals(corpus)
    promises = None if findings else Promises.of(corpus)
    workers = workers or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    cells = np.zeros(len(corpus.datasets), np.int64)
    with cell_progress(progress) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task(f"checking {counted(len(corpus.parts), 'part')}", total=len(corpus))
        jobs = [pool.submit(_part, part, promises, lambda n: bar.advance(task, n)) for part in corpus.parts]
        try:
            for part, job in zip(corpus.parts, jobs, strict=True):
                found = job.result()
                findings += found
                if not findings:
                    cells += np.bincount(part.codes("dataset"), minlength=len(cells))
        finally:
            pool.shutdown(cancel_futures=True)
    if not findings:
        findings += [
            f"data set {entry['name']}: {n} cells, the manifest says {entry['n_cells']}"
            for entry, n in zip(corpus.manifest["datasets"], cells, strict=True)
            if entry["n_cells"] != n
        ]
    if isinstance(corpus.path, pathlib.Path):
        _surroundings(corpus.path, findings)
    return findings


def damaged(store: Store, objects: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Objects that are not those of the manifest: name -> what is wrong with it."""
    found = {}
    for name, expected in objects.items():
        wrong = _compare(store, name, expected)
        if wrong:
            found[name] = f"{name}: {wrong}"
    return found


def _compare(store: Store, name: str, expected: Mapping[str, Any]) -> str:
    try:
        file = store.open(name)
    except FileNotFoundError:
        return "missing"
    if file.size != expected["bytes"]:
        return f"{file.size} bytes, the manifest says {expected['bytes']}"
    if not hasattr(_memory, "piece"):
        _memory.piece = np.empty(_PIECE, np.uint8)
    sha, crc, at = hashlib.sha256(), 0, 0
    while at < file.size:
        piece = _memory.piece[: min(_PIECE, file.size - at)]
        got = file.readinto(at, piece)
        if got < len(piece):
            return f"ends after {at + got} of its {file.size} bytes"
        sha.update(piece)
        crc = google_crc32c.extend(crc, piece)
        at += got
    found = {"crc32c": f"{crc:08x}", "sha256": sha.hexdigest()}
    wrong = [kind for kind in found if found[kind] != expected[kind]]
    return f"its content has changed ({' and '.join(wrong)} differ)" if wrong else ""


def _part(part: Part, promises: Promises | None, advance: Any) -> list[str]:
    """Everything about one part. ``promises`` is None where the corpus itself is damaged."""
    from scjax.corpus.invariants import check_part

    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        advance(n)

    found = [*damaged(part.store, part.objects).values()]
    if not found and promises is not None:  # the content is worth a look only where the bytes are right
        try:
            found = [f"part {part.id}: {what}" for what in check_part(part, promises, count)]
        except CorruptDataError as error:
            found = [str(error)]
    advance(part.n_cells - done)
    return found


def _totals(corpus: Corpus) -> Iterator[str]:
    """What the manifest says twice, and the vocabulary."""
    manifest = corpus.manifest
    try:
        n_genes = len(corpus.vocabulary)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    if n_genes != manifest["vocabulary"]["n_genes"]:
        yield f"the vocabulary has {n_genes} genes, the manifest says {manifest['vocabulary']['n_genes']}"
    if corpus.columns.get("dataset") != corpus.datasets:
        yield "the categories of the column dataset are not the names of the data sets"
    of_parts = {"n_cells": len(corpus), "nnz": sum(part.nnz for part in corpus.parts)}
    for split in ("train", "validation"):
        of_parts[split] = sum(part.n_cells for part in corpus.split(split))
    for name, n in of_parts.items():
        if manifest["totals"][name] != n:
            yield f"the parts add up to {n} ({name}), the manifest's total is {manifest['totals'][name]}"


def _surroundings(root: pathlib.Path, findings: Findings) -> None:
    """The other manifests, and what none of them needs."""
    manifests = {}
    for path in sorted((root / "manifests").glob("*.json")):
        try:
            manifests[path.stem] = read_manifest(root, path.stem)[1]
        except (ValueError, OSError) as error:
            findings.append(str(error))
    if findings:  # whatever a damaged manifest refers to is no leftover
        return
    left = list(unreferenced(root, manifests))
    if left:
        shown = ", ".join(name for name, _ in left[:3]) + (", ..." if len(left) > 3 else "")
        findings.notes.append(
            f"no manifest needs {len(left):,} files of {sum(size for _, size in left) / 2**20:,.1f} MiB "
            f"({shown}); gc removes them"
        )
