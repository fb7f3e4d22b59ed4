"""Several modalities of a cell: RNA with surface proteins (CITE-seq), open chromatin, other panels of counts.

Whatever the base system, each panel's features are further tokens of it ("features" context), and an encoder
of the panel is added to its cell embedding; a decoder for each modality, RNA too, reads the sum. In training
whole modalities are hidden from a cell, and single features of those that are not; what is hidden is
predicted by a likelihood of counts, so that either modality learns to foretell the other. The base's own
objective, which sees the tokens, goes on beside. Counts are ``batch.value[name]``; NaN: not measured. Of RNA
a gene without counts is a zero, also where a study did not measure it, as for all systems: train on the genes
that the studies share (``data.genes``).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx
from jax import Array

from scjax.config import INF, ConfigError, nearest, within
from scjax.encoding import gene_uniform, row_keys, to_all_genes
from scjax.loader import cells
from scjax.models.count_decoder import CountDecoder, Modality, log_ratio
from scjax.models.wrapper import Wrapper
from scjax.nn.layers import MLP, layer_norm
from scjax.nn.module import bind
from scjax.types import CellBatch

if TYPE_CHECKING:
    import anndata as ad

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
        """What the base wants from outside."""
        return Multimodal.tables_of_base(config.base)

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


# ------------------------------------------------------------------------- AnnData in, obsm out
def embed(adata: ad.AnnData, model: Any, *, key_added: str = "X_scjax", **options: Any) -> None:
    """The joint embedding of cells, ``adata.obsm[key_added]``; arguments as those of :func:`predict`."""
    adata.obsm[key_added] = _read(adata, model, lambda module, batch: module.embed(batch), **options)


def predict(
    adata: ad.AnnData, model: Any, name: str, *, key_added: str | None = None, **options: Any
) -> None:
    """Foretells a modality from the others: ``adata.obsm[key_added]``, a table of cells x features.

    Expected counts in a cell of the depth that was typical in training, or probabilities ("bernoulli").

    Args:
      adata: cells; RNA are the raw counts of X, other modalities are tables in obsm by their names in the
        model. What is foretold is not read, and need not be there.
      model: what ``scjax.load`` returns for a run of :class:`Multimodal`.
      name: of a modality, or "rna".
      key_added: None for "scjax_" and the name.
      **options: ``sources``, names of what is read ("rna" and modalities), None for all that adata has;
        ``batch_size``; ``layer`` of the RNA.

    Raises:
      ValueError: not such a model, or no such modality; nothing to foretell from; features that the model
        does not know, or values that are no counts. Says which, and where.
    """
    known = [*_module(model).decoder]
    if name not in known:
        raise ValueError(f"the model foretells {known}, not {name!r};{nearest(name, known)}")
    sources = options.pop("sources", None)
    if sources is None:
        sources = [source for source in _sources(adata, model) if source != name]
    if name in sources:
        raise ValueError(f"{name!r} is to be foretold and is among the sources {list(sources)}")
    found = _read(adata, model, lambda module, batch: module.predict(batch)[name], sources=sources, **options)
    features = model.vocabulary.ids if name == RNA else _features(model, name)
    adata.obsm[key_added or f"scjax_{name}"] = pd.DataFrame(found, adata.obs_names, list(features))


def attach(adata: ad.AnnData, table: ad.AnnData | pd.DataFrame, name: str) -> None:
    """Sets the counts of a further modality beside RNA, ``adata.obsm[name]``: joined by the names of cells.

    Args:
      adata: cells with RNA.
      table: cells x features, an AnnData or a DataFrame; cells that it has not get NaN, those that adata has
        not are left out.
      name: of the modality.

    Raises:
      ValueError: the two share no cell (shows names of both), a cell is there twice, or a value is no count.
    """
    if not isinstance(table, pd.DataFrame):
        table = table.to_df()
    for what, names in (("adata", adata.obs_names), (name, table.index)):
        if not names.is_unique:
            twice = names[names.duplicated()][0]
            raise ValueError(
                f"{what}: cell {twice!r} is there more than once: names of cells join modalities"
            )
    if not table.index.isin(adata.obs_names).any():
        raise ValueError(
            f"no cell of {name!r} is in adata: cells are called {list(table.index[:3])} there and "
            f"{list(adata.obs_names[:3])} here; the names must be the same"
        )
    table = table.reindex(adata.obs_names).astype(np.float32)
    _check_counts(table, name)
    adata.obsm[name] = table


def _module(model: Any) -> Multimodal:
    if not isinstance(model.module, Multimodal):
        raise ValueError(f"{model.path} is a run of {model.system}, which has no modalities beside RNA")
    return model.module


def _features(model: Any, name: str) -> Sequence[str]:
    """Names of a modality's features; their numbers where the run does not tell."""
    size = _module(model).config.modalities[name].size
    return model.categories.get(name) or [str(i) for i in range(size)]


def _sources(adata: ad.AnnData, model: Any) -> list[str]:
    return [RNA, *(name for name in _module(model).config.modalities if name in adata.obsm)]


def _read(
    adata: ad.AnnData,
    model: Any,
    function: Callable[[Any, CellBatch], Array],
    *,
    sources: Sequence[str] | None = None,
    batch_size: int = 64,
    layer: str | None = None,
) -> np.ndarray:
    """float32 [n_obs, ...]: ``function`` of the model and each batch of what the sources hold."""
    sources = _sources(adata, model) if sources is None else list(sources)
    known = [RNA, *_module(model).config.modalities]
    for source in sources:
        if source not in known or (source != RNA and source not in adata.obsm):
            raise ValueError(
                f"{source!r} is not to be read: the model knows {known}, obsm has {sorted(adata.obsm)}"
            )
    if not sources:
        raise ValueError(f"nothing to read: adata.obsm has {sorted(adata.obsm)}, the model knows {known}")
    tables = {name: _table(adata, name, _features(model, name)) for name in sources if name != RNA}
    if RNA in sources:
        batches: Iterable[CellBatch] = cells(
            adata, model.vocabulary, batch_size, layer=layer, duplicates="sum"
        )
    else:
        batches = (_blank(np.arange(batch_size, dtype=np.uint32)) for _ in range(0, adata.n_obs, batch_size))

    @jax.jit
    def run(params: Any, buffers: Any, batch: CellBatch) -> Array:
        module = bind(model.abstract, params, buffers)
        module.eval()
        return function(module, batch)

    out = []
    for i, batch in enumerate(batches):
        rows = slice(i * batch_size, (i + 1) * batch_size)
        value = {name: np.full((batch_size, table.shape[1]), np.nan, "f4") for name, table in tables.items()}
        for name, table in tables.items():
            value[name][: len(table[rows])] = table[rows]
        out.append(np.asarray(run(model.params, model.buffers, batch.replace(value=value))))
    if not out:
        raise ValueError("the AnnData has no cells")
    return np.concatenate(out)[: adata.n_obs]


def _table(adata: ad.AnnData, name: str, features: Sequence[str]) -> np.ndarray:
    """float32 [n_obs, features] of obsm, in the model's order; NaN for features that adata has not."""
    found = adata.obsm[name]
    if not isinstance(found, pd.DataFrame):
        found = np.asarray(found.toarray() if hasattr(found, "toarray") else found)
        if found.shape[1] != len(features):
            raise ValueError(
                f"obsm[{name!r}] has {found.shape[1]} columns without names, the model {len(features)}; a "
                "DataFrame may have any of them, by name"
            )
        found = pd.DataFrame(found, adata.obs_names, list(features))
    strange = [feature for feature in found.columns if feature not in features]
    if strange:
        raise ValueError(
            f"obsm[{name!r}] has {len(strange)} features that the model does not know, as {strange[0]!r};"
            f"{nearest(str(strange[0]), features)} Rename them, or leave them out of the table"
        )
    _check_counts(found, name)
    return found.reindex(columns=list(features)).to_numpy(np.float32)


def _check_counts(table: pd.DataFrame, name: str) -> None:
    values = table.to_numpy(np.float64)
    wrong = np.argwhere((values < 0) | np.isinf(values) | (~np.isnan(values) & (values != np.round(values))))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"{name}: cell {table.index[row]!r} has {values[row, column]:g} for {table.columns[column]!r}, "
            f"and {len(wrong) - 1} more are no counts; those are whole numbers from 0, NaN is not measured"
        )
