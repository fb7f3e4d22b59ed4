"""Classification of hidden expression bins, and what the gene's name alone tells of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def masked_cross_entropy(logits: Array, target: Array, mask: Array) -> tuple[Array, Array]:
    """Cross-entropy of a few classes, summed over the positions where ``mask`` is set.

    Args:
      logits: [B, M, C], any float dtype.
      target: int32 [B, M], 0 .. C-1; any number where the mask is 0.
      mask: bool or float32 [B, M]; a float is the weight of the position.

    Returns:
      ``(sum, weight)`` float32 scalars.
    """
    logits, weight = logits.astype(jnp.float32), mask.astype(jnp.float32)
    # a product with the indicator instead of a look-up: its gradient is no scatter
    own = (logits * jax.nn.one_hot(target, logits.shape[-1])).sum(-1)
    return (weight * (jax.nn.logsumexp(logits, axis=-1) - own)).sum(), weight.sum()


def frequency_cross_entropy(count: Array, gene_id: Array, target: Array, mask: Array) -> tuple[Array, Array]:
    """Cross-entropy of the frequencies with which each gene has had each bin: no information on the cell.

    A gene's frequencies are those counted, plus one observation of the law of all genes together, so that
    a gene never met has that law.

    Args:
      count: float32 [n_genes, C], how often a gene had a bin.
      gene_id: int32 [B, M]; any number where the mask is 0.
      target: int32 [B, M], 0 .. C-1.
      mask: bool or float32 [B, M].

    Returns:
      ``(sum, weight)`` float32 scalars.
    """
    n_genes, n_bins = count.shape
    overall = (count.sum(0) + 1) / (count.sum() + n_bins)
    law = (count + overall) / (count.sum(1, keepdims=True) + 1)
    weight = mask.astype(jnp.float32)
    seen = law[jnp.clip(gene_id, 0, n_genes - 1), jnp.clip(target, 0, n_bins - 1)]
    return -(weight * jnp.log(seen)).sum(), weight.sum()


def count_bins(count: Array, token: Array, weight: Array) -> Array:
    """The counts of :func:`frequency_cross_entropy` after one more batch.

    Args:
      count: float32 [n_genes, C].
      token: int32 [B, n_genes], bin of every gene of a cell; entries outside 0 .. C-1 are not counted.
      weight: float32 [B], of the cells.
    """
    # float32 cannot count past 2**24: from 2**20 on, older batches of a gene weigh half as much
    keep = jnp.where(count.sum(1, keepdims=True) > 2**20, 0.5, 1.0)
    new = jnp.stack([jnp.einsum("bg,b->g", token == k, weight) for k in range(count.shape[1])], axis=1)
    return count * keep + new
