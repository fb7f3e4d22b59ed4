"""Which genes of a cell a model sees, and which of them it must predict."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import Array

from scjax.encoding.random import gene_uniform
from scjax.parallel.layout import top_k

Method = Literal["random", "top"]


def select_genes(
    gene_id: Array,
    count: Array,
    length: int,
    keys: Array,
    *,
    method: Method = "random",
    keep: Array | None = None,
) -> tuple[Array, Array]:
    """At most ``length`` genes of each cell.

    Args:
      gene_id: int32 [B, L]; -1 where padded.
      count: float32 [B, L].
      length: genes to keep. Where L <= ``length`` everything is returned as it is.
      keys: keys [B], one a cell.
      method: "random" draws uniformly without replacement; "top" takes the most expressed, ties
        at random.
      keep: int32 [K] vocabulary ids that go first wherever they are expressed (marker genes, a
        perturbation's target).

    Returns:
      ``(gene_id, count)`` of shape [B, min(L, length)], padding (-1, 0) last.
    """
    if gene_id.shape[-1] <= length:
        return gene_id, count
    if method not in ("random", "top"):
        raise ValueError(f'method is "random" or "top", not {method!r}')
    uniform = jnp.where(gene_id >= 0, gene_uniform(keys, gene_id), -1.0)
    if method == "random" and keep is None:
        _, slot = top_k(uniform, length)
    else:  # by one criterion after another; the last named here is the first to decide
        criteria = [-uniform]
        if method == "top":
            criteria.append(-count)
        if keep is not None:
            criteria.append(~jnp.isin(gene_id, keep))
        slot = jnp.lexsort([*criteria, gene_id < 0], axis=-1)[..., :length]
    return jnp.take_along_axis(gene_id, slot, axis=-1), jnp.take_along_axis(count, slot, axis=-1)


def mask_genes(gene_id: Array, fraction: float | Array, keys: Array, *, exact: bool = True) -> Array:
    """The genes whose values are hidden.

    Args:
      gene_id: int32 [B, L]; -1 where padded.
      fraction: share of a cell's genes to hide, a number or float32 [B].
      keys: keys [B], one a cell.
      exact: hide exactly floor(n * fraction) genes of a cell with n, as scGPT does; otherwise each
        gene by itself with that probability, as BERT does.

    Returns:
      bool [B, L]; False where padded.
    """
    valid = gene_id >= 0
    uniform = jnp.where(valid, gene_uniform(keys, gene_id), 2.0)
    fraction = jnp.broadcast_to(jnp.asarray(fraction, jnp.float32), gene_id.shape[:1])
    if not exact:
        return uniform < fraction[:, None]
    # 1e-4 of a gene: 0.15 * 20 must give 3 although its float32 product is 2.9999998
    n_hidden = jnp.floor(valid.sum(-1) * fraction + 1e-4).astype(jnp.int32)
    rank = jnp.argsort(jnp.argsort(uniform, axis=-1), axis=-1)
    return (rank < n_hidden[:, None]) & valid
