"""Which id a stored gene has in a batch, and how many slots a cell needs there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from scjax.corpus import Corpus, Part
    from scjax.corpus.mixture import Mixture
    from scjax.corpus.reader import PartReader
    from scjax.genes import Vocabulary

MIN_MATCHED = 0.5  # share of the wanted genes that the corpus must have
COUNTED = 2**29  # elements of a corpus that are counted through, seconds of reading
_AT_ONCE = 8192  # cells


class GeneTables:
    """From the genes of the parts to those of a batch.

    Attributes:
      luts: int32 [k, genes], what each gene of the k vocabularies of the parts is in a batch, -1 where it is
        dropped (and after the end of shorter vocabularies); None where all stay what they are.
      of_part: int64 [parts], which of these a part's genes go through.
      longest: the most slots that a cell needs.
    """

    def __init__(
        self,
        corpus: Corpus | Mixture,
        parts: Sequence[Part],
        readers: Sequence[PartReader],
        wanted: Vocabulary,
    ):
        """Args:
          wanted: the vocabulary of the batches; genes that it does not have are dropped.

        Where genes are dropped the slots are counted by reading the genes once, which is seconds; in corpora
        that are too large for that a bound takes their place.

        Raises:
          ValueError: parts have too few of the genes, or several genes that are the same one.
        """
        there: dict[str, tuple[Vocabulary, str]] = {}
        for part in parts:
            vocabulary = getattr(part, "vocabulary", corpus.vocabulary)  # of a mixture's part
            there.setdefault(vocabulary.hash, (vocabulary, str(getattr(part, "origin", corpus.path))))
        number = {key: i for i, key in enumerate(there)}
        self.of_part = np.array([number[getattr(p, "vocabulary", corpus.vocabulary).hash] for p in parts])
        self.luts: np.ndarray | None = None
        self._counted: list[np.ndarray] | None = None
        self.longest = max(part.max_nnz for part in parts)
        if list(there) == [wanted.hash]:
            return

        tables = [_look_up(vocabulary, wanted, where) for vocabulary, where in there.values()]
        self.luts = np.full((len(tables), max(map(len, tables))), -1, np.int32)
        for row, table in zip(self.luts, tables, strict=True):
            row[: len(table)] = table
        self._kept = np.array([np.count_nonzero(table >= 0) for table in tables])
        self.longest = max(
            min(part.max_nnz, int(self._kept[k])) for part, k in zip(parts, self.of_part, strict=True)
        )
        drops = (self._kept < [len(table) for table in tables])[self.of_part]
        if drops.any() and sum(part.nnz for part in parts) <= COUNTED:
            kept = self.luts >= 0
            self._counted = [
                _count(part, reader, kept[k])
                for part, reader, k in zip(parts, readers, self.of_part, strict=True)
            ]
            self.longest = max(int(genes.max()) for genes in self._counted)

    def slots(self, which: int, first: int, last: int, nnz: np.ndarray) -> np.ndarray:
        """Slots that rows [first, last) of a part need in a batch, or a bound on them: int [last - first].

        Every process needs this of every cell, to agree on the width of a batch.

        Args:
          which: number of the part.
          nnz: expressed genes of these rows as stored.
        """
        if self._counted is not None:
            return self._counted[which][first:last]
        if self.luts is None:
            return nnz
        return np.minimum(nnz, self._kept[self.of_part[which]])


def _look_up(there: Vocabulary, wanted: Vocabulary, where: str) -> np.ndarray:
    """int32 [genes there]: the id of each gene in the vocabulary that is wanted, or -1."""
    match = wanted.match(pd.DataFrame({"gene_symbol": there.symbols}, index=there.ids))
    if match.n_matched < MIN_MATCHED * min(len(wanted), len(there)):
        raise ValueError(
            f"{match.n_matched:,} of the {len(wanted):,} genes asked for are among the {len(there):,} of "
            f"{where}. Asked for: {wanted.ids[:3]}; there: {there.ids[:3]}, {there.symbols[:3]}"
        )
    if match.duplicates:
        gene, names = next(iter(match.duplicates.items()))
        raise ValueError(
            f"{len(match.duplicates)} genes asked for are several in the corpus {where}: {gene} is {names}"
        )
    return np.ascontiguousarray(match.ids, np.int32)


def _count(part: Part, reader: PartReader, kept: np.ndarray) -> np.ndarray:
    """uint32 [n_cells]: how many genes of each cell of a part are kept."""
    genes = np.empty(part.n_cells, np.uint32)
    for first in range(0, part.n_cells, _AT_ONCE):
        last = min(first + _AT_ONCE, part.n_cells)
        low, high = reader.row_span(first, last)
        indices = np.empty(high - low, part.index_dtype)
        reader.indices.read(low, high, indices)
        nnz = reader.column("nnz", first, last)
        ends = np.concatenate([[0], np.cumsum(nnz, dtype=np.int64)])
        upto = np.concatenate([[0], np.cumsum(kept[indices], dtype=np.int64)])
        genes[first:last] = np.diff(upto[ends])
    return genes
