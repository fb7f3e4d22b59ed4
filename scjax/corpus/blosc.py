"""Decoding Blosc chunks, whole or in part, into memory that is there already.

numcodecs brings the C library along. Called directly it costs few microseconds a call, and decodes that part
of a chunk which is wanted. Where its functions cannot be reached, numcodecs' own way is gone: slower, with
the same result.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from numcodecs import Blosc
from numcodecs import blosc as _extension

HEADER = 16  # bytes
_whole = Blosc()


@functools.cache
def _library() -> Any:
    """The C functions, or None. ctypes releases the GIL while they run."""
    try:
        library = ctypes.CDLL(_extension.__file__)
        decompress, getitem = library.blosc_decompress_ctx, library.blosc_getitem
    except (OSError, AttributeError):
        return None
    decompress.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    getitem.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return library


def sizes(stored: np.ndarray) -> tuple[int, int, int]:
    """What a chunk's header says: bytes of an element, bytes decoded, bytes stored."""
    header = stored[:HEADER].tobytes().ljust(HEADER, b"\0")
    return header[3], int.from_bytes(header[4:8], "little"), int.from_bytes(header[12:16], "little")


def decode(stored: np.ndarray, first: int, out: np.ndarray) -> None:
    """Decodes elements [first, first + len(out)) of a chunk.

    The caller has compared ``sizes`` with the bytes that there are: Blosc believes its header.

    Args:
      stored: uint8, the chunk with its header, contiguous.
      first: element of the chunk.
      out: contiguous, of the type of the elements.

    Raises:
      RuntimeError: the bytes are not what Blosc writes.
    """
    size, decoded, _ = sizes(stored)
    library = _library()
    if library is None:
        whole = np.frombuffer(_whole.decode(stored), out.dtype)
        out[:] = whole[first : first + len(out)]
        return
    if out.nbytes == decoded:
        n = library.blosc_decompress_ctx(stored.ctypes.data, out.ctypes.data, out.nbytes, 1)
    elif size == out.itemsize and (first + len(out)) * size <= decoded:
        n = library.blosc_getitem(stored.ctypes.data, first, len(out), out.ctypes.data)
    else:
        raise RuntimeError(f"elements of {size} bytes, {decoded} in all")
    if n != out.nbytes:
        raise RuntimeError(f"error {n} while decompressing")
