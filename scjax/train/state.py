"""The state of a run: ``{"params", "buffers", "opt", "guard", "step"}``, nested dicts of global arrays, and
"ema", the moving average of the parameters, where a run keeps one.

The paths of the state are those of the checkpoint and depend on neither Flax nor Optax classes. No array
is ever made unsharded: shapes first, then shardings, then a jitted initialisation that writes each shard
where it belongs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scjax.nn.module import Abstract, axes_of, initialise, shapes_of
from scjax.parallel import RULES, Rules, replicated, shardings
from scjax.train.guard import new_guard

State = dict[str, Any]
Path = tuple[str, ...]


def _names(path: tuple[Any, ...]) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def pack(opt_state: Any) -> dict[str, Any]:
    """An optax state as nested dicts; tuples become dicts with keys "0", "1", ..."""
    out: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        *parents, last = _names(path)
        node = out
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return out


def unpack(tx: optax.GradientTransformation, params: Any, packed: dict[str, Any]) -> Any:
    """The optax state that :func:`pack` made ``packed`` from."""

    def find(path: tuple[Any, ...], _: Any) -> Any:
        node = packed
        for name in _names(path):
            node = node[name]
        return node

    return jax.tree_util.tree_map_with_path(find, jax.eval_shape(tx.init, params))


def _fresh(model: Abstract, tx: optax.GradientTransformation, ema: bool) -> State:
    state: State = initialise(model)
    state |= {"opt": pack(tx.init(state["params"])), "guard": new_guard(), "step": jnp.zeros((), jnp.int32)}
    return state | {"ema": state["params"]} if ema else state


def abstract_state(
    model: Abstract,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: Rules = RULES,
    *,
    ema: bool = False,
) -> State:
    """The state as ``jax.ShapeDtypeStruct`` with shardings; nothing is allocated.

    Parameters and buffers are split by their logical axes; what an optimiser keeps per parameter is split
    like that parameter, whether it has the parameter's shape (Adam's moments) or some of its dimensions
    (Adafactor's factored ones); everything else is replicated. With ``ema`` there is a moving average of the
    parameters, split as they are.
    """
    shapes = jax.eval_shape(lambda: _fresh(model, tx, ema))
    axes, declared = axes_of(model), shapes_of(model)
    split: dict[str, Any] = {kind: shardings(mesh, declared[kind], axes[kind], rules) for kind in declared}
    params = {
        _names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(declared["params"]),
            jax.tree.leaves(split["params"]),
            strict=True,
        )
    }

    def like_its_parameter(path: tuple[Any, ...], leaf: Any) -> Any:
        names = _names(path)
        for start in range(len(names)):
            shape, sharding = params.get(names[start:], ((), None))
            # of a parameter factored into rows and columns each has the dimensions that are left of it
            kept = [
                dims
                for dims in itertools.combinations(range(len(shape)), len(leaf.shape))
                if tuple(shape[d] for d in dims) == leaf.shape
            ]
            if sharding and kept:
                if shape == leaf.shape:
                    return sharding
                dims = kept[-1 if "v_col" in names else 0]  # Adafactor's name; a square has two readings
                spec = (*sharding.spec, *(None,) * len(shape))
                return NamedSharding(mesh, PartitionSpec(*(spec[d] for d in dims)))
        return replicated(mesh)

    split["opt"] = jax.tree_util.tree_map_with_path(like_its_parameter, shapes["opt"])
    split |= jax.tree.map(lambda _: replicated(mesh), {name: shapes[name] for name in ("guard", "step")})
    if ema:
        split["ema"] = split["params"]
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, split)


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of arrays or of :func:`abstract_state`."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(
    model: Abstract,
    tx: optax.GradientTransformation,
    abstract: State,
    values: Mapping[str, Any] | None = None,
) -> State:
    """A fresh state at step 0, each shard made on its own device; the same values on every mesh.

    ``values``: path of a parameter or buffer, such as "gene/table" -> its value in the place of the initial
    one (see :func:`scjax.train.gene_tables` and :func:`scjax.train.start_from`).
    """
    state = jax.jit(lambda: _fresh(model, tx, "ema" in abstract), out_shardings=shardings_of(abstract))()
    kinds = [kind for kind in ("params", "ema", "buffers") if kind in state]
    for path, value in (values or {}).items():
        *parents, last = path.split("/")
        for kind in kinds:
            node, like = state[kind], abstract[kind]
            for name in parents:
                node, like = node.get(name, {}), like.get(name, {})
            if last in node:
                own = np.asarray(value, like[last].dtype)
                node[last] = jax.make_array_from_callback(own.shape, like[last].sharding, own.__getitem__)
    return state


def judged_params(state: State) -> Any:
    """The parameters that a run is judged by: their moving average where it keeps one."""
    return state.get("ema", state["params"])


def count_parameters(model: Abstract) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model)["params"]))
