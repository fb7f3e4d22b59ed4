"""Batches of sets: control cells beside cells of one condition each, for models of perturbations.

A set is ``set_size`` control cells and as many cells of a condition in the same context (cell line, donor,
...). Which of them stand side by side means nothing: no cell is measured before and after. What is in a batch
follows from (cells, settings, seed, step) alone, so that the cursor is the step, and any number of processes
reads the same.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scjax.loader.buckets import round_up
from scjax.loader.conditions import UNNAMED, Conditions
from scjax.loader.order import permutation
from scjax.types import CellBatch

if TYPE_CHECKING:
    import anndata as ad

FORMAT = "scjax-sets-1"
Asked = tuple[str, float, str]  # condition, dose (0 for none), context ("" where there is but one)


class PerturbedCells:
    """Cells of an experiment in memory, each with its condition.

    Attributes:
      panel: int32 [P], vocabulary ids of the measured genes, in ascending order; ``names``: their columns.
      counts: float32 [cells, P], sparse.
      depth: float32 [cells], total counts over all genes, those outside the vocabulary as well.
      controls: context -> rows of its unperturbed cells.
      groups: (condition, dose, context) -> rows.
      written: the dose of each of them as ``obs`` has it; "" without doses.
      labels, categories: label -> int32 [cells], codes, -1 for a category that the model was not trained on;
        label -> names of the codes.
      dropped: why cells are left out -> how many.
    """

    def __init__(
        self,
        cells: ad.AnnData,
        conditions: Conditions,
        *,
        perturbation_key: str = "perturbation",
        context_key: str | None = None,
        dose_key: str | None = None,
        labels: Sequence[str] = (),
        categories: Mapping[str, Sequence[str]] | None = None,
        layer: str | None = None,
    ):
        """Args:
        cells: raw counts, perturbed and control.
        conditions: how they are named.
        perturbation_key, context_key, dose_key: columns of ``obs``.
        labels: further columns of ``obs`` that the model is told, of the control cells.
        categories: label -> names of its codes; those of the cells where it is not given.
        layer: where the counts are: None for X, "raw", or the name of a layer.

        Raises:
          KeyError: no such column; lists those there are.
          ValueError: no control cells, or none in a context that has perturbed ones; no gene in the
            vocabulary; a label that ``categories`` does not have; a dose that is no number above 0, or
            written in two ways.
        """
        from scjax.corpus.sources import open_source

        source = open_source(cells, layer=layer)
        obs, where = source.obs, source.where
        for key in (perturbation_key, context_key, dose_key, *labels):
            if key is not None and key not in obs:
                raise KeyError(f"{where}: no obs column {key!r}; there are {list(obs.columns)}")
        if (dose_key is not None) != conditions.dosed:
            raise ValueError("conditions that are dosed need dose_key, and the other way round")
        ids = conditions.vocabulary.match(source.var).ids
        known = np.flatnonzero(ids >= 0)
        if not len(known):
            raise ValueError(f"{where}: no gene is in the vocabulary of {len(conditions.vocabulary)} genes")
        self.panel = np.unique(ids[known]).astype(np.int32)
        # two columns that are one gene are added up
        place = sparse.csr_matrix(
            (np.ones(len(known)), (known, np.searchsorted(self.panel, ids[known]))),
            shape=(len(ids), len(self.panel)),
        )
        parts = [rows for _, rows in source.counts()]
        self.depth = np.concatenate([np.asarray(rows.sum(1)).ravel() for rows in parts]).astype(np.float32)
        self.counts: Any = sparse.csr_matrix(
            sparse.vstack([rows @ place for rows in parts]), dtype=np.float32
        )
        self.conditions, self.where = conditions, where
        self.keys = {"name": perturbation_key, "dose": dose_key, "context": context_key}
        column = dict(zip(ids[known][::-1].tolist(), known[::-1].tolist(), strict=True))
        self.names = [str(source.var.index[column[gene]]) for gene in self.panel.tolist()]
        names = _text(obs, perturbation_key).str.strip()
        canonical = {n: conditions.canonical(n) for n in set(names) if n.lower() not in UNNAMED}
        context, said = _text(obs, context_key), _text(obs, dose_key)
        dose = pd.to_numeric(said, errors="coerce") if dose_key else pd.Series(0.0, obs.index)
        table = pd.DataFrame(
            {
                "name": names.map(canonical).to_numpy(object),
                "dose": dose.to_numpy(float),
                "context": context.to_numpy(object),
            }
        )
        table.loc[table["name"] == conditions.control, "dose"] = 0.0
        named = table["name"].notna() & (~table["context"].str.lower().isin(UNNAMED) | (context_key is None))
        whole = named & (self.depth > 0)
        why = "no condition or context named, or no counts"
        self.dropped = {why: int((~whole).sum())} if (~whole).any() else {}
        grouped = table[whole].groupby(["name", "dose", "context"], dropna=False, sort=True).indices
        at = np.flatnonzero(whole)
        every = {(str(n), float(d), str(c)): at[rows] for (n, d, c), rows in grouped.items()}
        self.controls = {c: rows for (n, _, c), rows in every.items() if n == conditions.control}
        self.groups: dict[Asked, np.ndarray] = {k: r for k, r in every.items() if k[0] != conditions.control}
        if not self.controls:
            raise ValueError(
                f"{where}: no control cells: none in obs[{perturbation_key!r}] is called "
                f"{conditions.control!r} (there are {', '.join(sorted(canonical)[:6])}, ...)"
            )
        self.written: dict[Asked, str] = {}
        for one, rows in self.groups.items():
            texts = sorted(set(said.iloc[rows]))
            said_of = f"{where}: obs[{dose_key!r}] of cells of {one[0]!r} is {texts[0]!r}"
            if dose_key and not 0 < one[1] < np.inf:
                raise ValueError(f"{said_of}; doses are numbers above 0")
            if len(texts) > 1:
                raise ValueError(f"{said_of} and {texts[1]!r}, which is one dose; write it in one way")
            self.written[one] = texts[0]
        if lost := sorted({c for _, _, c in self.groups} - set(self.controls)):
            raise ValueError(
                f"{where}: perturbed cells but no control cells where obs[{context_key!r}] is {lost[0]!r} "
                f"({len(lost)} such): what they were before is not known; leave them out"
            )
        self.labels: dict[str, np.ndarray] = {}
        self.categories: dict[str, list[str]] = {}
        for name in labels:
            text = obs[name].astype(str)
            there = sorted(set(text)) if categories is None else list(categories[name])
            if absent := sorted(set(text) - set(there)):
                raise ValueError(
                    f"{where}: obs[{name!r}] has {absent[0]!r}, which the model does not know; it knows "
                    f"{there[:8]}"
                )
            self.categories[name] = there
            self.labels[name] = pd.Categorical(text, categories=there).codes.astype(np.int32)

    def training(self, keep: np.ndarray, kept: Sequence[Asked] = ()) -> PerturbedCells:
        """Those that may be learned from, bool [cells].

        The names among them are ``conditions.seen``, but those of ``kept`` alone, conditions that are not
        trained on (for validation); the categories of labels are those of the control cells that stand
        beside what is trained on. A learned table has rows of these and no others, see :meth:`check`.
        Contexts that have no control cells among them keep theirs: they are where one predicts from.
        """
        here = copy.copy(self)
        ours = {key: rows[keep[rows]] for key, rows in self.groups.items()}
        here.groups = {key: rows for key, rows in ours.items() if len(rows)}
        here.controls = {
            context: rows[keep[rows]] if keep[rows].any() else rows for context, rows in self.controls.items()
        }
        learned = set(here.groups) - set(kept)
        seen = tuple(sorted({name for name, _, _ in learned}))
        here.conditions = dataclasses.replace(self.conditions, seen=seen)
        beside = [here.controls[context] for context in sorted({context for _, _, context in learned})]
        here.labels, here.categories = {}, {}
        for name, codes in self.labels.items():
            used = np.setdiff1d(codes[np.concatenate(beside)] if beside else [], -1).astype(int)
            code = np.full(len(self.categories[name]) + 1, -1, np.int32)  # the last is that of -1
            code[used] = np.arange(len(used))
            here.labels[name] = code[codes]
            here.categories[name] = [self.categories[name][i] for i in used]
        vars(here).pop("hash", None)
        vars(here).pop("length", None)
        return here

    def check(self, one: Asked, wanted: Sequence[str] = ()) -> None:
        """Raises where a model cannot be told a condition and its control cells.

        Raises:
          KeyError, ValueError: see :meth:`Conditions.read`; no control cells in the context, or some of a
            category of a wanted label that is not in training.
        """
        name, dose, context = one
        self.conditions.read(name, dose, wanted=wanted)
        if context not in self.controls:
            raise ValueError(
                f"{self.where}: no control cells in {context!r} to predict {name!r} from; there are some in "
                f"{sorted(self.controls)[:8]}"
            )
        for label, codes in self.labels.items():
            if label in wanted and (codes[self.controls[context]] < 0).any():
                place = f" in {context!r}" if context else ""
                raise KeyError(
                    f"condition {name!r}{place}: control cells have a {label!r} that was never seen in "
                    f"training, which knows {self.categories[label][:8]}: a learned table has no row for it. "
                    "Do not tell the model this label, or train on some of it"
                )

    def table(self, asked: Sequence[Asked]) -> pd.DataFrame:
        """The columns of ``obs`` that say of what condition a cell is, a row for each of ``asked``."""
        rows = [(name, self.written.get((name, dose, c), str(dose or "")), c) for name, dose, c in asked]
        table = pd.DataFrame(rows, columns=["name", "dose", "context"])
        return pd.DataFrame({key: table[what] for what, key in self.keys.items() if key is not None})

    @functools.cached_property
    def hash(self) -> str:
        """Of counts, conditions and panel; 12 digits."""
        digest = hashlib.sha256()
        for array in (self.counts.data, self.counts.indices, self.counts.indptr, self.depth, self.panel):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(repr([(*k, r.tolist()) for k, r in (self.groups | self._as_groups()).items()]).encode())
        return digest.hexdigest()[:12]

    def _as_groups(self) -> dict[Asked, np.ndarray]:
        return {(self.conditions.control, 0.0, c): rows for c, rows in self.controls.items()}

    def batch(
        self,
        asked: Sequence[Asked],
        of: np.ndarray,
        rows: np.ndarray,
        real: np.ndarray,
        sets: np.ndarray | None = None,
    ) -> CellBatch:
        """Control cells, what is done to them, and cells to which it was done.

        Args:
          asked: conditions.
          of: int [B], which of them a row is of.
          rows: int [B], the control cell of each row; -1 for a row that fills the batch.
          real: int [B], its perturbed cell; -1 where there is none to compare with.
          sets: int [B], the set of each row; None where that is its condition.

        Returns:
          The control cells as a :class:`CellBatch`; see :class:`Sets` for labels and values.
        """
        control = np.maximum(rows, 0)
        first, n = self.counts.indptr[control], np.diff(self.counts.indptr)[control] * (rows >= 0)
        slot = np.arange(self.length)
        used = slot < n[:, None]
        at = np.where(used, first[:, None] + slot, 0)
        told = [self.conditions.read(name, dose) for name, dose, _ in asked]
        known = {key: np.stack([one[key] for one in told])[of] for key in told[0]}
        label = {"perturbation": known.pop("perturbation").astype(np.int32)}
        label |= {name: codes[control] for name, codes in self.labels.items()}
        cells = self.counts[np.maximum(real, 0)].toarray()
        value = {key: np.ascontiguousarray(v, np.float32) for key, v in known.items() if v.shape[1]}
        value["perturbed_count"] = np.where((real >= 0)[:, None], cells, 0).astype(np.float32)
        value["perturbed_depth"] = np.where(real >= 0, self.depth[np.maximum(real, 0)], 0).astype(np.float32)
        return CellBatch(
            gene_id=np.where(used, self.panel[self.counts.indices[at]], -1).astype(np.int32),
            count=np.where(used, self.counts.data[at], 0).astype(np.float32),
            depth=np.where(rows >= 0, self.depth[control], 0).astype(np.float32),
            n_genes=n.astype(np.int32),
            row=control.astype(np.uint32),
            label=label | {"set": (of if sets is None else sets).astype(np.int32)},
            value=value,
            weight=(rows >= 0).astype(np.float32),
        )

    @functools.cached_property
    def length(self) -> int:
        """Gene slots L of a batch: enough for every control cell."""
        rows = np.concatenate(list(self.controls.values()))
        return round_up(int(np.diff(self.counts.indptr)[rows].max()))


class Sets:
    """Batches for training, in an order that depends on nothing but cells, settings, seed and step.

    Every condition comes once before any comes again, whatever its number of cells. ``iter(sets)`` gives
    :class:`CellBatch` of this process's rows for ever. Each row is a control cell; beside what such a batch
    holds it has

    - label "set" int32 [B], which set of the batch it is of, and "perturbation", the code of the condition;
    - value "perturbed_count" float32 [B, P] and "perturbed_depth" [B], the raw counts of the perturbed cell
      in the genes of the panel, and its depth;
    - value "targets", "features", "dose", see :meth:`Conditions.read`.
    """

    def __init__(
        self,
        cells: PerturbedCells,
        batch_size: int,
        set_size: int,
        *,
        conditions: Sequence[Asked] | None = None,
        wanted: Sequence[str] = (),
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Args:
        cells: the experiment.
        batch_size: rows of a global batch, of which ``set_size`` are a set.
        conditions: those to take, of ``cells.groups``; None for all.
        wanted: what the model reads of conditions, see :meth:`Conditions.read`.
        process_index, process_count: which share of each batch is wanted.

        Raises:
          ValueError, KeyError: sizes that do not divide one another; conditions without cells, or of which
            the model is not told what it reads.
        """
        self.cells, self.batch_size, self.set_size, self.seed = cells, batch_size, set_size, seed
        self.asked = sorted(cells.groups) if conditions is None else list(conditions)
        if not self.asked:
            raise ValueError(f"{cells.where}: no perturbed cells to learn from")
        for one in self.asked:
            if one not in cells.groups:
                raise KeyError(f"{cells.where}: no cells of condition {one}")
            cells.check(one, wanted)
        if set_size < 2 or batch_size % set_size or batch_size % process_count:
            raise ValueError(
                f"batch_size = {batch_size} must hold whole sets of set_size = {set_size} (at least 2) and "
                f"split over {process_count} processes"
            )
        size = batch_size // process_count
        self.here = slice(process_index * size, (process_index + 1) * size)

    def __getitem__(self, step: int) -> CellBatch:
        """The batch of a step."""
        each, n = self.batch_size // self.set_size, len(self.asked)
        chosen: list[Asked] = []
        rows: list[np.ndarray] = []
        real: list[np.ndarray] = []
        for number in range(step * each, (step + 1) * each):
            which = int(permutation("conditions", self.seed, number // n, n=n)[number % n])
            one = self.asked[which]
            chosen.append(one)
            for into, pool in ((rows, self.cells.controls[one[2]]), (real, self.cells.groups[one])):
                kind = "control" if into is rows else "perturbed"
                mixed = permutation("set", kind, self.seed, number, n=len(pool))
                into.append(pool[np.resize(mixed, self.set_size)])  # too few: they come again
        of = np.repeat(np.arange(each), self.set_size)
        here = self.here
        return self.cells.batch(chosen, of[here], np.concatenate(rows)[here], np.concatenate(real)[here])

    def __iter__(self) -> SetIterator:
        return SetIterator(self)

    def __str__(self) -> str:
        cells = self.cells
        return (
            f"{len(self.asked)} conditions in {len(cells.controls)} context(s), {len(cells.panel)} genes; "
            f"{self.batch_size // self.set_size} sets of {self.set_size} cells a batch"
        )

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        """All that decides what is in the batch of a step."""
        conditions = hashlib.sha256(repr(self.asked).encode()).hexdigest()[:12]
        return {
            "format": FORMAT,
            "cells": self.cells.hash,
            "conditions": conditions,
            "batch_size": self.batch_size,
            "set_size": self.set_size,
            "seed": self.seed,
        }


class SetIterator:
    """Batches one after the other, and the cursor of the next."""

    def __init__(self, sets: Sets):
        self._sets, self._step = sets, 0

    def __iter__(self) -> SetIterator:
        return self

    def __next__(self) -> CellBatch:
        batch = self._sets[self._step]
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {**self._sets.recipe, "step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a cursor. Raises ValueError where it is of other cells or settings; names them."""
        now = self._sets.recipe
        changed = [f"{k} was {state.get(k)!r} and is {v!r}" for k, v in now.items() if state.get(k) != v]
        if changed:
            raise ValueError(f"the data cursor was saved with other settings: {'; '.join(changed)}")
        self._step = int(state["step"])

    def close(self) -> None:
        pass


def predict_cells(
    predict: Callable[[CellBatch], Any],
    cells: PerturbedCells,
    asked: Sequence[Asked],
    *,
    batch_size: int,
    set_size: int,
    wanted: Sequence[str] = (),
    max_cells: int = 256,
) -> ad.AnnData:
    """Predicted cells of conditions, and the control cells that they start from.

    Args:
      predict: batch -> float32 [B, P], expression as log(1 + counts per ten thousand).
      cells: where control cells are taken from.
      asked: conditions, seen or not; their contexts must have control cells.
      batch_size, set_size: as in training; a set that is not full has rows of weight 0.
      wanted: what the model reads of conditions, see :meth:`Conditions.read`.
      max_cells: control cells of a context, at most.

    Returns:
      Cells x measured genes on the scale of ``predict``, with the obs columns of ``cells``: what
      :func:`scjax.eval.perturbation` takes. The control cells come last, as they are.

    Raises:
      KeyError, ValueError: conditions that the model cannot be told, see :meth:`PerturbedCells.check`.
    """
    import anndata as ad

    blocks, obs = [], []
    start: dict[str, np.ndarray] = {}
    sets = (np.arange(batch_size) // set_size).astype(np.int32)
    for one in asked:
        cells.check(one, wanted)
        context = one[2]
        rows = cells.controls[context]
        rows = start[context] = rows[np.sort(permutation("asked", context, n=len(rows))[:max_cells])]
        for first in range(0, len(rows), batch_size):
            here = rows[first : first + batch_size]
            padded = np.pad(here, (0, batch_size - len(here)), constant_values=-1)
            nowhere = np.full(batch_size, -1)
            batch = cells.batch([one], np.zeros(batch_size, int), padded, nowhere, sets)
            blocks.append(np.asarray(predict(batch), np.float32)[: len(here)])
        obs += [one] * len(rows)
    for context, rows in start.items():
        blocks.append(np.log1p(cells.counts[rows].toarray() * (1e4 / cells.depth[rows])[:, None]))
        obs += [(cells.conditions.control, 0.0, context)] * len(rows)
    table = cells.table(obs).set_axis([f"p{i}" for i in range(len(obs))])
    return ad.AnnData(np.concatenate(blocks), table, pd.DataFrame(index=cells.names))


def _text(obs: pd.DataFrame, key: str | None) -> pd.Series:
    """A column as :mod:`scjax.eval` reads it; "" where nothing is written, or for no column."""
    if key is None:
        return pd.Series("", obs.index, object)
    return obs[key].astype(object).map(lambda v: "" if pd.isna(v) else str(v)).astype(object)
