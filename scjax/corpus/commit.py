"""The end of a build or an append: parts get their places, the manifest is written, HEAD changes last.

Every step may be done again after it was stopped anywhere, or by two at once.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import scjax
from scjax.corpus import manifest as manifests
from scjax.corpus.corpus import Corpus
from scjax.corpus.plan import Plan, Study, write_whole
from scjax.corpus.tasks import Job

QUANTILES = (1, 10, 50, 90, 99, 100)  # percent


class NothingKeptError(ValueError):
    """All cells were dropped: there is no corpus to make, and nothing to go on from."""


def finished(root: pathlib.Path, key: str) -> str | None:
    """The id of the present manifest if it is what the plan of that key has made."""
    head = root / "HEAD"
    if not head.is_file():
        return None
    manifest_id = head.read_text().strip()
    note = root / "sources" / f"{manifest_id}.json"
    if not note.is_file():
        return None
    try:
        return manifest_id if json.loads(note.read_bytes()).get("plan") == key else None
    except (ValueError, AttributeError):  # damaged: it is informative only
        return None


def record_of(arguments: Mapping[str, Any], studies: Sequence[Study], key: str) -> dict[str, Any]:
    """The note on where the sources were; see ``manifest.write_sources``."""
    sources = [
        {"name": s.name, "path": None if s.in_memory else os.path.abspath(s.data), "layer": s.layer}
        for s in studies
    ]
    return {"plan": key, "sources": sources, "arguments": dict(arguments)}


def commit(job: Job, record: dict[str, Any]) -> str:
    """Makes what the tasks have left the corpus's present state; returns the manifest's id.

    Raises:
      FileExistsError: meanwhile another state than the one that was added to has become the present one.
      ValueError: no cell was kept.
    """
    root, plan = job.root, job.plan
    parent = Corpus.open(root, plan.base.manifest_id) if plan.base else None
    _still_parent(job)
    found = [json.loads((job.path(task) / "record.json").read_bytes()) for task in job.last_tasks()]
    entries = _datasets(job)
    parts = [entry for entry in found if entry]
    if not parts:
        raise NothingKeptError(
            f"none of the cells has {plan.options.min_genes} expressed genes of the vocabulary"
            + (" and is not there already" if plan.options.drop_duplicates else "")
        )
    if sum(entry["n_cells"] for entry in entries) != sum(part["n_cells"] for part in parts):
        raise RuntimeError(
            "the cells of the parts are not those of the sources: a bug, nothing was committed"
        )

    for task, entry in zip(job.last_tasks(), found, strict=True):
        if entry:
            _move(job.path(task) / "part.zarr", root / "parts" / f"{entry['id']}.zarr")
            _move(job.path(task) / "index", root / "index" / entry["id"])
            _check_sizes(root, job.path(task), entry)
    vocabulary_file = f"vocab/{plan.vocabulary.short_hash}.tsv"
    if parent is None:
        (root / "vocab").mkdir(exist_ok=True)
        plan.vocabulary.to_tsv(job.folder / "vocabulary.tsv")
        os.replace(job.folder / "vocabulary.tsv", root / vocabulary_file)
    _measured(job, entries)
    manifest = _manifest(job, parent, vocabulary_file, entries, parts)
    manifest_id, content = manifests.encode(manifest)
    (root / "manifests").mkdir(exist_ok=True)
    os.sync()  # the parts are on the disk before anything says so
    manifests.write_durably(root / "manifests" / f"{manifest_id}.json", content)
    manifests.write_sources(root, manifest_id, record | _recipe(plan, [part["id"] for part in parts]))
    _still_parent(job)
    manifests.commit(root, manifest_id)
    return manifest_id


def _recipe(plan: Plan, parts: list[str]) -> dict[str, Any]:
    """What, with the sources, makes the same parts again, also when the parent's manifest is gone."""
    return {
        "options": dataclasses.asdict(plan.options),
        "layout": dataclasses.asdict(plan.layout),
        "base": dataclasses.asdict(plan.base) if plan.base else None,
        "parts": parts,
    }


def _still_parent(job: Job) -> None:
    base, head = job.plan.base, job.root / "HEAD"
    now = head.read_text().strip() if head.is_file() else None
    if now != (base.manifest_id if base else None):
        raise FileExistsError(
            f"{job.root}: its present state is {now}, not {base.manifest_id if base else 'empty'} as when "
            "this work began: somebody else has changed it; nothing was committed, run the command again"
        )


def _move(path: pathlib.Path, to: pathlib.Path) -> None:
    """Renames a folder, unless that was done before."""
    to.parent.mkdir(exist_ok=True)
    try:
        os.rename(path, to)
    except FileNotFoundError:
        if not to.is_dir():
            raise
    except OSError:
        if not to.is_dir():
            raise
        shutil.rmtree(path)  # the same content under the same name


def _check_sizes(root: pathlib.Path, work: pathlib.Path, entry: Mapping[str, Any]) -> None:
    """OSError where a part is not as it was written, as a power cut in an earlier run may leave it."""
    for name, expected in entry["objects"].items():
        path = root / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            shutil.rmtree(work, ignore_errors=True)  # the next run makes this part again
            shutil.rmtree(root / "parts" / f"{entry['id']}.zarr", ignore_errors=True)
            shutil.rmtree(root / "index" / entry["id"], ignore_errors=True)
            raise OSError(f"{path}: is not as it was written; the part is made again by the next run")


def _datasets(job: Job) -> list[dict[str, Any]]:
    """The manifest's entries on the new data sets, with the account of their cells."""
    plan, options = job.plan, job.plan.options
    kept = np.zeros(len(job.studies), np.int64)
    dropped: list[Counter[str]] = [Counter() for _ in job.studies]
    for number, ((study, _, _), fragment) in enumerate(zip(plan.runs, job.fragments, strict=True)):
        repeated = len(job.duplicates.get(number, ()))
        kept[study] += int(fragment.head.rows[-1]) - repeated
        dropped[study].update(fragment.head.dropped)
        dropped[study]["duplicates"] += repeated
    asked = {"below_min_counts": options.min_counts > 0, "duplicates": options.drop_duplicates}
    entries = []
    for number in range(len(job.studies)):
        entry = dict(job.facts(number).entry)
        if not entry["left_out"]:
            del entry["left_out"]
        entry["sha256"] = job.path(("hash", number)).read_text()
        entry["n_cells"] = int(kept[number])
        entry["dropped"] = {
            why: dropped[number][why]
            for why in ("empty", "below_min_genes", "below_min_counts", "duplicates")
            if asked.get(why, True)
        }
        if entry["n_cells"] + sum(entry["dropped"].values()) != entry["n_cells_in"]:
            raise RuntimeError(
                f"data set {entry['name']}: {entry['n_cells_in']} cells in, {entry['n_cells']} kept, "
                f"{entry['dropped']} dropped: a bug, nothing was committed"
            )
        entries.append(entry)
    return entries


def _measured(job: Job, entries: list[dict[str, Any]]) -> None:
    """Writes the genes that each new data set measured."""
    folder = job.root / "index" / "measured"
    folder.mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(entries):
        ids = job.facts(number).ids
        measured = np.zeros(len(job.plan.vocabulary), np.uint8)
        measured[ids[ids >= 0]] = 1
        packed = np.packbits(measured, bitorder="little")
        entry["measured"] = f"index/measured/{manifests.digest(packed.tobytes())}.npy"
        buffer = io.BytesIO()
        np.save(buffer, packed)
        if not (job.root / entry["measured"]).is_file():
            write_whole(job.root / entry["measured"], buffer.getvalue(), job.folder)


def _manifest(
    job: Job,
    parent: Corpus | None,
    vocabulary_file: str,
    entries: list[dict[str, Any]],
    parts: list[dict[str, Any]],
) -> dict[str, Any]:
    plan, layout, old = job.plan, job.plan.layout, parent.manifest if parent else {}
    options = plan.options
    head: dict[str, Any] = {
        "format": manifests.FORMAT,
        "version": manifests.VERSION,
        "scjax": scjax.__version__,
        "parent": plan.base.manifest_id if plan.base else None,
        "seed": old.get("seed", options.seed),
        "shuffled": old.get("shuffled", True) and options.shuffle,
        "options": old.get("options")
        or {
            "labels": options.labels,
            "columns": {name: list(others) for name, others in options.columns},
            "unknown": list(options.unknown),
            "min_match": options.min_match,
            "duplicates": options.duplicates,
            "allow_non_integer": options.allow_non_integer,
            "min_genes": options.min_genes,
            "min_counts": options.min_counts,
            "drop_duplicates": options.drop_duplicates,
            "validation": options.validation,
            "split_by": options.split_by,
            "shuffle": options.shuffle,
            **({"values": list(options.values)} if options.values else {}),
        },
        "vocabulary": {
            "hash": plan.vocabulary.hash,
            "file": vocabulary_file,
            "n_genes": len(plan.vocabulary),
        },
        "codec": layout.codec,
        "part_cells": layout.part_cells,
        "inner": layout.inner,
        "shard": layout.shard,
    }
    if parent is not None:
        head["vocabulary"] = old["vocabulary"]
    if plan.values:
        head["values"] = {name: panel.entry() for name, panel in plan.values.items()}
    if plan.groups:
        head["split_groups"] = plan.groups
    datasets, parts = [*old.get("datasets", ()), *entries], [*old.get("parts", ()), *parts]
    cells = {
        split: sum(p["n_cells"] for p in parts if p["split"] == split) for split in ("train", "validation")
    }
    names = [head["vocabulary"]["file"], *sorted({entry["measured"] for entry in datasets})]
    objects = {name: manifests.hash_object(job.root / name) for name in names}
    return head | {
        "totals": {
            "n_cells": sum(cells.values()),
            **cells,
            "nnz": sum(part["nnz"] for part in parts),
            "bytes": sum(check["bytes"] for part in parts for check in part["objects"].values()),
        },
        "nnz_quantiles": _quantiles(job.root, parts),
        "columns": {"dataset": [entry["name"] for entry in datasets], **plan.columns},
        "datasets": datasets,
        "objects": dict(sorted(objects.items())),
        "parts": parts,
    }


def _quantiles(root: pathlib.Path, parts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Expressed genes that a share of the cells does not exceed."""
    counts = np.zeros(max(part["max_nnz"] for part in parts) + 1, np.int64)
    for part in parts:
        counts += np.bincount(np.load(root / "index" / part["id"] / "nnz.npy"), minlength=len(counts))
    below = np.cumsum(counts)
    rank = {percent: -(-int(below[-1]) * percent // 100) for percent in QUANTILES}
    return {str(percent / 100): int(np.searchsorted(below, rank[percent])) for percent in QUANTILES}
