"""Weighted epochs: how often each row is drawn, in exact integer arithmetic.

Every combination of categories of the weighted columns that occurs (a stratum) gets a weight per row, every
row hence a share of the D draws of an epoch, its expectation. Shares are whole multiples of 2**-s draws and
add up to D exactly. Laid end to end in the order of storage they are a line of length D; an epoch draws at
the points u, u + 1, ..., u + D - 1 of it, and u moves on by the golden ratio from epoch to epoch
(systematic sampling). So

- an epoch is exactly D draws, and every row comes the floor or the ceiling of its expectation;
- over epochs a row of expectation 1/3 comes every third time or so, at even distances, and the frequency of
  any stretch of rows goes to its expectation as 1/epochs, not as 1/sqrt(epochs);
- what an epoch draws is a function of (manifest, seed, epoch), found for any block without the others.

Level "row" is that. Where a block is a single kind of cell, a down-weighted one would be read in full for
a few rows of it each epoch. Level "block" draws blocks by the same law, in bunches of one block's rows, and
spreads a bunch over the rows of the block by their weights: a block of the expectation 1/3 per row is taken
as a whole in every third epoch, and not read in the others. Then blocks come floor or ceiling of their
expectation in bunches, and the rows of a block, where they weigh the same, once per bunch.

Shares come from powers of decimal numbers (not of the machine's floating point), so that all machines agree.
"""

from __future__ import annotations

import decimal
import functools
import hashlib
import json
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from scjax.loader.sequence import blocks_of

Spec: TypeAlias = Mapping[str, "float | Mapping[str | None, float]"]
Codes = Callable[[str, int, int, int], np.ndarray]  # (column, part, first, last) -> int32 codes of these rows

Map = Callable[[Callable[[int], Any], Iterable[int]], list[Any]]  # of items, perhaps side by side

MAX_STRATA = 2**22
_PARTS = 32  # whose codes are held at a time
PURE = 0.9  # share of a block's rows that are of one stratum, on average, for drawing it as a whole
_LEVELS = ("auto", "row", "block")
_SAMPLE = 256  # blocks whose purity is looked at
SAVES = 5, 4  # how many times less is then read, at least
_UNIT = 2**60  # of weights per row before they are scaled
# steps from epoch to epoch in a circle of 2**64, which know nothing of each other: the golden ratio, the
# square roots of 2 and 3; and one from block to block
_GOLDEN, _ROOT, _TURN = 0x9E3779B97F4A7C15, 0x6A09E667F3BCC909, 0xBB67AE8584CAA73B
_ODD = 0xD1342543DE82EF95


def check_spec(spec: Any) -> None:
    """ValueError unless it is of the form that ``Weights`` takes: column -> number, or category -> number."""
    if not isinstance(spec, Mapping):
        raise ValueError(f"weights is {spec!r}; it maps label columns to a number or to shares of categories")
    for column, how in spec.items():
        for value in how.values() if isinstance(how, Mapping) else [how]:
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise ValueError(f"weights of the column {column!r}: {value!r} is not a number")


def describe(spec: Spec | None) -> str | None:
    """A weighting as text that is the same for the same weighting, short enough for a cursor."""
    if spec is None:
        return None
    text = json.dumps(
        {
            column: {str(k): float(v) for k, v in how.items()} if isinstance(how, Mapping) else float(how)
            for column, how in spec.items()
        },
        sort_keys=True,
    )
    if len(text) > 120:
        text = f"{text[:80]}... sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return text


class Weights:
    """How often the rows of every block are drawn in an epoch.

    Attributes:
      draws: D, rows that an epoch hands out.
      level: "row" or "block".
      purity: share of a block's rows that are of its most frequent stratum, mean over blocks (a sample); nan
        where the level was given.
    """

    def __init__(
        self,
        parts: Sequence[tuple[int, int]],
        block: int,
        spec: Spec,
        columns: Mapping[str, Sequence[str]],
        codes: Codes,
        *,
        draws: int | None = None,
        level: str = "auto",
        start: int = 0,
        side_by_side: Map | None = None,
        where: str = "the corpus",
    ):
        """Goes through the codes of the weighted columns twice.

        Args:
          parts: (first global row, number of rows) of each part.
          block: rows of a block.
          spec: column -> how its categories are weighted. A number alpha from 0 to 1 is a temperature: a
            category of n cells gets n**alpha of the draws, relative to the others; 1 is as they come, 0 all
            categories alike. Cells without a value (code -1) count as one category more. A mapping gives
            the shares of categories, relative to each other; categories that it does not name are not
            drawn, and None names the cells without a value. With several columns the weights of a row are
            multiplied. No column: all rows weigh the same.
          columns: the label columns that there are and their categories.
          codes: gives the codes of a stretch of rows of a part.
          draws: D; by default as many as there are rows.
          level: "row", "block", or "auto": by block where blocks are mostly of one stratum and a fifth less
            is read that way.
          start: 64 random bits, where the points of epoch 0 begin.
          side_by_side: maps a function over parts, several at a time where reading them waits for a network.
          where: names the corpus in messages.

        Raises:
          KeyError: a column or category that the corpus does not have; lists those it has.
          ValueError: an exponent or share that is not in its range, a category without cells, no cell left.
        """
        self._parts, self._block, self._codes, self._start = tuple(parts), int(block), codes, int(start)
        self._spec, self._categories, self._where = dict(spec), columns, where
        if level not in _LEVELS:
            raise ValueError(f"weight_level={level!r}: there are {', '.join(_LEVELS)}")
        for column in spec:
            if column not in columns:
                raise KeyError(f"weights: {where} has no label column {column!r}; it has {list(columns)}")
        self._radix = [len(columns[column]) + 1 for column in spec]
        if math.prod(self._radix) > MAX_STRATA:
            raise ValueError(
                f"weights: {' x '.join(spec)} has {math.prod(self._radix):,} combinations of categories, "
                f"{MAX_STRATA:,} are possible; weight fewer columns"
            )
        self._firsts, self._sizes = blocks_of(self._parts, self._block)
        n_rows = int(self._sizes.sum())
        self.draws = n_rows if draws is None else int(draws)
        if self.draws < 1 or self.draws > 2**32:
            raise ValueError(f"epoch_cells must be from 1 to {2**32}, not {self.draws}")

        # which part a block is of, and its first row there
        n_blocks = [-(-n // self._block) for _, n in self._parts]
        self._part = np.repeat(np.arange(len(self._parts)), n_blocks)
        self._within = self._firsts - np.array([first for first, _ in self._parts])[self._part]
        self._before = np.cumsum(self._sizes) - self._sizes  # rows of the split before each block

        self._side_by_side = side_by_side or (lambda function, items: [function(item) for item in items])
        counts = np.zeros(math.prod(self._radix), np.int64)
        for strata in self._each_part():
            counts += np.bincount(strata, minlength=len(counts))
        there = np.flatnonzero(counts)
        per_row, cells = self._per_row(counts, there), counts[there].astype(object)
        self.purity, self.level = math.nan, level
        if level == "auto":
            self.purity = self._purity()
            total = int((per_row * cells).sum())
            drawn = int((np.minimum(per_row * self.draws, total) * cells).sum())  # of blocks of one stratum
            saves = int(cells[per_row > 0].sum()) * total * SAVES[1] >= drawn * SAVES[0]
            self.level = "block" if saves and self.purity >= PURE else "row"

        # at level "block" the unit is a bunch of draws, as many as a block has rows
        self._bunches = self.draws if self.level == "row" else max(1, round(self.draws / self._block))
        self._shift = 63 - self._bunches.bit_length()
        self._bunch_edges = functools.lru_cache(2)(self._find_bunch_edges)  # this epoch's and the next one's
        self._scale(len(counts), there, per_row, cells)
        self._edges = np.zeros(len(self._sizes) + 1, np.uint64)
        np.cumsum(self._masses(), out=self._edges[1:])
        assert int(self._edges[-1]) == self._bunches << self._shift

    # ---- what rows weigh

    def _strata(self, which: int, first: int, last: int) -> np.ndarray:
        """int64 [last - first]: number of the stratum of each row."""
        strata = np.zeros(last - first, np.int64)
        for column, radix in zip(self._spec, self._radix, strict=True):
            strata = strata * radix + self._codes(column, which, first, last) + 1
        return strata

    def _each_part(self) -> Iterator[np.ndarray]:
        """``_strata`` of all rows of one part after the other."""
        for first in range(0, len(self._parts), _PARTS):
            some = range(first, min(first + _PARTS, len(self._parts)))
            yield from self._side_by_side(lambda which: self._strata(which, 0, self._parts[which][1]), some)

    def _per_row(self, counts: np.ndarray, there: np.ndarray) -> np.ndarray:
        """Weight of a row of each stratum that is there: object array of ints."""
        weight = np.ones(len(there), object)
        digits = np.unravel_index(there, self._radix) if self._radix else ()
        table = counts.reshape(self._radix)
        for axis, (column, how) in enumerate(self._spec.items()):
            n = table.sum(axis=tuple(a for a in range(table.ndim) if a != axis))
            names: list[str | None] = [None, *self._categories[column]]
            shares = _shares(column, how, names, n.tolist(), self._where)
            most = max(shares)
            weight = weight * np.array([int(share * _UNIT / most) for share in shares], object)[digits[axis]]
        if not weight.any():
            raise ValueError(
                f"weights: no cell of {self._where} is left, none has a share in all of "
                f"{', '.join(self._spec)}"
            )
        return weight

    def _scale(self, strata: int, there: np.ndarray, per_row: np.ndarray, n: np.ndarray) -> None:
        """Weights as multiples of 2**-shift bunches that add up to all bunches exactly.

        What rounding down leaves is given out one unit a row, stratum after stratum; the last stratum to
        get some gets it for its first rows only.
        """
        there, n, per_row = there[per_row > 0], n[per_row > 0], per_row[per_row > 0]
        whole = self._bunches << self._shift
        units = per_row * whole // int((per_row * n).sum())
        left = whole - int((units * n).sum())
        upto = np.cumsum(n)
        full = int(np.searchsorted(upto.astype(np.int64), left, side="right"))
        units[:full] += 1
        self._units = np.zeros(strata, np.uint64)
        self._units[there] = units.astype(np.uint64)
        left -= int(upto[full - 1]) if full else 0
        self._last, self._given = (int(there[full]), left) if left else (-1, 0)

    def _masses(self) -> np.ndarray:
        """uint64 [blocks]: sum of the weights of the rows of each block."""
        masses, seen, row = [], 0, 0
        self._given_before = 0  # rows of the split before this one get one unit more, if of the last stratum
        for strata in self._each_part():
            n = len(strata)
            if seen < self._given:
                last = np.flatnonzero(strata == self._last)
                taken = min(len(last), self._given - seen)
                seen += taken
                if taken:
                    self._given_before = row + int(last[taken - 1]) + 1
            masses.append(np.add.reduceat(self._weigh(strata, row), np.arange(0, n, self._block)))
            row += n
        return np.concatenate(masses)

    def _weigh(self, strata: np.ndarray, row: int) -> np.ndarray:
        """uint64: weights of neighbouring rows, of which ``row`` is the first, counted within the split."""
        weights = self._units[strata]
        if row < self._given_before:
            given = strata == self._last
            given[self._given_before - row :] = False
            weights += given
        return weights

    def _row_edges(self, block: int) -> np.ndarray:
        """uint64 [rows + 1]: sums of the weights of the rows of a block."""
        first, n = int(self._within[block]), int(self._sizes[block])
        strata = self._strata(int(self._part[block]), first, first + n)
        edges = np.zeros(n + 1, np.uint64)
        np.cumsum(self._weigh(strata, int(self._before[block])), out=edges[1:])
        return edges

    def _purity(self) -> float:
        if not self._spec:
            return 1.0

        def alike(block: int) -> float:
            first, n = int(self._within[block]), int(self._sizes[block])
            strata = self._strata(int(self._part[block]), first, first + n)
            return float(np.unique(strata, return_counts=True)[1].max() / n)

        n_blocks = len(self._sizes)
        blocks = np.linspace(0, n_blocks - 1, min(_SAMPLE, n_blocks)).astype(int)
        return float(np.mean(self._side_by_side(alike, blocks.tolist())))

    # ---- what is drawn

    def _points(self, edges: np.ndarray, epoch: int) -> np.ndarray:
        """int64: how many points of an epoch lie before each place of the line."""
        phase = (self._start + epoch * _GOLDEN) % 2**64
        return ((edges + np.uint64(phase >> (64 - self._shift))) >> np.uint64(self._shift)).astype(np.int64)

    def _find_bunch_edges(self, epoch: int) -> np.ndarray:
        """int64 [blocks + 1]: draws before each block."""
        points = self._points(self._edges, epoch)
        if self.level == "row":
            return points
        # bunches are of two sizes, and which are of the larger one changes with the epoch
        size, more = divmod(self.draws, self._bunches)
        turn = (self._start + epoch * _TURN) % 2**64 * self._bunches >> 64
        return points * size + (points * more + turn) // self._bunches

    def block_draws(self, epoch: int) -> np.ndarray:
        """Draws of each block in an epoch: int64 [blocks], D in all."""
        return np.diff(self._bunch_edges(epoch))

    def row_draws(self, epoch: int, block: int) -> np.ndarray:
        """Draws of each row of a block in an epoch: int64 [rows of the block]."""
        edges = self._row_edges(block)
        if self.level == "row":
            return np.diff(self._points(edges + self._edges[block], epoch))
        low, high = self._bunch_edges(epoch)[block : block + 2].tolist()
        if low == high:
            return np.zeros(len(edges) - 1, np.int64)
        # so many points on the line of the block, by the same law; 31 bits a factor, so that products fit
        edges = edges >> np.uint64(max(0, int(edges[-1]).bit_length() - 31))
        phase = (self._start + epoch * _ROOT + block * _ODD) % 2**64
        first = np.uint64(phase * int(edges[-1]) >> 64)
        return np.diff((edges * np.uint64(high - low) + first) // edges[-1]).astype(np.int64)


def _shares(
    column: str,
    how: float | Mapping[str | None, float],
    names: Sequence[str | None],
    n: Sequence[int],
    where: str,
) -> list[decimal.Decimal]:
    """Weight of a row of each category of a column, relative to each other; the first is no category."""
    zero = decimal.Decimal(0)
    if isinstance(how, Mapping):
        wanted = {}
        for name, share in how.items():
            if name not in names:
                raise KeyError(
                    f"weights: column {column!r} of {where} has no category {name!r}; "
                    f"it has {list(names[1:])}"
                )
            if isinstance(share, bool) or not math.isfinite(share) or share < 0:
                raise ValueError(
                    f"weights: the share of {name!r} in {column!r} is {share!r}; shares are numbers from 0 up"
                )
            if share and not n[names.index(name)]:
                raise ValueError(f"weights: {where} has no cell with {column} {name!r} to draw")
            wanted[name] = decimal.Decimal(repr(float(share)))
        if not any(wanted.values()):
            raise ValueError(f"weights: all shares of {column!r} are 0")
        with decimal.localcontext(prec=40):
            return [wanted.get(name, zero) / k if k else zero for name, k in zip(names, n, strict=True)]
    if isinstance(how, bool) or not isinstance(how, int | float) or not 0 <= how <= 1:
        raise ValueError(
            f"weights: {column!r} has {how!r}; a temperature is a number from 0 (all categories alike) to 1 "
            "(as they come), and a mapping gives shares of categories"
        )
    with decimal.localcontext(prec=40):
        exponent = decimal.Decimal(repr(float(how))) - 1
        return [decimal.Decimal(k) ** exponent if k else zero for k in n]
