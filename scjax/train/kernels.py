"""Kernels as matrices: which dimensions of a parameter are input and which output; Muon and Adafactor.

A kernel of this house may be stacked over layers and split over heads, ``(layers, embed, 3, heads, head)``.
Optimisers that work on matrices, and the scaling of widths, need to know what is input, what output and what
only lies beside one another.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

from scjax.nn.module import Abstract, axes_of, shapes_of

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
ADAM_RMS = 0.2  # of an update of Adam, which Muon's are scaled to


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The dimensions of a kernel by their role.

    Attributes:
      batch: lie beside one another: layers of a stack; queries, keys and values of a fused projection.
      inputs, outputs: of the linear map.
      stacked: whether it belongs to a stack of layers.
    """

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stacked: bool

    def to_matrices(self, x: jax.Array) -> jax.Array:
        """[..., in, out] from an array of the kernel's shape."""
        sizes = [math.prod(x.shape[d] for d in dims) for dims in (self.inputs, self.outputs)]
        shape = (*(x.shape[d] for d in self.batch), *sizes)
        return x.transpose(*self.batch, *self.inputs, *self.outputs).reshape(shape)

    def from_matrices(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The kernel of ``shape`` that :meth:`to_matrices` made ``x`` from."""
        order = (*self.batch, *self.inputs, *self.outputs)
        back = sorted(range(len(order)), key=order.__getitem__)
        return x.reshape([shape[d] for d in order]).transpose(back)


def kernel_of(path: tuple[Any, ...], axes: tuple[str | None, ...]) -> Kernel | None:
    """The roles of a parameter's dimensions; None for what is no kernel: biases, scales, tables.

    A kernel is called "kernel", as in Flax. Of more than two dimensions, layers aside, the last is the output
    if it leads back to the residual stream ("embed"); else the first is the input.
    """
    own = [d for d, name in enumerate(axes) if name != "layers"]
    if len(own) < 2 or str(getattr(path[-1], "key", path[-1])) != "kernel":
        return None
    if len(own) == 2:
        inputs, outputs = own[:1], own[1:]
    elif axes[own[-1]] == "embed":
        inputs, outputs = own[:-1], own[-1:]
    else:
        inputs, outputs = own[:1], [d for d in own[1:] if axes[d] is not None] or own[1:]
    batch = [d for d in range(len(axes)) if d not in inputs and d not in outputs]
    return Kernel(tuple(batch), tuple(inputs), tuple(outputs), len(own) < len(axes))


def kernels_of(model: Abstract) -> dict[str, Any]:
    """:class:`Kernel` or None for each parameter, in the structure of the parameters."""
    shapes, axes = shapes_of(model)["params"], axes_of(model)["params"]
    return jax.tree_util.tree_map_with_path(lambda path, _, names: kernel_of(path, names), shapes, axes)


def _each(function: Any, kernels: Any, *trees: Any) -> Any:
    """``function(kernel, *leaves)`` over trees of parameters."""
    return jax.tree.map(function, kernels, *trees, is_leaf=lambda x: x is None or isinstance(x, Kernel))


def _automatic(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx``, which reshapes and multiplies what is split over devices, also on a mesh of Explicit axes:
    there the compiler places what lies between its arguments and its results, which are split alike."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        split = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
        meshes = (sharding.mesh for sharding in jax.tree.leaves(split))
        if not any(AxisType.Explicit in mesh.axis_types for mesh in meshes):
            return tx.update(updates, state, params)
        return jax.sharding.auto_axes(tx.update, out_sharding=split)(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


# ---------------------------------------------------------------------------------------------- Muon


def orthogonalise(x: jax.Array) -> jax.Array:
    """[..., m, n]: near U V^T of each matrix U S V^T, its singular values between about 0.7 and 1.2.

    Five steps of a quintic Newton-Schulz iteration, in float32 (Jordan et al. 2024, "Muon").
    """
    a, b, c = NEWTON_SCHULZ
    wide = x.shape[-2] <= x.shape[-1]
    y = x.astype(jnp.float32) if wide else jnp.swapaxes(x, -1, -2).astype(jnp.float32)
    y = y / (jnp.linalg.norm(y, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = y @ jnp.swapaxes(y, -1, -2)
        y = a * y + (b * square + c * square @ square) @ y
    return (y if wide else jnp.swapaxes(y, -1, -2)).astype(x.dtype)


class MuonState(NamedTuple):
    """Momentum, in the structure of the parameters."""

    momentum: Any


def scale_by_muon(kernels: Any) -> optax.GradientTransformation:
    """Nesterov momentum of 0.95, orthogonalised for each layer, and for queries, keys and values, by itself.

    Updates have the size of Adam's, 0.2 a number in the root mean square, so that learning rate and decay
    of AdamW serve (Liu et al. 2025, "Muon is scalable for LLM training").

    Args:
      kernels: :class:`Kernel` by parameter; other parameters must be left out by ``optax.partition``.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        momentum = jax.tree.map(lambda m, g: m + (1 - MOMENTUM) * (g - m), state.momentum, updates)
        ahead = jax.tree.map(lambda m, g: m + (1 - MOMENTUM) * (g - m), momentum, updates)

        def direction(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            kernel = _at(kernels, path)
            y = orthogonalise(kernel.to_matrices(x))
            return kernel.from_matrices(ADAM_RMS * math.sqrt(max(y.shape[-2:])) * y, x.shape)

        return jax.tree_util.tree_map_with_path(direction, ahead), MuonState(momentum)

    return _automatic(optax.GradientTransformation(init, update))


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key.key]
    return tree


# ----------------------------------------------------------------------------------------- Adafactor


def scale_by_adafactor(kernels: Any) -> optax.GradientTransformation:
    """Adam's second moment alone, of a kernel as rows and columns of each of its matrices, whatever its
    dimensions; updates beyond a root mean square of 1 are cut to it (Shazeer and Stern 2018).

    Not scaled by the parameters' own size, so that learning rates mean what they mean for Adam.

    Args:
      kernels: :class:`Kernel` or None by parameter.
    """
    inner = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
    )

    def matrices(tree: Any) -> Any:
        return _each(lambda kernel, x: x if kernel is None else kernel.to_matrices(x), kernels, tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        new, state = inner.update(matrices(updates), state, matrices(updates))
        back = lambda kernel, x, g: x if kernel is None else kernel.from_matrices(x, g.shape)  # noqa: E731
        return _each(back, kernels, new, updates), state

    return _automatic(optax.GradientTransformation(lambda params: inner.init(matrices(params)), update))
