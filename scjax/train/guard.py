"""Steps that must not be taken: a loss or gradient that is not finite, or far above what it was of late.

One bad batch, or one flip of a bit, can undo days. A step that the guard finds bad leaves parameters,
buffers, optimiser and moving average to the bit as they were; it is counted, and the run goes on with the
next batch. Where too many come too close together something else is wrong, and the run stops.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from scjax.config import ConfigError

FLOOR = 0.01  # the deviation is taken for at least this share of the mean: even losses do not make spikes
RECOVERY = 100  # good steps that make up for one bad step

Guard = dict[str, jax.Array]
Told = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which steps are skipped, and when there are too many of them.

    Attributes:
      limit: the run stops when bad steps fill it: each counts 1, and each good step takes back 1/100. 0: none
        is skipped, and the first one that is not finite stops the run.
      spike_sigma: a loss or gradient norm that lies more than so many standard deviations above its mean is
        bad too; None for only what is not finite.
      window: steps that this mean and deviation look back on (an exponential average).
      warmup: steps before the first spike can be told.
    """

    limit: float = 0
    spike_sigma: float | None = None
    window: int = 500
    warmup: int = 100

    def __post_init__(self) -> None:
        if self.limit < 0 or self.window < 2 or self.warmup < 2:
            raise ConfigError("train.guard: limit is not negative, window and warmup are at least 2 steps")
        if self.spike_sigma is not None and (self.spike_sigma <= 0 or not self.limit):
            raise ConfigError(
                f"train.guard.spike_sigma is {self.spike_sigma}; it must be positive, and spikes are skipped "
                f"only with a train.guard.limit above 0 (it is {self.limit})"
            )


def new_guard() -> Guard:
    """What the guard remembers, at step 0: scalars. The same whatever its config, which may therefore change
    when a run is resumed."""
    f, i = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    means = {f"{name}_{moment}": f for name in ("loss", "norm") for moment in ("mean", "variance")}
    return {**means, "seen": i, "skipped": i, "level": f}


def judge(
    config: GuardConfig, guard: Guard, loss: jax.Array, weight: jax.Array, norm: jax.Array
) -> tuple[jax.Array, Guard, Told]:
    """``(good, guard after this step, metrics)``.

    A spike enters mean and deviation as the highest value that would have passed. So a single one hardly
    moves them, and a lasting change, such as an objective that sets in later, is followed after some steps.

    Args:
      config: what is bad.
      guard: from :func:`new_guard` or the step before.
      loss: the mean of the step; ignored where ``weight`` is 0, a batch without anything to learn from.
      weight: of the loss.
      norm: of the gradient.

    Returns:
      good: bool. The metrics, (sum, weight) each: ``skipped`` (this step, 0 or 1), ``skipped_total``,
      ``guard_full`` (1 where this bad step fills the limit), and ``skipped_loss`` and ``skipped_grad_norm``,
      what they were in the skipped steps.
    """
    rate = 1 / jnp.minimum(guard["seen"] + 1, config.window)  # the plain mean, until there are enough
    warm = (guard["seen"] >= config.warmup) & (weight > 0)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    good, after = finite, dict(guard)
    for name, value in (("loss", loss), ("norm", norm)):
        mean, variance = guard[f"{name}_mean"], guard[f"{name}_variance"]
        deviation = jnp.maximum(jnp.sqrt(variance), FLOOR * jnp.abs(mean))
        sigma = jnp.inf if config.spike_sigma is None else config.spike_sigma
        highest = jnp.where(warm & (deviation > 0), mean + sigma * deviation, jnp.inf)
        good &= value <= highest
        off = jnp.minimum(value, highest) - mean
        after[f"{name}_mean"] = mean + rate * off
        after[f"{name}_variance"] = (1 - rate) * (variance + rate * off * off)
    after["seen"] = guard["seen"] + 1
    after = choose(finite & (weight > 0), after, guard)

    bad = (~good).astype(jnp.float32)
    after["skipped"] = guard["skipped"] + ~good
    after["level"] = jnp.where(good, jnp.maximum(guard["level"] - 1 / RECOVERY, 0), guard["level"] + 1)
    one, full = jnp.ones(()), bad * (after["level"] >= config.limit)
    return (
        good,
        after,
        {
            "skipped": (bad, one),
            "skipped_total": (after["skipped"].astype(jnp.float32), one),
            "guard_full": (full, one),
            "skipped_loss": (jnp.where(good, 0, loss), bad),
            "skipped_grad_norm": (jnp.where(good, 0, norm), bad),
        },
    )


def choose(good: jax.Array, new: Any, old: Any) -> Any:
    """The tree ``new`` where the step is good, else ``old``, to the bit."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
