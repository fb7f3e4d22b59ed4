"""A corpus in an object store: requests that are made again while it makes sense, and then a clear error."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from scjax.corpus.store import CorruptDataError, Expected, R, StoreError, T

GET_BYTES = 2**23  # of a request, at most: what is cut off or times out is soon there again
SIDE_BY_SIDE = 16  # requests of one ``map`` that are under way at a time
_SHORT = 3  # times that a store may answer with fewer bytes than asked for
_thread = threading.local()


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long an object store may take.

    A request is made anew after timeouts, dropped connections, answers 5xx and 429, and short answers, with
    growing pauses between. What is refused or not there is not asked for again.

    Attributes:
      timeout: seconds that one request of at most 8 MiB may take.
      total: seconds after which no further request for the same range is begun.
      attempts: requests for the same range, at most.
      pause: seconds before the second request, doubled before each further one, at most 15.
    """

    timeout: float = 30.0
    total: float = 300.0
    attempts: int = 8
    pause: float = 0.2


class RemoteStore:
    """The objects of a corpus in an object store, read with obstore: S3, Google Cloud, Azure or HTTP(S).

    Credentials and endpoints are those of the environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``,
    ``AWS_REGION``, ``GOOGLE_APPLICATION_CREDENTIALS``, ...).
    """

    remote, kept = True, None

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        """Raises ImportError without obstore, ValueError if the URL or the settings make no store."""
        self.url = url.rstrip("/")
        self._patience = patience = patience or Patience()
        self._store = _connect(self.url, patience)
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStore, (self.url, self._patience)

    def read(self, name: str, expected: Expected = None, again: bool = False) -> bytes:
        import obstore

        def get() -> bytes:
            content = obstore.get(self._store, name).bytes().to_bytes()
            if expected is not None and len(content) != expected["bytes"]:
                raise _ShortError(f"{len(content):,} bytes came, the manifest says {expected['bytes']:,}")
            return content

        return self._insist(name, "reading it", get)

    def open(self, name: str, expected: Expected = None) -> RemoteFile:
        return RemoteFile(self, name, self.size(name) if expected is None else int(expected["bytes"]))

    def size(self, name: str) -> int:
        """Bytes of an object. Raises FileNotFoundError where there is none."""
        import obstore

        return int(self._insist(name, "asking for its size", lambda: obstore.head(self._store, name))["size"])

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def where(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        jobs = list(items)
        if len(jobs) < 2 or getattr(_thread, "fetches", False):  # a pool that waits for itself waits for ever
            return [function(item) for item in jobs]
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(
                    SIDE_BY_SIDE, "scjax-fetch", initializer=lambda: setattr(_thread, "fetches", True)
                )
        futures = [self._pool.submit(function, item) for item in jobs]
        wait(futures)  # for all of them: none may go on writing into memory after this returns
        return [future.result() for future in futures]

    def fetch(self, name: str, offset: int, out: np.ndarray) -> None:
        """Fills ``out`` (uint8) with the bytes of an object from ``offset`` on."""
        import obstore

        def get(start: int, into: np.ndarray) -> None:
            content = obstore.get_range(self._store, name, start=start, length=into.size)
            got = np.frombuffer(memoryview(content), np.uint8)
            if got.size != into.size:
                raise _ShortError(f"{got.size:,} bytes came")
            into[:] = got

        for at in range(0, out.size, GET_BYTES):
            piece, start = out[at : at + GET_BYTES], offset + at
            what = f"reading {piece.size:,} bytes from {start:,} on"
            try:
                self._insist(name, what, lambda start=start, piece=piece: get(start, piece))  # type: ignore[misc]
            except OSError as error:
                self._blame(name, start + piece.size, error)
                raise

    def _blame(self, name: str, end: int, error: OSError) -> None:
        """Tells an object that is too short from a store that does not deliver."""
        import obstore

        try:
            size = int(obstore.head(self._store, name)["size"])
        except Exception:  # noqa: BLE001  (then the first error stands)
            return
        if size < end:
            raise CorruptDataError(
                f"{self.where(name)} is cut short: it has {size:,} bytes, at least {end:,} were written"
            ) from error

    def _insist(self, name: str, what: str, request: Callable[[], R]) -> R:
        """Makes a request until it succeeds, is refused or has been made often enough."""
        import obstore.exceptions as errors

        patience, began, short = self._patience, time.monotonic(), 0
        for attempt in itertools.count(1):
            try:
                return request()
            except FileNotFoundError:
                raise FileNotFoundError(2, "no such object", self.where(name)) from None
            except (errors.PermissionDeniedError, errors.UnauthenticatedError, PermissionError) as error:
                raise StoreError(f"{self.where(name)}: {what} is not allowed: {_brief(error)}") from error
            except errors.NotSupportedError as error:
                raise StoreError(
                    f"{self.where(name)}: {what} is not possible: {_brief(error)}; the server must answer "
                    "requests for ranges of a file"
                ) from error
            except (errors.BaseError, OSError) as error:
                cause = error
            short += isinstance(cause, _ShortError)
            pause = min(patience.pause * 2 ** (attempt - 1), 15.0) * random.uniform(0.5, 1.0)
            took = time.monotonic() - began
            if attempt >= patience.attempts or short >= _SHORT or took + pause > patience.total:
                raise (CorruptDataError if isinstance(cause, _ShortError) else StoreError)(
                    f"{self.where(name)}: {what} failed {attempt} times in {took:.1f} s, "
                    f"the last time so: {_brief(cause)}"
                ) from cause
            time.sleep(pause)
        raise AssertionError("not reached")


class RemoteFile:
    """An object of a remote store, of a size that is known."""

    def __init__(self, store: RemoteStore, name: str, size: int) -> None:
        self._store, self._name, self.size = store, name, size

    def readinto(self, offset: int, out: np.ndarray, again: bool = False) -> int:
        n = max(0, min(out.size, self.size - offset))
        if n:
            self._store.fetch(self._name, offset, out[:n])
        return n


class _ShortError(OSError):
    """Fewer bytes came than were asked for."""


def _connect(url: str, patience: Patience) -> Any:
    try:
        import obstore.store as stores
    except ImportError as error:
        raise ImportError(f"reading {url} needs obstore: pip install 'scjax[remote]'") from error
    from datetime import timedelta

    # settings given here replace those of the environment, so what that says of http is repeated
    allowed = (
        os.environ.get(name, "") for name in ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")
    )
    plain = url.startswith("http://") or any(word.lower() in ("1", "true", "yes", "on") for word in allowed)
    seconds = timedelta(seconds=patience.timeout)
    try:
        return stores.from_url(
            url,
            client_options={
                "allow_http": plain,
                "timeout": seconds,
                "connect_timeout": min(seconds, timedelta(seconds=10)),
            },
            retry_config={"max_retries": 0, "retry_timeout": seconds},  # retries are ours: see Patience
        )
    except Exception as error:
        raise ValueError(f"{url}: no object store can be made of it: {_brief(error)}") from error


def _brief(error: BaseException) -> str:
    """The first paragraph of an error of obstore, which goes on with a dump of its structure."""
    head, _, dump = str(error).partition("Debug source")
    timed_out = "timed out: " if "TimedOut" in dump or "Timeout" in dump else ""
    return f"{type(error).__name__}: {timed_out}{head.strip()[:400]}"
