"""Between an ``nnx.Module`` and the plain pytrees that training sees.

Layers are written with Flax NNX; everything outside a model (optimiser, checkpoint, shardings)
sees nested dicts of arrays whose paths do not depend on Flax. This file is the only one that
knows how to go from the one to the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

Tree = dict[str, Any]


class Buffer(nnx.Variable):
    """State of a model that is not trained: running means, random projections, frozen tables."""


@dataclasses.dataclass(frozen=True)
class Abstract:
    """The shape of a model: its structure and, per variable, shape, dtype and logical axes.

    Attributes:
      graphdef: structure of the module, static under ``jax.jit``.
      variables: the module's state with ``jax.ShapeDtypeStruct`` values.
      make: zero-argument function that builds the module; deterministic.
    """

    graphdef: Any
    variables: Any
    make: Callable[[], nnx.Module]


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _walk(variables: Any, kind: type[nnx.Variable]) -> Iterator[tuple[tuple[str, ...], nnx.Variable]]:
    for path, variable in jax.tree_util.tree_leaves_with_path(variables, is_leaf=_is_variable):
        if isinstance(variable, kind):
            yield _names(path), variable


def _nest(items: Iterator[tuple[tuple[str, ...], Any]]) -> Tree:
    return nest({"/".join(path): leaf for path, leaf in items})


def _lookup(tree: Tree, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def abstract(make: Callable[[], nnx.Module]) -> Abstract:
    """Structure and shapes of the model that ``make`` builds, without allocating a parameter."""
    graphdef, variables = nnx.split(nnx.eval_shape(make))
    return Abstract(graphdef, variables, make)


def shapes_of(model: Abstract) -> dict[str, Tree]:
    """``{"params": ..., "buffers": ...}`` of ``jax.ShapeDtypeStruct``."""

    def struct(variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        value = variable.get_value()
        return jax.ShapeDtypeStruct(value.shape, value.dtype)

    return {
        "params": _nest((p, struct(v)) for p, v in _walk(model.variables, nnx.Param)),
        "buffers": _nest((p, struct(v)) for p, v in _walk(model.variables, Buffer)),
    }


def axes_of(model: Abstract) -> dict[str, Tree]:
    """Logical axis names, one tuple a variable, in the structure of :func:`shapes_of`.

    A stacked layer has one dimension more than its variable was declared with; it is named
    "layers". A variable declared without axes has ``None`` for each dimension (replicated).
    """

    def axes(variable: nnx.Variable) -> tuple[str | None, ...]:
        ndim = len(variable.get_value().shape)
        named = tuple(variable.get_metadata().get("axes") or ())
        if not named:
            return (None,) * ndim
        if len(named) == ndim - 1:
            named = ("layers", *named)
        if len(named) != ndim:
            raise ValueError(f"a variable of {ndim} dimensions has the axis names {named}")
        return named

    return {
        "params": _nest((p, axes(v)) for p, v in _walk(model.variables, nnx.Param)),
        "buffers": _nest((p, axes(v)) for p, v in _walk(model.variables, Buffer)),
    }


def initialise(model: Abstract) -> dict[str, Tree]:
    """Fresh ``{"params": ..., "buffers": ...}``; call it under ``jax.jit`` with ``out_shardings`` so
    that no parameter is ever materialised unsharded."""
    return {"params": params_of(module := model.make()), "buffers": buffers_of(module)}


def bind(model: Abstract, params: Tree, buffers: Tree) -> Any:
    """The module that holds these arrays. Cheap: made anew inside every jitted step."""

    def fill(path: tuple[Any, ...], variable: Any) -> Any:
        if not _is_variable(variable):
            return variable
        return variable.replace(_lookup(params if isinstance(variable, nnx.Param) else buffers, _names(path)))

    filled = jax.tree_util.tree_map_with_path(fill, model.variables, is_leaf=_is_variable)
    return nnx.merge(model.graphdef, filled)


def params_of(module: nnx.Module) -> Tree:
    """The trainable arrays of a module as a nested dict."""
    return _nest((p, v.get_value()) for p, v in _walk(nnx.state(module), nnx.Param))


def buffers_of(module: nnx.Module) -> Tree:
    """The untrained arrays of a module as a nested dict; after ``loss`` these are the updated ones."""
    return _nest((p, v.get_value()) for p, v in _walk(nnx.state(module), Buffer))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Path such as "gene/embedding" -> leaf of nested dicts."""
    out: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        out.update(flatten(node, f"{path}/") if isinstance(node, Mapping) else {path: node})
    return out


def nest(flat: Mapping[str, Any]) -> Tree:
    """Nested dicts of path -> leaf, see :func:`flatten`."""
    out: Tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = out
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return out
