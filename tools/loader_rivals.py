"""Other loaders of single-cell counts, each as its own documentation would have it run, for bench_loader.py.

    python tools/loader_rivals.py annbatch --corpus CORPUS --seconds 8

Runs in an environment of its own that needs not hold scjax: annbatch needs Python 3.12. One loader, one
process, one line of JSON. Where a package is not installed the line says so under "skipped".

What is measured, for scjax as for the others (``measure``): imports apart; then the time from opening the
files to the first batch; after a warm-up, the batches of some seconds. Processor time is user and system
time of the process and all it has started. Peak memory is that of the process: VmHWM holds everything, mapped
libraries and file pages included, anon what it asked for itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")
BATCH = 1024
SUBSET = 60_000  # cells that are converted for a loader with a format of its own


# ---- measuring


def _below(pid: int) -> Iterator[int]:
    """Processes that a process has started, and those that they have."""
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield int(child)
            yield from _below(int(child))


def _cpu() -> float:
    """User and system seconds of this process, its ended children and its living ones."""
    own = os.times()
    total = time.process_time() + own.children_user + own.children_system
    for pid in _below(os.getpid()):
        try:
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended just now
            continue
        total += (int(fields[11]) + int(fields[12])) / TICK
    return total


def _memory() -> dict[str, int]:
    """MiB of this process: VmHWM (the peak), RssAnon, RssFile."""
    status = pathlib.Path("/proc/self/status").read_text()
    return {name: int(kb) // 1024 for name, kb in re.findall(r"(VmHWM|RssAnon|RssFile):\s+(\d+) kB", status)}


class _Watch(threading.Thread):
    """The largest RssAnon that was seen, looked at ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.peak = max(self.peak, _memory()["RssAnon"])


def measure(
    what: str,
    start: Callable[[], Iterator[int]],
    *,
    seconds: float,
    warm_up: float,
    begun: float,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs a loader and says how fast it was.

    Args:
      what: name of the loader.
      start: opens everything and gives an endless iterator of the number of cells of each batch.
      seconds: how long to measure for, at least; whole batches, and one at least.
      warm_up: how long to run before.
      begun: ``time.perf_counter()`` when the process began; the time until now counts as imports.
      more: further entries of the result.

    Returns:
      what, cells, cells_per_s, cells_per_core_s, import_s, first_batch_s (first_batch_cpu_s is the
      processor time in it), peak_mb (VmHWM), anon_mb.
    """
    watch = _Watch()
    watch.start()
    imported, cpu = time.perf_counter(), _cpu()
    batches = start()
    next(batches)
    first, first_cpu = time.perf_counter(), _cpu() - cpu
    while time.perf_counter() < first + warm_up:
        next(batches)
    wall, cpu, cells = time.perf_counter(), _cpu(), 0
    while cells == 0 or time.perf_counter() < wall + seconds:
        cells += next(batches)
    wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    watch.over.set()
    watch.join()
    memory = _memory()
    return {
        "what": what,
        "cells": cells,
        "cells_per_s": round(cells / wall),
        "cells_per_core_s": round(cells / cpu),
        "import_s": round(imported - begun, 2),
        "first_batch_s": round(first - imported, 3),
        "first_batch_cpu_s": round(first_cpu, 3),
        "peak_mb": memory["VmHWM"],
        "anon_mb": max(watch.peak, memory["RssAnon"]),
        **(more or {}),
    }


# ---- the loaders: each imports what it needs, then gives (settings, packages, how to start)

Started = tuple[str, Sequence[str], Callable[[], Iterator[int]]]


def _parts(corpus: pathlib.Path) -> list[pathlib.Path]:
    """AnnData groups of the training cells of a corpus."""
    manifest = json.loads(
        (corpus / "manifests" / f"{(corpus / 'HEAD').read_text().strip()}.json").read_text()
    )
    return [corpus / "parts" / f"{p['id']}.zarr" for p in manifest["parts"] if p["split"] == "train"]


def annbatch(args: argparse.Namespace, chunk: int = 1024, chunks: int = 16) -> Started:
    import annbatch
    import anndata as ad
    import zarr
    import zarrs  # noqa: F401  (the codec pipeline that annbatch recommends)

    zarr.config.set(
        {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": os.cpu_count()}
    )

    def start() -> Iterator[int]:
        loader = annbatch.Loader(
            shuffle=True,
            chunk_size=chunk,
            preload_nchunks=chunks,
            batch_size=args.batch_size,
            preload_to_gpu=False,
            to=None,
        )
        groups = [zarr.open_group(path, mode="r") for path in _parts(args.corpus)]
        loader.add_datasets([ad.io.sparse_dataset(group["X"]) for group in groups])
        while True:
            for batch in loader:
                yield batch["X"].shape[0]

    settings = f"same parts, zarrs codecs, chunk {chunk} x {chunks}, CSR, no labels, not on a GPU"
    return settings, ("annbatch", "zarrs", "zarr", "anndata"), start


def annbatch_256(args: argparse.Namespace) -> Started:
    return annbatch(args, 256, 64)


def scdataset(args: argparse.Namespace) -> Started:
    import anndata as ad
    import numpy as np
    from scdataset import BlockShuffling, scDataset

    class Rows:
        """The matrix of a backed file; takes rows in any order, as scDataset asks for them."""

        def __init__(self, matrix: Any) -> None:
            self.matrix = matrix

        def __len__(self) -> int:
            return int(self.matrix.shape[0])

        def __getitem__(self, rows: Any) -> Any:
            order = np.argsort(rows, kind="stable")
            back = np.empty_like(order)
            back[order] = np.arange(len(order))
            return self.matrix[np.asarray(rows)[order]][back]

    def start() -> Iterator[int]:
        rows = Rows(ad.read_h5ad(args.h5ad, backed="r").X)
        data = scDataset(rows, BlockShuffling(block_size=16), batch_size=args.batch_size, fetch_factor=16)
        while True:
            for batch in data:
                yield batch.shape[0]

    return "uncompressed .h5ad, block 16, fetch 16, no workers, CSR", ("scDataset", "anndata"), start


def scdl(args: argparse.Namespace) -> Started:
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    from torch.utils.data import DataLoader

    if not args.scdl.exists():
        _convert(args, SingleCellMemMapDataset)

    def start() -> Iterator[int]:
        data = SingleCellMemMapDataset(str(args.scdl))
        while True:
            for batch in DataLoader(
                data, batch_size=args.batch_size, shuffle=True, collate_fn=collate_sparse_matrix_batch
            ):
                yield batch.shape[0]

    settings = f"its own memory maps of the first {SUBSET:,} cells, random rows, no workers, torch CSR"
    return settings, ("bionemo-scdl", "torch"), start


def _convert(args: argparse.Namespace, dataset: Any) -> None:
    """The first cells as an .h5ad file, then as SCDL's memory maps. Not measured."""
    import anndata as ad

    whole = ad.read_h5ad(args.h5ad, backed="r")
    subset = args.scdl.with_suffix(".h5ad")
    whole[: min(SUBSET, whole.n_obs)].to_memory().write_h5ad(subset)
    dataset(str(args.scdl), str(subset), use_X_not_raw=True).save()
    subset.unlink()


def annloader(args: argparse.Namespace) -> Started:
    import anndata as ad
    from anndata.experimental import AnnLoader

    def start() -> Iterator[int]:
        data = ad.read_h5ad(args.h5ad, backed="r")
        while True:
            for batch in AnnLoader(
                data, batch_size=args.batch_size, shuffle=True, use_default_converter=False
            ):
                yield batch.X.shape[0]

    return "backed uncompressed .h5ad, random rows, no workers, X realised", ("anndata", "torch"), start


def backed(args: argparse.Namespace) -> Started:
    import anndata as ad
    import numpy as np

    def start() -> Iterator[int]:
        x, rng = ad.read_h5ad(args.h5ad, backed="r").X, np.random.default_rng(0)
        while True:
            rows = rng.permutation(x.shape[0])
            for at in range(0, len(rows) - args.batch_size + 1, args.batch_size):
                yield x[np.sort(rows[at : at + args.batch_size])].shape[0]

    return "backed uncompressed .h5ad, X[sorted random rows]", ("anndata",), start


RIVALS: dict[str, Callable[[argparse.Namespace], Started]] = {
    "annbatch": annbatch,
    "annbatch-256": annbatch_256,
    "scdataset": scdataset,
    "scdl": scdl,
    "annloader": annloader,
    "backed": backed,
}
ON_H5AD = ("scdataset", "scdl", "annloader", "backed")


def main() -> None:
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=RIVALS)
    parser.add_argument("--corpus", type=pathlib.Path)
    parser.add_argument("--h5ad", type=pathlib.Path, help="all cells in one uncompressed file")
    parser.add_argument("--scdl", type=pathlib.Path, help="where SCDL's maps are; made there if missing")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--warm-up", type=float, default=3.0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    try:
        settings, packages, start = RIVALS[args.what](args)
    except ImportError as error:
        print(json.dumps({"what": args.what, "skipped": f"{error} ({sys.executable})"}))
        return
    versions = {name: importlib.metadata.version(name) for name in packages}
    result = measure(
        args.what,
        start,
        seconds=args.seconds,
        warm_up=args.warm_up,
        begun=begun,
        more={"settings": settings, "versions": versions, "python": sys.version.split()[0]},
    )
    print(json.dumps(result), flush=True)
    os._exit(0)  # some of these leave threads behind that outlive the interpreter


if __name__ == "__main__":
    main()
