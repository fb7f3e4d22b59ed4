"""The prediction that knows nothing of a cell: each gene's mean value."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.nn.module import Buffer


class GeneMean(nnx.Module):
    """Running mean of each gene's value over the batches of training: the no-information baseline.

    Args:
      n_genes: size of the vocabulary.
    """

    def __init__(self, n_genes: int):
        self.total = Buffer(jnp.zeros(n_genes), axes=("vocab",))
        self.count = Buffer(jnp.zeros(n_genes), axes=("vocab",))

    def __call__(self, gene_id: Array) -> Array:
        """float32, shape of ``gene_id``: the mean so far; that of all genes for one never seen."""
        total, count = self.total[...], self.count[...]
        overall = total.sum() / jnp.maximum(count.sum(), 1.0)
        mean = jnp.where(count > 0, total / jnp.maximum(count, 1.0), overall)
        return mean[jnp.maximum(gene_id, 0)]

    def update(self, gene_id: Array, value: Array, weight: Array) -> None:
        """Takes in the values [B, N] of genes [B, N], -1 where padded, of cells of weight [B]."""
        seen = (gene_id >= 0) * weight[:, None]
        slot = jnp.maximum(gene_id, 0)
        # float32 cannot count past 2**24: from 2**20 on, older batches weigh half as much
        keep = jnp.where(self.count[...] > 2**20, 0.5, 1.0)
        for buffer, new in ((self.total, seen * value), (self.count, seen)):
            buffer[...] = buffer[...] * keep + jnp.zeros_like(buffer[...]).at[slot].add(new)
