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
from scjax.cli import configs, corpus, evaluation, genes, launch, mapping, runs, suites
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
        context=not args.no_context,
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


# ---------------------------------------------------------------------- parser
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scjax", description="Pretrain, adapt and examine single-cell models."
    )
    parser.add_argument("--version", action="version", version=f"scjax {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    corpus.add_commands(commands)
    genes.add_commands(commands)

    command = commands.add_parser("embed", help="add a model's cell embedding to an h5ad file")
    command.set_defaults(run=embed)
    command.add_argument("input", metavar="IN.h5ad")
    command.add_argument("--model", required=True, metavar="RUN", help="run directory")
    command.add_argument("--out", required=True, metavar="OUT.h5ad")
    command.add_argument("--key", default="X_scjax", help="name in obsm (default: X_scjax)")
    command.add_argument(
        "--no-context", action="store_true", help="leave out what obs and obsm tell of cells"
    )
    add_reading(command)

    evaluation.add_commands(commands)
    suites.add_commands(commands)
    mapping.add_commands(commands)
    runs.add_commands(commands)
    launch.add_commands(commands)

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

    configs.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
