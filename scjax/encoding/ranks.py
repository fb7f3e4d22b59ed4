"""Rank-value encoding: a cell as the order of its genes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def rank_genes(gene_id: Array, count: Array, median: Array, length: int) -> Array:
    """The expressed genes of each cell, from the most to the least expressed for that gene.

    What is compared is the count divided by the gene's median over a corpus. (That the original first
    normalises counts to 10,000 a cell divides all genes of a cell alike and changes no order, only
    roundings.) Equal quotients are ordered by gene id, so the order of the slots has no part in the result.

    Args:
      gene_id: int32 [B, L]; -1 where padded.
      count: float32 [B, L], raw counts; a gene with 0 or less is not expressed.
      median: float32 [n_genes], median of each gene's non-zero counts per 10,000. A gene without one (0
        or less, infinite or NaN) has no rank and is left out, as in the original.
      length: genes to keep.

    Returns:
      int32 [B, min(L, length)]; -1 where the cell has no more genes.

    Source: Theodoris et al., Nature 2023, section "Rank value encoding".
    """
    divisor = jnp.where((median > 0) & jnp.isfinite(median), median, jnp.inf)
    value = jnp.where(gene_id >= 0, count, 0.0) / divisor[jnp.maximum(gene_id, 0)]
    ranked = value > 0
    keys = jnp.where(ranked, -value, jnp.inf), jnp.where(ranked, gene_id, -1)
    return jax.lax.sort(keys, num_keys=2, is_stable=False)[1][:, :length]
