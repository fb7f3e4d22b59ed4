"""A published checkpoint as it was read, and what a system's module of interop says about one.

``scjax/interop/<system>.py`` holds

- ``read(path, *, <dictionary>=None, ...) -> Source``: path is a file or a directory; the dictionaries are
  files that the user gives by name (``token_dictionary``, ``gene_medians``, ``genes``), or choices
  (``which``). It opens files through :mod:`scjax.interop.files`, which notes them for the provenance;
- ``rules(config, n_genes) -> list[Rule]``: config holds every field of the system's config;
- ``IGNORED``: regular expression of the whole name of a tensor -> why it is not needed;
- where the system is written too, ``write(directory, model)``: model is a ``scjax.api.Model``.
"""

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
      buffers: path of a buffer -> value ("median"), for what checkpoints do not hold; None for none. A
        buffer that neither these nor a rule fill has the value it has in a new model.
      notes: a line each, for people: which files were used, what was assumed.
    """

    system: str
    config: dict[str, Any]
    vocabulary: Vocabulary
    tensors: dict[str, np.ndarray]
    buffers: dict[str, Any] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
