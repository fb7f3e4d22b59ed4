"""Ranged reads of the counts of a part, without a zarr library in the way.

A part stores its expressed genes and their counts as two 1-D zarr v3 arrays. Each is cut into inner chunks
(decoded as a whole), and runs of chunks are packed into shard files that end in an index: the offset and
size of every chunk, and a checksum. The reader keeps shard files open and their indices in memory, reads one
chunk with one ``pread``, checks its CRC-32C and decompresses it straight into the caller's array.

Everything here may be called from several threads at once; reading and decompressing release the GIL.

Layout: Zarr v3 specification, codecs ``sharding_indexed``, ``bytes``, ``blosc`` and ``crc32c``.
"""

from __future__ import annotations

import collections
import json
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from numcodecs import Blosc

from scjax.corpus.format import BLOCK
from scjax.corpus.store import CorruptDataError, StoredFile

if TYPE_CHECKING:
    from scjax.corpus import Part

OPEN_SHARDS = 256  # a corpus of 100 million cells has 12 thousand shard files, more than may be open at once
_ABSENT = 2**64 - 1  # offset and size of a chunk that was never written: all fill value
_BLOSC_HEADER = 16

_scratch = threading.local()


def _buffer(name: str, size: int) -> np.ndarray:
    """This thread's scratch memory of that name: uint8[size], grown when needed and never given back."""
    held = getattr(_scratch, name, None)
    if held is None or held.size < size:
        held = np.empty(size + size // 4, np.uint8)
        setattr(_scratch, name, held)
    return held[:size]


def _pread(fd: int, out: np.ndarray, offset: int) -> int:
    """Fills ``out`` (uint8) from a file; returns the bytes read, fewer only at the end of the file."""
    done = 0
    while done < out.size:
        n = os.preadv(fd, [out[done:].data], offset + done)
        if n == 0:
            break
        done += n
    return done


class _Shard:
    """An open shard file and its index. The file is closed when the last user lets go of the object."""

    def __init__(self, path: str, where: str, n_chunks: int, index_checksum: bool):
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise CorruptDataError(f"{where}: the file {path} is missing") from None
        weakref.finalize(self, os.close, self.fd).atexit = False
        size = os.fstat(self.fd).st_size
        index = np.empty(16 * n_chunks + 4 * index_checksum, np.uint8)
        if size < index.size or _pread(self.fd, index, size - index.size) < index.size:
            raise CorruptDataError(f"{where}: {path} is cut short ({size} bytes, less than its index)")
        entries = index[: 16 * n_chunks]
        if index_checksum and google_crc32c.value(entries) != int(index[-4:].view("<u4")[0]):
            raise CorruptDataError(f"{where}: the checksum of the index at the end of {path} does not match")
        self.offset, self.size = entries.view("<u8").reshape(-1, 2).T.tolist()
        for chunk, (offset, n) in enumerate(zip(self.offset, self.size, strict=True)):
            if offset != _ABSENT and offset + n > size - index.size:
                raise CorruptDataError(
                    f"{where}, chunk {chunk}: lies beyond the end of {path} ({size} bytes)"
                )


class ShardCache:
    """The shard files that are open, at most ``limit``, the least recently used closed first."""

    def __init__(self, limit: int = OPEN_SHARDS):
        self._limit = limit
        self._held: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str, where: str, n_chunks: int, index_checksum: bool) -> _Shard:
        return self._get(path, lambda: _Shard(path, where, n_chunks, index_checksum))

    def file(self, part: Part, name: str) -> StoredFile:
        """An object of a part's store, opened."""
        return self._get((part.id, name), lambda: part.store.open(name))

    def _get(self, key: Any, make: Callable[[], Any]) -> Any:
        with self._lock:
            held = self._held.get(key)
            if held is None:
                held = self._held[key] = make()
                if len(self._held) > self._limit:
                    self._held.popitem(last=False)
            else:
                self._held.move_to_end(key)
            return held

    def close(self) -> None:
        with self._lock:
            self._held.clear()


class ShardedArray:
    """A 1-D sharded zarr v3 array, opened for reading.

    Attributes:
      n: number of elements.
      dtype: type of the stored elements.
      chunk: elements per inner chunk; a read costs whole chunks.
      shard: elements per shard file.
    """

    def __init__(
        self, path: str | os.PathLike[str], name: str | None = None, shards: ShardCache | None = None
    ):
        """Opens the array in the directory ``path``; ``name`` stands for it in error messages.

        Raises:
          FileNotFoundError: there is no array.
          ValueError: it is not a 1-D array in the layout that this module reads; says what differs.
        """
        self.path = os.fspath(path)
        self.name = name or self.path
        self._shards = shards if shards is not None else ShardCache()
        try:
            meta = json.loads(Path(self.path, "zarr.json").read_text())
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
        expect("number of dimensions", len(meta["shape"]), 1)
        expect("chunk grid", meta["chunk_grid"]["name"], "regular")
        keys = meta.get("chunk_key_encoding", {"name": "default"})
        expect("chunk key encoding", keys["name"], "default")
        expect("chunk key separator", keys.get("configuration", {}).get("separator", "/"), "/")
        expect("outer codecs", [codec["name"] for codec in meta["codecs"]], ["sharding_indexed"])
        sharding = meta["codecs"][0]["configuration"]
        expect("place of the shard index", sharding.get("index_location", "end"), "end")
        index = [codec["name"] for codec in sharding["index_codecs"]]
        expect("index codecs", index, ["bytes", "crc32c"], ["bytes"])
        inner = [codec["name"] for codec in sharding["codecs"]]
        expect("inner codecs", inner, *(["bytes", *z, *c] for z in (["blosc"], []) for c in (["crc32c"], [])))
        endian = sharding["codecs"][0].get("configuration", {}).get("endian", "little")
        expect("byte order", endian, "little")

        self.n = int(meta["shape"][0])
        self.dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        self.shard = int(meta["chunk_grid"]["configuration"]["chunk_shape"][0])
        self.chunk = int(sharding["chunk_shape"][0])
        self.fill_value = self.dtype.type(meta["fill_value"])
        self._chunks_per_shard = self.shard // self.chunk
        self._index_checksum = "crc32c" in index
        self._checksum = "crc32c" in inner
        self._blosc = Blosc() if "blosc" in inner else None

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
        direct = out.dtype == self.dtype and out.flags.c_contiguous
        shard, number = None, -1
        for chunk in range(low // self.chunk, -(-high // self.chunk)):
            which, within = divmod(chunk, self._chunks_per_shard)
            if shard is None or which != number:
                shard, number = self._open(which), which
            first = chunk * self.chunk
            start, stop = max(low, first), min(high, first + self.chunk)
            target = out[start - low : stop - low]
            if shard.offset[within] == _ABSENT:
                target[:] = self.fill_value
            elif direct and stop - start == self.chunk:
                self._decode(shard, number, within, target.view(np.uint8))
            else:
                whole = _buffer("chunk", self.chunk * self.dtype.itemsize)
                self._decode(shard, number, within, whole)
                target[:] = whole.view(self.dtype)[start - first : stop - first]

    def _open(self, number: int) -> _Shard:
        path, where = f"{self.path}/c/{number}", f"{self.name}, shard {number}"
        return self._shards.get(path, where, self._chunks_per_shard, self._index_checksum)

    def _decode(self, shard: _Shard, number: int, within: int, out: np.ndarray) -> None:
        """One chunk of a shard, whole, into ``out`` (uint8)."""

        def damaged(what: str) -> CorruptDataError:
            return CorruptDataError(
                f"{self.name}, shard {number}, chunk {within}: {what} ({self.path}/c/{number})"
            )

        stored = _buffer("stored", shard.size[within])
        if _pread(shard.fd, stored, shard.offset[within]) < stored.size:
            raise damaged("the file ends before the chunk does")
        if self._checksum:
            stored, checksum = stored[:-4], stored[-4:]
            if google_crc32c.value(stored) != int.from_bytes(checksum.tobytes(), "little"):
                raise damaged("its checksum does not match, the stored bytes have changed")
        if self._blosc is None:
            if stored.size != out.size:
                raise damaged(f"holds {stored.size} bytes where {out.size} are due")
            out[:] = stored
            return
        # blosc trusts its header, and without a checksum nobody else has looked at it
        header = stored[:_BLOSC_HEADER].tobytes()
        sizes = int.from_bytes(header[4:8], "little"), int.from_bytes(header[12:16], "little")
        if sizes != (out.size, stored.size):
            raise damaged(
                f"its header promises {sizes[0]} bytes from {sizes[1]}, not {out.size} from {stored.size}"
            )
        try:
            self._blosc.decode(stored, out=out)
        except RuntimeError as error:
            raise damaged(f"does not decompress: {error}") from None


class PartReader:
    """Reads the counts of one part of a corpus.

    ``indices`` and ``data`` are the two arrays of the part's CSR matrix. Row r owns the elements
    ``row_span(r, r + 1)`` of both.
    """

    def __init__(self, part: Part, shards: ShardCache | None = None):
        """Readers that share a ``ShardCache`` share its limit on open files."""
        self.part = part
        self._shards = shards = shards if shards is not None else ShardCache()
        self.indices = ShardedArray(part.path / "X/indices", f"part {part.id}, array X/indices", shards)
        self.data = ShardedArray(part.path / "X/data", f"part {part.id}, array X/data", shards)

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
            for array, low, high, out in jobs:
                array.read(low, high, out)
            return
        reads = [pool.submit(array.read, low, high, out) for array, low, high, out in jobs]
        errors = [read.exception() for read in reads]  # waits for all: none may write after this returns
        for error in errors:
            if error is not None:
                raise error
