"""Batch normalisation with the statistics of each cell's own domain (study, donor, assay, ...)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.nn.module import Buffer


class DomainBatchNorm(nnx.Module):
    """(x - mean) / sqrt(var + epsilon) per channel, over the tokens of the cells of one domain.

    In training by the statistics of the batch, which also move the running ones; in evaluation by the
    running ones. A cell of unknown domain (-1) takes the mean of the domains' running statistics.

    Args:
      n_features: channels E.
      n_domains: number of domains; 1 for one that all cells share.
      affine: a learned scale and bias; upstream has them with one domain and not with several.
      first_domain: upstream's accident: every cell is normalised as if it were of the domain of the first
        cell of the batch, and padding counts in the statistics.
      epsilon, momentum: as upstream.

    Source: Chang et al., CVPR 2019 (domain-specific batch normalisation); scGPT's ``dsbn``.
    """

    def __init__(
        self,
        n_features: int,
        n_domains: int,
        *,
        affine: bool,
        first_domain: bool = False,
        epsilon: float = 6.1e-5,
        momentum: float = 0.1,
    ):
        self.n_domains, self.affine = n_domains, affine
        self.first_domain, self.epsilon, self.momentum = first_domain, epsilon, momentum
        self.mean = Buffer(jnp.zeros((n_domains, n_features)))
        self.var = Buffer(jnp.ones((n_domains, n_features)))
        if affine:
            self.scale = nnx.Param(jnp.ones(n_features), axes=("embed",))
            self.bias = nnx.Param(jnp.zeros(n_features), axes=("embed",))

    def __call__(self, x_BSE: Array, valid_BS: Array, domain_B: Array, *, train: bool) -> Array:
        """Normalised ``x_BSE``, in float32; moves the running statistics where ``train``.

        Args:
          x_BSE: [B, S, E].
          valid_BS: bool or float32 [B, S], 0 where padded and in rows that only fill the batch.
          domain_B: int32 [B], -1 where unknown.
          train: see above.
        """
        x = x_BSE.astype(jnp.float32)
        if self.n_domains == 1:
            domain_B = jnp.zeros_like(domain_B)
        if self.first_domain:
            valid_BS, domain_B = jnp.ones_like(valid_BS), jnp.broadcast_to(domain_B[:1], domain_B.shape)
        mean_DE, var_DE = self.mean[...], self.var[...]
        if train:
            mean_DE, var_DE = self._statistics(x, valid_BS.astype(jnp.float32), domain_B)
        known_B1 = (domain_B >= 0)[:, None]
        mean, var = (
            jnp.where(known_B1, s.at[domain_B].get(mode="fill", fill_value=jnp.nan), s.mean(0))
            for s in (mean_DE, var_DE)
        )
        y = (x - mean[:, None]) * jax.lax.rsqrt(var + self.epsilon)[:, None]
        return y * self.scale[...] + self.bias[...] if self.affine else y

    def _statistics(self, x: Array, valid_BS: Array, domain_B: Array) -> tuple[Any, Any]:
        """Of the batch, those of a domain without a cell in it being the running ones."""
        member_DB = jax.nn.one_hot(domain_B, self.n_domains, axis=0)
        n_D1 = (member_DB @ valid_BS.sum(1))[:, None]
        n = jnp.maximum(n_D1, 1.0)
        mean = member_DB @ jnp.einsum("bse,bs->be", x, valid_BS) / n
        centred = x - mean[jnp.maximum(domain_B, 0)][:, None]
        var = member_DB @ jnp.einsum("bse,bs->be", centred * centred, valid_BS) / n
        unbiased = var * n / jnp.maximum(n - 1, 1.0)
        for buffer, new in ((self.mean, mean), (self.var, unbiased)):
            moved = buffer[...] + self.momentum * (jax.lax.stop_gradient(new) - buffer[...])
            buffer[...] = jnp.where(n_D1 > 0, moved, buffer[...])
        return jnp.where(n_D1 > 0, mean, self.mean[...]), jnp.where(n_D1 > 0, var, self.var[...])
