"""Building a corpus: plan -> map -> reduce -> commit.

Plan reads the headers, matches the genes and gives every cell its place by a hash of (seed, data set, row).
Map reads each source once, in runs of rows, and leaves a fragment sorted by part. Reduce collects each part
from the fragments. Commit writes the manifest, then HEAD. Until then all lies in a hidden folder, so a build
that fails or is killed leaves nothing that looks like a corpus, and the next goes on with what is finished.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from scjax.corpus.corpus import Corpus
from scjax.corpus.engine import FOLDERS, Request, carry_out
from scjax.corpus.format import INNER, PART_CELLS, SHARD, Layout
from scjax.corpus.locks import WORK
from scjax.corpus.plan import Options, list_studies, named_tables, pairs
from scjax.corpus.store import local_folder
from scjax.genes import Vocabulary

UNKNOWN = ("", "nan", "unknown", "unlabelled")


def build_corpus(
    sources: Any,
    out: str | pathlib.Path,
    *,
    vocabulary: Vocabulary | None = None,
    layer: str | Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
    values: Sequence[str] = (),
    orthologs: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    names: Sequence[str] | None = None,
    validation: float = 0.0,
    split_by: str | None = None,
    seed: int = 0,
    min_genes: int = 1,
    min_counts: float = 0,
    drop_duplicates: bool = False,
    shuffle: bool = True,
    min_match: float = 0.1,
    allow_non_integer: bool = False,
    duplicates: str = "error",
    unknown: Sequence[str] = UNKNOWN,
    codec: str = "fast",
    part_cells: int = PART_CELLS,
    inner: int = INNER,
    shard: int = SHARD,
    workers: int | None = None,
    task: tuple[int, int] | None = None,
    dask: str | None = None,
    progress: bool = True,
) -> Corpus:
    """Builds a corpus of raw counts from one or many studies.

    The same sources and options give the same bytes, whoever does the work, in whatever order, however often
    it was stopped. Memory stays bounded: rows are read in runs, a part is written shard by shard; the disk
    needs two to three times the size of the finished corpus while building. What a stopped or failed build
    has finished is kept in the hidden folder ``.build``, and the same call goes on from there.

    Args:
      sources: path of a study (see ``open_source``), a folder or glob of them, AnnData, or a list of these.
      out: new or empty folder.
      vocabulary: genes to keep; default: all genes of all sources.
      layer: where the counts are: None or "X", "raw" or the name of a layer; or data set name -> layer.
      labels: obs columns to keep as label columns; default: all categorical and text columns with at most
        4,096 values. Data sets that lack one have the code -1 there.
      columns: name of an obs column -> other names that studies have for it. Names that differ only in case,
        "_", "-", "." and spaces are one column in any case. Matrices of obsm that are values, too.
      values: obs columns of numbers (dose, age) and matrices of obsm (coordinates, protein counts) to keep
        for each cell, as float32; NaN where a study has none. Features of matrices are united by name, where
        obsm has a table (DataFrame); arrays must have as many everywhere.
      orthologs: table of source and target genes for the studies of another species (those of which it has
        more genes as source than as target), or data set name -> table; see ``Orthologs`` and
        ``match_with_orthologs``. One-to-many pairs are left out and counted, many-to-one, too, or summed
        with duplicates="sum". Without a table, the genes of every species stand side by side.
      names: data set names, unique; default: the file's stem.
      validation: fraction of the cells in the "validation" split, chosen by hash.
      split_by: obs column (or "dataset") whose groups go to one split as a whole: groups in the order of
        their hash until they hold ``validation`` of the cells. Cells of unknown group go to "train".
      seed: of the order of cells and of the split.
      min_genes: cells with fewer expressed genes of the vocabulary are dropped, and counted in the manifest.
      min_counts: cells with a smaller total count over all genes of their source are dropped, and counted.
      drop_duplicates: of cells with the same counts of the same genes, over all sources, only the first is
        kept; the others are counted.
      shuffle: False keeps the cells in the order of the sources and their rows.
      min_match: least fraction of a study's genes (or of the vocabulary, if that is smaller) that must match.
      allow_non_integer: keep fractions, as float32.
      duplicates: several columns of one study that are one gene: "error", or "sum" their counts.
      unknown: label values that mean "not known"; their code is -1. The text stays in the parts' obs.
      codec: "fast", "balanced", "small" or "local" (uncompressed).
      part_cells, inner, shard: most cells in a part, elements per inner chunk and per shard.
      workers: processes to build with; default: one per CPU that memory allows, this process alone for small
        sources. 1 builds in this process. Sources in memory are read in this process in any case.
      task: (i, n), for job arrays: does the i-th (from 0) of n shares of what can be done now and returns,
        never waiting for others. Shares may run at the same time on machines that share a file system. Calls
        with the same arguments are made until one returns the corpus: three rounds at most if all shares of a
        round end before the next begins.
      dask: address of a running Dask scheduler whose workers see the same files.
      progress: show a progress bar.

    Returns:
      The corpus, opened; None with ``task`` while other shares have work left.

    Raises:
      FileExistsError: ``out`` holds something already, or somebody is writing there.
      ImportError: ``dask`` without Dask.
      CountsError (a ValueError): a source does not hold raw counts; names file, cell, gene and value.
      ValueError, KeyError, FileNotFoundError, OSError: bad source, label, value or option; the message says
        which.
    """
    arguments = {
        name: value
        for name, value in locals().items()
        if name not in ("sources", "out", "vocabulary", "orthologs", "workers", "task", "dask", "progress")
    }
    layout = Layout(codec, part_cells, inner, shard)
    labels = (labels,) if isinstance(labels, str) else labels
    options = Options(
        labels=None if labels is None else tuple(labels),
        columns=pairs(columns),
        values=(values,) if isinstance(values, str) else tuple(values),
        orthologs=named_tables(orthologs),
        unknown=tuple(unknown),
        min_match=min_match,
        duplicates=duplicates,
        allow_non_integer=allow_non_integer,
        min_genes=min_genes,
        min_counts=min_counts,
        drop_duplicates=drop_duplicates,
        validation=validation,
        split_by=split_by,
        seed=seed,
        shuffle=shuffle,
    )
    root = local_folder(out)
    request = Request(
        root,
        list_studies(sources, names, layer),
        vocabulary,
        options,
        layout,
        None,
        arguments,
        workers,
        task,
        dask,
        progress,
    )
    _check_folder(root, request)
    new = not root.exists()
    try:
        manifest_id = carry_out(request)
    finally:
        if new:  # and nothing was begun
            with contextlib.suppress(OSError):
                os.rmdir(root)
    # None for a share of the work only: whoever asks for that knows, everybody else need not look.
    return None if manifest_id is None else Corpus.open(root)  # type: ignore[return-value]


def _check_folder(root: pathlib.Path, request: Request) -> None:
    """FileExistsError where the output holds what is not an unfinished build, or not this one's corpus."""
    if root.exists() and not root.is_dir():
        raise FileExistsError(f"{root}: is a file; a corpus is a folder")
    there = sorted(os.listdir(root)) if root.exists() else []
    if "HEAD" in there and not request.is_done():
        head = (root / "HEAD").read_text().strip()
        raise FileExistsError(
            f"{root}: holds a corpus already (manifest {head}); choose another folder, or append to it"
        )
    known = {"HEAD", *FOLDERS} if WORK in there or "HEAD" in there else set()
    foreign = [name for name in there if name not in (WORK, *known)]
    if foreign:
        raise FileExistsError(
            f"{root}: not empty (holds {', '.join(foreign[:5])}); a corpus needs a new folder"
        )
