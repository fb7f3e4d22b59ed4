"""Targets of tasks at the level of genes: what is known of genes, from tables, and which are held out."""

from __future__ import annotations

import pathlib
import zlib
from collections.abc import Mapping

import numpy as np
import pandas as pd

from scjax.config import ConfigError, nearest
from scjax.finetune.tasks import Task
from scjax.genes import Vocabulary

HELD_OUT = 0.2  # of the families


def gene_targets(
    tasks: Mapping[str, Task], sources: Mapping[str, str | None], vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """Path of a buffer -> its value, for the tasks at the level of genes.

    Args:
      tasks: by name; those at the level of cells are passed over.
      sources: ``config.tables``: name of such a task -> a table, .tsv or .csv (also .gz), with a header:
        names of genes in the first column; a column for each of the task's ``size`` values (of "classes" and
        "ordinal" one, the number of the class), empty where it is not known; and, if wanted, ``family``.
        Families, or genes where there are none, are held out one in five, by a hash of their names: they are
        what validation judges.
      vocabulary: genes of the model.

    Raises:
      ConfigError: a task without a table, or a table without a task.
      FileNotFoundError: no such file.
      ValueError: other columns than the task needs, something that is no number or class, a gene twice with
        different targets, no gene of the vocabulary, or none to hold out; says which.
    """
    names = [name for name, task in tasks.items() if task.level == "gene"]
    for name in (given := {n: s for n, s in sources.items() if s}):
        if name not in names:
            raise ConfigError(
                f"config.tables.{name} is not a task of genes;{nearest(name, names)} there is {names}"
            )
    out: dict[str, np.ndarray] = {}
    for name in names:
        if name not in given:
            raise ConfigError(
                f"model.tasks.{name} is of genes and config.tables.{name} names no file: give one with "
                f"--config.tables.{name}=FILE, a table of genes and what is to be predicted of them"
            )
        target, held_out = read_targets(given[name], tasks[name], vocabulary)
        out |= {f"heads/{name}/target": target, f"heads/{name}/held_out": held_out}
    return out


def read_targets(
    path: str | pathlib.Path, task: Task, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """``(target, held_out)`` of one task, see :func:`gene_targets`: float32 [n_genes] of classes, else
    [n_genes, size], NaN where not known; and float32 [n_genes], 1 where held out."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    table = pd.read_csv(path, sep="," if ".csv" in path.suffixes else "\t", dtype=str, keep_default_na=False)
    gene, columns = table.columns[0], [c for c in table.columns[1:] if c != "family"]
    width = 1 if task.categorical else task.size
    if len(columns) != width:
        raise ValueError(f"{path} has {columns} beside {gene!r} and family; the task takes {width} columns")
    values = np.full((len(table), width), np.nan)
    for j, column in enumerate(columns):
        values[:, j] = pd.to_numeric(table[column].replace("", np.nan), errors="coerce")
        odd = np.isnan(values[:, j]) & (table[column] != "").to_numpy()
        if task.kind != "regression":
            least = task.size if task.categorical else 2
            odd |= np.isfinite(values[:, j]) & ~np.isin(values[:, j], range(least))
        if odd.any():
            line = int(np.flatnonzero(odd)[0])
            wanted = "a number" if task.kind == "regression" else f"a class, 0 to {least - 1}"
            raise ValueError(
                f"{path}, line {line + 2}: {column} is {table[column][line]!r}; {wanted} is needed"
            )
    ids = vocabulary.match(table[gene].tolist()).ids
    target, held_out = (
        np.full((len(vocabulary), width), np.nan, np.float32),
        np.zeros(len(vocabulary), np.float32),
    )
    family = table.get("family", table[gene])
    for row in np.flatnonzero((ids >= 0) & np.isfinite(values).any(1)):
        known = target[ids[row]]
        if np.isfinite(known).any() and not np.array_equal(
            known, values[row].astype(np.float32), equal_nan=True
        ):
            raise ValueError(
                f"{path}, line {row + 2}: {table[gene][row]} stands there twice with other values"
            )
        target[ids[row]] = values[row]
        name = family[row] or table[gene][row]
        held_out[ids[row]] = zlib.crc32(name.encode()) / 2**32 < HELD_OUT
    judged = np.isfinite(target).any(1)
    if not judged.any() or held_out[judged].min() == 1 or held_out[judged].max() == 0:
        raise ValueError(
            f"{path}: {int(judged.sum())} of its {len(table):,} genes, {int(held_out.sum())} of them held "
            "out, are in the vocabulary; some to learn from and some to judge by are needed"
        )
    return target[:, 0] if task.categorical else target, held_out
