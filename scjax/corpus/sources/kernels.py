"""The two hot loops of reading, compiled. Import this inside functions: numba takes a while to import."""

from __future__ import annotations

import numpy as np

from scjax.corpus.compiled import compiled


@compiled
def tidy(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> bool:
    """Whether the indices of every row of a CSR matrix rise and no stored value is zero."""
    good = True
    for row in range(indptr.size - 1):
        low, high = indptr[row], indptr[row + 1]
        own, values = indices[low:high], data[low:high]
        for k in range(own.size):
            good &= values[k] != 0
        for k in range(1, own.size):
            good &= own[k] > own[k - 1]
    return good


@compiled
def join(content: np.ndarray, length: int, skip: int, out: np.ndarray) -> None:
    """Undoes HDF5's shuffle, which stores the first bytes of all elements, then the second bytes, ...

    Args:
      content: uint8 [length x bytes of an element].
      skip: elements to leave out at the front.
      out: unsigned integers, of the size of an element; filled.
    """
    n = out.size
    # Slices, because the compiler cannot vectorise indices that it must check for being negative.
    for byte in range(out.itemsize):
        start = byte * length + skip
        plane, shift = content[start : start + n], np.uint64(8 * byte)
        if byte == 0:
            for k in range(n):
                out[k] = plane[k]
        else:
            for k in range(n):
                out[k] |= np.uint64(plane[k]) << shift
