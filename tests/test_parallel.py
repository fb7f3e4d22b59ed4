"""Mesh sizes, the table of rules, batch placement, the start of several processes, config checking."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from scjax.config import ConfigError, from_config
from scjax.parallel import (
    RULES,
    MeshConfig,
    distributed_start,
    make_mesh,
    partition,
    place,
    process_shard,
    shardings,
    summary,
)


def struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1), (2, 4, 1)),
        (MeshConfig(2, 2, 2), (2, 2, 2)),
        (MeshConfig(1, 1, -1), (1, 1, 8)),
        (MeshConfig(-1, 0, 0), (8, 1, 1)),  # 0: as the hardware table says, which nobody asked here
        (MeshConfig(0, 8, 0), (1, 8, 1)),
    ],
)
def test_mesh_sizes(config, sizes):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == sizes
    assert tuple(mesh.shape) == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert f"data {sizes[0]}" in summary(mesh)


@pytest.mark.parametrize(
    "config, told",
    [
        (MeshConfig(3, 1, 1), "3 devices; there are 8"),
        (MeshConfig(-1, 3, 1), "a multiple of 3 devices; there are 8"),
        (MeshConfig(-1, -1, 1), "one of them may be -1"),
        (MeshConfig(-2, 1, 1), "at least 1"),
    ],
)
def test_mesh_that_does_not_fit(config, told):
    with pytest.raises(ValueError, match=told):
        make_mesh(config)


def test_explicit_mesh():
    assert make_mesh(axis_type=AxisType.Explicit).axis_types == (AxisType.Explicit,) * 3


def test_partition_follows_the_table():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert partition((16, 32), ("embed", "mlp"), mesh) == P("fsdp", "tensor")
    assert partition((3, 32, 16), ("layers", "mlp", "embed"), mesh) == P(None, "tensor", "fsdp")
    assert partition((50, 16), ("vocab", "embed"), mesh) == P("tensor", "fsdp")
    assert partition((16, 32), (None, None), mesh) == P()
    assert partition((), (), mesh) == P()
    assert partition((50, 16), ("vocab", "embed"), mesh, {**RULES, "vocab": None}) == P(None, "fsdp")


def test_partition_replicates_what_does_not_divide():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    assert partition((49, 16), ("vocab", "embed"), mesh) == P(None, "fsdp")
    assert partition((50, 18), ("vocab", "embed"), mesh) == P("tensor")


def test_partition_refuses():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with pytest.raises(ValueError, match="'heads' and 'mlp' of .* both land on mesh axis 'tensor'"):
        partition((4, 32), ("heads", "mlp"), mesh)
    with pytest.raises(ValueError, match="'embd' .* did you mean 'embed'"):
        partition((4, 32), ("embd", "mlp"), mesh)
    with pytest.raises(ValueError, match="2 dimensions but the axis names"):
        partition((4, 32), ("embed",), mesh)
    with pytest.raises(ValueError, match="block/kernel: .* both land"):
        shardings(mesh, {"block": {"kernel": struct(4, 4)}}, {"block": {"kernel": ("embed", "embed")}})


def test_shardings_keep_the_tree():
    mesh = make_mesh(MeshConfig(1, 8, 1))
    tree = shardings(
        mesh, {"a": {"w": struct(8, 3)}, "b": struct(5)}, {"a": {"w": ("embed", None)}, "b": None}
    )
    assert tree == {"a": {"w": NamedSharding(mesh, P("fsdp"))}, "b": NamedSharding(mesh, P())}


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """A device of another machine, as JAX tells of it: GPU hosts are slices, chips of a TPU host a square."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, ...]
    device_kind: str
    platform: str


GPUS = [Elsewhere(i, i // 8, i // 8, (), "NVIDIA H100 80GB HBM3", "gpu") for i in range(16)]
CHIPS = [
    Elsewhere(4 * y + x, 2 * (y // 2) + x // 2, 0, (x, y, 0), "TPU v5 lite", "tpu")
    for y in range(4)
    for x in range(4)
]


@pytest.mark.parametrize("devices", [GPUS, CHIPS], ids=["2 x 8 GPUs", "TPU v5e-16"])
@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(1, -1, 1), MeshConfig(-1, 4, 2)], ids=str)
def test_machines_hold_whole_pieces_of_a_batch(devices, config):
    mesh = make_mesh(config, devices)
    count = len({device.process_index for device in devices})
    assert [process_shard(mesh, i) for i in range(count)] == [(i, count) for i in range(count)]


@pytest.mark.parametrize("config", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2), MeshConfig(1, 1, 8)])
def test_place_keeps_rows_in_order(config):
    mesh = make_mesh(config)
    batch = tiny_model.cells(0)
    placed = place(batch, mesh)
    assert process_shard(mesh) == (0, 1)
    for name in ("gene_id", "count", "row", "weight"):
        array = getattr(placed, name)
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"))), array.ndim)
        np.testing.assert_array_equal(array, getattr(batch, name))
    np.testing.assert_array_equal(placed.label["dataset"], batch.label["dataset"])
    shard = placed.gene_id.addressable_shards[0]
    assert shard.data.shape[0] == 16 // (mesh.shape["data"] * mesh.shape["fsdp"])


def test_place_refuses_an_uneven_batch():
    with pytest.raises(ValueError, match="12 cells cannot be split evenly .* multiple of 8"):
        place(tiny_model.cells(0, batch_size=12), make_mesh())


def test_no_processes_to_join():
    assert distributed_start({}) == (0, 1)
    assert distributed_start({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}) == (0, 1)
    assert distributed_start({"SLURM_NTASKS": "4"}) == (0, 1)  # sbatch script, not a step
    assert distributed_start({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == (0, 1)
    with pytest.raises(ValueError, match="without JAX_PROCESS_ID"):
        distributed_start({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"})


# ------------------------------------------------------------------------------------------ config


@dataclasses.dataclass(frozen=True)
class Inner:
    d_model: int = 64
    dropout: float = 0.1
    norm: Literal["pre", "post"] = "pre"
    fractions: tuple[float, ...] = (0.5,)
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    model: Inner = Inner()
    extra: dict[str, int] = dataclasses.field(default_factory=dict)


def test_from_config_builds_and_converts():
    config = ConfigDict({"steps": 5, "model": {"dropout": 0, "fractions": [0.25, 1], "limit": None}})
    assert from_config(Outer, config) == Outer(5, Inner(dropout=0.0, fractions=(0.25, 1.0)))
    assert from_config(Outer, {"steps": 5.0, "extra": {"a": 1}}) == Outer(5, extra={"a": 1})


@pytest.mark.parametrize(
    "config, told",
    [
        ({"steps": 1, "model": {"d_modle": 3}}, r"config\.model\.d_modle is unknown; did you mean 'd_model'"),
        ({"steps": 1, "zzz": 3}, "config.zzz is unknown; Valid keys: steps, model, extra"),
        ({}, "config.steps is missing"),
        ({"steps": "many"}, "config.steps is 'many'; expected int"),
        ({"steps": True}, "config.steps is True; expected int"),
        ({"steps": 1.5}, "config.steps is 1.5; expected int"),
        ({"steps": 1, "model": {"norm": "pst"}}, "config.model.norm is 'pst'; did you mean 'post'"),
        ({"steps": 1, "model": {"fractions": [0.5, "x"]}}, r"config\.model\.fractions\[1\] is 'x'"),
        ({"steps": 1, "model": {"limit": "x"}}, "config.model.limit is 'x'; expected int | None"),
        ({"steps": 1, "model": 3}, "config.model is 3; it must be a mapping"),
    ],
)
def test_from_config_refuses(config, told):
    with pytest.raises(ConfigError, match=told):
        from_config(Outer, config)
