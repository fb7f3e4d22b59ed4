"""Depth: the same cell sequenced less deeply, and the token that says how deeply.

Keeping each molecule by itself with probability ``rate`` turns a count c into Binomial(c, rate). Every draw
is keyed by (key, row, gene), so that it follows the cell and the gene wherever they sit.
"""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
from jax import Array

from scjax.encoding.random import gene_uniform

# Below this mean the distribution function is summed up, above it rejection takes fewer passes. The
# rejection's hat holds from a mean of 10 on.
_INVERSION_MEAN = 10.0
# log k! - (k + 1/2) log(k + 1) + (k + 1) - log(2 pi) / 2 for k = 0 .. 9
_STIRLING = tuple(
    math.lgamma(k + 1) - (k + 0.5) * math.log(k + 1) + (k + 1) - math.log(2 * math.pi) / 2 for k in range(10)
)


def thinning_rate(
    depth: Array,
    keys: Array,
    *,
    probability: float = 0.5,
    beta: tuple[float, float] = (2.0, 2.0),
    min_depth: float = 1000.0,
) -> Array:
    """The share of its molecules that each cell keeps.

    Args:
      depth: float32 [B], counts of the cell.
      keys: keys [B], one a cell.
      probability: that a cell is thinned at all.
      beta: the two parameters of the law Beta(a, b) of the share.
      min_depth: cells of at most this many counts are left whole.

    Returns:
      float32 [B] in [0, 1]; 1 for a cell that is left whole.

    Source: Hao et al., Nature Methods 2024, read-depth-aware pretraining.
    """
    # far from the numbers that thin_counts folds in: both may be given the same keys
    coin = jax.vmap(jax.random.uniform)(_fold(keys, 2**31))
    share = jax.vmap(lambda key: jax.random.beta(key, *beta))(_fold(keys, 2**31 + 1))
    return jnp.where((coin < probability) & (depth > min_depth), share, 1.0)


def depth_token(total: Array, target: str = "same") -> Array:
    """How deeply a cell is, or shall be thought to be, sequenced: log10 of its counts.

    Args:
      total: float32 [B], counts of the cells; below 1 they are taken for 1.
      target: "same", as they are; "tX", 10**X counts in every cell; "fX", X times those of the cell;
        "aX", 10**X times those of the cell. X is a positive number, "f5" or "t4.5".

    Raises:
      ValueError: another target.
    """
    found = re.fullmatch(r"same|([tfa])(\d+(?:\.\d+)?)", target)
    if not found or (found[1] == "f" and not float(found[2])):
        raise ValueError(f'target is "same", "tX", "fX" or "aX" with a number X, not {target!r}')
    source = jnp.log10(jnp.maximum(total, 1.0))
    if not found[1]:
        return source
    number = float(found[2])
    if found[1] == "t":
        return jnp.full_like(source, number)
    return source + (number if found[1] == "a" else math.log10(number))


def thin_counts(count: Array, rate: Array, keys: Array, gene_id: Array) -> Array:
    """Each count c replaced by a draw from Binomial(c, rate).

    Args:
      count: float32 [B, L], whole numbers (a fraction is cut off), below 2**24; 0 where padded.
      rate: float32 [B], probability of keeping a molecule, one for all genes of a cell.
      keys: keys [B], one a cell.
      gene_id: int32 [B, L]; -1 where padded.

    Returns:
      float32 [B, L], whole numbers 0 .. count; equal to the cut count where the rate is 1.

    Source: inversion for small means; for others the transformed rejection BTRS of W. Hörmann, "The
    generation of binomial random variates", J. Stat. Comput. Simul. 46 (1993).
    """
    n = jnp.floor(count)
    fewer = jnp.minimum(rate, 1 - rate)[:, None]  # draw the rarer of kept and lost
    small = n * fewer < _INVERSION_MEAN
    uniform = gene_uniform(_fold(keys, 0), gene_id)
    by_inversion = _by_inversion(jnp.where(small, n, 0.0), fewer, uniform)
    draw = jnp.where(small, by_inversion, _by_rejection(n, fewer, ~small, keys, gene_id))
    return jnp.where(rate[:, None] > 0.5, n - draw, draw)


def _fold(keys: Array, data: int | Array) -> Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def _by_inversion(n: Array, p: Array, uniform: Array) -> Array:
    """The k with P(X < k) <= uniform < P(X <= k), for p <= 1/2 and n p below 10."""
    odds = p / (1 - p)

    def more(carry: tuple[Array, Array, Array, Array]) -> Array:
        return carry[1].any()

    def step(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        k, going, left, mass = carry
        left = left - mass
        going = going & (left >= 0) & (k < n)
        mass = mass * odds * (n - k) / (k + 1)
        return k + going, going, left, mass

    none = jnp.exp(n * jnp.log1p(-p))
    return jax.lax.while_loop(more, step, (jnp.zeros_like(n), n > 0, uniform, none))[0]


def _stirling(k: Array) -> Array:
    """log k! less Stirling's formula with k + 1; error below 1e-6."""
    square = 1 / ((k + 1) * (k + 1))
    series = (1 / 12 - (1 / 360 - square / 1260) * square) / (k + 1)
    return jnp.where(k < 10, jnp.asarray(_STIRLING)[jnp.clip(k, 0, 9).astype(jnp.int32)], series)


def _by_rejection(n: Array, p: Array, wanted: Array, keys: Array, gene_id: Array) -> Array:
    """BTRS for p <= 1/2 where ``wanted``, whose n p is at least 10; 0 elsewhere."""
    n = jnp.where(wanted, n, 20.0)
    p = jnp.where(wanted, p, 0.5)
    spread = jnp.sqrt(n * p * (1 - p))
    b = 1.15 + 2.53 * spread
    a = -0.0873 + 0.0248 * b + 0.01 * p
    alpha = (2.83 + 5.1 / b) * spread
    odds = p / (1 - p)
    mode = jnp.floor((n + 1) * p)
    at_mode = (mode + 0.5) * jnp.log((mode + 1) / (odds * (n - mode + 1)))
    at_mode = at_mode + _stirling(mode) + _stirling(n - mode)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        trial, k, going = carry
        u = gene_uniform(_fold(keys, 2 * trial + 1), gene_id) - 0.5
        v = gene_uniform(_fold(keys, 2 * trial + 2), gene_id)
        us = jnp.maximum(0.5 - jnp.abs(u), 1e-7)
        new = jnp.floor((2 * a / us + b) * u + n * p + 0.5)
        possible = (new >= 0) & (new <= n)
        new = jnp.clip(new, 0, n)
        quick = (us >= 0.07) & (v <= 0.92 - 4.2 / b)
        ratio = (
            at_mode
            + (n + 1) * jnp.log((n - mode + 1) / (n - new + 1))
            + (new + 0.5) * jnp.log(odds * (n - new + 1) / (new + 1))
            - _stirling(new)
            - _stirling(n - new)
        )
        slow = jnp.log(jnp.maximum(v, 1e-30) * alpha / (a / (us * us) + b)) <= ratio
        accepted = going & possible & (quick | slow)
        return trial + 1, jnp.where(accepted, new, k), going & ~accepted

    start = (jnp.uint32(0), jnp.zeros_like(n), wanted)
    return jax.lax.while_loop(lambda carry: carry[2].any(), step, start)[1]
