"""CellLM's checkpoints in: ``{"model_state_dict": ...}``, pretrained or fine-tuned for annotation.

The file does not say which gene is which row of its table (19,379 HGNC symbols), which the user gives.
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
from scjax.models.celllm import N_TOKENS

IGNORED = {
    **performers.IGNORED,
    r"encoder\.to_out\.(weight|bias)": "classifies bins; the annotation head does not use it",
}
LIST = (
    "CellLM's are the var_names of its preprocessed data (zheng68k_hgnc.h5ad, beside the weights in "
    "OpenBioMed)."
)


def read(path: str | pathlib.Path, *, genes: str | pathlib.Path | Vocabulary | None = None) -> Source:
    """Reads a pretrained or a fine-tuned model.

    Args:
      path: the ``.pth`` file.
      genes: the gene list in the order of training: a text file with a symbol a line, a vocabulary table
        (TSV with a column gene_id), or a Vocabulary.

    Raises:
      FileNotFoundError, ImportError: see :func:`scjax.interop.files.read_tensors`.
      ValueError: not a checkpoint of CellLM (says what is missing or other), or no gene list of its length.
    """
    path = pathlib.Path(path)
    tensors, notes = read_state(path)
    tuned = "conv.weight" in tensors
    prefix = "encoder." if tuned else ""
    config = sizes(tensors, prefix, N_TOKENS, path)
    n_genes = len(tensors[f"{prefix}{performers.TABLE}"]) - 2
    if tuned:
        config["n_outputs"] = len(tensors["pred_head.7.bias"])
        notes.append(f"a fine-tuned model with {config['n_outputs']} outputs")
    vocabulary, told = gene_list(genes, n_genes, path, LIST)
    notes += [
        told,
        'for the numbers of the original one cell at a time: stabiliser = "global", pad_mask = "values", '
        'truncate = "index"',
    ]
    known = {"gene/known": np.ones(n_genes, np.float32)}
    return Source("celllm", config, vocabulary, split_table(tensors, 2), known, notes)


def rules(config: Mapping[str, Any], n_genes: int) -> list[Rule]:
    """Tensors <-> variables; those of a fine-tuned network have "encoder." before their names."""
    if config.get("n_outputs"):
        head = map_head_rules("conv", ("pred_head.1", "pred_head.4", "pred_head.7"))
        return performer_rules("encoder.", int(config["n_heads"])) + head
    return performer_rules("", int(config["n_heads"])) + dense("to_out", "params/bins")
