"""What each optimiser does to which parameter, held against planted gradients; the course of the rate."""

from __future__ import annotations

import functools
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from test_models import GENES, TINY
from tiny_model import cells, tiny

from scjax import models
from scjax.config import ConfigError
from scjax.nn.module import shapes_of
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import (
    Checkpoints,
    OptimizerConfig,
    abstract_state,
    init_state,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
)
from scjax.train.kernels import Kernel, kernels_of
from scjax.train.state import pack

WIDE = {"d_model": 128, "n_heads": 4, "d_ff": 256}


@functools.cache
def scgpt():
    return models.build("scgpt", TINY["scgpt"] | WIDE, GENES)


def random_like(shapes, seed):
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.normal(size=s.shape), s.dtype) for s in leaves])


def first_updates(config, grads, model=None):
    """Updates of the first step, from parameters of 0; and the optimiser's state after it."""
    tx, _ = make_optimizer(config, 10, model or scgpt())
    params = jax.tree.map(jnp.zeros_like, grads)
    updates, opt = jax.jit(lambda g: tx.update(g, tx.init(params), params))(grads)
    return jax.device_get(updates), pack(opt)


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def constant(name, **options):
    return OptimizerConfig(0.5, name=name, schedule="constant", clip_norm=None, **options)


# ------------------------------------------------------------------------------------------ kernels


def test_dimensions_of_kernels():
    kernels = kernels_of(scgpt())
    block = kernels["transformer"]["blocks"]
    assert block["attention"]["qkv"]["kernel"] == Kernel((0, 2), (1,), (3, 4), stacked=True)
    assert block["attention"]["out"]["kernel"] == Kernel((0,), (1, 2), (3,), stacked=True)
    assert block["up"]["kernel"] == block["down"]["kernel"] == Kernel((0,), (1,), (2,), stacked=True)
    assert kernels["mvc"]["query"]["kernel"] == Kernel((), (0,), (1,), stacked=False)
    assert kernels["decoder"]["value"]["layers"]["2"]["kernel"] == Kernel((), (0,), (1,), stacked=False)
    assert block["up"]["bias"] is None and block["norm1"]["scale"] is None
    assert kernels["gene"]["embedding"] is None and kernels["flag"]["embedding"] is None

    x = jnp.arange(2 * 4 * 3 * 5 * 6).reshape(2, 4, 3, 5, 6)
    kernel = block["attention"]["qkv"]["kernel"]
    matrices = kernel.to_matrices(x)
    assert matrices.shape == (2, 3, 4, 30)
    np.testing.assert_array_equal(matrices[1, 2, 3], x[1, 3, 2].ravel())
    np.testing.assert_array_equal(kernel.from_matrices(matrices, x.shape), x)


# --------------------------------------------------------------------------------------------- Muon


def test_muon_takes_the_stacked_kernels_and_adam_the_rest():
    grads = random_like(shapes_of(scgpt())["params"], 0)
    muon, state = first_updates(constant("muon"), grads)
    adam, _ = first_updates(constant("adamw"), grads)
    kernels = by_path(kernels_of(scgpt()))
    muon, adam = by_path(muon), by_path(adam)
    stacked = {path for path, kernel in kernels.items() if kernel.stacked}
    assert {path.split("/")[-2] for path in stacked} == {"qkv", "out", "up", "down"}
    for path in muon.keys() - stacked:
        np.testing.assert_array_equal(muon[path], adam[path], err_msg=path)
    for path in stacked:
        matrices = np.asarray(kernels[path].to_matrices(jnp.asarray(muon[path])))
        assert matrices.shape[:-2] == ((2, 3) if "qkv" in path else (2,)), path
        lengths = np.linalg.svd(matrices, compute_uv=False) / (0.5 * 0.2 * max(matrices.shape[-2:]) ** 0.5)
        # near 1, but for the least of a square matrix, which may be anything
        assert 0.6 < np.quantile(lengths, 0.02) and lengths.max() < 1.25, path
        assert 0.08 < np.sqrt((muon[path] ** 2).mean()) < 0.12  # 0.2 x learning rate
        # each layer by itself, along its own gradient
        g = np.asarray(kernels[path].to_matrices(by_path(grads)[path]))
        u, _, vt = np.linalg.svd(g)
        r = min(g.shape[-2:])
        along = np.einsum("...mr,...mn,...rn->...r", u[..., :r], matrices, vt[..., :r, :])
        np.testing.assert_allclose(np.abs(along).sum(), np.linalg.svd(matrices)[1].sum(), rtol=1e-3)
        assert (along < 0).all()
    held = {path.partition("/mu/")[2] for path in by_path(state) if "/muon/" in path and "/mu/" in path}
    assert held == stacked


def test_muon_of_a_stack_is_that_of_each_of_its_matrices():
    grads = [random_like(shapes_of(scgpt())["params"], seed) for seed in (1, 2)]
    alone = optax.contrib.scale_by_muon()

    def of(tx, *trees):
        return jax.jit(lambda a, b: tx.update(b, tx.update(a, tx.init(a), a)[1], a)[0])(*trees)

    updates = of(make_optimizer(constant("muon"), 10, scgpt())[0], *grads)
    kernels = kernels_of(scgpt())["transformer"]["blocks"]
    for name, which in (("up", (1,)), ("qkv", (1, 2))):
        take = lambda tree: tree["up"] if name == "up" else tree["attention"]["qkv"]  # noqa: B023, E731
        kernel = take(kernels)["kernel"]
        one, two, got = (
            kernel.to_matrices(take(tree["transformer"]["blocks"])["kernel"])[which]
            for tree in (*grads, updates)
        )
        expected = of(alone, one, two) * 0.2 * max(one.shape) ** 0.5 * -0.5
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------- Adafactor and Lion


def test_adafactor_factors_each_matrix_by_itself():
    """A squared gradient that is a product of rows and columns, other ones in each layer and head, is held
    exactly: the first update is the sign of the gradient. Held are rows and columns only."""
    shapes = shapes_of(scgpt())["params"]
    kernels = kernels_of(scgpt())
    rng = np.random.default_rng(0)

    def planted(kernel, shape):
        signs = rng.choice([-1.0, 1.0], shape.shape)
        if kernel is None:
            return jnp.asarray(signs * rng.uniform(0.1, 10, shape.shape), jnp.float32)
        like = kernel.to_matrices(jnp.zeros(shape.shape)).shape
        size = rng.uniform(0.1, 10, (*like[:-1], 1)) * rng.uniform(0.1, 10, (*like[:-2], 1, like[-1]))
        return jnp.asarray(signs) * kernel.from_matrices(jnp.asarray(size, jnp.float32), shape.shape)

    grads = jax.tree.map(planted, kernels, shapes, is_leaf=lambda x: x is None or isinstance(x, Kernel))
    updates, state = first_updates(constant("adafactor"), grads)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.5 * np.sign(g), rtol=2e-3), updates, grads)
    of_kernels = sum(
        x.size for path, x in by_path(state).items() if path.endswith("blocks/attention/qkv/kernel")
    )
    assert of_kernels == 2 * 3 * (128 + 128) + 1  # of 2 x 128 x 3 x 128 parameters


def test_adafactor_cuts_large_updates():
    """A second gradient ten times the first: its updates would be near 10^0.5 x as large; they stay at 1."""
    tx, _ = make_optimizer(constant("adafactor"), 10, tiny())
    grads = random_like(shapes_of(tiny())["params"], 0)
    params = jax.tree.map(jnp.zeros_like, grads)

    @jax.jit
    def second(g):
        _, opt = tx.update(g, tx.init(params), params)
        return tx.update(jax.tree.map(lambda x: 10 * x, g), opt, params)[0]

    sizes = jax.tree.map(lambda u: float(jnp.sqrt((u**2).mean())), second(grads))
    assert all(size == pytest.approx(0.5, rel=1e-3) for size in jax.tree.leaves(sizes))


def test_lion_is_a_sign_with_decoupled_decay():
    grads = random_like(shapes_of(tiny())["params"], 0)
    tx, _ = make_optimizer(constant("lion", weight_decay=0.2), 10, tiny())
    params = jax.tree.map(jnp.ones_like, grads)
    updates, opt = jax.jit(lambda g: tx.update(g, tx.init(params), params))(grads)
    assert np.array_equal(updates["gene"]["embedding"], -0.5 * np.sign(grads["gene"]["embedding"]))
    kernel = grads["query"]["kernel"]
    np.testing.assert_allclose(updates["query"]["kernel"], -0.5 * (np.sign(kernel) + 0.2), rtol=1e-6)
    np.testing.assert_allclose(pack(opt)["1"]["0"]["mu"]["query"]["kernel"], 0.01 * kernel, rtol=1e-4)


def test_adamw_is_that_of_optax():
    config = OptimizerConfig(1e-2, warmup_steps=2, weight_decay=0.1, clip_norm=1.0)
    grads = random_like(shapes_of(tiny())["params"], 0)
    params = jax.tree.map(jnp.ones_like, grads)
    tx, schedule = make_optimizer(config, 10, tiny())
    mask = jax.tree.map(lambda k: k is not None, kernels_of(tiny()), is_leaf=lambda x: x is None)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1, mask=mask)
    )
    for one in (tx, reference):
        state = one.init(params)
        assert jax.tree.structure(pack(state)) == jax.tree.structure(pack(tx.init(params)))
    got, want = (
        jax.jit(lambda g, o=one: o.update(g, o.init(params), params)[0])(grads) for one in (tx, reference)
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ------------------------------------------------------------------------------ in the training step


@functools.cache
def trainer(name, shape, axis_type=AxisType.Auto, accumulate=1):
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))], axis_type)
    model = tiny(d_model=128, d_ff=256)
    config = OptimizerConfig(1e-3, name=name, warmup_steps=2, weight_decay=0.1, ema=0.9)
    tx, _ = make_optimizer(config, 50, model)
    like = abstract_state(model, tx, mesh, ema=True)
    step = make_train_step(model, tx, like, seed=0, ema=0.9, accumulate=accumulate)
    return mesh, model, tx, like, step


@functools.cache
def run(*setup):
    mesh, model, tx, like, step = trainer(*setup)
    state, losses = init_state(model, tx, like), []
    for i in range(4):
        state, metrics = step(state, place(cells(i), mesh))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert step._cache_size() == 1
    return losses, state


@pytest.mark.parametrize(
    "setup",
    [(name, (2, 2, 2), axes) for name in ("adafactor", "muon") for axes in (AxisType.Auto, AxisType.Explicit)]
    + [("lion", (2, 2, 2)), ("muon", (2, 4, 1), AxisType.Auto, 2)],
    ids=str,
)
def test_any_mesh_and_any_accumulation_are_the_same_run(setup):
    losses, state = run(*setup)
    expected, one = run(setup[0], (1, 1, 1))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    # Lion takes signs: of a gradient near 0 the smallest difference decides
    allowed = 4e-3 if setup[0] == "lion" else 2e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=allowed),
        jax.device_get(state["params"]),
        jax.device_get(one["params"]),
    )


def test_moments_are_split_like_their_parameters():
    like = trainer("muon", (2, 2, 2))[3]
    momentum = like["opt"]["1"]["0"]["inner_states"]["muon"]["inner_state"]["0"]["mu"]
    kernel = like["params"]["blocks"]["up"]["kernel"]
    assert momentum["blocks"]["up"]["kernel"].sharding == kernel.sharding
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 64, 128)
    rows = trainer("adafactor", (2, 2, 2))[3]["opt"]["1"]["0"]["0"]
    assert rows["v_row"]["blocks"]["up"]["kernel"].sharding.spec[1] == "fsdp"
    assert rows["v_col"]["blocks"]["up"]["kernel"].sharding.spec[1] == "tensor"


def test_muon_and_its_average_resume_exactly(tmp_path):
    mesh, model, tx, like, step = trainer("muon", (1, 1, 1))
    losses, whole = run("muon", (1, 1, 1))
    state = init_state(model, tx, like)
    for i in range(2):
        state, _ = step(state, place(cells(i), mesh))
    with closing(Checkpoints(tmp_path / "checkpoints", {})) as checkpoints:
        checkpoints.save(2, state, {})
        checkpoints.wait()
        state = checkpoints.restore(like).state
    for i in range(2, 4):
        state, metrics = step(state, place(cells(i), mesh))
    assert float(metrics["loss"][0] / metrics["loss"][1]) == losses[-1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(whole))


def test_evaluation_takes_the_average():
    mesh, model, tx, like, _ = trainer("muon", (1, 1, 1))
    state, batch = run("muon", (1, 1, 1))[1], place(cells(9), mesh)
    evaluate = make_eval_step(model, like, seed=0)
    averaged = float(evaluate(state, batch)["loss"][0])
    without = state | {"params": jax.tree.map(jnp.zeros_like, state["params"])}
    assert averaged == float(evaluate(without, batch)["loss"][0])
    as_params = float(evaluate(state | {"ema": state["params"]}, batch)["loss"][0])
    assert abs(averaged - as_params) > 1e-4 * abs(averaged)


# -------------------------------------------------------------------------------------- the schedule


def test_wsd_by_hand():
    config = OptimizerConfig(2.0, warmup_steps=4, schedule="wsd", decay_steps=5, end_factor=0.1)
    schedule = make_schedule(config, 20)
    expected = {0: 0.5, 1: 1.0, 3: 2, 4: 2, 10: 2, 15: 2, 16: 1.64, 18: 0.92, 20: 0.2, 25: 0.2}
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6, err_msg=str(step))
    # a longer run has the same beginning: the decay is all that moves
    longer = make_schedule(config, 100)
    assert all(float(longer(step)) == float(schedule(step)) for step in range(16))


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"schedule": "wsd"}, "decay_steps is 0 and schedule 'wsd'"),
        ({"decay_steps": 5}, "decay_steps is 5 and schedule 'cosine'"),
        ({"ema": 1.0}, "ema is 1.0; give a decay between 0 and 1"),
        ({"name": "sgd"}, "optimizer.name is 'sgd'"),
    ],
)
def test_config_refuses(fields, told):
    with pytest.raises(ConfigError, match=told):
        OptimizerConfig(1.0, **fields)


def test_wsd_must_fit_into_the_run():
    config = OptimizerConfig(1.0, warmup_steps=4, schedule="wsd", decay_steps=7)
    with pytest.raises(ConfigError, match="4 and 7, together more than train.steps, 10"):
        make_schedule(config, 10)
