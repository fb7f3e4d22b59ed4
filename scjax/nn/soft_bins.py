"""Embedding of a number by soft bins ("auto-discretisation", xTrimoGene and scFoundation)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.nn.linear import linear

SLOPE = 0.1  # of the leaky ReLU below zero


class SoftBins(nnx.Module):
    """A number becomes a softmax over bins, and that a mixture of the bins' learned vectors.

    With v the number, a = leaky_relu(v w1 + b1), p = softmax(alpha a + W2 a + b2), the embedding is p E. The
    place of the bins is learned, and the embedding is smooth in v; 0 is a number like any other. Two
    further vectors stand for a hidden value and for padding. They are asked for by flags, not by
    numbers that a value could equal.

    Args:
      n_bins: number of bins.
      d_model: width of the embedding.
      alpha: weight of the direct path.

    Source: Gong et al., NeurIPS 2023 (xTrimoGene); Hao et al., Nature Methods 2024.
    """

    def __init__(self, n_bins: int, d_model: int, *, alpha: float = 1.0, dtype: Any = None, rngs: nnx.Rngs):
        self.alpha, self.dtype = alpha, dtype
        self.up = linear(1, n_bins, (None, None), dtype=dtype, rngs=rngs)
        self.mix = linear(n_bins, n_bins, (None, None), dtype=dtype, rngs=rngs)
        normal = nnx.initializers.normal(1.0)
        self.table = nnx.Param(normal(rngs.params(), (n_bins, d_model), jnp.float32), axes=(None, "embed"))
        # rows: hidden, padding
        self.special = nnx.Param(normal(rngs.params(), (2, d_model), jnp.float32), axes=(None, "embed"))

    def weights(self, value: Array) -> Array:
        """float32 [..., n_bins]: how much of each bin a number has; adds up to 1."""
        a = jax.nn.leaky_relu(self.up(value[..., None]), SLOPE)
        return jax.nn.softmax((self.alpha * a + self.mix(a)).astype(jnp.float32), axis=-1)

    def __call__(self, value: Array, *, hidden: Array | None = None, padding: Array | None = None) -> Array:
        """Embeds numbers.

        Args:
          value: float [...].
          hidden: bool [...], True where the vector for a hidden value goes instead of that of ``value``.
          padding: bool [...], likewise for padding.

        Returns:
          [..., d_model] in ``dtype``.
        """
        dtype = self.dtype or jnp.float32
        out = self.weights(value).astype(dtype) @ self.table[...].astype(dtype)
        for row, flag in enumerate((hidden, padding)):
            if flag is not None:
                out = jnp.where(flag[..., None], self.special[...][row].astype(dtype), out)
        return out
