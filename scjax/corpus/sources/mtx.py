"""A 10x folder (matrix.mtx, barcodes.tsv, features.tsv or genes.tsv, gzipped or not) as a source."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import pandas as pd
from scipy import io as scipy_io
from scipy import sparse

from scjax.corpus.sources import base
from scjax.corpus.sources.base import Source
from scjax.corpus.sources.matrix import turn
from scjax.corpus.sources.tenx import Features

_MATRIX = re.compile(r"(?P<prefix>.*?)[._-]?(matrix)?\.mtx(\.gz)?$")
_LINE_BYTES = 12  # about, of an entry as text
_SHARE = 8  # of CHUNK_ELEMENTS are in a piece: its text and what is made of it are in memory together

Triples = tuple[np.ndarray, np.ndarray, np.ndarray]  # cells, features, values


def matrices_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder that are called matrix.mtx or matrix.mtx.gz, with a prefix or without, sorted."""
    return sorted(path for path in folder.iterdir() if path.name.endswith(("matrix.mtx", "matrix.mtx.gz")))


def files_of_matrix(matrix: pathlib.Path) -> list[pathlib.Path]:
    """A matrix file, and the tables of its features and barcodes. FileNotFoundError where one is missing."""
    return [matrix, _beside(matrix, "features", "genes"), _beside(matrix, "barcodes")]


def mtx_name(path: pathlib.Path) -> str:
    """What a matrix file is called: its prefix (GSM123 of GSM123_matrix.mtx.gz), else its folder's name."""
    found = _MATRIX.match(path.name)
    return (found["prefix"] if found else "") or path.absolute().parent.name


class MtxSource(Source):
    """Features x barcodes as text, beside the tables of both. Features that are no genes are left out.

    The text is read in pieces. Where its entries are not sorted by barcode, temporary files sort them.
    """

    def __init__(self, path: pathlib.Path, name: str, layer: str) -> None:
        self.name, self.layer, self.path = name, layer, path
        self.where = str(path)
        if layer != "X":
            raise base.no_layer(self.where, layer, ["X"])
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        self._matrix = matrices_in(path)[0] if path.is_dir() else path
        self.file = self._matrix.name
        _, self._features_file, self._barcodes_file = files_of_matrix(self._matrix)
        rows = [line.split("\t") for line in _lines(self._features_file)]
        widths = {len(row) for row in rows}
        if len(widths) > 1 or widths == {0}:
            raise ValueError(
                f"{self._features_file}: lines of {' and '.join(map(str, sorted(widths)))} fields; each has "
                "an id, a name and (Cell Ranger 3 and later) a type, with tabs between them"
            )
        columns = list(map(list, zip(*rows, strict=True)))
        ids = columns[0] if columns else []
        self._features = Features(ids, columns[1] if len(columns) > 1 else ids, *columns[2:3])
        self._obs = pd.DataFrame(index=pd.Index(_lines(self._barcodes_file), dtype=object))
        with self._open() as file:
            _, (n_features, n_cells, self.n_stored) = self._head(file)
        given = self._features.n, len(self._obs)
        if (n_features, n_cells) != given:
            turned = "; the matrix looks transposed" if (n_cells, n_features) == given else ""
            header = (
                "; is the first line a header?" if 1 in (given[0] - n_features, given[1] - n_cells) else ""
            )
            raise ValueError(
                f"{self._matrix}: {n_features} x {n_cells}, but {self._features_file.name} has {given[0]} "
                f"features (rows), {self._barcodes_file.name} {given[1]} barcodes (columns){turned}{header}"
            )
        self._features.check(self.where)
        self.shape = base.check_shape(self.where, (n_cells, len(self.var)), n_cells, len(self.var))

    def __reduce__(self) -> Any:
        return MtxSource, (self.path, self.name, self.layer)

    @property
    def obs(self) -> pd.DataFrame:
        return self._obs

    @property
    def var(self) -> pd.DataFrame:
        return self._features.var

    @property
    def account(self) -> dict[str, int]:
        return self._features.account

    def _files(self) -> list[pathlib.Path]:
        return [self._matrix, self._features_file, self._barcodes_file]

    def sha256(self) -> str:
        return base.hash_files(self._files(), self._matrix.parent)

    def _open(self) -> contextlib.AbstractContextManager[IO[bytes]]:
        return _opened(self._matrix)

    def _head(self, file: IO[bytes]) -> tuple[bytes, tuple[int, int, int]]:
        """The first line, and (features, barcodes, entries); the file is left at the first entry."""
        first = file.readline(1000)
        words = first.decode("latin1").lower().split()
        if not words or words[0] != "%%matrixmarket":
            raise ValueError(f"{self._matrix}: not a Matrix Market file; its first line is {first[:60]!r}")
        if (
            words[1:3] != ["matrix", "coordinate"]
            or words[3:4] not in (["integer"], ["real"])
            or words[4:] != ["general"]
        ):
            raise ValueError(
                f"{self._matrix}: holds {' '.join(words[1:])}; counts are 'matrix coordinate integer general'"
            )
        line = first
        while line.startswith(b"%") or (line and not line.strip()):
            line = file.readline()
        try:
            n_features, n_cells, n_stored = map(int, line.split())
        except ValueError:
            raise ValueError(
                f"{self._matrix}: no line with rows, columns and entries, but {line[:60]!r}"
            ) from None
        return first, (n_features, n_cells, n_stored)

    def _triples(self) -> Iterator[Triples]:
        """The entries in the order of the file, a piece at a time."""
        with self._open() as file:
            first, (n_features, n_cells, n_stored) = self._head(file)
            done = 0
            while block := file.read(max(base.CHUNK_ELEMENTS // _SHARE, 1) * _LINE_BYTES):
                block = (block + file.readline()).rstrip()
                if not block:  # blank lines at the end
                    continue
                n = block.count(b"\n") + 1
                head = first.rstrip() + f"\n{n_features} {n_cells} {n}\n".encode()
                try:
                    entries = scipy_io.mmread(io.BytesIO(head + block), spmatrix=False)
                except (ValueError, OverflowError) as error:
                    raise ValueError(
                        f"{self._matrix}: damaged between entries {done + 1} and {done + n} ({error})"
                    ) from error
                yield entries.col, entries.row, entries.data
                done += entries.nnz
            if done != n_stored:
                raise ValueError(
                    f"{self._matrix}: truncated or damaged: its header announces {n_stored} entries, "
                    f"{done} are there"
                )

    def _rows(self, first: int, last: int, scratch: pathlib.Path | None) -> Iterator[sparse.csr_matrix]:
        pieces = self._triples()
        head = next(pieces, None)
        if head is None or (np.diff(head[0]) >= 0).all():
            yield from self._sorted(head, pieces, first, last)
        else:
            shape = self.shape[0], self._features.n
            everything = (piece for part in ([head], pieces) for piece in part)
            yield from map(self._features.take, turn(everything, shape, self.n_stored, scratch, first, last))

    def _sorted(
        self, head: Triples | None, pieces: Iterator[Triples], first: int, last: int
    ) -> Iterator[sparse.csr_matrix]:
        """Rows of entries that are sorted by cell; the last cell of a piece may go on in the next.

        All entries are looked at, also those after ``last``: one out of order would be a count lost.
        """
        at, done = 0, 0
        carry: Triples | None = None
        for piece in (piece for part in ([] if head is None else [head], pieces) for piece in part):
            cells = piece[0]
            if (np.diff(cells) < 0).any() or (carry is not None and cells[0] < carry[0][0]):
                raise ValueError(
                    f"{self._matrix}: sorted by barcode up to entry {done}, but not after; sort it, for "
                    "example with scipy: mmwrite(path, mmread(path).tocsc())"
                )
            done += len(cells)
            if carry is not None:
                piece = tuple(np.concatenate(pair) for pair in zip(carry, piece, strict=True))  # type: ignore[assignment]
            stop = int(piece[0][-1])
            yield from self._between(piece, at, stop, first, last)
            at, carry = stop, tuple(part[np.searchsorted(piece[0], stop) :] for part in piece)  # type: ignore[assignment]
        none = np.zeros(0, np.int32)
        yield from self._between(carry or (none, none, none), at, self.shape[0], first, last)

    def _between(
        self, piece: Triples, low: int, high: int, first: int, last: int
    ) -> Iterator[sparse.csr_matrix]:
        """The cells low..high of entries that begin with ``low``, as far as they are of first..last."""
        low, high = max(low, first), min(high, last)
        if low < high:
            starts = np.searchsorted(piece[0], np.arange(low, high + 1))
            _, features, values = (part[starts[0] : starts[-1]] for part in piece)
            parts = values, features, starts - starts[0]
            yield self._features.take(sparse.csr_matrix(parts, shape=(high - low, self._features.n)))

    def _heads(self) -> dict[str, np.ndarray]:
        _, _, values = next(self._triples(), (None, None, np.zeros(0)))
        return {"X": values}


def _beside(matrix: pathlib.Path, *kinds: str) -> pathlib.Path:
    """The table that belongs to a matrix file: of the same prefix, else without one."""
    found = _MATRIX.match(matrix.name)
    prefix = found["prefix"] if found else ""
    names = os.listdir(matrix.parent)
    for start in (re.escape(prefix) + "[._-]?" if prefix else "", ""):
        for kind in kinds:
            same = [name for name in names if re.fullmatch(rf"{start}{kind}\.tsv(\.gz)?", name)]
            if len(same) > 1:
                raise ValueError(
                    f"{matrix.parent}: holds both {' and '.join(sorted(same))}; keep one of them"
                )
            if same:
                return matrix.parent / same[0]
    raise FileNotFoundError(
        f"{matrix}: no {' or '.join(f'{kind}.tsv[.gz]' for kind in kinds)} of the same prefix beside it; "
        "a 10x folder holds matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv)"
    )


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file as it is, or what a gzip file holds, whatever its name says; damage names the file."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            if not zipped:
                yield raw
                return
            with _gzip(raw) as file:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise OSError(f"{path}: damaged or truncated gzip file ({error})") from error


def _gzip(raw: IO[bytes]) -> Any:
    try:
        from isal import igzip  # several times faster
    except ImportError:
        return gzip.open(raw)
    return igzip.open(raw)


def _lines(path: pathlib.Path) -> list[str]:
    with _opened(path) as file:
        try:
            return file.read().decode().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not text ({error})") from error
