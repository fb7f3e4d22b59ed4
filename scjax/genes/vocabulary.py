"""The gene vocabulary: stable gene ids <-> small integers, and how the columns of a study match them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

# Columns of ``AnnData.var`` that carry ids or symbols, most trusted first; compared without case.
ID_COLUMNS = ("ensembl_id", "ensembl_gene_id", "ensembl", "gene_ids", "gene_id", "feature_id")
SYMBOL_COLUMNS = ("gene_symbol", "gene_symbols", "symbol", "feature_name", "gene_name", "gene_short_name")

_ENSEMBL = re.compile(r"(ENS[A-Z]*G\d{11})(\.\d+)?(_PAR_Y)?$")
_SPECIES = {
    "ENSG": "human",
    "ENSMUSG": "mouse",
    "ENSRNOG": "rat",
    "ENSMMUG": "macaque",
    "ENSSSCG": "pig",
    "ENSDARG": "zebrafish",
}
_FIELDS = ("gene_id", "symbol", "species", "biotype", "aliases")


def strip_version(name: str) -> str:
    """``ENSG00000141510.18`` -> ``ENSG00000141510``; any other name unchanged."""
    found = _ENSEMBL.match(name)
    return found[1] + (found[3] or "") if found else name


def _is_ensembl(name: str) -> bool:
    return _ENSEMBL.match(name) is not None


def species_of(gene_id: str) -> str:
    """The species that an Ensembl id is of, "" for any other name."""
    found = _ENSEMBL.match(gene_id)
    return _SPECIES.get(found[1].rstrip("0123456789"), "") if found else ""


def _text(value: Any) -> str:
    """A cell of a var column as text, "" where it is missing."""
    return value.strip() if isinstance(value, str) else "" if pd.isna(value) else str(value)


def column_names(var: pd.DataFrame | Sequence[str]) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Names of a study's columns, then its id and its symbol columns: most trusted first, the names last."""
    if not isinstance(var, pd.DataFrame):
        if isinstance(var, str):
            raise ValueError(f"expected a var table or a list of gene names, got the single string {var!r}")
        names = [_text(name) for name in var]
        return names, [names], [names]
    names = [_text(name) for name in var.index]
    by_lower = {str(column).lower(): column for column in reversed(var.columns)}

    def columns(known: Sequence[str]) -> list[list[str]]:
        return [[_text(v) for v in var[by_lower[name]]] for name in known if name in by_lower] + [names]

    return names, columns(ID_COLUMNS), columns(SYMBOL_COLUMNS)


@dataclasses.dataclass(frozen=True)
class GeneMatch:
    """Which vocabulary gene each column of a study is.

    Attributes:
      names: the study's var_names.
      ids: int32 [n_vars], vocabulary id, -1 where no gene matches.
      matched_by: number of columns matched by "id", "symbol" and "alias", or by "ortholog".
      duplicates: gene id -> names of the columns, for genes that several columns match equally well.
      left_out: where a table of orthologs was used: why columns match nothing -> how many.
      species: where a table of orthologs was used: the species of the study, as far as its ids tell.
    """

    names: tuple[str, ...]
    ids: np.ndarray
    matched_by: dict[str, int]
    duplicates: dict[str, list[str]]
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    species: tuple[str, ...] = ()

    @property
    def n_matched(self) -> int:
        return int((self.ids >= 0).sum())

    @property
    def unmatched(self) -> list[str]:
        return [name for name, gene in zip(self.names, self.ids, strict=True) if gene < 0]

    def summary(self) -> str:
        """One line for people: how many matched, by what, and examples of those that did not."""
        how = ", ".join(f"{n:,} by {what}" for what, n in self.matched_by.items() if n)
        line = f"{self.n_matched:,} of {len(self.names):,} genes matched" + (f" ({how})" if how else "")
        unmatched = self.unmatched
        if unmatched:
            more = f" and {len(unmatched) - 5:,} more" if len(unmatched) > 5 else ""
            line += f"; not matched: {', '.join(unmatched[:5])}{more}"
        if self.duplicates:
            line += f"; {len(self.duplicates):,} genes matched by several columns"
        return line


class Vocabulary:
    """An immutable list of genes; the position of a gene is its id in a corpus (0 .. n-1).

    Args:
      gene_id: stable ids, unique: the Ensembl id without version, or the symbol where there is none.
      symbol: gene symbols; default: the ids themselves.
      species: e.g. "human"; default: from the Ensembl prefix, "" where that tells nothing.
      biotype: e.g. "protein_coding"; default "".
      aliases: other names of each gene; default none.

    Raises:
      ValueError: a gene id is empty or occurs twice (named), a field has another length, or a text
        holds a tab, a line break or, in an alias, "|" (they would break the table on disk).
    """

    def __init__(
        self,
        gene_id: Sequence[str],
        symbol: Sequence[str] | None = None,
        species: Sequence[str] | None = None,
        biotype: Sequence[str] | None = None,
        aliases: Sequence[Iterable[str]] | None = None,
    ) -> None:
        self.gene_id: tuple[str, ...] = tuple(strip_version(str(name)) for name in gene_id)
        n = len(self.gene_id)
        self.symbol: tuple[str, ...] = self.gene_id if symbol is None else tuple(map(str, symbol))
        self.species: tuple[str, ...] = tuple(
            map(species_of, self.gene_id) if species is None else map(str, species)
        )
        self.biotype: tuple[str, ...] = ("",) * n if biotype is None else tuple(map(str, biotype))
        self.aliases: tuple[tuple[str, ...], ...] = (
            ((),) * n if aliases is None else tuple(map(tuple, aliases))
        )
        for field in _FIELDS:
            if len(getattr(self, field)) != n:
                raise ValueError(
                    f"vocabulary: {n} gene ids but {len(getattr(self, field))} values of {field}"
                )
        if any(isinstance(a, str) for a in aliases or ()):
            raise ValueError("vocabulary: aliases of a gene are a list of names, not one string")
        if "" in self.gene_id:
            raise ValueError(f"vocabulary: the gene id at position {self.gene_id.index('')} is empty")
        twice = [name for name, times in Counter(self.gene_id).items() if times > 1]
        if twice:
            raise ValueError(
                f"vocabulary: {len(twice)} gene ids occur more than once: {', '.join(twice[:10])}"
            )
        for i, line in enumerate(self._lines()):
            torn = line.count("\t") != len(_FIELDS) - 1 or len(line.splitlines()) != 1
            if torn or "|" in "".join(self.aliases[i]):
                raise ValueError(
                    f"vocabulary: gene {self.gene_id[i]!r} (position {i}) holds a tab, a line break or an "
                    f"alias with '|': {line!r}"
                )

    def _lines(self) -> Iterable[str]:
        for row in zip(self.gene_id, self.symbol, self.species, self.biotype, self.aliases, strict=True):
            yield "\t".join((*row[:4], "|".join(row[4])))

    @functools.cached_property
    def _content(self) -> bytes:
        return "".join(f"{line}\n" for line in ("\t".join(_FIELDS), *self._lines())).encode()

    @functools.cached_property
    def hash(self) -> str:
        """sha256 (64 hex digits) of the table, the same on every machine."""
        return hashlib.sha256(self._content).hexdigest()

    @property
    def short_hash(self) -> str:
        """The first 12 digits of ``hash``."""
        return self.hash[:12]

    def __len__(self) -> int:
        return len(self.gene_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.hash == other.hash

    def __hash__(self) -> int:
        return int(self.hash[:15], 16)

    def __repr__(self) -> str:
        species = Counter(name or "unknown species" for name in self.species)
        return f"Vocabulary({len(self):,} genes: {', '.join(sorted(species))}; {self.short_hash})"

    @property
    def ids(self) -> list[str]:
        """Stable gene ids in order."""
        return list(self.gene_id)

    @property
    def symbols(self) -> list[str]:
        """Gene symbols in order."""
        return list(self.symbol)

    # -- on disk and in JSON

    def to_tsv(self, path: str | pathlib.Path) -> None:
        """Writes the table as tab-separated text; its sha256 is ``hash``."""
        pathlib.Path(path).write_bytes(self._content)

    @classmethod
    def from_tsv(cls, path: str | pathlib.Path) -> Vocabulary:
        """Reads a table with a header: ``gene_id`` and any other fields; further columns are left aside."""
        return cls.parse_tsv(pathlib.Path(path).read_text(encoding="utf-8"), path)

    @classmethod
    def parse_tsv(cls, text: str, path: str | pathlib.Path) -> Vocabulary:
        """As ``from_tsv``, of the table's text; ``path`` stands for it in messages."""
        if not text.strip():
            raise ValueError(f"{path}: empty; a table of genes with the header gene_id is needed")
        lines = text.splitlines()
        head = lines[0].split("\t")
        if "gene_id" not in head:
            raise ValueError(f"{path}: no column gene_id in the header (columns: {', '.join(head)})")
        for number, line in enumerate(lines, 1):
            if line.count("\t") + 1 != len(head):
                raise ValueError(
                    f"{path}, line {number}: {line.count(chr(9)) + 1} fields, the header has {len(head)}"
                )
        fields = (
            "\t".join(lines[1:]).split("\t") if len(lines) > 1 else []
        )  # at once: one list, not one per gene
        columns: dict[str, Any] = {f: fields[head.index(f) :: len(head)] for f in _FIELDS if f in head}
        if "aliases" in columns:
            columns["aliases"] = [tuple(filter(None, names.split("|"))) for names in columns["aliases"]]
        return cls(**columns)

    def to_dict(self) -> dict[str, Any]:
        fields = {field: list(getattr(self, field)) for field in _FIELDS}
        return fields | {"aliases": [list(names) for names in self.aliases]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Vocabulary:
        return cls(**fields)

    # -- look-up

    @functools.cached_property
    def _by_id(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.gene_id)}

    @functools.cached_property
    def _by_symbol(self) -> dict[str, int]:
        return _unambiguous((name, i) for i, name in enumerate(self.symbol) if name not in self._by_id)

    @functools.cached_property
    def _by_alias(self) -> dict[str, int]:
        taken = set(self.symbol)  # also the ambiguous ones: an alias never decides between two symbols
        pairs = ((name, i) for i, names in enumerate(self.aliases) for name in names)
        return _unambiguous((n, i) for n, i in pairs if n not in taken and n not in self._by_id)

    def _find(self, name: str) -> int:
        if strip_version(name) in self._by_id:
            return self._by_id[strip_version(name)]
        for table in (self._by_symbol, self._by_alias):
            if name in table:
                return table[name]
        return -1

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) >= 0

    def id_of(self, name: str) -> int:
        """Vocabulary id of a gene given by stable id, symbol or alias. KeyError names the nearest genes."""
        found = self._find(name)
        if found < 0:
            near = [s for s in self.symbol if s.lower() == name.lower()] or difflib.get_close_matches(
                name, self.symbol, n=3
            )
            raise KeyError(
                f"gene {name!r} is not in the vocabulary of {len(self):,} genes"
                + (f"; nearest: {', '.join(near)}" if near else "")
            )
        return found

    def match(self, var: pd.DataFrame | Sequence[str]) -> GeneMatch:
        """Finds the gene of every column of a study.

        A column is looked up by stable id (``var`` columns such as ensembl_id, gene_ids, feature_id, then
        var_names; version suffix ignored, case kept), else by symbol (gene_symbol, feature_name, ..., then
        var_names), else by alias; names that mean several genes do not match. Where two columns claim one
        gene, the one matched by the stronger key has it; equally strong claims are kept and reported in
        ``duplicates``.

        Args:
          var: ``AnnData.var`` or a list of gene names.
        """
        names, id_columns, symbol_columns = column_names(var)
        ids = np.full(len(names), -1, np.int32)
        matched_by: dict[str, int] = {}
        for what, columns, table in (
            # The id of a gene without Ensembl id is its symbol, so symbols are looked up here too.
            ("id", [[strip_version(v) for v in c] for c in (*id_columns, *symbol_columns)], self._by_id),
            ("symbol", symbol_columns, self._by_symbol),
            ("alias", symbol_columns, self._by_alias),
        ):
            open_columns = np.flatnonzero(ids < 0)
            taken = set(ids.tolist())
            for i in open_columns:
                gene = next((table[column[i]] for column in columns if column[i] in table), -1)
                if gene not in taken:
                    ids[i] = gene
            matched_by[what] = len(open_columns) - int((ids < 0).sum())
        matched = np.flatnonzero(ids >= 0)
        claims: dict[int, list[str]] = defaultdict(list)
        if len(np.unique(ids[matched])) < len(matched):
            for i in matched:
                claims[int(ids[i])].append(names[i])
        duplicates = {self.gene_id[gene]: columns for gene, columns in claims.items() if len(columns) > 1}
        ids.flags.writeable = False
        return GeneMatch(tuple(names), ids, matched_by, duplicates)

    # -- union of studies

    @classmethod
    def from_anndata(cls, studies: Iterable[Any]) -> Vocabulary:
        """The union of the genes of several studies, sorted by gene id; their order does not matter.

        A gene known by symbol only joins the one Ensembl gene that carries that symbol in another study,
        unless a study has them, or two such symbols, as separate columns. A gene has the symbol that most
        studies use, the others become aliases.

        Args:
          studies: AnnData objects, ``var`` tables or lists of gene names.
        """
        symbols: dict[str, Counter[str]] = defaultdict(Counter)  # Ensembl id -> how many studies call it what
        bare: dict[str, set[str]] = defaultdict(set)  # symbol without id -> species of its studies
        apart: set[tuple[str, str]] = set()  # (symbol without id, Ensembl id) that are apart in a study
        owners: dict[str, set[str]] = defaultdict(set)  # symbol -> Ensembl ids that carry it
        contents: list[tuple[set[str], set[str]]] = []
        for study in studies:
            # A DataFrame has a method called var, so it must be told apart first.
            var = study if isinstance(study, pd.DataFrame) else getattr(study, "var", study)
            names, id_columns, symbol_columns = column_names(var)
            with_id: set[str] = set()
            without: set[str] = set()
            for i in range(len(names)):
                gene = next((strip_version(c[i]) for c in id_columns if _is_ensembl(c[i])), "")
                name = next((c[i] for c in symbol_columns if c[i] and not _is_ensembl(c[i])), "")
                if gene and gene not in with_id:
                    with_id.add(gene)
                    symbols[gene][name] += 1
                    owners[name].add(gene)
                elif not gene and name:
                    without.add(name)
            species = Counter(map(species_of, with_id)).most_common(1)
            for name in without:
                bare[name].add(species[0][0] if species else "")
            contents.append((with_id, without))
        for with_id, without in contents:
            # A study that has a gene by id, or by two symbols, means several genes: none of these joins.
            claims = [(name, gene) for name in without for gene in owners[name]]
            times = Counter(gene for _, gene in claims)
            apart |= {(name, gene) for name, gene in claims if gene in with_id or times[gene] > 1}

        genes: dict[str, tuple[str, str, tuple[str, ...]]] = {}
        for name, where in bare.items():
            owner = next(iter(owners[name])) if len(owners[name]) == 1 else ""
            if owner and (name, owner) not in apart and where <= {"", species_of(owner)}:
                continue  # that Ensembl gene under its symbol
            genes[name] = (name, where.pop() if len(where) == 1 else "", ())
        for gene, used in symbols.items():
            ranked = sorted((n for n in used if n), key=lambda n: (-used[n], n)) or [gene]
            genes[gene] = (ranked[0], species_of(gene), tuple(ranked[1:]))
        order = sorted(genes)
        return cls(
            order,
            symbol=[genes[g][0] for g in order],
            species=[genes[g][1] for g in order],
            aliases=[genes[g][2] for g in order],
        )


def _unambiguous(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    table: dict[str, int] = {}
    several: set[str] = set()
    for name, i in pairs:
        if table.setdefault(name, i) != i:
            several.add(name)
    return {name: i for name, i in table.items() if name and name not in several}
