"""A published checkpoint as it was read, before its tensors become a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from scjax.genes import Vocabulary


@dataclasses.dataclass(frozen=True)
class Source:
    """What ``read(path, ...)`` of a system's module returns.

    Attributes:
      system: "geneformer", ...
      config: hyper-parameters, the fields of the system's config class.
      vocabulary: genes in the order of the model's table.
      tensors: their name -> array, what the system's rules turn into parameters.
      buffers: path of a buffer -> value ("median"), for what checkpoints do not hold; None for none.
      notes: a line each, for people: which files were used, what was assumed.
    """

    system: str
    config: dict[str, Any]
    vocabulary: Vocabulary
    tensors: dict[str, np.ndarray]
    buffers: dict[str, Any] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
