"""What the scores run in: optional packages, imported when first needed, and one thread."""

from __future__ import annotations

import datetime
import functools
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from threadpoolctl import threadpool_limits

P = ParamSpec("P")
T = TypeVar("T")

PACKAGES = ("numpy", "scipy", "pandas", "scikit-learn", "anndata", "scanpy", "igraph", "umap", "scjax")

_DISTRIBUTION = {"umap": "umap-learn", "scib_metrics": "scib-metrics"}


def missing(*modules: str) -> str:
    """Import the modules; "" if all are there, else a sentence that names what to install."""
    absent = []
    environment = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE")
    for module in modules:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Tensorflow not installed", category=ImportWarning)
                importlib.import_module(module)
        except ImportError as error:
            absent.append(f"{_DISTRIBUTION.get(module, module)} ({error})")
    # Importing scib-metrics switches off JAX's preallocation for the whole process; not ours to decide.
    if environment is None:
        os.environ.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)
    else:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = environment
    return f"not installed: {', '.join(absent)}; pip install 'scjax[eval]'" if absent else ""


def version(module: str) -> str:
    """Version of an installed package, "" if it is not installed."""
    try:
        return importlib.metadata.version(_DISTRIBUTION.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return ""


def provenance() -> dict[str, Any]:
    """When this was made and with what: facts of every evaluation."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {p: v for p in PACKAGES if (v := version(p))},
    }


def one_thread(function: Callable[P, T]) -> Callable[P, T]:
    """Run BLAS and OpenMP on one thread.

    The matrices here are small: threads that wait for each other made logistic regression a hundred times
    slower on a busy machine and twice as slow on an idle one. It also makes results independent of the
    number of cores.
    """

    @functools.wraps(function)
    def limited(*args: P.args, **kwargs: P.kwargs) -> T:
        with threadpool_limits(limits=1):
            return function(*args, **kwargs)

    return limited
