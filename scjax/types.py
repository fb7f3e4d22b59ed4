"""What every room passes to the next: a batch of cells, padded or as sparse rows."""

from __future__ import annotations

import dataclasses
from typing import Any

Array = Any  # numpy.ndarray on the host, jax.Array on the device


@dataclasses.dataclass(frozen=True)
class CellBatch:
    """B cells, each a list of at most L expressed genes with raw counts.

    The host fills one with numpy arrays, the device reads it inside the jitted step. The order of
    the slots of a cell carries no meaning.

    Attributes:
      gene_id: int32 [B, L], corpus vocabulary id; -1 where the slot is padding.
      count: float32 [B, L], raw counts; 0 where the slot is padding.
      depth: float32 [B], total counts of the whole cell before any truncation.
      n_genes: int32 [B], number of slots in use.
      row: uint32 [B], global cell number: the key for randomness and for joins.
      label: name -> int32 [B], categorical codes (cell_type, donor, ...); -1 where unknown.
      value: name -> float32 [B, ...], continuous covariates (dose, spatial coordinates, ...).
      weight: float32 [B], 1 for a cell, 0 for a row that only fills the batch.
    """

    gene_id: Array
    count: Array
    depth: Array
    n_genes: Array
    row: Array
    label: dict[str, Array]
    value: dict[str, Array]
    weight: Array

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.gene_id.shape

    def replace(self, **changes: Any) -> CellBatch:
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class SparseBatch:
    """B cells as sparse rows one after the other (CSR), for models that take them as they are.

    Row b owns the elements ``indptr[b]`` to ``indptr[b + 1]`` of ``gene_id`` and ``count``; its genes are in
    the order in which they are stored. ``scipy.sparse.csr_matrix((batch.count, batch.gene_id, batch.indptr),
    shape=(B, n_genes))`` is the matrix. The number of elements changes from batch to batch, so this is for
    the host, or for code that is not compiled for one shape.

    Attributes:
      indptr: int64 [B + 1], where each row begins; the last is the number of elements.
      gene_id: uint16 or uint32 [indptr[B]], vocabulary id.
      count: uint16, uint32 or float32 [indptr[B]], raw counts, as narrow as the corpus stores them: what goes
        to a device should be few bytes.
      depth: float32 [B], total counts of the whole cell before any truncation.
      n_genes: int32 [B], elements of each row; 0 where the row only fills the batch.
      row: uint32 [B], global cell number: the key for randomness and for joins.
      label: name -> int32 [B], categorical codes; -1 where unknown.
      value: name -> float32 [B, ...], continuous covariates.
      weight: float32 [B], 1 for a cell, 0 for a row that only fills the batch.
    """

    indptr: Array
    gene_id: Array
    count: Array
    depth: Array
    n_genes: Array
    row: Array
    label: dict[str, Array]
    value: dict[str, Array]
    weight: Array

    def __len__(self) -> int:
        """B."""
        return len(self.n_genes)


FIELDS = tuple(field.name for field in dataclasses.fields(CellBatch))


def register_pytree() -> None:
    """Tell JAX that a CellBatch is a pytree. Called once by ``scjax.encoding``, the first room on
    the device side: this module itself must not import JAX, because the corpus, the loader's
    index arithmetic and the eval module work without it."""
    import jax

    try:
        jax.tree_util.register_dataclass(CellBatch, data_fields=list(FIELDS), meta_fields=[])
    except ValueError:  # already registered
        pass
