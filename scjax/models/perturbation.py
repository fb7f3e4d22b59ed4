"""Control cells in, perturbed cells out: a model of perturbations around a base model of any system.

What is done to a cell is told as context tokens of the base (``model.tokens``), as a shift of the decoder's
input (``model.shift``), or both. Both read the same things, see :class:`scjax.nn.context.ContextToken`:
"targets", the perturbed genes, which need not be measured; "features", a fingerprint or a vector of genes;
"dose"; "perturbation", a learned vector of a condition that was seen. Expression is log(1 + counts per ten
thousand) throughout, in the genes of a panel. Batches come from :class:`scjax.loader.sets.Sets`.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from scjax.config import INF, ConfigError, within
from scjax.encoding import log1p, normalize_total, row_keys
from scjax.models.wrapper import Wrapper
from scjax.nn.context import Context, ContextToken
from scjax.nn.layers import MLP, layer_norm, linear
from scjax.nn.module import Buffer
from scjax.objectives import masked_mse
from scjax.objectives.distribution import energy_distance, maximum_mean_discrepancy, set_mean_error
from scjax.types import CellBatch

OBJECTIVES = ("mean", "energy", "mmd", "cells")


@dataclasses.dataclass(frozen=True)
class PerturbationConfig:
    """A base, how it is told of conditions, what it predicts and what it is trained on.

    Attributes:
      base: ``{"system", "model"}`` of the base; ``experiments/perturb.py`` takes it from the run that it
        starts from.
      panel: number of measured genes, P; the experiment knows it.
      tokens: name -> :class:`scjax.nn.context.ContextToken`, beside those that the base has.
      shift: the same; their vectors are added up to one of the condition, so that effects of several genes
        can add up as well.
      decoder: "affine": a cell's values times a factor plus a term, both of low rank in the cell and the
        condition; at first nothing changes. "generator": factor and term from each gene's own state, as
        scGPT's; for bases with a token for every gene of the panel (scGPT: ``zeros``). A gene without one
        has a vector of its own, and what the cell's embedding says.
      rank: of "affine".
      frozen: the base is not trained.
      population: the decoder also sees the mean embedding of the set of cells that are perturbed together.
      mean_weight, energy_weight, mmd_weight: of the objectives between populations, see
        :mod:`scjax.objectives.distribution`.
      cells_weight: of the squared error between each predicted cell and the perturbed one beside it, which
        is what scGPT and GEARS train on; no pairs exist, so that only its mean can be learned.
    """

    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    panel: int = 1
    tokens: dict[str, ContextToken] = dataclasses.field(default_factory=dict)
    shift: dict[str, ContextToken] = dataclasses.field(default_factory=dict)
    decoder: Literal["affine", "generator"] = "affine"
    rank: int = 32
    frozen: bool = False
    population: bool = True
    mean_weight: float = 1.0
    energy_weight: float = 0.0
    mmd_weight: float = 0.0
    cells_weight: float = 0.0

    def __post_init__(self) -> None:
        weights = {f"{name}_weight": (0, INF) for name in OBJECTIVES}
        within(self, panel=(1, INF), rank=(1, INF), **weights)
        if not any(getattr(self, name) for name in weights):
            raise ConfigError(f"all of {', '.join(weights)} are 0: nothing is trained")

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of what the model reads of a condition and of its cells."""
        return tuple({**self.tokens, **self.shift})

    @property
    def told_base(self) -> dict[str, Any]:
        """The config of the base with ``tokens`` in its context."""
        model = self.base["model"]
        return {**model, "context": {**model.get("context", {}), **self.tokens}} if self.tokens else model


class Perturbation(Wrapper):
    """A base, and a decoder of what a condition makes of its cells.

    Args:
      config: see :class:`PerturbationConfig`.
      n_genes: size of the vocabulary.
    """

    READOUTS = ()

    def __init__(self, config: PerturbationConfig, n_genes: int, *, rngs: nnx.Rngs):
        if config.base.keys() != {"system", "model"}:
            raise ConfigError(
                f'model.base has {sorted(config.base)}; it holds "system" and "model", the config of the base'
            )
        if not config.wanted:
            raise ConfigError(
                'the model is not told of conditions: give model.tokens or model.shift an entry "targets", '
                '"features", "perturbation" or "dose"'
            )
        super().__init__(config.base["system"], config.told_base, n_genes, rngs=rngs)
        c, self.config = config, config
        if c.frozen:
            _freeze(self.base)
        self.takes_keys = "keys" in inspect.signature(self.base.embed).parameters and not c.frozen
        # ids of the measured genes, by ``init_state(values={"panel": ...})``
        self.panel = Buffer(jnp.arange(c.panel, dtype=jnp.int32) % n_genes)
        example = _example(n_genes)
        d = width = jax.eval_shape(self.base.embed, example).shape[-1]
        if c.shift:
            gene = jax.eval_shape(self._gene, example.gene_id) if self._reads_genes(c.shift) else None
            d = d if gene is None else gene.shape[-1]
            self.shift = Context(c.shift, d, rngs=rngs)
            self.rise = linear(d, c.rank, ("embed", None), use_bias=False, rngs=rngs)
        told = d if c.shift else 0
        if c.decoder == "affine":
            self.norm = layer_norm(width * (1 + c.population), rngs=rngs)
            self.network = MLP(
                (width * (1 + c.population) + told, 2 * c.rank, c.rank), activation="gelu", rngs=rngs
            )
            zeros = lambda: nnx.Param(jnp.zeros((c.rank, c.panel)), axes=(None, None))  # noqa: E731
            self.factor, self.term = zeros(), zeros()
        else:
            e = jax.eval_shape(self.base.states, example)[1].shape[-1]
            normal = nnx.initializers.normal(0.02)
            self.own = nnx.Param(normal(rngs.params(), (c.panel, e)), axes=(None, "embed"))
            self.spread = linear(width * (1 + c.population), e, ("embed", "embed_out"), rngs=rngs)
            if told:
                self.told = linear(told, e, ("embed", "embed_out"), use_bias=False, rngs=rngs)
            self.scale_network, self.term_network = (MLP((e, e, e, 1), rngs=rngs) for _ in range(2))

    @staticmethod
    def tables(config: PerturbationConfig) -> dict[str, str]:
        """What the base wants from outside."""
        return Perturbation.tables_of_base(config.base)

    @staticmethod
    def compares_cells(config: PerturbationConfig) -> bool:
        """A set is whole in one micro-batch only."""
        return True

    # ------------------------------------------------------------------------------- network
    @staticmethod
    def _reads_genes(tokens: dict[str, ContextToken]) -> bool:
        return any(token.kind == "genes" for token in tokens.values())

    def _gene(self, gene_id: Array) -> Array:
        """The base's own vectors [..., E] of genes."""
        return getattr(self.base, "gene_embedding", self.base.gene)(gene_id)

    def values(self, batch: CellBatch) -> Array:
        """float32 [B, P]: expression of the control cells in the genes of the panel."""
        P, panel = self.config.panel, self.panel[...]
        place = jnp.full(self.n_genes, P, jnp.int32).at[panel].set(jnp.arange(P, dtype=jnp.int32))
        slot = jnp.where(batch.gene_id < 0, P, place[jnp.maximum(batch.gene_id, 0)])
        row = jnp.arange(slot.shape[0])[:, None]
        value = log1p(normalize_total(batch.count, batch.depth))
        return jnp.zeros((slot.shape[0], P)).at[row, slot].add(value, mode="drop")

    def _condition(self, batch: CellBatch) -> Array:
        """float32 [B, E]: the sum of the vectors of all that is told as a shift."""
        given = self.shift.read(batch)
        B = batch.gene_id.shape[0]
        start = jnp.zeros((B, 0, self.rise.kernel[...].shape[0])), jnp.zeros((B, 0), bool)
        x, there = self.shift.beside(*start, given, self._gene)
        return jnp.einsum("bte,bt->be", x, there.astype(x.dtype))

    def populations(self, batch: CellBatch, keys: Array | None = None) -> tuple[Array, Array]:
        """``(predicted, control)`` float32 [B, P]: the cells under their condition, and as they are.

        Args:
          batch: control cells in sets (label "set"), and what is done to them.
          keys: of dropout [B], or None.
        """
        c = self.config
        if "set" not in batch.label:
            raise ValueError("batches of populations have a label 'set'; see scjax.loader.sets.Sets")
        if absent := [n for n in c.wanted if n not in batch.label and n not in batch.value]:
            raise ValueError(
                f"the model is told {absent[0]!r} of a condition; batches have the labels "
                f"{sorted(batch.label)} and the values {sorted(batch.value)}"
            )
        value = self.values(batch)
        cell = (
            self.base.embed(batch, keys) if keys is not None and self.takes_keys else self.base.embed(batch)
        )
        if c.population:
            same = (batch.label["set"][:, None] == batch.label["set"]) * batch.weight
            mean = jnp.einsum("ij,je->ie", same, cell.astype(jnp.float32), precision="highest")
            mean = mean / jnp.maximum(same.sum(1), 1.0)[:, None]
            cell = jnp.concatenate([cell, mean.astype(cell.dtype)], axis=-1)
        told = self._condition(batch) if c.shift else None
        if c.decoder == "affine":
            h = self.norm(cell)
            z = self.network(h if told is None else jnp.concatenate([h, told], axis=-1))
            if told is not None:
                z = z + self.rise(told)  # past the network: what several genes do can add up
            predicted = value * (1 + z @ self.factor[...]) + z @ self.term[...]
            return jnp.maximum(predicted, 0.0), value
        x = self._states(batch, keys, cell)
        if told is not None:
            x = x + self.told(told)[:, None]
        return value * self.scale_network(x)[..., 0] + self.term_network(x)[..., 0], value

    def _states(self, batch: CellBatch, keys: Array | None, cell: Array) -> Array:
        """float32 [B, P, E]: states of the genes of the panel; of one without a token, its own vector."""
        P = self.config.panel
        gene_id, states = self.base.states(batch, keys if self.takes_keys else None)
        place = jnp.full(self.n_genes, P).at[self.panel[...]].set(jnp.arange(P))
        slot = jnp.where(gene_id < 0, P, place[jnp.clip(gene_id, 0, self.n_genes - 1)])
        slot = jnp.where(gene_id < self.n_genes, slot, P)
        row = jnp.arange(slot.shape[0])[:, None]
        absent = self.own[...] + self.spread(cell)[:, None]
        return absent.at[row, slot].set(states.astype(absent.dtype), mode="drop")

    # ----------------------------------------------------------------------------- objective
    def loss(self, batch: CellBatch, key: Array) -> tuple[Any, Any, dict[str, tuple[Array, Array]]]:
        """Distances between predicted and real populations, one objective each; metrics tell all of them, and
        those of the prediction that nothing changes."""
        keys = None if self.deterministic else row_keys(key, batch.row)
        predicted, control = self.populations(batch, keys)
        real = log1p(normalize_total(batch.value["perturbed_count"], batch.value["perturbed_depth"]))
        sets, weight = batch.label["set"], batch.weight

        def cells(x: Array) -> tuple[Array, Array]:
            return masked_mse(x, real, jnp.broadcast_to(weight[:, None], real.shape))

        measures = {
            "mean": lambda x: set_mean_error(x, real, sets, weight),
            "energy": lambda x: energy_distance(x, real, sets, weight),
            "mmd": lambda x: maximum_mean_discrepancy(x, real, sets, weight),
            "cells": cells,
        }
        metrics = {name: measure(predicted) for name, measure in measures.items()}
        of = {name: getattr(self.config, f"{name}_weight") for name in OBJECTIVES}
        sums = {name: of[name] * metrics[name][0] for name in OBJECTIVES if of[name]}
        weights = {name: metrics[name][1] for name in sums}
        metrics |= {f"no_change_{name}": measure(control) for name, measure in measures.items()}
        return sums, weights, metrics

    def predict(self, batch: CellBatch) -> Array:
        """float32 [B, P]: the cells under their conditions, none below 0."""
        return jnp.maximum(self.populations(batch)[0], 0.0)

    def work(self, n_genes: Array) -> tuple[Array, Array]:
        """``(tokens, operations)`` [B], those of the base; of a frozen one the forward pass, a third."""
        if not hasattr(self.base, "work"):
            return n_genes, jnp.zeros_like(n_genes)
        tokens, operations = self.base.work(n_genes)
        return tokens, operations / 3 if self.config.frozen else operations


def _freeze(module: nnx.Module) -> None:
    """Makes a buffer of every parameter, at its path."""
    for _, part in nnx.iter_modules(module):
        for name, variable in list(vars(part).items()):
            if isinstance(variable, nnx.Param):
                axes = variable.get_metadata().get("axes")
                setattr(part, name, Buffer(variable.get_value(), axes=axes))


def _example(n_genes: int) -> CellBatch:
    """The shapes of one cell."""
    one = np.ones(1, np.float32)
    return CellBatch(
        gene_id=np.zeros((1, 8), np.int32) % n_genes,
        count=np.ones((1, 8), np.float32),
        depth=8 * one,
        n_genes=np.full(1, 8, np.int32),
        row=np.zeros(1, np.uint32),
        label={},
        value={},
        weight=one,
    )
