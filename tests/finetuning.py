"""What the tests of fine-tuning share: a small scGPT, and batches with planted targets."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from synthetic import synthetic_adata

from scjax import models
from scjax.api import Model
from scjax.finetune import SYSTEM
from scjax.loader import cells
from scjax.nn import initialise

SMALL = {
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "d_ff": 32,
    "max_length": 41,
    "objective": "masked",
    "value_scale": 0.02,
    "dropout": 0.1,
}
BASE = {"system": "scgpt", "model": SMALL}
N_GENES = 48


def base_handle(
    tmp_path: Any, fields: dict[str, Any] | None = None, categories: dict[str, Any] | None = None
) -> Model:
    """An untrained base over the genes of :func:`planted`, with more ``fields`` in its config."""
    from scjax.genes import Vocabulary

    var = synthetic_adata(4, N_GENES).var
    vocabulary = Vocabulary(list(var["ensembl_id"]), list(var.index))
    config = SMALL | (fields or {})
    variables = jax.jit(lambda: initialise(models.build("scgpt", config, N_GENES)))()
    known = {"categories": categories or {}}
    return Model("scgpt", config, vocabulary, **variables, step=0, path=tmp_path, **known)


def wrapped(tasks: dict[str, Any], **config: Any) -> Any:
    """The abstract model with heads."""
    return models.build(SYSTEM, {"base": BASE, "tasks": tasks, **config}, N_GENES)


def planted(n: int = 256, seed: int = 0) -> Any:
    """Cells of four types, ``stage`` the type as an order, ``dose`` twice the type, ``marks`` two flags."""
    adata = synthetic_adata(n, N_GENES, seed=seed)
    code = adata.obs["cell_type"].cat.codes.to_numpy()
    adata.obs["stage"] = np.array(["c", "a", "d", "b"])[code]  # alphabetical order is not the order
    adata.obs["dose"] = 2.0 * code
    adata.obsm["marks"] = np.stack([code % 2, code // 2], 1).astype(np.float32)
    return adata


def batches_of(adata: Any, handle: Model, size: int = 32, **options: Any) -> list[Any]:
    found = cells(adata, handle.vocabulary, size, **options)
    return [jax.tree.map(np.array, batch) for batch in found]
