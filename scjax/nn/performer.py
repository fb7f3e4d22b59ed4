"""Attention linear in the number of tokens: FAVOR+ (Choromanski et al., ICLR 2021).

softmax(q k) is replaced by the product of positive random features of q and of k, so that keys and values
can be summed before a query meets them. Sequences of all 20,000 genes become affordable.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.nn.layers import ACTIVATIONS, dropout, fold, layer_norm, linear
from scjax.nn.module import Buffer

Stabiliser = Literal["head", "global"]
PadMask = Literal["keys", "values"]
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
) -> Array:
    """The softmax kernel approximated with M positive orthogonal random features.

    Args:
      q_BSHD, k_BSHD, v_BSHD: [B, S, H, D], any float dtype; features are computed in float32.
      projection_MD: float32 [M, D], from :func:`draw_projection`.
      key_mask_BS: bool [B, S], False where a key is padding; None for no padding.
      stabiliser: what is subtracted in the exponent of the keys' features. "head": the maximum over
        the keys of a cell and head. "global": the maximum over the whole batch, as scBERT, CellLM and
        scFoundation were trained; because of the epsilon it makes a cell's result depend on its batch.
      mask: what padding is left out of: "keys", both sums over keys; "values", as CellLM was trained,
        the numerator only, so that padding thins out the result.

    Returns:
      [B, S, H, D] in the dtype of ``v_BSHD``.
    """
    scale = q_BSHD.shape[-1] ** -0.25
    q, k = (jnp.moveaxis(x, 2, 1).astype(jnp.float32) * scale for x in (q_BSHD, k_BSHD))  # B H S D
    v = jnp.moveaxis(v_BSHD, 2, 1)
    valid = None if key_mask_BS is None else key_mask_BS[:, None, :, None]

    def features(x: Array, top: Array, dots: Array) -> Array:
        return jnp.exp(dots - (x * x).sum(-1, keepdims=True) / 2 - top) + EPSILON

    dots_q = jnp.einsum("bhsd,md->bhsm", q, projection_MD)
    phi_q = features(q, dots_q.max(-1, keepdims=True), dots_q)
    dots_k = jnp.einsum("bhsd,md->bhsm", k, projection_MD)
    if stabiliser == "global":
        top = dots_k.max()
    else:
        of_cell = dots_k if valid is None else jnp.where(valid, dots_k, -jnp.inf)
        top = of_cell.max((-1, -2), keepdims=True)
    phi_k = features(k, top, dots_k)
    if valid is not None:
        v = jnp.where(valid, v, 0)
        if mask == "keys":
            phi_k = jnp.where(valid, phi_k, 0)
    context_BHMD = jnp.einsum("bhsm,bhsd->bhmd", phi_k, v.astype(jnp.float32))
    out = jnp.einsum("bhsm,bhmd->bhsd", phi_q, context_BHMD)
    out = out / jnp.einsum("bhsm,bhm->bhs", phi_q, phi_k.sum(2))[..., None]
    return jnp.moveaxis(out, 1, 2).astype(v_BSHD.dtype)


def draw_projection(key: Array, m: int, d: int) -> Array:
    """float32 [m, d]: rows orthogonal within each block of d, of the lengths of Gaussian vectors."""
    directions, lengths = jax.random.split(key)
    blocks = jax.random.normal(directions, (-(-m // d), d, d))
    orthogonal = jnp.swapaxes(jnp.linalg.qr(blocks)[0], 1, 2).reshape(-1, d)[:m]
    return orthogonal * jnp.linalg.norm(jax.random.normal(lengths, (m, d)), axis=1, keepdims=True)


def redraw(projection_LMD: Array, key: Array, calls: Array, every: int) -> Array:
    """New projections for all layers after every ``every`` calls (0: never), else those given.

    Args:
      projection_LMD: float32 [layers, M, D].
      key: of the model; the draw is a function of it and of how often was drawn before.
      calls: int32, training calls so far.
      every: calls between two draws.
    """
    if not every:
        return projection_LMD
    n_layers, m, d = projection_LMD.shape

    def draw() -> Array:
        keys = jax.random.split(jax.random.fold_in(key, calls // every), n_layers)
        return jax.vmap(lambda k: draw_projection(k, m, d))(keys)

    return jax.lax.cond((calls > 0) & (calls % every == 0), draw, lambda: projection_LMD)


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
        self.qkv = nnx.LinearGeneral(
            d_model,
            (3, n_heads, d_head),
            use_bias=qkv_bias,
            dtype=dtype,
            rngs=rngs,
            kernel_metadata={"axes": ("embed", None, "heads", "head")},
            bias_metadata={"axes": (None, "heads", "head")},
        )
        self.out = nnx.LinearGeneral(
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
        q, k, v = (self.qkv(x_BSE)[:, :, i] for i in range(3))
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
