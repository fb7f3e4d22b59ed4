"""Regression of hidden expression values."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def masked_mse(prediction: Array, target: Array, mask: Array) -> tuple[Array, Array]:
    """Squared error summed over the positions where ``mask`` is set.

    Args:
      prediction: [B, M], any float dtype.
      target: float32 [B, M].
      mask: bool or float32 [B, M]; a float is the weight of the position.

    Returns:
      ``(sum, weight)`` float32 scalars; the mean squared error is their quotient.

    Source: Cui et al., Nature Methods 2024, gene expression prediction (GEP) objective.
    """
    weight = mask.astype(jnp.float32)
    error = prediction.astype(jnp.float32) - target
    return (weight * error * error).sum(), weight.sum()
