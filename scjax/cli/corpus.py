"""``scjax corpus``: build, add to, describe, check, repair and tidy corpora of raw counts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scjax.cli.shared import err, escape, out, refuse_existing, write_whole

if TYPE_CHECKING:
    import rich.table

    from scjax.corpus import Corpus

ROWS = 40  # data sets that a table shows one by one


# ------------------------------------------------------------------ commands
def build(args: argparse.Namespace) -> int:
    from scjax.corpus import build_corpus
    from scjax.genes import Vocabulary

    corpus = build_corpus(
        args.sources,
        args.out,
        vocabulary=None if args.vocabulary is None else Vocabulary.from_tsv(args.vocabulary),
        split_by=args.split_by,
        codec=args.codec,
        values=[name.strip() for given in args.values for name in given.split(",") if name.strip()],
        **_options(args),
    )
    return _finish(corpus, args.out)


def append(args: argparse.Namespace) -> int:
    from scjax.corpus import Corpus, append_corpus

    before = Corpus.open(args.corpus).datasets
    return _finish(append_corpus(args.corpus, args.sources, **_options(args)), args.corpus, before)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What build and append have in common; what was not given is left to their defaults."""
    given = {
        name: getattr(args, name)
        for name in (
            "names",
            "layer",
            "labels",
            "validation",
            "seed",
            "min_genes",
            "min_counts",
            "min_match",
            "workers",
            "dask",
        )
    }
    given |= {name: getattr(args, name) or None for name in ("allow_non_integer", "drop_duplicates")}
    given["shuffle"] = False if args.no_shuffle else None
    given["duplicates"] = "sum" if args.sum_duplicates else None
    given["columns"] = _columns(args.column)
    given["orthologs"] = _orthologs(args.orthologs)
    given["task"] = None if args.task is None else _share(args.task)
    return {name: value for name, value in given.items() if value is not None}


def _columns(given: Sequence[str] | None) -> dict[str, list[str]] | None:
    """cell_type=annotation,celltype_final -> {"cell_type": ["annotation", "celltype_final"]}"""
    columns: dict[str, list[str]] = {}
    for text in given or ():
        name, equals, others = text.partition("=")
        names = [other.strip() for other in others.split(",")]
        if not equals or not name.strip() or not all(names):
            raise ValueError(
                f"--column {text}: give the name to keep and the others, as in "
                "cell_type=celltype_final,annotation"
            )
        columns.setdefault(name.strip(), []).extend(names)
    return columns or None


def _orthologs(given: Sequence[str] | None) -> str | dict[str, str] | None:
    """One table, or tables by data set: mouse_heart=orthologs.tsv"""
    if not given:
        return None
    if len(given) == 1 and ("=" not in given[0] or os.path.exists(given[0])):
        return given[0]
    tables = dict(text.split("=", 1) for text in given if "=" in text)
    if len(tables) < len(given):
        raise ValueError(
            f"--orthologs {' '.join(given)}: give one table, or a table for each of several data sets, as in "
            "NAME=TABLE"
        )
    return tables


def _share(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise ValueError(f"--task {text}: give the share and how many there are, from 0/4 to 3/4 for four")
    return int(number), int(of)


def _finish(corpus: Corpus | None, path: str, before: Sequence[str] = ()) -> int:
    if corpus is None:
        out.print(
            f"{path}: this share has done what could be done now; call it again when the other shares have, "
            "until one of them shows the corpus",
            highlight=False,
        )
        return 0
    out.print(corpus.info())
    new = [entry for entry in corpus.manifest["datasets"] if entry["name"] not in before]
    out.print(account(new))
    return 0


def account(entries: Sequence[dict[str, Any]]) -> rich.table.Table:
    """Every cell of the data sets of a manifest: kept, or dropped and why; and what else was left out."""
    import rich.table

    reasons = list(dict.fromkeys(why for entry in entries for why, n in entry["dropped"].items() if n))
    table = rich.table.Table(title="account of the cells", title_justify="left", show_footer=True)

    def total(values: Sequence[int]) -> str:
        return f"{sum(values):,}"

    numbers: dict[str, list[int]] = {
        "in the source": [entry["n_cells_in"] for entry in entries],
        **{why.replace("_", " "): [entry["dropped"].get(why, 0) for entry in entries] for why in reasons},
        "in the corpus": [entry["n_cells"] for entry in entries],
    }
    table.add_column("data set", footer="all", overflow="fold")
    for heading, values in numbers.items():
        table.add_column(heading, footer=total(values), justify="right")
    left = [
        [f"{n:,} {what}" for what, n in entry.get("left_out", {}).items()]
        + [f"{n:,} genes: {why}" for why, n in entry.get("orthologs", {}).get("genes_left_out", {}).items()]
        for entry in entries
    ]
    if any(left):
        table.add_column("left out besides", overflow="fold")
    for i, (entry, besides) in enumerate(zip(entries[:ROWS], left, strict=False)):
        cells = [f"{values[i]:,}" for values in numbers.values()]
        table.add_row(escape(entry["name"]), *cells, *([escape("; ".join(besides))] if besides else []))
    if len(entries) > ROWS:
        rest = [total(values[ROWS:]) for values in numbers.values()]
        table.add_row(f"and {len(entries) - ROWS:,} more", *rest)
    return table


def info(args: argparse.Namespace) -> int:
    from scjax.corpus import Corpus

    out.print(Corpus.open(args.corpus).info())
    return 0


def verify(args: argparse.Namespace) -> int:
    from scjax.corpus import Corpus
    from scjax.corpus.repair import repair_corpus

    if args.repair or args.sources:
        for name in repair_corpus(args.corpus, args.sources):
            out.print(f"repaired: {escape(name)}", highlight=False, soft_wrap=True)
    corpus = Corpus.open(args.corpus)
    problems = corpus.verify(progress=True)
    for problem in problems:
        err.print(f"[red]{escape(str(problem))}", soft_wrap=True)
    for note in getattr(problems, "notes", ()):
        out.print(escape(str(note)), soft_wrap=True)
    out.print(
        f"{len(corpus):,} cells in {len(corpus.parts)} part{'s' if len(corpus.parts) != 1 else ''}: "
        + (
            f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
            if problems
            else "whole and consistent"
        )
    )
    return 1 if problems else 0


def gc(args: argparse.Namespace) -> int:
    from scjax.corpus.gc import gc_corpus

    report = gc_corpus(args.corpus, keep=args.keep, drop_old=args.drop_old, dry_run=args.dry_run)
    for name in report.removed:
        out.print(escape(str(name)), highlight=False, soft_wrap=True)
    word = "would be removed" if args.dry_run else "removed"
    out.print(f"{len(report.removed):,} files and folders, {report.bytes / 2**20:,.1f} MiB {word}")
    for manifest_id, why in report.kept.items():
        out.print(f"manifest {manifest_id} stays: {escape(why)}", highlight=False)
    return 0


def statistics(args: argparse.Namespace) -> int:
    from scjax.corpus import Corpus

    if args.out:
        refuse_existing(args.out, args.force)
    corpus = Corpus.open(args.corpus)
    found = corpus.statistics()
    if args.out:
        write_whole(lambda path: found.frame(corpus).to_csv(path, sep="\t"), args.out)
    out.print(found.table(corpus))
    return 0


def genes(args: argparse.Namespace) -> int:
    from scjax.corpus import Corpus, variable_genes

    refuse_existing(args.out, args.force)
    chosen = variable_genes(Corpus.open(args.corpus), args.top)
    write_whole(chosen.to_tsv, args.out)
    out.print(f"{len(chosen):,} variable genes in {args.out}; for a run: --config.data.genes={args.out}")
    return 0


def hashes(args: argparse.Namespace) -> int:
    from scjax.corpus import Corpus, write_hashes

    refuse_existing(args.out, args.force)
    corpus = Corpus.open(args.corpus)
    counted: list[int] = []
    write_whole(lambda path: counted.append(write_hashes(corpus, path)), args.out)
    out.print(f"hashes of {counted[0]:,} training cells in {args.out}")
    return 0


# ------------------------------------------------------------------ parser
def add_commands(commands: Any) -> None:
    """Adds ``corpus`` and its commands to the parser of ``scjax``."""
    room = commands.add_parser("corpus", help="build, describe, check and tidy corpora of raw counts")
    corpus = room.add_subparsers(metavar="COMMAND", required=True)

    command = corpus.add_parser("build", help="h5ad files, zarr stores and 10x matrices to a corpus")
    command.set_defaults(run=build)
    _add_sources(command)
    command.add_argument("--out", required=True, metavar="DIR")
    command.add_argument(
        "--vocabulary", metavar="FILE.tsv", help="genes to keep (default: all of the sources')"
    )
    command.add_argument(
        "--split-by", metavar="COLUMN", help="hold out whole groups of this column (donor, ...)"
    )
    command.add_argument(
        "--values",
        nargs="+",
        default=[],
        metavar="NAME,...",
        help="numbers to keep of each cell: obs columns and obsm matrices (spatial, protein, dose)",
    )
    command.add_argument("--codec", default="fast", choices=("fast", "balanced", "small", "local"))
    _add_building(command)

    command = corpus.add_parser("append", help="add studies to a corpus; unnamed options are as it was built")
    command.set_defaults(run=append)
    command.add_argument("corpus", metavar="DIR")
    _add_sources(command)
    _add_building(command)

    command = corpus.add_parser("info", help="what a corpus holds")
    command.set_defaults(run=info)
    _add_corpus(command)

    command = corpus.add_parser("verify", help="check every byte")
    command.set_defaults(run=verify)
    _add_corpus(command)
    command.add_argument("--repair", action="store_true", help="make anew what is damaged, from the sources")
    command.add_argument(
        "--sources", nargs="+", metavar="SOURCE", help="where the sources are now, if they moved: repairs"
    )

    command = corpus.add_parser("gc", help="remove what interrupted work left, and old states if asked to")
    command.set_defaults(run=gc)
    command.add_argument("corpus", metavar="DIR")
    command.add_argument("--dry-run", action="store_true", help="only tell what would go")
    command.add_argument("--drop-old", action="store_true", help="remove earlier states, too")
    command.add_argument(
        "--keep", action="append", default=[], metavar="ID", help="an earlier state to spare; may be repeated"
    )

    command = corpus.add_parser("statistics", help="mean, detection and median of every gene")
    command.set_defaults(run=statistics)
    _add_corpus(command)
    command.add_argument("--out", metavar="FILE.tsv", help="write all genes there")
    command.add_argument("--force", action="store_true", help="replace what is there")

    command = corpus.add_parser("genes", help="the most variable genes, as the vocabulary of a small model")
    command.set_defaults(run=genes)
    _add_corpus(command)
    command.add_argument("--top", type=int, default=2000, metavar="N", help="how many (default: 2000)")
    command.add_argument("--out", required=True, metavar="FILE.tsv")
    command.add_argument("--force", action="store_true", help="replace what is there")

    command = corpus.add_parser("hashes", help="a hash of each training cell, to find them in benchmarks")
    command.set_defaults(run=hashes)
    _add_corpus(command)
    command.add_argument("--out", required=True, metavar="FILE.npz")
    command.add_argument("--force", action="store_true", help="replace what is there")


def _add_corpus(command: argparse.ArgumentParser) -> None:
    command.add_argument("corpus", metavar="DIR", help="its folder, or its URL in an object store (s3://...)")


def _add_sources(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="an .h5ad file, AnnData zarr store, 10x .h5 file or folder, a folder or a glob of these",
    )


def _add_building(command: argparse.ArgumentParser) -> None:
    """Options of build and append. None means: the default of the one, what the corpus has for the other."""
    command.add_argument(
        "--names", nargs="+", metavar="NAME", help="data set names, one a source (default: file stems)"
    )
    command.add_argument(
        "--layer", metavar="NAME", help='where the counts are: "X", "raw" or a layer (default: X)'
    )
    command.add_argument(
        "--labels", nargs="+", metavar="COLUMN", help="obs columns kept as labels (default: categories)"
    )
    command.add_argument(
        "--column",
        action="append",
        metavar="NAME=OTHER,...",
        help="obs columns (and obsm, of --values) that are NAME in the corpus; CellType is cell_type anyway",
    )
    command.add_argument(
        "--orthologs",
        action="append",
        metavar="[NAME=]TABLE",
        help="two columns of genes: maps studies of the first one, or the study NAME, to the other",
    )
    command.add_argument("--validation", type=float, metavar="FRACTION", help="cells held out (default: 0)")
    command.add_argument(
        "--min-genes", type=int, metavar="N", help="drop cells with fewer genes (default: 1)"
    )
    command.add_argument(
        "--min-counts", type=float, metavar="N", help="drop cells with fewer counts (default: 0)"
    )
    command.add_argument(
        "--drop-duplicates", action="store_true", help="of cells with the same counts keep the first"
    )
    command.add_argument(
        "--min-match", type=float, metavar="FRACTION", help="genes of a study that must match (default: 0.1)"
    )
    command.add_argument(
        "--allow-non-integer", action="store_true", help="take fractional values as they are"
    )
    command.add_argument("--sum-duplicates", action="store_true", help="add up columns that name one gene")
    command.add_argument(
        "--no-shuffle", action="store_true", help="keep the cells in the order of their sources"
    )
    command.add_argument("--seed", type=int, help="of the order of cells on disk (default: 0)")
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    command.add_argument(
        "--task", metavar="i/N", help="do share i (from 0) of N and return: for job arrays, repeated"
    )
    command.add_argument("--dask", metavar="ADDRESS", help="of a running Dask scheduler that does the work")
