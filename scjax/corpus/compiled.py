"""How passes over counts are compiled. Importing this imports numba, which takes a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core import cgutils, types
from numba.extending import intrinsic


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled by numba; it does not hold the GIL, and is kept for later processes."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep the compiled code, as in a read-only container
        return numba.njit(nogil=True)(function)


@intrinsic
def pointer(typing_context, address):
    """For ``numba.carray`` in compiled code: what lies at an address (uint64)."""

    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), build
