"""Distances between predicted and real populations of cells, where a batch holds several of them.

A row is a predicted cell beside a real one of the same set; which of the two stand side by side has no
meaning. Sums run over the pairs of rows of one set, so that a set may lie on any devices in any order. Each
function returns ``(sum, weight)``, float32 scalars whose quotient is the mean over the cells of the distance
of their set.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

WIDTHS = (0.25, 1.0, 4.0)  # of the kernels of MMD, relative to the mean squared distance of real cells
TINY = 1e-6  # squared distances are floored here, inside of a root whose slope at 0 would be infinite


def set_mean_error(predicted_BG: Array, real_BG: Array, set_B: Array, weight_B: Array) -> tuple[Array, Array]:
    """Squared difference between the mean predicted and the mean real cell of a set, mean over genes.

    Args:
      predicted_BG, real_BG: [B, G], expression.
      set_B: int32 [B], which set a row is of.
      weight_B: float32 [B], 1 for a row that counts and 0 for one that fills the batch.
    """
    pair_BB, size_B = _pairs(set_B, weight_B)
    difference_BG = (predicted_BG.astype(jnp.float32) - real_BG) * weight_B[:, None]
    mean_BG = jnp.einsum("ij,jg->ig", pair_BB, difference_BG, precision="highest") / size_B[:, None]
    return (weight_B * (mean_BG * mean_BG).mean(1)).sum(), weight_B.sum()


def energy_distance(
    predicted_BG: Array, real_BG: Array, set_B: Array, weight_B: Array
) -> tuple[Array, Array]:
    """2 E|x - y| - E|x - x'| - E|y - y'| with Euclidean distances; 0 where the two are alike.

    Without the pairs of a cell with itself, so that it does not depend on how many cells a set has. A set of
    one cell has no weight. Args: as those of :func:`set_mean_error`.

    Source: Székely & Rizzo, J. Stat. Plan. Inference 2013, as U-statistic.
    """
    return _contrast(lambda squared, _: jnp.sqrt(squared), predicted_BG, real_BG, set_B, weight_B)


def maximum_mean_discrepancy(
    predicted_BG: Array, real_BG: Array, set_B: Array, weight_B: Array
) -> tuple[Array, Array]:
    """E k(x, x') + E k(y, y') - 2 E k(x, y), mean over Gaussian kernels of several widths.

    Widths are relative to the mean squared distance of the real cells. A set of one cell has no weight.
    Args: as those of :func:`set_mean_error`.

    Source: Gretton et al., JMLR 2012, the unbiased estimator of the squared MMD.
    """

    def dissimilarity(squared_BB: Array, typical: Array) -> Array:
        kernels = [jnp.exp(-squared_BB / (width * typical)) for width in WIDTHS]
        return -jnp.stack(kernels).mean(0)

    return _contrast(dissimilarity, predicted_BG, real_BG, set_B, weight_B)


def _contrast(
    dissimilarity: Callable[[Array, Array], Array],
    predicted_BG: Array,
    real_BG: Array,
    set_B: Array,
    weight_B: Array,
) -> tuple[Array, Array]:
    """2 E d(x, y) - E d(x, x') - E d(y, y') of each set, summed over cells."""
    pair_BB, size_B = _pairs(set_B, weight_B)
    x_BG, y_BG = predicted_BG.astype(jnp.float32), real_BG.astype(jnp.float32)
    # seen from the middle of the batch: squares of large numbers would drown their small differences
    centre_G = jnp.einsum("b,bg->g", weight_B, y_BG) / jnp.maximum(weight_B.sum(), 1.0)
    x_BG, y_BG = x_BG - centre_G, y_BG - centre_G
    apart_BB = pair_BB * (1 - jnp.eye(len(set_B)))
    real_BB = _squared(y_BG, y_BG)
    typical = (apart_BB * real_BB).sum() / jnp.maximum(apart_BB.sum(), 1.0)
    d = lambda squared_BB: dissimilarity(squared_BB, jnp.maximum(typical, TINY))  # noqa: E731
    cross_B = (pair_BB * d(_squared(x_BG, y_BG))).sum(1) / size_B
    own_B = (apart_BB * (d(_squared(x_BG, x_BG)) + d(real_BB))).sum(1) / jnp.maximum(size_B - 1, 1.0)
    counted_B = weight_B * (size_B > 1)
    return (counted_B * (2 * cross_B - own_B)).sum(), counted_B.sum()


def _pairs(set_B: Array, weight_B: Array) -> tuple[Array, Array]:
    """float32 [B, B], the weight of column j where it is of the set of row i, else 0; and the size of each
    row's set, at least 1."""
    pair_BB = (set_B[:, None] == set_B) * weight_B
    return pair_BB, jnp.maximum(pair_BB.sum(1), 1.0)


def _squared(a_BG: Array, b_BG: Array) -> Array:
    """float32 [B, B], squared distances of all rows of one to all of the other."""
    product_BB = jax.lax.dot_general(a_BG, b_BG, (((1,), (1,)), ((), ())), precision="highest")
    squared_BB = (a_BG**2).sum(1)[:, None] + (b_BG**2).sum(1) - 2 * product_BB
    return jnp.maximum(squared_BB, TINY)
