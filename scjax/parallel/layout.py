"""How a step lies on its devices: what layers ask for while they are traced.

Layers are written for one device. Where a step is traced for several, its :class:`Layout` is active, and the
few places that must know of it (the scanned stack, attention, look-ups in tables) ask :func:`current`.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from jax.sharding import Mesh

from scjax.parallel.rules import RULES, Rules

_CURRENT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("scjax_layout", default=None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and what follows from the hardware.

    Attributes:
      mesh: axes ``data``, ``fsdp``, ``tensor``.
      rules: logical axis of a parameter -> mesh axis.
      attention: backend that "auto" stands for, see :func:`scjax.nn.attention.attention`.
      remat: policy that "auto" stands for, see :class:`scjax.nn.layers.Stack`.
    """

    mesh: Mesh
    rules: Rules = dataclasses.field(default_factory=lambda: RULES)
    attention: str = "einsum"
    remat: str = "none"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Layers traced inside find this layout."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


def current() -> Layout | None:
    """The active layout; None where a model is called outside of a step, on one device."""
    return _CURRENT.get()
