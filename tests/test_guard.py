"""Bad steps planted in data and gradients: skipped to the bit, counted, and the end of a run at the limit."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import N_GENES, Tiny, TinyConfig, cells

from scjax.config import ConfigError
from scjax.nn import abstract
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import (
    Checkpoints,
    GuardConfig,
    Meter,
    NonFiniteLoss,
    OptimizerConfig,
    TooManySkipped,
    abstract_state,
    init_state,
    make_optimizer,
    make_train_step,
    moving_average,
)
from scjax.train.guard import judge, new_guard

GUARD = GuardConfig(limit=2.5, spike_sigma=6.0, window=50, warmup=5)


@jax.custom_vjp
def spoil_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    """``x``, whose gradient is multiplied by ``factor``."""
    return x


spoil_gradient.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor)))


class Spoilt(Tiny):
    """The tiny model, whose gradient is multiplied by the label "gradient" of the batch's first cell."""

    def loss(self, batch, key):
        total, weight, metrics = super().loss(batch, key)
        return spoil_gradient(total, batch.value["gradient"][0]), weight, metrics


def batch(step: int, *, gradient: float = 1.0, count: float = 1.0):
    """Batch number ``step``, with its gradient or its first cell's counts multiplied."""
    plain = cells(step)
    counts = plain.count.copy()
    counts[0] *= count
    value = {"gradient": np.full(len(plain.row), gradient, np.float32)}
    return dataclasses.replace(plain, count=counts, value=value)


@functools.cache
def trainer(shape=(1, 1, 1), accumulate: int = 1, guard: GuardConfig | None = GUARD):
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    model = abstract(lambda: Spoilt(TinyConfig(), N_GENES, rngs=nnx.Rngs(0)))
    tx, _ = make_optimizer(OptimizerConfig(1e-3, warmup_steps=3, weight_decay=0.1), 50, model)
    state = abstract_state(model, tx, mesh, ema=True)
    step = make_train_step(model, tx, state, seed=0, accumulate=accumulate, guard=guard, ema=0.9)
    return mesh, lambda: init_state(model, tx, state), state, step


def values(metrics):
    return {name: float(total) for name, (total, _) in metrics.items()}


EVIL = {
    "NaN in the data": {"count": np.nan},
    "NaN in the gradient": {"gradient": np.nan},
    "infinite gradient": {"gradient": np.inf},
    "spike in the data": {"count": 1e30},
    "spike in the gradient": {"gradient": 300.0},
}
ONE, MORE = ((1, 1, 1), 1), [((2, 2, 2), 1), ((2, 4, 1), 2)]


@pytest.mark.parametrize(
    "shape, accumulate, evil",
    [(*ONE, evil) for evil in EVIL]
    + [(*where, evil) for where in MORE for evil in ("NaN in the data", "spike in the gradient")],
    ids=str,
)
def test_a_bad_step_is_as_if_it_had_not_been(shape, accumulate, evil):
    mesh, start, _, step = trainer(shape, accumulate)

    def run(at_step_8):
        state = start()
        for i in range(12):
            if i == 8 and at_step_8 is None:  # another run, in which this batch is left out
                state = state | {"step": state["step"] + 1}
                continue
            before = jax.device_get(state)
            state, metrics = step(state, place(batch(i, **(at_step_8 if i == 8 else {})), mesh))
            told = values(metrics)
            assert told["skipped"] == (i == 8) and told["guard_full"] == 0
            if i == 8:
                after = jax.device_get(state)
                for kind in ("params", "buffers", "opt", "ema"):
                    jax.tree.map(np.testing.assert_array_equal, after[kind], before[kind])
                assert after["step"] == 9 and told["skipped_total"] == 1 and told["cells"] == 15
                assert told["loss"] == 0 and float(metrics["loss"][1]) == 0
                finite = np.isfinite([told["skipped_loss"], told["skipped_grad_norm"]])
                assert finite.all() == ("spike" in evil)
            else:
                assert told["loss"] > 0 and told["skipped_loss"] == 0
        return jax.device_get(state)

    skipped, left_out = run(EVIL[evil]), run(None)
    for kind in ("params", "buffers", "opt", "ema"):
        jax.tree.map(np.testing.assert_array_equal, skipped[kind], left_out[kind])
    assert step._cache_size() == 1


def test_without_a_limit_the_first_bad_step_stops_the_run():
    mesh, start, _, step = trainer(guard=None)
    state, meter = start(), Meter()
    state, metrics = step(state, place(batch(0, gradient=np.nan), mesh))
    assert "skipped" not in metrics and np.isnan(values(metrics)["grad_norm"])
    meter.add(1, metrics)
    with pytest.raises(NonFiniteLoss, match="step 1: grad norm nan"):
        meter.mean("train")


def test_at_the_limit_the_run_stops_with_a_good_state():
    mesh, start, _, step = trainer()
    state, meter = start(), Meter()
    with pytest.raises(TooManySkipped, match="3 bad steps") as stopped:
        for i in range(20):
            good = jax.device_get(state["params"])
            state, metrics = step(state, place(batch(i, count=np.nan if i in (6, 8, 11) else 1), mesh))
            meter.add(i + 1, metrics)
            meter.mean("train")
    assert i == 11  # 1 - 1/100 + 1 - 2/100 + 1 >= 2.5
    assert all(f"{bad} (" in str(stopped.value) for bad in (7, 9, 12))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["params"]), good)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good))


def test_resumes_exactly(tmp_path):
    """What the guard remembers is in the checkpoint: stopped between two bad steps, the rest is the same."""
    mesh, start, like, step = trainer()

    def go(state, first, last):
        told = []
        for i in range(first, last):
            state, metrics = step(state, place(batch(i, gradient=400.0 if i in (7, 11) else 1), mesh))
            told.append(values(metrics))
        return told, state

    told, whole = go(start(), 0, 14)
    assert [t["skipped"] for t in told] == [i in (7, 11) for i in range(14)]
    _, half = go(start(), 0, 9)
    with closing(Checkpoints(tmp_path / "checkpoints", {})) as checkpoints:
        checkpoints.save(9, half, {})
        checkpoints.wait()
        restored = checkpoints.restore(like)
    rest, resumed = go(restored.state, 9, 14)
    assert rest == told[9:]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))


# ------------------------------------------------------------------------------------- what is bad


@functools.partial(jax.jit, static_argnums=0)
def judge_all(config, losses, norms, weights):
    def one(guard, now):
        loss, norm, weight = now
        good, guard, told = judge(config, guard, loss, weight, norm)
        return guard, (good, guard, {name: total for name, (total, _) in told.items()})

    return jax.lax.scan(one, new_guard(), (losses, norms, weights))[1]


def judged(config, losses, norms=None, weights=None):
    losses = np.asarray(losses, np.float32)
    norms = np.ones_like(losses) if norms is None else np.asarray(norms, np.float32)
    weights = np.ones_like(losses) if weights is None else np.asarray(weights, np.float32)
    return jax.device_get(judge_all(config, losses, norms, weights))


def test_mean_and_deviation_are_those_of_the_steps_so_far():
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(5, 2, 30), rng.gamma(2, 1, 30)
    _, guard, _ = judged(GuardConfig(limit=1, window=30), losses, norms)
    for n in (1, 2, 10, 30):
        for name, x in (("loss", losses), ("norm", norms)):
            np.testing.assert_allclose(guard[f"{name}_mean"][n - 1], x[:n].mean(), rtol=1e-5)
            np.testing.assert_allclose(guard[f"{name}_variance"][n - 1], x[:n].var(), rtol=1e-4, atol=1e-6)
    # beyond the window the old is forgotten: 1 - 1/window a step
    _, guard, _ = judged(GuardConfig(limit=1, window=10), [0.0] * 10 + [1.0] * 10)
    np.testing.assert_allclose(guard["loss_mean"][-1], 1 - 0.9**10, rtol=1e-5)


def test_only_what_lies_far_above_is_a_spike():
    rng = np.random.default_rng(1)
    losses = rng.normal(5, 0.5, 1000).astype(np.float32)
    config = GuardConfig(limit=1, spike_sigma=6, window=200, warmup=50)
    good, _, _ = judged(config, losses)
    assert good.all()  # of a thousand honest steps none is taken for a spike
    planted = losses.copy()
    planted[[500, 700]], planted[[600, 800]] = 5 + 8 * 0.5, (0.0, 5 + 4 * 0.5)
    good, guard, _ = judged(config, planted)
    assert list(np.flatnonzero(~good)) == [500, 700]  # far below is no spike, nor are 4 deviations
    assert abs(guard["loss_mean"][510] - 5) < 0.2  # the spike has not moved the mean
    planted[:49] = losses[:49] * np.where(np.arange(49) % 7 == 6, 20, 1)
    assert judged(config, planted[:49])[0].all()  # not yet warm
    norms = np.where(np.arange(1000) == 400, 30.0, losses)
    assert list(np.flatnonzero(~judged(config, losses, norms)[0])) == [400]
    assert judged(GuardConfig(limit=1), planted)[0].all()  # without spike_sigma only what is not finite


def test_a_lasting_change_is_followed():
    """An objective that sets in at step 300 and trebles the loss costs some steps, not the run."""
    losses = np.random.default_rng(2).normal(5, 0.3, 600)
    losses[300:] += 10
    good, guard, told = judged(GuardConfig(limit=50, spike_sigma=6, window=200, warmup=50), losses)
    assert 1 <= (~good).sum() <= 30 and good[330:].all() and not told["guard_full"].any()


def test_the_limit_leaks():
    bad = np.zeros(700, bool)
    bad[[10, 20, 25, 300, 650, 660, 670]] = True
    losses = np.where(bad, np.nan, 1.0)
    good, guard, told = judged(GuardConfig(limit=3), losses)
    np.testing.assert_array_equal(good, ~bad)
    level, full = 0.0, []
    for i, step_is_bad in enumerate(bad):
        level = level + 1 if step_is_bad else max(level - 0.01, 0)
        assert guard["level"][i] == pytest.approx(level, abs=1e-4)
        full.append(step_is_bad and level >= 3)
    assert not any(full) and not told["guard_full"].any()  # 2.85 after the third: never full
    np.testing.assert_array_equal(told["skipped_total"], np.cumsum(bad))
    _, _, told = judged(GuardConfig(limit=2.8), losses)
    assert list(np.flatnonzero(told["guard_full"])) == [25, 670]


def test_an_empty_batch_is_neither_good_news_nor_bad():
    losses, weights = np.full(200, -3.0), np.ones(200)
    losses += np.random.default_rng(3).normal(0, 0.1, 200)
    losses[100], weights[100] = 0.0, 0.0  # 30 deviations above the mean, had it a weight
    good, guard, _ = judged(GuardConfig(limit=1, spike_sigma=6, warmup=10), losses, weights=weights)
    assert good.all() and guard["seen"][-1] == 199
    assert guard["loss_mean"][100] == guard["loss_mean"][99]


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"limit": -1}, "limit is not negative"),
        ({"limit": 1, "warmup": 1}, "at least 2 steps"),
        ({"spike_sigma": 6.0}, "only with a train.guard.limit above 0"),
        ({"limit": 1, "spike_sigma": 0.0}, "must be positive"),
    ],
)
def test_config_refuses(fields, told):
    with pytest.raises(ConfigError, match=told):
        GuardConfig(**fields)


def test_the_moving_average_has_its_closed_form():
    mesh, start, like, step = trainer()
    state, seen = start(), []
    first = jax.device_get(state["params"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["ema"]), first)
    for i in range(6):
        state, _ = step(state, place(batch(i), mesh))
        seen.append(jax.device_get(state["params"]))
    decay = np.minimum(0.9, (1 + np.arange(6)) / (10 + np.arange(6)))
    left = np.cumprod(np.append(1, decay[::-1]))[::-1]  # of the start, and of what each step added
    shares = np.append(left[0], (1 - decay) * left[1:])
    assert shares.sum() == pytest.approx(1)
    expected = jax.tree.map(lambda *p: sum(s * x for s, x in zip(shares, p, strict=True)), first, *seen)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        jax.device_get(state["ema"]),
        expected,
    )
    kernel = like["params"]["blocks"]["up"]["kernel"]
    assert like["ema"]["blocks"]["up"]["kernel"].sharding == kernel.sharding
    late = moving_average({"w": jnp.zeros(3)}, {"w": jnp.ones(3)}, 0.999, 100_000)["w"]
    np.testing.assert_allclose(late, 1 - 0.999, rtol=1e-3)


def test_an_average_needs_its_decay():
    mesh, start, like, step = trainer()
    model = abstract(lambda: Tiny(TinyConfig(), N_GENES, rngs=nnx.Rngs(0)))
    tx, _ = make_optimizer(OptimizerConfig(1e-3), 50, model)
    with pytest.raises(ValueError, match="a moving average needs both"):
        make_train_step(model, tx, abstract_state(model, tx, mesh), seed=0, ema=0.9)
