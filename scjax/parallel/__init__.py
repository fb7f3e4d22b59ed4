"""Mesh, rules for splitting parameters, placing batches, starting a run over several processes."""

from scjax.parallel.layout import Layout, current
from scjax.parallel.mesh import (
    AXES,
    BATCH_AXES,
    MeshConfig,
    barrier,
    batch_sharding,
    distributed_start,
    everywhere,
    make_mesh,
    process_shard,
    replicated,
    summary,
)
from scjax.parallel.placement import place
from scjax.parallel.rules import RULES, Rules, partition, shardings

__all__ = [
    "AXES",
    "BATCH_AXES",
    "RULES",
    "Layout",
    "MeshConfig",
    "Rules",
    "barrier",
    "batch_sharding",
    "current",
    "distributed_start",
    "everywhere",
    "make_mesh",
    "partition",
    "place",
    "process_shard",
    "replicated",
    "shardings",
    "summary",
]
