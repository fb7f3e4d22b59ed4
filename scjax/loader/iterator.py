"""The loader behind grain's iterator protocol: prefetch thread, state, checkpoint handling.

Apart from the rest of the room because grain imports JAX.
"""

from __future__ import annotations

import atexit
import weakref
from typing import TYPE_CHECKING, Any

import grain
from grain.experimental import ThreadPrefetchDatasetIterator

from scjax.loader.pipeline import Pipeline
from scjax.types import CellBatch, SparseBatch

if TYPE_CHECKING:
    from scjax.loader.loader import Loader

_open: weakref.WeakSet[grain.DatasetIterator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends background threads while the interpreter is still whole."""
    for iterator in list(_open):
        iterator.close()


class BatchIterator(grain.DatasetIterator[CellBatch | SparseBatch]):
    """One grain element is one batch of this process."""

    def __init__(self, loader: Loader):
        super().__init__()
        self._loader = loader
        self._epoch = self._step = 0
        self._pipeline: Pipeline | None = None

    def __next__(self) -> CellBatch | SparseBatch:
        self._assert_not_closed()
        loader = self._loader
        if loader.epochs is not None and self._epoch >= loader.epochs:
            raise StopIteration
        if self._pipeline is None:
            # prefetched, placed ahead (2), in use (this step's and the last one's), and being filled
            self._pipeline = Pipeline(loader, self._epoch, self._step, keep_batches=loader.prefetch + 5)
        batch = self._pipeline.next()
        self._step += 1
        if self._step == loader.steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
        return batch

    def get_state(self) -> dict[str, Any]:
        return self._loader.state(self._epoch, self._step)

    def set_state(self, state: dict[str, Any]) -> None:
        position = self._loader.position(state)
        self._drop()
        self._epoch, self._step = position

    def close(self) -> None:
        super().close()
        self._drop()

    def _drop(self) -> None:
        pipeline, self._pipeline = getattr(self, "_pipeline", None), None
        if pipeline is not None:
            pipeline.close()

    def __str__(self) -> str:
        return f"BatchIterator({self._loader.corpus.path}, {self._loader.split})"


class PrefetchedBatches(ThreadPrefetchDatasetIterator[CellBatch | SparseBatch]):
    """grain's prefetch thread. Its state is that of the batch handed out, not of those waiting."""

    def close(self) -> None:
        if not self._closed:  # grain closes again when the object dies, perhaps too late to do anything
            super().close()


def iterate(loader: Loader) -> grain.DatasetIterator:
    """A new iterator from the beginning. ``close()`` it, or let it be collected, to end its threads."""
    iterator = PrefetchedBatches(BatchIterator(loader), loader.prefetch)
    _open.add(iterator)
    return iterator
