"""Branches of a loss of which one is taken, without paying for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax import Array

Branch = Callable[[Any, Any, Any], tuple[Array, Any]]


def switch_loss(
    index: Array,
    branches: Sequence[Branch],
    module: nnx.Module,
    inputs: Any,
    given: Any,
    *,
    through: Sequence[str] = (),
) -> tuple[Array, Any]:
    """``branches[index](module, inputs, given)``, differentiable.

    Differentiating ``jax.lax.switch`` makes the branch that runs write zeros in place of everything the
    others would keep for their backward passes. Here each branch computes its gradient along with its value
    where a gradient is asked for, so that nothing has to be kept.

    Args:
      index: int32 scalar.
      branches: each returns a float scalar and a pytree without a gradient; the same shapes in all. Arrays
        must come through the arguments, not from around the function, and no variable may be changed.
      module: what the branches use; the gradient reaches its parameters.
      inputs: pytree of float arrays that the gradient reaches.
      given: pytree of arrays of any type that it does not.
      through: names of the attributes of ``module`` with the parameters that the branches use; () for all.
    """

    def used(path: tuple[Any, ...], _: Any) -> bool:
        return not through or path[0] in through

    graphdef, parameters, *rest = nnx.split(module, nnx.All(nnx.Param, used), ...)

    def whole(branch: Branch) -> Any:
        def run(trained: Any, constant: Any) -> tuple[Array, Any]:
            return branch(nnx.merge(graphdef, trained[0], *constant[0]), trained[1], constant[1])

        return run

    runs = [whole(branch) for branch in branches]

    @jax.custom_vjp
    def value(trained: Any, constant: Any, index: Array) -> tuple[Array, Any]:
        return jax.lax.switch(index, runs, trained, constant)

    def forward(trained: Any, constant: Any, index: Array) -> tuple[tuple[Array, Any], Any]:
        eager = [jax.value_and_grad(run, has_aux=True) for run in runs]
        return jax.lax.switch(index, eager, trained, constant)

    def backward(gradient: Any, slopes: tuple[Array, Any]) -> tuple[Any, None, None]:
        return jax.tree.map(lambda g: (slopes[0] * g).astype(g.dtype), gradient), None, None

    value.defvjp(forward, backward)
    return value((parameters, inputs), (rest, given), index)
