"""Batches of the host onto the devices of a mesh."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from scjax.parallel.mesh import batch_sharding, process_shard
from scjax.types import CellBatch, register_pytree

register_pytree()


def place(batch: CellBatch, mesh: Mesh) -> CellBatch:
    """The rows that this process loaded, as part of global arrays split over ``data`` and ``fsdp``.

    On the CPU the arrays may share memory with the numpy arrays they came from, which JAX keeps alive;
    the caller must not write to those again while it holds the result.

    Args:
      batch: numpy arrays with this process's contiguous slice of the global batch (see
        :func:`scjax.parallel.process_shard`).
      mesh: the device mesh.

    Raises:
      ValueError: the rows do not split evenly over the devices.
    """
    sharding = batch_sharding(mesh)
    rows = batch.weight.shape[0]
    slices = mesh.shape["data"] * mesh.shape["fsdp"]
    _, count = process_shard(mesh)
    if rows * count % slices:
        raise ValueError(
            f"a batch of {rows * count} cells cannot be split evenly over data {mesh.shape['data']} × fsdp "
            f"{mesh.shape['fsdp']} devices: make batch_size a multiple of {slices}"
        )
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
