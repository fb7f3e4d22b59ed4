"""Genes of one species as genes of another: a table of pairs maps a study onto a vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import pathlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from scjax.genes.vocabulary import GeneMatch, Vocabulary, column_names, species_of, strip_version

Var: TypeAlias = "pd.DataFrame | Sequence[str]"


@dataclasses.dataclass(frozen=True)
class Orthologs:
    """Pairs of genes, each by stable id or symbol.

    Attributes:
      source, target: names, pair by pair; no pair occurs twice.
      path: the file.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    path: str

    @classmethod
    def read(cls, path: str | pathlib.Path) -> Orthologs:
        """Reads a table of two columns, source gene and target gene; tabs or commas, gzipped or not.

        A header may stand above: it is a pair that no study has. A line with an empty field is a gene
        without ortholog. Version suffixes of Ensembl ids are ignored.

        Raises:
          FileNotFoundError: no such file.
          ValueError: a line does not have two fields, or there is none; names the line.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; orthologs are a table of source and target genes")
        content = path.read_bytes()
        try:
            text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
        except (UnicodeDecodeError, OSError, EOFError) as error:
            raise ValueError(f"{path}: not a table of text ({error})") from error
        pairs: dict[tuple[str, str], None] = {}
        mark = "\t" if "\t" in text.split("\n", 1)[0] else ","
        for number, line in enumerate(text.splitlines(), 1):
            fields = [strip_version(field.strip().strip('"')) for field in line.split(mark)]
            if line.strip() and len(fields) != 2:
                raise ValueError(
                    f"{path}, line {number}: {len(fields)} fields; a table of orthologs has two columns, "
                    "source gene and target gene, with a tab or a comma between them"
                )
            if all(fields) and len(fields) == 2:
                pairs[fields[0], fields[1]] = None
        if not pairs:
            raise ValueError(f"{path}: holds no pair of genes")
        return cls(tuple(s for s, _ in pairs), tuple(t for _, t in pairs), str(path))

    def turned(self) -> Orthologs:
        """The same table with source and target exchanged."""
        return Orthologs(self.target, self.source, self.path)

    @functools.cached_property
    def targets(self) -> dict[str, list[str]]:
        """Source gene -> its target genes."""
        table = defaultdict(list)
        for source, target in zip(self.source, self.target, strict=True):
            table[source].append(target)
        return dict(table)

    def find(self, var: Var) -> list[str]:
        """What the table calls each column of a study, as a source gene; "" where it does not know it."""
        names, id_columns, symbol_columns = column_names(var)
        columns = [[strip_version(v) for v in column] for column in (*id_columns, *symbol_columns)]
        known = self.targets
        return [next((c[i] for c in columns if c[i] in known), "") for i in range(len(names))]


def assign_orthologs(
    given: str | pathlib.Path | Mapping[str, str | pathlib.Path],
    studies: Mapping[str, Var],
    vocabulary: Vocabulary | None = None,
) -> dict[str, Orthologs]:
    """Which studies a table maps, and in which direction.

    Args:
      given: one table, for every study of which it knows more genes as source than as target; or data set
        name -> table.
      studies: data set name -> its ``var``.
      vocabulary: what is mapped onto, where that is fixed. A single table that clearly has these genes in its
        first column is read from right to left. A table that is given for a data set has its genes as
        source, in whichever column they are.

    Returns:
      Data set name -> table. Other data sets are matched by name.

    Raises:
      KeyError: a data set is not there.
      ValueError: a table has nothing to map.
    """
    tables = {}
    if isinstance(given, Mapping):
        wrong = sorted(set(given) - set(studies))
        if wrong:
            raise KeyError(
                f"orthologs= names data sets that are not there: {', '.join(wrong)}; "
                f"there are: {', '.join(studies)}"
            )
        read = {path: Orthologs.read(path) for path in dict.fromkeys(given.values())}
        for name, path in given.items():
            forward, back = _known(read[path], studies[name])
            if not forward and not back:
                raise ValueError(f"{path}: knows none of the genes of {name}")
            tables[name] = read[path] if forward >= back else read[path].turned()
        return tables
    table = Orthologs.read(given)
    if vocabulary is not None:
        forward, back = (
            sum(name in vocabulary for name in set(side)) for side in (table.target, table.source)
        )
        table = table if 2 * forward >= back else table.turned()
    for name, var in studies.items():
        forward, back = _known(table, var)
        if forward > back:
            tables[name] = table
    if not tables:
        raise ValueError(
            f"{given}: no study has more genes in its source column ({', '.join(table.source[1:3])}, ...) "
            f"than in its target column ({', '.join(table.target[1:3])}, ...), so there is nothing to map; "
            "exchange the columns, or name the study with orthologs={data set: table}"
        )
    return tables


def _known(table: Orthologs, var: Var) -> tuple[int, int]:
    return sum(map(bool, table.find(var))), sum(map(bool, table.turned().find(var)))


def union_with_orthologs(studies: Mapping[str, Var], tables: Mapping[str, Orthologs]) -> Vocabulary:
    """The union of the genes of several studies, of those with a table the target genes (one-to-one only)."""

    def genes(name: str, var: Var) -> Any:
        if name not in tables:
            return var
        table = tables[name]
        times = Counter(table.target)
        targets = [table.targets[gene] for gene in table.find(var) if gene]
        return list(dict.fromkeys(own[0] for own in targets if len(own) == 1 and times[own[0]] == 1))

    return Vocabulary.from_anndata([genes(name, var) for name, var in studies.items()])


def match_with_orthologs(
    vocabulary: Vocabulary, var: Var, table: Orthologs, *, sum_duplicates: bool = False
) -> GeneMatch:
    """Finds the ortholog in the vocabulary of every column of a study.

    A gene with several target genes matches none: its counts belong to no one of them. Several genes with
    one target match none either, or, on request, all of them match it, so that their counts are added up.

    Args:
      vocabulary: of the target species, or of several.
      var: ``AnnData.var`` or a list of gene names, of the source species.
      table: source gene -> target gene.
      sum_duplicates: keep genes that share their target.

    Returns:
      The match. ``left_out`` counts the columns without a match by the reason; ``duplicates`` has, on
      request, the target genes of several columns, ``species`` the source's species as its Ensembl ids tell.
    """
    names, id_columns, _ = column_names(var)
    found = table.find(var)

    def gene_of(name: str) -> int | str:
        return vocabulary.id_of(name) if name in vocabulary else name

    # A target that the vocabulary knows by two names is one; one that it does not know counts all the same.
    genes = {source: {gene_of(name) for name in targets} for source, targets in table.targets.items()}
    sources = Counter(gene for targets in genes.values() for gene in targets)

    ids = np.full(len(names), -1, np.int32)
    left_out: Counter[str] = Counter()
    claims: dict[int, list[str]] = {}
    for i, source in enumerate(found):
        gene = next(iter(genes[source])) if source else ""
        if not source:
            left_out["no ortholog in the table"] += 1
        elif len(genes[source]) > 1:
            left_out["several orthologs (one-to-many)"] += 1
        elif sources[gene] > 1 and not sum_duplicates:
            left_out["ortholog shared with other genes (many-to-one)"] += 1
        elif isinstance(gene, str):
            left_out["ortholog not in the vocabulary"] += 1
        else:
            ids[i] = gene
            claims.setdefault(gene, []).append(names[i])
    if not sum_duplicates:
        for column in np.flatnonzero(ids >= 0):
            if len(claims[int(ids[column])]) > 1:  # the study has two columns of one name
                ids[column] = -1
                left_out["ortholog shared with other genes (many-to-one)"] += 1
        claims = {gene: columns for gene, columns in claims.items() if len(columns) == 1}
    duplicates = {vocabulary.gene_id[gene]: columns for gene, columns in claims.items() if len(columns) > 1}
    species = {species_of(column[i]) for column in id_columns for i in range(len(names))} - {""}
    ids.flags.writeable = False
    matched = {"ortholog": int((ids >= 0).sum())}
    return GeneMatch(tuple(names), ids, matched, duplicates, dict(left_out), tuple(sorted(species)))
