"""Classification over a whole vocabulary of genes, without its logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from scjax.parallel.layout import current, rows


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def linear_cross_entropy(
    x_BKD: Array,
    table_VD: Array,
    bias_V: Array,
    target_BK: Array,
    weight_BK: Array,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """Cross-entropy of a softmax over the rows of a table, of positions that are given by weights.

    The logits ``x table^T + bias`` of B x K positions over a vocabulary are far larger than all else in a
    training step. Here they exist for ``chunk`` of the K positions at a time, and their gradient is
    worked out while they do: nothing of size B x K x V is kept, and nothing is computed twice. A chunk in
    which no position has a weight is skipped, so positions with weights should come first.

    Args:
      x_BKD: [B, K, D], any float dtype; that of the matrix products, which add up in float32.
      table_VD: [V, D]; may be split over a mesh along V.
      bias_V: [V].
      target_BK: int32 [B, K], 0 .. V - 1.
      weight_BK: float32 [B, K]; 0 leaves a position out. It gets no gradient.
      chunk: positions of each cell at a time; None for as many as keep the logits of a device in a
        processor's cache, or at a quarter of a gigabyte of an accelerator's memory.

    Returns:
      ``(sum, correct)`` float32 scalars, both weighted: the sum of the cross-entropies, and the number of
      positions where no class scores higher than the target (without a gradient).
    """
    return _over_chunks(x_BKD, table_VD, bias_V, target_BK, weight_BK, chunk, gradients=False)[0]


def _over_chunks(
    x_BKD: Array,
    table_VD: Array,
    bias_V: Array,
    target_BK: Array,
    weight_BK: Array,
    chunk: int | None,
    *,
    gradients: bool,
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    b, k, d = x_BKD.shape
    layout = current()
    slices = layout.slices if layout and b % layout.slices == 0 else 1
    if chunk is None:
        elements = (2**22 if jax.default_backend() == "cpu" else 2**26) * (layout.mesh.size if layout else 1)
        chunk = elements // (b * table_VD.shape[0])
    chunk = min(max(chunk, 1), k)
    n = -(-k // chunk)
    table = table_VD.astype(x_BKD.dtype)
    classes = jnp.arange(table.shape[0])

    def one(x: Array, target: Array, weight: Array) -> tuple[Array, Array, tuple[Array, ...]]:
        logits = jnp.einsum("bkd,vd->bkv", x, table, preferred_element_type=jnp.float32)
        logits = logits + bias_V.astype(jnp.float32)
        # compared with, not looked up: the classes may be spread over devices
        hit = classes == target[..., None]
        top = logits.max(-1)
        exp = jnp.exp(logits - top[..., None])
        total = exp.sum(-1)
        own = jnp.where(hit, logits, 0.0).sum(-1)
        loss = (weight * (jnp.log(total) + top - own)).sum()
        correct = (weight * (own >= top)).sum()
        if not gradients:
            return loss, correct, ()
        dlogits = exp * (weight / total)[..., None] - jnp.where(hit, weight[..., None], 0.0)
        dbias = sliced(dlogits).sum((1, 2))
        dlogits = dlogits.astype(x.dtype)
        dx = jnp.einsum("bkv,vd->bkd", dlogits, table)
        dtable = jnp.einsum("rbkv,rbkd->rvd", sliced(dlogits), sliced(x), preferred_element_type=jnp.float32)
        return loss, correct, (dx, dtable, dbias)

    def sliced(values: Array) -> Array:
        # each slice of the batch has sums of its own, so that devices add up theirs once and not per chunk
        return rows(values.reshape(slices, b // slices, *values.shape[1:]), whole=False)

    def step(carry: Any, this: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        x, target, weight = this

        def work(carry: Any) -> tuple[Any, Any]:
            loss, correct, found = one(x, target, weight)
            (losses, corrects), sums = carry
            sums = tuple(a + b for a, b in zip(sums, found[1:], strict=True))
            return ((losses + loss, corrects + correct), sums), found[:1]

        def skip(carry: Any) -> tuple[Any, Any]:
            return carry, ((jnp.zeros_like(x),) if gradients else ())

        return jax.lax.cond((weight != 0).any(), work, skip, carry)

    def cut(values: Array) -> Array:
        padding = ((0, 0), (0, n * chunk - k)) + ((0, 0),) * (values.ndim - 2)
        pieces = jnp.pad(values, padding).reshape(b, n, chunk, *values.shape[2:])
        return jnp.moveaxis(pieces, 1, 0)

    zero = jnp.zeros((), jnp.float32)
    sums: tuple[Array, ...] = ()
    if gradients:
        shapes = (table.shape, bias_V.shape)
        sums = tuple(rows(jnp.zeros((slices, *shape), jnp.float32), whole=False) for shape in shapes)
    pieces = (cut(x_BKD), cut(target_BK), cut(weight_BK.astype(jnp.float32)))
    ((loss, correct), sums), each = jax.lax.scan(step, ((zero, zero), sums), pieces)
    if not gradients:
        return (loss, correct), ()
    dx = jnp.moveaxis(each[0], 0, 1).reshape(b, n * chunk, d)[:, :k]
    dtable, dbias = (total.sum(0) for total in sums)
    return (loss, correct), (dx, dtable.astype(table_VD.dtype), dbias.astype(bias_V.dtype))


def _forward(
    x: Array, table: Array, bias: Array, target: Array, weight: Array, chunk: int | None
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    return _over_chunks(x, table, bias, target, weight, chunk, gradients=True)


def _backward(
    chunk: int | None, gradients: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    scale, _ = cotangents
    return (*((scale * g).astype(g.dtype) for g in gradients), None, None)


linear_cross_entropy.defvjp(_forward, _backward)
