"""Blocks that the systems share: transformer block, scanned stack, dropout by row, small MLPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.nn.attention import Backend, attention
from scjax.nn.linear import LECUN, LinearGeneral, linear
from scjax.parallel.layout import current, rows

Remat = Literal["auto", "none", "dots", "full"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "leaky_relu": jax.nn.leaky_relu,
}


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last axis, in float32 whatever the dtype of its input."""

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        assert self.scale is not None and self.bias is not None  # by default both are there
        return _layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


def layer_norm(n: int, *, epsilon: float = 1e-5, rngs: nnx.Rngs) -> LayerNorm:
    """LayerNorm computed in float32 whatever the dtype of its input."""
    return LayerNorm(
        n,
        epsilon=epsilon,
        rngs=rngs,
        scale_metadata={"axes": ("embed",)},
        bias_metadata={"axes": ("embed",)},
    )


def _mean(x: Array) -> Array:
    """Mean over the last axis, which stays."""
    if jax.default_backend() != "cpu":
        return x.mean(-1, keepdims=True)
    # on a CPU the compiler adds up a row number by number, but a product with a vector many at a time
    return jnp.matmul(x, jnp.full((x.shape[-1], 1), 1 / x.shape[-1], x.dtype), precision="highest")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Any]:
    wide = x.astype(jnp.float32)
    mean = _mean(wide)
    centred = wide - mean
    factor = jax.lax.rsqrt(_mean(centred * centred) + epsilon)
    return centred * factor * scale + bias, (x, scale, mean, factor)


def _layer_norm_backward(epsilon: float, kept: Any, gradient: Array) -> tuple[Array, Array, Array]:
    # by hand: three passes over the input instead of the seven that the compiler derives
    x, scale, mean, factor = kept
    normal = (x.astype(jnp.float32) - mean) * factor
    inner = gradient * scale
    dx = factor * (inner - _mean(inner) - normal * _mean(inner * normal))
    rows = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (gradient * normal).sum(rows), gradient.sum(rows)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def dropout(x: Array, rate: float, keys: Array | None) -> Array:
    """Drops entries of each cell by that cell's own key.

    Whether an entry stays is a hash of the key and the entry's place in the cell. Dropout needs no more
    than numbers that look independent; the bits of the generator itself cost more than the layer.

    Args:
      x: [B, ...].
      rate: probability of dropping.
      keys: keys [B], or None for none (evaluation).
    """
    if keys is None or rate == 0.0:
        return x
    data = jax.random.key_data(keys).reshape(keys.shape[0], *(1,) * (x.ndim - 1), -1)
    place = jax.lax.iota(jnp.uint32, math.prod(x.shape[1:])).reshape(x.shape[1:])
    bits = _mix(_mix(place ^ data[..., 0]) + data[..., -1])
    return jnp.where(bits >= jnp.uint32(rate * 2**32), x / (1.0 - rate), 0).astype(x.dtype)


def _mix(x: Array) -> Array:
    """A bijection of uint32, each bit of all bits (C. Wellons, "Prospecting for hash functions")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def fold(keys: Array | None, data: int | Array) -> Array | None:
    """Independent keys for another layer or another place of dropout."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, data)


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        backend: Backend,
        dtype: Any,
        kernel_init: Callable[..., Array] = LECUN,
        rngs: nnx.Rngs,
    ):
        if d_model % n_heads:
            raise ValueError(f"n_heads = {n_heads} does not divide d_model = {d_model}")
        head = d_model // n_heads
        self.backend = backend
        self.qkv = LinearGeneral(
            d_model,
            (3, n_heads, head),
            dtype=dtype,
            rngs=rngs,
            kernel_init=kernel_init,
            kernel_metadata={"axes": ("embed", None, "heads", "head")},
            bias_metadata={"axes": (None, "heads", "head")},
        )
        self.out = LinearGeneral(
            (n_heads, head),
            d_model,
            axis=(-2, -1),
            dtype=dtype,
            rngs=rngs,
            kernel_init=kernel_init,
            kernel_metadata={"axes": ("heads", "head", "embed")},
            bias_metadata={"axes": ("embed",)},
        )

    def __call__(
        self, x_BSE: Array, key_mask_BS: Array, *, unknown: int = 0, project_unknown: bool = True
    ) -> Array:
        """``unknown``: see :func:`attention`; without ``project_unknown`` the first ``unknown`` positions get
        the heads' outputs side by side, not projected."""
        qkv = self.qkv(x_BSE)
        q, k, v = (qkv[:, :, i] for i in range(3))
        heads = attention(q, k, v, key_mask_BS, unknown=unknown, backend=self.backend)
        if not unknown or project_unknown:
            return self.out(heads)
        plain = heads[:, :unknown].reshape(*heads.shape[:1], unknown, -1)
        return jnp.concatenate([plain, self.out(heads[:, unknown:])], axis=1)


class Block(nnx.Module):
    """One transformer layer, post-norm (as in scGPT, BERT) or pre-norm.

    ``dropout`` acts on what attention and feed-forward add to the residual stream and, unless
    ``inner_dropout`` says otherwise, within the feed-forward layer (as in torch; BERT has none there).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        *,
        norm: Literal["post", "pre"] = "post",
        activation: str = "relu",
        dropout: float = 0.0,
        inner_dropout: float | None = None,
        epsilon: float = 1e-5,
        backend: Backend = "auto",
        dtype: Any = None,
        kernel_init: Callable[..., Array] = LECUN,
        rngs: nnx.Rngs,
    ):
        if norm not in ("post", "pre"):
            raise ValueError(f'norm is "post" or "pre", not {norm!r}')
        self.norm, self.rate, self.activation = norm, dropout, activation
        self.inner_rate = dropout if inner_dropout is None else inner_dropout
        how: dict[str, Any] = {"dtype": dtype, "kernel_init": kernel_init, "rngs": rngs}
        self.attention = Attention(d_model, n_heads, backend=backend, **how)
        self.up = linear(d_model, d_ff, ("embed", "mlp"), **how)
        self.down = linear(d_ff, d_model, ("mlp", "embed"), **how)
        self.norm1 = layer_norm(d_model, epsilon=epsilon, rngs=rngs)
        self.norm2 = layer_norm(d_model, epsilon=epsilon, rngs=rngs)

    def feed_forward(self, x: Array, keys: Array | None) -> Array:
        hidden = ACTIVATIONS[self.activation](self.up(x))
        return self.down(dropout(hidden, self.inner_rate, fold(keys, 0)))

    def __call__(
        self, x_BSE: Array, key_mask_BS: Array, keys: Array | None = None, **attention: Any
    ) -> Array:
        """``keys``: dropout keys [B] of this layer, or None; ``attention``: see :class:`Attention`."""
        drop = lambda x, site: dropout(x, self.rate, fold(keys, site))  # noqa: E731
        x = x_BSE
        if self.norm == "post":
            x = self.norm1(x + drop(self.attention(x, key_mask_BS, **attention), 1)).astype(x.dtype)
            return self.norm2(x + drop(self.feed_forward(x, keys), 2)).astype(x.dtype)
        x = x + drop(self.attention(self.norm1(x).astype(x.dtype), key_mask_BS, **attention), 1)
        return x + drop(self.feed_forward(self.norm2(x).astype(x.dtype), keys), 2)


class Stack(nnx.Module):
    """``n_layers`` equal blocks with stacked parameters, run by one scan. On a mesh each layer's kernels are
    gathered where the layer runs, see :func:`scjax.nn.linear.product`.

    Args:
      make_block: builds one block from ``rngs``.
      remat: what the backward pass computes anew: "none" nothing, "dots" all but the outputs of products with
        weights, "full" all of a layer but its input; "auto" what the active layout says, without one "none".
        Scores of attention are computed anew by every backend but "einsum".
    """

    def __init__(
        self,
        n_layers: int,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        *,
        remat: Remat = "auto",
        rngs: nnx.Rngs,
    ):
        if remat not in get_args(Remat):
            raise ValueError(f"remat is one of {', '.join(get_args(Remat))}, not {remat!r}")
        self.n_layers, self.remat = n_layers, remat
        self.blocks = nnx.vmap(make_block)(rngs.split(n_layers))

    def __call__(
        self, x: Array, *context: Any, keys: Array | None = None, layers: int | None = None, **options: Any
    ) -> Array:
        """Runs ``block(x, *context, keys, **options)`` for the first ``layers`` layers (None: all);
        ``keys`` [B] are folded with a layer's number."""
        n = self.n_layers if layers is None else layers
        graphdef, stacked = nnx.split(self.blocks)
        if n < self.n_layers:
            stacked = jax.tree.map(lambda leaf: leaf[:n], stacked)

        def layer(x: Array, this: tuple[Any, Array]) -> tuple[Array, None]:
            variables, number = this
            x = nnx.merge(graphdef, variables)(rows(x), *context, fold(keys, number), **options)
            return rows(x), None

        layout = current()
        remat = self.remat if self.remat != "auto" else layout.remat if layout else "none"
        if remat == "full":
            layer = jax.checkpoint(layer)
        elif remat == "dots":
            layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names("product"))
        return jax.lax.scan(layer, x, (stacked, jnp.arange(n)))[0]


class MLP(nnx.Module):
    """Dense layers with an activation between them."""

    def __init__(
        self, sizes: tuple[int, ...], *, activation: str = "leaky_relu", dtype: Any = None, rngs: nnx.Rngs
    ):
        last = len(sizes) - 2
        names = [("embed", "embed_out" if i < last else None) for i in range(len(sizes) - 1)]
        self.activation = activation
        self.layers = nnx.List(
            [
                linear(a, b, n, dtype=dtype, rngs=rngs)
                for a, b, n in zip(sizes[:-1], sizes[1:], names, strict=True)
            ]
        )

    def __call__(self, x: Array) -> Array:
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else ACTIVATIONS[self.activation](x))
        return x
