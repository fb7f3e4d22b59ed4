"""Likelihoods of counts: negative binomial, Poisson, and whether there is any.

All are negative log-likelihoods summed over the positions where ``mask`` is set, ``(sum, weight)`` scalars
in nats; the weight is the number of positions. A count that is negative or not whole gives NaN where the mask
is set, on which a run stops, and not a number that looks like a loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import betaln, gammaln

TINY = 1e-8  # a mean that is no smaller than this has a logarithm


def negative_binomial_nll(
    count: Array, mean: Array, inverse_dispersion: Array, mask: Array
) -> tuple[Array, Array]:
    """Of counts whose variance is mean + mean^2 / inverse_dispersion.

    Args:
      count: [B, G], whole numbers from 0; anything where ``mask`` is 0.
      mean: [B, G], at least 0.
      inverse_dispersion: [G] or [B, G], above 0; large values make it a Poisson distribution.
      mask: bool or float [B, G].

    Source: Lopez et al., Nature Methods 2018 (scVI); Gayoso et al., Nature Methods 2021 (totalVI).
    """
    x, mean, mask = _checked(count, mean, mask)
    theta = jnp.broadcast_to(inverse_dispersion.astype(mean.dtype), x.shape)
    # Gamma(x + theta) / (Gamma(theta) x!) by the beta function: a difference of log gammas would cancel
    nll = betaln(theta, x + 1) + jnp.log(x + theta)
    nll += theta * jnp.log1p(mean / theta) + x * jnp.log1p(theta / mean)
    return (nll * mask).sum(), mask.sum()


def poisson_nll(count: Array, mean: Array, mask: Array) -> tuple[Array, Array]:
    """Of counts whose variance is their mean; arguments as those of :func:`negative_binomial_nll`."""
    x, mean, mask = _checked(count, mean, mask)
    return ((mean - x * jnp.log(mean) + gammaln(x + 1)) * mask).sum(), mask.sum()


def bernoulli_nll(count: Array, logit: Array, mask: Array) -> tuple[Array, Array]:
    """Of there being any count at all, such as a region of chromatin being open.

    Args:
      count: [B, G], whole numbers from 0; above 0 is open.
      logit: [B, G], log odds of open.
      mask: bool or float [B, G].

    Source: Ashuach et al., Cell Reports Methods 2022 (PeakVI).
    """
    x, logit, mask = _checked(count, logit, mask, least=-jnp.inf)
    return ((jax.nn.softplus(logit) - jnp.minimum(x, 1.0) * logit) * mask).sum(), mask.sum()


def _checked(count: Array, mean: Array, mask: Array, least: float = TINY) -> tuple[Array, Array, Array]:
    """As floats of at least 32 bits; 0 for what is masked, NaN for what is no count."""
    mean = mean.astype(jnp.promote_types(mean.dtype, jnp.float32))
    wrong = (count < 0) | (count != jnp.round(count))
    x = jnp.where(mask > 0, jnp.where(wrong, jnp.nan, count), 0.0).astype(mean.dtype)
    return x, jnp.maximum(mean, least), mask.astype(mean.dtype)
