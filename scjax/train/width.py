"""One learning rate for all widths: the maximal update parametrisation, muP (Yang et al. 2022, 2203.03466).

A model is taken as a base of some width, for which a learning rate was found, grown to another. Each
parameter's initial size and learning rate follow from how its dimensions grew, such that activations, and
what a step does to them, keep their size. Of a kernel whose inputs grew by m:

    parameter                          initial size, of the base's     learning rate
    hidden: outputs grow too           1 / sqrt(m)                     1 / m     (Adam, Adafactor, Lion)
    output: only the inputs grow       1 / m                           1 / m
    all else, m = 1                    1                               1

What Muon moves keeps the spectral norm of its updates at the base, times the root of how outputs grew over
how inputs did. Weight decay is not scaled. Attention needs nothing: a head keeps its width, only their number
grows.

Shapes tell all but one thing: which parameters are multiplied with a vector of the model's width once more to
make an output, such as a score with a tied embedding. A model names them in ``READOUTS``, by paths such as
"transform_norm/scale"; both numbers of theirs fall by another 1 / m.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from scjax.config import ConfigError
from scjax.models import build
from scjax.nn.module import Abstract, axes_of, bind, buffers_of, params_of, shapes_of
from scjax.train.kernels import kernel_of

if TYPE_CHECKING:
    from scjax.train.config import RunConfig

FIXED = ("layers", "head", "vocab")


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a parameter grew from the base: products of the ratios of its dimensions.

    Attributes:
      inputs, outputs: of a kernel; of anything else ``inputs`` is 1.
      longest: of the longer side of a kernel's matrices.
      readout: by how much its product with a vector of the model's width grows; 1 where there is none.
      stacked: a kernel of a stack of layers.
    """

    inputs: float = 1
    outputs: float = 1
    longest: float = 1
    readout: float = 1
    stacked: bool = False

    @property
    def size(self) -> float:
        """Initial size as a multiple of the base's."""
        hidden = self.inputs**0.5 if self.outputs != 1 else self.inputs
        return 1 / hidden / self.readout

    def rate(self, muon: bool) -> float:
        """Learning rate as a multiple of the base's; with ``muon`` that of :func:`scale_by_muon`."""
        if muon and self.stacked:
            return math.sqrt(self.outputs / self.inputs / self.longest) / self.readout
        return 1 / self.inputs / self.readout


def growth(model: Abstract, base: Abstract) -> dict[str, Any]:
    """:class:`Growth` of each parameter, in the structure of the parameters.

    Raises:
      ConfigError: the two differ in more than widths, a head grew, or the model declares no ``READOUTS``.
    """
    made = type(nnx.merge(model.graphdef, model.variables))
    readouts = getattr(made, "READOUTS", None)
    if readouts is None:
        raise ConfigError(
            f"optimizer.width_base: {made.__name__} does not say which of its parameters are multiplied with "
            "an embedding to make an output. Set READOUTS on the class, () for none; see scjax.train.width"
        )
    shapes, axes, small = shapes_of(model)["params"], axes_of(model)["params"], shapes_of(base)["params"]
    if {path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)} != {
        path for path, _ in jax.tree_util.tree_leaves_with_path(small)
    }:
        raise ConfigError("optimizer.width_base: it may change widths only, this base has other parameters")

    def one(path: tuple[Any, ...], shape: Any, names: tuple[str | None, ...], base: Any) -> Growth:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        ratios = [wide / narrow for wide, narrow in zip(shape.shape, base.shape, strict=True)]
        for axis, ratio in zip(names, ratios, strict=True):
            if axis in FIXED and ratio != 1:
                mend = "; let n_heads grow with d_model instead" if axis == "head" else ""
                raise ConfigError(
                    f"optimizer.width_base: {name} is {shape.shape}, of the base {base.shape}: the number of "
                    f"layers, of genes and the width of a head must be the same{mend}"
                )
        readout = math.prod(ratios[-1:]) if name in readouts else 1
        kernel = kernel_of(path, names)
        if kernel is None:
            return Growth(readout=readout)
        sides = [[math.prod(s.shape[d] for d in dims) for dims in (kernel.inputs, kernel.outputs)]
                 for s in (shape, base)]  # fmt: skip
        inputs, outputs = (wide / narrow for wide, narrow in zip(*sides, strict=True))
        return Growth(inputs, outputs, max(sides[0]) / max(sides[1]), readout, kernel.stacked)

    return jax.tree_util.tree_map_with_path(one, shapes, axes, small)


def model_of(config: RunConfig, n_genes: int) -> tuple[Abstract, Abstract | None]:
    """``(model, base)`` of a run. With ``optimizer.width_base`` the base is the model with these fields, at
    which the learning rate was found, and the model is :func:`grown` from it; else there is none."""
    model = build(config.system, config.model, n_genes, config.seed)
    if config.optimizer.width_base is None:
        return model, None
    base = build(config.system, {**config.model, **config.optimizer.width_base}, n_genes, config.seed)
    return grown(model, base), base


def grown(model: Abstract, base: Abstract) -> Abstract:
    """``model`` with initial parameters of the sizes that the table above gives, whatever its own are.

    The sizes of the base are measured, as root mean squares, when parameters are made: both models draw.

    Raises:
      ConfigError: see :func:`growth`.
    """
    grew = growth(model, base)

    def make() -> nnx.Module:
        module = model.make()
        own, wanted = params_of(module), params_of(base.make())

        def resize(x: jax.Array, small: jax.Array, grew: Growth) -> jax.Array:
            size, of_base = (jnp.sqrt(jnp.mean(jnp.square(v))) for v in (x, small))
            return x * jnp.where(size > 0, grew.size * of_base / jnp.where(size > 0, size, 1), 1)

        return bind(model, jax.tree.map(resize, own, wanted, grew), buffers_of(module))

    return dataclasses.replace(model, make=make)
