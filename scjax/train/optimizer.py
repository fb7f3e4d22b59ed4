"""AdamW with warm-up and decay, and which parameters it decays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from scjax.config import ConfigError
from scjax.nn.module import Abstract, axes_of, shapes_of

Schedule = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) and the course of its learning rate.

    Attributes:
      learning_rate: at the end of the warm-up.
      warmup_steps: steps of linear warm-up; the first step already moves, by learning_rate / warmup_steps.
      schedule: decay from the end of the warm-up to the last step. "cosine_restarts", as published for
        scBERT, starts again and again: in each cycle the rate rises linearly over ``warmup_steps`` from the
        lowest to the cycle's highest, then falls by half a cosine to the lowest.
      end_factor: learning rate after the last step, and the lowest of "cosine_restarts", as a fraction of
        ``learning_rate``; not used by "constant".
      cycle_steps: length of the first cycle of "cosine_restarts", its warm-up included.
      cycle_growth: the part of a cycle after its warm-up is so many times as long as in the cycle before.
      cycle_decay: the highest rate of a cycle, as a fraction of that of the cycle before.
      weight_decay: of the parameters that :func:`decay_mask` selects.
      clip_norm: largest global norm of the gradient; None for no clipping.
      b1, b2, eps: of Adam.
    """

    learning_rate: float
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant", "cosine_restarts"] = "cosine"
    end_factor: float = 0.0
    cycle_steps: int = 0
    cycle_growth: float = 1.0
    cycle_decay: float = 1.0
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"optimizer.learning_rate is {self.learning_rate}; it must be positive")
        if self.warmup_steps < 0 or self.weight_decay < 0 or not 0 <= self.end_factor <= 1:
            raise ConfigError(
                "optimizer: warmup_steps and weight_decay are not negative, end_factor is in [0, 1]"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(
                f"optimizer.clip_norm is {self.clip_norm}; give a positive norm, or None for none"
            )
        if self.schedule == "cosine_restarts":
            if self.cycle_steps <= self.warmup_steps:
                raise ConfigError(
                    f"optimizer.cycle_steps is {self.cycle_steps}; a cycle must be longer than its warm-up, "
                    f"{self.warmup_steps} steps"
                )
            if self.cycle_growth < 1 or not 0 < self.cycle_decay <= 1:
                raise ConfigError("optimizer: cycle_growth is at least 1, cycle_decay in (0, 1]")


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Learning rate at step 0, 1, ... of a run of ``steps`` steps.

    Raises:
      ConfigError: the warm-up is not shorter than the run.
    """
    if config.schedule == "cosine_restarts":
        return _cosine_restarts(config, steps)
    warmup = config.warmup_steps
    if warmup and warmup >= steps:
        raise ConfigError(f"optimizer.warmup_steps is {warmup}; it must be less than train.steps, {steps}")

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if config.schedule == "constant":
            falling = jnp.ones_like(progress)
        else:
            left = 1 - progress if config.schedule == "linear" else (1 + jnp.cos(jnp.pi * progress)) / 2
            falling = config.end_factor + (1 - config.end_factor) * left
        return config.learning_rate * rising * falling

    return schedule


def _cosine_restarts(config: OptimizerConfig, steps: int) -> Schedule:
    """Loshchilov and Hutter, SGDR, ICLR 2017, with a warm-up in each cycle."""
    warmup = config.warmup_steps
    starts, falls = [0], [config.cycle_steps - warmup]
    while starts[-1] <= steps:
        starts.append(starts[-1] + warmup + falls[-1])
        falls.append(int(falls[-1] * config.cycle_growth))
    lowest = config.learning_rate * config.end_factor

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        cycle = jnp.searchsorted(jnp.asarray(starts, jnp.float32), step, side="right") - 1
        since = step - jnp.asarray(starts, jnp.float32)[cycle]
        progress = (since - warmup) / jnp.asarray(falls, jnp.float32)[cycle]
        share = jnp.where(since < warmup, since / max(warmup, 1), (1 + jnp.cos(jnp.pi * progress)) / 2)
        return lowest + (config.learning_rate * config.cycle_decay**cycle - lowest) * share

    return schedule


def decay_mask(model: Abstract) -> dict[str, Any]:
    """True for each parameter that weight decay applies to, in the structure of the parameters.

    Decayed are matrices that multiply activations: what Flax calls "kernel". Not decayed are biases and
    scales of norms, because they hold no direction that could grow without bound; and tables that are
    looked up (genes, ranks, bins): decay would act on every row at every step and wear away the rows that
    seldom have a gradient.
    """

    def decayed(path: tuple[Any, ...], leaf: Any, axes: tuple[str | None, ...]) -> bool:
        own = [axis for axis in axes if axis != "layers"]
        return len(own) >= 2 and str(getattr(path[-1], "key", path[-1])) == "kernel"

    shapes, axes = shapes_of(model)["params"], axes_of(model)["params"]
    return jax.tree_util.tree_map_with_path(decayed, shapes, axes)


def make_optimizer(
    config: OptimizerConfig, steps: int, model: Abstract
) -> tuple[optax.GradientTransformation, Schedule]:
    """``(transformation, schedule)``: gradients clipped by their global norm, then AdamW.

    An experiment that wants another optimiser makes any ``optax.GradientTransformation`` in its place.
    """
    schedule = make_schedule(config, steps)
    adamw = optax.adamw(
        schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay_mask(model)
    )
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, adamw), schedule


def moving_average(average: Any, params: Any, decay: float, step: Any) -> Any:
    """The exponential moving average of the parameters, brought up to ``params`` of ``step`` (from 0).

    ``d * average + (1 - d) * params`` with d = min(decay, (1 + step) / (10 + step)), so that the first values
    of a short run are forgotten as well (as in TensorFlow's ExponentialMovingAverage with ``num_updates``).
    """
    step = jnp.asarray(step, jnp.float32)
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: (a + (1 - d) * (p - a)).astype(a.dtype), average, params)
