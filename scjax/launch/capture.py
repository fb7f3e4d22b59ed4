"""What a run ran on and from, written into its directory at every start."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import scjax

PACKAGES = (
    "jax jaxlib jax-cuda12-plugin jax-cuda13-plugin libtpu flax optax orbax-checkpoint grain tensorstore "
    "numpy anndata zarr ml-collections"
).split()
VARIABLES = re.compile(
    "(JAX|XLA|LIBTPU|TPU|MEGASCALE|CUDA|NVIDIA|NCCL|TF|OMP|MKL|SLURM|SCJAX|PYTHON)_.*|"
    "PYTHONPATH|PYTHONHASHSEED|VIRTUAL_ENV|CONDA_PREFIX|JOB_COMPLETION_INDEX|HOSTNAME"
)
SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE")


def capture(run: str | Path) -> dict[str, Any]:
    """Adds this start to the list in ``environment.json`` of a run; only process 0 of a run writes.

    Args:
      run: the run directory; it exists.

    Returns:
      What was added: time, command line, directory, host, Python, versions, devices (where JAX is in use),
      variables of the environment that matter (never those whose names speak of secrets), and the git state
      of the code: of scjax, and of the directory that the run was started in.
    """
    jax = sys.modules.get("jax")
    about = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.orig_argv,
        "directory": os.getcwd(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {"scjax": scjax.__version__} | _versions(),
        "devices": None if jax is None else _devices(jax),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if VARIABLES.fullmatch(name) and not SECRET.search(name.upper())
        },
        "git": {"scjax": git_state(Path(scjax.__file__).parent), "directory": git_state(os.getcwd())},
    }
    if jax is None or jax.process_index() == 0:
        file, partial = Path(run) / "environment.json", Path(run) / ".environment.json.partial"
        starts = json.loads(file.read_text()) if file.exists() else []
        partial.write_text(json.dumps([*starts, about], indent=1) + "\n")
        os.replace(partial, file)
    return about


def git_state(directory: str | Path) -> dict[str, Any] | None:
    """``{"commit", "changed"}`` of the repository that a directory lies in; ``changed`` lists files that
    differ from the commit. None where there is no repository or no git."""
    try:
        commit = _git(directory, "rev-parse", "HEAD").strip()
        status = _git(directory, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": [line[3:] for line in status.splitlines()]}


def _git(directory: str | Path, *words: str) -> str:
    command = ["git", "-C", str(directory), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def _devices(jax: Any) -> dict[str, Any]:
    devices = jax.devices()
    return {
        "kind": devices[0].device_kind,
        "platform": devices[0].platform,
        "count": len(devices),
        "processes": jax.process_count(),
    }
