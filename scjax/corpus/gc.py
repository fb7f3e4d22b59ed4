"""Taking away what a corpus no longer needs: leftovers of interrupted work, and old states if asked to.

A corpus is its manifests: what none of them names is removed. Manifests that are to go are removed first and
for good before anything that only they name, so that wherever this is stopped, every manifest that is still
there is whole, and running it again finishes the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from scjax.corpus.locks import WORK, unread, writing
from scjax.corpus.manifest import read_manifest, sync_folder
from scjax.corpus.store import local_folder

# What gc looks through; whatever else lies in the folder of a corpus is not ours.
FOLDERS = ("parts", "index", "vocab", "manifests", "statistics", "sources")
_MANIFEST = re.compile(r"[0-9a-f]{12}\.json")


@dataclasses.dataclass(frozen=True)
class GcReport:
    """What ``gc_corpus`` did, or would do.

    Attributes:
      removed: names relative to the corpus, a folder's where all of it went.
      bytes: that they held together.
      kept: id of every manifest that stays -> why.
    """

    removed: list[str]
    bytes: int
    kept: dict[str, str]


def gc_corpus(
    path: str | os.PathLike[str], keep: Sequence[str] = (), drop_old: bool = False, dry_run: bool = False
) -> GcReport:
    """Removes objects that no manifest refers to and, if asked to, old manifests with what only they need.

    Leftovers of interrupted appends go in any case, also those of a job array none of whose shares is
    running now, and so do statistics of manifests that are gone. A manifest that a process on this machine
    has open stays, whatever is asked. Processes on other machines are seen where the file system shares its
    locks; elsewhere they get an error that names the file they miss.

    Args:
      path: folder of the corpus.
      keep: ids of old manifests that ``drop_old`` spares.
      drop_old: remove manifests other than the present one (HEAD).
      dry_run: remove nothing, only tell.

    Raises:
      FileExistsError: something is being written to the corpus now.
      FileNotFoundError: no corpus there, or no manifest of an id in ``keep``.
      ValueError: a manifest is damaged, so that nobody can tell what it refers to; nothing was removed.
    """
    root = local_folder(path)
    read_manifest(root)  # no corpus: say so before a folder is made in it
    look_only = dry_run and not (root / WORK / "lock").exists()
    with contextlib.nullcontext(root / WORK) if look_only else writing(root) as work:
        head, content = read_manifest(root)
        stay, go = _choose(root, head, keep, drop_old)
        gone = [*_drop_manifests(root, go, stay, dry_run)]
        manifests = {name: content if name == head else read_manifest(root, name)[1] for name in stay}
        gone += _drop_work(root, work, dry_run)
        for name, size in unreferenced(root, manifests):
            gone.append((name, size))
            if not dry_run:
                (root / name).unlink(missing_ok=True)
        if not dry_run:
            _drop_empty_folders(root)
    names = _by_folder([name for name, _ in gone], _referenced(manifests))
    return GcReport(names, sum(size for _, size in gone), stay)


def _referenced(manifests: dict[str, dict[str, Any]]) -> set[str]:
    names: set[str] = set()
    for content in manifests.values():
        names.update(content["objects"], *(part["objects"] for part in content["parts"]))
    return names


def _drop_manifests(
    root: pathlib.Path, go: list[str], stay: dict[str, str], dry_run: bool
) -> Iterator[tuple[str, int]]:
    """Removes manifests that nobody has open: (name, bytes) of each; the others are added to ``stay``."""
    for manifest_id in go:
        file = root / "manifests" / f"{manifest_id}.json"
        with unread(file) as free:
            if not free:
                stay[manifest_id] = "a reader has it open"
                continue
            size = file.stat().st_size
            if not dry_run:
                file.unlink()
        yield f"manifests/{file.name}", size
    if not dry_run:
        sync_folder(root / "manifests")  # gone for good, before the objects that only they name


def _choose(
    root: pathlib.Path, head: str, keep: Sequence[str], drop_old: bool
) -> tuple[dict[str, str], list[str]]:
    """(manifests that stay -> why, those that are to go)."""
    there = sorted(p.stem for p in (root / "manifests").iterdir() if _MANIFEST.fullmatch(p.name))
    for manifest_id in keep:
        if manifest_id not in there:
            raise FileNotFoundError(
                f"{root}: no manifest {manifest_id!r} to keep; there are: {', '.join(there)}"
            )
    stay = {head: "it is the present state (HEAD)"}
    stay |= {manifest_id: "it was asked to stay" for manifest_id in keep if manifest_id != head}
    others = [manifest_id for manifest_id in there if manifest_id not in stay]
    if drop_old:
        return stay, others
    parent = {name: read_manifest(root, name)[1].get("parent") for name in there}
    history = set(_line(head, parent))
    go = []
    for name in others:
        # A state that began from one of HEAD's, and is none of them: an append stopped just before its end.
        if name not in history and history & set(_line(name, parent)):
            go.append(name)
        else:
            stay[name] = "it is an earlier state (drop_old removes those)"
    return stay, go


def _line(manifest_id: str | None, parent: dict[str, str | None]) -> Iterator[str]:
    """A manifest, the one it came from, and so on, as far as they are there."""
    seen: set[str] = set()
    while manifest_id in parent and manifest_id not in seen:
        yield manifest_id
        seen.add(manifest_id)
        manifest_id = parent[manifest_id]


def unreferenced(root: pathlib.Path, manifests: dict[str, dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """Files in the folders of a corpus that none of its manifests needs.

    Args:
      root: folder of the corpus.
      manifests: id -> content, of every manifest that counts.

    Yields:
      (name relative to ``root``, bytes).
    """
    parts = {part["id"] for content in manifests.values() for part in content["parts"]}
    needed = _referenced(manifests)
    for file in [file for folder in FOLDERS for file in _walk(root / folder)]:
        name = file.relative_to(root).as_posix()
        folder, _, rest = name.partition("/")
        if folder == "manifests":
            wanted = _MANIFEST.fullmatch(rest) is not None
        elif folder == "statistics":
            wanted = rest.partition(".")[0] in manifests
        elif folder == "sources":  # what made a part is needed to repair it, also after its manifest is gone
            wanted = rest.endswith(".json") and (rest[:-5] in manifests or not parts.isdisjoint(_made(file)))
        else:
            wanted = name in needed
        if not wanted:
            yield name, file.lstat().st_size


def _drop_work(root: pathlib.Path, work: pathlib.Path, dry_run: bool) -> Iterator[tuple[str, int]]:
    """Removes what interrupted work left: (name, bytes) of each file.

    A plan's folder loses its name first: half of one would look to the next run like results that are there.
    """
    for path in sorted(work.iterdir()) if work.is_dir() else ():
        if path.name == "lock":
            continue
        for file in _walk(path) if path.is_dir() else (path,):
            yield file.relative_to(root).as_posix(), file.lstat().st_size
        if not dry_run:
            gone = work / f"gone-{os.urandom(6).hex()}"
            os.rename(path, gone)
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


def _made(file: pathlib.Path) -> list[str]:
    """The parts that a build wrote, as its file under ``sources`` tells."""
    try:
        return list(json.loads(file.read_bytes())["parts"])
    except (ValueError, KeyError, TypeError):  # half written: tells nothing
        return []


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files under a folder, none where it is not there. Links are files: they are not followed."""
    for where, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        for name in [*files, *links]:
            if not name.startswith(".nfs"):  # a removed file that is open on a network file system
                yield pathlib.Path(where, name)


def _drop_empty_folders(root: pathlib.Path) -> None:
    for folder in FOLDERS:
        for where, _, _ in os.walk(root / folder, topdown=False):
            if pathlib.Path(where) != root / folder and not os.listdir(where):
                os.rmdir(where)


def _by_folder(names: list[str], needed: set[str]) -> list[str]:
    """Names with whole folders (a part, its index, the work of an append) as one, sorted."""

    def folder(name: str) -> str:
        return WORK if name.startswith(f"{WORK}/") else "/".join(name.split("/")[:2])

    shared = {folder(name) for name in needed}
    return sorted({name if folder(name) in shared else folder(name) for name in names})
