"""How fast is the loader, how far from the limit is that, and how fast are the others?

    python tools/simulate_corpus.py /tmp/sim --corpus && python tools/simulate_corpus.py /tmp/one --one-file
    python tools/simulate_corpus.py --virtual 100_000_000 /tmp/sim/corpus /tmp/sim/virtual
    python tools/bench_loader.py /tmp/sim/corpus --h5ad /tmp/one/h5ad/all.h5ad --virtual /tmp/sim/virtual \\
        --annbatch-python /opt/py312/bin/python --markdown result.md

Every loader runs in a fresh process, in turn (A B C A B C ...); the medians of the rounds are printed, and
their ratios. One line of JSON a run, one with the medians, and a Markdown table.

  floor     blocks of 1,024 neighbouring cells in random order, read and decoded into memory that stays the
            same, by as many threads as the loader reads with; nothing is done with them. No loader that reads
            this format in such blocks beats that.
  csr       batches of sparse rows, shuffled, without labels
  padded    (batch, 2,048) gene ids and counts; cells with more genes keep a random subset; without labels
  labelled  as padded, with all label columns
  csr-big, padded-big   as csr and padded, on the corpus of --virtual
  ...       other people's loaders, each with its own settings: tools/loader_rivals.py, which also says what
            exactly is measured

Core-seconds are user and system time of the process tree: less moved by what else the machine does than cells
per second are. All files should fit into memory: they are read once before, and come from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from loader_rivals import BATCH, ON_H5AD, RIVALS, measure

READ_THREADS = 2
SLOTS = 2048
OWN = ("floor", "csr", "padded", "labelled")
BIG = ("csr-big", "padded-big")
RATES = ("cells_per_s", "cells_per_core_s")
FIGURES = (*RATES, "first_batch_s", "first_batch_cpu_s", "import_s", "peak_mb", "anon_mb")


def floor(args: argparse.Namespace) -> Iterator[int]:
    """The cells that all threads together have read since the last time, every tenth of a second."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    from scjax.corpus import Corpus
    from scjax.corpus.format import BLOCK
    from scjax.corpus.reader import PartReader, ShardCache

    corpus, shards = Corpus.open(args.corpus), ShardCache()
    readers = [PartReader(part, shards) for part in corpus.split("train")]
    blocks = [
        (reader, *reader.row_span(first, min(first + BLOCK, reader.part.n_cells)), first)
        for reader in readers
        for first in range(0, reader.part.n_cells, BLOCK)
    ]
    largest = max(high - low for _, low, high, _ in blocks)
    shares = np.array_split(np.random.default_rng(0).permutation(len(blocks)), READ_THREADS)
    done, over = [0] * READ_THREADS, False

    def read(which: int) -> None:
        dtypes = [{getattr(reader.part, of) for reader in readers} for of in ("index_dtype", "x_dtype")]
        indices, data = (np.empty(largest, np.result_type(*of)) for of in dtypes)
        while True:
            for number in shares[which]:
                reader, low, high, first = blocks[number]
                reader.read_spans([(low, high)], indices, data)
                done[which] += min(BLOCK, reader.part.n_cells - first)
                if over:
                    return

    with ThreadPoolExecutor(READ_THREADS) as pool:
        reading = [pool.submit(read, which) for which in range(READ_THREADS)]
        seen = 0
        try:
            while not any(job.done() for job in reading):
                time.sleep(0.1)
                total = sum(done)
                yield total - seen
                seen = total
        finally:
            over = True
    for job in reading:
        job.result()


def batches(args: argparse.Namespace, corpus: pathlib.Path, **options: Any) -> Iterator[int]:
    """The cells of each batch of the loader."""
    import numpy as np

    from scjax.corpus import Corpus
    from scjax.loader import Loader

    begun = time.perf_counter()
    opened = Corpus.open(corpus)
    args.more["open_s"] = round(time.perf_counter() - begun, 3)
    loader = Loader(opened, args.batch_size, **options)
    args.more["loader_s"] = round(time.perf_counter() - begun, 3)
    order = loader.order
    args.more["settings"] = (
        f"{order.lanes} lanes x window {order.steps_per_window * order.rows_per_lane}, block {order.block}"
    )
    args.more["corpus_cells"] = len(opened)
    iterator = iter(loader)
    slots = genes = 0
    for batch in iterator:
        if not options.get("sparse"):
            slots, genes = slots + batch.gene_id.size, genes + int(batch.n_genes.sum())
            args.more["filled_slots"] = round(genes / slots, 3)
        cells = int(np.count_nonzero(batch.weight))
        del batch  # or its memory could not be used again
        yield cells
    iterator.close()


def run_one(args: argparse.Namespace) -> None:
    """One of OWN or BIG in this process."""
    begun = time.perf_counter()
    args.more = {}
    what, _, big = args.run.partition("-")
    corpus = args.virtual if big else args.corpus
    padded: dict[str, Any] = {"max_genes": args.slots}
    options = {
        "csr": {"sparse": True, "labels": []},
        "padded": {**padded, "labels": []},
        "labelled": padded,
    }
    # what a training process has imported in any case counts as imports
    import numba  # noqa: F401
    import numpy as np

    import scjax.loader.iterator  # noqa: F401  (grain, JAX, and the compiled pass over the counts)
    from scjax.corpus import Corpus  # noqa: F401
    from scjax.loader import Loader  # noqa: F401
    from scjax.loader.pack import prepare

    if what != "floor":  # numba imports most of itself when it loads compiled code
        prepare((np.dtype(np.uint16), np.dtype(np.uint16)), sparse=what == "csr")

    start = (lambda: floor(args)) if what == "floor" else (lambda: batches(args, corpus, **options[what]))
    result = measure(
        args.run, start, seconds=args.seconds, warm_up=args.warm_up, begun=begun, more={"settings": ""}
    )
    print(json.dumps({**result, **args.more, "python": platform.python_version()}), flush=True)
    os._exit(0)  # background threads of a loader in the middle of its work


def command(args: argparse.Namespace, what: str) -> list[str]:
    times = ["--seconds", str(args.seconds), "--warm-up", str(args.warm_up)]
    common = [*times, "--batch-size", str(args.batch_size)]
    if what in OWN + BIG:
        big = ["--virtual", str(args.virtual)] if args.virtual else []
        return [
            sys.executable,
            __file__,
            str(args.corpus),
            *common,
            *big,
            "--slots",
            str(args.slots),
            "--run",
            what,
        ]
    tool = str(pathlib.Path(__file__).with_name("loader_rivals.py"))
    paths = ["--corpus", str(args.corpus), "--scdl", str(args.scdl)]
    paths += ["--h5ad", str(args.h5ad)] if args.h5ad else []
    return [str(args.annbatch_python or sys.executable), tool, what, *paths, *common]


def warm(paths: list[pathlib.Path]) -> None:
    """Reads all files once, into the page cache."""
    for path in paths:
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            with open(file, "rb", buffering=0) as stream:
                while stream.read(2**24):
                    pass


def processor() -> str:
    """Model and number of processors."""
    lines = (
        pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if pathlib.Path("/proc/cpuinfo").exists()
        else []
    )
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"


def medians(lines: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per loader that ran: medians, range of the rates, ratios to floor and annbatch."""
    middle = {
        what: {name: statistics.median(line[name] for line in runs) for name in FIGURES}
        | {f"{rate}_range": [min(r[rate] for r in runs), max(r[rate] for r in runs)] for rate in RATES}
        | {name: value for name, value in runs[-1].items() if name not in FIGURES and name != "cells"}
        for what, runs in lines.items()
        if runs
    }
    for of in ("floor", "annbatch"):
        for row in middle.values():
            if of in middle:
                row |= {f"{rate}_of_{of}": round(row[rate] / middle[of][rate], 2) for rate in RATES}
    return middle


def table(middle: dict[str, dict[str, Any]]) -> str:
    """The medians as Markdown."""
    head = [
        "loader",
        "cells/s",
        "cells per core-s [range]",
        "of floor",
        "of annbatch",
        "first batch s (CPU)",
        "imports s",
    ]
    out = [" | ".join([*head, "peak MB (anon)", "settings"]), "|".join(["---"] * (len(head) + 2))]
    for what, row in middle.items():
        low, high = row["cells_per_core_s_range"]
        out.append(
            " | ".join(
                [
                    what,
                    f"{row['cells_per_s']:,.0f}",
                    f"{row['cells_per_core_s']:,.0f} [{low:,}–{high:,}]",
                    f"{row.get('cells_per_core_s_of_floor', '')}",
                    f"{row.get('cells_per_core_s_of_annbatch', '')}",
                    "" if what == "floor" else f"{row['first_batch_s']:.2f} ({row['first_batch_cpu_s']:.2f})",
                    "" if what == "floor" else f"{row['import_s']:.1f}",
                    f"{row['peak_mb']:,.0f} ({row['anon_mb']:,.0f})",
                    row["settings"],
                ]
            )
        )
    return "\n".join(f"| {line} |" for line in out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=pathlib.Path)
    parser.add_argument("--h5ad", type=pathlib.Path, help="the same cells in one uncompressed .h5ad file")
    parser.add_argument(
        "--virtual", type=pathlib.Path, help="a corpus of 100 million cells to measure as well"
    )
    parser.add_argument(
        "--annbatch-python", type=pathlib.Path, help="Python of the environment of the others"
    )
    parser.add_argument(
        "--scdl", type=pathlib.Path, default=None, help="where SCDL's converted cells are kept"
    )
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--slots", type=int, default=SLOTS, help="of the padded batches")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds before it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=None, help="names of loaders with commas between; default: all")
    parser.add_argument("--markdown", type=pathlib.Path, help="write the table here too")
    parser.add_argument("--run", choices=OWN + BIG, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_one(args)
        return
    args.scdl = args.scdl or args.corpus.resolve().parent / "scdl"
    chosen = [*OWN, *(BIG if args.virtual else ()), *RIVALS]
    if args.only:
        chosen = args.only.split(",")
        if unknown := set(chosen) - {*OWN, *BIG, *RIVALS}:
            parser.error(f"no loader {sorted(unknown)}; there are {', '.join((*OWN, *BIG, *RIVALS))}")
    for what in [what for what in chosen if what in ON_H5AD and not args.h5ad]:
        print(json.dumps({"what": what, "skipped": "it reads .h5ad: give --h5ad"}), flush=True)
        chosen.remove(what)
    warm([args.corpus, *([args.h5ad] if args.h5ad else [])])
    lines: dict[str, list[dict[str, Any]]] = {what: [] for what in chosen}
    for _ in range(args.rounds):
        for what in [what for what in chosen if what in lines]:
            done = subprocess.run(command(args, what), stdout=subprocess.PIPE, text=True)
            last = done.stdout.strip().rpartition("\n")[2]
            if done.returncode or not last:
                last = json.dumps({"what": what, "skipped": f"ended with status {done.returncode}"})
            print(last, flush=True)
            if "skipped" in json.loads(last):
                del lines[what]
            else:
                lines[what].append(json.loads(last))
    middle = medians(lines)
    print(
        json.dumps({"what": "medians", "rounds": args.rounds, "machine": processor(), **middle}), flush=True
    )
    print("\n" + table(middle))
    if args.markdown:
        args.markdown.write_text(table(middle))


if __name__ == "__main__":
    main()
