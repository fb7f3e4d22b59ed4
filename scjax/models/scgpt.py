"""scGPT (Cui et al., Nature Methods 2024): a cell is a bag of (gene, value) tokens under one CLS token.

Encode: each expressed gene's count becomes the quantile bin it has in its cell; at most ``max_length - 1``
genes are kept. Objective "generative", as the released weights were trained: some genes are unknown; known
ones see one another, each unknown one, a gene without a value, sees the known and itself. Objective
"masked": all see all, and hidden values are a constant. Network: gene embedding + value embedding, a
post-norm transformer without positions. Loss: the values of the unknown genes, predicted from each gene's own
output; from the cell embedding and the gene's name ("MVC"); and, "generative", from each gene's output in a
second pass that starts from the cell embedding.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.config import INF, within
from scjax.encoding import bin_quantiles, log1p, normalize_total, row_keys, select_genes
from scjax.encoding.unknown import hide_shares, split_unknown, unknown_room, with_zeros
from scjax.encoding.values import Tie
from scjax.nn.attention import Backend
from scjax.nn.baseline import GeneMean
from scjax.nn.batchnorm import DomainBatchNorm
from scjax.nn.branch import switch_loss
from scjax.nn.context import Context, ContextToken, Given
from scjax.nn.decoders import BatchVector, CellHead, PromptDecoder, ValueDecoder
from scjax.nn.embedder import GeneEmbedder, GeneTable
from scjax.nn.layers import MLP, Block, Remat, Stack, dropout, fold, layer_norm
from scjax.nn.module import Buffer
from scjax.nn.work import dense, softmax_stack
from scjax.objectives import elastic_cell_similarity, expressed_nll, label_cross_entropy, masked_mse
from scjax.objectives.adversarial import reverse_gradient
from scjax.types import CellBatch

PAD_VALUE = -2.0
MAX_VALUE = 512.0


@dataclasses.dataclass(frozen=True)
class ScGPTConfig:
    """The published 51M model; every field may be changed in a config file.

    Attributes:
      d_model, n_heads, n_layers, d_ff, dropout, norm: the transformer; "post" as published, or "pre".
      gene_table: where gene embeddings come from, see :class:`scjax.nn.embedder.GeneTable`.
      context: further tokens of what is known of a cell, see :class:`scjax.nn.context.ContextToken`.
      max_length: tokens a cell, CLS included; cells with more genes are sampled down in training
        and cut to their most expressed genes for an embedding.
      values: "binned" (quantile bins 1 .. n_bins - 1) or "log1p" (log of counts per 10,000).
      n_bins: bins, the zero bin included.
      tie: bin of a count that fills several quantiles: "random" among them as published, "left" or
        "mid"; see :func:`scjax.encoding.bin_quantiles`. An embedding always takes "mid" for "random".
      value_scale: number that bins or log values are multiplied by before the network reads them
        and before they are targets. 1 as published; 1 / n_bins suits training from scratch.
      zeros: genes that a cell does not express are tokens too, of value 0, as in upstream's fine-tuning;
        for vocabularies of about ``max_length`` genes.
      cls_value, mask_value: of CLS (upstream: padding's in pretraining, 0 in fine-tuning), of hidden genes.
      objective: "generative" or "masked", see above.
      mask_fractions: share of a cell's genes that is unknown. "generative" draws one for all cells of a
        step (evaluation takes the middle one), "masked" one for each cell.
      project_unknown: unknown genes' attention passes the output projection too; not so as published.
      second_pass_after: training steps before the second pass begins; 0 leaves it out.
      mvc_weight: weight of the gene-prompt objective; 0 leaves it out.
      zero_probability: predict also whether a gene is expressed; needs ``zeros``.
      n_batches: number of classes of the label ``batch_label``, for the four fields that follow.
      batch_label: label column that says which batch (study, donor, ...) a cell is of.
      batch_decoder: the decoders are told the batch, so that the cell embedding need not hold it.
      batch_norm: of the embedded tokens: "domain" by each cell's own batch, "shared" over all, or "none".
      dab_weight: weight of the discriminator of batches, whose gradient is reversed; 0 leaves it out.
      ecs_weight, ecs_threshold: elastic cell similarity (published: 10 and 0.3 to 0.8); 0 leaves it out.
      pool: cell embedding: "cls", the output at CLS, or "mean" of the outputs of CLS and the known genes.
      n_outputs: of the classification head, which exists if above 0.
      attention, remat: see :func:`scjax.nn.attention.attention` and :class:`scjax.nn.layers.Stack`.
      dtype: "float32" or "bfloat16", of activations; parameters are float32.
      pool_pads, first_domain, mask_cls, embed_genes: upstream's accidents: padding counts in "mean"; in
        ``batch_norm`` padding and the first cell's batch do; "masked" may hide the value of CLS; "random"
        draws the genes of a long cell for its embedding by its row.
    """

    d_model: int = 512
    n_heads: int = 8
    n_layers: int = 12
    d_ff: int = 512
    dropout: float = 0.2
    norm: Literal["post", "pre"] = "post"
    gene_table: GeneTable = GeneTable()
    context: dict[str, ContextToken] = dataclasses.field(default_factory=dict, hash=False)
    max_length: int = 1200
    values: Literal["binned", "log1p"] = "binned"
    n_bins: int = 51
    tie: Tie = "random"
    value_scale: float = 1.0
    zeros: bool = False
    cls_value: float = PAD_VALUE
    mask_value: float = -1.0
    objective: Literal["generative", "masked"] = "generative"
    mask_fractions: tuple[float, ...] = (0.25, 0.5, 0.75)
    project_unknown: bool = False
    second_pass_after: int = 1000
    mvc_weight: float = 1.0
    zero_probability: bool = False
    n_batches: int = 0
    batch_label: str = "dataset"
    batch_decoder: bool = False
    batch_norm: Literal["none", "domain", "shared"] = "none"
    dab_weight: float = 0.0
    ecs_weight: float = 0.0
    ecs_threshold: float = 0.3
    pool: Literal["cls", "mean"] = "cls"
    n_outputs: int = 0
    attention: Backend = "auto"
    remat: Remat = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    pool_pads: bool = False
    first_domain: bool = False
    mask_cls: bool = False
    embed_genes: Literal["top", "random"] = "top"

    def __post_init__(self) -> None:
        within(self, dropout=(0, 0.99), n_bins=(3, INF), mvc_weight=(0, INF), ecs_weight=(0, INF))
        if not self.mask_fractions or not all(0 < f < 1 for f in self.mask_fractions):
            raise ValueError(f"mask_fractions = {self.mask_fractions}: each must lie between 0 and 1")
        if self.max_length < 2:
            raise ValueError(f"max_length = {self.max_length} leaves no room for a gene beside CLS")
        if self.zero_probability and not self.zeros:
            raise ValueError("zero_probability needs zeros = True: else every gene of a cell is expressed")
        if self.n_batches < 1 and (self.batch_decoder or self.dab_weight or self.batch_norm == "domain"):
            raise ValueError(
                'batch_decoder, dab_weight and batch_norm = "domain" need n_batches, the number of classes '
                f"of the label {self.batch_label!r}"
            )
        masked_only = {"batch_norm": "none", "mask_cls": False, "ecs_weight": 0.0, "dab_weight": 0.0}
        for name, off in masked_only.items():
            if self.objective == "generative" and getattr(self, name) != off:
                raise ValueError(f'{name} = {getattr(self, name)!r} goes with objective = "masked" only')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the network reads. N gene slots a cell; the unknown or hidden ones come first.

    Attributes:
      gene_id: int32 [B, N]; -1 where padded.
      value: float32 [B, N], what the network is shown: the value, or ``mask_value``.
      target: float32 [B, N], the true value.
      hidden: bool [B, N].
      fraction: which of ``mask_fractions`` is unknown in "generative" tokens: the first
        floor(N * fraction) slots are theirs. None where all genes are known, if only by a hidden value.
      cls_hidden: bool [B], or None for no.
      context: what is known of the cells beside, see :class:`scjax.nn.context.Context`.
    """

    gene_id: Array
    value: Array
    target: Array
    hidden: Array
    fraction: int | Array | None = None
    cls_hidden: Array | None = None
    context: Given = dataclasses.field(default_factory=dict)


class ScGPT(nnx.Module):
    """The network, its encoding and its objective.

    Args:
      config: hyper-parameters.
      n_genes: size of the vocabulary; the ids after it are ``<pad>``, ``<cls>`` and ``<eoc>``.
    """

    READOUTS = ("mvc/value/kernel", "mvc/expressed/kernel", "mvc/expressed/bias")  # see scjax.train.width

    def __init__(self, config: ScGPTConfig, n_genes: int, *, rngs: nnx.Rngs):
        c, d, dtype = config, config.d_model, jnp.dtype(config.dtype)
        typed: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.config, self.n_genes, self.deterministic = config, n_genes, False
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -0.1, 0.1)  # noqa: E731
        self.gene = GeneEmbedder(n_genes, 3, d, c.gene_table, init=uniform, rngs=rngs)
        self.gene_norm = layer_norm(d, rngs=rngs)
        self.value = MLP((1, d, d), activation="relu", **typed)
        self.value_norm = layer_norm(d, rngs=rngs)
        if c.objective == "generative":
            # row 1 marks an unknown gene; row 0 is in the published files and used by nothing
            self.flag = nnx.Embed(2, d, rngs=rngs, embedding_metadata={"axes": (None, "embed")})
            if c.second_pass_after:
                self.calls = Buffer(jnp.zeros((), jnp.int32))
        if c.batch_norm != "none":
            n, shared = c.n_batches, c.batch_norm == "shared"
            how = {"affine": shared, "first_domain": c.first_domain}
            self.domain_norm = DomainBatchNorm(d, 1 if shared else n, **how)
        self.transformer = Stack(
            c.n_layers,
            lambda r: Block(
                d, c.n_heads, c.d_ff, norm=c.norm, dropout=c.dropout, backend=c.attention, dtype=dtype, rngs=r
            ),
            remat=c.remat,
            rngs=rngs,
        )
        if c.norm == "pre":
            self.final_norm = layer_norm(d, rngs=rngs)
        if c.batch_decoder:
            self.batch_vector = BatchVector(c.n_batches, d, rngs=rngs)
        self.decoder = ValueDecoder(d, told=c.batch_decoder, expressed=c.zero_probability, **typed)
        if c.mvc_weight:
            self.mvc = PromptDecoder(d, told=c.batch_decoder, expressed=c.zero_probability, **typed)
        if c.dab_weight:
            self.discriminator = CellHead(d, c.n_batches, activation="leaky_relu", **typed)
        if c.n_outputs:
            self.head = CellHead(d, c.n_outputs, activation="relu", **typed)
        self.gene_mean = GeneMean(n_genes)
        self.context = Context(c.context, d, **typed)

    # whether a loss depends on which cells are in a micro-batch together
    compares_cells = staticmethod(lambda config: config.ecs_weight > 0 or config.batch_norm != "none")

    @staticmethod
    def tables(config: ScGPTConfig) -> dict[str, str]:
        """What the model needs from outside: vectors of genes, unless it learns its own."""
        return config.gene_table.wanted()

    # ---------------------------------------------------------------- encode
    def values(self, batch: CellBatch, keys: Array | None) -> Array:
        """float32 [B, L]: what a count is to this model; ties at random where ``keys`` are given."""
        c = self.config
        if c.values == "log1p":
            return c.value_scale * log1p(normalize_total(batch.count, batch.depth))
        tie: Tie = "mid" if c.tie == "random" and keys is None else c.tie
        return c.value_scale * bin_quantiles(batch.count, c.n_bins, tie=tie, keys=keys, gene_id=batch.gene_id)

    def encode(self, batch: CellBatch, key: Array) -> Tokens:
        """Training tokens: bins, a random choice of genes, which are unknown; all by (key, row, gene)."""
        c, n = self.config, self.config.max_length - 1
        if c.zeros:
            batch = with_zeros(batch, self.n_genes)
        context = self.context.read(batch, None if self.deterministic else key, required=True)
        bins, choice, share, mask = jax.random.split(key, 4)
        choice = row_keys(choice, batch.row)
        # values come before the choice of genes: a gene's bin is its rank in the whole cell
        target = self.values(batch, row_keys(bins, batch.row))
        if c.objective == "generative":
            count = len(c.mask_fractions)
            alone = self.deterministic or count == 1
            drawn = count // 2 if alone else jax.random.randint(share, (), 0, count)
            gene_id, target, hidden = split_unknown(batch.gene_id, target, n, c.mask_fractions, drawn, choice)
            cls_hidden = None
        else:
            drawn, cls_id = None, self.n_genes + 1 if c.mask_cls else None
            gene_id, target = select_genes(batch.gene_id, target, n, choice)
            keys = row_keys(share, batch.row), row_keys(mask, batch.row)
            gene_id, target, hidden, cls_hidden = hide_shares(
                gene_id, target, c.mask_fractions, *keys, cls_id
            )
        shown = jnp.where(hidden, c.mask_value, target)
        return Tokens(gene_id, shown, target, hidden, drawn, cls_hidden, context)

    # --------------------------------------------------------------- network
    def gene_embedding(self, gene_id: Array) -> Array:
        """float [..., E]: LayerNorm of the table's row; id -1 is padding."""
        return self.gene_norm(self.gene(jnp.where(gene_id < 0, self.n_genes, gene_id)))

    def _rooms(self, tokens: Tokens) -> list[int]:
        """Number of unknown slots for each of the fractions."""
        if tokens.fraction is None:
            return [0]
        return [unknown_room(tokens.gene_id.shape[1], fraction) for fraction in self.config.mask_fractions]

    def _inputs(
        self, tokens: Tokens, unknown: int, keys: Array | None, batch: CellBatch | None, train: bool
    ) -> tuple[Array, Array, Array]:
        """Embedded tokens [B, N+1+T, E], CLS behind the ``unknown`` first and the T of the context last; the
        vectors of the N+1 genes; and which of the tokens are there."""
        c = self.config
        gene_id, value = tokens.gene_id, jnp.where(tokens.gene_id < 0, PAD_VALUE, tokens.value)
        cls_id = jnp.full_like(gene_id[:, :1], self.n_genes + 1)
        cls_value = jnp.full_like(value[:, :1], c.cls_value)
        if tokens.cls_hidden is not None:
            cls_value = jnp.where(tokens.cls_hidden[:, None], c.mask_value, cls_value)
        gene_id = jnp.concatenate([gene_id[:, :unknown], cls_id, gene_id[:, unknown:]], axis=1)
        value = jnp.concatenate([cls_value, value[:, unknown:]], axis=1)
        gene, valid = self.gene_embedding(gene_id), gene_id >= 0
        shown = self.value_norm(self.value(jnp.minimum(value, MAX_VALUE)[..., None]))
        x = gene[:, unknown:] + dropout(shown, c.dropout, fold(keys, 0))
        if unknown:
            x = jnp.concatenate([gene[:, :unknown] + self.flag.embedding[...][1], x], axis=1)
        if c.batch_norm != "none":
            domain = jnp.full(x.shape[:1], -1) if batch is None else self._batch_of(batch)
            counted = valid if batch is None else valid * batch.weight[:, None]
            x = self.domain_norm(x, counted, domain, train=train)
        x, valid = self.context.beside(x, valid, tokens.context, self.gene_embedding)
        return x, gene, valid

    def _transform(
        self, x: Array, valid: Array, n: int, unknown: int, keys: Array | None
    ) -> tuple[Array, Array]:
        """``(cell [B, E], states [B, n, E])`` of embedded tokens; the first ``n`` are CLS and genes."""
        c = self.config
        options = {"unknown": unknown, "project_unknown": c.project_unknown}
        x = self.transformer(x.astype(jnp.dtype(c.dtype)), valid, keys=keys, **options)[:, :n]
        if c.norm == "pre":
            x = self.final_norm(x)
        if c.pool == "cls":
            return x[:, unknown], x
        counted = jnp.ones_like(valid[:, unknown:n]) if c.pool_pads else valid[:, unknown:n]
        total = jnp.einsum("bse,bs->be", x[:, unknown:], counted.astype(x.dtype))
        return total / counted.sum(1, keepdims=True).astype(x.dtype), x

    def __call__(
        self, tokens: Tokens, keys: Array | None = None, batch: CellBatch | None = None
    ) -> tuple[Array, Array]:
        """``(cell, genes)``: [B, E], the cell embedding, and [B, N, E]. ``keys`` [B] are those of dropout, or
        None; ``batch`` tells ``batch_norm`` the cells' batches, None for cells of unknown batch."""

        def run(unknown: int) -> tuple[Array, Array]:
            x, gene, valid = self._inputs(tokens, unknown, keys, batch, train=False)
            cell, states = self._transform(x, valid, gene.shape[1], unknown, fold(keys, 1))
            return cell, jnp.concatenate([states[:, :unknown], states[:, unknown + 1 :]], axis=1)

        rooms = self._rooms(tokens)
        if isinstance(tokens.fraction, Array):  # shapes follow from the fraction, so each has its own code
            return jax.lax.switch(tokens.fraction, [functools.partial(run, room) for room in rooms])
        return run(rooms[tokens.fraction or 0])

    # ------------------------------------------------------------- objective
    def _batch_of(self, batch: CellBatch) -> Array:
        """int32 [B]: the batch of each cell; -1 where unknown, as in data without such a label."""
        unknown = jnp.full(batch.row.shape, -1, jnp.int32)
        return jnp.asarray(batch.label.get(self.config.batch_label, unknown))

    def loss(self, batch: CellBatch, key: Array) -> tuple[Any, Any, dict[str, tuple[Array, Array]]]:
        """Squared error of the unknown values, predicted three ways; see the top of the file.

        The error of the running mean of each gene's value on the same targets, "gene_mean_mse", is the
        no-information baseline. In training the mean is brought up to date and calls are counted.
        """
        c = self.config
        if c.n_batches and c.batch_label not in batch.label:
            raise ValueError(f"n_batches = {c.n_batches}, but batches have no label {c.batch_label!r}")
        encode_key, drop_key = jax.random.split(key)
        tokens = self.encode(batch, encode_key)
        keys = None if self.deterministic else row_keys(drop_key, batch.row)
        target, mask = tokens.target, tokens.hidden * batch.weight[:, None]
        metrics = {"gene_mean_mse": masked_mse(self.gene_mean(tokens.gene_id), target, mask)}
        self.gene_mean.update(tokens.gene_id, target, batch.weight)
        if tokens.cls_hidden is not None:  # CLS is one more gene, the first
            mask = jnp.concatenate([(tokens.cls_hidden * batch.weight)[:, None], mask], axis=1)
            target = jnp.pad(target, ((0, 0), (1, 0)), constant_values=c.cls_value)
        weight = mask.sum()
        begun = None
        if c.objective == "generative" and c.second_pass_after:
            begun = self.calls[...] >= c.second_pass_after
            self.calls[...] += 0 if self.deterministic else 1
        given, rooms = (tokens, target, mask, keys, batch, begun), self._rooms(tokens)
        if isinstance(tokens.fraction, Array):
            runs = [lambda model, _, given, room=room: model._errors(room, *given)[:2] for room in rooms]
            total, sums = switch_loss(tokens.fraction, runs, self, (), given)
        else:
            total, sums, cell = self._errors(rooms[tokens.fraction or 0], *given)
        metrics |= {name: (value, weight) for name, value in sums.items()}
        if begun is not None:
            metrics["second_mse"] = (sums["second_mse"], jnp.where(begun, weight, 0.0))
        objectives = {"values": (total, weight)}
        if c.ecs_weight:
            value, pairs = metrics["ecs"] = elastic_cell_similarity(cell, batch.weight, c.ecs_threshold)
            objectives["ecs"] = (c.ecs_weight * value, pairs)
        if c.dab_weight:
            logits, label = self.discriminator(reverse_gradient(cell)), self._batch_of(batch)
            value, cells = metrics["dab_ce"] = label_cross_entropy(logits, label, batch.weight)
            objectives["dab"] = (c.dab_weight * value, cells)
        if len(objectives) == 1:
            return total, weight, metrics
        totals, weights = ({name: pair[i] for name, pair in objectives.items()} for i in (0, 1))
        return totals, weights, metrics

    def _errors(
        self,
        unknown: int,
        tokens: Tokens,
        target: Array,
        mask: Array,
        keys: Array | None,
        batch: CellBatch,
        begun: Array | None,
    ) -> tuple[Array, dict[str, Array], Array]:
        """(weighted sum of errors, errors by name, cell embedding); the heads see unknown tokens alone."""
        c = self.config
        own = slice(0, unknown)
        if c.objective == "masked":
            n = tokens.gene_id.shape[1]
            room = min(unknown_room(n + c.mask_cls, max(c.mask_fractions)), n)
            own = slice(1 - c.mask_cls, max(room, 1) + 1)
        target, mask = (x[:, : own.stop - own.start] for x in (target, mask))
        told = self.batch_vector(self._batch_of(batch)) if c.batch_decoder else None
        sums: dict[str, Array] = {}

        def take(name: str, predicted: tuple[Array, Array | None]) -> None:
            value, logit = predicted
            sums[f"{name}_mse"] = masked_mse(value, target, mask)[0]
            if logit is not None:
                sums[f"{name}_expressed_nll"] = expressed_nll(logit, target, mask)[0]

        x, gene, valid = self._inputs(tokens, unknown, keys, batch, train=not self.deterministic)
        n = gene.shape[1]
        cell, states = self._transform(x, valid, n, unknown, fold(keys, 1))
        take("masked", self.decoder(states[:, own], told))
        if c.mvc_weight:
            take("mvc", self.mvc(gene[:, own], cell, told))
        if begun is not None:
            start = x.at[:, unknown].set(jax.lax.stop_gradient(cell).astype(x.dtype))

            def second(model: Any, inputs: Any, given: Any) -> tuple[Array, None]:
                (x, told), (valid, keys, target, mask) = inputs, given
                _, states = model._transform(x, valid, n, unknown, fold(keys, 2))
                return masked_mse(model.decoder(states[:, own], told)[0], target, mask)[0], None

            sums["second_mse"], _ = switch_loss(
                begun.astype(jnp.int32),
                [lambda *_: (jnp.zeros(()), None), second],
                self,
                (start, told),
                (valid, keys, target, mask),
                through=("transformer", "final_norm", "decoder"),
            )
        scaled = (c.mvc_weight * value if name[:3] == "mvc" else value for name, value in sums.items())
        return sum(scaled, jnp.zeros(())), sums, cell

    def work(self, n_genes: Array) -> tuple[Array, Array]:
        """``(tokens, operations)`` [B] of a training step, see :mod:`scjax.nn.work`; CLS is a token."""
        c, d = self.config, self.config.d_model
        present = jnp.where(n_genes > 0, float(self.n_genes), 0.0) if c.zeros else n_genes
        n = jnp.minimum(present, c.max_length - 1)
        hidden, heads = n * sum(c.mask_fractions) / len(c.mask_fractions), 1 + c.zero_probability
        tokens = n + 1 + self.context.n_tokens
        known, passes = tokens, jnp.ones(())
        if c.objective == "generative":  # the unknown are seen by none but themselves
            known = tokens - hidden
            if c.second_pass_after:
                passes += self.calls[...] >= c.second_pass_after
        projected = tokens if c.project_unknown else known
        each = softmax_stack(tokens, d, c.d_ff, c.n_layers, keys=known, projected=projected)
        each += dense(hidden, heads * ((2 + c.batch_decoder) * d * d + d))
        once = dense(known - self.context.n_tokens, d * d) + (dense(hidden, d * d) if c.mvc_weight else 0.0)
        return tokens, passes * each + once + self.context.work()

    # ------------------------------------------------------------- embedding
    def _whole(self, batch: CellBatch, keys: Array | None = None) -> tuple[Array, Array, Array]:
        """``(gene_id [B, N], cell [B, E], states [B, N, E])`` of the most expressed genes, none hidden."""
        c = self.config
        if c.zeros:
            batch = with_zeros(batch, self.n_genes)
        value = self.values(batch, None)
        # ties between genes fall alike in every cell, whatever its number
        row = batch.row if c.embed_genes == "random" else jnp.zeros_like(batch.row)
        ties = row_keys(jax.random.key(0), row)
        gene_id, value = select_genes(batch.gene_id, value, c.max_length - 1, ties, method=c.embed_genes)
        tokens = Tokens(gene_id, value, value, gene_id < -1, context=self.context.read(batch))
        return gene_id, *self(tokens, keys, batch)

    def embed(self, batch: CellBatch, keys: Array | None = None) -> Array:
        """float32 [B, E]: the cell embedding, scaled to length 1; ``keys`` [B] of dropout, or None."""
        cell = self._whole(batch, keys)[1].astype(jnp.float32)
        return cell / jnp.linalg.norm(cell, axis=-1, keepdims=True)

    def states(self, batch: CellBatch, keys: Array | None = None) -> tuple[Array, Array]:
        """``(gene_id, states)``: int32 [B, N], -1 where padded, and [B, N, E]; nothing is hidden."""
        gene_id, _, states = self._whole(batch, keys)
        return gene_id, states

    def predict_cell(self, batch: CellBatch) -> Array:
        """float32 [B, n_outputs]: logits of the classes."""
        return self.head(self._whole(batch)[1]).astype(jnp.float32)
