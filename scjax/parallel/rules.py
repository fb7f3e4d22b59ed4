"""Which mesh axis splits which dimension of a parameter: one small table.

Layers name the dimensions of their parameters ("embed", "mlp", ...) and know nothing of devices; the
table says what a name means on a mesh. To lay a model out differently pass another table, such as
``RULES | {"vocab": None}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scjax.config import nearest
from scjax.parallel.mesh import BATCH_AXES

MeshAxis = str | None
Rules = Mapping[str, MeshAxis]

RULES: Rules = {
    "vocab": "tensor",  # genes of an embedding table or an output head
    "embed": "fsdp",  # width of the residual stream
    "embed_out": None,  # output width of a square layer, whose input is "embed"
    "mlp": "tensor",  # hidden width of a feed-forward layer
    "heads": "tensor",  # attention heads
    "head": None,  # width of one attention head
    "layers": None,  # a stack of layers, scanned over
}


def partition(
    shape: tuple[int, ...], axes: tuple[str | None, ...] | None, mesh: Mesh, rules: Rules = RULES
) -> PartitionSpec:
    """How an array is split: per dimension, the mesh axis of its logical name.

    A dimension without a name, or which its mesh axis does not divide, is replicated. So is a vector (of each
    layer) over the axes that split batches: to gather it would cost more than to keep it.

    Raises:
      ValueError: a name is not in the table, two names land on one mesh axis, or the number of names is
        not the number of dimensions.
    """
    if not axes:
        return PartitionSpec()
    if len(axes) != len(shape):
        raise ValueError(f"shape {shape} has {len(shape)} dimensions but the axis names {axes}")
    spec: list[MeshAxis] = []
    taken: dict[str, str] = {}
    for size, name in zip(shape, axes, strict=True):
        if name is not None and name not in rules:
            known = f"Known: {', '.join(rules)}"
            raise ValueError(
                f"axis name {name!r} of {axes} is not in the rules;{nearest(name, rules)} {known}"
            )
        axis = None if name is None else rules[name]
        if name is not None and axis is not None:
            if axis not in mesh.shape:
                raise ValueError(f"rule {name!r} -> {axis!r}: the mesh has the axes {', '.join(mesh.shape)}")
            if axis in taken:
                both = f"{taken[axis]!r} and {name!r}"
                raise ValueError(f"axis names {both} of {axes} both land on mesh axis {axis!r}")
            taken[axis] = name
            vector = len(axes) - ("layers" in axes) == 1
            if mesh.shape[axis] == 1 or size % mesh.shape[axis] or (vector and axis in BATCH_AXES):
                axis = None
        spec.append(axis)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def shardings(mesh: Mesh, shapes: Any, axes: Any, rules: Rules = RULES) -> Any:
    """The tree of ``NamedSharding`` for a tree of arrays or ``jax.ShapeDtypeStruct``.

    Args:
      mesh: the device mesh.
      shapes: tree whose leaves have a ``shape``.
      axes: the same tree with, at each leaf, a tuple of logical names or None.
      rules: logical name to mesh axis.

    Raises:
      ValueError: as :func:`partition`, naming the leaf.
    """

    def one(path: tuple[Any, ...], leaf: Any, names: tuple[str | None, ...] | None) -> NamedSharding:
        try:
            return NamedSharding(mesh, partition(leaf.shape, names, mesh, rules))
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {error}") from None

    return jax.tree_util.tree_map_with_path(one, shapes, axes)
