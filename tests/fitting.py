"""Training in memory, without a run directory: a model on batches of an AnnData, for planted tests."""

from __future__ import annotations

import jax
import numpy as np

from scjax.loader import cells
from scjax.nn import bind
from scjax.parallel import MeshConfig, make_mesh
from scjax.train import OptimizerConfig, abstract_state, init_state, make_optimizer, make_train_step
from scjax.types import CellBatch


def batches(adata, vocabulary, size: int = 64, **options) -> list[CellBatch]:
    """All cells, kept (the loader writes the next batch where the last was)."""
    return [jax.tree.map(np.array, batch) for batch in cells(adata, vocabulary, size, **options)]


def fit(model, data: list[CellBatch], steps: int, learning_rate: float = 3e-3, seed: int = 0, prepare=None):
    """The module in evaluation, after so many steps over the batches, in an order by the seed.

    ``prepare`` changes the first ``{"params", "buffers"}``, nested dicts.
    """
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    config = OptimizerConfig(learning_rate, warmup_steps=steps // 20, schedule="cosine", end_factor=0.02)
    tx, _ = make_optimizer(config, steps, model)
    abstract = abstract_state(model, tx, mesh)
    step = make_train_step(model, tx, abstract, seed=seed)
    state = init_state(model, tx, abstract)
    if prepare is not None:
        state = prepare(state)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(data)) for _ in range(-(-steps // len(data)))])[:steps]
    for i in order:
        state, _ = step(state, data[i])
    module = bind(model, state["params"], state["buffers"])
    module.eval()
    return module
