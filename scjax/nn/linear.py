"""Dense layers: products with weights that may be spread over devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from scjax.parallel.layout import current, reduced

LECUN = nnx.initializers.lecun_normal()
Shardings = tuple[NamedSharding, NamedSharding] | None


def linear(
    n_in: int,
    n_out: int,
    axes: tuple[str | None, str | None],
    *,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    dtype: Any = None,
    kernel_init: Callable[..., Array] = LECUN,
) -> nnx.Linear:
    """A dense layer whose kernel and bias carry logical axis names."""
    return Linear(
        n_in,
        n_out,
        use_bias=use_bias,
        dtype=dtype,
        rngs=rngs,
        kernel_init=kernel_init,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
    )


class Linear(nnx.Linear):
    """[..., n_in] -> [..., n_out], see :func:`product`; with an adapter where :mod:`scjax.finetune.lora` has
    put one: ``lora_a`` [*in, r] and ``lora_b`` [r, *out], whose product is added to the kernel."""

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        return _apply(self, x, 1)


class LinearGeneral(nnx.LinearGeneral):
    """The last dimensions of the input become others, see :func:`product` and :class:`Linear`."""

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        return _apply(self, x, len(self.in_features))


def _apply(layer: Any, x: Array, n_in: int) -> Array:
    kernel, bias = layer.kernel[...], None if layer.bias is None else layer.bias[...]
    dtype = layer.dtype or jnp.promote_types(x.dtype, kernel.dtype)
    x = x.astype(dtype)
    y = product(x, kernel, bias, layer.kernel.get_metadata().get("axes"), n_in)
    if not hasattr(layer, "lora_a"):
        return y
    down, up = (product_of(v) for v in (layer.lora_a, layer.lora_b))
    return y + layer.lora_scale * up(down(x, n_in), 1)


def product_of(variable: nnx.Variable[Array]) -> Callable[[Array, int], Array]:
    """:func:`product` with a variable that carries its axes."""
    return lambda x, n_in: product(x, variable[...], None, variable.get_metadata().get("axes"), n_in)


def product(
    x: Array, kernel: Array, bias: Array | None, axes: tuple[str | None, ...] | None = None, n_in: int = 1
) -> Array:
    """x kernel + bias, over the last ``n_in`` dimensions of ``x`` and the first of ``kernel``.

    On a mesh the kernel is gathered over ``fsdp`` here, in the dtype of ``x``, and gathered again in the
    backward pass: of a stack of layers one is gathered at a time, and none is kept. The gradients of kernel
    and bias are summed up and reduced over devices in float32, whatever the dtype of ``x``.

    Args:
      x: [..., *in]; its dtype is that of the product.
      kernel: float32 [*in, *out].
      bias: float32 [*out], or None.
      axes: logical names of the kernel's dimensions, see :mod:`scjax.parallel.rules`.
      n_in: number of dimensions of ``in``.

    Returns:
      [..., *out] in the dtype of ``x``.
    """
    layout = current()
    shardings = layout.split(kernel.shape, axes) if layout and axes else None
    # by this name the remat policy "dots" keeps it, see scjax.nn.layers.Stack
    return checkpoint_name(_product(x, kernel, bias, n_in, shardings), "product")


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x: Array, kernel: Array, bias: Array | None, n_in: int, shardings: Shardings) -> Array:
    contracted = tuple(range(x.ndim - n_in, x.ndim)), tuple(range(n_in))
    y = jax.lax.dot_general(x, _gathered(kernel, x.dtype, shardings), (contracted, ((), ())))
    return y if bias is None else y + bias.astype(y.dtype)


def _gathered(kernel: Array, dtype: Any, shardings: Shardings) -> Array:
    if shardings is None:
        return kernel.astype(dtype)
    split, gathered = shardings
    if kernel.dtype != dtype:  # pinned, or the compiler would gather first and cast then
        kernel = jax.lax.with_sharding_constraint(kernel.astype(dtype), split)
    return jax.lax.with_sharding_constraint(kernel, gathered)


def _forward(
    x: Array, kernel: Array, bias: Array | None, n_in: int, shardings: Shardings
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return _product(x, kernel, bias, n_in, shardings), (x, kernel, bias)


def _backward(
    n_in: int, shardings: Shardings, kept: tuple[Array, Array, Array | None], gradient: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = kept
    batch, n_out = tuple(range(x.ndim - n_in)), kernel.ndim - n_in
    contracted = tuple(range(gradient.ndim - n_out, gradient.ndim)), tuple(range(n_in, kernel.ndim))
    dx = jax.lax.dot_general(gradient, _gathered(kernel, x.dtype, shardings), (contracted, ((), ())))
    dkernel = jax.lax.dot_general(x, gradient, ((batch, batch), ((), ())), preferred_element_type=jnp.float32)
    if shardings is not None:
        dkernel = reduced(dkernel, *shardings)
    dbias = None if bias is None else gradient.astype(jnp.float32).sum(batch).astype(bias.dtype)
    return dx, dkernel.astype(kernel.dtype), dbias


_product.defvjp(_forward, _backward)
