"""The plan of a build: what every source holds, and the place of every cell, before any count is read."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np

from scjax.corpus.obs import ObsSchema, categorise
from scjax.corpus.source import Source, default_name, open_source
from scjax.genes import GeneMatch, Vocabulary


@dataclasses.dataclass(frozen=True)
class Study:
    """One source; ``open`` gives its counts. Kept closed, so that thousands of them cost nothing."""

    data: Any
    name: str
    layer: str | None

    def open(self) -> Source:
        return open_source(self.data, name=self.name, layer=self.layer)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every cell goes.

    Attributes:
      matches: per study, the vocabulary gene of each of its columns.
      keys: per study, uint64 [cells]: the order of cells within a bucket.
      buckets: per study, int32 [cells]: a bucket becomes one part.
      splits: per bucket, "train" or "validation"; all train buckets come first.
      n_stored: stored values of all sources together.
    """

    studies: tuple[Study, ...]
    vocabulary: Vocabulary
    schema: ObsSchema
    matches: tuple[GeneMatch, ...]
    keys: tuple[np.ndarray, ...]
    buckets: tuple[np.ndarray, ...]
    splits: tuple[str, ...]
    n_stored: int


def list_studies(
    sources: Any, names: Sequence[str] | None, layer: str | Mapping[str, str] | None
) -> tuple[Study, ...]:
    """Gives every source a name and a layer. ValueError where names are not unique or not as many."""
    single = isinstance(sources, str | pathlib.Path | ad.AnnData)
    items = [sources] if single else list(sources)
    if not items:
        raise ValueError("no sources to build a corpus from")
    if names is None:
        names = [default_name(item) for item in items]
        if sum(isinstance(item, ad.AnnData) for item in items) > 1:
            names = [
                f"adata{i}" if isinstance(item, ad.AnnData) else names[i] for i, item in enumerate(items)
            ]
    if len(names) != len(items):
        raise ValueError(f"{len(names)} names for {len(items)} sources")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f"several sources are called {', '.join(twice)}: give each its own with names=")
    if isinstance(layer, Mapping) and not set(layer) <= set(names):
        wrong = ", ".join(sorted(set(layer) - set(names)))
        raise KeyError(f"layer= names data sets that are not there: {wrong}; there are: {', '.join(names)}")
    layers = [layer.get(name) if isinstance(layer, Mapping) else layer for name in names]
    return tuple(Study(*study) for study in zip(items, names, layers, strict=True))


def make_plan(
    studies: tuple[Study, ...],
    vocabulary: Vocabulary | None,
    *,
    labels: Sequence[str] | None,
    unknown: Sequence[str],
    min_match: float,
    sum_duplicates: bool,
    allow_non_integer: bool,
    validation: float,
    split_by: str | None,
    seed: int,
    part_cells: int,
) -> Plan:
    """Looks at every source: genes, labels, the first counts. Raises what ``build_corpus`` documents."""
    if vocabulary is None:
        vocabulary = Vocabulary.from_anndata(study.open().var for study in studies)
    schema = ObsSchema(labels, unknown)
    matches, sizes, groups, n_stored = [], [], [], 0
    for study in studies:
        source = study.open()
        match = vocabulary.match(source.var)
        _check_match(source, match, vocabulary, min_match, sum_duplicates)
        schema.add(source.obs, source.where)
        if not allow_non_integer:
            source.check_head()
        if split_by is not None:
            groups.append(_groups(source, split_by))
        matches.append(match)
        sizes.append(source.shape[0])
        n_stored += source.n_stored
    schema.finish()

    keys = [_keys(seed, "order", study.name, n) for study, n in zip(studies, sizes, strict=True)]
    if split_by is not None:
        held_out = _hold_out_groups(groups, split_by, validation, seed, set(unknown))
    elif validation:
        lots = np.concatenate([_keys(seed, "split", s.name, n) for s, n in zip(studies, sizes, strict=True)])
        held_out = lots.argsort(kind="stable").argsort(kind="stable") < max(1, round(validation * len(lots)))
    else:
        held_out = np.zeros(sum(sizes), bool)

    order = np.concatenate(keys)
    bucket = np.empty(len(order), np.int32)
    splits: list[str] = []
    for name, chosen in (("train", ~held_out), ("validation", held_out)):
        cells = np.flatnonzero(chosen)
        cells = cells[order[cells].argsort(kind="stable")]
        n_parts = -(-len(cells) // part_cells)
        bucket[cells] = len(splits) + np.arange(len(cells)) * n_parts // max(len(cells), 1)
        splits += [name] * n_parts
    buckets = np.split(bucket, np.cumsum(sizes)[:-1])
    return Plan(
        studies, vocabulary, schema, tuple(matches), tuple(keys), tuple(buckets), tuple(splits), n_stored
    )


def _check_match(
    source: Source, match: GeneMatch, vocabulary: Vocabulary, min_match: float, sum_duplicates: bool
) -> None:
    if match.duplicates and not sum_duplicates:
        shown = "; ".join(f"{gene}: {', '.join(names)}" for gene, names in list(match.duplicates.items())[:5])
        raise ValueError(
            f"{source.where}: {len(match.duplicates)} genes are in several columns ({shown}); "
            "pass duplicates='sum' to add their counts up, or remove the columns"
        )
    of = min(len(match.names), len(vocabulary))
    if match.n_matched < max(1, min_match * of):
        raise ValueError(
            f"{source.where}: {match.n_matched:,} of {len(match.names):,} genes match the vocabulary of "
            f"{len(vocabulary):,} genes; at least {max(1, int(np.ceil(min_match * of))):,} are asked for "
            f"(min_match={min_match}). Not matched: {', '.join(match.unmatched[:5])}. In the vocabulary: "
            f"{', '.join(vocabulary.ids[:3])} ({', '.join(vocabulary.symbols[:3])}). "
            "Another species, or another kind of gene name?"
        )


def _keys(seed: int, purpose: str, name: str, n: int) -> np.ndarray:
    """uint64 [n], a hash of (seed, purpose, data set, row): splitmix64 from a start that sha256 gives."""
    start = hashlib.sha256(f"{seed}|{purpose}|{name}".encode()).digest()[:8]
    z = np.frombuffer(start, "<u8") + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _groups(source: Source, column: str) -> np.ndarray:
    """The group of each cell as text, "" where missing."""
    if column in source.obs:
        codes, texts = categorise(source.obs[column])
        return np.array([*texts, ""], object)[codes]
    if column == "dataset":
        return np.full(source.shape[0], source.name, object)
    there = ", ".join(map(str, source.obs.columns)) or "none"
    raise KeyError(f"{source.where}: no obs column {column!r} to split by; there are: {there}")


def _hold_out_groups(
    groups: Sequence[np.ndarray], column: str, validation: float, seed: int, unknown: set[str]
) -> np.ndarray:
    """Whole groups for validation, in the order of their hash until they hold that fraction of the cells."""
    cells = np.concatenate(groups)
    sizes = Counter(value for value in cells if value and value not in unknown)
    order = sorted(sizes, key=lambda value: hashlib.sha256(f"{seed}|group|{value}".encode()).digest())
    chosen: set[str] = set()
    while sum(sizes[value] for value in chosen) < validation * len(cells) and len(chosen) < len(order):
        chosen.add(order[len(chosen)])
    if not chosen or len(chosen) == len(order):
        raise ValueError(
            f"split_by={column!r}: {len(order)} groups ({', '.join(order[:5])}) cannot be split so that "
            f"some hold {validation:.0%} of the cells and others remain"
        )
    return np.array([value in chosen for value in cells])
