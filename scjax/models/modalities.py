"""Several modalities of a cell: RNA with surface proteins (CITE-seq), open chromatin, other panels of counts.

Whatever the base system, each panel's features are further tokens of it ("features" context), and an encoder
of the panel is added to its cell embedding; a decoder for each modality, RNA too, reads the sum. In training
whole modalities are hidden from a cell, and single features of those that are not; what is hidden is
predicted by a likelihood of counts, so that either modality learns to foretell the other. The base's own
objective, which sees the tokens, goes on beside. Counts are ``batch.value[name]``; NaN: not measured.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from scjax.config import INF, ConfigError, nearest, within
from scjax.encoding import gene_uniform, row_keys, to_all_genes
from scjax.models.count_decoder import CountDecoder, Modality, log_ratio
from scjax.models.wrapper import Wrapper
from scjax.nn.layers import MLP, layer_norm
from scjax.types import CellBatch

RNA = "rna"


@dataclasses.dataclass(frozen=True)
class MultimodalConfig:
    """A base and the modalities beside its RNA.

    Attributes:
      base: ``{"system", "model"}`` of any system.
      modalities: name of the value in batches -> :class:`Modality`.
      dropout: probability that a modality is hidden from a cell in training, RNA included; one of those
        that the cell has, drawn evenly, always stays.
      rna_weight: of the RNA that is predicted where RNA is hidden, all genes of the vocabulary; 0 leaves
        its decoder out.
      objective_weight: of the base's own objective; 0 leaves it out, and saves its pass.
    """

    base: dict[str, Any]
    modalities: dict[str, Modality]
    dropout: float = 0.5
    rna_weight: float = 1.0
    objective_weight: float = 1.0

    def __post_init__(self) -> None:
        within(self, dropout=(0, 1), rna_weight=(0, INF), objective_weight=(0, INF))
        if self.base.keys() != {"system", "model"}:
            raise ConfigError(
                f'model.base has {sorted(self.base)}; it holds "system" and "model", the config of the base'
            )
        if not self.modalities or RNA in self.modalities:
            raise ConfigError(
                f"model.modalities has {sorted(self.modalities)}; it names the values of counts beside RNA, "
                f"at least one, and {RNA!r} stands for the genes"
            )


class Multimodal(Wrapper):
    """A base with further modalities, see the top of the file.

    Args:
      config: see :class:`MultimodalConfig`.
      n_genes: size of the vocabulary.
    """

    WHOLE_CELLS = True  # a gene that was left out would pass for one that is not expressed
    READOUTS = ()

    def __init__(self, config: MultimodalConfig, n_genes: int, *, rngs: nnx.Rngs):
        model = dict(config.base["model"])
        if both := set(config.modalities) & set(model.get("context", {})):
            raise ConfigError(f"{sorted(both)[0]!r} is in model.modalities and in model.base.model.context")
        tokens = {
            name: {"kind": "features", "size": of.size} for name, of in config.modalities.items() if of.tokens
        }
        if tokens:
            model["context"] = {**model.get("context", {}), **tokens}
        super().__init__(config.base["system"], model, n_genes, rngs=rngs)
        self.config = config
        d = jax.eval_shape(self.base.embed, _blank(np.zeros(1, np.uint32))).shape[-1]
        self.norm = layer_norm(d, rngs=rngs)
        sizes = {name: of.size for name, of in config.modalities.items()}
        self.encoder = nnx.Dict(
            {name: MLP((size, d, d), activation="gelu", rngs=rngs) for name, size in sizes.items()}
        )
        decoders = {name: CountDecoder(d, of, rngs=rngs) for name, of in config.modalities.items()}
        if config.rna_weight:
            decoders[RNA] = CountDecoder(d, Modality(n_genes, weight=config.rna_weight), rngs=rngs)
        self.decoder = nnx.Dict(decoders)

    @staticmethod
    def tables(config: MultimodalConfig) -> dict[str, str]:
        """What the base wants from outside, under its names, for the buffers of the base."""
        wanted = Wrapper.of_base(config.base["system"], config.base["model"], "tables", {})
        kinds = {name: kind.partition(":") for name, kind in wanted.items()}
        return {name: f"{kind}:base/{path or name}" for name, (kind, _, path) in kinds.items()}

    @staticmethod
    def compares_cells(config: MultimodalConfig) -> bool:
        """Where the base's own objective does."""
        base = config.base["system"], config.base["model"]
        return bool(config.objective_weight) and Wrapper.of_base(*base, "compares_cells", False)

    # ------------------------------------------------------------------------- what is seen
    def hide(self, batch: CellBatch, key: Array) -> tuple[CellBatch, dict[str, Array]]:
        """Cells as the network sees them, and what is hidden: bool [B, size] a modality, [B, 1] for RNA.

        Drawn by (key, row, modality, feature). A cell of one modality keeps it.
        """
        rows = row_keys(key, batch.row)
        own = {name: _folded(rows, zlib.crc32(name.encode())) for name in (RNA, *self.config.modalities)}
        counts = {name: self._counts(batch, name) for name in self.config.modalities}
        present = [(batch.gene_id >= 0).any(1)] + [(~jnp.isnan(x)).any(1) for x in counts.values()]
        draws = jnp.stack([jax.vmap(lambda k: jax.random.uniform(k, (2,)))(k) for k in own.values()], axis=1)
        has = jnp.stack(present, axis=1)
        kept = jnp.argmax(jnp.where(has, draws[..., 0], -1.0), axis=1, keepdims=True)
        gone = has & (draws[..., 1] < self.config.dropout) & (jnp.arange(has.shape[1]) != kept)
        hidden = {RNA: gone[:, :1]}
        value = dict(batch.value)
        for i, (name, of) in enumerate(self.config.modalities.items(), start=1):
            feature = jnp.broadcast_to(jnp.arange(of.size), counts[name].shape)
            alone = gene_uniform(_folded(own[name], 1), feature) < of.mask_fraction
            hidden[name] = gone[:, i : i + 1] | alone
            value[name] = jnp.where(hidden[name], jnp.nan, counts[name])
        dark = hidden[RNA]
        shown = batch.replace(
            gene_id=jnp.where(dark, -1, batch.gene_id),
            count=jnp.where(dark, 0.0, batch.count),
            depth=jnp.where(dark[:, 0], 0.0, batch.depth),
            n_genes=jnp.where(dark[:, 0], 0, batch.n_genes),
            value=value,
        )
        return shown, hidden

    def _counts(self, batch: CellBatch, name: str) -> Array:
        """float32 [B, size] of a modality; NaN where not measured.

        Raises:
          ConfigError: the batch does not carry it, or it has another number of features.
        """
        if name not in batch.value:
            raise ConfigError(
                f"model.modalities has {name!r}, but batches carry the values {sorted(batch.value)};"
                f"{nearest(name, batch.value)} data.values names what they carry"
            )
        counts, size = jnp.asarray(batch.value[name]), self.config.modalities[name].size
        counts = counts[:, None] if counts.ndim == 1 else counts
        if counts.shape[1:] != (size,):
            raise ConfigError(
                f"{name!r} has {counts.shape[1]} features in the data; model.modalities.{name}.size is {size}"
            )
        return counts.astype(jnp.float32)

    # ------------------------------------------------------------------------- what is said
    def embed(self, batch: CellBatch, keys: Array | None = None) -> Array:
        """float32 [B, D]: the joint embedding, of whatever modalities the cell has; ``keys`` for dropout."""
        x = self.norm(super().embed(batch, keys)).astype(jnp.float32)
        for name, encoder in self.encoder.items():
            if name in batch.value:
                counts = self._counts(batch, name)
                there = ~jnp.isnan(counts)
                profile = jnp.where(there, log_ratio(jnp.where(there, counts, 0.0), there), 0.0)
                x = x + jnp.where(there.any(1, keepdims=True), encoder(profile), 0.0)
        return x

    def predict(self, batch: CellBatch) -> dict[str, Array]:
        """Modality -> float32 [B, size]: expected counts at typical depth, or probabilities ("bernoulli"); of
        RNA [B, n_genes]. From whatever the batch has: leave out what is to be foretold."""
        x = self.embed(batch)
        return {name: decoder.expected(x) for name, decoder in self.decoder.items()}

    def loss(self, batch: CellBatch, key: Array) -> tuple[Any, Any, dict[str, tuple[Array, Array]]]:
        """One objective a modality, nats for each hidden count, and the base's own, "base_...".

        A count that is negative or not whole gives NaN, on which a run stops.
        """
        hide_key, drop_key, base_key = jax.random.split(key, 3)
        shown, hidden = self.hide(batch, hide_key)
        cell = self.embed(shown, None if self.deterministic else row_keys(drop_key, batch.row))
        counts = {name: self._counts(batch, name) for name in self.config.modalities}
        if RNA in self.decoder:
            genes = to_all_genes(batch.gene_id, jnp.asarray(batch.count), self.n_genes)
            counts[RNA] = jnp.where((batch.gene_id >= 0).any(1, keepdims=True), genes, jnp.nan)
        sums: dict[str, Array] = {}
        weights: dict[str, Array] = {}
        metrics: dict[str, tuple[Array, Array]] = {}
        for name, count in counts.items():
            decoder = self.decoder[name]
            told = decoder.loss(cell, count, hidden[name], jnp.asarray(batch.weight))
            total, weights[name] = told["nll"]
            sums[name] = decoder.modality.weight * total
            metrics |= {f"{name}_{what}": pair for what, pair in told.items()}
        if weight := self.config.objective_weight:
            own, of, base_told = self.base.loss(batch.replace(value=shown.value), base_key)
            if not isinstance(own, dict):
                own, of = {"objective": own}, {"objective": of}
            sums |= {f"base_{what}": weight * total for what, total in own.items()}
            weights |= {f"base_{what}": number for what, number in of.items()}
            metrics |= base_told
        return sums, weights, metrics

    def work(self, n_genes: Array) -> tuple[Array, Array]:
        """``(tokens, operations)`` [B]: of the base, one pass or two, and of encoders and decoders."""
        passes = 1 + (self.config.objective_weight > 0)
        tokens, operations = self.base.work(n_genes) if hasattr(self.base, "work") else (n_genes, 0 * n_genes)
        own = sum(decoder.work() for decoder in self.decoder.values())
        own += sum(decoder.work() for name, decoder in self.decoder.items() if name != RNA)  # the encoders
        return tokens, passes * operations + own


def _folded(keys: Array, data: int) -> Array:
    """Independent keys [B] for another purpose."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def _blank(row: np.ndarray, slots: int = 8) -> CellBatch:
    """Cells of which no RNA is known."""
    n = len(row)
    return CellBatch(
        gene_id=np.full((n, slots), -1, np.int32),
        count=np.zeros((n, slots), np.float32),
        depth=np.zeros(n, np.float32),
        n_genes=np.zeros(n, np.int32),
        row=row,
        label={},
        value={},
        weight=np.ones(n, np.float32),
    )
