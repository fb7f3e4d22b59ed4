"""Starts experiments/pretrain.py in processes of its own, as a user would."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

from synthetic import synthetic_adata

import scjax

ROOT = pathlib.Path(__file__).parent.parent
# ml_collections loads config files in a way that newer Pythons deprecate; AnnData asks pandas for old options
OLD = ("the load_module:DeprecationWarning", "The 'future.infer_string'", "The 'mode.chained_assignment'")
WARNINGS = ["-W", "error", *(part for old in OLD for part in ("-W", f"ignore:{old}"))]


def build_corpus(path: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """A corpus of 300 cells, 30 of them for validation."""
    adata = synthetic_adata(300, 48, seed=seed)
    scjax.build_corpus([adata], path, names=["study"], labels=["cell_type"], validation=0.1, progress=False)
    return path


def environment(cache: pathlib.Path, devices: int) -> dict[str, str]:
    """Variables of a process with so many virtual devices and a cache of compiled functions."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT / "tests"),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(
    config: str,
    workdir: pathlib.Path,
    *,
    cache: pathlib.Path,
    devices: int = 1,
    process: tuple[int, int, int] | None = None,
    script: pathlib.Path = ROOT / "experiments" / "pretrain.py",
    **overrides: Any,
) -> subprocess.Popen:
    """A running pretraining.

    Args:
      config: config file.
      workdir: run directory; output goes to a file beside it.
      cache: for compiled functions, shared by runs.
      devices: virtual devices of this process.
      process: (index, count, port of the coordinator) of one of several.
      script: what to run.
      **overrides: config fields, with "__" for ".".
    """
    variables = environment(cache, devices)
    index = 0
    if process is not None:
        index, count, port = process
        variables |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in overrides.items()]
    command = [sys.executable, *WARNINGS, str(script), f"--config={config}", f"--workdir={workdir}", *flags]
    with output_of(workdir, index).open("w") as output:
        return subprocess.Popen(command, env=variables, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def output_of(workdir: pathlib.Path, process: int = 0) -> pathlib.Path:
    return workdir.with_name(f"{workdir.name}.{process}.out")


def finish(*processes: subprocess.Popen, workdir: pathlib.Path, succeed: bool = True) -> str:
    """Waits for all; the output of the first. Fails with the outputs if one did not end as it should."""
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    outputs = [output_of(workdir, index).read_text() for index in range(len(processes))]
    assert all((code == 0) == succeed for code in codes), f"exit codes {codes}\n" + "\n".join(outputs)
    return outputs[0]


def pretrain(config: str, workdir: pathlib.Path, *, succeed: bool = True, **options: Any) -> str:
    """Runs to the end in one process; its output."""
    return finish(start(config, workdir, **options), workdir=workdir, succeed=succeed)


def metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))} for line in lines]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
