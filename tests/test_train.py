"""State, step and optimiser on the tiny model: what must be equal is compared, to the bit where it can be."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_model import N_GENES, Tiny, TinyConfig, cells, tiny

from scjax.config import ConfigError
from scjax.nn import abstract, bind
from scjax.nn.module import shapes_of
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import (
    OptimizerConfig,
    abstract_state,
    decay_mask,
    init_state,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
    shardings_of,
)
from scjax.train.state import pack, unpack

LAYOUTS = {
    "one": (MeshConfig(1, 1, 1), 1),
    "data": (MeshConfig(8, 1, 1), 8),
    "fsdp": (MeshConfig(2, 4, 1), 8),
    "tensor": (MeshConfig(2, 2, 2), 8),
}


@functools.cache
def setup(layout: str = "one", *, accumulate: int = 1, optimizer: OptimizerConfig | None = None, **model):
    """Cached, so that tests share what they compile."""
    config, devices = LAYOUTS[layout]
    mesh = make_mesh(config, jax.devices()[:devices])
    abstract = tiny(**model)
    config = optimizer or OptimizerConfig(1e-2, warmup_steps=3, weight_decay=0.1)
    tx, _ = make_optimizer(config, 50, abstract)
    state = abstract_state(abstract, tx, mesh)
    step = make_train_step(abstract, tx, state, seed=0, accumulate=accumulate)
    return mesh, abstract, tx, state, step


@functools.cache
def initial(layout: str = "one"):
    _, model, tx, abstract, _ = setup(layout)
    return jax.device_get(init_state(model, tx, abstract))


def fresh(abstract):
    """A state of one's own at step 0."""
    return jax.device_put(jax.tree.map(np.copy, initial()), shardings_of(abstract))


@functools.cache
def run(layout: str, accumulate: int = 1, steps: int = 4):
    """Metrics of each step, as means, and the state after the last."""
    mesh, model, tx, abstract, step = setup(layout, accumulate=accumulate)
    state, out = fresh(abstract), []
    for i in range(steps):
        state, metrics = step(state, place(cells(i), mesh))
        out.append({name: float(total / weight) for name, (total, weight) in metrics.items()})
    assert step._cache_size() == 1
    return out, jax.device_get(state)


# --------------------------------------------------------------------------------------- optimizer


def test_schedules():
    def at(schedule: str, steps=(0, 1, 3, 4, 7, 10, 12), warmup=4, end=0.1):
        config = OptimizerConfig(2.0, warmup_steps=warmup, schedule=schedule, end_factor=end)
        return [float(make_schedule(config, 10)(step)) for step in steps]

    np.testing.assert_allclose(at("constant"), [0.5, 1.0, 2, 2, 2, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(at("linear"), [0.5, 1.0, 2, 2, 1.1, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(at("cosine"), [0.5, 1.0, 2, 2, 1.1, 0.2, 0.2], rtol=1e-6)
    quarter = 2 * (0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2)
    np.testing.assert_allclose(
        at("cosine", steps=(2,), warmup=0), [2 * (0.1 + 0.9 * (1 + np.cos(np.pi / 5)) / 2)], rtol=1e-6
    )  # noqa: E501
    np.testing.assert_allclose(at("cosine", steps=(5.5,)), [quarter], rtol=1e-6)
    np.testing.assert_allclose(at("cosine", steps=(0, 10), warmup=0, end=0.0), [2.0, 0.0], atol=1e-7)


def test_cosine_restarts_by_hand():
    """Cycles of 5, 8 and 14 steps, two of warm-up in each; lowest rate 0.2, highest 1, 0.5, 0.25."""
    config = OptimizerConfig(
        1.0,
        warmup_steps=2,
        schedule="cosine_restarts",
        end_factor=0.2,
        cycle_steps=5,
        cycle_growth=2.0,
        cycle_decay=0.5,
    )
    expected = {0: 0.2, 1: 0.6, 2: 1.0, 3: 0.8, 4: 0.4}  # cos 60 and 120 degrees: 3/4, 1/4 of the way
    expected |= {5: 0.2, 6: 0.35, 7: 0.5, 10: 0.35, 12: 0.2 + 0.3 * (1 + np.cos(np.pi * 5 / 6)) / 2}
    expected |= {13: 0.2, 14: 0.225, 15: 0.25, 21: 0.225, 27: 0.2}
    schedule = make_schedule(config, 27)
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6, err_msg=str(step))


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"learning_rate": 1.0, "schedule": "cosine_restarts"}, "cycle_steps is 0"),
        (
            {"learning_rate": 1.0, "schedule": "cosine_restarts", "cycle_steps": 9, "cycle_growth": 0.5},
            "cycle_growth is at least 1",
        ),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": 1.0, "clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"learning_rate": 1.0, "end_factor": 2.0}, "end_factor is in"),
    ],
)
def test_optimizer_config_refuses(fields, told):
    with pytest.raises(ConfigError, match=told):
        OptimizerConfig(**fields)


def test_warmup_must_end():
    with pytest.raises(ConfigError, match="warmup_steps is 10; it must be less than train.steps, 10"):
        make_schedule(OptimizerConfig(1.0, warmup_steps=10), 10)


def test_only_matrices_decay():
    mask = decay_mask(tiny())
    assert mask["blocks"] == {name: {"kernel": True, "bias": False} for name in ("up", "down")}
    assert mask["query"] == {"kernel": True, "bias": False}
    assert mask["gene"] == {"embedding": False} and mask["temperature"] is False

    # and the optimiser obeys: without gradients only what decays moves, by learning rate x decay
    model = tiny()
    tx, _ = make_optimizer(OptimizerConfig(0.5, schedule="constant", weight_decay=0.2), 10, model)
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes_of(model)["params"])
    updates = jax.jit(lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[0])(params)
    moved = jax.tree.map(lambda u: float(u.ravel()[0]), updates)
    assert moved == jax.tree.map(lambda decays: pytest.approx(-0.1) if decays else 0.0, mask)


def test_clipping_is_by_the_global_norm():
    model = tiny()
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes_of(model)["params"])
    grads = jax.tree.map(lambda p: 3 * p, params)

    def first_moment(clip_norm):
        tx, _ = make_optimizer(OptimizerConfig(1.0, clip_norm=clip_norm, b1=0.0), 10, model)
        opt = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[1])(grads, params)
        return pack(opt)["1"]["0"]["mu"]

    assert float(optax.tree.norm(first_moment(None))) == pytest.approx(
        float(optax.tree.norm(grads)), rel=1e-6
    )
    assert float(optax.tree.norm(first_moment(2.0))) == pytest.approx(2.0, rel=1e-5)


# ------------------------------------------------------------------------------------------- state


def test_state_is_plain_and_sharded():
    mesh, model, tx, abstract, _ = setup("tensor")
    state = init_state(model, tx, abstract)
    assert set(state) == {"params", "buffers", "opt", "guard", "step"}
    assert all(
        type(key) is str for path, _ in jax.tree_util.tree_leaves_with_path(state) for key in _keys(path)
    )
    kernel = state["params"]["blocks"]["up"]["kernel"]
    assert kernel.shape == (2, 16, 32) and kernel.addressable_shards[0].data.shape == (2, 8, 16)
    assert state["opt"]["1"]["0"]["mu"]["blocks"]["up"]["kernel"].sharding == kernel.sharding
    assert state["step"].sharding.is_fully_replicated and int(state["step"]) == 0
    jax.tree.map(
        lambda x, a: (x.sharding, x.shape, x.dtype) == (a.sharding, a.shape, a.dtype), state, abstract
    )


def _keys(path):
    return [entry.key for entry in path]


def test_pack_and_unpack():
    _, model, tx, _, _ = setup()
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes_of(model)["params"])
    opt = tx.init(params)
    back = unpack(tx, params, pack(opt))
    assert jax.tree.structure(back) == jax.tree.structure(opt)
    jax.tree.map(np.testing.assert_array_equal, back, opt)


def test_initial_values_do_not_depend_on_the_mesh():
    jax.tree.map(np.testing.assert_array_equal, initial("one"), initial("tensor"))


# -------------------------------------------------------------------------------------------- step


@pytest.mark.parametrize("layout", ["data", "fsdp", "tensor"])
def test_every_mesh_gives_the_same_run(layout):
    expected, state = run("one")
    actual, other = run(layout)
    for a, b in zip(actual, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert actual[0]["loss"] != actual[1]["loss"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), other["params"], state["params"]
    )


@pytest.mark.parametrize("layout", ["one", "fsdp"])
def test_accumulation_is_the_whole_batch(layout):
    """Cells differ in how many of their genes are hidden, and one is filler: a mean of means would fail."""
    whole, state = run(layout)
    cut, other = run(layout, accumulate=2 if layout == "fsdp" else 4)
    for a, b in zip(cut, whole, strict=True):
        assert {k: a[k] for k in ("loss", "grad_norm", "masked_mse", "cells")} == pytest.approx(
            {k: b[k] for k in ("loss", "grad_norm", "masked_mse", "cells")}, rel=1e-6
        )
    assert whole[0]["cells"] == 15
    moments = [s["opt"]["1"]["0"]["mu"] for s in (other, state)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *moments)
    np.testing.assert_array_equal(other["buffers"]["value_count"], state["buffers"]["value_count"])
    assert state["buffers"]["value_count"].sum() > 0


class TwoObjectives(Tiny):
    """The tiny model with a second objective that other cells weigh in, and by cells instead of genes."""

    def loss(self, batch, key):
        masked, weight, metrics = super().loss(batch, key)
        gene_id, value, _ = self.encode(batch, key)
        length = batch.weight * (batch.row % 3 == 0)
        second = (length * (self(gene_id, value) ** 2).sum(-1)).sum()
        return {"masked": masked, "cell": 0.5 * second}, {"masked": weight, "cell": length.sum()}, metrics


def test_several_objectives_are_divided_each_by_its_own_weight():
    mesh = make_mesh(MeshConfig(2, 4, 1))
    model = abstract(lambda: TwoObjectives(TinyConfig(), N_GENES, rngs=nnx.Rngs(0)))
    tx = optax.sgd(0.1)
    shapes = abstract_state(model, tx, mesh)

    def by_hand(params, buffers, batch):
        key = jax.random.fold_in(jax.random.key(0), 0)
        sums, weights, _ = bind(model, params, buffers).loss(batch, key)
        return sum(sums[name] / weights[name] for name in sums)

    before = jax.device_get(init_state(model, tx, shapes))
    value, gradient = jax.jit(jax.value_and_grad(by_hand))(before["params"], before["buffers"], cells(0))
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before["params"], gradient)
    for accumulate in (1, 2):
        step = make_train_step(model, tx, shapes, seed=0, accumulate=accumulate)
        state, metrics = step(init_state(model, tx, shapes), place(cells(0), mesh))
        assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(float(value), rel=1e-5)
        after = jax.device_get(state["params"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after, expected)
    evaluate = make_eval_step(model, shapes, seed=0)
    metrics = evaluate(init_state(model, tx, shapes), place(cells(0), mesh))
    assert float(metrics["loss"][1]) == 1 and np.isfinite(float(metrics["loss"][0]))


def test_accumulation_must_divide():
    mesh, model, tx, abstract, step = setup(accumulate=3)
    with pytest.raises(ValueError, match="train.accumulate = 3 does not divide a batch of 16"):
        step(fresh(abstract), place(cells(0), mesh))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_weight_changes_nothing(accumulate):
    config = OptimizerConfig(1e-2, schedule="constant")
    mesh, model, tx, abstract, step = setup(accumulate=accumulate, optimizer=config)
    state = fresh(abstract)
    before = jax.device_get(state["params"])
    empty = dataclasses.replace(cells(0), weight=np.zeros(16, np.float32))
    state, metrics = step(state, place(empty, mesh))
    assert float(metrics["loss"][1]) == 0 and float(metrics["grad_norm"][0]) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["params"]), before)
    assert int(state["step"]) == 1


def test_one_compile_per_length_and_donation():
    mesh, model, tx, abstract, step = setup("fsdp")
    state = fresh(abstract)
    for i, length in enumerate((24, 12, 24, 12)):
        old = state
        state, _ = step(state, place(cells(i, length=length), mesh))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert step._cache_size() == 2  # lengths 24 and 12; other tests of this step use 24
    jax.tree.map(lambda x, a: x.sharding == a.sharding or pytest.fail(f"{x.sharding}"), state, abstract)


def test_randomness_follows_seed_step_and_row():
    mesh, model, tx, abstract, step = setup()
    batch = place(cells(0), mesh)
    _, first = step(fresh(abstract), batch)
    later = fresh(abstract) | {"step": jax.device_put(jnp.int32(1), abstract["step"].sharding)}
    _, second = step(later, batch)
    moved = dataclasses.replace(cells(0), row=cells(0).row + np.uint32(100))
    _, third = step(fresh(abstract), place(moved, mesh))
    _, fourth = make_train_step(model, tx, abstract, seed=1)(fresh(abstract), batch)
    assert len({float(m["loss"][0]) for m in (first, second, third, fourth)}) == 4
    _, again = step(fresh(abstract), batch)
    assert float(again["loss"][0]) == float(first["loss"][0])


def test_evaluation_is_deterministic_and_changes_nothing():
    mesh, model, tx, abstract, step = setup("fsdp", dropout=0.5)
    evaluate = make_eval_step(model, abstract, seed=0)
    state = fresh(abstract)
    batch = place(cells(0), mesh)
    before = jax.device_get(state)
    first, second = evaluate(state, batch), evaluate(state, batch)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    assert evaluate._cache_size() == 1

    # dropout is off: the same model without any gives the same value
    _, plain, _, abstract, _ = setup("fsdp", dropout=0.0)
    without = make_eval_step(plain, abstract, seed=0)(state, batch)
    assert float(without["loss"][0]) == pytest.approx(float(first["loss"][0]), rel=1e-6)
    # and it is the state's own step that training keys on, not evaluation
    moved = state | {"step": jax.device_put(jnp.int32(9), state["step"].sharding)}
    assert float(evaluate(moved, batch)["loss"][0]) == float(first["loss"][0])


def test_the_tiny_model_learns():
    mesh, model, tx, abstract, step = setup("data", optimizer=OptimizerConfig(1e-2, warmup_steps=5))
    state = fresh(abstract)
    losses = []
    for i in range(45):
        state, metrics = step(state, place(cells(i), mesh))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
