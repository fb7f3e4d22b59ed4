"""What a step will take, told before there are data or devices.

The state is known from its shardings. For the rest the very step of a run is compiled for as many virtual CPU
devices as asked for, in a process of its own; nothing is allocated. Of the partitioned program the matrix
products and collectives are counted, each as often as it runs, and of the compiled one the memory.

The CPU's compiler gives more memory than a GPU's would: it works bfloat16 out in float32, so that temporaries
are up to twice as large; and it has no kernel for attention, for which "chunked" stands in.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from scjax.config import from_config
from scjax.models import build
from scjax.nn.work import late_work
from scjax.parallel import AXES, Layout, Plan, choose, device_of, make_mesh
from scjax.train.ahead import abstract_batch, device_bytes
from scjax.train.config import RunConfig
from scjax.train.data import micro_batches
from scjax.train.hlo import partitioned, work
from scjax.train.optimizer import make_optimizer
from scjax.train.state import State, abstract_state, count_parameters
from scjax.train.step import make_train_step
from scjax.train.width import model_of

STANDS_IN = {"cudnn": "chunked", "splash": "chunked"}  # kernels that no CPU compiles
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # machine code is not run
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be costed.

    Attributes:
      config: of the run.
      n_genes: size of the vocabulary.
      devices: how many.
      device: their kind, see :func:`scjax.parallel.device_of`.
      length: gene slots of a batch; 0 for ``model.max_length`` or, where the system has no such field, all
        genes: the longest there is.
    """

    config: RunConfig
    n_genes: int
    devices: int = 1
    device: str = "H100"
    length: int = 0

    @property
    def slots(self) -> int:
        return self.length or min(self.config.model.get("max_length", self.n_genes), self.n_genes)

    @functools.cached_property
    def n_parameters(self) -> int:
        return count_parameters(build(self.config.system, self.config.model, self.n_genes))

    @property
    def plan(self) -> Plan:
        """Mesh, attention and remat: the config's, or the hardware table's."""
        return choose(self.devices, self.n_parameters, device_of(self.device), self.config.mesh)


def _step(job: Job, mesh: Any, *, kernels: bool) -> tuple[Any, Any, State, Any, dict[str, Any]]:
    """``(model, step, abstract state, abstract batch, facts)`` of a job on a mesh, which may be abstract;
    without ``kernels``, with what any device compiles in their place."""
    config, plan = job.config, job.plan
    settings = dict(config.model)
    facts = {
        "mesh": dict(mesh.shape),
        "attention": settings.get("attention", "auto").replace("auto", plan.attention),
        "remat": settings.get("remat", "auto").replace("auto", plan.remat),
    }
    compiled = facts["attention"] if kernels else STANDS_IN.get(facts["attention"], facts["attention"])
    if "attention" in settings:
        settings["attention"] = compiled
    if settings.get("decoding") == "auto" and job.device != "cpu":
        settings["decoding"] = "batched"
    model, base = model_of(dataclasses.replace(config, model=settings), job.n_genes)
    tx, _ = make_optimizer(config.optimizer, config.train.steps, model, base)
    abstract = abstract_state(model, tx, mesh, ema=config.optimizer.ema is not None)
    cells = config.data.batch_size
    layout = Layout(mesh, attention=compiled, remat=plan.remat, tokens=plan.tokens)
    accumulate = micro_batches(config, model, job.slots, layout)
    step = make_train_step(
        model,
        tx,
        abstract,
        seed=config.seed,
        accumulate=accumulate,
        layout=layout,
        guard=config.train.guard,
        ema=config.optimizer.ema,
    )
    values = {name: _shape(config.model, name) for name in config.data.values or ()}
    batch = abstract_batch(mesh, cells, job.slots, config.data.labels or (), values)
    return (
        model,
        step,
        abstract,
        batch,
        facts | {"cells": cells, "length": job.slots, "accumulate": accumulate},
    )


def _shape(entries: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Of a value of one cell, by what reads it in the model's config: there may be no corpus to ask."""
    for key, entry in entries.items():
        if key == name and isinstance(entry, Mapping) and "size" in entry:
            return (entry["size"] * (entry.get("width", 1) if entry.get("kind") == "neighbours" else 1),)
        if isinstance(entry, Mapping) and (shape := _shape(entry, name)):
            return shape
    return ()


def abstract_mesh(job: Job) -> Any:
    """The job's mesh without devices, an ``AbstractMesh``."""
    sizes = job.plan.mesh.sizes(job.devices)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shard_bytes(leaf: Any) -> int:
    """Bytes of one device's part of an array or ``jax.ShapeDtypeStruct`` with a sharding."""
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    named = [axis for entry in spec if entry for axis in (entry if isinstance(entry, tuple) else (entry,))]
    return leaf.size * np.dtype(leaf.dtype).itemsize // math.prod(mesh.shape[axis] for axis in named)


def state_bytes(abstract: State) -> dict[str, int]:
    """Bytes a device of each part of a state, "params", "opt", ...: exact."""
    return {name: sum(map(shard_bytes, jax.tree.leaves(part))) for name, part in abstract.items()}


def cost(job: Job) -> dict[str, Any]:
    """What a step takes; numbers that JSON can hold. Needs ``job.devices`` devices in this process.

    Returns:
      ``mesh``, ``cells``, ``length``, ``accumulate``, ``attention``, ``remat``: how it is computed;
      ``parameters``: their number; ``state``: bytes a device by part; ``memory``: bytes a device, see
      :func:`scjax.train.ahead.device_bytes`; ``tokens``, ``operations``: of all devices, see
      :mod:`scjax.nn.work`; ``computed``: operations that one device computes, what is recomputed included;
      ``collectives``: kind -> [how often, bytes that a device sends]; ``seconds`` that compiling took.
    """
    mesh = make_mesh(job.plan.mesh, jax.devices()[: job.devices])
    model, step, abstract, batch, facts = _step(job, mesh, kernels=False)
    began = time.perf_counter()
    compiled, text = partitioned(step.lower(abstract, batch))
    done = work(text, job.devices)
    tokens, operations = late_work(model, np.full(facts["cells"], job.slots))  # no padding
    return facts | {
        "parameters": job.n_parameters,
        "state": state_bytes(abstract),
        "memory": device_bytes(compiled),
        "tokens": tokens,
        "operations": operations,
        "computed": done.operations,
        "collectives": {kind: list(pair) for kind, pair in sorted(done.collectives.items())},
        "seconds": time.perf_counter() - began,
    }


def cost_elsewhere(job: Job) -> dict[str, Any]:
    """:func:`cost` in a process of its own, which has as many virtual devices as the job asks for.

    Raises:
      ValueError: it cannot be compiled; with the last lines of what was said.
    """
    flags = f"--xla_force_host_platform_device_count={job.devices} {FLAGS}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # a system of one's own
    given = json.dumps(dataclasses.asdict(job))
    done = subprocess.run(
        [sys.executable, "-m", "scjax.train.cost"],
        input=given,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(
            "\n".join(done.stderr.strip().splitlines()[-3:]) or f"it ended with {done.returncode}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def roofline(found: dict[str, Any], job: Job, link: float | None = None) -> dict[str, float]:
    """Seconds that a step takes at least on the job's device; nothing where its peak is not known.

    Args:
      found: from :func:`cost`.
      job: of it.
      link: bytes a second that a device sends to others; None for the table's, within a host.

    Returns:
      ``products``: all operations at the device's peak. ``links``: all bytes that it sends. ``update``: its
      part of parameters and optimiser read and written once. ``step``: products and update, or links where
      they take longer. ``mfu``: at most so much, at that time.
    """
    device = device_of(job.device)
    peak = device.peak(job.config.model.get("dtype", "float32"))
    link = device.link if link is None else link
    if not peak or not device.bandwidth or (job.devices > 1 and not link):
        return {}
    products = found["computed"] / peak
    links = sum(sent for _, sent in found["collectives"].values()) / link if link else 0.0
    update = 2 * sum(found["state"][part] for part in ("params", "opt")) / device.bandwidth
    step = max(products + update, links)
    mfu = found["operations"] / job.devices / peak / step
    return {"products": products, "links": links, "update": update, "step": step, "mfu": mfu}


def lower(job: Job, platform: str) -> dict[str, Any]:
    """The step lowered for an abstract mesh of the job's devices, of "cuda", "tpu" or "cpu".

    Returns:
      ``bytes`` of the program, and ``attention``, the backend in it: "chunked" where that of the device needs
      something that is not here, as cuDNN's does.
    """
    mesh, device = abstract_mesh(job), device_of(job.device)
    kernels = platform != "cpu" and (platform == "tpu") == device.name.startswith("TPU")
    try:
        _, step, abstract, batch, facts = _step(job, mesh, kernels=kernels)
        lowered = step.trace(abstract, batch).lower(lowering_platforms=(platform,))
    except RuntimeError as error:
        if not kernels or "cuDNN" not in str(error):
            raise
        kernels = False
        _, step, abstract, batch, facts = _step(job, mesh, kernels=kernels)
        lowered = step.trace(abstract, batch).lower(lowering_platforms=(platform,))
    attention = facts["attention"]
    return {
        "bytes": len(lowered.as_text()),
        "attention": attention if kernels else STANDS_IN.get(attention, attention),
    }


def main() -> None:
    given = json.load(sys.stdin)
    given["config"] = from_config(RunConfig, given["config"], where="config")
    try:
        print(json.dumps(cost(Job(**given))))
    except (ValueError, KeyError) as error:  # what the config asks for; without the compiler's stack
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
