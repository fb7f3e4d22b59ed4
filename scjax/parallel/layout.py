"""How a step lies on its devices: what layers ask for while they are traced.

Layers are written for one device. Where a step is traced for several, its :class:`Layout` is active, and the
few places that must know of it (products with weights, the scanned stack, attention, look-ups in tables) ask
:func:`current`, or call the functions below, which do nothing where no layout is active.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scjax.parallel.hardware import device_of
from scjax.parallel.mesh import BATCH_AXES, summary
from scjax.parallel.rules import RULES, Rules, partition

_CURRENT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("scjax_layout", default=None)

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and what follows from the hardware.

    Attributes:
      mesh: axes ``data``, ``fsdp``, ``tensor``.
      rules: logical axis of a parameter -> mesh axis.
      attention: backend that "auto" stands for, see :func:`scjax.nn.attention.attention`; left out, that
        of the mesh's devices.
      remat: policy that "auto" stands for, see :class:`scjax.nn.layers.Stack`.
      tokens: that a device takes in one micro-batch, see :func:`scjax.parallel.accumulate_for`.
    """

    mesh: Mesh
    rules: Rules = dataclasses.field(default_factory=lambda: RULES)
    attention: str = ""
    remat: str = "none"
    tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.attention:
            object.__setattr__(self, "attention", device_of(self.mesh.devices.flat[0].device_kind).attention)

    def __str__(self) -> str:
        return f"{summary(self.mesh)}; attention {self.attention}, remat {self.remat}"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Layers traced inside find this layout."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    @property
    def slices(self) -> int:
        """Number of pieces that the rows of a batch are cut into."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def sharding(self, *spec: Any) -> NamedSharding:
        """On the mesh as the code that is being traced sees it: its axes are Auto while a loss is traced,
        also where those of ``mesh`` are Explicit."""
        seen = jax.sharding.get_abstract_mesh()
        return NamedSharding(self.mesh if seen.empty else seen, PartitionSpec(*spec))

    def split(self, shape: tuple[int, ...], axes: Axes) -> tuple[NamedSharding, NamedSharding]:
        """How a parameter lies in the state, and while it is used: gathered over ``fsdp``."""
        split = partition(shape, axes, self.mesh, self.rules)
        return self.sharding(*split), self.sharding(*(None if a in BATCH_AXES else a for a in split))


def current() -> Layout | None:
    """The active layout; None where a model is called outside of a step, on one device."""
    return _CURRENT.get()


def automatic(function: Callable[..., Any], mesh: Mesh, out: Any) -> Callable[..., Any]:
    """``function`` traced with Auto axes, also on a mesh whose axes are Explicit: there arrays carry their
    shardings in their types, which cannot say how a look-up in a split table or a sort comes out.

    Args:
      function: of trees of arrays.
      mesh: on which they lie.
      out: tree of the shardings of its results, or a prefix of it.
    """
    if AxisType.Explicit not in mesh.axis_types:
        return function
    return jax.sharding.auto_axes(function, out_sharding=out)


def rows(x: Array, *, whole: bool = True) -> Array:
    """Pins activations [B, ...], and their gradient, to the layout of a batch: cells over ``data`` and
    ``fsdp``. All else is whole, or as the compiler likes (vocabularies and hidden layers over ``tensor``)."""
    layout = current()
    if layout is None or x.shape[0] % layout.slices:
        return x
    others = () if whole else (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, layout.sharding(BATCH_AXES, *others))


def whole(x: Array, axes: Axes) -> Array:
    """A parameter as it is used, gathered over ``fsdp``; its gradient is reduced to where it is kept."""
    layout = current()
    return x if layout is None else _whole(x, *layout.split(x.shape, axes))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(x: Array, split: NamedSharding, gathered: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, gathered)


def reduced(gradient: Array, split: NamedSharding, gathered: NamedSharding) -> Array:
    """The gradient of a parameter, summed over the rows of all devices and then cut up: asked for in one
    step, the compiler may move the rows of the whole batch instead."""
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(gradient, gathered), split)


_whole.defvjp(
    lambda x, split, gathered: (_whole(x, split, gathered), None),
    lambda split, gathered, _, gradient: (reduced(gradient, split, gathered),),
)


def by_slice(function: Callable[..., Any], *arrays: Array) -> Any:
    """``function`` of arrays [B, ...], where each device works on its own rows only: for what the compiler
    would otherwise gather the whole batch for. A row's result must depend on that row alone."""
    layout = current()
    if layout is None or layout.slices == 1 or arrays[0].shape[0] % layout.slices:
        return function(*arrays)
    spec = PartitionSpec(BATCH_AXES)
    mesh: Any = layout.sharding().mesh
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)(*arrays)


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """``jax.lax.top_k`` of [B, N]: the k largest of each row and their places."""
    return by_slice(lambda own: jax.lax.top_k(own, k), x)


def map_cells(function: Callable[[Any], Any], cells: Any) -> Any:
    """``function`` over cells one after the other, where they are: each call gets one cell of every slice.

    Args:
      function: tree of arrays [R, ...] -> tree of arrays [R, ...].
      cells: tree of arrays [B, ...].

    Returns:
      Tree of arrays [B, ...], in the order of ``cells``.
    """
    layout, n = current(), jax.tree.leaves(cells)[0].shape[0]
    slices = layout.slices if layout and n % layout.slices == 0 else 1

    def apart(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(slices, n // slices, *x.shape[1:]), 1, 0)
        if layout is None or slices == 1:
            return x
        return jax.lax.with_sharding_constraint(x, layout.sharding(None, BATCH_AXES))

    out = jax.lax.map(function, jax.tree.map(apart, cells))
    return jax.tree.map(lambda x: rows(jnp.moveaxis(x, 0, 1).reshape(n, *x.shape[2:])), out)
