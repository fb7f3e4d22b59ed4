"""The mesh of devices.

A mesh has three axes. ``data`` splits the batch and keeps a copy of the parameters in each slice;
``fsdp`` splits the batch and the parameters; ``tensor`` splits the parameters only, within a layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis; at most one may be -1, for all devices that are left.

    0 stands for what the hardware table says, see :func:`scjax.parallel.hardware.layout_for`; where nobody
    has asked the table it is 1.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def sizes(self, n_devices: int) -> tuple[int, int, int]:
        """Sizes of (data, fsdp, tensor) on ``n_devices`` devices.

        Raises:
          ValueError: the sizes do not multiply to ``n_devices``, or two of them are -1.
        """
        given = {name: size or 1 for name, size in dataclasses.asdict(self).items()}
        free = [name for name, size in given.items() if size == -1]
        wrong = [f"{name}={size}" for name, size in given.items() if size < 1 and size != -1]
        if wrong or len(free) > 1:
            raise ValueError(
                f"mesh {given}: each size must be at least 1 (0: what the hardware table says), and one of "
                "them may be -1"
            )
        fixed = math.prod(size for size in given.values() if size != -1)
        if n_devices % fixed or (not free and fixed != n_devices):
            multiple = "a multiple of " if free else ""
            raise ValueError(f"mesh {given} asks for {multiple}{fixed} devices; there are {n_devices}")
        data, fsdp, tensor = (n_devices // fixed if size == -1 else size for size in given.values())
        return data, fsdp, tensor


def make_mesh(
    config: MeshConfig | None = None,
    devices: Sequence[Any] | None = None,
    axis_type: AxisType = AxisType.Auto,
) -> Mesh:
    """The mesh with axes ``data``, ``fsdp`` and ``tensor`` over ``devices`` (default: all of them).

    Devices stand in the order of their processes, so that each process holds one piece of a batch.
    ``jax.make_mesh`` would follow the torus of a TPU pod instead, in which it does not, and refuses hosts of
    GPUs, which JAX takes for as many slices. ``axis_type`` is that of every axis.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = (config or MeshConfig()).sizes(len(devices))
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(ordered).reshape(sizes), AXES, axis_types=(axis_type,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array of a batch: rows over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def process_shard(mesh: Mesh, process_index: int | None = None) -> tuple[int, int]:
    """``(index, count)``: this process must load the ``index``-th of ``count`` equal slices of a batch.

    ``count`` is the number of processes, unless a ``tensor`` axis spans processes: those then load the
    same rows.

    Raises:
      ValueError: the devices of a process do not hold one contiguous slice of the batch.
    """
    process_index = jax.process_index() if process_index is None else process_index
    blocks = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    held: dict[int, set[int]] = {}
    slices: dict[Any, tuple[slice]] = batch_sharding(mesh).devices_indices_map((blocks,))  # type: ignore[assignment]
    for device, (rows,) in slices.items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(blocks)))
    mine = sorted(held[process_index])
    size = len(mine)
    contiguous = mine == list(range(mine[0], mine[0] + size)) and mine[0] % size == 0
    if not contiguous or any(len(other) != size for other in held.values()):
        raise ValueError(
            f"the devices of process {process_index} hold the slices {mine} of {blocks} of a batch; "
            "they must be contiguous and as many on each process: change config.mesh"
        )
    return mine[0] // size, blocks // size


def summary(mesh: Mesh) -> str:
    """One line: sizes, kind of device, processes."""
    device = mesh.devices.flat[0]
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    processes = len({d.process_index for d in mesh.devices.flat})
    return f"mesh {sizes} on {mesh.size} {device.device_kind} device(s), {processes} process(es)"
