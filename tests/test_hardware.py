"""The tables of hardware: which row a device gets, and what a run is told to look like on it."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scjax.nn.layers import Block, Stack
from scjax.parallel import (
    DEVICES,
    Layout,
    MeshConfig,
    accumulate_for,
    choose,
    device_of,
    layout_for,
    make_mesh,
)
from scjax.parallel.hardware import KEPT_BYTES


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10", "A10"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("cpu", "cpu"),
        ("h100", "H100"),
        ("L4", "L4"),
    ],
)
def test_a_kind_of_device_has_its_row(kind, name):
    assert device_of(kind).name == name


@pytest.mark.parametrize(
    "kind",
    ["NVIDIA L40", "NVIDIA A10G", "TPU v4 lite", "AMD Instinct MI300X", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"],
)
def test_nothing_is_invented_of_an_unknown_device(kind):
    device = device_of(kind)
    assert device.name == kind and device.attention == "chunked"
    assert {device.memory, device.peak_bf16, device.peak_f32, device.bandwidth, device.link} == {None}
    plan = choose(8, 10**9, device)
    assert plan.tokens is None and plan.remat == "none" and plan.mesh == MeshConfig(8, 1, 1)


def test_every_row_is_found_by_its_own_name_and_its_numbers_hang_together():
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    for device in DEVICES:
        assert device_of(device.name) is device
        if device.name != "cpu":
            assert 1e10 < device.memory < device.bandwidth < (device.peak_bf16 or device.peak_f32)
            assert device.link < device.bandwidth
            # operations that a byte from memory must serve for the peak to be reached: 50 to 600
            assert 10 < (device.peak_bf16 or device.peak_f32) / device.bandwidth < 600
    assert device_of("H100").peak("bfloat16") == device_of("H100").peak_bf16
    assert device_of("H100").peak(np.float32) == device_of("H100").peak_f32


def test_the_state_is_split_as_far_as_the_memory_demands_and_no_further():
    h100 = device_of("H100")
    for n, fsdp in ((10**8, 1), (10**9, 1), (4 * 10**9, 2), (30 * 10**9, 16)):
        plan = choose(64, n, h100)
        assert plan.mesh == MeshConfig(64 // fsdp, fsdp, 1)
        assert 16 * n / fsdp <= 0.4 * h100.memory
    assert choose(8, 10**12, h100).mesh == MeshConfig(1, 8, 1)  # as far as there are devices
    assert choose(12, 4 * 10**9, h100).mesh == MeshConfig(6, 2, 1)


@pytest.mark.parametrize(
    "given, sizes",
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(-1, 2, 1), (4, 2, 1)),
        (MeshConfig(0, 0, 2), (4, 1, 2)),
        (MeshConfig(0, -1, 1), (1, 8, 1)),
        (MeshConfig(2, 0, 1), (2, 4, 1)),
        (MeshConfig(-1, 0, 1), (4, 2, 1)),
        (MeshConfig(0, 0, 0), (4, 2, 1)),
    ],
)
def test_what_the_config_says_goes_before_the_table(given, sizes):
    n = 10**8 if given == MeshConfig(0, 0, 2) else 4 * 10**9
    found = choose(8, n, device_of("H100"), given).mesh
    assert (found.data, found.fsdp, found.tensor) == sizes


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="there are 8"):
        choose(8, 10**8, device_of("H100"), MeshConfig(3, 0, 1))


def test_less_memory_or_more_parameters_keep_less_for_the_backward_pass():
    policies = ["none", "dots", "full"]
    kept = [
        policies.index(choose(1, n, device_of("TPU v5e")).remat) for n in (10**7, 10**8, 3 * 10**8, 6 * 10**8)
    ]
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == 2
    tokens = [choose(1, 10**8, device_of(kind)).tokens for kind in ("L4", "A100", "H200")]
    assert tokens == sorted(tokens) and tokens[0] >= 16_384


def test_a_batch_is_cut_as_little_as_fits():
    mesh = make_mesh(MeshConfig(4, 2, 1))  # eight rows of a micro-batch at least
    assert accumulate_for(64, 1000, mesh, None) == 1
    assert accumulate_for(64, 1000, mesh, 8000) == 1
    assert accumulate_for(64, 1000, mesh, 7999) == 2
    assert accumulate_for(96, 1000, mesh, 5000) == 3  # 12 rows a device, a divisor of which is 4
    assert accumulate_for(64, 1000, mesh, 10) == 8
    assert accumulate_for(60, 1000, mesh, 10) == 1


def test_a_layout_for_the_devices_there_are():
    layout = layout_for(MeshConfig(0, 2, 0), 10**6)
    assert dict(layout.mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert (layout.attention, layout.remat, layout.tokens) == ("cellwise", "none", None)
    explicit = layout_for(None, 10**6, devices=jax.devices()[:2], axis_type=jax.sharding.AxisType.Explicit)
    assert dict(explicit.mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    assert set(explicit.mesh.axis_types) == {jax.sharding.AxisType.Explicit}


# ------------------------------------------------------------------ what remat keeps
CELLS, LENGTH, WIDTH, LAYERS = 2, 32, 64, 3


def stack(remat, dtype):
    """A graph definition, its parameters, and the loss of a stack with dropout."""
    make = lambda rngs: Block(  # noqa: E731
        WIDTH, 4, 4 * WIDTH, dropout=0.1, backend="chunked", dtype=dtype, rngs=rngs
    )
    graphdef, params = nnx.split(Stack(LAYERS, make, remat=remat, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (CELLS, LENGTH, WIDTH), dtype)
    keys = jax.random.split(jax.random.key(2), CELLS)

    def loss(params, x):
        out = nnx.merge(graphdef, params)(x, jnp.ones(x.shape[:2], bool), keys=keys)
        return jnp.square(out.astype(jnp.float32)).mean()

    return loss, params, x


def kept(remat, capsys):
    """Bytes that the backward pass needs of a token, per layer and unit of width."""
    jax.ad_checkpoint.print_saved_residuals(*stack(remat, jnp.bfloat16))
    found = 0
    for kind, bits, shape in re.findall(
        r"^(bool|[a-z]+)(\d*)\[([\d,]+)\] (?!from the argument)", capsys.readouterr().out, re.M
    ):
        sizes = [int(n) for n in shape.split(",")]
        if sizes[0] == LAYERS and math.prod(sizes) >= LAYERS * CELLS * LENGTH:
            found += math.prod(sizes) * (1 if kind == "bool" else int(bits) // 8)
    return found / (LAYERS * CELLS * LENGTH * WIDTH)


@pytest.mark.parametrize("remat", KEPT_BYTES)
def test_a_remat_policy_keeps_what_the_table_says(remat, capsys):
    few = 0.3 + 4 * 5 / WIDTH  # means and variances, and the softmax's denominators: a number a token or head
    assert KEPT_BYTES[remat] <= kept(remat, capsys) <= KEPT_BYTES[remat] + few


def test_auto_is_the_remat_of_the_layout(capsys):
    assert kept("auto", capsys) == kept("none", capsys)
    with Layout(make_mesh(devices=jax.devices()[:1]), remat="full").active():
        assert kept("auto", capsys) == kept("full", capsys)
        assert kept("dots", capsys) > kept("full", capsys)  # what a config says goes before
    with pytest.raises(ValueError, match="one of auto, none, dots, full, not 'some'"):
        stack("some", None)


def test_remat_changes_no_gradient():
    due = None
    for remat in KEPT_BYTES:
        loss, params, x = stack(remat, jnp.float32)
        found = jax.jit(jax.value_and_grad(loss))(params, x)
        due = found if due is None else due
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
