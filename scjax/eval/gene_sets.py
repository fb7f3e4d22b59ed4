"""Gene sets, gene labels, families and regulatory edges: read, checked, matched by name."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

ENSEMBL = re.compile(r"ENS[A-Z]*G\d{6,}")
SIGNS = {"+": 1, "-": -1, "activation": 1, "repression": -1, "stimulation": 1, "inhibition": -1}


def read_gmt(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Gene sets of a GMT file (plain or .gz): name, description, genes, separated by tabs.

    A description that is no address becomes part of the name ("GO:0000012 single strand break repair").
    """
    opener: Any = gzip.open if os.fspath(path).endswith(".gz") else open
    sets: dict[str, list[str]] = {}
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            name, *rest = line.rstrip("\r\n").split("\t")
            if not name and not rest:
                continue
            if len(rest) < 2:
                raise ValueError(
                    f"{os.fspath(path)}, line {number}: a GMT line is a name, a description and genes, "
                    "separated by tabs"
                )
            about = "" if "://" in rest[0] or rest[0].lower() in ("", "na", name.lower()) else f" {rest[0]}"
            if name + about in sets:
                raise ValueError(f"{os.fspath(path)}, line {number}: the set {name!r} is there twice")
            sets[name + about] = list(dict.fromkeys(g for g in rest[1:] if g))
    if not sets:
        raise ValueError(f"{os.fspath(path)} holds no gene set")
    return sets


def read_lists(
    path: str | os.PathLike[str], name: str = "list", gene: str = "symbol"
) -> dict[str, list[str]]:
    """Gene lists of a long table (.tsv, .csv, also .gz): one row a membership, columns ``name`` and
    ``gene``.
    """
    table = _read(path)
    if absent := [c for c in (name, gene) if c not in table]:
        raise KeyError(f"{os.fspath(path)} has no column {absent[0]!r}; it has: {', '.join(table.columns)}")
    table = table.dropna(subset=[name, gene]).astype({name: str, gene: str})
    return {str(n): list(dict.fromkeys(g)) for n, g in table.groupby(name, sort=False)[gene]}


def read_edges(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Regulatory edges of a table (.tsv, .csv, also .gz), as :func:`edges` makes them."""
    return edges(_read(path), os.fspath(path))


def _read(path: str | os.PathLike[str]) -> pd.DataFrame:
    comma = ".csv" in os.path.basename(os.fspath(path)).lower()
    return pd.read_csv(path, sep="," if comma else "\t", keep_default_na=False, na_values=[""])


def edges(table: pd.DataFrame, name: str = "truth") -> pd.DataFrame:
    """Edges as columns ``source``, ``target`` and ``sign`` (1 activates, −1 represses, 0 unknown), each once.

    Source and target are the columns so called, or the first two. The sign is read from a column ``sign``
    (numbers, "+" and "-", or words), or from ``is_stimulation`` and ``is_inhibition`` as in OmniPath, where
    both or neither mean not known. Edges from a gene to itself are left out.
    """
    if table.shape[1] < 2:
        raise ValueError(f"{name}: a table of edges needs two columns, the regulator and its target")
    source, target = ("source", "target") if {"source", "target"} <= set(table) else table.columns[:2]
    if pd.api.types.is_numeric_dtype(table[source]) or pd.api.types.is_numeric_dtype(table[target]):
        raise ValueError(f"{name}: columns {source!r} and {target!r} hold numbers; gene names are needed")
    sign = pd.Series(0, index=table.index)
    if "sign" in table:
        words = table["sign"].map(lambda v: SIGNS.get(str(v).strip().lower(), v))
        numbers = pd.to_numeric(words, errors="coerce")
        if len(odd := table.loc[numbers.isna() & table["sign"].notna(), "sign"]):
            raise ValueError(f"{name}: sign {odd.iloc[0]!r} is neither a number nor one of {sorted(SIGNS)}")
        sign = np.sign(numbers.fillna(0)).astype(int)
    elif {"is_stimulation", "is_inhibition"} <= set(table):
        sign = table["is_stimulation"].astype(int) - table["is_inhibition"].astype(int)
    out = pd.DataFrame({"source": table[source], "target": table[target], "sign": sign}).dropna()
    out = out.astype({"source": str, "target": str})
    out = out[out["source"] != out["target"]]
    # the same edge with different signs: not known
    merged = out.groupby(["source", "target"], sort=False)["sign"].agg(["min", "max"])
    merged["sign"] = np.where(merged["min"] * merged["max"] >= 0, merged["min"] + merged["max"], 0)
    return merged["sign"].clip(-1, 1).reset_index()


def contrast(positive: Iterable[str], negative: Iterable[str]) -> dict[str, int]:
    """Labels 1 and 0 from two lists; genes in both are left out."""
    one, zero = set(positive), set(negative)
    return dict.fromkeys(sorted(one - zero), 1) | dict.fromkeys(sorted(zero - one), 0)


def stem(gene: str) -> str:
    """The family a symbol belongs to by its spelling: the letters before its first digit or hyphen, of more
    than three all but the last.

    FOXP3 and FOXA1 share FOX, RPL3 and RPL27A share RPL. It lumps some genes that are not related and parts
    some that are (HBA1, HBB): a stand-in for where no families are at hand.
    """
    if re.fullmatch(r"C\w+orf\d+.*|LOC\d+|ENS[A-Z]*G\d+.*", gene, re.IGNORECASE):
        return gene  # numbered, not named
    letters = re.split(r"[^A-Za-z]", gene, maxsplit=1)[0].upper()
    return letters[:-1] if len(letters) > 3 else letters or gene


def family_codes(
    genes: Sequence[str], families: Mapping[str, Any] | pd.Series | None
) -> tuple[np.ndarray, str]:
    """Code of the family of each gene, and how families were found. A gene without one is a family of its
    own.
    """
    if families is None:
        names, how = [stem(g) for g in genes], "gene families guessed from symbols"
    else:
        known = pd.Series(families).dropna()
        if known.index.has_duplicates:
            raise ValueError(f"families: {known.index[known.index.duplicated()][0]!r} is there twice")
        found = known.reindex(list(genes))
        if found.isna().all():
            raise ValueError(f"families: none of the genes is among them {_spelling(genes, known.index)}")
        names = [f"\0{g}" if pd.isna(f) else str(f) for g, f in zip(genes, found, strict=True)]
        how = "gene families as given"
    return np.unique(names, return_inverse=True)[1], how


def gene_table(table: Any, name: str) -> pd.DataFrame:
    """A table [gene, dimensions] of finite numbers with a name for each gene, or an error that says what is
    wrong.
    """
    if not isinstance(table, pd.DataFrame):
        raise TypeError(
            f"gene table {name!r} is a {type(table).__name__}; a DataFrame indexed by gene is needed"
        )
    if not table.shape[1] or not all(pd.api.types.is_numeric_dtype(t) for t in table.dtypes):
        raise ValueError(f"gene table {name!r} holds columns that are not numbers, or none at all")
    values = table.to_numpy(np.float32)
    if len(bad := table.index[~np.isfinite(values).all(1)]):
        raise ValueError(
            f"gene table {name!r}: {len(bad)} genes hold NaN or infinite values, the first {bad[0]!r}"
        )
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise ValueError(f"gene table {name!r}: {twice!r} is there twice; give every gene one row")
    if len(values) and (values == values[0]).all():
        raise ValueError(f"gene table {name!r} is constant: every gene has the same vector")
    return pd.DataFrame(values, index=table.index.astype(str))


def in_common(wanted: Collection[str], has: Collection[str], what: str, least: int) -> list[str]:
    """The wanted genes that are there, in order; a ValueError where they are fewer than ``least``."""
    held = set(has)
    found = [g for g in wanted if g in held]
    if len(found) < least:
        raise ValueError(
            f"{what}: only {len(found)} of {len(wanted)} genes are among its {len(held)} names, {least} are "
            f"needed {_spelling(wanted, has)}"
        )
    return found


def _spelling(wanted: Iterable[str], has: Iterable[str]) -> str:
    """What two lists of names look like, to be seen at a glance in a message."""
    sides = [[str(g) for g in names] for names in (wanted, has)]
    pair = [names[:3] for names in sides]
    kinds = [bool(names) and all(ENSEMBL.match(g) for g in names) for names in pair]
    exact = set(sides[0]) & set(sides[1])
    whatever_case = {g.upper() for g in sides[0]} & {g.upper() for g in sides[1]}
    if kinds[0] != kinds[1]:
        hint = "; one side holds Ensembl ids, the other symbols: translate one of them"
    elif len(whatever_case) > len(exact):
        hint = "; they differ in upper and lower case: human and mouse?"
    else:
        hint = ""
    return f"(wanted such as {', '.join(pair[0]) or 'none'}; there are {', '.join(pair[1]) or 'none'}{hint})"
