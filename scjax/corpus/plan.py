"""The plan of a build: what every source holds, and the place of every cell, before any count is read."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import pickle
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

import scjax
from scjax.corpus.format import Layout
from scjax.corpus.manifest import FORMAT, VERSION
from scjax.corpus.obs import ObsSchema, categorise
from scjax.corpus.panels import Panel
from scjax.corpus.places import Places, find_places
from scjax.corpus.sources import Source, files_of, list_sources, look_at, open_source
from scjax.corpus.sources.values import Value
from scjax.corpus.values import find_values, hash_values, unite_values
from scjax.genes import (
    GeneMatch,
    Orthologs,
    Vocabulary,
    assign_orthologs,
    match_with_orthologs,
    union_with_orthologs,
)

RUN_ELEMENTS = 2**25  # stored values that one map task reads


@dataclasses.dataclass(frozen=True)
class Study:
    """One source; ``open`` gives its counts. Kept closed, so that thousands of them cost nothing."""

    data: Any
    name: str
    layer: str | None

    @property
    def in_memory(self) -> bool:
        return not isinstance(self.data, str | os.PathLike)

    def open(self) -> Source:
        return open_source(self.data, name=self.name, layer=self.layer)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a build keeps of its sources; see ``build_corpus``."""

    labels: tuple[str, ...] | None
    columns: tuple[tuple[str, tuple[str, ...]], ...]
    unknown: tuple[str, ...]
    min_match: float
    duplicates: str
    allow_non_integer: bool
    min_genes: int
    min_counts: float
    drop_duplicates: bool
    validation: float
    split_by: str | None
    seed: int
    shuffle: bool
    orthologs: tuple[tuple[str, str, str], ...] = ()  # data set ("" for all), path of the table, its sha256
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.values:
            if not name or "/" in name or name.startswith((".", "_index")) or self.values.count(name) > 1:
                raise ValueError(f"values={self.values!r}: {name!r} must be a name, once, and without '/'")
        if self.duplicates not in ("error", "sum"):
            raise ValueError(f"duplicates={self.duplicates!r}: there are error and sum")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation={self.validation}: a fraction of the cells, at least 0 and below 1")
        if self.split_by is not None and not self.validation:
            raise ValueError(f"split_by={self.split_by!r} needs validation > 0, the fraction to hold out")
        if self.min_genes < 1:
            raise ValueError(
                f"min_genes={self.min_genes} must be at least 1: an empty cell is nothing to learn from"
            )
        if self.min_counts < 0:
            raise ValueError(f"min_counts={self.min_counts} must be at least 0")


@dataclasses.dataclass(frozen=True)
class Base:
    """The corpus that an append adds to.

    Attributes:
      manifest_id: of its state, the parent of the new one.
      datasets: names of its data sets.
      columns: its label columns and their categories, "dataset" left out.
      groups: split -> groups of ``split_by`` that are in it.
      n_cells: its cells in train and validation.
      values: its values, as the manifest has them.
    """

    manifest_id: str
    datasets: tuple[str, ...]
    columns: Mapping[str, Sequence[str]]
    groups: Mapping[str, Sequence[str]]
    n_cells: tuple[int, int]
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the plan knows of one source.

    Attributes:
      ids: int32, the vocabulary gene of each of its columns, -1 for none.
      held: packed bits of its cells in the validation split, None where a hash decides.
      entry: of the manifest, as far as it is known before the counts are read.
      values: where it keeps those that it has.
    """

    ids: np.ndarray
    held: np.ndarray | None
    entry: dict[str, Any]
    values: dict[str, Value]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do, small enough for every worker to read.

    Attributes:
      studies: the sources; those in memory without their data.
      columns: label column -> categories, those of the corpus that is added to first.
      runs: (number of the study, first row, last row) of every map task.
      groups: split -> groups of ``split_by``, where that was asked for.
      n_stored: stored values of all sources together.
      only: the parts that are wanted, where a corpus is repaired; None means all.
      values: name -> what the corpus holds of it.
    """

    studies: tuple[Study, ...]
    vocabulary: Vocabulary
    schema: ObsSchema
    columns: dict[str, list[str]]
    places: Places
    runs: tuple[tuple[int, int, int], ...]
    options: Options
    layout: Layout
    groups: dict[str, list[str]]
    n_stored: int
    base: Base | None = None
    only: tuple[int, ...] | None = None
    values: dict[str, Panel] = dataclasses.field(default_factory=dict)

    @property
    def n_cells(self) -> int:
        """Cells of all sources."""
        return sum(self.places.sizes)

    @property
    def first_dataset(self) -> int:
        """Number of the first new data set."""
        return len(self.base.datasets) if self.base else 0


def list_studies(
    sources: Any, names: Sequence[str] | None, layer: str | Mapping[str, str] | None
) -> tuple[Study, ...]:
    """Gives every source a name and a layer. ValueError where names are not unique or not as many."""
    found = list_sources(sources)
    names = list(found) if names is None else list(names)
    if len(names) != len(found):
        raise ValueError(f"{len(names)} names for {len(found)} sources")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f"several sources are called {', '.join(twice)}: give each its own with names=")
    if isinstance(layer, Mapping) and not set(layer) <= set(names):
        wrong = ", ".join(sorted(set(layer) - set(names)))
        raise KeyError(f"layer= names data sets that are not there: {wrong}; there are: {', '.join(names)}")
    layers = [layer.get(name) if isinstance(layer, Mapping) else layer for name in names]
    return tuple(Study(*study) for study in zip(found.values(), names, layers, strict=True))


def make_plan(
    studies: tuple[Study, ...],
    vocabulary: Vocabulary | None,
    options: Options,
    layout: Layout,
    folder: pathlib.Path,
    base: Base | None = None,
) -> Plan:
    """Looks at every source: genes, labels, the first counts. Raises what ``build_corpus`` documents.

    Leaves the plan in ``folder``: ``plan.pkl`` and, per study, its ``Facts``.
    """
    tables = _tables(studies, vocabulary, options)
    if vocabulary is None and tables:
        vocabulary = union_with_orthologs({study.name: study.open().var for study in studies}, tables)
    elif vocabulary is None:
        vocabulary = Vocabulary.from_anndata(study.open().var for study in studies)
    schema = ObsSchema(options.labels, options.unknown, dict(options.columns), options.values)
    if base is not None:
        schema.extend(base.columns)
    facts, heads, sizes, groups, runs, n_stored = [], [], [], [], [], 0
    for number, study in enumerate(studies):
        source = study.open()
        table = tables.get(study.name)
        match = _match(source, vocabulary, table, options)
        _check_match(source, match, vocabulary, options)
        schema.add(source.obs, source.where)
        if not options.allow_non_integer:
            source.check_head()
        if options.split_by is not None:
            groups.append(_groups(source, schema, options.split_by))
        heads.append(source.obs.iloc[:0])
        runs += [(number, first, last) for first, last in source.runs(RUN_ELEMENTS)]
        having = find_values(source, schema, options.values, dict(options.columns))
        facts.append(Facts(match.ids, None, _entry(source, match, vocabulary, table), having))
        sizes.append(source.shape[0])
        n_stored += source.n_stored
    panels = unite_values(options.values, base.values if base else {}, studies, facts)
    schema.finish({name for fact in facts for name, value in fact.values.items() if not value.column})
    for fact, head in zip(facts, heads, strict=True):
        if renamed := schema.renamed(head):
            fact.entry["obs_renamed"] = renamed
    split_groups: dict[str, list[str]] = {}
    held = None
    if options.split_by is not None:
        split_groups = _split_groups(groups, options, sum(sizes), base)
        chosen = set(split_groups["validation"])
        held = [
            np.packbits(np.array([text in chosen for text in texts])[codes], bitorder="little")
            for codes, texts in groups
        ]
        facts = [dataclasses.replace(f, held=bits) for f, bits in zip(facts, held, strict=True)]
    places = find_places(
        [study.name for study in studies],
        sizes,
        seed=options.seed,
        shuffled=options.shuffle,
        validation=options.validation,
        groups=held,
        part_cells=layout.part_cells,
    )
    columns = {name: list(values) for name, values in (base.columns if base else {}).items()}
    for name, values in schema.labels.items():
        known = set(columns.setdefault(name, []))
        columns[name] += [value for value in values if value not in known]
    plan = Plan(
        tuple(dataclasses.replace(s, data=None if s.in_memory else os.path.abspath(s.data)) for s in studies),
        vocabulary,
        schema,
        columns,
        places,
        tuple(runs),
        options,
        layout,
        split_groups,
        n_stored,
        base,
        values=panels,
    )
    for number, fact in enumerate(facts):
        write_whole(folder / f"study-{number:06d}.pkl", pickle.dumps(fact, protocol=5))
    write_whole(folder / "plan.pkl", pickle.dumps(plan, protocol=5))
    return plan


def _tables(
    studies: Sequence[Study], vocabulary: Vocabulary | None, options: Options
) -> dict[str, Orthologs]:
    """Data set -> the orthologs that map it; not those that are matched by name."""
    if not options.orthologs:
        return {}
    for name, path, sha256 in options.orthologs:
        if named_tables({name: path}) != ((name, path, sha256),):
            raise ValueError(f"{path}: the table of orthologs has changed since the build began")
    given: Any = {name: path for name, path, _ in options.orthologs}
    given = given.get("", given)
    return assign_orthologs(given, {study.name: study.open().var for study in studies}, vocabulary)


def _match(source: Source, vocabulary: Vocabulary, table: Orthologs | None, options: Options) -> GeneMatch:
    if table is None:
        return vocabulary.match(source.var)
    return match_with_orthologs(vocabulary, source.var, table, sum_duplicates=options.duplicates == "sum")


def _entry(
    source: Source, match: GeneMatch, vocabulary: Vocabulary, table: Orthologs | None
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": source.name,
        "file": source.file,
        "layer": source.layer,
        "species": sorted({vocabulary.species[i] for i in match.ids[match.ids >= 0]}),
        "n_cells_in": source.shape[0],
        "genes_total": source.shape[1],
        "genes_matched": match.n_matched,
        "matched_by": match.matched_by,
        "genes_unmatched": match.unmatched[:20],  # examples
        "left_out": source.account,
    }
    if table is not None:
        file = pathlib.Path(table.path)
        entry["orthologs"] = {
            "file": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "genes_left_out": match.left_out,
            "onto": entry["species"],
        }
        entry["species"] = list(match.species)  # the study's own, as far as its ids tell
    return entry


def _check_match(source: Source, match: GeneMatch, vocabulary: Vocabulary, options: Options) -> None:
    if match.duplicates and options.duplicates != "sum":
        shown = "; ".join(f"{gene}: {', '.join(names)}" for gene, names in list(match.duplicates.items())[:5])
        raise ValueError(
            f"{source.where}: {len(match.duplicates)} genes are in several columns ({shown}); "
            "pass duplicates='sum' to add their counts up, or remove the columns"
        )
    of = min(len(match.names), len(vocabulary))
    if match.n_matched < max(1, options.min_match * of):
        raise ValueError(
            f"{source.where}: {match.n_matched:,} of {len(match.names):,} genes match the vocabulary of "
            f"{len(vocabulary):,} genes; at least {max(1, int(np.ceil(options.min_match * of))):,} are asked "
            f"for (min_match={options.min_match}). Not matched: {', '.join(match.unmatched[:5])}. In the "
            f"vocabulary: {', '.join(vocabulary.ids[:3])} ({', '.join(vocabulary.symbols[:3])}). "
            "Another kind of gene name, or another species (a table of orthologs maps it)?"
        )


def _groups(source: Source, schema: ObsSchema, column: str) -> tuple[np.ndarray, list[str]]:
    """(code of each cell, what the codes mean): the group of each cell as text, "" where missing."""
    own = schema.find(source.obs, column)
    if own is not None:
        codes, texts = categorise(source.obs[own])
        codes = np.where(codes < 0, len(texts), codes)
        return codes.astype(np.min_scalar_type(len(texts))), [*texts, ""]
    if column == "dataset":
        return np.zeros(source.shape[0], np.uint8), [source.name]
    there = ", ".join(map(str, source.obs.columns)) or "none"
    raise KeyError(f"{source.where}: no obs column {column!r} to split by; there are: {there}")


def _split_groups(
    groups: Sequence[tuple[np.ndarray, list[str]]], options: Options, n_cells: int, base: Base | None
) -> dict[str, list[str]]:
    """Whole groups for validation, in the order of their hash until they hold that fraction of the cells.

    Groups that a corpus knows stay in their split. Of new ones, those are held out that bring the fraction
    of the whole corpus nearer to what was asked for.
    """
    sizes: Counter[str] = Counter()
    for codes, texts in groups:
        for text, n in zip(texts, np.bincount(codes, minlength=len(texts)).tolist(), strict=True):
            if n and text and text not in options.unknown:
                sizes[text] += n
    order = sorted(sizes, key=lambda v: hashlib.sha256(f"{options.seed}|group|{v}".encode()).digest())
    if base is not None:
        known = {split: list(values) for split, values in base.groups.items()}
        wanted = options.validation * (n_cells + sum(base.n_cells))
        held = base.n_cells[1] + sum(sizes[value] for value in known["validation"])
        for value in order:
            if value not in known["train"] and value not in known["validation"]:
                nearer = held + sizes[value] / 2 <= wanted
                known["validation" if nearer else "train"].append(value)
                held += nearer * sizes[value]
        return {split: sorted(values) for split, values in known.items()}
    chosen: list[str] = []
    while sum(sizes[v] for v in chosen) < options.validation * n_cells and len(chosen) < len(order):
        chosen.append(order[len(chosen)])
    if not chosen or len(chosen) == len(order):
        raise ValueError(
            f"split_by={options.split_by!r}: {len(order)} groups ({', '.join(order[:5])}) cannot be split so "
            f"that some hold {options.validation:.0%} of the cells and others remain"
        )
    return {"train": sorted(set(order) - set(chosen)), "validation": sorted(chosen)}


def pairs(columns: Mapping[str, Sequence[str]] | None) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """``columns=`` as ``Options`` holds it."""
    several = {name: [v] if isinstance(v, str) else v for name, v in (columns or {}).items()}
    return tuple((name, tuple(others)) for name, others in several.items())


def named_tables(
    orthologs: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None,
) -> tuple[tuple[str, str, str], ...]:
    """``orthologs=`` as ``Options`` holds it. FileNotFoundError for a table that is not there."""
    given = orthologs if isinstance(orthologs, Mapping) else {} if orthologs is None else {"": orthologs}
    named = []
    for name, table in given.items():
        path = pathlib.Path(os.path.abspath(table))
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; orthologs= is a table of source and target genes")
        named.append((name, str(path), hashlib.sha256(path.read_bytes()).hexdigest()))
    return tuple(named)


def plan_key(
    studies: Sequence[Study],
    vocabulary: Vocabulary | None,
    options: Options,
    layout: Layout,
    base: Base | None,
) -> str:
    """12 hex digits that change whenever anything does on which the bytes of the corpus depend."""
    lines = [scjax.__version__, FORMAT, VERSION, base.manifest_id if base else ""]
    lines.append(vocabulary.hash if vocabulary else "genes of the sources")
    lines += [repr(dataclasses.astuple(options)), repr(dataclasses.astuple(layout)), str(RUN_ELEMENTS)]
    for study in studies:
        lines.append(repr((study.name, study.layer)))
        lines += [repr(look) for look in fingerprint(study)]
        if study.in_memory and options.values:
            lines.append(hash_values(study.open(), options.values, dict(options.columns)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def fingerprint(study: Study) -> list[tuple[Any, ...]]:
    """What tells that a source has changed: (path, bytes, time) of its files; in memory, its content."""
    if not study.in_memory:
        return list(look_at(files_of(study.data)))
    source = study.open()
    frames = [source.obs, source.var]
    hashes = (pd.util.hash_pandas_object(frame).to_numpy().tobytes() for frame in frames)
    digests = [hashlib.sha256(content).hexdigest() for content in hashes]
    return [(source.sha256(), *digests, *(str(frame.dtypes.to_dict()) for frame in frames))]


def write_whole(path: pathlib.Path, content: bytes, folder: pathlib.Path | None = None) -> None:
    """Writes a file that is there whole or not at all; of two at once, either's may stay.

    Args:
      folder: where the file is until it is whole; by default beside ``path``.
    """
    partial = (folder or path.parent) / f"tmp-{uuid.uuid4().hex}"
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
