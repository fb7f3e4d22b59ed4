"""``scjax``: corpora, embeddings, evaluations and configs from the shell.

Each command is a thin layer over the Python function of the same name; imports sit inside the
commands so that ``scjax eval`` on an embedding somebody else made starts without JAX.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scjax import __version__
from scjax.cli import evaluation, suites
from scjax.cli.shared import add_reading, err, escape, out, read, refuse_existing, write_whole


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (0, 1 problems found, 2 bad input)."""
    args = _parser().parse_args(evaluation.join(sys.argv[1:] if argv is None else argv))
    try:
        return args.run(args) or 0
    except (ValueError, KeyError, OSError, ImportError) as error:
        if args.debug:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        err.print(f"[bold red]error:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        err.print("interrupted")
        return 130


# ------------------------------------------------------------------ corpus
def corpus_build(args: argparse.Namespace) -> int:
    from scjax.corpus import build_corpus
    from scjax.genes import Vocabulary

    corpus = build_corpus(
        args.sources,
        args.out,
        vocabulary=None if args.vocabulary is None else Vocabulary.from_tsv(args.vocabulary),
        layer=args.layer,
        labels=args.labels,
        names=args.names,
        validation=args.validation,
        split_by=args.split_by,
        seed=args.seed,
        min_genes=args.min_genes,
        allow_non_integer=args.allow_non_integer,
        duplicates="sum" if args.sum_duplicates else "error",
        codec=args.codec,
    )
    out.print(corpus.info())
    return 0


def corpus_info(args: argparse.Namespace) -> int:
    from scjax.corpus import Corpus

    out.print(Corpus.open(args.corpus).info())
    return 0


def corpus_verify(args: argparse.Namespace) -> int:
    from scjax.corpus import Corpus

    corpus = Corpus.open(args.corpus)
    problems = corpus.verify(progress=True)
    for problem in problems:
        err.print(f"[red]{escape(str(problem))}", soft_wrap=True)
    out.print(
        f"{len(corpus):,} cells in {len(corpus.parts)} parts: "
        + (f"{len(problems)} problems" if problems else "whole and consistent")
    )
    return 1 if problems else 0


def corpus_statistics(args: argparse.Namespace) -> int:
    from scjax.corpus import Corpus

    if args.out:
        refuse_existing(args.out, args.force)
    corpus = Corpus.open(args.corpus)
    found = corpus.statistics()
    if args.out:
        write_whole(lambda path: found.frame(corpus).to_csv(path, sep="\t"), args.out)
    out.print(found.table(corpus))
    return 0


def corpus_genes(args: argparse.Namespace) -> int:
    from scjax.corpus import Corpus, variable_genes

    refuse_existing(args.out, args.force)
    genes = variable_genes(Corpus.open(args.corpus), args.top)
    write_whole(genes.to_tsv, args.out)
    out.print(f"{len(genes):,} variable genes in {args.out}; for a run: --config.data.genes={args.out}")
    return 0


def corpus_hashes(args: argparse.Namespace) -> int:
    from scjax.corpus import Corpus, write_hashes

    refuse_existing(args.out, args.force)
    corpus = Corpus.open(args.corpus)
    counted: list[int] = []
    write_whole(lambda path: counted.append(write_hashes(corpus, path)), args.out)
    out.print(f"hashes of {counted[0]:,} training cells in {args.out}")
    return 0


# ------------------------------------------------------- embeddings and scores
def embed(args: argparse.Namespace) -> int:
    from scjax import api

    refuse_existing(args.out, args.force)
    adata = read(args.input)
    model = api.load(args.model)
    api.embed(
        adata,
        model,
        key_added=args.key,
        batch_size=args.batch_size,
        layer=args.layer,
        progress=True,
    )
    write_whole(adata.write_h5ad, args.out)
    out.print(
        f"{adata.n_obs:,} cells embedded in {adata.obsm[args.key].shape[1]} dimensions: "
        f'obsm\\["{args.key}"] of {args.out}'
    )
    return 0


# ------------------------------------------------------- other people's checkpoints
def import_(args: argparse.Namespace) -> int:
    from scjax import api

    names = ("token_dictionary", "gene_medians", "gene_names", "genes", "which")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    model = api.import_pretrained(args.system, args.path, args.out, verbose=True, **given)
    out.print(
        f"{args.system}: {model.n_parameters:,} parameters, {len(model.vocabulary):,} genes in {args.out}; "
        f"next: scjax embed IN.h5ad --model {args.out} --out OUT.h5ad",
        highlight=False,
        markup=False,
    )
    return 0


def export(args: argparse.Namespace) -> int:
    from scjax import api

    api.export_pretrained(args.run_directory, args.out, format=args.format)
    written = ", ".join(sorted(p.name for p in Path(args.out).iterdir()))
    out.print(f"{args.out}: {written}", highlight=False, markup=False)
    return 0


# ---------------------------------------------------------------------- configs
def config_show(args: argparse.Namespace) -> int:
    import json

    from scjax.cli.configs import load_config, resolve

    out.print_json(json.dumps(resolve(load_config(args.config))))
    return 0


def config_params(args: argparse.Namespace) -> int:
    from scjax.cli.configs import load_config, parameter_table

    out.print(parameter_table(load_config(args.config), n_genes=args.genes))
    return 0


# ---------------------------------------------------------------------- parser
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scjax", description="Pretrain, adapt and examine single-cell models."
    )
    parser.add_argument("--version", action="version", version=f"scjax {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    room = commands.add_parser("corpus", help="build, describe and check corpora of raw counts")
    corpus = room.add_subparsers(metavar="COMMAND", required=True)
    build = corpus.add_parser("build", help="h5ad files to a corpus")
    build.set_defaults(run=corpus_build)
    build.add_argument("sources", nargs="+", metavar="SOURCE.h5ad")
    build.add_argument("--out", required=True, metavar="DIR")
    build.add_argument(
        "--names", nargs="+", metavar="NAME", help="data set names, one a source (default: file stems)"
    )
    build.add_argument(
        "--layer", metavar="NAME", help='where the counts are: "X", "raw" or a layer (default: found)'
    )
    build.add_argument(
        "--labels", nargs="+", metavar="COLUMN", help="obs columns kept as labels (default: categories)"
    )
    build.add_argument(
        "--vocabulary", metavar="FILE.tsv", help="genes to keep (default: all of the sources')"
    )
    build.add_argument(
        "--validation", type=float, default=0.0, metavar="FRACTION", help="cells held out (default: 0)"
    )
    build.add_argument(
        "--split-by", metavar="COLUMN", help="hold out whole groups of this column (donor, ...)"
    )
    build.add_argument(
        "--min-genes", type=int, default=1, metavar="N", help="drop cells with fewer genes (default: 1)"
    )
    build.add_argument("--allow-non-integer", action="store_true", help="take fractional values as they are")
    build.add_argument("--sum-duplicates", action="store_true", help="add up columns that name one gene")
    build.add_argument("--codec", default="fast", choices=("fast", "balanced", "small", "local"))
    build.add_argument("--seed", type=int, default=0, help="of the order of cells on disk (default: 0)")
    for name, run, text in (
        ("info", corpus_info, "what a corpus holds"),
        ("verify", corpus_verify, "check every byte"),
    ):
        command = corpus.add_parser(name, help=text)
        command.set_defaults(run=run)
        command.add_argument("corpus", metavar="DIR")

    command = corpus.add_parser("statistics", help="mean, detection and median of every gene")
    command.set_defaults(run=corpus_statistics)
    command.add_argument("corpus", metavar="DIR")
    command.add_argument("--out", metavar="FILE.tsv", help="write all genes there")
    command.add_argument("--force", action="store_true", help="replace what is there")

    genes = corpus.add_parser("genes", help="the most variable genes, as the vocabulary of a small model")
    genes.set_defaults(run=corpus_genes)
    genes.add_argument("corpus", metavar="DIR")
    genes.add_argument("--top", type=int, default=2000, metavar="N", help="how many (default: 2000)")
    genes.add_argument("--out", required=True, metavar="FILE.tsv")
    genes.add_argument("--force", action="store_true", help="replace what is there")

    hashes = corpus.add_parser("hashes", help="a hash of each training cell, to find them in benchmarks")
    hashes.set_defaults(run=corpus_hashes)
    hashes.add_argument("corpus", metavar="DIR")
    hashes.add_argument("--out", required=True, metavar="FILE.npz")
    hashes.add_argument("--force", action="store_true", help="replace what is there")

    command = commands.add_parser("embed", help="add a model's cell embedding to an h5ad file")
    command.set_defaults(run=embed)
    command.add_argument("input", metavar="IN.h5ad")
    command.add_argument("--model", required=True, metavar="RUN", help="run directory")
    command.add_argument("--out", required=True, metavar="OUT.h5ad")
    command.add_argument("--key", default="X_scjax", help="name in obsm (default: X_scjax)")
    add_reading(command)

    evaluation.add_commands(commands)
    suites.add_commands(commands)

    command = commands.add_parser("import", help="a published checkpoint to a run directory")
    command.set_defaults(run=import_)
    command.add_argument("system", metavar="SYSTEM", help="scgpt, geneformer, scfoundation, scbert, celllm")
    command.add_argument("path", metavar="PATH", help="the file or directory as it is published")
    command.add_argument("--out", required=True, metavar="DIR")
    for name, text in (
        ("token-dictionary", "gene to token, JSON or a plain pickle (Geneformer)"),
        ("gene-medians", "gene to median, JSON or a plain pickle (Geneformer)"),
        ("gene-names", "symbol to gene, JSON or a plain pickle (Geneformer)"),
        ("genes", "the model's genes in their order (scFoundation, scBERT, CellLM)"),
    ):
        command.add_argument(f"--{name}", metavar="FILE", help=text)
    command.add_argument("--which", metavar="NAME", help="one of the models in the file (scFoundation)")

    command = commands.add_parser("export", help="a run to safetensors and JSON for other tools")
    command.set_defaults(run=export)
    command.add_argument("run_directory", metavar="RUN")
    command.add_argument("--out", required=True, metavar="DIR")
    command.add_argument(
        "--format", default="plain", help="plain (default), or the original layout: scgpt, geneformer"
    )

    room = commands.add_parser("config", help="look at a config file without data or devices")
    config = room.add_subparsers(metavar="COMMAND", required=True)
    show = config.add_parser("show", help="the config, checked, with all defaults filled in")
    show.set_defaults(run=config_show)
    show.add_argument("config", metavar="FILE.py[:ARG]")
    params = config.add_parser("params", help="every parameter: shape, axes, bytes")
    params.set_defaults(run=config_params)
    params.add_argument("config", metavar="FILE.py[:ARG]")
    params.add_argument(
        "--genes", type=int, metavar="N", help="size of the vocabulary (default: the config's corpus)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
