"""Raw counts to model inputs: library size, logarithm, quantile bins."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from scjax.encoding.random import gene_uniform

Tie = Literal["random", "left", "mid"]


def normalize_total(count: Array, depth: Array, target: float = 1e4) -> Array:
    """Counts per ``target`` counts of the cell.

    Args:
      count: float32 [B, L], raw counts.
      depth: float32 [B], total counts of the whole cell (not of the genes at hand). A cell of
        depth 0 stays 0.
      target: library size after normalisation.

    Returns:
      float32 [B, L].
    """
    return count * (target / jnp.maximum(depth, 1.0))[:, None]


def log1p(x: Array) -> Array:
    """log(1 + x), the field's logarithm."""
    return jnp.log1p(x)


def quantile_ranks(value: Array, n_bins: int) -> tuple[Array, Array]:
    """How many of a cell's quantile edges lie below (``r``) and at or below (``l``) each value.

    The ``n_bins - 1`` edges are the quantiles 0, 1/(n_bins-2), ..., 1 of the cell's non-zero values,
    interpolated linearly. Where an edge falls between two order statistics is worked out in
    integers; the original's float64 ``(n-1)*q`` is off by one ulp for some n, which moves single
    edges that coincide with a value.

    Args:
      value: float32 [B, L]; entries that are 0 or less are not expressed and have no part in the
        quantiles.
      n_bins: number of bins, the zero bin included (51 in scGPT).

    Returns:
      ``(r, l)`` int32 [B, L] with 0 <= r <= l and 1 <= l <= n_bins - 1 wherever value > 0; r = l where
      the value lies strictly between two edges.
    """
    n_edges = n_bins - 1
    length = value.shape[-1]
    expressed = value > 0
    n = expressed.sum(-1, dtype=jnp.int32)
    ordered = jnp.sort(jnp.where(expressed, value, jnp.inf), axis=-1)
    step = jnp.arange(n_edges, dtype=jnp.int32)
    position = step * jnp.maximum(n - 1, 0)[:, None]
    low, remainder = position // (n_edges - 1), position % (n_edges - 1)
    high = jnp.minimum(low + 1, length - 1)
    at_low = jnp.take_along_axis(ordered, low, axis=-1)
    at_high = jnp.where(remainder == 0, at_low, jnp.take_along_axis(ordered, high, axis=-1))
    edge = at_low + (at_high - at_low) * (remainder.astype(jnp.float32) / (n_edges - 1))
    edge = jnp.clip(edge, at_low, at_high)

    def edges_below(side: str) -> Array:
        count = partial(jnp.searchsorted, side=side, method="compare_all")
        return jax.vmap(count)(edge, value).astype(jnp.int32)

    return edges_below("left"), edges_below("right")


def bin_quantiles(
    value: Array,
    n_bins: int = 51,
    *,
    tie: Tie = "random",
    keys: Array | None = None,
    gene_id: Array | None = None,
) -> Array:
    """scGPT's value bins: the quantile of a gene's count among the cell's expressed genes.

    A value that equals edges r+1 .. l (ties are the rule among small counts) has the law
    "uniform over the bins r+1, ..., l"; a value strictly between two edges has bin l.

    Args:
      value: float32 [B, L], counts or any increasing function of them; 0 where not expressed.
      n_bins: number of bins, the zero bin included.
      tie: "random" draws from the law above, "left" takes r+1, "mid" its mean rounded down.
      keys: keys [B], one a cell, for ``tie="random"``.
      gene_id: int32 [B, L], for ``tie="random"``.

    Returns:
      float32 [B, L] with whole numbers 1 .. n_bins - 1 where value > 0 and 0 elsewhere.

    Source: Cui et al., Nature Methods 2024, section "Expression values".
    """
    r, l = quantile_ranks(value, n_bins)
    first = jnp.minimum(r + 1, l)
    if tie == "random":
        if keys is None or gene_id is None:
            raise ValueError('tie="random" needs keys and gene_id')
        width = (l - first + 1).astype(jnp.float32)
        offset = jnp.floor(gene_uniform(keys, gene_id) * width).astype(jnp.int32)
        digit = jnp.minimum(first + offset, l)
    elif tie == "left":
        digit = first
    elif tie == "mid":
        digit = (first + l) // 2
    else:
        raise ValueError(f'tie is "random", "left" or "mid", not {tie!r}')
    return jnp.where(value > 0, digit, 0).astype(jnp.float32)
