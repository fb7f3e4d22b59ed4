"""Training in memory for pages that train many small models: one compiled step, run from many starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from scjax.loader import cells
from scjax.nn import bind
from scjax.nn.module import Abstract
from scjax.parallel import MeshConfig, make_mesh
from scjax.train import OptimizerConfig, abstract_state, init_state, make_optimizer, make_train_step
from scjax.types import CellBatch


def kept(adata: Any, vocabulary: Any, size: int, **options: Any) -> list[CellBatch]:
    """All cells as batches of one length, kept in memory."""
    options = {"bucket_lengths": [len(vocabulary)]} | options
    return [jax.tree.map(np.array, batch) for batch in cells(adata, vocabulary, size, **options)]


class Fit:
    """Trains a model again and again, on one device, without a run directory.

    Args:
      model: from :func:`scjax.models.build`.
      steps, learning_rate: of AdamW with a cosine.
    """

    def __init__(self, model: Abstract, steps: int, learning_rate: float, weight_decay: float = 0.01):
        self.model, self.steps = model, steps
        mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        schedule = {"schedule": "cosine", "end_factor": 0.02, "warmup_steps": max(steps // 20, 1)}
        config = OptimizerConfig(learning_rate, weight_decay=weight_decay, **schedule)
        self.tx, _ = make_optimizer(config, steps, model)
        self.abstract = abstract_state(model, self.tx, mesh)
        self.step = make_train_step(model, self.tx, self.abstract, seed=0)

    def __call__(
        self,
        data: list[CellBatch],
        values: dict[str, Any] | None = None,
        prepare: Callable[[Any], Any] | None = None,
        seed: int = 0,
    ) -> tuple[Any, Any]:
        """``(params, buffers)`` after the steps over the batches, in an order by the seed.

        Args:
          data: batches of training cells.
          values: what the parameters and buffers begin with, by path.
          prepare: changes the first state.
        """
        state = init_state(self.model, self.tx, self.abstract, values or {})
        state = prepare(state) if prepare else state
        rng = np.random.default_rng(seed)
        rounds = -(-self.steps // len(data))
        for i in np.concatenate([rng.permutation(len(data)) for _ in range(rounds)])[: self.steps]:
            state, _ = self.step(state, data[i])
        return state["params"], state["buffers"]


def over(function: Callable[[Any, CellBatch], Any], model: Abstract) -> Callable[..., Any]:
    """``f(params, buffers, batches)``: what ``function(module, batch)`` says of the cells of all batches,
    those of weight 0 left out; compiled once."""

    def run(params: Any, buffers: Any, batch: CellBatch) -> Any:
        module = bind(model, params, buffers)
        module.eval()
        return function(module, batch)

    jitted = jax.jit(run)

    def whole(params: Any, buffers: Any, batches: list[CellBatch]) -> Any:
        pieces = []
        for batch in batches:
            found = jitted(params, buffers, batch)
            pieces.append(jax.tree.map(lambda x, keep=batch.weight > 0: np.asarray(x)[keep], found))
        return jax.tree.map(lambda *x: np.concatenate(x), *pieces)

    return whole
