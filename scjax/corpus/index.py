"""The index of a part: one small array per property of its cells, read in blocks that are checked.

A column is a plain ``.npy`` file of one value per cell. ``checks.npy`` holds the CRC-32C of every block of
1,024 cells of every column, so that a slice costs a read of the blocks it touches and nothing is believed
unchecked; ``columns.json`` lists the columns; ``blocks.npy`` says where each block's counts begin.
"""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import google_crc32c
import numpy as np

from scjax.corpus.format import BLOCK
from scjax.corpus.store import CorruptDataError, Store, StoredFile, missing, read_checked

# The type and the values per cell of a column follow from its name: a reader believes no header.
_LAYOUT: dict[str, tuple[np.dtype, int]] = {
    "nnz": (np.dtype("<u4"), 1),
    "total": (np.dtype("<f8"), 1),
    "content": (np.dtype("<u8"), 2),
}
_CODES, _VALUES = (np.dtype("<i4"), 1), (np.dtype("<f4"), 1)


def column_layout(name: str) -> tuple[np.dtype, int]:
    """(type, values per cell) of a column: "nnz", "total", "content", "codes/<label>" or "values/<name>"."""
    if name not in _LAYOUT and not name.startswith(("codes/", "values/")):
        raise KeyError(f"no column {name!r}; there are nnz, total, content, codes/<label> and values/<name>")
    return _LAYOUT.get(name, _VALUES if name.startswith("values/") else _CODES)


def write_index(folder: pathlib.Path, columns: Mapping[str, np.ndarray], nnz: np.ndarray) -> None:
    """Writes the index of a part.

    Args:
      folder: the new folder ``index/<part>``.
      columns: name -> one value per cell (two for "content"), as ``column_layout`` has it; "nnz" may be
        left out, it is written first in any case.
      nnz: [n_cells], expressed genes of each cell.

    Raises:
      ValueError: a column of another length; names it.
    """
    table = {"nnz": nnz, **{name: values for name, values in columns.items() if name != "nnz"}}
    checks = np.zeros((len(table), -(-len(nnz) // BLOCK)), "<u4")
    for number, (name, values) in enumerate(table.items()):
        dtype, width = column_layout(name)
        values = np.ascontiguousarray(values, dtype)
        if values.shape != ((len(nnz),) if width == 1 else (len(nnz), width)):
            raise ValueError(f"column {name}: shape {values.shape} does not fit {len(nnz)} cells")
        path = folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values)
        for block in range(checks.shape[1]):
            checks[number, block] = google_crc32c.value(values[block * BLOCK : (block + 1) * BLOCK].tobytes())
    starts = np.concatenate([[0], np.cumsum(nnz, dtype=np.int64)])
    np.save(folder / "blocks.npy", np.append(starts[:-1:BLOCK], starts[-1]))
    np.save(folder / "checks.npy", checks)
    (folder / "columns.json").write_text(json.dumps(list(table)) + "\n")


class PartIndex:
    """Reads the index of one part. May be used by several threads at once.

    Attributes:
      blocks: int64 [n_blocks + 1], element at which each block of 1,024 rows starts; the last is the part's
        number of elements.
      names: the columns that the part has.
    """

    def __init__(
        self, store: Store, part: str, n_cells: int, nnz: int, objects: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Reads and checks the three files that describe the others.

        Raises:
          CorruptDataError: one of them is missing, damaged or does not fit the manifest.
        """
        self._store, self._part, self._objects = store, part, objects
        self._n_cells = n_cells
        n_blocks = -(-n_cells // BLOCK)
        names, blocks, checks = store.map(self._whole, ("columns.json", "blocks.npy", "checks.npy"))
        self.names: list[str] = json.loads(names)
        self.blocks = self._array("blocks.npy", blocks, np.dtype("<i8"), (n_blocks + 1,))
        self._checks = self._array("checks.npy", checks, np.dtype("<u4"), (len(self.names), n_blocks))
        if self.blocks[-1] != nnz:
            raise CorruptDataError(
                f"part {part}: its index ends at element {self.blocks[-1]}, the manifest says {nnz}"
            )

    def _whole(self, name: str) -> bytes:
        return read_checked(
            self._store, f"index/{self._part}/{name}", self._objects, f"part {self._part}, index"
        )

    def _array(self, name: str, content: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        array = np.load(io.BytesIO(content), allow_pickle=False)
        if array.dtype != dtype or array.shape != shape:
            raise CorruptDataError(
                f"part {self._part}, index: {name} holds {array.dtype} {array.shape}, not {dtype} {shape}"
            )
        return array

    def read(
        self, name: str, first: int, last: int, opened: Callable[[str], StoredFile] | None = None
    ) -> np.ndarray:
        """The values of rows [first, last) of a column.

        Args:
          name: of the column; one that the part does not have (a label that came with a later append) reads
            as -1.
          first, last: rows of the part.
          opened: gives the open object of a name; opened for this read alone if None.

        Returns:
          [last - first], or [last - first, 2] for "content"; a new array.

        Raises:
          IndexError: rows that the part does not have.
          CorruptDataError: missing, cut short or damaged; names the column and the block.
        """
        if not 0 <= first <= last <= self._n_cells:
            raise IndexError(
                f"part {self._part}: rows [{first}, {last}) are outside a part of {self._n_cells}"
            )
        dtype, width = column_layout(name)
        if name not in self.names:
            if not name.startswith("codes/"):
                raise KeyError(f"part {self._part} has no column {name!r}; it has {', '.join(self.names)}")
            return np.full(last - first, -1, dtype)
        row = dtype.itemsize * width
        low, high = first // BLOCK * BLOCK, min(-(-last // BLOCK) * BLOCK, self._n_cells)
        raw = np.empty((high - low) * row, np.uint8)
        if raw.size:
            self._fill(name, low, raw, row, opened or self._open)
        values = raw.view(dtype).reshape(-1, width) if width > 1 else raw.view(dtype)
        return values[first - low : last - low]

    def _open(self, name: str) -> StoredFile:
        return self._store.open(name, self._objects[name])

    def _fill(
        self, name: str, low: int, raw: np.ndarray, row: int, opened: Callable[[str], StoredFile]
    ) -> None:
        """Reads whole blocks from row ``low`` on into ``raw`` (uint8) and checks each."""
        path = f"index/{self._part}/{name}.npy"
        if path not in self._objects:
            raise CorruptDataError(f"part {self._part}: the manifest tells of no {path}")
        # the values are the end of the file; what stands before them need not be looked at
        begin = int(self._objects[path]["bytes"]) - self._n_cells * row
        where, checks = self._store.where(path), self._checks[self.names.index(name)]
        wrong = -1
        for again in (False, True):
            try:
                got = opened(path).readinto(begin + low * row, raw, again)
            except FileNotFoundError:
                raise CorruptDataError(missing(f"part {self._part}, column {name}", where)) from None
            if got < raw.size:
                raise CorruptDataError(
                    f"part {self._part}, column {name}: {where} is cut short, {got} of {raw.size} bytes are "
                    "there"
                )
            for block, at in enumerate(range(0, raw.size, BLOCK * row), low // BLOCK):
                if google_crc32c.value(raw[at : at + BLOCK * row]) != checks[block]:
                    wrong = block
                    break
            else:
                return
        raise CorruptDataError(
            f"part {self._part}, column {name}: rows {wrong * BLOCK} to "
            f"{min((wrong + 1) * BLOCK, self._n_cells) - 1} of {where} do not have the checksum that the "
            "index states, they have changed"
        )
