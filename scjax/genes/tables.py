"""Values of genes from files that people have: vectors (gene2vec, protein language models) and medians.

A file names its genes; a :class:`~scjax.genes.Vocabulary` says which of its own they are, by id, symbol or
alias as for the columns of a study. Nothing in a file is ever executed.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from scjax.genes.vocabulary import Vocabulary

KINDS = ".npz (arrays names and vectors), .npy, .tsv, .csv, or word2vec text (.txt, .vec)"


@dataclasses.dataclass(frozen=True)
class GeneValues:
    """One value or vector for each gene that a file knows.

    Attributes:
      names: as the file has them; None if it has none and its rows are in the order of the vocabulary.
      values: float32 [n, E] vectors, or float64 [n] medians.
      source: the file.
    """

    names: tuple[str, ...] | None
    values: np.ndarray
    source: str


@dataclasses.dataclass(frozen=True)
class MatchedValues:
    """The values of the genes of a vocabulary.

    Attributes:
      values: [n_genes, ...], 0 where the gene has none.
      known: bool [n_genes].
      summary: one line for people.
    """

    values: np.ndarray
    known: np.ndarray
    summary: str


# ---------------------------------------------------------------------- reading
def read_vectors(path: str | pathlib.Path) -> GeneValues:
    """One vector a gene.

    Args:
      path: ``.npz`` with the arrays ``names`` [n] and ``vectors`` [n, E]; ``.npy`` [n, E] with its names,
        one a line, in the file of the same name but ``.txt``, or without names, in the vocabulary's order;
        ``.tsv`` or ``.csv`` whose first column is names, with or without a header; or text as word2vec and
        gene2vec write it: a name and its numbers a line, separated by blanks, after an optional line "n E".

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, no rows, rows of unequal length, something that is no number, a name
        twice with different vectors; says where.
    """
    path = _existing(path)
    if path.suffix == ".npz":
        names, values = _npz(path)
    elif path.suffix == ".npy":
        values = _array(path)
        beside = path.with_suffix(".txt")
        names = None
        if beside.is_file():
            names = [line.strip() for line in beside.read_text(encoding="utf-8").splitlines() if line.strip()]
            if len(names) != len(values):
                raise ValueError(f"{beside} has {len(names)} names for the {len(values)} rows of {path.name}")
    elif path.suffix in (".tsv", ".csv"):
        names, values = _rows(path, _separated(path))
    elif path.suffix in (".txt", ".vec", ".w2v"):
        names, values = _rows(path, _blank_separated(path))
    else:
        raise ValueError(f"{path}: vectors of genes are read from {KINDS}")
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"{path} holds an array of shape {values.shape}; one vector a gene, [n, E], is needed"
        )
    values = np.ascontiguousarray(values, np.float32)
    _finite(path, names, values)
    return GeneValues(*_once(path, names, values), str(path))


def write_vectors(
    path: str | pathlib.Path,
    names: Sequence[str],
    vectors: np.ndarray,
    about: dict[str, object] | None = None,
) -> None:
    """One vector a gene as ``.npz``, for :func:`read_vectors`; ``about`` says as JSON how they were made."""
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or len(vectors) != len(names) or not np.isfinite(vectors).all():
        raise ValueError(f"vectors are finite numbers [{len(names)}, E], one row a name; got {vectors.shape}")
    with pathlib.Path(path).open("wb") as file:  # numpy would add .npz to a name that has it not
        np.savez(file, names=np.array(names, str), vectors=vectors, about=np.array(json.dumps(about or {})))


def read_medians(path: str | pathlib.Path) -> GeneValues:
    """One positive number a gene: ``.json``, {name: number}, or ``.tsv`` / ``.csv`` of name and number.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, something that is no positive number, a name twice; says where.
    """
    path = _existing(path)
    if path.suffix == ".json":
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path} holds a {type(given).__name__}; {{name: median}} is needed")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{path}: the median of {name!r} is {value!r}, not a number")
        names, values = list(given), np.array(list(given.values()), np.float64)[:, None]
    elif path.suffix in (".tsv", ".csv"):
        names, values = _rows(path, _separated(path))
    else:
        raise ValueError(
            f"{path}: medians of genes are read from .json, .tsv or .csv"
            + ("; scjax.interop.read_dictionary reads a plain pickle" if path.suffix == ".pkl" else "")
        )
    if values.shape[1:] != (1,) or not len(values):
        raise ValueError(f"{path} holds {values.shape} numbers; one median a gene is needed")
    _finite(path, names, values)
    for name, value in zip(names, values[:, 0], strict=True):
        if value <= 0:
            raise ValueError(f"{path}: the median of {name!r} is {value:g}; a median of counts is positive")
    kept, values = _once(path, names, values)
    return GeneValues(kept, values[:, 0], str(path))


def match_values(given: GeneValues, vocabulary: Vocabulary) -> MatchedValues:
    """The values of the genes of a vocabulary, found by id, symbol or alias.

    Where several rows of the file are one gene of the vocabulary (two old names, say), the first has it.

    Raises:
      ValueError: no gene in common, or, for a file without names, another number of rows than genes.
    """
    n, values = len(vocabulary), given.values
    if given.names is None:
        if len(values) != n:
            raise ValueError(
                f"{given.source} has {len(values):,} rows and no names, so they must be the {n:,} genes of "
                f"the vocabulary in its order; put the names, one a line, in "
                f"{pathlib.Path(given.source).with_suffix('.txt').name} beside it"
            )
        return MatchedValues(values, np.ones(n, bool), f"{given.source}: {n:,} genes, in the order given")
    match = vocabulary.match(given.names)
    if not match.n_matched:
        raise ValueError(
            f"{given.source} has no gene in common with the vocabulary: it names {_some(given.names)}; the "
            f"vocabulary has {_some(vocabulary.ids)} ({_some(vocabulary.symbols)})"
        )
    out = np.zeros((n, *values.shape[1:]), values.dtype)
    rows = np.flatnonzero(match.ids >= 0)[::-1]  # backwards, so that of several rows the first one stays
    out[match.ids[rows]] = values[rows]
    known = np.zeros(n, bool)
    known[match.ids[rows]] = True
    how = ", ".join(f"{count:,} by {what}" for what, count in match.matched_by.items() if count)
    line = f"{given.source}: {int(known.sum()):,} of {n:,} genes ({how})"
    if not known.all():
        line += f"; without: {_some([vocabulary.symbols[i] for i in np.flatnonzero(~known)[:4]])}"
    if match.duplicates:
        gene, twins = next(iter(match.duplicates.items()))
        line += (
            f"; {len(match.duplicates):,} genes had several rows, the first is taken ({gene}: {_some(twins)})"
        )
    return MatchedValues(out, known, line)


# ------------------------------------------------------------------- kinds of file
def _existing(path: str | pathlib.Path) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _npz(path: pathlib.Path) -> tuple[list[str], np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            there = list(file.keys())
            if not {"names", "vectors"} <= set(there):
                raise ValueError(f"{path} holds the arrays {there}; names and vectors are needed")
            names, values = file["names"], file["vectors"]
    except (ValueError, OSError, EOFError) as error:
        raise _unread(path, error) from None
    if names.dtype.kind not in "US" or names.ndim != 1 or len(names) != len(values):
        raise ValueError(
            f"{path}: names is {names.dtype}{list(names.shape)}, vectors {values.dtype}{list(values.shape)}; "
            "one text a row of vectors is needed"
        )
    text = names.astype(str) if names.dtype.kind == "U" else np.char.decode(names, "utf-8")
    return text.tolist(), _numbers(path, values)


def _array(path: pathlib.Path) -> np.ndarray:
    try:
        return _numbers(path, np.load(path, allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise _unread(path, error) from None


def _unread(path: pathlib.Path, error: Exception) -> Exception:
    if str(path) in str(error):
        return error
    if "pickle" in str(error):  # numpy's advice is to run what is in the file
        return ValueError(
            f"{path} is no array of numpy, or holds Python objects, which are not read; text is saved as "
            "np.array(names, dtype=str)"
        )
    return ValueError(f"{path} cannot be read: {error}")


def _numbers(path: pathlib.Path, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds {values.dtype}; numbers are needed")
    return values


def _separated(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a .tsv or .csv, without its header if it has one."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        for first, fields in enumerate(reader):
            if first == 0 and _is_header(fields):
                continue
            if fields:
                yield reader.line_num, fields


def _blank_separated(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
                continue  # how many rows and columns follow
            if fields:
                yield number, fields


def _is_header(fields: list[str]) -> bool:
    """Names of columns, or the numbers of columns that pandas writes in their stead."""
    columns = fields[1:]
    numbered = not fields[:1] or not fields[0].strip() or len(columns) > 1
    counted = numbered and columns == [str(i) for i in range(len(columns))]
    return bool(columns) and (counted or not any(_is_number(column) for column in columns))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rows(path: pathlib.Path, lines: Iterable[tuple[int, list[str]]]) -> tuple[list[str], np.ndarray]:
    names: list[str] = []
    values: list[np.ndarray] = []
    try:
        for number, (name, *fields) in lines:
            if values and len(fields) != len(values[0]):
                raise ValueError(
                    f"{path}, line {number} ({name}): {len(fields)} numbers, the lines before have "
                    f"{len(values[0])}"
                )
            try:
                values.append(np.array([float(field) for field in fields]))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} ({name}): {error}") from None
            names.append(name.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from error
    if not values or not len(values[0]):
        raise ValueError(f"{path} holds no rows of a name and its numbers")
    return names, np.stack(values)


def _finite(path: pathlib.Path, names: Sequence[str] | None, values: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        who = f"row {row}" if names is None else f"{names[row]!r} (row {row})"
        value = "NaN" if math.isnan(values[row, column]) else "infinite"
        raise ValueError(
            f"{path}: the value of {who} in column {column} is {value}; {len(bad):,} are not finite"
        )


def _once(
    path: pathlib.Path, names: Sequence[str] | None, values: np.ndarray
) -> tuple[tuple[str, ...] | None, np.ndarray]:
    """Without repetitions of a row; the same name with other values is an error."""
    if names is None:
        return None, values
    first: dict[str, int] = {}
    for row, name in enumerate(names):
        if not name:
            raise ValueError(f"{path}: row {row} has no name")
        if not np.array_equal(values[first.setdefault(name, row)], values[row]):
            raise ValueError(
                f"{path}: {name!r} stands there twice with different values (rows {first[name]}, {row})"
            )
    kept = list(first.values())
    return tuple(first), values if len(kept) == len(values) else values[kept]
