"""What was read from an object store stays in a folder: small objects whole, shards as far as they were read.

The names of a corpus's objects follow from their content, and a copy's name also holds the checksum that the
manifest states. So one folder serves any number of corpora, readers and processes, and a copy never gets
old. Nothing in it is trusted: readers check what they get, and what is wrong is fetched again.

A shard's copy is one sparse file: the object's bytes, each at its place, then a list of the ranges that are
there. A range is written first and listed after, by one appending write, so that whoever finds it in the
list finds its bytes; a file that is taken away stays whole for those who have it open.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import os
import pathlib
import re
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import google_crc32c
import numpy as np

from scjax.corpus.remote import RemoteStore
from scjax.corpus.store import Expected, LocalFile, R, StoredFile, T, differs, pread

_TOKEN = 16  # bytes after the object's own that tell two copies of one name apart
_RECORD = np.dtype([("offset", "<u8"), ("length", "<u8"), ("check", "<u4")])
_LOOK = 2**30  # bytes that are written before the folder's size is looked at, at most
_ROOM = 0.9  # of the bytes allowed, what is left after some were removed
_TOUCH = 60.0  # seconds after which a copy in use is marked as used again
# What is written here, and half-written copies of it. The folder may be one that holds other things, too.
_OURS = re.compile(
    r"(parts|index|vocab)/.+\.[0-9a-f]{8}|(manifests|statistics)/[0-9a-f]{12}\.(json|npz)"
    r"|(parts|index|vocab|manifests|statistics)/(.+/)?\..+\.\d+\.(\d+|partial)"
)


class CachedStore:
    """A remote store with a folder that keeps what was read. May be used by several threads at once."""

    remote = True

    def __init__(self, origin: RemoteStore, folder: pathlib.Path, limit: int | None = None) -> None:
        """``limit``: bytes that the folder may hold, with what all other corpora keep there.

        Over it by what is written between two looks (1/8 of it, at most 1 GiB) and by what is being read;
        shards go first, those that were not opened for longest before others.
        """
        self.origin, self.limit = origin, limit
        self.folder = self.kept = folder
        self._turn = threading.Condition()
        self._under_way: dict[str, list[tuple[int, int]]] = {}  # ranges that threads fetch now
        self._written, self._lock = 0, threading.Lock()
        self._off = False  # after a write has failed

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedStore, (self.origin, self.folder, self.limit)

    def where(self, name: str) -> str:
        return self.origin.where(name)

    def exists(self, name: str) -> bool:
        return self.origin.exists(name)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return self.origin.map(function, items)

    def read(self, name: str, expected: Expected = None, again: bool = False) -> bytes:
        if expected is None and not _is_manifest(name):
            return self.origin.read(name)
        path = self.place(name, expected)
        if not again:
            with contextlib.suppress(OSError):
                content = path.read_bytes()
                if expected is None or not differs(content, expected):
                    return content
        content = self.origin.read(name, expected)
        if expected is None or not differs(content, expected):
            self.keep(path, content)
        return content

    def open(self, name: str, expected: Expected = None) -> StoredFile:
        if expected is None:
            return self.origin.open(name)
        if _is_shard(name):
            return _ShardCopy(self, name, expected)
        if self._off and not self.place(name, expected).exists():  # rather ranges than all of it in memory
            return self.origin.open(name, expected)
        return _WholeCopy(self, name, expected)

    def place(self, name: str, expected: Expected) -> pathlib.Path:
        """Where the copy of an object is, or would be."""
        return self.folder / (name if expected is None else f"{name}.{expected['crc32c']}")

    @contextlib.contextmanager
    def claim(self, name: str, low: int, high: int) -> Iterator[None]:
        """Around fetching a range: other threads that want any of it wait, and then find it kept."""
        with self._turn:
            while any(a < high and low < b for a, b in self._under_way.get(name, ())):
                self._turn.wait()
            self._under_way.setdefault(name, []).append((low, high))
        try:
            yield
        finally:
            with self._turn:
                self._under_way[name].remove((low, high))
                if not self._under_way[name]:
                    del self._under_way[name]
                self._turn.notify_all()

    def keep(self, path: pathlib.Path, content: bytes) -> bool:
        """Writes a whole copy, which is there at once or not at all; False where that is not possible."""
        with self.filling(len(content)) as on:
            if on:
                with _partial(path) as partial:
                    partial.write_bytes(content)
                    os.replace(partial, path)
        return on and not self._off

    @contextlib.contextmanager
    def filling(self, n_bytes: int) -> Iterator[bool]:
        """Around what writes about so many bytes into the folder; False, and do not, after that has failed.

        A failed write, as to a full disk, is no failure to read: one warning, and no more of it.
        """
        if self._off:
            yield False
            return
        try:
            yield True
        except OSError as error:
            with self._lock:
                before, self._off = self._off, True
            if not before:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                warnings.warn(
                    f"{self.folder}: {'the disk is full' if full else error}; reading {self.origin.url} goes "
                    "on without keeping what is read",
                    RuntimeWarning,
                    stacklevel=2,
                )
        else:
            self._count(n_bytes)

    def _count(self, n_bytes: int) -> None:
        if self.limit is None:
            return
        with self._lock:
            first, self._written = self._written == 0, self._written + n_bytes
            if not first and self._written < min(self.limit // 8, _LOOK):
                return
            self._written = 1
        shrink(self.folder, self.limit)


class _WholeCopy:
    """A file that is fetched whole when it is first read; a read whose bytes were wrong fetches it again."""

    def __init__(self, store: CachedStore, name: str, expected: Any) -> None:
        self._store, self._name, self._expected = store, name, expected
        self.size = int(expected["bytes"])
        self._copy: StoredFile | None = None

    def readinto(self, offset: int, out: np.ndarray, again: bool = False) -> int:
        copy = self._copy
        if copy is None or again:
            with self._store.claim(self._name, 0, self.size):
                if again or self._copy is None:
                    self._copy = self._fetched(again)
                copy = self._copy
        return copy.readinto(offset, out)

    def _fetched(self, again: bool) -> StoredFile:
        path = self._store.place(self._name, self._expected)
        if not again:
            with contextlib.suppress(OSError):
                copy = LocalFile(path)
                if copy.size == self.size:
                    return copy
        content = self._store.origin.read(self._name, self._expected)
        if not differs(content, self._expected) and self._store.keep(path, content):
            with contextlib.suppress(OSError):  # removed since
                return LocalFile(path)
        return _Held(content)


class _Held:
    """An object in memory."""

    def __init__(self, content: bytes) -> None:
        self._content = np.frombuffer(content, np.uint8)
        self.size = self._content.size

    def readinto(self, offset: int, out: np.ndarray, again: bool = False) -> int:
        there = self._content[offset : offset + out.size]
        out[: there.size] = there
        return there.size


class _ShardCopy:
    """An object of which the ranges that are read are kept. Holds no file open between two reads."""

    def __init__(self, store: CachedStore, name: str, expected: Any) -> None:
        self._store, self._name = store, name
        self._origin = store.origin.open(name, expected)
        self.size = self._origin.size
        self._path = store.place(name, expected)
        self._lock = threading.Lock()
        self._token, self._end = b"", 0  # of the copy that the ranges are of, and how far its list was read
        self._ranges = _Ranges()
        self._used = 0.0

    def readinto(self, offset: int, out: np.ndarray, again: bool = False) -> int:
        out = out[: max(0, min(out.size, self.size - offset))]
        if not again and self._read_copy(offset, out):
            return out.size
        with self._store.claim(self._name, offset, offset + out.size):
            if again or not self._read_copy(offset, out):  # unless another thread has just fetched it
                self._fill(offset, out, again)
        return out.size

    def _read_copy(self, offset: int, out: np.ndarray) -> bool:
        """Whether all was there and is read."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if time.monotonic() - self._used > _TOUCH:
                with contextlib.suppress(OSError):  # somebody else's
                    os.utime(fd)  # the time by which copies are removed
                self._used = time.monotonic()
            missing = self._missing(fd, offset, out.size)
            return missing is not None and not missing and pread(fd, offset, out) == out.size
        except OSError:
            return False
        finally:
            os.close(fd)

    def _missing(self, fd: int, offset: int, length: int) -> list[tuple[int, int]] | None:
        """The parts (from, to) of a range that an open copy does not have; None if its list is damaged."""
        with self._lock:
            token = os.pread(fd, _TOKEN, self.size)
            if len(token) < _TOKEN:
                return None
            if token != self._token:
                self._token, self._end, self._ranges = token, self.size + _TOKEN, _Ranges()
            end = os.fstat(fd).st_size
            if end > self._end:
                records = os.pread(fd, end - self._end, self._end)
                if len(records) % _RECORD.itemsize:
                    return None
                for record in np.frombuffer(records, _RECORD):
                    if record["check"] != google_crc32c.value(record.tobytes()[:16]):
                        return None
                    self._ranges.add(int(record["offset"]), int(record["offset"] + record["length"]))
                self._end = end
            return self._ranges.missing(offset, offset + length)

    def _fill(self, offset: int, out: np.ndarray, again: bool) -> None:
        """Fetches what is not there, or all of it again, and keeps it."""
        everything = [(offset, offset + out.size)]
        fd, missing = self._open(), everything
        try:
            if fd is not None:
                listed = self._missing(fd, offset, out.size)
                if listed is None:  # the copy is of no use; those who read it have it open
                    os.close(fd)
                    fd = None
                    with contextlib.suppress(OSError):
                        os.unlink(self._path)
                    fd = self._open()
                elif not again:
                    missing = listed
            if fd is not None and missing != everything:
                pread(fd, offset, out)
            for low, high in missing:
                piece = out[low - offset : high - offset]
                self._origin.readinto(low, piece)
                with self._store.filling(piece.size) as on:
                    if on and fd is not None:
                        self._write(fd, low, piece)
        finally:
            if fd is not None:
                os.close(fd)

    def _write(self, fd: int, offset: int, piece: np.ndarray) -> None:
        done = 0
        while done < piece.size:
            done += os.pwrite(fd, piece[done:].data, offset + done)
        record = np.zeros(1, _RECORD)
        record["offset"], record["length"] = offset, piece.size
        record["check"] = google_crc32c.value(record.tobytes()[:16])
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_APPEND)
        if os.write(fd, record.tobytes()) < record.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)

    def _open(self) -> int | None:
        """The copy, open for writing, made where there was none; None if that is not possible."""
        fd = None
        with self._store.filling(0) as on:
            while on and fd is None:
                try:
                    fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    with _partial(self._path) as partial:
                        partial.write_bytes(b"")
                        with open(partial, "r+b") as file:
                            file.seek(self.size)
                            file.write(os.urandom(_TOKEN))
                        try:
                            os.link(partial, self._path)
                        except FileExistsError:  # another process was faster
                            pass
                        except OSError:  # a file system without links
                            os.replace(partial, self._path)
        return fd


class _Ranges:
    """A set of byte offsets, as sorted ranges that neither touch nor overlap."""

    def __init__(self) -> None:
        self._low: list[int] = []
        self._high: list[int] = []

    def add(self, low: int, high: int) -> None:
        first = bisect.bisect_left(self._high, low)
        last = bisect.bisect_right(self._low, high)
        if first < last:
            low, high = min(low, self._low[first]), max(high, self._high[last - 1])
        self._low[first:last], self._high[first:last] = [low], [high]

    def missing(self, low: int, high: int) -> list[tuple[int, int]]:
        """What of [low, high) is not in the set."""
        found = []
        for at in range(bisect.bisect_right(self._high, low), len(self._low)):
            if self._low[at] >= high:
                break
            if self._low[at] > low:
                found.append((low, self._low[at]))
            low = self._high[at]
        if low < high:
            found.append((low, high))
        return found


def shrink(folder: pathlib.Path, limit: int) -> None:
    """Removes copies from a cache until it holds less than ``limit`` bytes; one process at a time does.

    Shards first, and of these the ones that were not opened or written to for longest. Files of others in the
    folder are neither counted nor touched, and nothing at all where it is the folder of a corpus.
    """
    if (folder / "HEAD").exists():
        return
    with contextlib.suppress(OSError), open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a file system without locks: two may remove the same
            pass
        copies, held = [], 0
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                state = path.lstat()
                ours = _OURS.fullmatch(path.relative_to(folder).as_posix())
                if ours and stat.S_ISREG(state.st_mode):
                    used = state.st_blocks * 512
                    abandoned = path.name.startswith(".") and time.time() - state.st_mtime > 86400
                    copies.append((not abandoned, not _is_shard(str(path)), state.st_mtime_ns, path, used))
                    held += used
        if held <= limit:
            return
        for *_, path, used in sorted(copies):
            if held <= limit * _ROOM:
                break
            path.unlink(missing_ok=True)
            held -= used


@contextlib.contextmanager
def _partial(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name beside ``path`` that nobody else uses; what is left there in the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _is_shard(name: str) -> bool:
    return ("/X/" in name or "/obsm/" in name) and "/c/" in name


def _is_manifest(name: str) -> bool:
    """A manifest's name is the hash of its content: whoever reads it can check it."""
    return name.startswith("manifests/")
