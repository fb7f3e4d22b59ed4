"""What fixes the bytes of a corpus part: compressors, sizes of its pieces, types of its counts."""

from __future__ import annotations

import dataclasses

import numpy as np

BLOCK = 1024  # rows per entry of blocks.npy
PART_CELLS = 2**18
INNER = 2**18  # elements per inner chunk: the unit of decoding
SHARD = 2**25  # elements per shard: the unit of storage

# profile -> array -> (compressor, level, shuffle); None stores the bytes as they are.
CODECS: dict[str, dict[str, tuple[str, int, str] | None]] = {
    "fast": {"indices": ("lz4", 3, "shuffle"), "data": ("lz4", 5, "bitshuffle")},
    "balanced": {"indices": ("lz4", 3, "shuffle"), "data": ("zstd", 1, "shuffle")},
    "small": {"indices": ("zstd", 1, "shuffle"), "data": ("zstd", 1, "shuffle")},
    "local": {"indices": None, "data": None},
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the counts of every part of a corpus are stored.

    Attributes:
      codec: a key of CODECS.
      part_cells: most cells in a part.
      inner: elements per inner chunk.
      shard: elements per shard, a multiple of ``inner``.
    """

    codec: str = "fast"
    part_cells: int = PART_CELLS
    inner: int = INNER
    shard: int = SHARD

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec={self.codec!r}: there are {', '.join(CODECS)}")
        if self.part_cells < 1 or self.inner < 1:
            raise ValueError(f"part_cells={self.part_cells} and inner={self.inner} must be at least 1")
        if self.shard < self.inner or self.shard % self.inner:
            raise ValueError(f"shard={self.shard} must be a multiple of inner={self.inner}")


def index_dtype(n_genes: int) -> np.dtype:
    """Smallest of uint16 and uint32 that holds every gene id and one value more (the fill value)."""
    return np.dtype(np.uint16 if n_genes < 2**16 else np.uint32)


def x_dtype(largest: float, whole: bool) -> np.dtype:
    """Smallest of uint16 and uint32 that holds every count; float32 where some are fractions."""
    return np.dtype(np.float32 if not whole else np.uint16 if largest < 2**16 else np.uint32)
