"""The loader: what a training run asks for, checked, and turned into an iterator of batches."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from scjax.corpus.format import index_dtype
from scjax.corpus.panels import panel_of
from scjax.corpus.reader import PartReader, ShardCache
from scjax.loader.buckets import batch_lengths, choose_lengths, round_up
from scjax.loader.genes import GeneTables
from scjax.loader.order import Order, default_block, default_lanes, random_bits
from scjax.loader.weights import Spec, Weights, check_spec, describe

if TYPE_CHECKING:
    import grain

    from scjax.corpus import Corpus, Part
    from scjax.corpus.mixture import Mixture
    from scjax.genes import Vocabulary

STATE_FORMAT = "scjax-loader-2"
MAX_OVER_READ = 4.0  # times as much as without weights: more is warned about
_SMALL = 2**26  # elements of a corpus that costs next to nothing however it is read
_SLICES, _SLICE = 64, 4096  # so many slices of so many cells stand for all when bucket lengths are chosen
_WINDOWS = 64  # that stand for all when the over-read is found


class _Readers(Sequence[PartReader]):
    """The readers of the parts, opened when they are needed: a corpus has hundreds of parts."""

    def __init__(self, parts: Sequence[Part]):
        self._parts, self._shards = parts, ShardCache()
        self._open: dict[int, PartReader] = {}

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, which: int) -> PartReader: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[PartReader]: ...
    def __getitem__(self, which: int | slice) -> PartReader | Sequence[PartReader]:
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(len(self)))]
        if which not in self._open:  # two threads may both open it: one of the two is then kept
            self._open[which] = PartReader(self._parts[which], self._shards)
        return self._open[which]


class Loader:
    """Batches of a corpus in an order that depends on nothing but the corpus, the seed and the step.

    ``iter(loader)`` gives a ``grain.DatasetIterator`` of ``CellBatch`` of numpy arrays: the rows of the
    global batch that belong to this process. Every cell of the split comes exactly once an epoch, unless
    ``weights`` or ``epoch_cells`` ask for something else; the last batch of an epoch is filled up with rows
    of weight 0. ``scjax.loader.order`` says what holds. ``get_state`` of the iterator is a small dict that
    JSON can hold, the same on every process, and says where the *next* batch comes from; ``set_state``
    continues there, also on another number of processes, at the cost of one window per lane.

    Attributes:
      batch_size: rows of the global batch.
      local_batch_size: rows of this process's share of it.
      steps_per_epoch: batches of an epoch: of every cell once, or of ``epoch_cells`` draws.
      bucket_lengths: the values L takes. All processes use the same one at the same step.
      labels: names of the label columns in a batch.
      panels: name -> ``Panel`` of the values in a batch.
      order: the ``Order`` of the rows.
      sparse_dtypes: of the genes and counts of a ``SparseBatch``: as narrow as the corpus stores them.
      luts, lut_of_part: int32 [k, genes] and int64 [parts], from the genes of a part to those of a batch; see
        ``GeneTables``.
      code_maps: label -> for each part, int32 array from its codes to those of ``corpus.columns``, or None
        where they are the same. The last entry stands for -1, so that ``map[codes]`` is all there is to do.
    """

    def __init__(
        self,
        corpus: Corpus | Mixture,
        batch_size: int,
        *,
        seed: int = 0,
        split: str = "train",
        lanes: int | None = None,
        window: int = 1024,
        block: int | None = None,
        group_lengths: bool = False,
        max_genes: int | None = None,
        n_buckets: int = 3,
        labels: Sequence[str] | None = None,
        values: Sequence[str] | None = (),
        shuffle: bool = True,
        epochs: int | None = None,
        vocabulary: Vocabulary | None = None,
        weights: Spec | None = None,
        weight_level: str = "auto",
        epoch_cells: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
        sparse: bool = False,
    ):
        """Args:
        corpus: where the cells are; a ``Mixture`` of several as well. The shares of a mixture are weights of
          its column "corpus" in the training split.
        batch_size: rows of a global batch, over all processes.
        seed: decides the order, and which genes ``max_genes`` keeps.
        split: "train" or "validation".
        lanes: number of virtual lanes, a multiple of ``process_count`` and a divisor of ``batch_size``. By
          default the largest power of two, at most 64, that divides ``batch_size``, whatever the number of
          processes. More lanes mix cells better and need more memory.
        window: rows of each lane that are held and shuffled in memory. Memory is about lanes x window x
          genes per cell x 4 bytes over all processes: half a gigabyte for 64 lanes and 1,842 genes.
        block: neighbouring rows that are read together; by default 1024, less for small corpora, and 64
          where the corpus was built without shuffling its cells.
        group_lengths: put cells with about as many expressed genes into the same batch, which saves
          padding. Which lengths come when is random.
        max_genes: cells with more expressed genes keep a uniform random subset of this many, another one
          each epoch; ``depth`` stays that of the whole cell.
        n_buckets: into how many different lengths L batches are padded, at most.
        labels: columns to put into ``CellBatch.label``; None means all that the corpus has.
        values: what to put into ``CellBatch.value``, of ``corpus.values``: float32 [B] of a column of obs,
          [B, features] of a matrix, NaN where missing and in rows that only fill the batch. None means all.
        shuffle: False visits the rows of each lane as they are stored.
        epochs: stop after this many; None goes on for ever.
        vocabulary: give genes the ids of this vocabulary rather than those of the corpus; genes that it
          does not have are dropped, and still count in ``depth``.
        weights: column -> how often its categories come. A number alpha from 0 to 1 is a temperature: a
          category of n cells gets n**alpha of the draws, relative to the others (1 as they come, 0 all alike;
          cells without a value count as one category more). A mapping gives shares of categories, relative
          to each other; those it does not name are not drawn. Weights of several columns are multiplied.
        weight_level: "row", "block" (whole blocks, some of them in some epochs only), or "auto": by block
          where blocks are of one kind and less is read that way. See ``scjax.loader.weights``.
        epoch_cells: draws of an epoch; by default as many as the split has cells.
        process_index, process_count: which share of each batch is wanted.
        prefetch: batches to prepare in the background; 0 prepares each when asked.
        sparse: give ``SparseBatch`` of sparse rows in place of padded ones, in the same order and from the
          same cursor.

        Raises:
          ValueError: sizes that do not divide each other, a split without cells, weights that cannot be;
            names the numbers.
          KeyError: a label column, category or value that the corpus does not have; lists those it has.

        Copies of a cell in one epoch keep the same genes under ``max_genes``; in the next epoch others.
        """
        self.corpus, self.batch_size, self.seed, self.split = corpus, int(batch_size), int(seed), split
        self.max_genes, self.epochs, self.prefetch = max_genes, epochs, prefetch
        self.process_index, self.process_count, self.sparse = process_index, process_count, bool(sparse)
        numbers = {"batch_size": batch_size, "max_genes": max_genes, "epochs": epochs}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.parts = tuple(part for part in corpus.split(split) if part.n_cells)
        if not self.parts:
            raise ValueError(
                f"the corpus {corpus.path} has no cells in split {split!r}; "
                "the share of validation cells is chosen when a corpus is built"
            )
        last = self.parts[-1]
        if last.first_row + last.n_cells > 2**32:
            raise ValueError(f"{corpus.path}: has more cells than row numbers of 32 bits can tell apart")

        n_rows, nnz = sum(part.n_cells for part in self.parts), sum(part.nnz for part in self.parts)
        self._chunk_rows = max(part.inner for part in self.parts) * n_rows / max(nnz, 1)
        in_source_order = not corpus.manifest.get("shuffled", True)
        lanes = default_lanes(self.batch_size) if lanes is None else int(lanes)
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is not one of {process_count} processes")
        if lanes % process_count:
            fits = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            fits = [n for n in fits if n % process_count == 0]
            raise ValueError(
                f"process_count={process_count} does not divide lanes={lanes} "
                f"(batch_size={batch_size}): every process must own as many lanes; "
                + (
                    f"pass lanes={min(fits, key=lambda n: abs(n - lanes))}"
                    if fits
                    else f"a batch_size that {process_count} divides could have them"
                )
            )
        if block is None:
            block = default_block(n_rows, lanes, self._chunk_rows, in_source_order)
        self.readers = _Readers(self.parts)
        self._store = next((part.store for part in self.parts if part.store.remote), self.parts[0].store)
        salt, spans = f"{corpus.manifest_id}/{split}", tuple((p.first_row, p.n_cells) for p in self.parts)
        self._weights, drawn = self._spec(weights), None
        if self._weights or epoch_cells is not None:
            drawn = Weights(
                spans,
                int(block),
                self._weights or {},
                corpus.columns,
                self._codes,
                draws=epoch_cells,
                level=weight_level,
                start=int(random_bits("draws", salt, self.seed, n=1)[0]),
                side_by_side=self._store.map,
                where=f"the split {split!r} of {corpus.path}",
            )
        self.order = Order(
            parts=spans,
            batch_size=self.batch_size,
            lanes=lanes,
            window=int(window),
            block=int(block),
            seed=self.seed,
            salt=salt,
            shuffle=bool(shuffle),
            group_lengths=bool(group_lengths),
            weights=drawn,
            skip=max(1, round(self._chunk_rows)),
        )
        each = lanes // process_count
        self.lanes_here = slice(process_index * each, (process_index + 1) * each)
        self.local_batch_size = self.batch_size // process_count
        self.steps_per_epoch = self.order.steps_per_epoch

        known = list(corpus.columns)
        self.labels = tuple(known if labels is None else labels)
        for name in self.labels:
            if name not in known:
                raise KeyError(f"the corpus {corpus.path} has no label column {name!r}; it has {known}")

        wanted_values = corpus.panels if values is None else [values] if isinstance(values, str) else values
        self.panels = {name: panel_of(corpus, name) for name in wanted_values}

        self.code_maps = {name: [_code_map(part, name) for part in self.parts] for name in self.labels}

        wanted = corpus.vocabulary if vocabulary is None else vocabulary
        self._genes, self._vocabulary_hash = (
            GeneTables(corpus, self.parts, self.readers, wanted),
            wanted.short_hash,
        )
        self.luts, self.lut_of_part, self.genes_of = self._genes.luts, self._genes.of_part, self._genes.slots
        top, sample = self._genes.longest, self._sample_lengths()
        if max_genes is not None and max_genes < top:
            top, sample = max_genes, np.minimum(sample, max_genes)
        else:
            top = round_up(top)
        self.bucket_lengths = choose_lengths(batch_lengths(sample, self.order), top, n_buckets)
        if drawn is not None:
            self._warn_of_over_read()

        indices = np.result_type(*(part.index_dtype for part in self.parts))
        counts = {np.dtype(part.x_dtype) for part in self.parts}
        floats = any(dtype.kind == "f" for dtype in counts)
        self.count_dtypes = (indices, np.dtype(np.float32) if floats else np.result_type(*counts))
        self.sparse_dtypes = (index_dtype(len(wanted)), self.count_dtypes[1])

    def _spec(self, weights: Spec | None) -> Spec | None:
        """The weights that are asked for, and those that a mixture brings along."""
        if weights is not None:
            check_spec(weights)
        shares = getattr(self.corpus, "shares", None) if self.split == "train" else None
        if shares is None:
            return weights or None
        if weights and "corpus" in weights:
            raise ValueError(
                f"weights of the column 'corpus' are given twice: as {weights['corpus']!r}, and as shares of "
                f"the mixture {self.corpus.path}"
            )
        return {"corpus": shares, **(weights or {})}

    def _codes(self, name: str, which: int, first: int, last: int) -> np.ndarray:
        """int32 [last - first]: codes of some rows of a part, by ``corpus.columns``."""
        part = self.parts[which]
        if last - first == part.n_cells:  # when the loader begins: no file need stay open
            return part.codes(name)
        codes, to = self.readers[which].column(f"codes/{name}", first, last), _code_map(part, name)
        return codes if to is None else to[codes]

    def _sample_lengths(self) -> np.ndarray:
        """Slots that some cells need, from all over the split: int64 [n]."""
        ends = np.cumsum([part.n_cells for part in self.parts])
        length = max(1, min(_SLICE, int(ends[-1]) // _SLICES))

        def lengths(at: int) -> np.ndarray:
            which = int(np.searchsorted(ends, at, side="right"))
            part = self.parts[which]
            first = at - int(ends[which]) + part.n_cells
            last = min(first + length, part.n_cells)
            return self._genes.slots(which, first, last, part.column("nnz", first, last))

        starts = np.unique(np.linspace(0, ends[-1], _SLICES, endpoint=False).astype(np.int64))
        return np.concatenate(self._store.map(lengths, starts.tolist())).astype(np.int64)

    # ---- what is read

    def __str__(self) -> str:
        return (
            f"an epoch is {self.steps_per_epoch:,} batches of {self.batch_size} cells, padded to "
            f"{self.bucket_lengths} genes; {self.over_read:.2f} cells are decoded for each"
        )

    @functools.cached_property
    def over_read(self) -> float:
        """Cells decoded for each one that is handed out, found from some windows of the first epoch.

        Chunks are decoded as a whole, so that a run of neighbouring cells costs about a chunk more than it
        holds. It is below 1 where cells are drawn several times: their copies share what is read.
        """
        order, rows, runs, used = self.order, 0, 0, 0
        lanes = np.unique(np.linspace(0, order.lanes - 1, min(order.lanes, _WINDOWS)).astype(int))
        for i, lane in enumerate(lanes.tolist()):
            window = int(order.windows_at(order.steps_per_epoch * i // len(lanes))[lane])
            read, picks = order.runs(0, lane, window), order.picks(0, lane, window)
            rows, runs = rows + sum(n for _, n in read), runs + len(read)
            used += sum(n for _, n in read) if picks is None else len(picks)
        return (rows + runs * self._chunk) / max(used, 1)

    @property
    def _chunk(self) -> float:
        """Cells that are decoded together."""
        return min(self._chunk_rows, self.order.n_rows / len(self.parts))

    def _warn_of_over_read(self) -> None:
        order = self.order
        whole = min(order.block, order.n_rows / order.lanes)  # what a run is where every cell comes once
        small = sum(part.nnz for part in self.parts) < _SMALL
        if small or self.over_read <= MAX_OVER_READ * (1 + self._chunk / whole):
            return
        advice = "a larger epoch_cells, or a corpus of the wanted cells alone, costs less"
        if order.weights is not None and order.weights.level == "row":
            advice = f'weight_level="block" draws whole blocks; {advice}'
        warnings.warn(
            f"{self.corpus.path}: {self.over_read:.1f} cells are decoded for each one that these weights "
            f"draw; {advice}",
            stacklevel=3,
        )

    def __iter__(self) -> grain.DatasetIterator:
        from scjax.loader.iterator import iterate  # grain imports JAX

        return iterate(self)

    # ---- the cursor

    @functools.cached_property
    def _recipe(self) -> dict[str, Any]:
        """All that decides what is in the batch of a given epoch and step."""
        order = self.order
        return {
            "format": STATE_FORMAT,
            "manifest": self.corpus.manifest_id,
            "split": self.split,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "lanes": order.lanes,
            "window": order.steps_per_window * order.rows_per_lane,
            "block": order.block,
            "shuffle": order.shuffle,
            "group_lengths": order.group_lengths,
            "max_genes": self.max_genes,
            "bucket_lengths": list(self.bucket_lengths),
            "vocabulary": self._vocabulary_hash,
            "weights": describe(self._weights),
            "weight_level": order.weights and order.weights.level,
            "epoch_cells": order.weights and order.weights.draws,
        }

    def state(self, epoch: int, step: int) -> dict[str, Any]:
        """The cursor that stands before a step: JSON-able, equal on all processes."""
        return {**self._recipe, "epoch": epoch, "step": step}

    def position(self, state: dict[str, Any]) -> tuple[int, int]:
        """(epoch, step) of a cursor.

        Raises:
          ValueError: the cursor belongs to another corpus, seed, batch size, ...; names each difference.
        """
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise ValueError(f"not a data cursor of this version ({STATE_FORMAT}): {state!r}")
        changed = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._recipe.items()
            if state.get(name) != value
        ]
        if changed:
            raise ValueError(
                "the data cursor was saved with other settings, so the run would not continue where it "
                "stopped: " + "; ".join(changed)
            )
        epoch, step = state.get("epoch"), state.get("step")
        if not isinstance(epoch, int) or not isinstance(step, int) or epoch < 0 or step < 0:
            raise ValueError(
                f"the data cursor has epoch {epoch!r} and step {step!r}; both are numbers from 0 up"
            )
        if step >= self.steps_per_epoch:
            raise ValueError(
                f"the data cursor stands at step {step} of an epoch of {self.steps_per_epoch} steps"
            )
        return epoch, step


def _code_map(part: Part, name: str) -> np.ndarray | None:
    maps = getattr(part, "code_maps", None)  # of a mixture's part
    return maps.get(name) if maps else None
