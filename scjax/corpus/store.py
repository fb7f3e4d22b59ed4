"""Where the objects of a corpus are, behind one small door: a folder, or an object store.

Everything that reads a corpus asks a store for objects by their names. A store delivers what is there or
says clearly why not; whether it is what the manifest tells of is for the reader to check, who may then ask
for it once more "again", past any copy that a store keeps.
"""

from __future__ import annotations

import collections
import os
import pathlib
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import google_crc32c
import numpy as np

if TYPE_CHECKING:
    from scjax.corpus.corpus import Part
    from scjax.corpus.remote import Patience

T = TypeVar("T")
R = TypeVar("R")
Expected = Mapping[str, Any] | None  # the manifest's entry on an object: "bytes", "crc32c", "sha256"


OPEN_SHARDS = 256  # a corpus of 100 million cells has 12 thousand shard files, more than may be open at once


class CorruptDataError(OSError):
    """Stored data are damaged, cut short or missing. The message names what and where."""


class StoreError(OSError):
    """An object store does not deliver. The message names the object and what happened last."""


class StoredFile(Protocol):
    """An object that is open for reading; may be used by several threads at once."""

    @property
    def size(self) -> int: ...

    def readinto(self, offset: int, out: np.ndarray, again: bool = False) -> int:
        """Fills ``out`` (uint8) from ``offset``; returns the bytes read, fewer only at the object's end.

        ``again`` is for bytes that came and were wrong: it passes by, and replaces, what was kept of them.
        """
        ...


class Store(Protocol):
    """Reads the objects under one root; names are relative to it, with "/"."""

    @property
    def remote(self) -> bool:
        """Whether a read waits for a network, so that many at a time are worth it."""
        ...

    @property
    def kept(self) -> pathlib.Path | None:
        """The folder where what was found out about the corpus may be left, if there is one."""
        ...

    def read(self, name: str, expected: Expected = None, again: bool = False) -> bytes:
        """The whole of a small object. Raises FileNotFoundError where there is none."""
        ...

    def open(self, name: str, expected: Expected = None) -> StoredFile:
        """Opens an object for ranged reads. Raises FileNotFoundError where there is none.

        With ``expected`` it may come from a copy, and a missing object may be noticed at its first read;
        without, it is what the origin has now.
        """
        ...

    def exists(self, name: str) -> bool: ...

    def where(self, name: str) -> str:
        """The full name of an object, for messages."""
        ...

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """``function`` of every item, side by side where reads wait; within it, ``map`` goes one by one."""
        ...


class LocalFile:
    """A file of the file system; closed when the last user lets go of it."""

    def __init__(self, path: pathlib.Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self.fd).atexit = False
        self.size = os.fstat(self.fd).st_size

    def readinto(self, offset: int, out: np.ndarray, again: bool = False) -> int:
        return pread(self.fd, offset, out)


def pread(fd: int, offset: int, out: np.ndarray) -> int:
    """As ``StoredFile.readinto``, of an open file."""
    done = 0
    while done < out.size:
        n = os.preadv(fd, [out[done:].data], offset + done)
        if n == 0:
            break
        done += n
    return done


class LocalStore:
    """The objects of a corpus in a folder.

    Attributes:
      root: the folder.
      held: kept alive along with the store: the lock that tells ``gc`` of readers.
    """

    remote = False

    def __init__(self, root: pathlib.Path) -> None:
        self.root = self.kept = root
        self.held: Any = None

    def read(self, name: str, expected: Expected = None, again: bool = False) -> bytes:
        return (self.root / name).read_bytes()

    def open(self, name: str, expected: Expected = None) -> LocalFile:
        return LocalFile(self.root / name)

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def where(self, name: str) -> str:
        # asked for at every read: joining paths takes longer than a read
        return f"{self.root}/{name}" if name else str(self.root)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return [function(item) for item in items]


class _Held:
    """What a ``ShardCache`` holds, once somebody has opened it."""

    def __init__(self) -> None:
        self.lock, self.value = threading.Lock(), None


class ShardCache:
    """The objects that are open, at most ``limit``, the least recently used closed first."""

    def __init__(self, limit: int = OPEN_SHARDS):
        self._limit = limit
        self._held: collections.OrderedDict[str, _Held] = collections.OrderedDict()
        self._lock = threading.Lock()

    def file(self, part: Part, name: str) -> StoredFile:
        """An object of a part's store, opened."""
        return self.get(part.store.where(name), lambda: part.store.open(name, part.objects.get(name)))

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """What is held under a key, or else what ``make`` makes; other keys do not wait for that."""
        with self._lock:
            held = self._held.get(key)
            if held is None:
                held = self._held[key] = _Held()
                if len(self._held) > self._limit:
                    self._held.popitem(last=False)
            else:
                self._held.move_to_end(key)
        if held.value is None:
            with held.lock:
                if held.value is None:
                    held.value = make()
        return held.value

    def close(self) -> None:
        with self._lock:
            self._held.clear()


def is_url(path: Any) -> bool:
    """Whether a path is the URL of an object store."""
    return isinstance(path, str) and "://" in path


def local_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a corpus that is to be written to. Raises ValueError for a URL."""
    if is_url(path):
        raise ValueError(
            f"{path}: a corpus is built, added to, repaired and tidied in a folder; copy the folder to the "
            "object store afterwards"
        )
    return pathlib.Path(path)


def open_store(
    path: str | os.PathLike[str],
    cache: str | os.PathLike[str] | bool | None = None,
    cache_bytes: int | None = None,
    patience: Patience | None = None,
) -> Store:
    """The store at a path or URL.

    Args:
      path: a folder, or a URL: s3://, gs://, az://, http://, https:// or file://.
      cache: for a URL, the folder that keeps what was read, shared by all corpora and processes. By default
        ``$SCJAX_CACHE``, or ``~/.cache/scjax``; False keeps nothing.
      cache_bytes: about how much the folder may hold; by default as much as the disk has room for.
      patience: with a remote store.

    Raises:
      ImportError: a URL, and obstore is not installed.
      ValueError: a URL that no store is known for, or settings that do not make one.
    """
    if not is_url(path):
        return LocalStore(pathlib.Path(path))
    url = str(path)
    if url.startswith("file://"):
        return LocalStore(pathlib.Path(url.removeprefix("file://")))
    from scjax.corpus.remote import RemoteStore

    origin = RemoteStore(url, patience)
    if cache is False:
        return origin
    from scjax.corpus.cache import CachedStore

    if cache is None or cache is True:
        cache = os.environ.get("SCJAX_CACHE") or pathlib.Path.home() / ".cache" / "scjax"
    return CachedStore(origin, pathlib.Path(cache), cache_bytes)


def read_checked(store: Store, name: str, objects: Mapping[str, Mapping[str, Any]], what: str) -> bytes:
    """The whole of a small object, if it is the one that the manifest tells of.

    Args:
      store: where it is.
      name: of the object.
      objects: the manifest's entries on objects: name -> {"bytes", "crc32c", ...}.
      what: what the object belongs to, for the message.

    Raises:
      CorruptDataError: missing, of another size or with another checksum; names the object.
      StoreError: it cannot be had now.
    """
    if name not in objects:
        raise CorruptDataError(f"{what}: the manifest tells of no {name}; it cannot be checked")
    wrong = ""
    for again in (False, True):
        try:
            content = store.read(name, objects[name], again)
        except FileNotFoundError:
            raise CorruptDataError(missing(what, store.where(name))) from None
        wrong = differs(content, objects[name])
        if not wrong:
            return content
    raise CorruptDataError(f"{what}: {store.where(name)} {wrong}")


def differs(content: bytes, expected: Mapping[str, Any]) -> str:
    """What sets the content of an object apart from what the manifest tells of; "" if nothing does."""
    if len(content) != expected["bytes"]:
        return f"has {len(content)} bytes, the manifest says {expected['bytes']}"
    if f"{google_crc32c.value(content):08x}" != expected["crc32c"]:
        return "does not have the checksum that the manifest states, it has changed"
    return ""


def missing(what: str, where: str) -> str:
    """The message on an object that the manifest tells of and that is not there."""
    return (
        f"{what}: the file {where} is missing: deleted, or removed by gc since this corpus was opened "
        "(open it again to read its present state)"
    )
