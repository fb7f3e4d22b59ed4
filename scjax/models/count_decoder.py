"""Counts of a panel from the vector of a cell: what is typical of them, and how likely they are."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.config import INF, ConfigError, within
from scjax.nn.layers import MLP
from scjax.nn.module import Buffer
from scjax.nn.work import dense
from scjax.objectives import masked_mse
from scjax.objectives.counts import bernoulli_nll, negative_binomial_nll, poisson_nll

MEMORY = 2.0**20  # float32 cannot count past 2**24: from here on, older batches weigh half as much


@dataclasses.dataclass(frozen=True)
class Modality:
    """A panel of counts beside RNA.

    Attributes:
      size: features of the panel, those of ``data.values`` in the corpus.
      likelihood: "negative_binomial", with an inverse dispersion for each feature (proteins); "poisson"
        or "bernoulli", of there being any count (chromatin).
      background: a share of each cell's counts, learned for the cell, is drawn from one profile, learned for
        all: antibodies that float free. Not for "bernoulli".
      tokens: the features are tokens of the base. For panels of thousands take the encoder alone.
      mask_fraction: share of the features that is hidden in cells that keep the modality.
      weight: of its objective.
    """

    size: int
    likelihood: Literal["negative_binomial", "poisson", "bernoulli"] = "negative_binomial"
    background: bool = False
    tokens: bool = True
    mask_fraction: float = 0.3
    weight: float = 1.0

    def __post_init__(self) -> None:
        within(self, size=(1, INF), mask_fraction=(0, 1), weight=(0, INF))
        if self.background and self.likelihood == "bernoulli":
            raise ConfigError('background = True is for counts: it does not go with likelihood = "bernoulli"')


class CountDecoder(nnx.Module):
    """Counts of a panel from the vector of a cell: counts of the whole panel times each feature's share.

    How much was sequenced is taken from the counts themselves, hidden ones too, and no business of the
    vector: the shares of what the cell's study measured add up to 1. With ``background`` a learned share of
    them is the background's. "bernoulli": the log odds are those of the cell's share of open features, plus
    a score.

    Buffers hold what is typical: the counts of a feature, and each feature's mean on the scale of the errors,
    the no-information baseline.

    Args:
      d_model: width D of the vector.
      modality: see :class:`Modality`.
    """

    def __init__(self, d_model: int, modality: Modality, *, rngs: nnx.Rngs):
        size, self.modality = modality.size, modality
        self.score = MLP((d_model, d_model, size), activation="gelu", rngs=rngs)
        if modality.likelihood == "negative_binomial":
            self.log_inverse_dispersion = nnx.Param(jnp.zeros(size), axes=(None,))
        if modality.background:
            self.ambient = MLP((d_model, 1), rngs=rngs)
            self.profile = nnx.Param(jnp.zeros(size), axes=(None,))
        self.total, self.seen = Buffer(jnp.zeros(size), axes=(None,)), Buffer(jnp.zeros(size), axes=(None,))
        self.log_level, self.cells = Buffer(jnp.zeros(())), Buffer(jnp.zeros(()))

    def __call__(self, x_BD: Array, there_BG: Array, level_B: Array) -> Array:
        """float32 [B, G]: expected counts, or log odds of being open.

        Args:
          x_BD: vectors of cells.
          there_BG: bool, which features the cell's study measured.
          level_B: mean count of those; "bernoulli": share of them that is open.
        """
        score = self.score(x_BD).astype(jnp.float32)
        if self.modality.likelihood == "bernoulli":
            return score + (jnp.log(level_B) - jnp.log1p(-level_B))[:, None]
        share = share_of(score, there_BG)
        if self.modality.background:
            ambient = jax.nn.sigmoid(self.ambient(x_BD).astype(jnp.float32) - 2.0)  # a tenth, to begin with
            share = (1 - ambient) * share + ambient * share_of(self.profile[...], there_BG)
        return share * (level_B * there_BG.sum(1))[:, None]

    def expected(self, x_BD: Array) -> Array:
        """float32 [B, G]: counts, or probabilities, in cells of typical depth with all features measured."""
        level = jnp.exp(self.log_level[...] / jnp.maximum(self.cells[...], 1.0))
        level, there = jnp.full(x_BD.shape[:1], level), jnp.ones((len(x_BD), self.modality.size), bool)
        if self.modality.likelihood == "bernoulli":
            return jax.nn.sigmoid(self(x_BD, there, jnp.clip(level, 1e-6, 1 - 1e-6)))
        return self(x_BD, there, level)

    def loss(self, x_BD: Array, count_BG: Array, hidden_BG: Array, weight_B: Array) -> dict[str, Any]:
        """``{"nll", "mse", "mean_mse"}``, each (sum, weight) over the hidden counts.

        The errors are those of log(1 + count) less its mean over the features of the cell, or of the
        probability of being open; "mean_mse" is that of the mean so far. In training the means are then
        brought up to date.

        Args:
          x_BD: vectors of cells.
          count_BG: counts; NaN where not measured.
          hidden_BG: bool, those to predict.
          weight_B: 0 for rows that only fill the batch.
        """
        kind, there = self.modality.likelihood, ~jnp.isnan(count_BG)
        count = jnp.where(there, count_BG, 0.0)
        mask = (hidden_BG & there) * weight_B[:, None]
        n = jnp.maximum(there.sum(1), 1)
        amount = jnp.minimum(count, 1.0) if kind == "bernoulli" else count
        level = amount.sum(1) / n
        if kind == "bernoulli":
            level = jnp.clip(level, 0.5 / n, 1 - 0.5 / n)
        predicted = self(x_BD, there, level)
        if kind == "bernoulli":
            nll = bernoulli_nll(count, predicted, mask)
            truth, guess = amount, jax.nn.sigmoid(predicted)
        else:
            if kind == "poisson":
                nll = poisson_nll(count, predicted, mask)
            else:
                nll = negative_binomial_nll(count, predicted, jnp.exp(self.log_inverse_dispersion[...]), mask)
            truth, guess = (log_ratio(values, there) for values in (count, predicted))
        mean = self.total[...] / jnp.maximum(self.seen[...], 1.0)
        told = {
            "nll": nll,
            "mse": masked_mse(guess, truth, mask),
            "mean_mse": masked_mse(mean[None], truth, mask),
        }
        seen, cell = there * weight_B[:, None], (level > 0) * weight_B
        log_level = jnp.log(jnp.where(level > 0, level, 1.0))
        for total, count_of, new, number in (
            (self.total, self.seen, (seen * truth).sum(0), seen.sum(0)),
            (self.log_level, self.cells, (cell * log_level).sum(), cell.sum()),
        ):
            keep = jnp.where(count_of[...] > MEMORY, 0.5, 1.0)
            total[...] = total[...] * keep + new
            count_of[...] = count_of[...] * keep + number
        return told

    def work(self) -> float:
        """Operations a cell of a training step."""
        d = self.score.layers[0].kernel.shape[0]
        return float(dense(1, d * (d + self.modality.size)))


def share_of(score: Array, there: Array) -> Array:
    """Softmax over the features that are there; those that are not have none."""
    return jnp.where(there, jax.nn.softmax(jnp.where(there, score, -1e9), axis=-1), 0.0)


def log_ratio(count: Array, there: Array) -> Array:
    """log(1 + count) less its mean over the features that are there; counts are 0 where they are not."""
    x = jnp.log1p(count)
    return x - jnp.where(there, x, 0.0).sum(1, keepdims=True) / jnp.maximum(there.sum(1, keepdims=True), 1)
