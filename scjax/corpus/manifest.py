"""What a corpus says of itself: the manifest, its objects with their checksums, and the commit."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from typing import Any

import google_crc32c

from scjax.corpus.store import LocalStore, Store

FORMAT = "scjax-corpus"
VERSION = "2.0"
_ID = re.compile("[0-9a-f]{12}")


def hash_object(path: pathlib.Path) -> dict[str, Any]:
    """{"bytes", "sha256", "crc32c"} of one file."""
    sha, crc, size = hashlib.sha256(), 0, 0
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            sha.update(piece)
            crc = google_crc32c.extend(crc, piece)
            size += len(piece)
    return {"bytes": size, "sha256": sha.hexdigest(), "crc32c": f"{crc:08x}"}


def hash_bytes(content: bytes) -> dict[str, Any]:
    """As ``hash_object``, of an object that is in memory."""
    crc, sha = google_crc32c.value(content), hashlib.sha256(content)
    return {"bytes": len(content), "sha256": sha.hexdigest(), "crc32c": f"{crc:08x}"}


def digest(content: Any) -> str:
    """12 hex digits of the sha256 of bytes, or of a table that JSON can hold."""
    if not isinstance(content, bytes):
        content = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def encode(manifest: dict[str, Any]) -> tuple[str, bytes]:
    """(manifest id, the bytes of its file). The id is the start of the sha256 of the bytes."""
    content = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    return digest(content), content


def commit(root: pathlib.Path, manifest_id: str) -> None:
    """Makes a manifest the corpus's present state: HEAD changes by one atomic rename."""
    write_durably(root / "HEAD", f"{manifest_id}\n".encode(), root / "manifests" / "HEAD.partial")


def write_sources(root: pathlib.Path, manifest_id: str, record: dict[str, Any]) -> None:
    """Notes where the sources of a build or append were, and how it was called: what a repair needs.

    Args:
      root: folder of the corpus.
      manifest_id: the manifest that the build or append is about to commit.
      record: what JSON can hold; ``record["parts"]`` are the ids of the parts that it wrote.
    """
    folder = root / "sources"
    folder.mkdir(exist_ok=True)
    content = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_durably(folder / f"{manifest_id}.json", content.encode())


def write_durably(path: pathlib.Path, content: bytes, partial: pathlib.Path | None = None) -> None:
    """Writes a file that is there whole or not at all, also after a power cut.

    Args:
      path: of the file; one that is there is replaced.
      content: of it.
      partial: its name until it is whole, on the same file system; by default beside it.
    """
    partial = partial or path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(path: pathlib.Path) -> None:
    """Makes new names in a folder survive a power cut (a no-op where folders cannot be opened)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_manifest(root: pathlib.Path | Store, manifest_id: str | None = None) -> tuple[str, dict[str, Any]]:
    """Reads the manifest that HEAD names, or another one of the same corpus.

    Raises:
      FileNotFoundError: no corpus at ``root``, or no such manifest (those in a folder are listed).
      ValueError: HEAD or the manifest is damaged, or of a format version that this scjax does not know.
    """
    store: Store = LocalStore(root) if isinstance(root, pathlib.Path) else root
    folder = store.root if isinstance(store, LocalStore) else None
    asked = manifest_id
    if manifest_id is None:
        try:
            head = store.read("HEAD")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise FileNotFoundError(f"{store.where('')}: {_state(folder)}") from None
        manifest_id = head.decode(errors="replace").strip()
        if not _ID.fullmatch(manifest_id):  # perhaps it came damaged
            manifest_id = store.read("HEAD", None, True).decode(errors="replace").strip()
        if not _ID.fullmatch(manifest_id):
            raise ValueError(f"{store.where('HEAD')}: damaged: {manifest_id[:40]!r} names no manifest")
    name = f"manifests/{manifest_id}.json"
    path = store.where(name)
    try:
        content = store.read(name)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        there = [] if folder is None else sorted(p.stem for p in folder.glob("manifests/*.json"))
        known = "" if folder is None else f"; there are: {', '.join(there) or 'none'}"
        by = f" (no {name}, which {store.where('HEAD')} names)" if asked is None else ""
        raise FileNotFoundError(f"{store.where('')}: no manifest {manifest_id!r}{known}{by}") from None
    if digest(content) != manifest_id:  # perhaps only a copy is damaged
        content = store.read(name, None, True)
    if digest(content) != manifest_id:
        raise ValueError(f"{path}: damaged: its content does not have the hash that its name states")
    manifest = json.loads(content)
    version = str(manifest.get("version", ""))
    if manifest.get("format") != FORMAT or version.split(".")[0] != VERSION.split(".")[0]:
        older = manifest.get("format") == FORMAT and version.split(".")[0] < VERSION.split(".")[0]
        raise ValueError(
            f"{path}: format {manifest.get('format')!r} version {version!r}; this scjax reads {FORMAT} "
            f"{VERSION.split('.')[0]}.x: {'' if older else 'upgrade scjax or '}build the corpus again"
        )
    return manifest_id, manifest


def _state(folder: pathlib.Path | None) -> str:
    """Why there is no corpus."""
    if folder is not None and not folder.exists():
        return "no such folder"
    if folder is not None and (folder / ".build").exists():
        return "a build was interrupted here, run it again"
    return "no file HEAD, so no complete corpus"
