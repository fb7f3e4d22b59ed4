"""Beginning a run with the weights of another: continued pretraining, and what is built on a base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from scjax.config import ConfigError
from scjax.nn.module import Abstract, flatten, shapes_of
from scjax.train.tables import hash_of


@dataclasses.dataclass(frozen=True)
class Start:
    """Values that a run begins with.

    Attributes:
      values: path of a parameter or buffer -> its value, for :func:`scjax.train.init_state`.
      fresh: paths of parameters that begin at random, because the other run has none such.
      sha256: of the values.
    """

    values: dict[str, Any]
    fresh: tuple[str, ...]
    sha256: str

    @property
    def note(self) -> str:
        """A line for people."""
        fresh = f"; at random {', '.join(self.fresh[:6])}" if self.fresh else ""
        more = f" and {len(self.fresh) - 6} more" if len(self.fresh) > 6 else ""
        return f"{len(self.values)} arrays from there{fresh}{more}"


def start_from(
    model: Abstract, params: Mapping[str, Any], buffers: Mapping[str, Any], *, prefix: str = ""
) -> Start:
    """Where each array of a trained model goes in another.

    An array goes to the parameter or buffer of the same path behind ``prefix``, whichever of the two it was:
    what a model trains another may hold frozen.

    Args:
      model: from :func:`scjax.models.build`, the one to begin.
      params, buffers: nested dicts of the trained one, such as those of ``scjax.load(run)``.
      prefix: "base/" for a model that holds the trained one as its base.

    Raises:
      ConfigError: an array has no place in ``model``, or another shape there; names it, and both shapes.
    """
    shapes = shapes_of(model)
    wanted = flatten(shapes["params"]) | flatten(shapes["buffers"])
    values = {}
    for path, value in (flatten(params) | flatten(buffers)).items():
        if prefix + path not in wanted:
            raise ConfigError(
                f"the run to start from has {path}, which the model as configured has not: its system and "
                "config.model must be those of that run, but for what is added"
            )
        if wanted[prefix + path].shape != value.shape:
            raise ConfigError(
                f"{path} has the shape {tuple(value.shape)} in the run to start from and "
                f"{tuple(wanted[prefix + path].shape)} in the model as configured"
            )
        values[prefix + path] = value
    fresh = tuple(path for path in flatten(shapes["params"]) if path not in values)
    return Start(values, fresh, hash_of({path: np.asarray(value) for path, value in values.items()}))
