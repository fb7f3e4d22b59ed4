"""Genes of a cell split into unknown and known ones, in slots whose number is fixed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from scjax.encoding.random import gene_uniform
from scjax.encoding.select import mask_genes
from scjax.parallel.layout import top_k
from scjax.types import CellBatch


def unknown_room(length: int, fraction: float) -> int:
    """Slots for the unknown genes among ``length``: floor(length * fraction)."""
    return int(length * fraction + 1e-4)  # 1e-4 of a gene: 0.15 * 20 must give 3 and not 2.9999998


def split_unknown(
    gene_id: Array,
    value: Array,
    length: int,
    fractions: tuple[float, ...],
    drawn: int | Array,
    keys: Array,
) -> tuple[Array, Array, Array]:
    """A random choice of ``length`` genes of each cell, the unknown ones in the first slots.

    Of a cell's n genes, floor(n * fraction) are unknown. They fill the first slots of
    ``unknown_room(length, fraction)``, which is enough for any n up to ``length``; the known ones fill those
    after, which are enough for any n too. So no gene is lost, and shapes follow from the fraction alone.

    Args:
      gene_id: int32 [B, L]; -1 where padded.
      value: float32 [B, L].
      length: slots; where L is less, L.
      fractions: shares of unknown genes.
      drawn: which of them, the same for all cells.
      keys: keys [B], one a cell.

    Returns:
      ``(gene_id, value, unknown)``, [B, min(L, length)] each; -1, 0 and False where padded.

    Source: scGPT's pretraining collator, which draws a fraction a batch and shuffles the genes of each cell.
    """
    length = min(gene_id.shape[1], length)
    valid = gene_id >= 0
    _, order = top_k(jnp.where(valid, gene_uniform(keys, gene_id), -1.0), length)
    n = jnp.minimum(valid.sum(1, keepdims=True), length)
    n_unknown = jnp.floor(n * jnp.asarray(fractions, jnp.float32)[drawn] + 1e-4).astype(jnp.int32)
    room = jnp.asarray([unknown_room(length, fraction) for fraction in fractions])[drawn]
    slot = jnp.arange(length)
    place = jnp.where(slot < room, slot, n_unknown + slot - room)  # in the random order
    used = jnp.where(slot < room, slot < n_unknown, place < n)
    order = jnp.take_along_axis(order, jnp.minimum(place, length - 1), axis=1)
    gene_id = jnp.where(used, jnp.take_along_axis(gene_id, order, axis=1), -1)
    value = jnp.where(used, jnp.take_along_axis(value, order, axis=1), 0.0)
    return gene_id, value, used & (slot < room)


def hide_shares(
    gene_id: Array,
    value: Array,
    fractions: tuple[float, ...],
    share_keys: Array,
    mask_keys: Array,
    cls_id: int | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """Hides a share of each cell's genes, which it draws for each cell from ``fractions``.

    Args:
      gene_id: int32 [B, N]; -1 where padded.
      value: float32 [B, N].
      fractions: shares.
      share_keys, mask_keys: keys [B], one a cell: of the share, and of which genes.
      cls_id: id of a token CLS that may be hidden like a gene; None for none.

    Returns:
      ``(gene_id, value, hidden, cls_hidden)``: [B, N] each, and bool [B] or None. Slots have no order of
      their own: with the hidden genes first, a head can skip the rest.
    """
    share = jnp.asarray(fractions, jnp.float32)
    drawn = jax.vmap(lambda k: jax.random.choice(k, share))(share_keys)
    candidates, cls_hidden = gene_id, None
    if cls_id is not None:
        candidates = jnp.concatenate([jnp.full_like(gene_id[:, :1], cls_id), gene_id], axis=1)
    hidden = mask_genes(candidates, drawn, mask_keys)
    if cls_id is not None:
        cls_hidden, hidden = hidden[:, 0], hidden[:, 1:]
    slot = jnp.argsort(~hidden, axis=-1)
    gene_id, value, hidden = (jnp.take_along_axis(x, slot, axis=-1) for x in (gene_id, value, hidden))
    return gene_id, value, hidden, cls_hidden


def with_zeros(batch: CellBatch, n_genes: int) -> CellBatch:
    """The batch with a slot for every gene of the vocabulary, of count 0 where the cell does not express it.

    A row without any gene fills the batch and stays empty.
    """
    used = batch.gene_id >= 0
    slot = jnp.where(used, batch.gene_id, n_genes)  # beyond the last: dropped
    row = jnp.arange(slot.shape[0])[:, None]
    count = jnp.zeros((slot.shape[0], n_genes)).at[row, slot].add(batch.count, mode="drop")
    gene_id = jnp.broadcast_to(jnp.arange(n_genes, dtype=jnp.int32), count.shape)
    return batch.replace(gene_id=jnp.where(used.any(1, keepdims=True), gene_id, -1), count=count)
