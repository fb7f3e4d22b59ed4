"""The parameter table of a model: what is where, and how large."""

from __future__ import annotations

import math
from typing import Any

import jax
from rich.table import Table

from scjax.nn.module import Abstract, axes_of, shapes_of
from scjax.parallel import RULES, Rules, partition


def parameter_table(model: Abstract, title: str, mesh: Any = None, rules: Rules = RULES) -> Table:
    """A line a parameter: path, shape, logical axes, count and MiB; the last line adds up.

    Args:
      model: the abstract model.
      title: of the table.
      mesh: also how each is split over a mesh, or an ``AbstractMesh``; MiB are then those of a device.
      rules: logical axis -> mesh axis.
    """
    table = Table(title=title, title_justify="left")
    for name in ("parameter", "shape", "axes", *(("split",) if mesh else ())):
        table.add_column(name, overflow="fold")
    for name in ("count", "MiB a device" if mesh else "MiB"):
        table.add_column(name, justify="right")
    count = total = 0
    shapes, axes = shapes_of(model)["params"], axes_of(model)["params"]
    named = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, leaf), (_, names) in zip(jax.tree_util.tree_leaves_with_path(shapes), named, strict=True):
        spec = partition(leaf.shape, names, mesh, rules) if mesh else ()
        over = [axis for axis in spec if axis]
        size = leaf.size * leaf.dtype.itemsize // math.prod(mesh.shape[axis] for axis in over)
        count, total = count + leaf.size, total + size
        table.add_row(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            " x ".join(f"{n:,}" for n in leaf.shape),
            ", ".join(str(a or "-") for a in names),
            *((", ".join(str(a or "-") for a in spec),) if mesh else ()),
            f"{leaf.size:,}",
            f"{size / 2**20:,.2f}",
        )
    table.add_section()
    table.add_row("all", *("",) * (3 if mesh else 2), f"{count:,}", f"{total / 2**20:,.2f}")
    return table
