"""What the devices can do, and what a run should therefore look like on them: two tables.

:data:`DEVICES` holds what makers publish of a device; :func:`choose` derives mesh, micro-batch and remat
from it. Whatever a config says goes before either.

Sources. Tensor-core peaks are dense: half of what data sheets give "with sparsity".
H100, H200: NVIDIA's data sheets of the H100 (SXM, PCIe, NVL) and H200 (SXM, NVL). A100: data sheet of the
A100 80GB, architecture white paper for 40GB. L40S, L4, A10, V100: their data sheets. B200: HGX B200, an
eighth of the board; GB200: GB200 NVL72, a 72nd of the rack. TPUs: cloud.google.com/tpu/docs, the pages "TPU
v4", "v5e", "v5p", "v6e". Links are the sum over a device's links of what it sends in one direction, half of
the "bidirectional" number that is published: NVLink where there is one, else PCIe, and ICI for TPUs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from scjax.parallel.mesh import MeshConfig, make_mesh

if TYPE_CHECKING:
    from scjax.parallel.layout import Layout

STATE_BYTES = 16  # a parameter: float32 value, gradient and the two moments of Adam
STATE_SHARE = 0.4  # of the memory that the state may take before it is split over more devices
USABLE = 0.8  # of the memory; the rest is for logits, workspaces, gathered layers and fragmentation
ENOUGH_TOKENS = 16_384  # a device and micro-batch: matrix products do not get faster with more
# remat policy -> bytes that a token keeps for the backward pass, per layer and unit of width, in bfloat16
# with dropout and attention that keeps no scores. "dots" keeps the layer's input and the outputs of products
# with weights (q, k, v, out, up 4 x, down). Counted by a test; Korthikanti et al. 2022, section 4.1, have 34
# for "none".
KEPT_BYTES = {"none": 36, "dots": 20, "full": 2}
ASPECT = 64  # width over depth of the published systems' transformers, 43 (scGPT) to 85


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device; None where nothing is published or known.

    Attributes:
      name: as we call it.
      pattern: regular expression that is looked for in JAX's ``device_kind``, whatever its case.
      memory: bytes.
      peak_bf16, peak_f32: operations a second of matrix products, dense; ``peak_f32`` without tensor cores.
      bandwidth: of the memory, bytes a second.
      link: bytes a second that it sends to other devices of its host, rack or slice.
      attention: backend for softmax attention, see :func:`scjax.nn.attention.attention`.
    """

    name: str
    pattern: str = ""
    memory: float | None = None
    peak_bf16: float | None = None
    peak_f32: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    attention: str = "chunked"

    def peak(self, dtype: object) -> float | None:
        """Operations a second of matrix products with inputs of ``dtype``."""
        wide = np.dtype(dtype).itemsize > 2  # type: ignore[call-overload]
        return self.peak_f32 if wide else self.peak_bf16


# The first row that matches counts.
# fmt: off
DEVICES = (
    #      name              pattern              memory bf16      float32  bandwidth link   attention
    Device("GB200",          r"GB200",            186e9, 2500e12,  80e12,   8.0e12,   900e9, "cudnn"),
    Device("B200",           r"B200",             180e9, 2250e12,  75e12,   7.7e12,   900e9, "cudnn"),
    Device("H200 NVL",       r"H200 NVL",         141e9, 835.5e12, 60e12,   4.8e12,   450e9, "cudnn"),
    Device("H200",           r"\bH200",           141e9, 989.5e12, 67e12,   4.8e12,   450e9, "cudnn"),
    Device("H100 NVL",       r"H100 NVL",         94e9,  835.5e12, 60e12,   3.9e12,   300e9, "cudnn"),
    Device("H100 PCIe",      r"H100 PCIe",        80e9,  756.5e12, 51e12,   2.0e12,   300e9, "cudnn"),
    Device("H100",           r"\bH100",           80e9,  989.5e12, 67e12,   3.35e12,  450e9, "cudnn"),
    Device("A100 40GB",      r"A100.*40GB",       40e9,  312e12,   19.5e12, 1.555e12, 300e9, "cudnn"),
    Device("A100 80GB PCIe", r"A100 80GB PCIe",   80e9,  312e12,   19.5e12, 1.935e12, 300e9, "cudnn"),
    Device("A100 80GB",      r"A100",             80e9,  312e12,   19.5e12, 2.039e12, 300e9, "cudnn"),
    Device("L40S",           r"\bL40S",           48e9,  362e12,   91.6e12, 864e9,    32e9,  "cudnn"),
    Device("L4",             r"\bL4\b",           24e9,  121e12,   30.3e12, 300e9,    32e9,  "cudnn"),
    Device("A10",            r"\bA10\b",          24e9,  125e12,   31.2e12, 600e9,    32e9,  "cudnn"),
    # float16 only in its tensor cores, no bfloat16
    Device("V100 32GB",      r"V100-SXM\d-32GB",  32e9,  None,     15.7e12, 900e9,    150e9, "chunked"),
    Device("V100 PCIe",      r"V100-PCIE",        16e9,  None,     14e12,   900e9,    16e9,  "chunked"),
    Device("V100",           r"V100",             16e9,  None,     15.7e12, 900e9,    150e9, "chunked"),
    # of a TPU no peak in float32 is published
    Device("TPU v6e",        r"TPU v6",           32e9,  918e12,   None,    1.638e12, 400e9, "splash"),
    Device("TPU v5e",        r"TPU v5 ?(e|lite)", 16e9,  197e12,   None,    819e9,    200e9, "splash"),
    Device("TPU v5p",        r"TPU v5(p|$)",      95e9,  459e12,   None,    2.765e12, 600e9, "splash"),
    Device("TPU v4",         r"TPU v4$",          32e9,  275e12,   None,    1.2e12,   300e9, "splash"),
    # processors differ too much for a row of numbers
    Device("cpu", r"^cpu", attention="cellwise"),
)
# fmt: on


def device_of(kind: str | None = None) -> Device:
    """The row of a device.

    Args:
      kind: JAX's ``device_kind``, such as "NVIDIA H100 80GB HBM3", or a row's name, such as "H100"; None for
        this process's first device.

    Returns:
      The row. Of a kind that the table does not have, and of a part of a GPU (MIG), one in which nothing is
      known, with a backend that runs anywhere.
    """
    kind = jax.local_devices()[0].device_kind if kind is None else kind
    for device in DEVICES:
        if kind.lower() == device.name.lower():
            return device
    if "MIG" not in kind:
        for device in DEVICES:
            if re.search(device.pattern, kind, re.IGNORECASE):
                return device
    return Device(kind)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`choose` says.

    Attributes:
      mesh: sizes, all of them given.
      tokens: of a micro-batch that a device takes at once, padding included; None: no limit is known.
      remat: policy, see :class:`scjax.nn.layers.Stack`.
      attention: backend, see :func:`scjax.nn.attention.attention`.
    """

    mesh: MeshConfig
    tokens: int | None
    remat: str
    attention: str


def choose(n_devices: int, n_parameters: int, device: Device, mesh: MeshConfig | None = None) -> Plan:
    """Mesh, micro-batch, remat and attention for a model on so many devices of one kind.

    The state is split over as few devices as leave it at most 40 % of each one's memory; ``tensor`` is
    used only where the config asks for it, since it moves activations in every layer. Of the rest of the
    memory a micro-batch takes what it can, and the cheapest remat policy is taken that has room for 16,384
    tokens. Width and depth are guessed from the number of parameters, as if ``12 d^2`` a layer and
    ``d = 64`` times the depth: ``scjax config cost`` has the compiler's own numbers for a config.

    Args:
      n_devices: of all processes.
      n_parameters: of the model.
      device: their row.
      mesh: what is given goes before the table: only sizes 0 are chosen here.

    Raises:
      ValueError: the given sizes do not fit the devices.
    """
    sizes = _sizes(n_devices, n_parameters, device, mesh or MeshConfig(0, 0, 0))
    split = sizes.fsdp * sizes.tensor
    if device.memory is None:
        return Plan(sizes, None, "none", device.attention)
    room = max(0.0, USABLE * device.memory - STATE_BYTES * n_parameters / split)
    width = (ASPECT * n_parameters / 12) ** (1 / 3)
    fit = {
        policy: max(1024, int(room / (kept * width * width / ASPECT)) // 1024 * 1024)
        for policy, kept in KEPT_BYTES.items()
    }
    remat = next((policy for policy, tokens in fit.items() if tokens >= ENOUGH_TOKENS), "full")
    return Plan(sizes, fit[remat], remat, device.attention)


def layout_for(
    mesh: MeshConfig | None,
    n_parameters: int,
    *,
    devices: Sequence[Any] | None = None,
    axis_type: AxisType = AxisType.Auto,
) -> Layout:
    """The layout of a model of so many parameters on ``devices`` (default: all), as :func:`choose` says."""
    from scjax.parallel.layout import Layout  # which asks this module for the backend of its mesh

    devices = jax.devices() if devices is None else list(devices)
    plan = choose(len(devices), n_parameters, device_of(devices[0].device_kind), mesh)
    made = make_mesh(plan.mesh, devices, axis_type)
    return Layout(made, attention=plan.attention, remat=plan.remat, tokens=plan.tokens)


def accumulate_for(batch_size: int, length: int, mesh: Mesh, tokens: int | None) -> int:
    """Micro-batches that a batch must be cut into: the fewest with which a device's share fits.

    Args:
      batch_size: cells of the whole batch.
      length: gene slots of the longest batch.
      mesh: over whose ``data`` and ``fsdp`` the rows lie.
      tokens: that a device takes at once, of :class:`Plan` or :class:`Layout`; None for no limit.

    Returns:
      A divisor of ``batch_size`` that leaves each device a whole number of rows; the largest such where even
      one row is too long. 1 where the batch does not split evenly over the devices, which
      :func:`scjax.parallel.place` refuses.
    """
    slices = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = batch_size // slices
    if tokens is None or batch_size % slices:
        return 1
    divisors = [i for i in range(1, rows + 1) if rows % i == 0]
    return next((i for i in divisors if rows // i * length <= tokens), rows)


def _sizes(n_devices: int, n_parameters: int, device: Device, mesh: MeshConfig) -> MeshConfig:
    tensor = mesh.tensor or 1
    fsdp, data = mesh.fsdp, mesh.data
    if fsdp == 0:
        others = max(1, data) * max(1, tensor)
        left = max(1, n_devices // others)
        fsdp = left if data > 0 and tensor > 0 else 1
        if device.memory is not None and fsdp == 1:
            most = STATE_SHARE * device.memory * max(1, tensor)
            divisors = [i for i in range(1, left + 1) if left % i == 0]
            fsdp = next((i for i in divisors if STATE_BYTES * n_parameters / i <= most), left)
    if data == 0:
        data = 1 if -1 in (fsdp, tensor) else -1
    return MeshConfig(*MeshConfig(data, fsdp, tensor).sizes(n_devices))
