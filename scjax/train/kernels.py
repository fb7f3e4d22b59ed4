"""Kernels as matrices: which dimensions of a parameter are input and which output; Muon and Adafactor.

A kernel of this house may be stacked over layers and split over heads, ``(layers, embed, 3, heads, head)``.
Optimisers that work on matrices, and the scaling of widths, need to know what is input, what output and what
only lies beside one another.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import optax

from scjax.nn.module import Abstract, axes_of, shapes_of

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


# ---------------------------------------------------------------------------------------------- Muon


def scale_by_muon(kernels: Any) -> optax.GradientTransformation:
    """Optax's Muon (Jordan et al. 2024), of each layer, and of queries, keys and values, by itself.

    Updates have the size of Adam's, 0.2 a number in the root mean square, so that learning rate and decay
    of AdamW serve (Liu et al. 2025, "Muon is scalable for LLM training").

    Args:
      kernels: :class:`Kernel` by parameter; other parameters must be left out by ``optax.partition``.
    """

    def roles(updates: Any) -> Any:
        def role(path: tuple[Any, ...], _: jax.Array) -> optax.contrib.MuonDimensionNumbers:
            kernel = _at(kernels, path)
            return optax.contrib.MuonDimensionNumbers(kernel.inputs, kernel.outputs)

        return jax.tree_util.tree_map_with_path(role, updates)

    def resized(updates: Any, _: Any) -> Any:
        def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            kernel = _at(kernels, path)
            sides = (math.prod(x.shape[d] for d in dims) for dims in (kernel.inputs, kernel.outputs))
            return ADAM_RMS * math.sqrt(max(sides)) * x

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=roles), optax.stateless(resized))


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

    return optax.GradientTransformation(lambda params: inner.init(matrices(params)), update)
