"""A base model with heads: what fine-tuning trains.

Frozen parameters of the base are buffers at the paths that they have in a run of the base, behind "base/":
they have no gradient and no state of the optimiser, and are in every checkpoint.
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

from scjax.config import ConfigError
from scjax.encoding import row_keys
from scjax.finetune.lora import LoRA, attach, freeze, matching, variables_of
from scjax.finetune.tasks import Head, Task
from scjax.models.wrapper import Wrapper
from scjax.nn.context import tokens_of
from scjax.types import CellBatch


@dataclasses.dataclass(frozen=True)
class FinetunedConfig:
    """A base, what is predicted, and which parameters are trained.

    Attributes:
      base: ``{"system", "model"}`` of the base; ``experiments/finetune.py`` takes it from the run that it
        starts from.
      tasks: name -> :class:`scjax.finetune.Task`.
      train: "head", the base is frozen; "lora", and has adapters; "all".
      freeze: patterns of paths of the base that are frozen with "all" too, such as "gene/*".
      lora: the adapters, with "lora".
      objective_weight: of the base's own loss beside the tasks; 0 leaves it out.
      context: names of the context tokens of the base that it is told; None for all.
        ``experiments/finetune.py`` takes those that the run's batches carry, but for what is to be predicted.
    """

    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    tasks: dict[str, Task] = dataclasses.field(default_factory=dict)
    train: Literal["head", "lora", "all"] = "head"
    freeze: tuple[str, ...] = ()
    lora: LoRA = LoRA()
    objective_weight: float = 0.0
    context: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("model.tasks is empty: say what is to be predicted")
        reversed_ = [name for name, task in self.tasks.items() if task.reverse]
        if self.train == "head" and (reversed_ or self.objective_weight):
            what = f"the reversed task {reversed_[0]!r}" if reversed_ else "objective_weight"
            raise ConfigError(f'model.train = "head" freezes the base, which {what} is to train')
        if self.objective_weight and self.context is not None:
            raise ConfigError("model.context leaves out what the base's own loss, objective_weight, reads")
        if self.train != "all" and self.freeze:
            raise ConfigError(f'model.freeze goes with train = "all"; {self.train!r} freezes all of the base')


class Finetuned(Wrapper):
    """Heads on the embedding of cells, or on the states of genes, of any system.

    Args:
      config: see :class:`FinetunedConfig`.
      n_genes: size of the vocabulary.
    """

    READOUTS = ()

    def __init__(self, config: FinetunedConfig, n_genes: int, *, rngs: nnx.Rngs):
        if config.base.keys() != {"system", "model"}:
            raise ConfigError(
                f'model.base has {sorted(config.base)}; it holds "system" and "model", the config of the base'
            )
        super().__init__(config.base["system"], config.base["model"], n_genes, rngs=rngs)
        self.config, tokens = config, tokens_of(config.base["model"])
        self.untold = () if config.context is None else tuple(sorted(tokens.keys() - set(config.context)))
        if strange := set(config.context or ()) - tokens.keys():
            raise ConfigError(
                f"model.context has {sorted(strange)[0]!r}; the base is told {sorted(tokens) or 'nothing'}"
            )
        if config.train == "lora":
            attach(self.base, config.lora, rngs)
            freeze(self.base, lambda path: not path.endswith(("/lora_a", "/lora_b")))
        elif config.train == "head":
            freeze(self.base, lambda path: True)
        elif config.freeze:
            paths = sorted(path for path, _, _, v in variables_of(self.base) if isinstance(v, nnx.Param))
            frozen = matching(paths, config.freeze, "model.freeze")
            freeze(self.base, frozen.__contains__)
        self.takes_keys = "keys" in inspect.signature(self.base.embed).parameters
        self.heads = nnx.Dict({name: self._head(name, rngs) for name in config.tasks})

    def _head(self, name: str, rngs: nnx.Rngs) -> Head:
        task = self.config.tasks[name]
        task.check(name)
        vectors = self.features if task.level == "cell" else lambda batch: self.states(batch)[1]
        width = jax.eval_shape(vectors, _example(self.n_genes)).shape[-1]
        return Head(task, width, self.n_genes, rngs=rngs)

    @staticmethod
    def tables(config: FinetunedConfig) -> dict[str, str]:
        """What the base wants from outside."""
        return Finetuned.tables_of_base(config.base)

    @staticmethod
    def compares_cells(config: FinetunedConfig) -> bool:
        """Where the base's own loss does."""
        return bool(config.objective_weight) and Finetuned.of_base(
            config.base["system"], config.base["model"], "compares_cells", False
        )

    # --------------------------------------------------------------------------------- vectors
    def features(self, batch: CellBatch, keys: Array | None = None) -> Array:
        """float [B, D]: what heads of cells read, the base's embedding; ``keys`` [B] for dropout."""
        return self.embed(batch, keys if self.takes_keys else None)

    def embed(self, batch: CellBatch, keys: Array | None = None) -> Array:
        """The base's embedding of what it is told, see ``FinetunedConfig.context``."""
        return super().embed(self._told(batch), keys)

    def states(self, batch: CellBatch, keys: Array | None = None) -> tuple[Array, Array]:
        """See :class:`Wrapper`."""
        return super().states(self._told(batch), keys)

    def _told(self, batch: CellBatch) -> CellBatch:
        if not self.untold:
            return batch
        label, value = ({k: x for k, x in there.items() if k not in self.untold}
                        for there in (batch.label, batch.value))  # fmt: skip
        return batch.replace(label=label, value=value)

    def outputs(self, batch: CellBatch, keys: Array | None = None) -> tuple[dict[str, Array], Array | None]:
        """``(outputs, gene_id)``: of each task float32 [B, size], or [B, S, size] at the level of genes,
        which are then int32 [B, S], -1 for none."""
        levels = {task.level for task in self.config.tasks.values()}
        x: dict[str, Any] = {"cell": self.features(batch, keys)} if "cell" in levels else {}
        gene_id, x["gene"] = self.states(batch, keys) if "gene" in levels else (None, None)
        return {name: head(x[head.task.level]) for name, head in self.heads.items()}, gene_id

    def predict(self, batch: CellBatch) -> dict[str, Array]:
        """Of each task float32 [B, size]: calibrated probabilities of the classes ("multilabel": of each by
        itself), or values in the units of the target. At the level of genes [B, S, size], in the order of
        ``states(batch)``."""
        outputs, _ = self.outputs(batch)
        return {name: head.predict(outputs[name]) for name, head in self.heads.items()}

    # ------------------------------------------------------------------------------- objective
    def target(self, name: str, batch: CellBatch, gene_id: Array | None) -> tuple[Array, Array]:
        """``(target, weight)`` of a task: int [B] or float [B, ...], and float [B]; genes [B, S].

        Raises:
          ConfigError: the batch has no such label or value; names those that it has.
        """
        head = self.heads[name]
        task = head.task
        if task.level == "gene":
            assert gene_id is not None
            slot = jnp.clip(gene_id, 0, self.n_genes - 1)
            target, held_out = head.target[...][slot], head.held_out[...]
            finite = jnp.isfinite(target)
            known = (finite if task.categorical else finite.any(-1)) & (gene_id >= 0)
            # genes that are held out are judged, the others are learned from
            own = jnp.where(held_out.any(), held_out[slot] == float(self.deterministic), True)
            if task.categorical:
                target = jnp.where(known, target, -1).astype(jnp.int32)
            return target, batch.weight[:, None] * known * own
        source = task.source or name
        kind, there = ("label", batch.label) if task.categorical else ("value", batch.value)
        if source not in there:
            raise ConfigError(
                f"model.tasks.{name} reads the {kind} {source!r}; batches have {sorted(there)}. data.{kind}s "
                "names what they carry"
            )
        target = jnp.asarray(there[source])
        if task.rank:  # code -> place in the order; the last entry is that of -1
            target = jnp.asarray((*task.rank, -1))[target]
        return target, jnp.asarray(batch.weight)

    def loss(self, batch: CellBatch, key: Array) -> tuple[Any, Any, dict[str, tuple[Array, Array]]]:
        """One objective a task, and the base's own where it has a weight; metrics are called TASK_..."""
        drop_key, base_key = jax.random.split(key)
        frozen = self.deterministic or self.config.train == "head"
        keys = None if frozen else row_keys(drop_key, batch.row)
        outputs, gene_id = self.outputs(batch, keys)
        sums: dict[str, Any] = {}
        weights: dict[str, Any] = {}
        metrics: dict[str, tuple[Array, Array]] = {}
        for name, head in self.heads.items():
            total, weights[name], told = head.loss(outputs[name], *self.target(name, batch, gene_id))
            sums[name] = head.task.weight * total
            metrics |= {f"{name}_{what}": value for what, value in told.items()}
        if self.config.objective_weight:
            own, of, told = self.base.loss(batch, base_key)
            if not isinstance(own, dict):
                own, of = {"objective": own}, {"objective": of}
            sums |= {f"base_{what}": self.config.objective_weight * total for what, total in own.items()}
            weights |= {f"base_{what}": weight for what, weight in of.items()}
            metrics |= told
        return sums, weights, metrics

    def work(self, n_genes: Array) -> tuple[Array, Array]:
        """``(tokens, operations)`` [B], those of the base; of a frozen one the forward pass, a third."""
        if not hasattr(self.base, "work"):
            return n_genes, jnp.zeros_like(n_genes)
        tokens, operations = self.base.work(n_genes)
        return tokens, operations / 3 if self.config.train == "head" else operations


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
