"""Every system in the training step: on any mesh, and stopped and resumed."""

import functools
from contextlib import closing

import jax
import numpy as np
import pytest
import test_layouts
from test_layouts import SYSTEMS
from test_models import batch_of

from scjax.parallel import place
from scjax.train import (
    Checkpoints,
    init_state,
)

trainer = functools.cache(test_layouts.trainer)  # tests share what they compile


def train(
    system: str, shape: tuple[int, int, int], first: int = 0, state=None, steps: int = 4, accumulate: int = 1
):
    """(losses, state) of the steps from ``first`` on."""
    mesh, model, tx, abstract, step = trainer(system, shape, accumulate=accumulate)
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
