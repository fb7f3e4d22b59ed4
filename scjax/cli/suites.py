"""``scjax eval perturbation | genes | network | modalities``: predictions and tables that others made."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scjax.cli.evaluation import (
    add_output,
    directory_of,
    finish,
    listed,
    pairs,
    protocol,
    scored,
    table,
    twins_of,
)
from scjax.cli.shared import read


def perturbation(args: argparse.Namespace) -> int:
    import scjax.eval

    directory = directory_of(args, args.input)
    real = read(args.input)
    keys = [k for k in (args.perturbation, args.dose, args.context) if k]
    predictions = {n: table(p, index=len(keys)) for n, p in pairs(args.prediction, "--prediction").items()}
    embeddings = {n: table(p) for n, p in pairs(args.gene_embedding, "--gene-embedding").items()}
    if not predictions and not embeddings:
        raise ValueError("nothing to score: give --prediction or --gene-embedding NAME=FILE")
    train = args.train
    if train is not None and train not in real.obs:
        if not Path(train).is_file():
            raise ValueError(
                f"--train {train}: neither an obs column of {args.input} ({', '.join(real.obs)}) nor a file "
                "with one training perturbation a line"
            )
        train = listed(train)
    results = scored(
        scjax.eval.perturbation,
        real,
        predictions,
        perturbation_key=args.perturbation,
        control=args.control,
        context_key=args.context,
        dose_key=args.dose,
        train=train,
        gene_embeddings=embeddings or None,
        kind=args.kind,
        **_common(args),
    )
    return finish(args, results, directory, facts={"input": str(args.input)})


def genes(args: argparse.Namespace) -> int:
    import scjax.eval
    from scjax.eval.gene_sets import read_gmt

    if not args.labels and not args.sets:
        raise ValueError("nothing to predict: give --labels FILE or --sets NAME=FILE.gmt")
    directory = directory_of(args, next(iter(pairs(args.table, "--table").values())))
    labels = None
    if args.labels:
        frame = table(args.labels)
        labels = {str(column): frame[column] for column in frame.columns}
    families = None
    if args.families:
        frame = table(args.families)
        families = frame[frame.columns[0]]
    results = scored(
        scjax.eval.genes,
        {name: table(path) for name, path in pairs(args.table, "--table").items()},
        labels,
        collections={n: read_gmt(p) for n, p in pairs(args.sets, "--sets").items()} or None,
        families=families,
        **_rivals(args),
    )
    return finish(args, results, directory)


def network(args: argparse.Namespace) -> int:
    import scjax.eval
    from scjax.eval.gene_sets import read_edges

    scores = pairs(args.scores, "--scores")
    directory = directory_of(args, next(iter(scores.values())))
    results = scored(
        scjax.eval.network,
        {name: _matrix(path) for name, path in scores.items()},
        {name: read_edges(path) for name, path in pairs(args.truth, "--truth").items()},
        universe=listed(args.universe) if args.universe else None,
        signed=args.signed or (),
        **_rivals(args),
    )
    return finish(args, results, directory)


def _matrix(path: str) -> Any:
    """Edges with source and target, or a matrix with regulators as index."""
    frame = table(path, index=0)
    if {"source", "target"} <= set(frame.columns) or frame.index.name:
        return frame
    return frame.set_index(frame.columns[0])


def modalities(args: argparse.Namespace) -> int:
    import scjax.eval

    directory = directory_of(args, args.input)
    adata = read(args.input)
    second = args.second if args.second in adata.obsm else None
    if second is None and not Path(args.second).is_file():
        raise KeyError(
            f"--second {args.second}: neither an obsm key of {args.input} ({sorted(adata.obsm)}) nor a file"
        )
    second = table(args.second) if second is None else second
    second = second.to_df() if hasattr(second, "to_df") else second
    joint = {}
    for name, text in pairs(args.joint, "--joint").items():
        halves = text.split(",")
        if len(halves) != 2:
            raise ValueError(f"--joint {name}={text}: NAME=KEY,KEY is needed, one obsm key a modality")
        joint[name] = (halves[0], halves[1])
    predictions = {n: table(p) for n, p in pairs(args.prediction, "--prediction").items()}
    if not joint and not predictions and not args.obsm:
        raise ValueError("nothing to score: give --joint NAME=KEY,KEY, --prediction NAME=FILE or --obsm KEY")
    about = {**_common(args), "group_key": args.group}
    twins = about.pop("twins")
    found = scjax.eval.Results()
    if joint:
        of = {m: t for m, t in twins.items() if m in joint}
        one = scored(scjax.eval.matching, adata, second, joint, label_key=args.label, twins=of, **about)
        found.extend(one)
        found.facts |= one.facts
    if predictions or args.obsm:
        of = {m: t for m, t in twins.items() if m not in joint}
        one = scored(
            scjax.eval.modality_prediction,
            adata,
            second,
            predictions,
            embeddings=args.obsm or (),
            twins=of,
            **about,
        )
        found.extend(one)
        spent = {"matching": found.facts.get("wall_s", {}), "prediction": one.facts.get("wall_s", {})}
        found.facts |= {**one.facts, "wall_s": {k: v.get("all", 0) for k, v in spent.items()}}
    return finish(args, found, directory, facts={"input": str(args.input)})


def _common(args: argparse.Namespace) -> dict[str, Any]:
    return {**protocol(args), "twins": twins_of(args.twin), "pretrain_overlap": args.pretrain_overlap}


def _rivals(args: argparse.Namespace) -> dict[str, Any]:
    """What gene tables and networks stand beside."""
    expression = None if args.expression is None else read(args.expression)
    return {**_common(args), "expression": expression, "baselines": args.baseline or ()}


# ------------------------------------------------------------------------ parser
def add_commands(commands: Any) -> None:
    """Adds the commands of this file to those of ``scjax``."""

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(f"eval {name}", help=text)
        command.set_defaults(run=run)
        return command

    command = add("perturbation", perturbation, "predicted against real effects of perturbations")
    command.add_argument("input", metavar="REAL.h5ad")
    command.add_argument(
        "--prediction",
        nargs="+",
        metavar="[NAME=]FILE",
        help="cells (.h5ad, the same obs columns) or mean profiles (.csv, ...; perturbation first)",
    )
    command.add_argument(
        "--gene-embedding", nargs="+", metavar="[NAME=]FILE", help="tables by perturbed gene or compound"
    )
    command.add_argument("--perturbation", default="perturbation", metavar="COLUMN")
    command.add_argument("--control", default="control", metavar="VALUE", help="of unperturbed cells")
    command.add_argument("--context", metavar="COLUMN", help="cell line, cell type or donor")
    command.add_argument("--dose", metavar="COLUMN")
    command.add_argument(
        "--train", metavar="COLUMN|FILE", help="training cells (obs column) or perturbations (one a line)"
    )
    command.add_argument("--kind", default="genetic", choices=("genetic", "chemical", "environmental"))
    _add_common(command)

    command = add("genes", genes, "what gene embeddings know of properties and sets of genes")
    command.add_argument("--table", nargs="+", required=True, metavar="[NAME=]FILE", help="genes first")
    command.add_argument("--labels", metavar="FILE", help="genes first, then a column of 0 and 1 a property")
    command.add_argument("--sets", nargs="+", metavar="[NAME=]FILE.gmt")
    command.add_argument("--families", metavar="FILE", help="gene and family (default: guessed from symbols)")
    _add_rivals(command)

    command = add("network", network, "scores of regulator and target against known edges")
    command.add_argument(
        "--scores", nargs="+", required=True, metavar="[NAME=]FILE", help="matrix, or source, target, score"
    )
    command.add_argument("--truth", nargs="+", required=True, metavar="[NAME=]FILE", help="source and target")
    command.add_argument("--universe", metavar="FILE", help="target genes, one a line")
    command.add_argument("--signed", nargs="+", metavar="NAME", help="scores whose sign means activation")
    _add_rivals(command)

    command = add("modalities", modalities, "joint spaces of two modalities; one predicted from another")
    command.add_argument("input", metavar="IN.h5ad")
    command.add_argument("--second", required=True, metavar="KEY|FILE", help="the other modality")
    command.add_argument("--joint", nargs="+", metavar="NAME=KEY,KEY", help="obsm keys of both halves")
    command.add_argument("--prediction", nargs="+", metavar="[NAME=]FILE", help="of the other modality")
    command.add_argument("--obsm", nargs="+", metavar="KEY", help="embeddings that predict it by regression")
    command.add_argument("--label", metavar="COLUMN", help="obs column of cell types")
    command.add_argument("--group", metavar="COLUMN", help="obs column of donors or batches")
    _add_common(command)


def _add_rivals(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--expression", metavar="CELLS.h5ad", help="cells of which the baselines are made; else a problem"
    )
    command.add_argument("--baseline", nargs="+", metavar="NAME", help="those given that are rivals")
    _add_common(command)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--twin", nargs="+", metavar="MODEL=TWIN", help="the same before training")
    command.add_argument("--layer", metavar="NAME", help="where raw counts are (default: found)")
    command.add_argument(
        "--pretrain-overlap", default="unknown", choices=("none", "study", "cell", "unknown")
    )
    command.add_argument("--force", action="store_true", help="replace what is there")
    add_output(command)
