"""scjax: pretrain, adapt and examine single-cell foundation models in JAX and Flax.

Names are imported on first use, so that ``import scjax.eval`` brings in neither JAX nor Flax.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Corpus": "scjax.corpus",
    "Mixture": "scjax.corpus",
    "append_corpus": "scjax.corpus",
    "build_corpus": "scjax.corpus",
    "open_corpus": "scjax.corpus",
    "Vocabulary": "scjax.genes",
    "CellBatch": "scjax.types",
    "load": "scjax.api",
    "embed": "scjax.api",
    "annotate": "scjax.api",
    "import_pretrained": "scjax.api",
    "export_pretrained": "scjax.api",
    "Reference": "scjax.reference",
    "build_reference": "scjax.reference",
    "map_cells": "scjax.reference",
}
_ROOMS = (
    "api",
    "corpus",
    "datasets",
    "encoding",
    "eval",
    "genes",
    "interop",
    "loader",
    "models",
    "nn",
    "objectives",
    "parallel",
    "reference",
    "train",
    "types",
)

__all__ = [*_WHERE, *_ROOMS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"scjax.{name}")
    raise AttributeError(f"module 'scjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
