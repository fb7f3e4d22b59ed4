"""Attention linear in the number of tokens: FAVOR+ (Choromanski et al., ICLR 2021).

softmax(q k) is replaced by the product of positive random features of q and of k, so that keys and values
can be summed before a query meets them. Sequences of all 20,000 genes become affordable.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.nn.attention import on_each_device
from scjax.nn.layers import ACTIVATIONS, Stack, dropout, fold, layer_norm
from scjax.nn.linear import LinearGeneral, linear
from scjax.nn.module import Buffer
from scjax.parallel import current

Stabiliser = Literal["head", "global"]
PadMask = Literal["keys", "values"]
Backend = Literal["auto", "einsum", "headwise"]
EPSILON = 1e-4  # added to every feature, so that no query is left without keys


def n_features(d_head: int) -> int:
    """Random features a head: d ln d, the number that the published systems use (266 for 64)."""
    return int(d_head * math.log(d_head))


def favor(
    q_BSHD: Array,
    k_BSHD: Array,
    v_BSHD: Array,
    projection_MD: Array,
    key_mask_BS: Array | None = None,
    *,
    stabiliser: Stabiliser = "head",
    mask: PadMask = "keys",
    backend: Backend = "auto",
) -> Array:
    """The softmax kernel approximated with M positive orthogonal random features.

    The features are S x M numbers a head, four times the queries themselves; the backward pass computes
    them anew, so that they exist for one layer at a time.

    Args:
      q_BSHD, k_BSHD, v_BSHD: [B, S, H, D], any float dtype; features are computed in float32.
      projection_MD: float32 [M, D], from :func:`draw_projection`.
      key_mask_BS: bool [B, S], False where a key is padding; None for no padding. A cell needs one True
        at least.
      stabiliser: what is subtracted in the exponent of the keys' features. "head": the maximum over
        the keys of a cell and head. "global": the maximum over the whole batch, padding included, as
        scBERT, CellLM and scFoundation were trained; because of the epsilon it makes a cell's result
        depend on its batch.
      mask: what padding is left out of: "keys", both sums over keys; "values", as CellLM was trained,
        the numerator only, so that padding thins out the result.
      backend: "einsum" computes all cells and heads at once; "headwise" maps over those that lie on each
        device, so that a head's features stay in a core's cache; "auto" takes "headwise" on CPUs, where it is
        about twice as fast, else "einsum". Without a layout, where several devices are about, and for a
        batch that the mesh does not divide it takes "einsum" too.

    Returns:
      [B, S, H, D] in the dtype of ``v_BSHD``.
    """
    layout = current()
    if backend == "auto":
        placed = jax.device_count() == 1 if layout is None else len(q_BSHD) % layout.slices == 0
        backend = "headwise" if jax.default_backend() == "cpu" and placed else "einsum"
    if backend not in ("einsum", "headwise"):
        raise ValueError(f'backend is "auto", "einsum" or "headwise", not {backend!r}')
    compute = partial(_cells, stabiliser=stabiliser, mask=mask, mapped=backend == "headwise")
    if backend == "einsum" or layout is None or layout.mesh.size == 1:
        return compute(q_BSHD, k_BSHD, v_BSHD, key_mask_BS, projection_MD)
    compute = partial(compute, spread=layout.mesh.axis_names)
    key_mask_BS = jnp.ones(k_BSHD.shape[:2], bool) if key_mask_BS is None else key_mask_BS
    return on_each_device(compute, q_BSHD, k_BSHD, v_BSHD, key_mask_BS, shared=(projection_MD,))


def _cells(
    q_BSHD: Array,
    k_BSHD: Array,
    v_BSHD: Array,
    key_mask_BS: Array | None,
    projection_MD: Array,
    *,
    stabiliser: Stabiliser,
    mask: PadMask,
    mapped: bool,
    spread: tuple[str, ...] = (),
) -> Array:
    """:func:`favor` of all cells, or of a device's where the batch is ``spread`` over these mesh axes."""
    scale = q_BSHD.shape[-1] ** -0.25
    q, k = (jnp.moveaxis(x, 2, 1).astype(jnp.float32) * scale for x in (q_BSHD, k_BSHD))  # B H S D
    v = jnp.moveaxis(v_BSHD, 2, 1).astype(jnp.float32)
    valid = jnp.ones(k.shape[::2], bool) if key_mask_BS is None else key_mask_BS  # B S
    if key_mask_BS is not None:
        v = jnp.where(valid[:, None, :, None], v, 0)
    counted = valid if mask == "keys" else jnp.ones_like(valid)

    top = None
    if stabiliser == "global":
        if mapped:
            top = jax.lax.map(lambda k: _products(k, projection_MD).max(), k.reshape(-1, *k.shape[2:])).max()
        else:
            top = _products(k, projection_MD).max()
        top = jax.lax.stop_gradient(top)
        top = jax.lax.pmax(top, spread) if spread else top

    @jax.checkpoint
    def heads(q: Array, k: Array, v: Array, counted: Array) -> Array:
        return _favor(q, k, v, counted, projection_MD, top)

    if mapped:
        # one loop over cells, one over heads: a single one would need the mask once for each head
        out = jax.lax.map(
            lambda cell: jax.lax.map(lambda head: heads(*head, cell[3]), cell[:3]), (q, k, v, counted)
        )
    else:
        out = heads(q, k, v, counted[:, None])
    return jnp.moveaxis(out, 1, 2).astype(v_BSHD.dtype)


def _products(x: Array, projection_MD: Array) -> Array:
    return jnp.einsum("...sd,md->...sm", x, projection_MD)


def _favor(q: Array, k: Array, v: Array, counted: Array, projection_MD: Array, top: Array | None) -> Array:
    """:func:`favor` of [..., S, D]; keys where ``counted`` [..., S] is False are left out of both sums."""

    def features(x: Array, products: Array, top: Array) -> Array:
        # the stabiliser matters only through EPSILON; like the authors of FAVOR+ we give it no gradient
        top = jax.lax.stop_gradient(top)
        return jnp.exp(products - (x * x).sum(-1, keepdims=True) / 2 - top) + EPSILON

    products = _products(k, projection_MD)
    if top is None:
        top = products.max(-1, keepdims=True)
        top = jnp.where(counted[..., None], top, -jnp.inf).max(-2, keepdims=True)
    phi_k = jnp.where(counted[..., None], features(k, products, top), 0)
    context = jnp.einsum("...sm,...sd->...md", phi_k, v)
    total = phi_k.sum(-2)
    products = _products(q, projection_MD)
    phi_q = features(q, products, products.max(-1, keepdims=True))
    out = jnp.einsum("...sm,...md->...sd", phi_q, context)
    return out / jnp.einsum("...sm,...m->...s", phi_q, total)[..., None]


def draw_projection(key: Array, m: int, d: int) -> Array:
    """float32 [m, d]: rows orthogonal within each block of d, of the lengths of Gaussian vectors."""
    directions, lengths = jax.random.split(key)
    blocks, r = jnp.linalg.qr(jax.random.normal(directions, (-(-m // d), d, d)))
    # the factorisation fixes signs by a rule; without this its rows would lean to one side of the space
    blocks = blocks * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None]
    orthogonal = jnp.swapaxes(blocks, 1, 2).reshape(-1, d)[:m]
    return orthogonal * jnp.linalg.norm(jax.random.normal(lengths, (m, d)), axis=1, keepdims=True)


def redraw(projection_LMD: Array, key: Array, calls: Array, every: int) -> Array:
    """New projections for all layers after every ``every`` calls (0: never), else those given.

    Args:
      projection_LMD: float32 [layers, M, D].
      key: of the model; the draw is a function of it and of how often was drawn before.
      calls: int32, training steps so far.
      every: calls between two draws.
    """
    if not every:
        return projection_LMD
    n_layers, m, d = projection_LMD.shape

    def draw() -> Array:
        keys = jax.random.split(jax.random.fold_in(key, calls // every), n_layers)
        return jax.vmap(lambda k: draw_projection(k, m, d))(keys)

    return jax.lax.cond((calls > 0) & (calls % every == 0), draw, lambda: projection_LMD)


def count_call(stack: Stack, calls: Buffer, key: Array, every: int) -> None:
    """Counts a training call of a stack of Performer blocks, whose projections are drawn anew where due."""
    blocks: Any = stack.blocks
    projection = blocks.attention.projection
    projection[...] = redraw(projection[...], key, calls[...], every)
    calls[...] = calls[...] + 1


class PerformerAttention(nnx.Module):
    """Multi-head FAVOR+ attention; its inner width n_heads * d_head is free of ``d_model``."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int,
        *,
        qkv_bias: bool,
        stabiliser: Stabiliser,
        mask: PadMask,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.stabiliser, self.mask = stabiliser, mask
        self.qkv = LinearGeneral(
            d_model,
            (3, n_heads, d_head),
            use_bias=qkv_bias,
            dtype=dtype,
            rngs=rngs,
            kernel_metadata={"axes": ("embed", None, "heads", "head")},
            bias_metadata={"axes": (None, "heads", "head")},
        )
        self.out = LinearGeneral(
            (n_heads, d_head),
            d_model,
            axis=(-2, -1),
            dtype=dtype,
            rngs=rngs,
            kernel_metadata={"axes": ("heads", "head", "embed")},
            bias_metadata={"axes": ("embed",)},
        )
        self.projection = Buffer(draw_projection(rngs.params(), n_features(d_head), d_head))

    def __call__(self, x_BSE: Array, key_mask_BS: Array | None) -> Array:
        qkv = self.qkv(x_BSE)
        q, k, v = (qkv[:, :, i] for i in range(3))
        return self.out(
            favor(q, k, v, self.projection[...], key_mask_BS, stabiliser=self.stabiliser, mask=self.mask)
        )


class PerformerBlock(nnx.Module):
    """One pre-norm Performer layer: FAVOR+ attention, then a feed-forward layer with the exact GELU."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int,
        d_ff: int,
        *,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        stabiliser: Stabiliser = "head",
        mask: PadMask = "keys",
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if stabiliser not in ("head", "global"):
            raise ValueError(f'stabiliser is "head" or "global", not {stabiliser!r}')
        if mask not in ("keys", "values"):
            raise ValueError(f'mask is "keys" or "values", not {mask!r}')
        self.rate = dropout
        self.attention = PerformerAttention(
            d_model,
            n_heads,
            d_head,
            qkv_bias=qkv_bias,
            stabiliser=stabiliser,
            mask=mask,
            dtype=dtype,
            rngs=rngs,
        )
        self.up = linear(d_model, d_ff, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = linear(d_ff, d_model, ("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(d_model, rngs=rngs)
        self.norm2 = layer_norm(d_model, rngs=rngs)

    def __call__(self, x_BSE: Array, key_mask_BS: Array | None = None, keys: Array | None = None) -> Array:
        """``keys``: dropout keys [B] of this layer, or None."""
        drop = lambda x, site: dropout(x, self.rate, fold(keys, site))  # noqa: E731
        x = x_BSE
        x = x + drop(self.attention(self.norm1(x).astype(x.dtype), key_mask_BS), 0)
        hidden = ACTIVATIONS["gelu"](self.up(self.norm2(x).astype(x.dtype)))
        return x + drop(self.down(drop(hidden, 1)), 2)
