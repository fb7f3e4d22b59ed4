"""A system around another: fine-tuning, perturbation and modalities are models that hold a base model.

The base is any system, at ``base`` of the wrapper, so that its parameters have the paths of a run of its own
behind "base/", and a run of the wrapper can start from that run (:mod:`scjax.train.start`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import Array

from scjax.config import ConfigError, from_config
from scjax.models import resolve
from scjax.types import CellBatch


class Wrapper(nnx.Module):
    """Holds a model of any system and does what it does, but for what a subclass says.

    Args:
      system, config: of the base, see :func:`scjax.models.build`.
      n_genes: size of the vocabulary.
    """

    def __init__(self, system: str, config: Mapping[str, Any], n_genes: int, *, rngs: nnx.Rngs):
        model, config_class = resolve(system)
        self.base: Any = model(
            from_config(config_class, config, where="config.model.base"), n_genes, rngs=rngs
        )
        self.n_genes, self.deterministic = n_genes, False

    @staticmethod
    def of_base(system: str, config: Mapping[str, Any], name: str, default: Any = None) -> Any:
        """What the base's class says of its config by the static method ``name`` (``tables``,
        ``compares_cells``); ``default`` where it has no such method."""
        model, config_class = resolve(system)
        declared = getattr(model, name, None)
        return declared(from_config(config_class, config, where="config.model.base")) if declared else default

    @staticmethod
    def tables_of_base(base: Mapping[str, Any]) -> dict[str, str]:
        """What ``base``, ``{"system", "model"}``, wants from outside: its names, for its buffers here."""
        wanted = Wrapper.of_base(base["system"], base["model"], "tables", {})
        kinds = {name: kind.partition(":") for name, kind in wanted.items()}
        return {name: f"{kind}:base/{path or name}" for name, (kind, _, path) in kinds.items()}

    def encode(self, batch: CellBatch, key: Array) -> Any:
        return self.base.encode(batch, key)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.base(*inputs, **options)

    def embed(self, batch: CellBatch, keys: Array | None = None) -> Array:
        """float32 [B, D]; ``keys`` [B] for dropout, or None."""
        return self.base.embed(batch) if keys is None else self.base.embed(batch, keys)

    def states(self, batch: CellBatch, keys: Array | None = None) -> tuple[Array, Array]:
        """``(gene_id, states)``: int32 [B, S], -1 where there is no gene, and float [B, S, E], each gene in
        the context of its cell.

        Raises:
          ConfigError: the base has no such outputs.
        """
        if not hasattr(self.base, "states"):
            raise ConfigError(f"{type(self.base).__name__} gives no states of genes: it has no method states")
        return self.base.states(batch, keys)
