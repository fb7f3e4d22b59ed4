"""Low-rank adapters: a frozen kernel W becomes W + (alpha / r) A B, of which A and B are trained.

Source: Hu et al., LoRA, ICLR 2022. B begins at 0, so that an adapted model begins as the model itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scjax.config import ConfigError, nearest
from scjax.nn.linear import Linear, LinearGeneral
from scjax.nn.module import Buffer


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which kernels get an adapter, and of which rank.

    Attributes:
      rank: r.
      alpha: A B is multiplied by alpha / rank.
      kernels: patterns of paths in the base, such as "transformer/blocks/attention/qkv/kernel"; ``*`` stands
        for any text. The default is all products within a stack of layers.
    """

    rank: int = 8
    alpha: float = 16.0
    kernels: tuple[str, ...] = ("*blocks/*",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"model.lora.rank = {self.rank}; it must be at least 1")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def variables_of(module: nnx.Module) -> Iterator[tuple[str, Any, str, nnx.Variable]]:
    """(path, module that holds it, its name there, variable) of each variable of a module."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            for name, value in vars(node).items():
                if isinstance(value, nnx.Variable):
                    yield "/".join(map(str, (*path, name))), node, name, value


def matching(paths: Sequence[str], patterns: Sequence[str], where: str) -> set[str]:
    """The paths that match one of the patterns.

    Raises:
      ConfigError: a pattern that matches none; names the nearest path.
    """
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ConfigError(
                f"{where}: {pattern!r} matches no path of the base;{nearest(pattern, paths)} There are "
                f"{', '.join(sorted(paths))}"
            )
    return {path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns)}


def attach(module: nnx.Module, config: LoRA, rngs: nnx.Rngs) -> None:
    """Puts adapters beside the kernels of ``module`` that ``config`` names.

    A of a kernel [*in, *out] is [*in, r], normal with variance 1 / in; B is [r, *out], 0. Of kernels that are
    stacked over layers each layer has its own.

    Raises:
      ConfigError: a pattern that matches no kernel of a :class:`scjax.nn.linear.Linear`; names those there
        are.
    """
    layers: dict[str, Any] = {
        path: layer
        for path, layer, name, _ in variables_of(module)
        if name == "kernel" and isinstance(layer, (Linear, LinearGeneral))
    }
    for path in sorted(matching(sorted(layers), config.kernels, "model.lora.kernels")):
        layer = layers[path]
        shape, axes = layer.kernel.shape, layer.kernel.get_metadata().get("axes")
        stacked = len(shape) - len(axes)  # a leading dimension of layers, which axes do not name
        n_in = len(layer.in_features) if isinstance(layer, LinearGeneral) else 1
        lead, into, out = shape[:stacked], shape[stacked : stacked + n_in], shape[stacked + n_in :]
        a = jax.random.normal(rngs.params(), (*lead, *into, config.rank)) / np.sqrt(np.prod(into))
        layer.lora_a = nnx.Param(a, axes=(*axes[:n_in], None))
        layer.lora_b = nnx.Param(jnp.zeros((*lead, config.rank, *out)), axes=(None, *axes[n_in:]))
        layer.lora_scale = config.scale


def freeze(module: nnx.Module, frozen: Callable[[str], bool]) -> None:
    """Makes a :class:`scjax.nn.Buffer` of each parameter for whose path ``frozen`` is true.

    It keeps path, value and axes; it has no gradient and no state of the optimiser any more.
    """
    for path, holder, name, variable in list(variables_of(module)):
        if isinstance(variable, nnx.Param) and frozen(path):
            setattr(holder, name, Buffer(variable.get_value(), axes=variable.get_metadata().get("axes")))


def merge(arrays: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Arrays of a base with its adapters worked into the kernels, and the adapters gone.

    Args:
      arrays: by path, params and buffers together.
      scale: :attr:`LoRA.scale`.
    """
    out = {path: x for path, x in arrays.items() if not path.endswith(("/lora_a", "/lora_b"))}
    for path, a in arrays.items():
        if not path.endswith("/lora_a"):
            continue
        name = path.removesuffix("lora_a")
        a, b, kernel = (
            np.asarray(x, np.float64) for x in (a, arrays[f"{name}lora_b"], arrays[f"{name}kernel"])
        )
        layers = kernel.shape[: a.ndim + b.ndim - 2 - kernel.ndim]  # a stack has one leading dimension
        product = a.reshape(*layers, -1, a.shape[-1]) @ b.reshape(*layers, a.shape[-1], -1)
        out[f"{name}kernel"] = (kernel + scale * product.reshape(kernel.shape)).astype(np.float32)
    return out
