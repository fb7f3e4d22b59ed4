"""Values on their way from the sources into the parts: planned, mapped and reduced beside the counts.

A column of obs travels with the other columns of the cells. The rows of a matrix of obsm travel as the genes
and counts do, bit by bit: they lie in a fragment in the order of its cells, and are collected shard by shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scjax.corpus.obs import ObsSchema
from scjax.corpus.panels import Panel, place, read_entries, unite
from scjax.corpus.sources import Source
from scjax.corpus.sources.values import Value, find_value, list_values, read_value

if TYPE_CHECKING:
    from scjax.corpus.plan import Facts, Study

BITS = np.dtype(np.uint32)  # what a float32 travels as


def find_values(
    source: Source, schema: ObsSchema, names: Sequence[str], columns: Mapping[str, Sequence[str]]
) -> dict[str, Value]:
    """Those of the values asked for that a source has; ``columns`` are other names for them.

    Raises:
      ValueError: see :func:`scjax.corpus.sources.values.find_value`.
    """
    found = {
        name: find_value(source, name, schema.find(source.obs, name), columns.get(name, ())) for name in names
    }
    return {name: value for name, value in found.items() if value is not None}


def hash_values(source: Source, names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> str:
    """sha256 of the matrices of a source in memory that are values, under any of their names."""
    digest = hashlib.sha256()
    with source.obsm() as obsm:
        keys = [key for name in names for key in (name, *columns.get(name, ())) if key in obsm]
    for key in keys:
        value = find_value(source, key)
        if value is not None:
            digest.update(repr(value).encode())
            digest.update(read_value(source, value).tobytes())
    return digest.hexdigest()


def unite_values(
    names: Sequence[str],
    old: Mapping[str, Mapping[str, Any]],
    studies: Sequence[Study],
    facts: Sequence[Facts],
) -> dict[str, Panel]:
    """What the corpus holds of each value; ``facts`` are told what a study has of it, and what is left out.

    Args:
      names: of the values.
      old: those of the corpus that is added to, as its manifest has them: their features stay what they are.

    Raises:
      KeyError: a value that no source has; lists those there are.
      ValueError: values that do not go together; see :func:`scjax.corpus.panels.unite`.
    """
    panels, fixed = {}, read_entries(old)
    for name in names:
        having = [
            (study, fact, fact.values[name])
            for study, fact in zip(studies, facts, strict=True)
            if name in fact.values
        ]
        found: list[tuple[str, Panel]] = [("the corpus", fixed[name])] if name in fixed else []
        found += [(study.name, value) for study, _, value in having]
        if not found:
            there = dict.fromkeys(each for study in studies for each in list_values(study.open()))
            raise KeyError(
                f"values: no source has an obs column or obsm {name!r}; with numbers there are: "
                f"{', '.join(there) or 'none'}"
            )
        panels[name] = unite(name, found, name in fixed)
        for _, fact, value in having:
            fact.entry.setdefault("values", {})[name] = len(value.features)
            if left := len(set(value.features) - set(panels[name].features)):
                fact.entry["left_out"] = {**fact.entry["left_out"], f"features of {name}": left}
    return panels


def read_panel(source: Source, value: Value | None, panel: Panel, first: int, last: int) -> np.ndarray:
    """Rows [first, last) of a source as the corpus holds them: float32 [n] or [n, features]."""
    if value is None:
        return np.full((last - first, *panel.shape), np.nan, np.float32)
    table = read_value(source, value, first, last)
    return table if panel.column else place(table, value.features, panel.features)
