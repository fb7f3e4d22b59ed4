"""Tokens of what is known of a cell beside its counts: assay, donor, dose, place, neighbours, proteins, ...

They stand after the sequence of a system, attend and are attended to like its own, and are cut off behind the
transformer. Whatever is absent is masked as a key: the cell is then read as if there were no such token.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.config import ConfigError, from_config, nearest
from scjax.encoding import row_keys
from scjax.nn.layers import MLP, layer_norm
from scjax.nn.work import dense
from scjax.types import CellBatch

Kind = Literal["label", "value", "coordinates", "neighbours", "features", "genes"]
Given = dict[str, Array]  # name -> what is known of each cell; -1 or NaN where it is absent
DROPOUT = 0xC0417E87  # folded into the key of the encoding, whose other draws stay as they are


@dataclasses.dataclass(frozen=True)
class ContextToken:
    """One thing that is known of a cell; an entry of the field ``context`` of a system's config.

    The entry's key names what is read: ``batch.label[name]`` for a "label", else ``batch.value[name]``.

    Attributes:
      kind: what is read, and what becomes of it.

        - "label": a category, int32 [B], -1 where unknown: one token, a learned vector for each.
        - "value": float32 [B, size], or [B] where ``size`` is 1: one token by a small network.
        - "coordinates": float32 [B, size], where the cell lies: one token, see ``encoding``.
        - "neighbours": float32 [B, size * width]: a token for each neighbour by one small network. They have
          no order.
        - "features": float32 [B, size], counts of a panel (proteins, peaks): a token for each, a learned
          vector of the feature and a small network of log(1 + count).
        - "genes": [B, size], ids of genes of the vocabulary, such as those perturbed; the cell need not
          express them. A token for each: the system's own vector of the gene and a learned mark.

      size: number of categories, numbers, neighbours, features or genes.
      dropout: probability with which all of it is absent from a cell in training.
      width: features of one neighbour.
      scale: numbers are divided by it first ("features" and ids are not). For "coordinates" the smallest
        distance that matters, in their unit.
      encoding: of coordinates. "sinusoidal": sine and cosine of each, at wavelengths from 2 pi to 2 pi 10**4
        times ``scale`` (Vaswani et al., 2017); "fourier": of learned directions, from standard normal ones
        (Tancik et al., 2020; Li et al., 2021).
      frequencies: number of wavelengths of a coordinate, or of directions.
    """

    kind: Kind
    size: int
    dropout: float = 0.0
    width: int = 1
    scale: float = 1.0
    encoding: Literal["sinusoidal", "fourier"] = "sinusoidal"
    frequencies: int = 32

    def __post_init__(self) -> None:
        for name in ("size", "width", "frequencies"):
            if getattr(self, name) < 1:
                raise ConfigError(f"context: {name} = {getattr(self, name)} of a {self.kind!r} is below 1")
        if not 0 <= self.dropout <= 1 or self.scale <= 0:
            found = f"dropout = {self.dropout} and scale = {self.scale}"
            raise ConfigError(f"context: {found} of a {self.kind!r}: from 0 to 1, and above 0")

    @property
    def n_tokens(self) -> int:
        return self.size if self.kind in ("neighbours", "features", "genes") else 1


def tokens_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a model is told of a cell beside its counts, by name: entries of :class:`ContextToken`.

    The ``context`` of its config, or of that of the model it is built on; in the same way the label by which
    a system normalises, panels of modalities, and what says which drug it is.
    """
    return {name: entry for _, name, entry in told_to(config, loss=False)}


def told_to(config: Mapping[str, Any], *, loss: bool) -> list[tuple[str, str, dict[str, Any]]]:
    """(field of the config, name, entry) of :func:`tokens_of`, with ``loss`` also of what an objective alone
    reads. ``config`` is complete, or has all fields that are not at their defaults."""
    if "base" in config:
        names = config.get("context")  # of what its base may be told, see scjax.finetune; None for all
        own = loss and config.get("objective_weight", 1.0) > 0
        told = [
            each
            for each in told_to(config["base"].get("model", {}), loss=own)
            if names is None or each[1] in names
        ]
        panels = config.get("modalities", {}).items()
        told += [(f"modalities.{k}", k, {"kind": "features", "size": panel["size"]}) for k, panel in panels]
        return told + [(f"drug.{k}", k, entry) for k, entry in config.get("drug", {}).items()]
    told, batches = [], config.get("n_batches", 0)
    if batches and (loss or config.get("batch_norm") == "domain"):
        label = config.get("batch_label", "dataset")
        told.append(("n_batches", label, {"kind": "label", "size": batches}))
    return told + [(f"context.{k}", k, entry) for k, entry in config.get("context", {}).items()]


def check_context(
    config: Mapping[str, Any], categories: Mapping[str, Sequence[str]], widths: Mapping[str, int]
) -> None:
    """Holds what a model is told of cells, and what its tasks read, against the cells of a run: before any
    work.

    Args:
      config: of the model, see :func:`told_to`.
      categories: label that batches carry -> its categories.
      widths: value that batches carry -> how many numbers a cell has.

    Raises:
      ConfigError: batches do not carry what is read, or the model has another size; says which it has.
    """
    fields: dict[str, tuple[str, Mapping[str, Any]]] = {
        "label": ("labels", categories),
        "value": ("values", widths),
    }
    reads: list[tuple[str, str, str, int]] = []  # field, kind, what is read, how much there is room for
    for field, name, entry in told_to(config, loss=True):
        token = from_config(ContextToken, entry, where=f"config.model.{field}")
        size = token.size * (token.width if token.kind == "neighbours" else 1)
        reads.append((field, "label" if token.kind == "label" else "value", name, size))
    for name, task in config.get("tasks", {}).items():
        if task.get("level", "cell") == "cell":
            kind = "label" if task.get("kind", "classes") in ("classes", "ordinal") else "value"
            size = len(task.get("rank", ())) or task.get("size", 0)  # of an order: of the codes it ranks
            reads.append((f"tasks.{name}", kind, task.get("source") or name, size))
    for field, kind, name, size in reads:
        kinds, there = fields[kind]
        if name not in there:
            raise ConfigError(
                f"config.model.{field} reads data.{kinds}, which are {sorted(there)};{nearest(name, there)} "
                "name it there, and build the corpus with it"
            )
        if kind == "label" and len(categories[name]) > size:
            room = field if field == "n_batches" else f"{field}.size"
            raise ConfigError(
                f"config.model.{room} = {size}, but {name!r} has {len(categories[name])} categories in the "
                f"corpus ({', '.join(list(categories[name])[:4])}, ...)"
            )
        if kind == "value" and widths[name] != size:
            raise ConfigError(
                f"config.model.{field} takes {size} numbers of a cell; in the corpus {name!r} has "
                f"{widths[name]}"
            )


class Context(nnx.Module):
    """The context tokens of a system: reads them from a batch, and sets them beside its own.

    Args:
      tokens: name -> its kind; none at all leaves everything as it is.
      d_model: width E of the system's tokens.
    """

    def __init__(
        self, tokens: Mapping[str, ContextToken], d_model: int, *, dtype: Any = None, rngs: nnx.Rngs
    ):
        for name in tokens:
            if not name or "/" in name:
                raise ConfigError(f"context: {name!r} cannot name a token: it becomes part of a path")
        self.tokens = tuple(sorted(tokens.items()))
        make = {name: _Token(token, d_model, dtype=dtype, rngs=rngs) for name, token in self.tokens}
        self.token = nnx.Dict(make)
        self.n_tokens = sum(token.n_tokens for token in tokens.values())

    def read(self, batch: CellBatch, key: Array | None = None, *, required: bool = False) -> Given:
        """What the batch says of each name; what it does not carry is left out.

        Args:
          batch: cells.
          key: of the step's encoding, by which context is dropped: by (key, row, name); None for none.
          required: every name must be there, if only as unknown: in training.

        Raises:
          ValueError: a required name that the batch does not carry, or values of another shape.
        """
        given = {}
        for name, token in self.tokens:
            kind, there = ("labels", batch.label) if token.kind == "label" else ("values", batch.value)
            if name not in there:
                if required:
                    raise ValueError(
                        f"model.context has the {token.kind} token {name!r}, but batches carry the {kind} "
                        f"{sorted(there)};{nearest(name, there)} name it in data.{kind} too"
                    )
                continue
            absent = jnp.zeros(batch.row.shape, bool)
            if key is not None and token.dropout:
                # a key of its own, so that the draws of a name do not hang on the others
                own = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), zlib.crc32(name.encode()))
                absent = jax.vmap(jax.random.uniform)(row_keys(own, batch.row)) < token.dropout
            given[name] = _checked(name, token, jnp.asarray(there[name]), absent)
        return given

    def beside(
        self, x_BSE: Array, valid_BS: Array, given: Given, gene: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        """Tokens and their mask with those of the context behind them, in the dtype of ``x_BSE``.

        Args:
          x_BSE: float [B, S, E].
          valid_BS: bool [B, S].
          given: from :meth:`read`.
          gene: ids int32 [...] -> the system's own vectors [..., E] of genes.
        """
        xs, valids = [x_BSE], [valid_BS]
        for name, value in given.items():
            x, valid = self.token[name](value, gene)
            # an absent token is zero, too: where a system's mask leaks, nothing comes through
            xs.append(jnp.where(valid[..., None], x, 0).astype(x_BSE.dtype))
            valids.append(valid)
        if len(xs) == 1:
            return x_BSE, valid_BS
        return jnp.concatenate(xs, axis=1), jnp.concatenate(valids, axis=1)

    def work(self) -> float:
        """Operations a cell of a training step, outside the transformer; see :mod:`scjax.nn.work`."""
        return sum(dense(token.n_tokens, self.token[name].weights) for name, token in self.tokens)


class _Token(nnx.Module):
    def __init__(self, token: ContextToken, d_model: int, *, dtype: Any, rngs: nnx.Rngs):
        d, kind, self.config = d_model, token.kind, token
        normal = nnx.initializers.normal(1.0)
        if kind in ("label", "features"):
            self.embedding = nnx.Param(normal(rngs.params(), (token.size, d)), axes=(None, "embed"))
        if kind == "genes":
            self.mark = nnx.Param(normal(rngs.params(), (d,)), axes=("embed",))
        n_in = {"value": token.size, "neighbours": token.width, "features": 1}.get(kind, 0)
        if kind == "coordinates":
            n_in = 2 * token.frequencies * (token.size if token.encoding == "sinusoidal" else 1)
            if token.encoding == "fourier":
                self.direction = nnx.Param(normal(rngs.params(), (token.size, token.frequencies)))
        if n_in:
            self.network = MLP((n_in, d, d), activation="gelu", dtype=dtype, rngs=rngs)
        self.weights = d * (n_in + d) if n_in else 0  # of matrices
        self.norm = layer_norm(d, rngs=rngs)

    def __call__(self, value: Array, gene: Callable[[Array], Array]) -> tuple[Array, Array]:
        """``(tokens float32 [B, T, E], bool [B, T])``: which are there, of what ``read`` gave."""
        c, table = self.config, getattr(self, "embedding", None)
        if c.kind == "label":
            assert table is not None
            # a category beyond the table gives NaN, on which a run stops
            rows = table[...].at[jnp.maximum(value, 0)].get(mode="fill", fill_value=jnp.nan)
            return self.norm(rows)[:, None], (value >= 0)[:, None]
        if c.kind == "genes":
            return self.norm(gene(jnp.maximum(value, 0)) + self.mark[...]), value >= 0
        if c.kind == "features":
            assert table is not None
            there = ~jnp.isnan(value)
            amount = jnp.log1p(jnp.where(there, value, 0.0))[..., None]
            return self.norm(table[...] + self.network(amount)), there
        there = ~jnp.isnan(value).any(-1)
        value = jnp.where(there[..., None], value, 0.0) / c.scale
        if c.kind == "coordinates":
            value = self._waves(value)
        x = self.norm(self.network(value))
        return (x, there) if c.kind == "neighbours" else (x[:, None], there[:, None])

    def _waves(self, place: Array) -> Array:
        """float32 [B, n]: sine and cosine of coordinates [B, size]."""
        c = self.config
        if c.encoding == "fourier":
            angle = place @ self.direction[...]
        else:
            frequency = 1e4 ** -(jnp.arange(c.frequencies) / max(c.frequencies - 1, 1))
            angle = (place[..., None] * frequency).reshape(len(place), -1)
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _checked(name: str, token: ContextToken, value: Array, absent: Array) -> Array:
    """``value`` in the shape and dtype of its kind, unknown where ``absent`` [B].

    Raises:
      ValueError: another shape than the token's.
    """
    size, n = token.size, len(absent)
    per_cell = {"label": (), "neighbours": (size, token.width)}.get(token.kind, (size,))
    total = math.prod(per_cell)
    if value.size != n * total or len(value) != n:
        wide = f" and width {token.width}" if token.kind == "neighbours" else ""
        raise ValueError(
            f"context: {name!r} has {value.size // max(len(value), 1)} numbers a cell; the {token.kind} "
            f"token of size {size}{wide} takes {total}"
        )
    value, absent = value.reshape(n, *per_cell), absent.reshape(n, *(1,) * len(per_cell))
    if token.kind == "label":
        return jnp.where(absent, -1, value.astype(jnp.int32))
    if token.kind == "genes":
        ids = jnp.where(jnp.isnan(value.astype(jnp.float32)), -1, value).astype(jnp.int32)
        return jnp.where(absent, -1, ids)
    return jnp.where(absent, jnp.nan, value.astype(jnp.float32))
