"""Optimisers, the course of their learning rate, and which parameters they decay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from scjax.config import ConfigError
from scjax.nn.module import Abstract
from scjax.train.kernels import kernels_of, scale_by_adafactor, scale_by_muon
from scjax.train.width import growth

Schedule = Callable[[Any], jax.Array]
Name = Literal["adamw", "adafactor", "lion", "muon"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser and the course of its learning rate.

    Attributes:
      learning_rate: at the end of the warm-up. One suited to AdamW suits Muon and Adafactor; Lion wants about
        a fifth of it, and five times its weight decay.
      name: "adamw" (Loshchilov and Hutter 2019). "adafactor" (Shazeer and Stern 2018), no momentum, and of
        the second moment of kernels only rows and columns: the least memory. "lion" (Chen et al. 2023), the
        sign of a momentum: half the memory. "muon" (Jordan et al. 2024), an orthogonalised momentum for the
        kernels of the stacked layers, AdamW for tables, heads, biases and scales.
      warmup_steps: steps of linear warm-up; the first step already moves, by learning_rate / warmup_steps.
      schedule: decay from the end of the warm-up to the last step. "cosine_restarts", as published for
        scBERT, starts again and again: in each cycle the rate rises linearly over ``warmup_steps`` from the
        lowest to the cycle's highest, then falls by half a cosine to the lowest.
      decay_steps: of "wsd" (warm-up, stable, decay): the rate stays for all steps between the warm-up and
        these last ones, in which it falls on a line.
      end_factor: learning rate after the last step, and the lowest of "cosine_restarts", as a fraction of
        ``learning_rate``; not used by "constant".
      cycle_steps: length of the first cycle of "cosine_restarts", its warm-up included.
      cycle_growth: the part of a cycle after its warm-up is so many times as long as in the cycle before.
      cycle_decay: the highest rate of a cycle, as a fraction of that of the cycle before.
      weight_decay: of the parameters that :func:`decay_mask` selects.
      clip_norm: largest global norm of the gradient; None for no clipping.
      b1, b2, eps: of Adam; Lion has the first two. ``b2`` None: 0.999 for Adam, 0.99 for Lion.
      ema: decay of the moving average of the parameters that validation, probes and ``scjax.load`` then take;
        None for none.
      width_base: fields of the model's config at the width for which ``learning_rate`` was found, such as
        ``{"d_model": 128, "n_heads": 2, "d_ff": 512}``; initial sizes and rates of the parameters then
        follow from how they grew, see :mod:`scjax.train.width`. None for no such scaling.
    """

    learning_rate: float
    name: Name = "adamw"
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant", "wsd", "cosine_restarts"] = "cosine"
    decay_steps: int = 0
    end_factor: float = 0.0
    cycle_steps: int = 0
    cycle_growth: float = 1.0
    cycle_decay: float = 1.0
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float | None = None
    eps: float = 1e-8
    ema: float | None = None
    width_base: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"optimizer.learning_rate is {self.learning_rate}; it must be positive")
        if self.name not in get_args(Name):
            raise ConfigError(f"optimizer.name is {self.name!r}; there are {', '.join(get_args(Name))}")
        if self.warmup_steps < 0 or self.weight_decay < 0 or not 0 <= self.end_factor <= 1:
            raise ConfigError(
                "optimizer: warmup_steps and weight_decay are not negative, end_factor is in [0, 1]"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(
                f"optimizer.clip_norm is {self.clip_norm}; give a positive norm, or None for none"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"optimizer.ema is {self.ema}; give a decay between 0 and 1, or None for none")
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise ConfigError(
                f"optimizer.decay_steps is {self.decay_steps} and schedule {self.schedule!r}: the decay of "
                '"wsd" has a number of steps, other schedules have none'
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

    if warmup + config.decay_steps > steps:
        raise ConfigError(
            f"optimizer.warmup_steps and decay_steps are {warmup} and {config.decay_steps}, together more "
            f"than train.steps, {steps}"
        )
    fall = steps - config.decay_steps if config.schedule == "wsd" else warmup  # where the decay begins

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        progress = jnp.clip((step - fall) / max(steps - fall, 1), 0.0, 1.0)
        if config.schedule == "constant":
            falling = jnp.ones_like(progress)
        else:
            left = (1 + jnp.cos(jnp.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
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
    return jax.tree.map(lambda kernel: kernel is not None, kernels_of(model), is_leaf=lambda x: x is None)


def make_optimizer(
    config: OptimizerConfig, steps: int, model: Abstract, base: Abstract | None = None
) -> tuple[optax.GradientTransformation, Schedule]:
    """``(transformation, schedule)``: gradients clipped by their global norm, then the optimiser.

    All of them are a direction, decoupled weight decay and the learning rate. An experiment that wants
    another one makes any ``optax.GradientTransformation`` in its place.

    Args:
      config: of the optimiser.
      steps: of the whole run.
      model: the abstract model.
      base: the model at the width that ``config.width_base`` describes (:func:`scjax.train.model_of`).

    Raises:
      ConfigError: see :func:`make_schedule` and :func:`scjax.train.width.growth`.
      ValueError: ``base`` without ``config.width_base``, or the other way round.
    """
    if (base is None) != (config.width_base is None):
        raise ValueError("optimizer.width_base and the model of that width, base, go together")
    schedule, kernels = make_schedule(config, steps), kernels_of(model)
    adam = optax.scale_by_adam(config.b1, 0.999 if config.b2 is None else config.b2, config.eps)
    if config.name == "adamw":
        direction = adam
    elif config.name == "adafactor":
        direction = scale_by_adafactor(kernels)
    elif config.name == "lion":
        direction = optax.scale_by_lion(config.b1, 0.99 if config.b2 is None else config.b2)
    else:
        is_leaf = lambda x: x is None or not isinstance(x, dict)  # noqa: E731
        label = lambda kernel: "muon" if kernel is not None and kernel.stacked else "adam"  # noqa: E731
        labels = jax.tree.map(label, kernels, is_leaf=is_leaf)
        direction = optax.partition({"muon": scale_by_muon(kernels), "adam": adam}, labels)
    parts = [direction]
    if base is not None:
        grew = growth(model, base)
        rates = jax.tree.map(lambda g: g.rate(config.name == "muon"), grew)
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, rates)))
    # the decay comes after the scaling of widths: it is the same for all of them
    parts.append(optax.add_decayed_weights(config.weight_decay, decay_mask(model)))
    parts.append(optax.scale_by_learning_rate(schedule))
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, optax.chain(*parts)), schedule


def moving_average(average: Any, params: Any, decay: float, step: Any) -> Any:
    """The exponential moving average of the parameters, brought up to ``params`` of ``step`` (from 0).

    ``d * average + (1 - d) * params`` with d = min(decay, (1 + step) / (10 + step)), so that the first values
    of a short run are forgotten as well (as in TensorFlow's ExponentialMovingAverage with ``num_updates``).
    """
    step = jnp.asarray(step, jnp.float32)
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: (a + (1 - d) * (p - a)).astype(a.dtype), average, params)
