"""HDF5 files: opening them with errors that say what is wrong, and reading long vectors fast."""

from __future__ import annotations

import contextlib
import errno
import pathlib
from collections.abc import Iterator

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
    """A function that reads the elements [low, high) of a one-dimensional dataset."""

    def read(low: int, high: int) -> np.ndarray:
        return dataset[low:high]

    return read
