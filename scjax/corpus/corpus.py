"""Reading a corpus: its parts, its labels, any of its cells."""

from __future__ import annotations

import dataclasses
import functools
import io
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import rich.console
import zarr
from scipy import sparse

from scjax.corpus.format import BLOCK
from scjax.corpus.index import PartIndex
from scjax.corpus.locks import hold_manifest
from scjax.corpus.manifest import read_manifest
from scjax.corpus.panels import Panel, read_entries
from scjax.corpus.progress import counted
from scjax.corpus.reader import PartReader
from scjax.corpus.remote import Patience
from scjax.corpus.store import LocalStore, Store, open_store, read_checked
from scjax.corpus.summary import summarise
from scjax.corpus.verify import verify
from scjax.genes import Vocabulary

if TYPE_CHECKING:
    from scjax.corpus.statistics import GeneStatistics

RUN_ELEMENTS = 2**24  # stored values that Corpus.read holds of one part at a time, beside what it returns


@dataclasses.dataclass(frozen=True)
class Part:
    """One immutable piece of a corpus: at most ``part_cells`` cells of one split.

    Attributes:
      id: name of the part, unique in the corpus.
      path: its AnnData zarr group, as a ``pathlib.Path``, or as a URL in an object store.
      index: folder of its index arrays, likewise.
      first_row: global row number of its first cell.
      n_cells, nnz, max_nnz: cells, expressed (cell, gene) pairs, most expressed genes in a cell.
      split: "train" or "validation".
      index_dtype, x_dtype: of X/indices and X/data.
      inner: elements per inner chunk of both arrays.
      store: where its objects are.
      objects: the manifest's entries on its objects: name -> {"bytes", "crc32c", "sha256"}.
      labels: names of the corpus's label columns.
      panels: the values that are asked for, name -> features.
      stored: those that it holds. In a mixture they may be fewer, or have other features.
    """

    id: str
    path: Any
    index: Any
    first_row: int
    n_cells: int
    nnz: int
    max_nnz: int
    split: str
    index_dtype: np.dtype
    x_dtype: np.dtype
    inner: int
    store: Store = dataclasses.field(repr=False, compare=False)
    objects: dict[str, dict[str, Any]] = dataclasses.field(repr=False, compare=False)
    labels: tuple[str, ...]
    panels: Mapping[str, Panel] = dataclasses.field(repr=False, compare=False)
    stored: Mapping[str, Panel] = dataclasses.field(repr=False, compare=False)

    def group(self, *names: str) -> Any:
        """Some of the part's AnnData group ("obs", "X/indptr", ...), each object checked, to read from.

        Returns:
          A read-only ``zarr.Group`` in memory. The counts have a faster way: ``PartReader``.

        Raises:
          CorruptDataError: an object is missing or damaged; names it.
        """
        from zarr.core.buffer import default_buffer_prototype
        from zarr.storage import MemoryStore

        prefix = f"parts/{self.id}.zarr/"

        def belongs(path: str) -> bool:
            """Below one of the names, or what describes a group that holds one."""
            above = path.endswith("zarr.json") and any(
                n.startswith(path.removesuffix("zarr.json")) for n in names
            )
            return above or path.startswith(tuple(f"{n}/" for n in names))

        wanted = [name for name in self.objects if name.startswith(prefix) and belongs(name[len(prefix) :])]
        buffer = default_buffer_prototype().buffer

        def read(name: str) -> Any:
            return buffer.from_bytes(read_checked(self.store, name, self.objects, f"part {self.id}"))

        held = zip(wanted, self.store.map(read, wanted), strict=True)
        contents = {name.removeprefix(prefix): content for name, content in held}
        return zarr.open_group(MemoryStore(contents), mode="r", use_consolidated=False)

    @functools.cached_property
    def arrays(self) -> PartIndex:
        """The part's index, read and checked at first use."""
        return PartIndex(self.store, self.id, self.n_cells, self.nnz, self.objects)

    def column(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Values of rows [first, last) of a column of the index, checked.

        Args:
          name: "nnz" (uint32), "total" (float64), "codes/<label>" (int32, -1 where unknown), "values/<name>"
            (float32, of a value that is a column; ``PartReader.value`` reads all) or "content" (uint64
            [n, 2], hash of the cell, where the build dropped duplicates).
          first, last: rows of the part; by default all.

        Returns:
          [last - first]; a new array.

        Raises:
          KeyError: no such column; lists those there are.
          CorruptDataError: names the part, the column and the rows.
        """
        if name.startswith("codes/") and name[6:] not in self.labels:
            raise KeyError(f"no label column {name[6:]!r}; there are: {', '.join(sorted(self.labels))}")
        return self.arrays.read(name, first, self.n_cells if last is None else last)

    @property
    def nnz_per_cell(self) -> np.ndarray:
        """uint32 [n_cells], expressed genes of each cell."""
        return self.column("nnz")

    @property
    def total(self) -> np.ndarray:
        """float64 [n_cells], total counts of each cell in its source, over all genes."""
        return self.column("total")

    @property
    def blocks(self) -> np.ndarray:
        """int64 [n_blocks + 1], element at which each block of 1,024 rows starts; the last is ``nnz``."""
        return self.arrays.blocks

    def codes(self, column: str) -> np.ndarray:
        """int32 [n_cells], codes into ``Corpus.columns[column]``, -1 where unknown."""
        return self.column(f"codes/{column}")


class Corpus:
    """A set of immutable parts with one vocabulary. Rows are numbered over the parts in manifest order.

    Use ``Corpus.open(path)``; opening reads the manifest and nothing else. What is read later is checked
    against it, so that damage is an error that names the object and never wrong data.

    Attributes:
      path: folder of the corpus, or its URL as text.
      manifest_id, manifest: the state that was opened, and what it says.
      parts: the parts, in order.
      store: where the objects are.
      panels: the values of its cells, name -> ``Panel``.
    """

    def __init__(self, path: Any, manifest_id: str, manifest: dict[str, Any], store: Store) -> None:
        self.path, self.manifest_id, self.manifest = path, manifest_id, manifest
        self.store = store
        self.panels = read_entries(manifest.get("values", {}))
        parts = []
        first = 0
        for entry in manifest["parts"]:
            parts.append(
                Part(
                    id=entry["id"],
                    path=_join(path, f"parts/{entry['id']}.zarr"),
                    index=_join(path, f"index/{entry['id']}"),
                    first_row=first,
                    n_cells=entry["n_cells"],
                    nnz=entry["nnz"],
                    max_nnz=entry["max_nnz"],
                    split=entry["split"],
                    index_dtype=np.dtype(entry["index_dtype"]),
                    x_dtype=np.dtype(entry["x_dtype"]),
                    inner=manifest["inner"],
                    store=self.store,
                    objects=entry["objects"],
                    labels=tuple(manifest["columns"]),
                    panels=self.panels,
                    stored=self.panels,
                )
            )
            first += entry["n_cells"]
        self.parts: tuple[Part, ...] = tuple(parts)
        self._len = first

    @classmethod
    def open(
        cls,
        path: str | pathlib.Path,
        manifest: str | None = None,
        *,
        cache: str | pathlib.Path | bool | None = None,
        cache_bytes: int | None = None,
        patience: Patience | None = None,
    ) -> Corpus:
        """Opens a corpus, at its present state or at an earlier manifest.

        Args:
          path: its folder, or its URL in an object store: s3://, gs://, az://, http:// or https:// (with
            ``pip install 'scjax[remote]'``). Credentials and endpoints are those of the environment.
          manifest: id of an earlier state.
          cache: of a URL, the folder in which what was read is kept, and found again by all corpora and
            processes; by default ``$SCJAX_CACHE`` or ``~/.cache/scjax``. False keeps nothing.
          cache_bytes: what the cache may hold; what was not used for longest is then removed. By default as
            much as the disk has room for.
          patience: how long the object store may take, and how often it is asked again.

        Raises:
          FileNotFoundError: no complete corpus there, or no such manifest.
          ValueError: damaged, of an unknown format version, or a URL that no store is known for.
          StoreError (an OSError): the object store does not deliver.
          ImportError: a URL, and obstore is not installed.
        """
        store = open_store(path, cache, cache_bytes, patience)
        if isinstance(store, LocalStore):
            manifest_id, content, store.held = hold_manifest(store.root, manifest)
            return cls(store.root, manifest_id, content, store)  # gc leaves alone what ``held`` holds
        manifest_id, content = read_manifest(store, manifest)
        return cls(store.where(""), manifest_id, content, store)

    def __len__(self) -> int:
        return self._len

    def __repr__(self) -> str:
        genes, parts = self.manifest["vocabulary"]["n_genes"], counted(len(self.parts), "part")
        size = f"{len(self):,} cells, {genes:,} genes, {parts}"
        return f"Corpus({str(self.path)!r}: {size}, manifest {self.manifest_id})"

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The genes; a gene's position is its id in the counts."""
        name = self.manifest["vocabulary"]["file"]
        content = read_checked(self.store, name, self.manifest["objects"], "the vocabulary")
        vocabulary = Vocabulary.parse_tsv(content.decode(), self.store.where(name))
        if vocabulary.hash != self.manifest["vocabulary"]["hash"]:
            raise ValueError(
                f"{self.store.where(name)}: damaged: the vocabulary has hash "
                f"{vocabulary.short_hash}, the manifest says {self.manifest['vocabulary']['hash'][:12]}"
            )
        return vocabulary

    @property
    def columns(self) -> dict[str, list[str]]:
        """Label columns and their categories; "dataset" is always among them."""
        return self.manifest["columns"]

    @property
    def values(self) -> dict[str, list[str]]:
        """The numbers that it holds of each cell beside counts and labels: name -> names of the features; of
        a column of obs, its own name."""
        return {name: list(panel.features) for name, panel in self.panels.items()}

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets, in the order of their codes."""
        return [entry["name"] for entry in self.manifest["datasets"]]

    @property
    def obs(self) -> pd.DataFrame:
        """Label columns of all cells as categoricals; the index is the global row number."""
        table = {}
        for column, categories in self.columns.items():
            codes = np.concatenate(self.store.map(lambda part: part.codes(column), self.parts))  # noqa: B023
            table[column] = pd.Categorical.from_codes(codes, categories=categories)
        return pd.DataFrame(table)

    def split(self, name: str) -> tuple[Part, ...]:
        """The parts of "train" or "validation"."""
        if name not in ("train", "validation"):
            raise ValueError(f"split {name!r}: there are train and validation")
        return tuple(part for part in self.parts if part.split == name)

    def measured(self, dataset: str | int) -> np.ndarray:
        """bool [n_genes], genes that a data set measured: a gene it did not measure is absent, not zero."""
        entries = self.manifest["datasets"]
        if isinstance(dataset, str):
            if dataset not in self.datasets:
                raise KeyError(f"no data set {dataset!r}; there are: {', '.join(self.datasets)}")
            dataset = self.datasets.index(dataset)
        name = entries[dataset]["measured"]
        content = read_checked(self.store, name, self.manifest["objects"], "the measured genes")
        packed = np.load(io.BytesIO(content), allow_pickle=False)
        n_genes = self.manifest["vocabulary"]["n_genes"]
        return np.unpackbits(packed, count=n_genes, bitorder="little").astype(bool)

    def measured_table(self) -> np.ndarray:
        """bool [n_datasets, n_genes], ``measured`` of every data set."""
        return np.stack(self.store.map(self.measured, range(len(self.manifest["datasets"]))))

    def read(self, rows: Any) -> ad.AnnData:
        """Reads cells by global row number, in the order given; a row may be asked for more than once.

        Args:
          rows: int [n], or a slice, or a boolean mask over all cells.

        Returns:
          AnnData with raw counts in X (CSR), the sources' obs columns, the vocabulary as var, and in obsm the
          matrices among the values: as a table where their features have names.

        Raises:
          IndexError: a row outside 0 .. len - 1.
        """
        rows = row_numbers(rows, len(self), "corpus")
        n_genes = self.manifest["vocabulary"]["n_genes"]
        wanted, order = np.unique(rows, return_inverse=True)
        firsts = np.array([part.first_row for part in self.parts] + [len(self)])
        cuts = np.searchsorted(wanted, firsts)
        pieces = [
            _read_part(part, wanted[low:high] - part.first_row, n_genes)
            for part, low, high in zip(self.parts, cuts[:-1], cuts[1:], strict=True)
            if high > low
        ]
        if not pieces:
            pieces = [_read_part(self.parts[0], wanted, n_genes)]
        x = sparse.vstack([piece[0] for piece in pieces], format="csr")
        obs = pd.concat([piece[1] for piece in pieces])
        obsm = {name: np.concatenate([piece[2][name] for piece in pieces]) for name in pieces[0][2]}
        if len(order) != len(wanted) or (order[1:] < order[:-1]).any():
            x, obs = x[order], obs.iloc[order]
            obsm = {name: table[order] for name, table in obsm.items()}
        if len(wanted) != len(rows):
            obs.index = pd.Index([f"{name}#{i}" for i, name in enumerate(obs.index)])
        return ad.AnnData(x, obs=obs, var=self._var, obsm=as_obsm(obsm, self.panels, obs.index))

    def info(self) -> rich.console.Group:
        """Data sets, cells, genes, labels and bytes as tables to print with rich."""
        return summarise(self)

    def statistics(self, progress: bool = True) -> GeneStatistics:
        """How often and how strongly each gene is expressed in the training cells.

        The first call reads the corpus twice (memory: 4 KB a gene, whatever the number of cells) and
        leaves the result in the corpus's folder ``statistics``, which the following calls read.

        Returns:
          Per gene the mean count per 10,000, the share of cells that express it and the median of its
          non-zero counts per 10,000; see :class:`scjax.corpus.statistics.GeneStatistics`.
        """
        from scjax.corpus.statistics import statistics  # here, because numba takes a while to import

        return statistics(self, progress=progress)

    def verify(self, progress: bool = True) -> list[str]:
        """Checks every object against its checksums and the counts against what a corpus promises.

        Returns:
          What is wrong, one line each; empty if all is well.
        """
        return verify(self, progress)

    @functools.cached_property
    def _var(self) -> pd.DataFrame:
        fields = {name: list(getattr(self.vocabulary, name)) for name in ("symbol", "species", "biotype")}
        return pd.DataFrame(fields, index=self.vocabulary.ids)


def _join(path: Any, name: str) -> Any:
    """The path of an object: a Path under a folder, text under a URL."""
    return path / name if isinstance(path, pathlib.Path) else f"{path}/{name}"


def row_numbers(rows: Any, n: int, what: str) -> np.ndarray:
    """int64, the cells that a list of row numbers, a slice or a boolean mask over ``n`` cells names.

    Raises:
      IndexError: a row that is no whole number or outside 0 .. n - 1, or a mask of another length; the
        message calls all ``what``.
    """
    if isinstance(rows, slice):
        rows = np.arange(*rows.indices(n))
    rows = np.atleast_1d(np.asarray(rows))
    if rows.dtype == bool:
        if len(rows) != n:
            raise IndexError(f"a mask of {len(rows)} over a {what} of {n} cells")
        rows = np.flatnonzero(rows)
    if len(rows) and rows.dtype.kind not in "iu":  # an empty list is of floats
        raise IndexError(f"rows of a {what} are whole numbers, not {rows.dtype}")
    rows = rows.astype(np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < n:
        bad = int(rows[(rows < 0) | (rows >= n)][0])
        raise IndexError(f"row {bad}: the {what} has rows 0 to {n - 1}")
    return rows


def as_obsm(
    tables: Mapping[str, np.ndarray], panels: Mapping[str, Panel], cells: pd.Index
) -> dict[str, np.ndarray | pd.DataFrame]:
    """Matrices as they stand in obsm: tables where their features have names."""
    return {
        name: pd.DataFrame(values, index=cells, columns=list(panels[name].features))
        if panels[name].named
        else values
        for name, values in tables.items()
    }


def _read_part(
    part: Part, rows: np.ndarray, n_genes: int
) -> tuple[sparse.csr_matrix, pd.DataFrame, dict[str, np.ndarray]]:
    """Counts, obs and matrices of values of sorted, distinct rows of one part."""
    indptr = np.zeros(part.n_cells + 1, np.int64)
    np.cumsum(part.nnz_per_cell, out=indptr[1:])
    reader = PartReader(part)
    # Rows nearer than an inner chunk are read as one run, so that each chunk is decoded about once; a run
    # has a bounded length, so that memory is.
    far = indptr[rows[1:]] - indptr[rows[:-1] + 1] > part.inner
    far |= np.diff(indptr[rows] // RUN_ELEMENTS) > 0
    matrices = [sparse.csr_matrix((0, n_genes), dtype=part.x_dtype)]
    for run in np.split(rows, np.flatnonzero(far) + 1):
        if len(run):
            low, high = int(indptr[run[0]]), int(indptr[run[-1] + 1])
            indices, data = np.empty(high - low, np.int32), np.empty(high - low, part.x_dtype)
            reader.read_spans([(low, high)], indices, data)
            span = data, indices, indptr[run[0] : run[-1] + 2] - low
            matrix = sparse.csr_matrix(span, shape=(run[-1] + 1 - run[0], n_genes))
            matrices.append(matrix[run - run[0]])
    obs = ad.io.read_elem(part.group("obs")["obs"])
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > BLOCK) + 1)  # of rows that one read brings
    obsm = {
        name: np.concatenate(
            [reader.value(name, run[0], run[-1] + 1)[run - run[0]] for run in runs if len(run)]
            or [np.empty((0, *panel.shape), np.float32)]
        )
        for name, panel in part.stored.items()
        if not panel.column
    }
    return sparse.vstack(matrices, format="csr"), obs.iloc[rows], obsm
