"""Ranged reads of the counts of a part, without a zarr library in the way.

A part stores its expressed genes and their counts as two 1-D zarr v3 arrays. Each is cut into inner chunks
(decoded as a whole), and runs of chunks are packed into shard files that end in an index: the offset and
size of every chunk, and a checksum. The reader keeps shard files open and their indices in memory, reads
chunks that lie side by side with one ``pread`` or one request to an object store, checks the CRC-32C of each
and decompresses it straight into the caller's array.

Everything here may be called from several threads at once; reading and decompressing release the GIL.

Layout: Zarr v3 specification, codecs ``sharding_indexed``, ``bytes``, ``blosc`` and ``crc32c``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from scjax.corpus import blosc
from scjax.corpus.format import BLOCK
from scjax.corpus.panels import place
from scjax.corpus.store import (
    CorruptDataError,
    LocalStore,
    ShardCache,
    Store,
    StoredFile,
    missing,
    read_checked,
)

if TYPE_CHECKING:
    from scjax.corpus import Part

RANGE_BYTES = 2**22  # of neighbouring chunks that are read as one
ARENA_BYTES = 2**26  # of ranges that are under way at a time from a remote store
_ABSENT = 2**64 - 1  # offset and size of a chunk that was never written: all fill value

_scratch = threading.local()


def _buffer(name: str, size: int) -> np.ndarray:
    """This thread's scratch memory of that name: uint8[size], grown when needed and never given back."""
    held = getattr(_scratch, name, None)
    if held is None or held.size < size:
        held = np.empty(size + size // 4, np.uint8)
        setattr(_scratch, name, held)
    return held[:size]


class _Shard:
    """An open shard and its index. The file is closed when the last user lets go of the object."""

    def __init__(self, file: StoredFile, path: str, where: str, n_chunks: int, index_checksum: bool):
        self.file, size = file, file.size
        index = np.empty(16 * n_chunks + 4 * index_checksum, np.uint8)
        entries = index[: 16 * n_chunks]
        for again in (False, True):
            if size < index.size or file.readinto(size - index.size, index, again) < index.size:
                raise CorruptDataError(f"{where}: {path} is cut short ({size} bytes, less than its index)")
            if not index_checksum or google_crc32c.value(entries) == int(index[-4:].view("<u4")[0]):
                break
        else:
            raise CorruptDataError(f"{where}: the checksum of the index at the end of {path} does not match")
        self.offset, self.size = entries.view("<u8").reshape(-1, 2).T.tolist()
        for chunk, (offset, n) in enumerate(zip(self.offset, self.size, strict=True)):
            if offset != _ABSENT and offset + n > size - index.size:
                raise CorruptDataError(
                    f"{where}, chunk {chunk}: lies beyond the end of {path} ({size} bytes)"
                )


@dataclasses.dataclass
class _Run:
    """Chunks of a shard whose stored bytes lie side by side, to be read as one."""

    array: ShardedArray
    shard: _Shard
    number: int
    first: int  # chunks [first, last) of the shard
    last: int
    low: int  # the elements that are wanted, and where they go
    high: int
    out: np.ndarray
    stored: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.uint8))

    @property
    def offset(self) -> int:
        return self.shard.offset[self.first]

    @property
    def n_bytes(self) -> int:
        return self.shard.offset[self.last - 1] + self.shard.size[self.last - 1] - self.offset


class ShardedArray:
    """A sharded zarr v3 array of one dimension, opened for reading; or one of two dimensions whose chunks
    hold whole rows, which is then read as its elements one after the other.

    Attributes:
      n: number of elements.
      dtype: type of the stored elements.
      chunk: elements per inner chunk; a read costs whole chunks.
      shard: elements per shard file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        shards: ShardCache | None = None,
        store: Store | None = None,
        objects: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        """Opens an array.

        Args:
          path: its directory, or with ``store`` its name there.
          name: stands for it in error messages.
          shards: holds its open shards.
          store: where it is.
          objects: the manifest's entries on the objects of the store; what they tell of is checked.

        Raises:
          FileNotFoundError: there is no array.
          ValueError: it is not an array in the layout that this module reads; says what differs.
          CorruptDataError: its description is not the one that the manifest tells of.
        """
        self._store = store or LocalStore(Path(path))
        self._prefix = f"{os.fspath(path)}/" if store else ""
        self._objects = objects or {}
        self.path = self._store.where(self._prefix.rstrip("/")) if store else os.fspath(path)
        self.name = name or self.path
        self._shards = shards if shards is not None else ShardCache()
        described = f"{self._prefix}zarr.json"
        try:
            if described in self._objects:
                content = read_checked(self._store, described, self._objects, self.name)
            else:
                content = self._store.read(described)
            meta = json.loads(content)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.name}: no zarr array in {self.path} (zarr.json is missing)"
            ) from None
        except ValueError as error:
            raise CorruptDataError(f"{self.name}: {self.path}/zarr.json is not JSON: {error}") from None
        try:
            self._parse(meta)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self.name}: {self.path}/zarr.json is incomplete: {error!r}") from None

    def _parse(self, meta: dict[str, Any]) -> None:
        def expect(what: str, found: Any, *allowed: Any) -> None:
            if found not in allowed:
                raise ValueError(f"{self.name}: {what} is {found!r}; this reader takes {allowed[0]!r}")

        expect("zarr_format", meta["zarr_format"], 3)
        expect("node_type", meta["node_type"], "array")
        expect("number of dimensions", len(meta["shape"]), 1, 2)
        expect("chunk grid", meta["chunk_grid"]["name"], "regular")
        keys = meta.get("chunk_key_encoding", {"name": "default"})
        expect("chunk key encoding", keys["name"], "default")
        expect("chunk key separator", keys.get("configuration", {}).get("separator", "/"), "/")
        expect("outer codecs", [codec["name"] for codec in meta["codecs"]], ["sharding_indexed"])
        sharding = meta["codecs"][0]["configuration"]
        shapes = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"], sharding["chunk_shape"]
        for what, shape in zip(("shards", "chunks"), shapes[1:], strict=True):
            expect(f"shape of the {what} behind the rows", shape[1:], meta["shape"][1:])
        expect("place of the shard index", sharding.get("index_location", "end"), "end")
        index = [codec["name"] for codec in sharding["index_codecs"]]
        expect("index codecs", index, ["bytes", "crc32c"], ["bytes"])
        inner = [codec["name"] for codec in sharding["codecs"]]
        expect("inner codecs", inner, *(["bytes", *z, *c] for z in (["blosc"], []) for c in (["crc32c"], [])))
        endian = sharding["codecs"][0].get("configuration", {}).get("endian", "little")
        expect("byte order", endian, "little")

        self.n, self.shard, self.chunk = (math.prod(map(int, shape)) for shape in shapes)
        self._tail = "/0" * (len(meta["shape"]) - 1)
        self.dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        self.fill_value = self.dtype.type(meta["fill_value"])
        self._chunks_per_shard = self.shard // self.chunk
        self._index_checksum = "crc32c" in index
        self._checksum = "crc32c" in inner
        self._blosc = "blosc" in inner

    def __len__(self) -> int:
        return self.n

    def read(self, low: int, high: int, out: np.ndarray) -> None:
        """Reads elements [low, high) into ``out``, whose type may differ: values are then converted.

        Raises:
          IndexError: the range is not inside the array.
          CorruptDataError: a shard or chunk is damaged.
        """
        if not 0 <= low <= high <= self.n:
            raise IndexError(f"{self.name}: [{low}, {high}) is outside an array of {self.n} elements")
        if out.shape != (high - low,):
            raise ValueError(f"{self.name}: {high - low} elements do not fit an array of shape {out.shape}")
        _read([(self, low, high, out)])

    def _runs(self, low: int, high: int, out: np.ndarray) -> Iterator[_Run]:
        """What must be read for elements [low, high); chunks that were never written are filled in here."""
        run: _Run | None = None
        shard, number = None, -1
        for chunk in range(low // self.chunk, -(-high // self.chunk)):
            which, within = divmod(chunk, self._chunks_per_shard)
            if shard is None or which != number:
                shard, number = self._open(which), which
            offset, first = shard.offset[within], chunk * self.chunk
            start, stop = max(low, first), min(high, first + self.chunk)
            if offset == _ABSENT:
                out[start - low : stop - low] = self.fill_value
            elif (
                run is not None
                and run.shard is shard
                and run.last == within
                and run.offset + run.n_bytes == offset
                and run.n_bytes + shard.size[within] <= RANGE_BYTES
            ):
                run.last, run.high = within + 1, stop
                run.out = out[run.low - low : stop - low]
                continue
            if run is not None:
                yield run
            run = None
            if offset != _ABSENT:
                target = out[start - low : stop - low]
                run = _Run(self, shard, number, within, within + 1, start, stop, target)
        if run is not None:
            yield run

    def _decode_run(self, run: _Run) -> None:
        """Checks and decodes the chunks of a run that was read, one by one, into its place."""
        direct = run.out.dtype == self.dtype and run.out.flags.c_contiguous
        for within in range(run.first, run.last):
            first = (run.number * self._chunks_per_shard + within) * self.chunk
            start, stop = max(run.low, first), min(run.high, first + self.chunk)
            target = run.out[start - run.low : stop - run.low]
            at = run.shard.offset[within] - run.offset
            stored = run.stored[at : at + run.shard.size[within]]
            into = target
            if not direct:
                into = _buffer("chunk", target.size * self.dtype.itemsize).view(self.dtype)
            self._decode(run.shard, run.number, within, stored, start - first, into)
            if not direct:
                target[:] = into

    def _open(self, number: int) -> _Shard:
        name, path = f"{self._prefix}c/{number}{self._tail}", f"{self.path}/c/{number}{self._tail}"
        where = f"{self.name}, shard {number}"

        def make() -> _Shard:
            expected = self._objects.get(name)
            try:
                file = self._store.open(name, expected)
                if expected is not None and file.size != expected["bytes"]:  # cut, or another shard's file
                    raise CorruptDataError(
                        f"{where}: {path} has {file.size} bytes, the manifest says {expected['bytes']}"
                    )
                return _Shard(file, path, where, self._chunks_per_shard, self._index_checksum)
            except FileNotFoundError:
                raise CorruptDataError(missing(where, path)) from None

        return self._shards.get(path, make)

    def _decode(
        self, shard: _Shard, number: int, within: int, stored: np.ndarray, first: int, out: np.ndarray
    ) -> None:
        """Elements of one chunk of a shard, from ``first`` on; what came damaged is read a second time."""
        try:
            self._decode_once(number, within, stored, first, out)
        except CorruptDataError:
            stored = _buffer("again", shard.size[within])
            shard.file.readinto(shard.offset[within], stored, again=True)
            self._decode_once(number, within, stored, first, out)

    def _decode_once(self, number: int, within: int, stored: np.ndarray, first: int, out: np.ndarray) -> None:
        def damaged(what: str) -> CorruptDataError:
            return CorruptDataError(
                f"{self.name}, shard {number}, chunk {within}: {what} ({self.path}/c/{number}{self._tail})"
            )

        if self._checksum:
            stored, checksum = stored[:-4], stored[-4:]
            if google_crc32c.value(stored) != int.from_bytes(checksum.tobytes(), "little"):
                raise damaged("its checksum does not match, the stored bytes have changed")
        due = self.chunk * self.dtype.itemsize
        if not self._blosc:
            if stored.size != due:
                raise damaged(f"holds {stored.size} bytes where {due} are due")
            low = first * self.dtype.itemsize
            out.view(np.uint8)[:] = stored[low : low + out.nbytes]
            return
        # blosc trusts its header, and without a checksum nobody else has looked at it
        _, decoded, n_bytes = blosc.sizes(stored)
        if (decoded, n_bytes) != (due, stored.size):
            raise damaged(f"its header promises {decoded} bytes from {n_bytes}, not {due} from {stored.size}")
        try:
            blosc.decode(stored, first, out)
        except RuntimeError as error:
            raise damaged(f"does not decompress: {error}") from None


def _read(jobs: Sequence[tuple[ShardedArray, int, int, np.ndarray]]) -> None:
    """Reads elements [low, high) of arrays, all of one store, into ``out``."""
    runs = [run for array, low, high, out in jobs for run in array._runs(low, high, out)]
    store = jobs[0][0]._store if jobs else None
    at = 0
    while at < len(runs):
        # over a network many ranges at a time, on a disk one: what was just read is still in the processor
        upto, n_bytes = at + 1, runs[at].n_bytes
        while store.remote and upto < len(runs) and n_bytes + runs[upto].n_bytes <= ARENA_BYTES:  # type: ignore[union-attr]
            n_bytes += runs[upto].n_bytes
            upto += 1
        arena, begin = _buffer("stored", n_bytes), 0
        for run in runs[at:upto]:
            run.stored = arena[begin : begin + run.n_bytes]
            begin += run.n_bytes
        store.map(_fetch, runs[at:upto])  # type: ignore[union-attr]
        for run in runs[at:upto]:
            run.array._decode_run(run)
        at = upto


def _fetch(run: _Run) -> None:
    try:
        got = run.shard.file.readinto(run.offset, run.stored)
    except FileNotFoundError:
        where = f"{run.array.name}, shard {run.number}"
        raise CorruptDataError(missing(where, f"{run.array.path}/c/{run.number}{run.array._tail}")) from None
    if got < run.stored.size:
        raise CorruptDataError(
            f"{run.array.name}, shard {run.number}, chunk {run.last - 1}: the file ends before the chunk "
            f"does ({run.array.path}/c/{run.number}{run.array._tail})"
        )


class PartReader:
    """Reads the counts of one part of a corpus.

    ``indices`` and ``data`` are the two arrays of the part's CSR matrix. Row r owns the elements
    ``row_span(r, r + 1)`` of both.
    """

    def __init__(self, part: Part, shards: ShardCache | None = None):
        """Readers that share a ``ShardCache`` share its limit on open files. Nothing is read yet."""
        self.part = part
        self._shards = shards if shards is not None else ShardCache()
        self._matrices: dict[str, ShardedArray] = {}

    @functools.cached_property
    def indices(self) -> ShardedArray:
        return self._array("X/indices")

    @functools.cached_property
    def data(self) -> ShardedArray:
        return self._array("X/data")

    def value(self, name: str, first: int, last: int) -> np.ndarray:
        """A value of rows [first, last), with the features of ``part.panels``.

        Returns:
          float32 [last - first] of a column, else [last - first, features]; NaN where missing.

        Raises:
          CorruptDataError: names part, array, shard and chunk.
        """
        panel, own = self.part.panels[name], self.part.stored.get(name)
        if own is None:
            return np.full((last - first, *panel.shape), np.nan, np.float32)
        if own.column:
            return self.column(f"values/{name}", first, last)
        width = len(own.features)
        table = np.empty((last - first, width), np.float32)
        self.matrix(name).read(first * width, last * width, table.reshape(-1))
        return place(table, own.features, panel.features)

    def matrix(self, name: str) -> ShardedArray:
        """A value that is a matrix of obsm, as its numbers one after the other."""
        if name not in self._matrices:  # two threads may both open it
            self._matrices[name] = self._array(f"obsm/{name}")
        return self._matrices[name]

    def _array(self, name: str) -> ShardedArray:
        part = self.part
        label = f"part {part.id}, array {name}"
        path = f"parts/{part.id}.zarr/{name}"
        return ShardedArray(path, label, self._shards, part.store, part.objects)

    def column(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """As ``Part.column``, with files that stay open, among those that the ``ShardCache`` bounds."""
        last = self.part.n_cells if last is None else last
        return self.part.arrays.read(name, first, last, lambda path: self._shards.file(self.part, path))

    def row_span(self, first: int, last: int) -> tuple[int, int]:
        """Elements of rows [first, last), numbered within the part: (low, high).

        Raises:
          CorruptDataError: the two index files that tell contradict each other.
        """
        return self._begin(first), self._begin(last)

    def _begin(self, row: int) -> int:
        block, within = divmod(row, BLOCK)
        start = int(self.part.arrays.blocks[block])
        if within == 0:
            return start
        rows = self.column("nnz", block * BLOCK, min((block + 1) * BLOCK, self.part.n_cells))
        if start + int(rows.sum(dtype=np.int64)) != self.part.arrays.blocks[block + 1]:
            raise CorruptDataError(
                f"part {self.part.id}: nnz.npy and blocks.npy of its index contradict each other "
                f"in rows {block * BLOCK} to {block * BLOCK + len(rows) - 1}"
            )
        return start + int(rows[:within].sum(dtype=np.int64))

    def read_spans(
        self,
        spans: Sequence[tuple[int, int]],
        indices: np.ndarray,
        data: np.ndarray,
        pool: Executor | None = None,
    ) -> None:
        """Reads ranges of elements, one after the other, into the front of ``indices`` and ``data``.

        Args:
          spans: (low, high) each, in elements of the part.
          indices, data: 1-D, as long as all spans together or longer. Fastest where their types are those
            of the part (``part.index_dtype``, ``part.x_dtype``); converted otherwise.
          pool: where the reads run side by side; in the calling thread if None. Two threads are enough for
            a local disk.

        Raises:
          CorruptDataError: names part, array, shard and chunk.
        """
        jobs: list[tuple[ShardedArray, int, int, np.ndarray]] = []
        at = 0
        for low, high in spans:
            to = slice(at, at + high - low)
            jobs += [(self.indices, low, high, indices[to]), (self.data, low, high, data[to])]
            at += high - low
        if pool is None:
            _read(jobs)
            return
        reads = [pool.submit(array.read, low, high, out) for array, low, high, out in jobs]
        errors = [read.exception() for read in reads]  # waits for all: none may write after this returns
        for error in errors:
            if error is not None:
                raise error
