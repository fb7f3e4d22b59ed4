"""What scGPT reads off gene states and cell embeddings: values of genes, classes of the cell."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.nn.layers import ACTIVATIONS, MLP, layer_norm
from scjax.nn.linear import linear
from scjax.parallel.layout import whole

Predicted = tuple[Array, Array | None]


class BatchVector(nnx.Module):
    """What the decoders are told of the batch (study, donor, ...) that a cell comes from."""

    def __init__(self, n_batches: int, d_model: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(n_batches, d_model, rngs=rngs, embedding_metadata={"axes": (None, "embed")})
        self.norm = layer_norm(d_model, rngs=rngs)

    def __call__(self, label_B: Array) -> Array:
        """float32 [B, E]. An unknown batch, -1, is the mean of all; a label beyond the table gives NaN, on
        which a run stops."""
        table = self.embed.embedding[...]
        own = table.at[label_B].get(mode="fill", fill_value=jnp.nan)
        return self.norm(jnp.where((label_B < 0)[:, None], table.mean(0), own))


class ValueDecoder(nnx.Module):
    """The value of a gene from its own state, and the vector of its cell's batch where that is told.

    Args:
      d_model: width E of the states.
      told: a batch vector of the same width is read too.
      expressed: also the logit of being expressed at all, by a network of its own.

    Source: Cui et al., Nature Methods 2024, "gene expression prediction" (GEP).
    """

    def __init__(self, d_model: int, *, told: bool, expressed: bool, dtype: Any, rngs: nnx.Rngs):
        sizes = (d_model * (1 + told), d_model, d_model, 1)
        self.value = MLP(sizes, dtype=dtype, rngs=rngs)
        self.expressed = MLP(sizes, dtype=dtype, rngs=rngs) if expressed else None

    def __call__(self, state_BME: Array, batch_BE: Array | None = None) -> Predicted:
        """``(value, logit of being expressed or None)``, each [B, M]."""
        x = state_BME
        if batch_BE is not None:
            x = jnp.concatenate([x, jnp.broadcast_to(batch_BE[:, None], x.shape).astype(x.dtype)], axis=-1)
        return self.value(x)[..., 0], None if self.expressed is None else self.expressed(x)[..., 0]


class PromptDecoder(nnx.Module):
    """The value of a gene from the cell embedding and the gene's name: (W sigmoid(Q gene)) . cell.

    Args: as those of :class:`ValueDecoder`.

    Source: Cui et al., Nature Methods 2024, "gene expression prediction for cell modelling" (GEPC, in the
    code MVC), inner product.
    """

    def __init__(self, d_model: int, *, told: bool, expressed: bool, dtype: Any, rngs: nnx.Rngs):
        d, axes = d_model, ("embed", "embed_out")
        # from zero: the product of two random vectors would start far outside the range of values
        options: dict[str, Any] = {"kernel_init": nnx.initializers.zeros, "dtype": dtype, "rngs": rngs}
        self.query = linear(d, d, axes, dtype=dtype, rngs=rngs)
        self.value = linear(d, d * (1 + told), axes, use_bias=False, **options)
        self.expressed = linear(d, d * (1 + told), axes, **options) if expressed else None

    def __call__(self, gene_BME: Array, cell_BE: Array, batch_BE: Array | None = None) -> Predicted:
        """``(value, logit of being expressed or None)``, each [B, M]."""
        cell = cell_BE
        if batch_BE is not None:
            cell = jnp.concatenate([cell, batch_BE.astype(cell.dtype)], axis=-1)
        query_BME = jax.nn.sigmoid(self.query(gene_BME.astype(cell.dtype)))

        def product(layer: nnx.Linear) -> Array:
            # (W q) . c = q . (W^T c): one small product a cell instead of one a gene
            kernel_ED = whole(layer.kernel[...], layer.kernel.get_metadata()["axes"])
            cell_BE = jnp.einsum("bd,ed->be", cell, kernel_ED.astype(cell.dtype))
            value = jnp.einsum("bme,be->bm", query_BME, cell_BE, preferred_element_type=jnp.float32)
            return (
                value if layer.bias is None else value + (cell @ layer.bias[...].astype(cell.dtype))[:, None]
            )

        return product(self.value), None if self.expressed is None else product(self.expressed)


class CellHead(nnx.Module):
    """Two times [dense, activation, LayerNorm], then a dense layer: cell embedding to ``n_outputs`` numbers.

    With ReLU the classification head of scGPT, with leaky ReLU its batch discriminator.
    """

    def __init__(self, d_model: int, n_outputs: int, *, activation: str, dtype: Any, rngs: nnx.Rngs):
        self.activation = activation
        self.layers = nnx.List(
            [linear(d_model, d_model, ("embed", "embed_out"), dtype=dtype, rngs=rngs) for _ in range(2)]
        )
        self.norms = nnx.List([layer_norm(d_model, rngs=rngs) for _ in range(2)])
        self.out = linear(d_model, n_outputs, ("embed", None), dtype=dtype, rngs=rngs)

    def __call__(self, cell_BE: Array) -> Array:
        """[B, n_outputs]."""
        x = cell_BE
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(ACTIVATIONS[self.activation](layer(x))).astype(x.dtype)
        return self.out(x)
