"""How passes over counts are compiled. Importing this imports numba, which takes a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled by numba; it does not hold the GIL, and is kept for later processes."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep the compiled code, as in a read-only container
        return numba.njit(nogil=True)(function)


@compiled
def mix(z: np.uint64) -> np.uint64:
    """The finaliser of splitmix64: every bit of the input moves every bit of the output."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@intrinsic
def pointer(typing_context, address):
    """For ``numba.carray`` in compiled code: what lies at an address (uint64)."""

    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), build
