"""How fast a corpus is built, beside how fast h5py decodes the same file.

    python tools/simulate_corpus.py /tmp/sim --one-file
    python tools/bench_build.py /tmp/sim/h5ad/all.h5ad [--workers 1 2] [--repeats 3]

Each measurement is a new process; decoding and building take turns. CPU seconds are user and system time of
the process and all its children, imports included. "decode" reads data and indices of the matrix with h5py in
runs of 2^23 values and does nothing with them. Prints one JSON line per measurement and a summary of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

DECODE = """
import sys, h5py
with h5py.File(sys.argv[1]) as file:
    x = file["X"]
    for low in range(0, x["data"].shape[0], 2**23):
        x["data"][low : low + 2**23], x["indices"][low : low + 2**23]
"""
BUILD = """
import sys
from scjax.corpus import build_corpus
build_corpus(sys.argv[3:], sys.argv[1], workers=int(sys.argv[2]), progress=False)
"""


def measured(code: str, *args: Any) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of a fresh interpreter that runs the code."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *map(str, args)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - start


def n_cells(files: list[pathlib.Path]) -> int:
    import h5py

    total = 0
    for path in files:
        with h5py.File(path) as file:
            total += file["X/indptr"].shape[0] - 1
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE.h5ad", help="CSR in X")
    parser.add_argument("--workers", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, help="where to build (default: a temporary folder)")
    args = parser.parse_args()
    cells = n_cells(args.files)
    rows: list[dict[str, Any]] = []

    def note(what: str, cpu: float, wall: float, **more: Any) -> None:
        row = {
            "what": what,
            "cells_per_core_s": round(cells / cpu),
            "cpu_us_per_cell": round(1e6 * cpu / cells, 1),
            "cells_per_s": round(cells / wall),
            **more,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)

    size = sum(path.stat().st_size for path in args.files)
    stored = 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for _ in range(args.repeats):
            decoded = [measured(DECODE, path) for path in args.files]
            note("decode", sum(cpu for cpu, _ in decoded), sum(wall for _, wall in decoded))
            for workers in args.workers:
                out = pathlib.Path(folder, "corpus")
                cpu, wall = measured(BUILD, out, workers, *args.files)
                stored = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
                note(f"build, workers={workers}", cpu, wall)
                shutil.rmtree(out)

    summary: dict[str, Any] = {"cells": cells, "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    summary["bytes_per_cell"] = {"h5ad": round(size / cells), "corpus": round(stored / cells)}
    for what in dict.fromkeys(row["what"] for row in rows):
        rates = [row["cells_per_core_s"] for row in rows if row["what"] == what]
        summary[what] = {"cells_per_core_s": round(statistics.median(rates)), "of": sorted(rates)}
    for what, found in summary.items():
        if what.startswith("build"):
            found["of_decode"] = round(found["cells_per_core_s"] / summary["decode"]["cells_per_core_s"], 2)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
