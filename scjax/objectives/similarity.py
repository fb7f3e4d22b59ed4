"""Elastic cell similarity: cells that are alike are pulled together, the others pushed apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def elastic_cell_similarity(cell_BE: Array, weight_B: Array, threshold: float) -> tuple[Array, Array]:
    """1 - (relu(cos) - threshold)^2 summed over the ordered pairs of a batch.

    Falls as cosines move away from ``threshold``, to either side: a pair above it grows more alike, a pair
    below it less, down to a right angle. As upstream, a cell beside itself counts as a pair of cosine 0.

    Args:
      cell_BE: [B, E], embeddings of any length.
      weight_B: float32 [B], 0 for rows that only fill the batch.
      threshold: cosine that divides the two (0.3 by default upstream, 0.8 for batch integration).

    Returns:
      ``(sum, weight)`` float32 scalars; the published loss is their quotient.

    Source: Cui et al., Nature Methods 2024, objective "ECS".
    """
    cell_BE = cell_BE.astype(jnp.float32)
    # the square is floored inside of the root, whose slope at 0 would be infinite
    length_B1 = jnp.sqrt(jnp.maximum((cell_BE * cell_BE).sum(-1, keepdims=True), 1e-24))
    unit_BE = cell_BE / length_B1
    cosine_BB = jax.nn.relu((unit_BE @ unit_BE.T) * (1 - jnp.eye(cell_BE.shape[0])))
    pair_BB = weight_B[:, None] * weight_B
    return (pair_BB * (1 - (cosine_BB - threshold) ** 2)).sum(), pair_BB.sum()
