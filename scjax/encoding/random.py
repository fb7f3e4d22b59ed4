"""Counter-based randomness for cells and genes.

Every draw is a function of (key, row, gene), never of where a cell sits in the batch or a gene in
the cell. So a cell meets the same masks whatever shares its batch, however it is padded and on
whichever device it lands.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def row_keys(key: Array, row: Array) -> Array:
    """One key a cell.

    Args:
      key: typed PRNG key of the step.
      row: uint32 [B], global cell numbers.

    Returns:
      Keys [B].
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row)


def gene_uniform(keys: Array, gene_id: Array) -> Array:
    """One uniform number a gene of a cell, whatever slot the gene sits in.

    Folding an integer into a key runs the generator's hash once and its output bits are
    themselves uniform, so the folded key is read as the number instead of being drawn from.

    Args:
      keys: keys [B], one a cell.
      gene_id: int32 [B, L].

    Returns:
      float32 [B, L] in [0, 1), with 24 random bits.
    """
    folded = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, gene_id.astype(jnp.uint32))
    bits = jax.random.key_data(folded)[..., -1]
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
