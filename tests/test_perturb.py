"""Models of perturbed populations: distances, planted effects, meshes, resuming, any base."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.spatial.distance import cdist

import scjax.eval
from scjax.config import ConfigError
from scjax.datasets import perturbed
from scjax.genes import Vocabulary
from scjax.loader.conditions import Conditions
from scjax.loader.sets import PerturbedCells, Sets, predict_cells
from scjax.models import SYSTEMS, build
from scjax.nn import bind, flatten, initialise
from scjax.objectives.distribution import energy_distance, maximum_mean_discrepancy, set_mean_error
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import Checkpoints, abstract_state, init_state, make_optimizer, make_train_step, start_from
from scjax.train.optimizer import OptimizerConfig

SYSTEM = "scjax.models.perturbation:Perturbation"
SIZES = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16}
SCGPT = {**SIZES, "dropout": 0.0, "max_length": 33, "values": "log1p", "objective": "masked"}
TARGETS = {"targets": {"kind": "genes", "size": 2}}
FIELDS = {
    "base": {"system": "scgpt", "model": SCGPT},
    "tokens": TARGETS,
    "shift": TARGETS,
    "energy_weight": 0.1,
}


# -------------------------------------------------------------------------------------- distances
def populations(seed=0, sizes=(6, 5, 1), n_genes=7, filler=2):
    rng = np.random.default_rng(seed)
    sets = np.repeat(np.arange(len(sizes) + 1), [*sizes, filler])
    weight = (sets < len(sizes)).astype(np.float32)
    order = rng.permutation(len(sets))
    x, y = rng.normal(size=(2, len(sets), n_genes)).astype(np.float32) + 5
    return x[order], y[order] + 0.5, sets[order].astype(np.int32), weight[order]


def contrast(x, y, kernel):
    own = [kernel(a, a)[~np.eye(len(a), dtype=bool)].mean() for a in (x, y)]
    return 2 * kernel(x, y).mean() - sum(own)


def gaussian(a, b, typical):
    squared = cdist(a, b, "sqeuclidean")
    return -np.mean([np.exp(-squared / (width * typical)) for width in (0.25, 1, 4)], axis=0)


def test_distances_are_those_of_their_definitions():
    x, y, sets, weight = populations()
    for function, size in ((energy_distance, 2), (maximum_mean_discrepancy, 2), (set_mean_error, 1)):
        groups = [np.flatnonzero((sets == s) & (weight > 0)) for s in range(3)]
        groups = [g for g in groups if len(g) >= size]
        if function is energy_distance:
            each = [contrast(x[g], y[g], cdist) for g in groups]
        elif function is set_mean_error:
            each = [((x[g].mean(0) - y[g].mean(0)) ** 2).mean() for g in groups]
        else:
            pairs = [cdist(y[g], y[g], "sqeuclidean")[~np.eye(len(g), dtype=bool)] for g in groups]
            kernel = partial(gaussian, typical=np.concatenate(pairs).mean())
            each = [contrast(x[g], y[g], kernel) for g in groups]
        total, count = function(x, y, sets, weight)
        assert float(count) == sum(map(len, groups))
        wanted = sum(len(g) * value for g, value in zip(groups, each, strict=True))
        np.testing.assert_allclose(float(total), wanted, rtol=2e-5)


def test_distances_tell_populations_apart_and_are_smooth():
    rng = np.random.default_rng(1)
    sets, weight = np.repeat(np.arange(8), 32), np.ones(256, np.float32)
    y, same = rng.normal(size=(2, 256, 5)).astype(np.float32)
    alike = jnp.ones((256, 5))
    for function in (energy_distance, maximum_mean_discrepancy):
        value = {name: float(function(x, y, sets, weight)[0]) / 256
                 for name, x in (("same", same), ("wide", 3 * same), ("moved", same + 2))}  # fmt: skip
        assert abs(value["same"]) < 0.1 * min(value["wide"], value["moved"])
        slope = jax.grad(lambda x, f=function: f(x, alike, sets, weight)[0])(alike)
        assert np.isfinite(slope).all()


def test_distances_are_the_same_over_devices():
    given = populations(2, sizes=(9, 4), filler=3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = [jax.device_put(a, NamedSharding(mesh, PartitionSpec("data"))) for a in given]
    for function in (set_mean_error, energy_distance, maximum_mean_discrepancy):
        np.testing.assert_allclose(jax.jit(function)(*spread), function(*given), rtol=1e-5)


# ---------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def world():
    cells = perturbed(n_genes=30, n_targets=8, n_doubles=14, cells=24)
    vocabulary = Vocabulary([*cells.var_names, *cells.uns["features"].index])
    whole = PerturbedCells(cells, Conditions(vocabulary), context_key="cell_line")
    doubles = sorted(p for p in cells.obs["perturbation"].unique() if "+" in p)
    singles = {g for p in doubles[:4] for g in p.split("+")}
    assert singles <= set(cells.obs["perturbation"])  # additive effects can be learned
    train = ~cells.obs["perturbation"].isin(doubles[:4]).to_numpy()
    train[np.flatnonzero(cells.obs["perturbation"] == "control")[::2]] = False
    cells.obs["train"] = train
    return cells, whole, whole.training(train), vocabulary


def setup(world, layout=(1, 1, 1), **changes):
    _, whole, cells, vocabulary = world
    model = build(SYSTEM, FIELDS | {"panel": len(whole.panel)} | changes, len(vocabulary))
    mesh = make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
    tx, _ = make_optimizer(OptimizerConfig(learning_rate=5e-3, warmup_steps=10), 220, model, None)
    abstract = abstract_state(model, tx, mesh)
    state = init_state(model, tx, abstract, {"panel": cells.panel})
    return model, mesh, abstract, state, make_train_step(model, tx, abstract, seed=0)


@pytest.fixture(scope="module")
def one(world):
    return setup(world)


def train(world, made, steps, first=0):
    model, mesh, abstract, state, step = made
    sets = Sets(world[2], 32, 8, wanted=("targets",))
    state = jax.tree.map(jnp.copy, state)  # a step takes its state away
    for i in range(first, steps):
        state, metrics = step(state, place(sets[i], mesh))
    return state, metrics


def test_specific_effects_are_recovered_above_the_mean(world, one):
    cells, whole, given, _ = world
    state, metrics = train(world, one, 220)
    mean = {name: float(total / weight) for name, (total, weight) in metrics.items() if float(weight)}
    assert mean["mean"] < 0.4 * mean["no_change_mean"] and mean["energy"] < 0.4 * mean["no_change_energy"]
    predict = jax.jit(lambda p, b, batch: _eval(one[0], p, b).predict(batch))
    asked = sorted(set(whole.groups) - set(given.groups))
    predicted = predict_cells(
        lambda batch: predict(state["params"], state["buffers"], batch),
        *(given, asked),
        batch_size=32,
        set_size=8,
        wanted=("targets",),
        max_cells=64,
    )
    results = scjax.eval.perturbation(
        cells, {"ours": predicted}, context_key="cell_line", train="train", n_boot=0
    )
    value = {
        (r["metric"], r["model_id"]): r["value"] for r in results.rows if not r["label"] and not r["versus"]
    }
    # none of the perturbed genes is measured, and none of these pairs was seen
    assert not set(cells.uns["features"].index) & set(cells.var_names)
    assert value["pearson_systema", "ours"] > 0.6 > value["pearson_systema", "train_mean"] + 0.3
    assert value["pearson_delta", "ours"] > value["pearson_delta", "context_mean"] + 0.1
    assert value["rmse", "ours"] < 0.8 * value["rmse", "context_mean"]
    # beyond what is shared, the change is the planted one
    expression = predicted.to_df().groupby([predicted.obs["cell_line"], predicted.obs["perturbation"]]).mean()
    change = expression.loc["one"].drop("control") - expression.loc[("one", "control")]
    planted = cells.uns["specific"].loc[change.index, change.columns]
    beyond = (change - change.mean()).to_numpy().ravel()
    assert np.corrcoef(beyond, (planted - planted.mean()).to_numpy().ravel())[0, 1] > 0.6


def _eval(model, params, buffers):
    module = bind(model, params, buffers)
    module.eval()
    return module


def test_a_step_is_the_same_on_any_mesh(world, one):
    state, metrics = train(world, one, 3)
    spread, told = train(world, setup(world, (2, 2, 2)), 3)
    for name in ("mean", "energy", "mmd", "cells"):
        np.testing.assert_allclose(told[name], metrics[name], rtol=2e-4)
    for path, value in flatten(state["params"]).items():
        np.testing.assert_allclose(flatten(spread["params"])[path], value, atol=2e-3, err_msg=path)


def test_resumed_training_is_the_same_to_the_bit(world, one, tmp_path):
    straight, _ = train(world, one, 4)
    half, _ = train(world, one, 2)
    sets = Sets(world[2], 32, 8, wanted=("targets",))
    data = iter(sets)
    next(data), next(data)
    checkpoints = Checkpoints(tmp_path, {}, keep=1)
    checkpoints.save(2, half, data.get_state())
    checkpoints.wait()
    restored = checkpoints.restore(one[2])
    checkpoints.close()
    again = iter(sets)
    again.set_state(restored.cursor)
    state = restored.state
    for _ in range(2):
        state, _ = one[4](state, place(next(again), one[1]))
    jax.tree.map(np.testing.assert_array_equal, state, straight)


def test_a_cell_hangs_on_its_set_alone(world, one):
    """Neither on the order of rows, nor on other sets or rows that fill the batch."""
    state, _ = train(world, one, 3)
    batch = Sets(world[2], 32, 8)[7]
    module = _eval(one[0], state["params"], state["buffers"])
    predict = jax.jit(module.predict)
    whole = np.asarray(predict(batch))
    order = np.random.default_rng(0).permutation(32)
    mixed = jax.tree.map(lambda x: x[order], batch)
    np.testing.assert_allclose(predict(mixed), whole[order], atol=2e-5)
    first = batch.replace(weight=(batch.label["set"] == 0).astype(np.float32))
    np.testing.assert_allclose(predict(first)[:8], whole[:8], atol=2e-5)
    less = jax.tree.map(lambda x: x.copy(), batch).replace(weight=np.r_[0, np.ones(31)].astype(np.float32))
    assert np.abs(np.asarray(predict(less))[1:8] - whole[1:8]).max() > 1e-5  # and it does hang on its set


# ------------------------------------------------------------------------------------- what is held
def test_at_first_nothing_changes_and_a_frozen_base_is_no_parameter(world):
    model = build(SYSTEM, FIELDS | {"panel": 30, "frozen": True}, len(world[3]))
    variables = jax.jit(lambda: initialise(model))()
    assert not any(path.startswith("base/") for path in flatten(variables["params"]))
    assert any(path.startswith("base/transformer/") for path in flatten(variables["buffers"]))
    module = _eval(model, variables["params"], variables["buffers"] | {"panel": world[2].panel})
    batch = Sets(world[2], 16, 8)[0]
    predicted, control = jax.jit(module.populations)(batch)
    np.testing.assert_array_equal(predicted, control)
    counts = np.asarray(world[2].counts[batch.row].todense())
    np.testing.assert_allclose(control, np.log1p(1e4 * counts / batch.depth[:, None]), rtol=1e-5, atol=1e-6)
    base = jax.eval_shape(lambda: initialise(build("scgpt", SCGPT, len(world[3]), 5)))
    base = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), base)
    start = start_from(model, base["params"], base["buffers"], prefix="base/")
    assert start.values.keys() == {f"base/{path}" for path in flatten(base["params"] | base["buffers"])}


def test_scgpt_generator_reads_every_gene_from_its_own_state(world):
    changes = {"decoder": "generator", "shift": {}, "population": False, "cells_weight": 1.0}
    base = {"system": "scgpt", "model": SCGPT | {"zeros": True, "max_length": 64}}
    fields = FIELDS | changes | {"base": base, "panel": 30, "mean_weight": 0.0, "energy_weight": 0.0}
    model = build(SYSTEM, fields, len(world[3]))
    variables = jax.jit(lambda: initialise(model))()
    buffers = variables["buffers"] | {"panel": world[2].panel}
    batch = Sets(world[2], 16, 8)[0]
    params = variables["params"]
    sums, weights, _ = jax.eval_shape(_eval(model, params, buffers).loss, batch, jax.random.key(0))
    assert set(sums) == set(weights) == {"cells"}
    populations = jax.jit(lambda params, batch: _eval(model, params, buffers).populations(batch)[0])
    predicted = populations(params, batch)
    np.testing.assert_array_equal(populations(params | {"own": params["own"] + 1}, batch), predicted)
    # told of other genes, it predicts something else
    moved = batch.replace(value=batch.value | {"targets": batch.value["targets"] * 0 + 33})
    assert np.abs(np.asarray(populations(params, moved) - predicted)).max() > 1e-4


@pytest.mark.parametrize("decoder", ["affine", "generator"])
@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_every_system_can_be_the_base(system, decoder, world):
    small = {"geneformer": SIZES | {"max_length": 24}}.get(system, {})
    small = small or {"d_model": 16, "n_heads": 2, "d_ff": 16}
    if system == "scgpt":
        small = SCGPT
    fields = FIELDS | {"base": {"system": system, "model": small}, "decoder": decoder, "panel": 30}
    model = build(SYSTEM, fields, len(world[3]))
    batch = Sets(world[2], 16, 8)[0]

    def loss(batch):
        module = model.make()
        return module.loss(batch, jax.random.key(0))[0], module.predict(batch), module.embed(batch)

    sums, predicted, _ = jax.eval_shape(loss, batch)
    assert set(sums) == {"mean", "energy"} and predicted.shape == (16, 30)


def test_what_does_not_go_together_is_told(world):
    n = len(world[3])
    for changes, told in (
        ({"tokens": {}, "shift": {}}, "is not told of conditions"),
        ({"mean_weight": 0.0, "energy_weight": 0.0}, "are 0: nothing is trained"),
        ({"base": {}}, 'model.base has .*; it holds "system" and "model"'),
    ):
        with pytest.raises(ConfigError, match=told):
            build(SYSTEM, FIELDS | changes, n)
    dosed = {"dose": {"kind": "value", "size": 1}}
    model = build(SYSTEM, FIELDS | {"panel": 30, "shift": dosed}, n)
    batch = Sets(world[2], 16, 8)[0]
    batch.value.pop("dose")
    with pytest.raises(ValueError, match="is told 'dose' of a condition; batches have the labels"):
        jax.eval_shape(lambda b: model.make().predict(b), batch)
