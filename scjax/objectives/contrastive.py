"""Contrast of two views of each cell with all other cells of the batch, at the memory of a part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def info_nce(a_BD: Array, b_BD: Array, weight_B: Array, temperature: float) -> tuple[Array, Array]:
    """-log softmax over the cells j of cos(a_i, b_j) / temperature at j = i, summed over the cells i.

    Args:
      a_BD, b_BD: [B, D], the two views; their lengths do not matter.
      weight_B: float32 [B]. A row of weight 0 takes no part: neither as a cell nor as another's negative.
      temperature: of the softmax.

    Returns:
      ``(sum, weight)`` float32 scalars. The sum is no sum over cells by themselves: a micro-batch contrasts
      its cells among themselves only.

    Source: Gao et al., SimCSE, EMNLP 2021, equation 1.
    """

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)

    a_BD, b_BD = unit(a_BD), unit(b_BD)
    own_B = (a_BD * b_BD).sum(-1) / temperature
    cosine_BB = jnp.einsum("id,jd->ij", a_BD, b_BD, precision="highest")
    logits_BB = jnp.where(weight_B > 0, cosine_BB / temperature, -1e30)
    # a row without weight may have no column of its own; it must stay finite to count for nothing
    total_B = jax.nn.logsumexp(logits_BB, axis=1)
    return jnp.where(weight_B > 0, weight_B * (total_B - own_B), 0.0).sum(), weight_B.sum()


def divide_and_conquer(encode: Callable[[Any], tuple[Any, Any]], rows: Any, n_parts: int) -> tuple[Any, Any]:
    """``encode(rows)`` in parts, of which the backward pass encodes each anew.

    A loss over the outputs of the whole batch, such as :func:`info_nce`, then has its exact gradient while
    the activations of one part exist at a time: by the chain rule dL/dtheta is the sum over rows of
    (dL/dh_i)(dh_i/dtheta), so that once dL/dh is known the parts can be gone through one by one. Randomness
    must be keyed by row, so that a row encoded again is the same.

    Args:
      encode: rows [b, ...] -> ``(outputs [b, ...], sums)``; a row's outputs must depend on that row only.
        It may close over parameters.
      rows: tree of arrays [B, ...].
      n_parts: number of parts; each takes every n-th row, so that each device cuts up its own.

    Returns:
      ``(outputs [B, ...], sums)``: the sums are added up over the parts.

    Raises:
      ValueError: ``n_parts`` does not divide B.

    Source: Zhao et al., CellLM, 2023, "divide and conquer"; Gao et al., GradCache, RepL4NLP 2021.
    """
    size = jax.tree.leaves(rows)[0].shape[0]
    if n_parts < 1 or size % n_parts:
        raise ValueError(f"a batch of {size} cells cannot be encoded in {n_parts} parts of one size")
    if n_parts == 1:
        return encode(rows)
    encode = jax.checkpoint(encode)

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(size // n_parts, n_parts, *x.shape[1:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(size, *x.shape[2:])

    outputs, sums = jax.lax.map(encode, jax.tree.map(cut, rows))
    return jax.tree.map(join, outputs), jax.tree.map(lambda x: x.sum(0), sums)
