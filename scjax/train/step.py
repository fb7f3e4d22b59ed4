"""One step of training and one of evaluation, as pure jitted functions.

Losses arrive as (sum, weight), or as dicts of them with one entry per objective; what is minimised is the sum
over the objectives of sum / weight. Sums are added over micro-batches and devices and divided once, so that a
step is the same however a batch is cut, although cells differ in how many masked genes they contribute.
Objectives between the cells of a batch (contrast, cell similarity, batch normalisation) see one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scjax.nn.module import Abstract, axes_of, bind, buffers_of
from scjax.nn.work import work_metrics
from scjax.parallel import BATCH_AXES, Layout, batch_sharding, replicated
from scjax.parallel.layout import automatic, whole
from scjax.train.guard import GuardConfig, choose, judge
from scjax.train.optimizer import moving_average
from scjax.train.state import State, judged_params, pack, shardings_of, unpack
from scjax.types import CellBatch

Sums = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
WORK = ("cells", "tokens", "operations")  # metrics of what was computed, whatever comes of it
TrainStep = Callable[[State, CellBatch], tuple[State, Metrics]]
EvalStep = Callable[[State, CellBatch], Metrics]


def _loss_of(
    model: Abstract, abstract: State, layout: Layout | None, *, train: bool
) -> Callable[..., tuple[Any, Any, Any, Any]]:
    """``(params, buffers, batch, key) -> (sums, weights, new buffers, metrics)``; two dicts by objective."""
    names, layout = axes_of(model)["params"], layout or Layout(abstract["step"].sharding.mesh)

    def as_used(path: tuple[Any, ...], param: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """Tables are gathered before anything is looked up in them. Left to itself the compiler would look up
        pieces of rows, and move the activations of the whole batch between devices to put them together.
        Kernels are left to their products, and to the layer's turn."""
        kernel = jax.tree_util.keystr(path[-1:], simple=True) == "kernel"
        return param if kernel or axes[:1] == ("layers",) else whole(param, axes)

    def loss(params: Any, buffers: Any, batch: CellBatch, key: jax.Array) -> tuple[Any, Any, Any, Any]:
        with layout.active():
            module = bind(model, jax.tree_util.tree_map_with_path(as_used, params, names), buffers)
            if not train:
                module.eval()
            work = work_metrics(model, module, batch) if train else {}
            sums, weights, metrics = module.loss(batch, key)
        if not isinstance(sums, Mapping):
            sums, weights = {"loss": sums}, {"loss": weights}
        if sums.keys() != weights.keys():
            raise ValueError(f"the loss has sums of {sorted(sums)} and weights of {sorted(weights)}")
        metrics = dict(metrics) | work | {"cells": (batch.weight.sum(), jnp.ones(()))}
        as_float = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
        return as_float(dict(sums)), as_float(dict(weights)), buffers_of(module), as_float(metrics)

    return loss


def _objective(sums: Sums, weights: Sums) -> jax.Array:
    """Sum over the objectives of sum / weight; an objective without weight counts for nothing."""
    terms = [
        jnp.where(weights[name] > 0, total / jnp.where(weights[name] > 0, weights[name], 1), 0)
        for name, total in sums.items()
    ]
    return sum(terms, jnp.zeros(()))


def _loss_metric(sums: Sums, weights: Sums) -> tuple[jax.Array, jax.Array]:
    """What is logged as the loss. Means of several objectives cannot be pooled over steps by one weight:
    there it is the objective of the step."""
    if len(sums) == 1:
        return (*sums.values(), *weights.values())  # type: ignore[return-value]
    return _objective(sums, weights), jnp.ones(())


def _as_at_the_start(now: jax.Array, start: jax.Array) -> jax.Array:
    """A counter among the buffers counts steps: every micro-batch finds it as the step did. What else there
    is (running means) is handed from one micro-batch to the next."""
    return start if now.ndim == 0 and jnp.issubdtype(now.dtype, jnp.integer) else now


def make_train_step(
    model: Abstract,
    tx: optax.GradientTransformation,
    abstract: State,
    *,
    seed: int,
    accumulate: int = 1,
    layout: Layout | None = None,
    guard: GuardConfig | None = None,
    ema: float | None = None,
) -> TrainStep:
    """The jitted ``(state, batch) -> (state, metrics)``; the state passed in is donated.

    Compiles once for each length of batch. Randomness is keyed by (seed, step) here and by row in the
    model, so that it is the same on every mesh and for every ``accumulate``.

    Args:
      model: the abstract model.
      tx: the optimiser.
      abstract: from :func:`scjax.train.abstract_state`; fixes the shardings of the new state.
      seed: of the run.
      accumulate: micro-batches a step. Each takes every ``accumulate``-th row, so that each device
        cuts up its own rows and none moves.
      layout: what follows from the hardware; None for a plain one on the mesh of ``abstract``.
      guard: which steps are skipped, see :mod:`scjax.train.guard`; None, or a limit of 0, for none.
      ema: decay of the moving average that ``abstract`` then has, see :func:`scjax.train.moving_average`.

    Returns:
      The step. Its metrics are (sum, weight) float32 scalars by name: those of the model, ``loss``,
      ``cells``, ``tokens`` and ``operations`` (sums over the batch, see :mod:`scjax.nn.work`) and
      ``grad_norm`` (before clipping). A batch of weight 0 has the gradient 0. With a guard also those of
      :func:`scjax.train.guard.judge`; the others have no weight in a skipped step, but for ``cells``,
      ``tokens`` and ``operations``, which were computed.

    Raises:
      ValueError: ``ema`` without an average in ``abstract``, or the other way round; when traced, if
        ``accumulate`` does not divide the batch.
    """
    if (ema is not None) != ("ema" in abstract):
        raise ValueError("a moving average needs both abstract_state(..., ema=True) and its decay, ema")
    mesh, shardings = abstract["step"].sharding.mesh, shardings_of(abstract)
    layout = layout or Layout(mesh)
    loss = _loss_of(model, abstract, layout, train=True)

    def objective(params: Any, buffers: Any, batch: CellBatch, key: jax.Array, weights: Sums | None) -> Any:
        """One objective is divided by its weight at the end of the step. Several must be before they are
        added up, by ``weights`` of the whole batch (None: this is the whole batch)."""
        sums, own, buffers, metrics = loss(params, buffers, batch, key)
        if len(sums) == 1:
            (total,) = sums.values()
        else:
            total = _objective(sums, jax.lax.stop_gradient(own) if weights is None else weights)
        return total, (sums, own, buffers, metrics)

    gradient = jax.grad(objective, has_aux=True)

    def cut(x: jax.Array) -> jax.Array:
        if x.shape[0] % accumulate:
            raise ValueError(f"train.accumulate = {accumulate} does not divide a batch of {x.shape[0]} cells")
        x = jnp.moveaxis(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(x, layout.sharding(None, BATCH_AXES))

    def gradients(params: Any, buffers: Any, batch: CellBatch, key: jax.Array) -> Any:
        """Of the whole batch, and ``(sums, weights, new buffers, metrics)``."""
        if accumulate == 1:
            return gradient(params, buffers, batch, key, None)
        cuts = jax.tree.map(cut, batch)
        first = jax.tree.map(lambda x: x[0], cuts)
        like = jax.eval_shape(lambda b: gradient(params, buffers, b, key, None), first)
        whole = None
        if len(like[1][0]) > 1:
            # weights do not depend on the network, which the compiler therefore leaves out here
            each = jax.lax.map(lambda micro: loss(params, buffers, micro, key)[1], cuts)
            whole = jax.tree.map(lambda x: x.sum(0), each)

        def add(carry: Any, micro: CellBatch) -> tuple[Any, None]:
            now, totals = carry
            now = jax.tree.map(_as_at_the_start, now, buffers)
            grads, (sums, weights, now, metrics) = gradient(params, now, micro, key, whole)
            return (now, jax.tree.map(jnp.add, totals, (grads, sums, weights, metrics))), None

        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (like[0], like[1][0], like[1][1], like[1][3])
        )
        (now, (grads, sums, weights, metrics)), _ = jax.lax.scan(add, (buffers, zeros), cuts)
        for name in WORK:
            metrics[name] = (metrics[name][0], jnp.ones(()))
        return grads, (sums, weights, now, metrics)

    def update(grads: Any, opt: Any, params: Any) -> tuple[Any, Any]:
        updates, opt = tx.update(grads, unpack(tx, params, opt), params)
        return updates, pack(opt)

    everywhere = replicated(mesh)
    gradients = automatic(
        gradients,
        mesh,
        (shardings["params"], (everywhere, everywhere, shardings["buffers"], everywhere)),
    )
    update = automatic(update, mesh, (shardings["params"], shardings["opt"]))

    def step(state: State, batch: CellBatch) -> tuple[State, Metrics]:
        params, key = state["params"], jax.random.fold_in(jax.random.key(seed), state["step"])
        grads, (sums, weights, buffers, metrics) = gradients(params, state["buffers"], batch, key)
        metrics["loss"] = _loss_metric(sums, weights)
        if len(sums) == 1:
            (weight,) = weights.values()
            scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
            grads = jax.tree.map(lambda g: jnp.where(scale > 0, g * scale, 0).astype(g.dtype), grads)
        metrics["grad_norm"] = (optax.tree.norm(grads).astype(jnp.float32), jnp.ones(()))

        updates, opt = update(grads, state["opt"], params)
        params = optax.apply_updates(params, updates)
        new = {"params": params, "buffers": buffers, "opt": opt}
        if ema is not None:
            new["ema"] = moving_average(state["ema"], params, ema, state["step"])
        memory = state["guard"]
        if guard is not None and guard.limit:
            (total, weight), (norm, _) = metrics["loss"], metrics["grad_norm"]
            mean = total / jnp.where(weight > 0, weight, 1)
            good, memory, told = judge(guard, memory, mean, weight, norm)
            new = choose(good, new, {name: state[name] for name in new})
            nothing = jax.tree.map(jnp.zeros_like, metrics)
            metrics = choose(good, metrics, nothing | {name: metrics[name] for name in WORK}) | told
        return new | {"guard": memory, "step": state["step"] + 1}, metrics

    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


def make_eval_step(model: Abstract, abstract: State, *, seed: int, layout: Layout | None = None) -> EvalStep:
    """The jitted ``(state, batch) -> metrics``: those of training without a gradient, dropout off.

    Its key does not depend on the step: every evaluation masks the same genes of the same cells. Of a state
    with a moving average it takes that.
    """
    mesh = abstract["step"].sharding.mesh
    loss = _loss_of(model, abstract, layout, train=False)

    def evaluate(params: Any, buffers: Any, batch: CellBatch, key: jax.Array) -> tuple[Any, Any, Any]:
        sums, weights, _, metrics = loss(params, buffers, batch, key)
        return sums, weights, metrics

    evaluate = automatic(evaluate, mesh, replicated(mesh))

    def step(state: State, batch: CellBatch) -> Metrics:
        sums, weights, metrics = evaluate(judged_params(state), state["buffers"], batch, jax.random.key(seed))
        return metrics | {"loss": _loss_metric(sums, weights)}

    return jax.jit(
        step,
        in_shardings=(shardings_of(abstract), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
