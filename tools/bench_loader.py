"""How fast does the loader go, and how far from the limit is that?

    python tools/bench_loader.py CORPUS --batch-size 1024 --max-genes 2048

Measures on one corpus, each in a fresh process, in turn (floor, loader, floor, loader, ...):

  floor    read and decompress blocks of 1024 cells in random order into reused memory, with as many
           threads as the loader reads with, and do nothing with them: no loader on this format beats that
  loader   padded batches as a training run gets them

and prints a JSON line each, then one with the medians and the ratio of the two. The time to the first batch
is a figure of its own, and contains the import of grain and numba. Core-seconds are user and system time of
all threads. The corpus should fit into memory: after the first round it comes from the page cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from scjax.corpus import Corpus
from scjax.corpus.format import BLOCK
from scjax.corpus.reader import PartReader, ShardCache
from scjax.loader import Loader

READ_THREADS = 2


def report(what: str, cells: int, wall: float, cpu: float, **more: object) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rates = {"cells_per_s": round(cells / wall), "cells_per_core_s": round(cells / cpu)}
    print(json.dumps({"what": what, "cells": cells, **rates, "peak_rss_mb": round(peak), **more}), flush=True)


def floor(args: argparse.Namespace) -> None:
    corpus, shards = Corpus.open(args.corpus), ShardCache()
    readers = [PartReader(part, shards) for part in corpus.split("train")]
    blocks = [
        (reader, *reader.row_span(first, min(first + BLOCK, reader.part.n_cells)), first)
        for reader in readers
        for first in range(0, reader.part.n_cells, BLOCK)
    ]
    largest = max(high - low for _, low, high, _ in blocks)
    order = np.random.default_rng(0).permutation(len(blocks))
    shares = np.array_split(order, READ_THREADS)
    memory = [(np.empty(largest, np.uint16), np.empty(largest, np.uint16)) for _ in shares]
    if any(reader.part.index_dtype != np.uint16 or reader.part.x_dtype != np.uint16 for reader in readers):
        memory = [(np.empty(largest, np.uint32), np.empty(largest, np.float32)) for _ in shares]

    def read(which: int, until: float) -> int:
        cells, (indices, data) = 0, memory[which]
        while True:
            for number in shares[which]:
                reader, low, high, first = blocks[number]
                reader.read_spans([(low, high)], indices, data)
                cells += min(BLOCK, reader.part.n_cells - first)
                if time.perf_counter() > until:
                    return cells

    with ThreadPoolExecutor(READ_THREADS) as pool:
        list(pool.map(read, range(READ_THREADS), [0.0] * READ_THREADS))  # touches memory and files once
        wall, cpu = time.perf_counter(), time.process_time()
        cells = sum(pool.map(read, range(READ_THREADS), [wall + args.seconds] * READ_THREADS))
        report("floor", cells, time.perf_counter() - wall, time.process_time() - cpu)


def loader(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    batches = Loader(
        Corpus.open(args.corpus),
        args.batch_size,
        max_genes=args.max_genes,
        group_lengths=args.group_lengths,
        lanes=args.lanes,
        window=args.window,
        labels=None if args.labels else (),
    )
    iterator = iter(batches)
    slots, genes, cells = 0, 0, 0
    next(iterator)
    first = time.perf_counter() - began
    while time.perf_counter() - began < first + args.warm_up:
        next(iterator)
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < wall + args.seconds:
        batch = next(iterator)
        cells += int(batch.weight.sum())
        slots += batch.gene_id.size
        genes += int(batch.n_genes.sum())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    more = {"first_batch_s": round(first, 2), "filled_slots": round(genes / slots, 3)}
    more["bucket_lengths"] = list(batches.bucket_lengths)
    report("loader", cells, wall, cpu, **more)
    iterator.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--max-genes", type=int, default=None)
    parser.add_argument("--group-lengths", action="store_true")
    parser.add_argument("--labels", action="store_true", help="with all label columns")
    parser.add_argument("--lanes", type=int, default=None)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds before the loader is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["floor", "loader"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        {"floor": floor, "loader": loader}[args.only](args)
        return
    lines: dict[str, list[dict]] = {"floor": [], "loader": []}
    for _ in range(args.rounds):
        for what in lines:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", what]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(line, end="", flush=True)
            lines[what].append(json.loads(line))
    middle = {
        f"{what}_{rate}": round(statistics.median(line[rate] for line in lines[what]))
        for what in lines
        for rate in ("cells_per_s", "cells_per_core_s")
    }
    for rate in ("cells_per_s", "cells_per_core_s"):
        middle[f"ratio_{rate}"] = round(middle[f"loader_{rate}"] / middle[f"floor_{rate}"], 2)
    print(json.dumps({"what": "median", "rounds": args.rounds, **middle}))


if __name__ == "__main__":
    main()
