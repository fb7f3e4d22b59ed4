"""The loader: what a training run asks for, checked, and turned into an iterator of batches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scjax.corpus.reader import PartReader, ShardCache
from scjax.loader.buckets import batch_lengths, choose_lengths, round_up
from scjax.loader.order import Order, default_block, default_lanes

if TYPE_CHECKING:
    import grain

    from scjax.corpus import Corpus
    from scjax.genes import Vocabulary

STATE_FORMAT = "scjax-loader-1"
_COUNTED = 2**29  # elements of a corpus that are counted through, seconds of reading
_AT_ONCE = 8192  # cells
MIN_MATCHED = 0.5  # share of the wanted genes that the corpus must have
_SAMPLE = 2**18  # cells whose lengths stand for the corpus when bucket lengths are chosen


class Loader:
    """Batches of a corpus in an order that depends on nothing but the corpus, the seed and the step.

    ``iter(loader)`` gives a ``grain.DatasetIterator`` of ``CellBatch`` of numpy arrays: the rows of the
    global batch that belong to this process. Every cell of the split comes exactly once an epoch; the last
    batch of an epoch is filled up with rows of weight 0. ``get_state`` of the iterator is a small dict that
    JSON can hold, the same on every process, and says where the *next* batch comes from; ``set_state``
    continues there, also on another number of processes, at the cost of one window per lane.

    Attributes:
      batch_size: rows of the global batch.
      local_batch_size: rows of this process's share of it.
      steps_per_epoch: batches that hold every cell once.
      bucket_lengths: the values L takes. All processes use the same one at the same step.
      labels: names of the label columns in a batch.
      order: the ``Order`` of the rows.
    """

    def __init__(
        self,
        corpus: Corpus,
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
        shuffle: bool = True,
        epochs: int | None = None,
        vocabulary: Vocabulary | None = None,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ):
        """Args:
        corpus: where the cells are.
        batch_size: rows of a global batch, over all processes.
        seed: decides the order, and which genes ``max_genes`` keeps.
        split: "train" or "validation".
        lanes: number of virtual lanes, a multiple of ``process_count`` and a divisor of ``batch_size``. By
          default the largest power of two, at most 256, that divides ``batch_size``. More lanes mix cells
          better and need more memory.
        window: rows of each lane that are held and shuffled in memory. Memory is about lanes x window x
          genes per cell x 4 bytes over all processes.
        block: neighbouring rows that are read together; by default 1024, less for small corpora.
        group_lengths: put cells with about as many expressed genes into the same batch, which saves
          padding. Which lengths come when is random.
        max_genes: cells with more expressed genes keep a uniform random subset of this many, another one
          each epoch; ``depth`` stays that of the whole cell.
        n_buckets: into how many different lengths L batches are padded, at most.
        labels: columns to put into ``CellBatch.label``; None means all that the corpus has.
        shuffle: False visits the rows of each lane as they are stored.
        epochs: stop after this many; None goes on for ever.
        vocabulary: give genes the ids of this vocabulary rather than those of the corpus; genes that it
          does not have are dropped, and still count in ``depth``.
        process_index, process_count: which share of each batch is wanted.
        prefetch: batches to prepare in the background; 0 prepares each when asked.

        Raises:
          ValueError: sizes that do not divide each other, a split without cells; names the numbers.
          KeyError: a label column that the corpus does not have; lists those it has.
        """
        self.corpus, self.batch_size, self.seed, self.split = corpus, int(batch_size), int(seed), split
        self.max_genes, self.epochs, self.prefetch = max_genes, epochs, prefetch
        self.process_index, self.process_count = process_index, process_count
        for name, value in (("batch_size", batch_size), ("max_genes", max_genes), ("epochs", epochs)):
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
        chunk_rows = max(part.inner for part in self.parts) * n_rows / max(nnz, 1)
        in_source_order = not corpus.manifest.get("shuffled", True)
        lanes = default_lanes(self.batch_size) if lanes is None else int(lanes)
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is not one of {process_count} processes")
        if lanes % process_count:
            raise ValueError(
                f"process_count={process_count} does not divide lanes={lanes} "
                f"(batch_size={batch_size}): every process must own as many lanes"
            )
        self.order = Order(
            parts=tuple((part.first_row, part.n_cells) for part in self.parts),
            batch_size=self.batch_size,
            lanes=lanes,
            window=int(window),
            block=default_block(n_rows, lanes, chunk_rows, in_source_order) if block is None else int(block),
            seed=self.seed,
            salt=f"{corpus.manifest_id}/{split}",
            shuffle=bool(shuffle),
            group_lengths=bool(group_lengths),
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

        self.lut, self._vocabulary_hash = None, corpus.vocabulary.short_hash
        if vocabulary is not None and vocabulary.hash != corpus.vocabulary.hash:
            self.lut = self._look_up(corpus.vocabulary, vocabulary)
            self._vocabulary_hash = vocabulary.short_hash

        # The seam of mixtures: one row of genes per vocabulary, and which of them a part's genes go through;
        # label codes of a part as stored -> those of ``corpus.columns``, None where they are the same. The
        # last entry of a map stands for -1, so that ``map[codes]`` is all there is to do.
        self.luts: np.ndarray | None = None if self.lut is None else self.lut[None, :]
        self.lut_of_part = np.zeros(len(self.parts), np.int64)
        self.code_maps: dict[str, list[np.ndarray | None]] = {
            n: [None] * len(self.parts) for n in self.labels
        }

        shards = ShardCache()
        self.readers = [PartReader(part, shards) for part in self.parts]
        self.genes_per_cell = self._genes_per_cell()
        top = max(int(genes.max()) for genes in self.genes_per_cell) if self.genes_per_cell else 0
        top = top or max(part.max_nnz for part in self.parts)
        sample = self._sample_lengths()
        if max_genes is not None and max_genes < top:
            top, sample = max_genes, np.minimum(sample, max_genes)
        else:
            top = round_up(top)
        self.bucket_lengths = choose_lengths(batch_lengths(sample, self.order), top, n_buckets)

        indices = np.result_type(*(part.index_dtype for part in self.parts))
        counts = {np.dtype(part.x_dtype) for part in self.parts}
        floats = any(dtype.kind == "f" for dtype in counts)
        self.count_dtypes = (indices, np.dtype(np.float32) if floats else np.result_type(*counts))

    def _look_up(self, there: Vocabulary, wanted: Vocabulary) -> np.ndarray:
        """int32 [genes of the corpus]: the id of each gene in the vocabulary that is wanted, or -1."""
        match = wanted.match(pd.DataFrame({"gene_symbol": there.symbols}, index=there.ids))
        if match.n_matched < MIN_MATCHED * min(len(wanted), len(there)):
            raise ValueError(
                f"{match.n_matched:,} of the {len(wanted):,} genes asked for are among the {len(there):,} of "
                f"{self.corpus.path}. Asked for: {wanted.ids[:3]}; "
                f"there: {there.ids[:3]}, {there.symbols[:3]}"
            )
        if match.duplicates:
            gene, names = next(iter(match.duplicates.items()))
            raise ValueError(
                f"{len(match.duplicates)} genes asked for are several in the corpus: {gene} is {names}"
            )
        return np.ascontiguousarray(match.ids, np.int32)

    def _sample_lengths(self) -> np.ndarray:
        """Expressed genes of some cells of every part. Cells are shuffled on disk: any are as good."""
        share = -(-_SAMPLE // len(self.parts))
        lengths = self.genes_per_cell or [
            reader.column("nnz", 0, min(share, reader.part.n_cells)) for reader in self.readers
        ]
        return np.concatenate([genes[:share] for genes in lengths]).astype(np.int64)

    def _genes_per_cell(self) -> list[np.ndarray] | None:
        """Per part and cell, how many genes it brings into a batch (int [n_cells]), or a bound on it.

        Every process needs this of every cell to agree on the width of a batch. Without a vocabulary of the
        loader's own it is what the index says: None. With one it is counted by reading the genes once, which
        is seconds; for corpora that are too large for that, no more than the vocabulary holds.
        """
        if self.lut is None:
            return None
        kept = self.lut >= 0
        if sum(part.nnz for part in self.parts) > _COUNTED:
            return [np.minimum(part.nnz_per_cell, np.uint32(kept.sum())) for part in self.parts]
        counted = []
        for part, reader in zip(self.parts, self.readers, strict=True):
            genes, nnz = np.empty(part.n_cells, np.uint32), part.nnz_per_cell
            for first in range(0, part.n_cells, _AT_ONCE):
                last = min(first + _AT_ONCE, part.n_cells)
                low, high = reader.row_span(first, last)
                indices = np.empty(high - low, part.index_dtype)
                reader.indices.read(low, high, indices)
                ends = np.concatenate([[0], np.cumsum(nnz[first:last], dtype=np.int64)])
                upto = np.concatenate([[0], np.cumsum(kept[indices], dtype=np.int64)])
                genes[first:last] = np.diff(upto[ends])
            counted.append(genes)
        return counted

    def genes_of(self, which: int, first: int, last: int, nnz: np.ndarray) -> np.ndarray:
        """Slots that rows [first, last) of a part need in a batch: int[last - first].

        Args:
          which: number of the part in ``parts``.
          nnz: expressed genes of these rows as stored.
        """
        return nnz if self.lut is None else self.genes_per_cell[which][first:last]

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
