"""Values of genes that a model needs from outside: medians of the corpus, vectors that somebody made.

A model says what it needs by a static method ``tables(config) -> {name: kind}``:

"median"   buffer ``<name>`` [n_genes], positive; 0 for a gene that has none
"vectors"  the buffers ``<name>/table`` [n_genes, dim] and ``<name>/known`` [n_genes] of a
           :class:`scjax.nn.embedder.GeneEmbedder`

("median:PATH" and "vectors:PATH" where these are at PATH and not at <name>), and ``RunConfig.tables`` says
where each comes from: a file, or "corpus" for medians. The values become part of the state and of every
checkpoint, so that a trained model needs no file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from scjax.config import ConfigError, from_config, nearest
from scjax.corpus import Corpus, Mixture
from scjax.genes import MatchedValues, Vocabulary, match_values, read_medians, read_vectors
from scjax.models import resolve
from scjax.nn import Abstract, shapes_of

CORPUS = "corpus"


@dataclasses.dataclass(frozen=True)
class GeneTables:
    """The tables of a run.

    Attributes:
      buffers: path of a buffer, "gene/table" -> array [n_genes, ...], in the order of the vocabulary.
      sources: name of a table -> {"source", "sha256"}, for ``model.json``. The hash is of the values that
        reach the model, so that moving a file or changing its format is not another table.
      notes: a line a table, for people: how many genes have a value.
    """

    buffers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    sources: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def tables_of(system: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> kind of the tables that a system with this config needs; {} for most."""
    model, config_class = resolve(system)
    declared = getattr(model, "tables", None)
    return declared(from_config(config_class, config, where="config.model")) if declared else {}


def gene_tables(
    system: str,
    config: Mapping[str, Any],
    sources: Mapping[str, str | None],
    model: Abstract,
    vocabulary: Vocabulary,
    corpus: Corpus | Mixture,
) -> GeneTables:
    """Reads the tables that a model needs.

    Args:
      system, config: as for :func:`scjax.models.build`.
      sources: ``config.tables``: name of a table -> file, or "corpus"; None or "" is as if left out.
      model: from :func:`scjax.models.build`; what is read must have its shapes.
      vocabulary: genes of the model.
      corpus: that of the run; its medians are computed only if asked for, once nothing else is wrong.

    Raises:
      ConfigError: a table is missing (says which option gives it) or not one that the model takes.
      ValueError: a file cannot be read, has no gene in common with the model, or vectors of another width.
    """
    wanted = tables_of(system, config)
    given = {name: source for name, source in sources.items() if source}
    for name in given:
        if name not in wanted:
            takes = f"there is {', '.join(sorted(wanted))}" if wanted else "it takes none as it is configured"
            raise ConfigError(
                f"config.tables.{name} is not a table of {system};{nearest(name, wanted)} {takes}"
            )
    buffers, about = shapes_of(model)["buffers"], {}
    kinds = {name: kind.partition(":") for name, kind in wanted.items()}
    computed = [n for n, (kind, *_) in kinds.items() if kind == "median" and given.get(n, CORPUS) == CORPUS]
    for name, (kind, _, path) in sorted(kinds.items(), key=lambda item: item[0] in computed):
        place = path or name
        if kind == "median":
            source = given.get(name, CORPUS)
            if name in computed:
                matched = _corpus_medians(corpus, vocabulary)
            else:
                matched = match_values(read_medians(source), vocabulary)
            filled = {place: matched.values}
        elif kind == "vectors":
            source = given.get(name, "")
            if source in ("", CORPUS):
                raise ConfigError(
                    f"{system} needs a vector for each gene and config.tables.{name} names no file: give one "
                    f"with --config.tables.{name}=FILE (.npz, .npy, .tsv, .csv or word2vec text), or let the "
                    'model learn its own with gene_table.kind = "random"'
                )
            matched = match_values(read_vectors(source), vocabulary)
            width = _at(buffers, f"{place}/table").shape[1]
            if matched.values.shape[1] != width:
                raise ValueError(
                    f"config.tables.{name}: {source} has vectors of width {matched.values.shape[1]}, the "
                    f"model as configured takes {width} (dim of gene_table or of its part in mix; 0: d_model)"
                )
            filled = {f"{place}/table": matched.values, f"{place}/known": matched.known}
        else:
            raise ValueError(f'{system} declares the table {name!r} of kind {kind!r}; "median" or "vectors"')
        arrays = {path: np.asarray(value, _at(buffers, path).dtype) for path, value in filled.items()}
        for path, array in arrays.items():
            if array.shape != _at(buffers, path).shape:
                raise ValueError(
                    f"{system} declares the table {name!r}; its buffer {path} has the shape "
                    f"{_at(buffers, path).shape}, the table {array.shape}"
                )
        about[name] = (arrays, source, matched.summary)
    return GeneTables(
        {path: array for name in sorted(about) for path, array in about[name][0].items()},
        {n: {"source": _absolute(about[n][1]), "sha256": hash_of(about[n][0])} for n in sorted(about)},
        tuple(f"{name}: {about[name][2]}" for name in sorted(about)),
    )


def _corpus_medians(corpus: Corpus | Mixture, vocabulary: Vocabulary) -> MatchedValues:
    """The corpus's own medians, for the genes that the model shares with it."""
    median, there = corpus.statistics().median, corpus.vocabulary
    if there.hash != vocabulary.hash:
        match = vocabulary.match(_frame(there))
        here = np.full(len(vocabulary), np.nan)
        here[match.ids[match.ids >= 0]] = median[match.ids >= 0]
        median = here
    known = np.isfinite(median)
    return MatchedValues(
        np.where(known, median, 0.0), known, f"corpus: {int(known.sum()):,} of {len(vocabulary):,} genes"
    )


def _frame(vocabulary: Vocabulary) -> Any:
    import pandas as pd

    return pd.DataFrame({"gene_symbol": vocabulary.symbols}, index=vocabulary.ids)


def _at(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for name in path.split("/"):
        if not isinstance(node, Mapping) or name not in node:
            raise ValueError(f"the model declares a table for its buffer {path}, which it does not have")
        node = node[name]
    return node


def _absolute(source: str) -> str:
    return source if source == CORPUS else str(pathlib.Path(source).absolute())


def hash_of(arrays: Mapping[str, np.ndarray]) -> str:
    """Of paths, shapes and values."""
    digest = hashlib.sha256()
    for path, array in sorted(arrays.items()):
        digest.update(f"{path} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
