"""Where the objects of a corpus are, behind one small door: a folder, or (to come) an object store."""

from __future__ import annotations

import os
import pathlib
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import google_crc32c
import numpy as np


class CorruptDataError(OSError):
    """Stored data are damaged, cut short or missing. The message names what and where."""


class StoredFile(Protocol):
    """An object that is open for reading; may be used by several threads at once."""

    @property
    def size(self) -> int: ...

    def readinto(self, offset: int, out: np.ndarray) -> int:
        """Fills ``out`` (uint8) from ``offset``; returns the bytes read, fewer only at the object's end."""
        ...


class Store(Protocol):
    """Reads the objects under one root; names are relative to it, with "/"."""

    def read(self, name: str) -> bytes:
        """The whole of a small object. Raises FileNotFoundError where there is none."""
        ...

    def open(self, name: str) -> StoredFile:
        """Opens an object for ranged reads. Raises FileNotFoundError where there is none."""
        ...

    def local(self, name: str) -> pathlib.Path:
        """A whole copy of the object, or of the folder of objects, in the file system."""
        ...

    def exists(self, name: str) -> bool: ...

    def where(self, name: str) -> str:
        """The full name of an object, for messages."""
        ...


class LocalFile:
    """A file of the file system; closed when the last user lets go of it."""

    def __init__(self, path: pathlib.Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.fd).atexit = False
        self.size = os.fstat(self.fd).st_size

    def readinto(self, offset: int, out: np.ndarray) -> int:
        done = 0
        while done < out.size:
            n = os.preadv(self.fd, [out[done:].data], offset + done)
            if n == 0:
                break
            done += n
        return done


class LocalStore:
    """The objects of a corpus in a folder.

    Attributes:
      held: what must live as long as somebody reads here: the lock that keeps gc away.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.held: object = None

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def open(self, name: str) -> LocalFile:
        return LocalFile(self.root / name)

    def local(self, name: str) -> pathlib.Path:
        return self.root / name

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def where(self, name: str) -> str:
        return str(self.root / name)


def read_checked(store: Store, name: str, objects: Mapping[str, Mapping[str, Any]], what: str) -> bytes:
    """The whole of a small object, if it is the one that the manifest tells of.

    Args:
      store: where it is.
      name: of the object.
      objects: the manifest's entries on objects: name -> {"bytes", "crc32c", ...}.
      what: what the object belongs to, for the message.

    Raises:
      CorruptDataError: missing, of another size or with another checksum; names the object.
    """
    if name not in objects:
        raise CorruptDataError(f"{what}: the manifest tells of no {name}; it cannot be checked")
    try:
        content = store.read(name)
    except FileNotFoundError:
        raise CorruptDataError(missing(what, store.where(name))) from None
    expected = objects[name]
    if len(content) != expected["bytes"]:
        raise CorruptDataError(
            f"{what}: {store.where(name)} has {len(content)} bytes, the manifest says {expected['bytes']}"
        )
    if f"{google_crc32c.value(content):08x}" != expected["crc32c"]:
        raise CorruptDataError(
            f"{what}: {store.where(name)} does not have the checksum that the manifest states, it has changed"
        )
    return content


def missing(what: str, where: str) -> str:
    """The message on an object that the manifest tells of and that is not there."""
    return (
        f"{what}: the file {where} is missing: deleted, or removed by gc since this corpus was opened "
        "(open it again to read its present state)"
    )
