"""Who works on a corpus: readers hold a shared lock on their manifest, a writer an exclusive one on a file.

A reader's lock is what keeps ``gc`` from taking an old state away under it. All are ``flock`` locks: they
cost one descriptor, the system frees them however a process ends, and a fork shares its parent's. File
systems without them (and other operating systems) are used without: then nobody notices a reader, who will
get an error that names the missing file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import weakref
from collections.abc import Iterator
from typing import Any

from scjax.corpus.manifest import read_manifest

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

WORK = ".build"  # in the corpus's folder while something is written there, or after a writer was killed
# What a file system says that has no locks, or whose lock service is away.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


def lock(fd: int, *, shared: bool, wait: bool) -> bool:
    """Takes the lock; False where another holds it and ``wait`` is False. Without locks: as if taken."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def is_there(fd: int, path: pathlib.Path) -> bool:
    """Whether ``path`` is still the file that was opened: not removed, not replaced."""
    try:
        found, opened = os.stat(path), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)


class ReaderLock:
    """A shared lock on a manifest file, until this object is collected.

    Pickled or copied, it is taken again where it arrives; there a manifest that is gone is no error, because
    the reader in hand still says clearly which file it misses.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Raises FileNotFoundError where the file is not there, or was removed while we waited."""
        self.path = path
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        # Closing, never unlocking: an unlock in a forked child would free the lock of its parent too.
        self._close = weakref.finalize(self, os.close, fd)
        self._close.atexit = False
        lock(fd, shared=True, wait=True)
        if not is_there(fd, path):
            self._close()
            raise FileNotFoundError(errno.ENOENT, "the manifest was removed", str(path))

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (self.path,)


def hold_manifest(
    root: pathlib.Path, manifest_id: str | None = None
) -> tuple[str, dict[str, Any], ReaderLock]:
    """``read_manifest`` with the lock that keeps ``gc`` from taking that state away: (id, content, lock).

    An append and a gc between the two steps are no error: the new state is read.
    """
    while True:
        head = _content(root / "HEAD")
        try:
            found, content = read_manifest(root, manifest_id)
            return found, content, ReaderLock(root / "manifests" / f"{found}.json")
        except FileNotFoundError:
            if manifest_id is not None or _content(root / "HEAD") == head:
                raise


def _content(path: pathlib.Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _again(path: pathlib.Path) -> ReaderLock | None:
    try:
        return ReaderLock(path)
    except OSError:
        return None


@contextlib.contextmanager
def writing(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Holds a corpus for writing: one builder, appender, repair or gc at a time.

    The lock file lies in the folder ``.build``. What else is in there when the block ends stays, for a later
    run to go on from; the folder itself goes when it is empty.

    Yields:
      The folder ``.build``, made where it was missing.

    Raises:
      FileExistsError: another process is writing there.
    """
    work = root / WORK
    path = work / "lock"
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except FileNotFoundError:  # whoever held it has just removed the folder
            continue
        try:
            if not lock(fd, shared=False, wait=False):
                raise FileExistsError(
                    f"{root}: another build, append, repair or gc is writing there now; run this one after it"
                )
            if not is_there(fd, path):  # the one before us has finished, and taken the file along
                continue
            try:
                yield work
            finally:
                tidy(work)
            return
        finally:
            os.close(fd)


def tidy(work: pathlib.Path) -> None:
    """Removes the folder if only the lock is in it. Whoever waits for that file looks for it again."""
    with contextlib.suppress(OSError):
        if os.listdir(work) == ["lock"]:
            os.unlink(work / "lock")
            os.rmdir(work)  # fails where the next one has moved in already


@contextlib.contextmanager
def unread(manifest: pathlib.Path) -> Iterator[bool]:
    """Whether nobody has a manifest open; if so, nobody can open it until the block ends."""
    try:  # for writing: network file systems give an exclusive lock on nothing else
        fd = os.open(manifest, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except PermissionError:
        fd = os.open(manifest, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        yield lock(fd, shared=False, wait=False)
    finally:
        os.close(fd)
