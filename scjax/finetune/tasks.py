"""Tasks and their heads: what is read off a cell's or a gene's vector, and by how much it is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.config import ConfigError
from scjax.nn.layers import MLP
from scjax.nn.module import Buffer
from scjax.objectives import reverse_gradient

RAREST = 1e-6  # least prior of a class


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to predict.

    Attributes:
      kind: "classes" of a label, one a cell; "ordinal", classes with an order; "multilabel", any number of
        ``size`` classes, from a value [B, size] of 0 and 1; "regression" of a value [B] or [B, size].
      source: the label or value of the batch that holds the target; "" for the task's name. Cells where it is
        -1 or NaN do not count.
      size: number of classes, or of values; ``experiments/finetune.py`` works out one that is 0.
      level: "cell", or "gene": the target is a number or class of each gene of the vocabulary, the same in
        all cells, in the buffer ``heads/TASK/target``; it is read off each gene's state in each cell.
      hidden: widths of the layers between vector and output; none for a linear head.
      weight: of the task beside others.
      reverse: the base is trained to make the task impossible, by the gradient times minus this (DAB,
        adversarial training; Ganin and Lempitsky 2015). 0 for a task that is to be learned.
      order: of "ordinal", the categories of the label from the lowest on; those not named do not count. ()
        where the codes of the label are in order.
      rank: place in the order of each code, worked out from ``order`` by :func:`scjax.finetune.complete`.
      class_weight: of the cells of each class; () for 1.
      prior: frequency of each class among the cells that are drawn, for ``logit_adjustment``; one that is
        never drawn counts as one in a million.
      logit_adjustment: tau; the loss is that of logits + tau log(prior), so that the logits themselves are
        those of classes that are equally frequent (Menon et al., ICLR 2021). 0 for none.
    """

    kind: Literal["classes", "regression", "ordinal", "multilabel"] = "classes"
    source: str = ""
    size: int = 0
    level: Literal["cell", "gene"] = "cell"
    hidden: tuple[int, ...] = ()
    weight: float = 1.0
    reverse: float = 0.0
    order: tuple[str, ...] = ()
    rank: tuple[int, ...] = ()
    class_weight: tuple[float, ...] = ()
    prior: tuple[float, ...] = ()
    logit_adjustment: float = 0.0

    @property
    def categorical(self) -> bool:
        """One class a cell."""
        return self.kind in ("classes", "ordinal")

    def check(self, name: str) -> None:
        """Raises ConfigError naming what does not go together; for a task whose size is known."""
        where, least = f"model.tasks.{name}", 2 if self.categorical else 1
        if self.size < least:
            raise ConfigError(
                f"{where}.size = {self.size}; a task of kind {self.kind!r} has at least {least}. "
                "experiments/finetune.py works out from the corpus one that is 0"
            )
        for field in ("class_weight", "prior"):
            given = getattr(self, field)
            if given and len(given) != self.size:
                raise ConfigError(f"{where}.{field} has {len(given)} numbers for {self.size} classes")
        if self.kind != "ordinal" and (self.order or self.rank):
            raise ConfigError(f'{where}: order and rank are for kind "ordinal", not {self.kind!r}')
        if self.kind != "classes" and (self.class_weight or self.logit_adjustment):
            raise ConfigError(
                f'{where}: class_weight and logit_adjustment are for kind "classes", not {self.kind!r}'
            )
        if self.logit_adjustment and not self.prior:
            raise ConfigError(f"{where}.logit_adjustment needs prior, the frequency of each class")
        if self.reverse < 0 or self.weight < 0:
            raise ConfigError(f"{where}: weight and reverse are not negative")


class Head(nnx.Module):
    """From vectors [..., D] to outputs [..., size].

    Buffers that are set once from data, and are no scaling at first: ``centre`` and ``spread`` [D] of the
    vectors, ``mean`` and ``scale`` [size] of the values of a regression, ``temperature`` of classes.

    Args:
      task: what is predicted.
      n_in: D.
      n_genes: of the vocabulary, for a task at the level of genes.
    """

    def __init__(self, task: Task, n_in: int, n_genes: int, *, rngs: nnx.Rngs):
        self.task = task
        n_out = 1 if task.kind == "ordinal" else task.size
        self.centre, self.spread = Buffer(jnp.zeros(n_in)), Buffer(jnp.ones(n_in))
        self.layers = MLP((n_in, *task.hidden, n_out), activation="gelu", rngs=rngs)
        if task.kind == "ordinal":
            # the lowest cut, and the softplus of how far apart the others are
            self.cuts = nnx.Param(jnp.zeros(task.size - 1))
        if task.kind == "regression":
            self.mean, self.scale = Buffer(jnp.zeros(task.size)), Buffer(jnp.ones(task.size))
        else:
            self.temperature = Buffer(jnp.ones(()))
        if task.level == "gene":
            shape = (n_genes,) if task.categorical else (n_genes, task.size)
            self.target = Buffer(jnp.full(shape, jnp.nan), axes=("vocab", None)[: len(shape)])
            self.held_out = Buffer(jnp.zeros(n_genes), axes=("vocab",))

    def __call__(self, x: Array) -> Array:
        """float32 [..., size]: logits of classes (of "ordinal": log probabilities), or values as they were
        scaled for training."""
        if self.task.reverse:
            r = self.task.reverse
            x = r * reverse_gradient(x) + (1 - r) * jax.lax.stop_gradient(x)
        x = (x.astype(jnp.float32) - self.centre[...]) / self.spread[...]
        y = self.layers(x)
        return _cumulative(y[..., 0], self.cuts[...]) if self.task.kind == "ordinal" else y

    def predict(self, y: Array) -> Array:
        """Calibrated probabilities, or values in the units of the target, of outputs ``y``."""
        if self.task.kind == "regression":
            return y * self.scale[...] + self.mean[...]
        y = y / self.temperature[...]
        return jax.nn.softmax(y) if self.task.categorical else jax.nn.sigmoid(y)

    def loss(self, y: Array, target: Array, weight: Array) -> tuple[Array, Array, dict[str, Any]]:
        """``(sum, weight, metrics)`` of outputs [..., size] against int [...] classes, -1 where unknown, or
        float [..., size] values, NaN where unknown; ``weight`` [...]."""
        task = self.task
        if not task.categorical:
            target = target.astype(jnp.float32).reshape(y.shape)
            each = jnp.where(jnp.isfinite(target), weight[..., None], 0.0)
            target = jnp.where(each > 0, target, 0.0)
            if task.kind == "regression":
                error = (y - (target - self.mean[...]) / self.scale[...]) ** 2
            else:
                error = jax.nn.softplus(y) - y * target
            total, of = (each * error).sum(), each.sum()
            return total, of, {"mse" if task.kind == "regression" else "bce": (total, of)}
        weight = jnp.where(target >= 0, weight, 0.0)
        known = jnp.maximum(target, 0)
        # a class that the head does not have gives NaN, which ends the run, and no wrong gradient
        hot = jax.nn.one_hot(known, task.size)
        hot = jnp.where((known < task.size)[..., None], hot, jnp.nan)
        adjusted = y
        if task.logit_adjustment:
            adjusted = y + task.logit_adjustment * jnp.log(jnp.maximum(jnp.asarray(task.prior), RAREST))
        each = weight * (hot @ jnp.asarray(task.class_weight)) if task.class_weight else weight
        nll = jax.nn.logsumexp(adjusted, -1) - (hot * adjusted).sum(-1)
        total, of = jnp.where(weight > 0, each * nll, 0.0).sum(), jnp.where(weight > 0, each, 0.0).sum()
        right = jnp.where(y.argmax(-1) == known, weight, 0.0)
        return total, of, {"ce": (total, of), "accuracy": (right.sum(), weight.sum())}


def _cumulative(score: Array, cuts: Array) -> Array:
    """log P(class) [..., C] of a score [...] between C - 1 cuts that rise: P(class > k) is the sigmoid of
    score - k-th cut, the proportional odds of McCullagh (1980)."""
    rising = jnp.concatenate([cuts[:1], cuts[:1] + jnp.cumsum(jax.nn.softplus(cuts[1:]))])
    above = score[..., None] - rising  # logit of being above each cut
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), exact where both are near 1, too
    first, last = jax.nn.log_sigmoid(-above[..., :1]), jax.nn.log_sigmoid(above[..., -1:])
    a, b = above[..., :-1], above[..., 1:]
    between = jax.nn.log_sigmoid(a) + jax.nn.log_sigmoid(-b) + jnp.log1p(-jnp.exp(b - a))
    return jnp.concatenate([first, between, last], -1)
