"""Batches placed on the devices ahead of the step that takes them."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from typing import Any, Protocol

from jax.sharding import Mesh

from scjax.parallel.placement import place
from scjax.types import CellBatch

_POLL = 0.02  # seconds; between two looks at a thread that is to end


class Batches(Protocol):
    """What a loader's iterator has."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class Prefetch:
    """The batches of an iterator, placed on the devices of a mesh by a thread of its own.

    The order is that of the iterator. What the iterator raises is raised by the ``next`` that would have
    handed out the batch, and by all after it. It owns the iterator: nobody else may take from it, and
    :meth:`close` closes it.

    Attributes:
      waited: seconds spent in ``next`` so far, waiting for a batch.
    """

    def __init__(self, batches: Batches, mesh: Mesh, ahead: int = 2):
        """Args:
        batches: this process's rows of each global batch, as numpy arrays (see
          :func:`scjax.parallel.process_shard`), from where the run goes on: set its state before.
        mesh: the device mesh.
        ahead: batches on the devices beside the one that is being used.
        """
        self.waited = 0.0
        self._state = batches.get_state()
        self._queue: queue.Queue[Any] = queue.Queue(max(ahead - 1, 1))  # one more is in the thread's hands
        self._error: Exception | None = None
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_fill, args=(batches, mesh, self._queue, stop), name="scjax-prefetch", daemon=True
        )
        # closes also what was left open, before the interpreter takes JAX apart under the thread
        self._end = weakref.finalize(self, _end, self._thread, self._queue, stop, batches)
        self._thread.start()

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> CellBatch:
        if not self._end.alive:
            raise ValueError("the batches have been closed")
        if self._error is None:
            began = time.perf_counter()
            batch, state, self._error = self._queue.get()
            self.waited += time.perf_counter() - began
        if self._error is not None:
            raise self._error
        self._state = state
        return batch

    def get_state(self) -> dict[str, Any]:
        """The cursor of the batch handed out last, whatever has been read ahead."""
        return self._state

    def close(self) -> None:
        """Ends the thread and closes the iterator. May be called twice."""
        self._end()


def _fill(batches: Batches, mesh: Mesh, into: queue.Queue[Any], stop: threading.Event) -> None:
    """Places batches until told to stop; the last entry is what ended them."""
    while not stop.is_set():
        try:
            into.put((place(next(batches), mesh), batches.get_state(), None))
        except Exception as error:  # noqa: BLE001  (raised where the batch is asked for)
            into.put((None, None, error))
            return


def _end(thread: threading.Thread, into: queue.Queue[Any], stop: threading.Event, batches: Batches) -> None:
    stop.set()
    while thread.is_alive():
        while not into.empty():  # it may be waiting for room
            into.get_nowait()
        thread.join(_POLL)
    batches.close()
