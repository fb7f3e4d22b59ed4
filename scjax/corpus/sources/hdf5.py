"""HDF5 files: opening them with errors that say what is wrong, and reading long vectors fast."""

from __future__ import annotations

import contextlib
import errno
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import numpy as np

from scjax.corpus.sources.matrix import Read


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[h5py.File]:
    """An HDF5 file, open for reading; what HDF5 says while it is read names the file.

    Raises:
      FileNotFoundError, ValueError, OSError: no such file, not HDF5, damaged or truncated.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a file")
    if not h5py.is_hdf5(path):
        raise ValueError(
            f"{path}: not an HDF5 file; a source is an .h5ad file written by anndata or a 10x .h5"
        )
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise OSError(f"{path}: damaged or truncated, HDF5 cannot open it ({error})") from error
    with file:
        try:
            yield file
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of the scratch folder, not of this file
                raise
            raise OSError(f"{path}: damaged or truncated, reading failed ({error})") from error


def vector(dataset: h5py.Dataset) -> Read:
    """A function that reads the elements [low, high) of a one-dimensional dataset.

    HDF5's own inflate is slow, and a chunk is copied twice on its way. So chunks that are stored as they are,
    or by gzip with or without shuffle, are taken out whole and decoded here. Other datasets, and any chunk
    that is missing or does not decode, are left to HDF5: values and errors are those of h5py.
    """
    if _plainly_chunked(dataset):
        return _Chunks(dataset).read
    return lambda low, high: dataset[low:high]


def _plainly_chunked(dataset: h5py.Dataset) -> bool:
    if dataset.chunks is None or dataset.ndim != 1 or dataset.dtype.kind not in "iuf":
        return False
    pipeline = dataset.id.get_create_plist()
    filters = [pipeline.get_filter(i)[0] for i in range(pipeline.get_nfilters())]
    return filters in ([], [h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE])


class _Chunks:
    def __init__(self, dataset: h5py.Dataset) -> None:
        self._dataset = dataset
        self._length = dataset.chunks[0]
        self._inflate, self._error = _inflate()
        self._zipped = dataset.compression is not None
        self._shuffled = dataset.shuffle and dataset.dtype.itemsize > 1

    def read(self, low: int, high: int) -> np.ndarray:
        low, high = max(low, 0), min(high, len(self._dataset))
        out = np.empty(max(high - low, 0), self._dataset.dtype)
        start = low - low % self._length
        while start < high:
            begin, end = max(low, start), min(high, start + self._length)
            to = out[begin - low : end - low]
            if not self._decode(start, begin - start, to):
                to[:] = self._dataset[begin:end]
            start += self._length
        return out

    def _decode(self, start: int, skip: int, to: np.ndarray) -> bool:
        """Fills ``to`` with a chunk's elements after the first ``skip``; False leaves it to HDF5."""
        size = self._length * to.itemsize
        try:
            mask, content = self._dataset.id.read_direct_chunk((start,))
            if mask:  # a filter was skipped for this chunk
                return False
            if self._zipped:
                content = self._inflate(content, bufsize=size)
        except (OSError, RuntimeError, ValueError, self._error):
            return False
        if len(content) != size:
            return False
        if self._shuffled:
            from scjax.corpus.sources.kernels import join

            join(np.frombuffer(content, np.uint8), self._length, skip, to.view(f"u{to.itemsize}"))
        else:
            to[:] = np.frombuffer(content, to.dtype, len(to), skip * to.itemsize)
        return True


def _inflate() -> tuple[Callable[..., bytes], Any]:
    """``zlib.decompress`` and its error, or a faster one where it is installed (``scjax[build]``)."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.decompress, zlib.error
    return isal_zlib.decompress, isal_zlib.error
