"""scBERT's checkpoints in: ``panglao_pretrain.pth`` and what its fine-tuning writes.

The file does not say which gene is which row of its table: that is the order of ``var_names`` of the
authors' reference (16,906 symbols), which the user gives.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from scjax.genes import Vocabulary
from scjax.interop import performers
from scjax.interop.mapping import Rule, dense
from scjax.interop.performers import (
    gene_list,
    map_head_rules,
    performer_rules,
    read_state,
    sizes,
    split_table,
)
from scjax.interop.source import Source
from scjax.models.scbert import N_TOKENS

IGNORED = performers.IGNORED
LIST = (
    "scBERT's are the var_names of its preprocessed reference, panglao_10000.h5ad; the repository "
    "nano-scBERT has them as gene_order.txt."
)


def read(path: str | pathlib.Path, *, genes: str | pathlib.Path | Vocabulary | None = None) -> Source:
    """Reads a pretrained or a fine-tuned model.

    Args:
      path: the ``.pth`` file.
      genes: the gene list in the order of training: a text file with a symbol a line, a vocabulary table
        (TSV with a column gene_id), or a Vocabulary.

    Raises:
      FileNotFoundError, ImportError: see :func:`scjax.interop.files.read_tensors`.
      ValueError: not a checkpoint of scBERT (says what is missing or other), or no gene list of its length.
    """
    path = pathlib.Path(path)
    tensors, notes = read_state(path)
    config = sizes(tensors, "", N_TOKENS, path)
    n_genes = len(tensors[performers.TABLE]) - 1
    if "to_out.fc3.weight" in tensors:
        config["n_outputs"] = len(tensors["to_out.fc3.weight"])
        notes.append(f"a fine-tuned model with {config['n_outputs']} outputs")
    vocabulary, told = gene_list(genes, n_genes, path, LIST)
    notes += [told, 'for the numbers of the original one cell at a time: stabiliser = "global"']
    known = {"gene/known": np.ones(n_genes, np.float32)}
    return Source("scbert", config, vocabulary, split_table(tensors, 1), known, notes)


def rules(config: Mapping[str, Any], n_genes: int) -> list[Rule]:
    """Tensors <-> variables."""
    table = performer_rules("", int(config["n_heads"]))
    if config.get("n_outputs"):
        return table + map_head_rules("to_out.conv1", ("to_out.fc1", "to_out.fc2", "to_out.fc3"))
    return table + dense("to_out", "params/bins")
