"""Every system in the training step: on any mesh, and stopped and resumed."""

import dataclasses
import functools
import math
from contextlib import closing

import jax
import numpy as np
import pytest
from test_models import GENES, TINY, batch_of

from scjax import models
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import (
    Checkpoints,
    OptimizerConfig,
    abstract_state,
    init_state,
    make_optimizer,
    make_train_step,
)

SYSTEMS = sorted(models.SYSTEMS)
# what only happens after many calls, so that it happens here: redrawn projections, scGPT's second pass
SOON = {"redraw_every": 2, "second_pass_after": 2}


@functools.cache
def trainer(system: str, shape: tuple[int, int, int], accumulate: int = 1):
    """(mesh, model, optimiser, abstract state, step); cached, so that tests share what they compile."""
    mesh = make_mesh(MeshConfig(*shape), devices=jax.devices()[: math.prod(shape)])
    fields = {field.name for field in dataclasses.fields(models.resolve(system)[1])}
    model = models.build(system, TINY[system] | {k: v for k, v in SOON.items() if k in fields}, GENES)
    tx, _ = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), 4, model)
    abstract = abstract_state(model, tx, mesh)
    return mesh, model, tx, abstract, make_train_step(model, tx, abstract, seed=0, accumulate=accumulate)


def train(
    system: str, shape: tuple[int, int, int], first: int = 0, state=None, steps: int = 4, accumulate: int = 1
):
    """(losses, state) of the steps from ``first`` on."""
    mesh, model, tx, abstract, step = trainer(system, shape, accumulate)
    state, losses = init_state(model, tx, abstract) if state is None else state, []
    for number in range(first, steps):
        state, metrics = step(state, place(batch_of(16, seed=number), mesh))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert step._cache_size() == 1
    return losses, state


ONE = (1, 1, 1)


@pytest.mark.parametrize("system", SYSTEMS)
def test_resumes_exactly(system, tmp_path):
    """Two steps, a checkpoint, and two more from it are four steps, to the bit: parameters and buffers."""
    abstract = trainer(system, ONE)[3]
    losses, whole = train(system, ONE)
    _, half = train(system, ONE, steps=2)
    with closing(Checkpoints(tmp_path / "checkpoints", {})) as checkpoints:
        checkpoints.save(2, half, {})
        checkpoints.wait()
        restored = checkpoints.restore(abstract)
    rest, resumed = train(system, ONE, first=2, state=restored.state)
    assert rest == losses[2:]
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


@pytest.mark.parametrize("system", ["scgpt", "scfoundation"])
def test_what_sets_in_later_does_so_however_a_batch_is_cut(system):
    """The second pass and redrawn projections wait for a number of steps, not of micro-batches."""
    losses, whole = train(system, ONE)
    in_parts, parts = train(system, ONE, accumulate=2)
    np.testing.assert_allclose(in_parts, losses, rtol=1e-5)
    assert int(parts["buffers"]["calls"]) == int(whole["buffers"]["calls"]) == 4
