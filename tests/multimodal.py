"""Cells of two or three modalities whose common truth is planted, and a small model of them."""

import functools
import types
from pathlib import Path

import jax
import numpy as np
import pandas as pd
from synthetic import synthetic_adata
from test_models import TINY

from scjax import models
from scjax.api import Model
from scjax.genes import Vocabulary
from scjax.loader import cells
from scjax.nn import initialise
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import OptimizerConfig, abstract_state, init_state, make_optimizer, make_train_step

GENES, PROTEINS, PEAKS = 40, 6, 8
FEATURES = {"protein": [f"P{i}" for i in range(PROTEINS)], "chromatin": [f"peak{i}" for i in range(PEAKS)]}
EASY = {"objective": "masked", "n_layers": 1, "max_length": GENES + 1, "value_scale": 0.02, "dropout": 0.0}
SMALL = TINY | {"scgpt": TINY["scgpt"] | EASY}


def config(system="scgpt", **changes):
    panels = {
        "protein": {"size": PROTEINS, "background": True},
        "chromatin": {"size": PEAKS, "likelihood": "bernoulli", "tokens": False},
    }
    return {"base": {"system": system, "model": SMALL[system]}, "modalities": panels} | changes


def simulate(n=400, seed=0, shuffled=False):
    """Types in RNA; proteins, of overdispersed counts over a common background, and open chromatin follow
    them, or the types of other cells."""
    adata, rng = synthetic_adata(n, GENES, seed=seed), np.random.default_rng([seed, 1])
    truth = np.random.default_rng(5)  # the same in every simulation
    kind = adata.obs["cell_type"].cat.codes.to_numpy()
    kind = rng.permutation(kind) if shuffled else kind
    mean = 10 + 90 * (truth.random((4, PROTEINS)) < 0.4)[kind]
    mean = mean * rng.lognormal(0, 0.4, (n, 1))
    protein = rng.poisson(rng.gamma(5.0, mean / 5.0))
    opened = rng.random((n, PEAKS)) < np.where((truth.random((4, PEAKS)) < 0.5)[kind], 0.8, 0.1)
    for name, counts in (("protein", protein), ("chromatin", opened)):
        adata.obsm[name] = pd.DataFrame(counts.astype("f4"), adata.obs_names, FEATURES[name])
    return adata


def batch_of(adata, rows=None):
    """All cells, or some of them, as one batch."""
    adata = adata if rows is None else adata[rows]
    batch = next(cells(adata, vocabulary(), adata.n_obs, bucket_lengths=[64]))
    batch = batch.replace(row=(batch.row + 100).astype(np.uint32))
    return batch.replace(value={name: np.array(adata.obsm[name], "f4") for name in FEATURES})


@functools.cache
def vocabulary():
    var = synthetic_adata(2, GENES).var
    return Vocabulary(list(var["ensembl_id"]), list(var.index))


def trainer(shape=(1, 1, 1), accumulate=1, steps=20, learning_rate=1e-2, **of):
    """What a run is made of; ``of``: see :func:`config`."""
    mesh = make_mesh(MeshConfig(*shape), devices=jax.devices()[: int(np.prod(shape))])
    given = config(**of)
    model = models.build("scjax.models.modalities:Multimodal", given, GENES)
    tx, _ = make_optimizer(OptimizerConfig(learning_rate, warmup_steps=1, clip_norm=1.0), steps, model)
    abstract = abstract_state(model, tx, mesh)
    step = make_train_step(model, tx, abstract, seed=0, accumulate=accumulate)
    return types.SimpleNamespace(
        mesh=mesh, model=model, tx=tx, abstract=abstract, step=step, config=given, steps=steps
    )


def run(of, batches, state=None):
    """(losses, state) of one step a batch."""
    state, losses = init_state(of.model, of.tx, of.abstract) if state is None else state, []
    for batch in batches:
        state, metrics = of.step(state, place(batch, of.mesh))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return losses, state


def drawn(batch, steps, size=64, seed=0):
    """Batches of random cells."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.choice(len(batch.row), size, replace=False)
        yield jax.tree.map(lambda x, rows=rows: x[rows], batch)


def handle(of, state):
    """What scjax.load would give of a run."""
    return Model(
        system="scjax.models.modalities:Multimodal",
        config=of.config,
        vocabulary=vocabulary(),
        params=jax.device_get(state["params"]),
        buffers=jax.device_get(state["buffers"]),
        step=int(state["step"]),
        path=Path("nowhere"),
        categories=FEATURES,
    )


def fresh(of):
    """Parameters and buffers, a little off zero."""
    state = jax.jit(lambda: initialise(of.model))()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + (0.1 * rng.standard_normal(x.shape)).astype(x.dtype), state["params"])
    return params, state["buffers"]
