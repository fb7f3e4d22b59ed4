"""Mesh, rules for splitting parameters, placing batches, starting a run over several processes."""

from scjax.parallel.hardware import DEVICES, Device, Plan, accumulate_for, choose, device_of, layout_for
from scjax.parallel.layout import Layout, current
from scjax.parallel.mesh import (
    AXES,
    BATCH_AXES,
    MeshConfig,
    batch_sharding,
    make_mesh,
    process_shard,
    replicated,
    summary,
)
from scjax.parallel.placement import place
from scjax.parallel.prefetch import Prefetch
from scjax.parallel.processes import barrier, distributed_start, from_all, together
from scjax.parallel.rules import RULES, Rules, partition, shardings

__all__ = [
    "AXES",
    "BATCH_AXES",
    "DEVICES",
    "Device",
    "RULES",
    "Layout",
    "MeshConfig",
    "Plan",
    "Prefetch",
    "Rules",
    "accumulate_for",
    "barrier",
    "batch_sharding",
    "choose",
    "current",
    "device_of",
    "distributed_start",
    "from_all",
    "layout_for",
    "make_mesh",
    "partition",
    "place",
    "process_shard",
    "replicated",
    "shardings",
    "summary",
    "together",
]
