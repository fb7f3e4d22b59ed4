"""Bins of log2 expression, as scBERT and CellLM read it, and which of them are hidden."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from scjax.encoding.random import gene_uniform


def log2_bins(count: Array, total: Array, *, n_bins: int = 6, target: float = 1e4) -> Array:
    """floor(min(log2(1 + counts per ``target``), n_bins - 1)).

    With six bins the tokens 0 .. 5 stand for normalised counts in [0, 1), [1, 3), [3, 7), [7, 15), [15, 31)
    and from 31 on. The logarithm is never taken: a bin is the number of thresholds 2^k - 1 that are reached,
    so that a value on a threshold falls as exact arithmetic has it.

    Args:
      count: float32 [B, L], raw counts; 0 where padded.
      total: float32 [B], library size of the cell. The originals align a cell to the model's genes before
        they normalise it, so that theirs is the sum over those.
      n_bins: number of bins.
      target: library size after normalisation.

    Returns:
      int32 [B, L].

    Source: Yang et al., Nature Machine Intelligence 2022, Methods, "Expression embedding".
    """
    total = jnp.maximum(total, 1.0)[:, None]
    reached = [count * target >= (2.0**k - 1) * total for k in range(1, n_bins)]
    return sum((r.astype(jnp.int32) for r in reached), jnp.zeros(count.shape, jnp.int32))


def to_all_genes(gene_id: Array, value: Array, n: int) -> Array:
    """[B, n]: each gene's value at the gene's own place, 0 where the cell has none.

    Args:
      gene_id: int32 [B, L] below ``n``; -1 where padded. The order of the slots does not matter, and of a
        gene that stands twice the larger value stays.
      value: [B, L], not negative.
      n: places.
    """
    place = jnp.where(gene_id < 0, n, gene_id)
    one = lambda place, value: jnp.zeros(n, value.dtype).at[place].max(value, mode="drop")  # noqa: E731
    return jax.vmap(one)(place, value)


def hidden_first(
    keys: Array, fraction: float, candidate: Array, gene_id: Array, *values: Array
) -> tuple[Array, ...]:
    """Chooses exactly ceil(fraction * candidates) genes of each cell and puts them first.

    One sort does it all; the result does not depend on the order of the slots.

    Args:
      keys: keys [B], one a cell.
      fraction: share of a cell's candidates to choose.
      candidate: bool [B, L].
      gene_id: int32 [B, L]; -1 where padded.
      values: [B, L] each, sorted along.

    Returns:
      ``(chosen, gene_id, *values)``: bool [B, L] that is True for the first ones of each cell, then the
      other arrays in the new order: chosen genes, other candidates, other genes, padding.
    """
    rank = jnp.where(candidate, gene_uniform(keys, gene_id), jnp.where(gene_id >= 0, 1.0, 2.0))
    # 1e-4 of a gene: 0.15 * 20 must give 3 although its float32 product is 3.0000002
    n_chosen = jnp.ceil(candidate.sum(-1, keepdims=True) * fraction - 1e-4).astype(jnp.int32)
    # genes of equal draws by number: without it "exactly" would hold only nearly always
    _, *ordered = jax.lax.sort((rank, gene_id, *values), dimension=1, num_keys=2)
    return jnp.arange(gene_id.shape[1]) < n_chosen, *ordered


def hidden_capacity(slots: int, fraction: float) -> int:
    """The most genes that :func:`hidden_first` chooses of a cell with that many slots."""
    return max(1, min(slots, int(slots * fraction + 1)))


def replace_hidden(keys: Array, chosen: Array, gene_id: Array, token: Array, mask: int, rate: float) -> Array:
    """The tokens as shown: each chosen one becomes ``mask`` with probability ``rate``, else stays as it is.

    Args:
      keys: keys [B], one a cell.
      chosen: bool [B, L].
      gene_id, token: int32 [B, L].
      mask: id of the mask token.
      rate: 0.9 in scBERT.
    """
    return jnp.where(chosen & (gene_uniform(keys, gene_id) < rate), mask, token)
