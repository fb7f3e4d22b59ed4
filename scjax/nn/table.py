"""The parameter table of a model: what is where, and how large."""

from __future__ import annotations

import jax
from rich.table import Table

from scjax.nn.module import Abstract, axes_of, shapes_of


def parameter_table(model: Abstract, title: str) -> Table:
    """A line a parameter: path, shape, logical axes, count and MiB; the last line adds up."""
    table = Table(title=title, title_justify="left")
    table.add_column("parameter")
    for name in ("shape", "axes"):
        table.add_column(name)
    for name in ("count", "MiB"):
        table.add_column(name, justify="right")
    total = 0
    shapes, axes = shapes_of(model)["params"], axes_of(model)["params"]
    named = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, leaf), (_, names) in zip(jax.tree_util.tree_leaves_with_path(shapes), named, strict=True):
        total += leaf.size
        table.add_row(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            " x ".join(f"{n:,}" for n in leaf.shape),
            ", ".join(str(a or "-") for a in names),
            f"{leaf.size:,}",
            f"{leaf.size * leaf.dtype.itemsize / 2**20:,.2f}",
        )
    table.add_section()
    table.add_row("all", "", "", f"{total:,}", f"{total * 4 / 2**20:,.2f}")
    return table
