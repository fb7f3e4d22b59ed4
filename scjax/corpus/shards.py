"""Writing the counts of a part: the bytes of a sharded zarr v3 array, made here and read back at once.

zarr's own writer makes the same kind of file at five times the cost, because it takes the long way for every
chunk. The metadata are zarr's; the shards are laid down here: compressed chunks, each followed by its
CRC-32C, then an index of (offset, bytes) of every chunk, then the CRC-32C of the index.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import Blosc
from zarr.codecs import BloscCodec, Crc32cCodec

from scjax.corpus.format import BLOCK, CODECS, Layout

_ABSENT = 2**64 - 1
_SHUFFLE = {"shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}


class ShardWriter:
    """Writes one array of a part, a shard at a time, in order.

    Attributes:
      shard: elements of a shard.
      objects: file below the part's folder -> {"bytes", "sha256", "crc32c"}, as they were read back.
    """

    def __init__(
        self,
        group: zarr.Group,
        name: str,
        dtype: np.dtype,
        size: int,
        layout: Layout,
        width: int | None = None,
    ) -> None:
        """``size`` elements of one dimension or, with ``width``, rows of as many. A chunk then holds whole
        rows, so that it is the same bytes as one of their elements one after the other."""
        kind = "data" if width or name == "data" else "indices"
        compressor = CODECS[layout.codec][kind]
        codecs: list[Any] = [Crc32cCodec()]
        self._blosc: Any = None
        if compressor is not None:
            cname, level, shuffle = compressor
            codecs.insert(
                0,
                BloscCodec(cname=cname, clevel=level, shuffle=shuffle, typesize=dtype.itemsize),  # type: ignore[arg-type]
            )
            self._blosc = Blosc(cname, level, _SHUFFLE[shuffle])
        # zarr leaves out a chunk of fill values only: no gene has this id, and no stored count is 0.
        self._fill = int(np.iinfo(dtype).max) if kind == "indices" and name == kind else 0
        rows = layout.inner if width is None else max(1, min(BLOCK, layout.inner // width))
        more = () if width is None else (width,)
        each, self._tail = math.prod(more), "/0" * len(more)
        self._inner, self.shard = rows * each, rows * each * (layout.shard // layout.inner)
        array = group.create_array(
            name,
            shape=(size, *more),
            dtype=dtype,
            chunks=(rows, *more),
            shards=(self.shard // each, *more),
            compressors=codecs,
            filters=None,
            fill_value=self._fill,
            attributes={"encoding-type": "array", "encoding-version": "0.2.0"} if width else None,
        )
        self._name = f"{array.path}/c"
        self._folder = pathlib.Path(str(group.store_path.store.root)) / self._name  # type: ignore[attr-defined]
        self._folder.mkdir()
        self._dtype = dtype
        self._held = np.empty(0, np.uint8)
        self._chunk = np.empty(min(self._inner, -(-size * each // self._inner) * self._inner), dtype)
        self._next = 0
        self.objects: dict[str, dict[str, Any]] = {}

    def write(self, values: np.ndarray) -> None:
        """Writes the next shard, reads it back and compares.

        Args:
          values: all elements of the shard, fewer only in the last; may be reused by the caller.

        Raises:
          OSError: the disk is full, or gave back other bytes than it took.
        """
        inner, n_chunks = self._inner, self.shard // self._inner
        index = np.full((n_chunks, 2), _ABSENT, "<u8")
        path = self._folder / f"{self._next}{self._tail}"
        path.parent.mkdir(exist_ok=True)
        at = 0
        with open(path, "wb") as file:
            for chunk, low in enumerate(range(0, len(values), inner)):
                piece = self._piece(values, low)
                stored = piece.view(np.uint8).data if self._blosc is None else self._blosc.encode(piece)
                file.write(stored)
                file.write(google_crc32c.value(bytes(stored)).to_bytes(4, "little"))
                index[chunk] = at, len(stored) + 4
                at += len(stored) + 4
            tail = index.tobytes()
            file.write(tail + google_crc32c.value(tail).to_bytes(4, "little"))
        self._read_back(path, values, index)
        self._next += 1

    def _piece(self, values: np.ndarray, low: int) -> np.ndarray:
        """One chunk; the array's last is filled up."""
        piece = values[low : low + self._inner]
        if len(piece) == self._inner and piece.dtype == self._dtype:
            return piece
        self._chunk[: len(piece)] = piece
        self._chunk[len(piece) :] = self._fill
        return self._chunk

    def _read_back(self, path: pathlib.Path, values: np.ndarray, index: np.ndarray) -> None:
        """What was written is what was meant; its checksums are those of what lies there now."""
        size = path.stat().st_size
        if len(self._held) < size:
            self._held = np.empty(size + size // 8, np.uint8)
        stored = self._held[:size]
        with open(path, "rb") as file:
            got = file.readinto(stored.data)
        same = got == size
        decoded = np.empty(self._inner, self._dtype)
        nan = self._dtype.kind == "f"
        for chunk, low in enumerate(range(0, len(values), self._inner)):
            start, n = (int(v) for v in index[chunk])
            body = stored[start : start + n - 4]
            crc = int.from_bytes(stored[start + n - 4 : start + n].tobytes(), "little")
            same = same and google_crc32c.value(body) == crc
            if same and self._blosc is None:
                decoded = body.view(self._dtype)
            elif same:
                self._blosc.decode(body, out=decoded)
            expected = values[low : low + self._inner]
            same = same and np.array_equal(decoded[: len(expected)], expected, equal_nan=nan)
        if not same:
            raise OSError(f"{path}: reads back other values than were written: is the disk failing?")
        self.objects[f"{self._name}/{self._next}{self._tail}"] = {
            "bytes": size,
            "sha256": hashlib.sha256(stored.data).hexdigest(),
            "crc32c": f"{google_crc32c.value(stored):08x}",
        }
