"""An AnnData in memory, or backed by a file, as a source."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scjax.corpus.sources import base
from scjax.corpus.sources.base import Source
from scjax.corpus.sources.matrix import cut, dense_runs


class MemorySource(Source):
    """An AnnData in memory, or backed by a file."""

    def __init__(self, adata: ad.AnnData, name: str, layer: str) -> None:
        self.name, self.file, self.layer = name, None, layer
        self.where = f"AnnData {name!r}, {base.title(layer)}"
        self._adata = adata
        if layer == "X":
            self._matrix = adata.X
        elif layer == "raw":
            self._matrix = None if adata.raw is None else adata.raw.X
        else:
            self._matrix = adata.layers[layer] if layer in adata.layers else None
        if self._matrix is None:
            matrices = (("X", adata.X), ("raw", adata.raw), *adata.layers.items())
            raise base.no_layer(f"AnnData {name!r}", layer, [n for n, m in matrices if n and m is not None])
        self.shape = base.check_shape(self.where, self._matrix.shape, len(self.obs), len(self.var))
        self.n_stored = self._matrix.nnz if sparse.issparse(self._matrix) else self.shape[0] * self.shape[1]

    @property
    def obs(self) -> pd.DataFrame:
        return self._adata.obs

    @property
    def var(self) -> pd.DataFrame:
        return self._adata.raw.var if self.layer == "raw" else self._adata.var

    @contextlib.contextmanager
    def obsm(self) -> Iterator[Mapping[str, Any]]:
        yield dict(self._adata.obsm)

    def sha256(self) -> str:
        digest = hashlib.sha256("\n".join([*self.var.index, "", *self.obs.index]).encode())
        for rows in self._rows(0, self.shape[0], None):
            rows.sort_indices()
            for part in (
                np.diff(rows.indptr).astype("<i8"),
                rows.indices.astype("<i8"),
                rows.data.astype("<f8"),
            ):
                digest.update(part.tobytes())
        return digest.hexdigest()

    def runs(self, max_elements: int) -> list[tuple[int, int]]:
        if not sparse.issparse(self._matrix):
            return dense_runs(self.shape, 1, max_elements)
        if self._matrix.format != "csr":
            return super().runs(max_elements)
        return list(cut(self._matrix.indptr.astype(np.int64), max_elements))

    def _rows(self, first: int, last: int, scratch: pathlib.Path | None) -> Iterator[sparse.csr_matrix]:
        matrix = self._matrix
        if sparse.issparse(matrix):
            matrix = matrix.tocsr()
            density = matrix.nnz / self.shape[0]
        else:
            density = self.shape[1]
        step = max(1, int(base.CHUNK_ELEMENTS / max(density, 1)))
        for start in range(first, last, step):
            rows = sparse.csr_matrix(matrix[start : min(start + step, last)], copy=True)
            rows.data = base.plain(rows.data)
            yield rows

    def _heads(self) -> dict[str, np.ndarray]:
        matrices = {**self._adata.layers, "X": self._adata.X}
        matrices.pop(None, None)  # what anndata 0.13 calls X among the layers
        if self._adata.raw is not None:
            matrices["raw"] = self._adata.raw.X
        heads = {}
        for name, matrix in matrices.items():
            if matrix is not None:
                head = matrix[:100]
                heads[name] = head.data if sparse.issparse(head) else np.asarray(head)
        return heads
