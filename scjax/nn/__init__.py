"""Layers, and the bridge between modules and plain pytrees."""

from scjax.nn.module import (
    Abstract,
    Buffer,
    abstract,
    axes_of,
    bind,
    buffers_of,
    flatten,
    initialise,
    nest,
    params_of,
    shapes_of,
)

__all__ = [
    "Abstract",
    "Buffer",
    "abstract",
    "axes_of",
    "bind",
    "buffers_of",
    "flatten",
    "initialise",
    "nest",
    "params_of",
    "shapes_of",
]
