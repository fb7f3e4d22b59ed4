"""Softmax attention without scores of all queries and all keys at once.

Rabe and Staats, "Self-attention does not need O(n^2) memory" (2021); Dao et al., "FlashAttention" (NeurIPS
2022), whose backward pass :func:`chunked` has in JAX, for any device. :func:`cudnn` and :func:`splash` call
the kernels of NVIDIA and of JAX's Pallas for TPUs. All three have the arguments of
:func:`scjax.nn.attention.attention`, and compute the cells and heads they are given on one device.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NONE = -1e30  # score of a key that is not seen
CHUNK = 512  # keys at a time


def chunked(q_BSHD: Array, k_BSHD: Array, v_BSHD: Array, key_mask_BS: Array, unknown: int = 0) -> Array:
    """Keys are taken ``CHUNK`` at a time, their scores computed anew in the backward pass.

    Forward and backward hold scores of [B, H, S, CHUNK]. Of the forward pass remain the inputs, the output
    and one number for each query, the logarithm of its softmax's denominator.
    """
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q_BSHD, k_BSHD, v_BSHD))
    out = _chunked(unknown, q * q.shape[-1] ** -0.5, k, v, key_mask_BS)
    return jnp.moveaxis(out, 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(unknown: int, q: Array, k: Array, v: Array, key_mask: Array) -> Array:
    """[B, H, S, D] and a mask [B, S] -> [B, H, S, D]; ``q`` is scaled."""
    return _chunked_forward(unknown, q, k, v, key_mask)[0]


def _chunks(x: Array, axis: int) -> Array:
    """[..., S, ...] -> [n, ..., CHUNK, ...], filled up with zeros at the end."""
    size = min(CHUNK, x.shape[axis])
    n = -(-x.shape[axis] // size)
    x = jnp.pad(x, [(0, n * size - x.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], n, size, *x.shape[axis + 1 :]), axis, 0)


def _together(x: Array, axis: int, length: int) -> Array:
    """The inverse of :func:`_chunks`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _product(pattern: str, a: Array, b: Array) -> Array:
    """Summed in float32, from inputs as narrow as ``b``."""
    return jnp.einsum(pattern, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _seen(unknown: int, k: Array, v: Array, key_mask: Array) -> tuple[Array, Array, Array]:
    """Chunks of the keys that all queries see, of their values, and what is added to their scores."""
    added = jnp.where(_chunks(key_mask[:, unknown:], 1), 0.0, NONE)
    return _chunks(k[:, :, unknown:], 2), _chunks(v[:, :, unknown:], 2), added[:, :, None, None]


def _chunked_forward(unknown: int, q: Array, k: Array, v: Array, key_mask: Array) -> tuple[Array, Any]:
    top = jnp.full_like(q[..., :1], NONE, jnp.float32)
    total, out = jnp.zeros_like(top), jnp.zeros_like(q, jnp.float32)
    if unknown:  # each unknown position sees itself, first of all
        own = _product("bhsd,bhsd->bhs", q[:, :, :unknown], k[:, :, :unknown])[..., None]
        top = top.at[:, :, :unknown].set(own)
        total = total.at[:, :, :unknown].set(1.0)
        out = out.at[:, :, :unknown].set(v[:, :, :unknown].astype(jnp.float32))

    def add(carry: tuple[Array, Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[Any, None]:
        (top, total, out), (k, v, added) = carry, chunk
        scores = _product("bhsd,bhtd->bhst", q, k) + added
        new = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, shrink = jnp.exp(scores - new), jnp.exp(top - new)
        total = total * shrink + weights.sum(-1, keepdims=True)
        return (new, total, out * shrink + _product("bhst,bhtd->bhsd", weights, v)), None

    (top, total, out), _ = jax.lax.scan(add, (top, total, out), _seen(unknown, k, v, key_mask))
    out = (out / total).astype(v.dtype)
    return out, (q, k, v, key_mask, out, top + jnp.log(total))


def _chunked_backward(unknown: int, kept: Any, gradient: Array) -> tuple[Array | None, ...]:
    q, k, v, key_mask, out, lse = kept
    inner = _product("bhsd,bhsd->bhs", gradient, out.astype(jnp.float32))[..., None]

    def add(dq: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        k, v, added = chunk
        weights = jnp.exp(_product("bhsd,bhtd->bhst", q, k) + added - lse)
        dscores = weights * (_product("bhsd,bhtd->bhst", gradient, v) - inner)
        dv, dk = _product("bhst,bhsd->bhtd", weights, gradient), _product("bhst,bhsd->bhtd", dscores, q)
        return dq + _product("bhst,bhtd->bhsd", dscores, k), (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, chunks = jax.lax.scan(add, jnp.zeros_like(q, jnp.float32), _seen(unknown, k, v, key_mask))
    dk, dv = (_together(x, 2, k.shape[2] - unknown) for x in chunks)
    if unknown:
        q_own, k_own, v_own, g_own = (x[:, :, :unknown].astype(jnp.float32) for x in (q, k, v, gradient))
        weight = jnp.exp((q_own * k_own).sum(-1, keepdims=True) - lse[:, :, :unknown])
        dscore = weight * ((g_own * v_own).sum(-1, keepdims=True) - inner[:, :, :unknown])
        dq = dq.at[:, :, :unknown].add(dscore * k_own)
        dk = jnp.concatenate([(dscore * q_own).astype(dk.dtype), dk], axis=2)
        dv = jnp.concatenate([(weight * g_own).astype(dv.dtype), dv], axis=2)
    return dq.astype(q.dtype), dk, dv, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def cudnn_can(q_BSHD: Array) -> bool:
    """Whether cuDNN's attention has a kernel for these queries: 16 bits, heads of 8, 16, ... 128."""
    return q_BSHD.dtype in (jnp.bfloat16, jnp.float16) and q_BSHD.shape[-1] in range(8, 129, 8)


def cudnn(q_BSHD: Array, k_BSHD: Array, v_BSHD: Array, key_mask_BS: Array, unknown: int = 0) -> Array:
    """The fused kernels of cuDNN, by ``jax.nn.dot_product_attention``.

    They know padding at the end only: padding anywhere else is moved there, which no query notices. Of a
    cell's keys the kernels then skip all blocks that are padding. For unknown positions the queries are
    split. Known ones see the known keys. Unknown ones see all keys under one mask for all cells and heads:
    the kernels can return the softmax's denominator, with which the own key could be added
    afterwards, but drop its gradient (JAX 0.10 to 0.12).

    Raises:
      NotImplementedError: a dtype or head width without a kernel, see :func:`cudnn_can`.
    """
    known = key_mask_BS[:, unknown:]
    order = jnp.argsort(~known, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    k, v = (_reorder(x[:, unknown:], order, back) for x in (k_BSHD, v_BSHD))
    lengths = known.sum(1, dtype=jnp.int32)
    told = _cudnn(q_BSHD[:, unknown:], k, v, lengths)
    if not unknown:
        return told
    k, v = (jnp.concatenate([x[:, :unknown], y], axis=1) for x, y in ((k_BSHD, k), (v_BSHD, v)))
    sees = np.concatenate([np.eye(unknown, dtype=bool), np.ones((unknown, known.shape[1]), bool)], axis=1)
    asked = _cudnn(q_BSHD[:, :unknown], k, v, lengths + unknown, sees)
    return jnp.concatenate([asked, told], axis=1)


def _cudnn(q: Array, k: Array, v: Array, lengths: Array, sees: np.ndarray | None = None) -> Array:
    """``sees`` [queries, keys]: who sees whom, the same in all cells and heads; None for all the keys."""
    # for the backward pass JAX asks for even numbers of queries and of keys
    length, mask = q.shape[1], None
    if sees is not None:
        odd = [(0, n % 2) for n in sees.shape]
        mask = jnp.asarray(np.pad(sees, odd, constant_values=True))[None, None]
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :length]


@jax.custom_vjp
def _reorder(x_BSHD: Array, order_BS: Array, back_BS: Array) -> Array:
    """Positions in another order; ``back`` is the inverse of ``order``, so that no gradient is scattered."""
    return jnp.take_along_axis(x_BSHD, order_BS[:, :, None, None], axis=1)


_reorder.defvjp(
    lambda x, order, back: (_reorder(x, order, back), (order, back)),
    lambda kept, gradient: (_reorder(gradient, kept[1], kept[0]), None, None),
)


def splash(q_BSHD: Array, k_BSHD: Array, v_BSHD: Array, key_mask_BS: Array, unknown: int = 0) -> Array:
    """JAX's splash attention for TPUs, a Pallas kernel; interpreted, and slow, on other devices. It skips
    blocks that no query may see, such as those of unknown keys."""
    return jax.lax.platform_dependent(
        *(q_BSHD, k_BSHD, v_BSHD, key_mask_BS),
        tpu=partial(_splash, unknown, False),
        default=partial(_splash, unknown, True),
    )


def _splash(unknown: int, interpret: bool, q: Array, k: Array, v: Array, key_mask: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, n_heads, width = q.shape[1:]
    # the block that pads least, of those the widest
    padded, negative = min((-(-length // size) * size, -size) for size in (128, 256, 512))
    size, fill = -negative, padded - length
    mask: Any = masks.FullMask((padded, padded))
    if unknown:
        sees = np.eye(padded, dtype=bool)
        sees[:, unknown:] = True
        mask = masks.NumpyMask(sees)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": size for name in names}
    attend = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * n_heads),
        block_sizes=kernel.BlockSizes(**sizes),
        interpret=interpret,
    )
    # who shares a segment sees each other; an unknown position sees itself even where it is padding
    valid = key_mask.at[:, :unknown].set(True).astype(jnp.int32)
    segments = kernel.SegmentIds(
        q=jnp.ones((len(valid), padded), jnp.int32), kv=jnp.pad(valid, ((0, 0), (0, fill)))
    )
    dtype = v.dtype
    q, k, v = (
        jnp.moveaxis(jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))), 2, 1) for x in (q * width**-0.5, k, v)
    )
    out = jax.vmap(attend)(q, k, v, segments)
    return jnp.moveaxis(out, 1, 2)[:, :length].astype(dtype)
