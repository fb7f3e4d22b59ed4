"""Whether a gene is expressed at all, beside how much."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def expressed_nll(logit: Array, target: Array, mask: Array) -> tuple[Array, Array]:
    """-log Bernoulli(target > 0; sigmoid(logit)) summed over the positions where ``mask`` is set.

    Args:
      logit: [B, M], of the probability that the gene is expressed (upstream calls it the zero probability,
        although it is that of not being zero).
      target: float32 [B, M], values; expressed where above 0.
      mask: bool or float32 [B, M].

    Returns:
      ``(sum, weight)`` float32 scalars.

    Source: Cui et al., Nature Methods 2024, ``explicit_zero_prob``.
    """
    weight = mask.astype(jnp.float32)
    logit = logit.astype(jnp.float32)
    nll = jax.nn.softplus(jnp.where(target > 0, -logit, logit))
    return (weight * nll).sum(), weight.sum()
