"""What a corpus holds of each cell beside counts and labels: numbers, and how those of studies unite."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def numbers(n: int) -> tuple[str, ...]:
    """What the features of an array are called that come without names."""
    return tuple(map(str, range(n)))


@dataclasses.dataclass(frozen=True)
class Panel:
    """The features of a value: float32 per cell and feature, NaN where missing.

    Attributes:
      column: whether it is one number of a cell, a column of obs, else a row of an obsm matrix.
      features: names of the matrix' columns; those of an array without names are 0, 1, ...; of a column its
        own name alone.
    """

    column: bool
    features: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value of one cell: () or (features,)."""
        return () if self.column else (len(self.features),)

    @property
    def named(self) -> bool:
        """Whether it is a matrix whose features have names that are more than their numbers."""
        return not self.column and self.features != numbers(len(self.features))

    def entry(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"column": self.column, "features": list(self.features)}


def read_entries(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Panel]:
    """The panels of a manifest, of which earlier ones have none."""
    return {name: Panel(entry["column"], tuple(entry["features"])) for name, entry in entries.items()}


def unite(name: str, found: Iterable[tuple[str, Panel]], fixed: bool = False) -> Panel:
    """The panel of several studies: features of the first, then what each further one adds, by name.

    Args:
      name: of the value.
      found: (where, panel), at least one.
      fixed: nothing is added to the first, which the others need only go with.

    Raises:
      ValueError: a column here and a matrix there; features with names here and without there; arrays
        without names of other lengths. Names both.
    """
    (first, panel), *others = found
    for where, other in others:
        if panel.column != other.column:
            kinds = {True: "a column of obs", False: "a matrix of obsm"}
            what = f"is {kinds[panel.column]} in {first} and {kinds[other.column]} in {where}"
        elif panel.named != other.named or (not panel.named and panel.shape != other.shape):
            what = f"has {_told(panel)} in {first} and {_told(other)} in {where}"
        else:
            more = () if fixed else other.features
            panel = Panel(panel.column, tuple(dict.fromkeys([*panel.features, *more])))
            continue
        raise ValueError(
            f"value {name!r} {what}; features unite by name, from tables (DataFrame) in obsm, or else there "
            "must be as many in the same order"
        )
    return panel


def _told(panel: Panel) -> str:
    n, names = len(panel.features), ", ".join(panel.features[:3])
    return f"{n} named features ({names}, ...)" if panel.named else f"{n} features without names"


def panel_of(corpus: Any, name: str) -> Panel:
    """The panel of a value of a corpus or mixture.

    Raises:
      KeyError: it has none of that name; lists those it has.
      ValueError: the corpora of a mixture have it, and it does not unite; says why.
    """
    if name in corpus.panels:
        return corpus.panels[name]
    why = getattr(corpus, "apart", {}).get(name)
    if why is not None:
        raise ValueError(f"{corpus.path}: {why}")
    raise KeyError(
        f"the corpus {corpus.path} has no value {name!r}; it has {list(corpus.panels)} (what a corpus holds "
        "beside counts and labels is chosen with values= when it is built)"
    )


def place(values: np.ndarray, features: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """Columns in another order, by name; NaN where there is none: float32 [n, wanted]."""
    if tuple(features) == tuple(wanted):
        return values
    position = {feature: i for i, feature in enumerate(features)}
    at = np.array([position.get(feature, -1) for feature in wanted], np.int64)
    out = np.full((len(values), len(wanted)), np.nan, np.float32)
    out[:, at >= 0] = values[:, at[at >= 0]]
    return out
