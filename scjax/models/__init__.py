"""The systems: one file each, four methods each.

A model is an ``nnx.Module`` with

- ``encode(batch, key) -> inputs``: a CellBatch to what the network reads;
- ``__call__(inputs, keys=None) -> outputs``;
- ``loss(batch, key) -> (sum, weight, metrics)``: metrics map names to (sum, weight); may update the
  module's :class:`~scjax.nn.Buffer` variables; ``deterministic`` (set by ``.eval()``) turns dropout off;
- ``embed(batch, keys=None) -> float32 [B, D]``; ``keys`` [B] are those of dropout, where what is built on the
  embedding trains the model (:mod:`scjax.finetune`); a model that takes none is embedded as in evaluation.

Optional: ``states(batch, keys=None) -> (int32 [B, S], float [B, S, E])``, genes (-1: none) and their states
in the context of their cell, for tasks at the level of genes; ``context`` in the config, what it is told of a
cell beside its counts, see :mod:`scjax.nn.context`; ``WHOLE_CELLS = True`` for one that must not be given a
sample of a cell's genes (``data.max_genes``); ``tables(config)`` for values of genes from outside, see
``scjax.train.gene_tables``;
``work(n_genes) -> (tokens, operations)``, each [B], for MFU, see :mod:`scjax.nn.work`;
``compares_cells(config)``, a static method, true where the loss compares the cells of a batch, which is then
cut into micro-batches only where the config says so; ``READOUTS``, for learning rates that hold for all
widths, see :mod:`scjax.train.width`.

Training, evaluation and the API know nothing else of a model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from scjax.config import from_config, nearest
from scjax.nn.module import Abstract, abstract

SYSTEMS = {
    "celllm": ("scjax.models.celllm", "CellLM", "CellLMConfig"),
    "geneformer": ("scjax.models.geneformer", "Geneformer", "GeneformerConfig"),
    "scbert": ("scjax.models.scbert", "ScBERT", "ScBERTConfig"),
    "scfoundation": ("scjax.models.scfoundation", "ScFoundation", "ScFoundationConfig"),
    "scgpt": ("scjax.models.scgpt", "ScGPT", "ScGPTConfig"),
}


def resolve(system: str) -> tuple[Callable[..., nnx.Module], type]:
    """The model class and the config class of a system.

    Args:
      system: a name in ``SYSTEMS``, or "package.module:Model" for a system of one's own, whose config
        class is ``ModelConfig`` in the same module.

    Raises:
      ValueError: unknown name; says which there are.
    """
    if ":" in system:
        file, name = system.split(":", 1)
        where = (file, name, f"{name}Config")
    elif system in SYSTEMS:
        where = SYSTEMS[system]
    else:
        raise ValueError(
            f"unknown system {system!r}{nearest(system, SYSTEMS)}; there are {sorted(SYSTEMS)}, and "
            '"package.module:Model" names one of your own'
        )
    module = importlib.import_module(where[0])
    return getattr(module, where[1]), getattr(module, where[2])


def build(system: str, config: Mapping[str, Any], n_genes: int, seed: int = 0) -> Abstract:
    """The abstract model; its parameters appear with ``scjax.nn.initialise``.

    Args:
      system: see :func:`resolve`.
      config: fields of the system's config class; unknown ones are an error that names the nearest.
      n_genes: size of the vocabulary.
      seed: of the initial parameters.
    """
    model, config_class = resolve(system)
    resolved: Any = from_config(config_class, config, where="model")
    return abstract(lambda: model(resolved, n_genes, rngs=nnx.Rngs(seed)))
