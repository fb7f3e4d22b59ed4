"""What a training step is worth: tokens, and the useful floating-point operations of their cells.

MFU, the share of a device's peak that a run puts to use, is these operations / (seconds x peak). Counted is
what the objective needs, forward and backward: 6 for each weight of a matrix and token that meets it; for
softmax attention 12 x width for each query and key that it sees; for FAVOR+ 24 x features x width of a head
for each token and head. Not counted: padding, look-ups, normalisation, the optimiser, anything worked out
a second time.

A model tells its own by ``work(n_genes)``, see :func:`work_of`. What depends on the draws of a step (which
genes are hidden, how far a cell is thinned) is taken at its expectation, or below.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from scjax.nn.module import Abstract, axes_of, bind, shapes_of
from scjax.types import CellBatch

FORMULA = (
    "MFU = operations / (seconds x peak); operations = tokens (6 N + attention) + hidden (6 N_head): tokens "
    "without padding, N the weights of matrices outside embeddings, softmax attention 12 layers d_model keys "
    "(not halved), FAVOR+ 24 layers heads features d_head; nothing counts twice because it is recomputed"
)


def dense(tokens: Any, weights: float) -> Any:
    """Operations of matrices with so many weights that each of ``tokens`` goes through."""
    return 6.0 * tokens * weights


def softmax_stack(
    tokens: Any, d: int, d_ff: int, layers: int, *, keys: Any = None, projected: Any = None
) -> Any:
    """Operations [B] of transformer layers over cells of ``tokens`` [B].

    Args:
      tokens: of each cell.
      d, d_ff, layers: widths and number of layers.
      keys: how many of the tokens each one attends to; None for all.
      projected: how many pass the projection after attention; None for all.
    """
    keys = tokens if keys is None else keys
    projected = tokens if projected is None else projected
    weights = dense(tokens, 3 * d * d + 2 * d * d_ff) + dense(projected, d * d)
    return layers * (weights + 12.0 * d * tokens * keys)


def favor_stack(tokens: Any, d: int, heads: int, d_head: int, d_ff: int, layers: int, features: int) -> Any:
    """Operations [B] of Performer layers over cells of ``tokens`` [B]."""
    weights = 4 * d * heads * d_head + 2 * d * d_ff
    return layers * (dense(tokens, weights) + 24.0 * tokens * heads * features * d_head)


def weights_of(model: Abstract) -> int:
    """Parameters outside of tables with a row a gene."""
    shapes, axes = shapes_of(model)["params"], axes_of(model)["params"]
    each = jax.tree.map(lambda s, a: 0 if "vocab" in a else int(np.prod(s.shape)), shapes, axes)
    return sum(jax.tree.leaves(each))


def work_of(model: Abstract, module: Any, n_genes: Any, weight: Any = 1.0) -> tuple[Array, Array]:
    """``(tokens, operations)`` float32 scalars of a training step on cells of ``n_genes`` expressed genes.

    A model's own ``work(n_genes) -> (tokens [B], operations [B])`` is asked; one without gets a token a gene
    and 6 operations for each token and parameter outside of its gene tables.

    Args:
      model: the abstract model.
      module: it, with or without values.
      n_genes: [B].
      weight: [B], 0 for rows that only fill the batch.
    """
    n = jnp.asarray(n_genes, jnp.float32)
    tokens, operations = module.work(n) if hasattr(module, "work") else (n, dense(n, weights_of(model)))
    return tuple(jnp.where(jnp.asarray(weight) > 0, x, 0.0).sum() for x in (tokens, operations))  # type: ignore[return-value]


def late_work(model: Abstract, n_genes: Any) -> tuple[float, float]:
    """:func:`work_of` late in a run, when everything that sets in later has; from shapes, without values."""
    shapes = shapes_of(model)
    late = jax.tree.map(lambda x: np.full((), 2**30, x.dtype) if x.shape == () else x, shapes["buffers"])
    tokens, operations = work_of(model, bind(model, shapes["params"], late), n_genes)
    return float(tokens), float(operations)


def work_metrics(model: Abstract, module: Any, batch: CellBatch) -> dict[str, tuple[Array, Array]]:
    """:func:`work_of` a batch as metrics, (sum, 1) by name."""
    values = work_of(model, module, (batch.gene_id >= 0).sum(1), batch.weight)
    return {name: (value, jnp.ones(())) for name, value in zip(("tokens", "operations"), values, strict=True)}
