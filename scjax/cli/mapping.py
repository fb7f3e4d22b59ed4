"""``scjax map``: a reference index from labelled cells, and other cells mapped onto it."""

from __future__ import annotations

import argparse
import shutil
import warnings
from pathlib import Path
from typing import Any

from scjax.cli.shared import add_reading, err, escape, out, read, refuse_existing, write_whole


def build(args: argparse.Namespace) -> int:
    from scjax.reference import build_reference

    there = Path(args.out)
    if there.exists() and not (args.force and (there / "index.json").is_file()):
        refuse_existing(args.out, False)
    reference = build_reference(
        read(args.input),
        labels=args.labels,
        model=args.model,
        obsm=args.obsm,
        group=args.group,
        k=args.k,
        metric=args.metric,
        dtype=args.dtype,
        **({} if args.obsm else {**_reading(args), "context": not args.no_context}),
    )
    if there.exists():  # the old one is there until the new one is whole
        new, old = (there.with_name(f".{there.name}.{what}") for what in ("new", "old"))
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        reference.save(new)
        there.rename(old)
        new.rename(there)
        shutil.rmtree(old)
    else:
        reference.save(there)
    onto = f"cells of another {args.group}" if args.group else "the others"
    right = ", ".join(f"{name} {share:.1%}" for name, share in reference.card["own accuracy"].items())
    out.print(
        f"{len(reference):,} cells in {reference.card['dimensions']} dimensions in {args.out}; mapped onto "
        f"{onto}, so many of them get the right label: {right}; next: scjax map IN.h5ad --reference "
        f"{args.out} --out OUT.h5ad",
        highlight=False,
        markup=False,
    )
    return 0


def map_(args: argparse.Namespace) -> int:
    from scjax.reference import Reference, map_cells

    for path in filter(None, (args.out, args.nearest)):
        refuse_existing(path, args.force)
    adata, reference = read(args.input), Reference.open(args.reference)
    model = reference.model(args.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # printed below
        map_cells(
            adata,
            reference,
            model=model,
            batch=args.batch,
            error=args.error,
            outside=args.outside,
            key_added=args.key,
            **(_reading(args) if model else {}),
        )
    if args.nearest:
        found = reference.nearest(adata.obsm[f"X_{args.key}"], adata.obs_names, args.nearest_cells)
        write_whole(lambda path: found.to_csv(path, sep="\t", index=False), args.nearest)
    write_whole(adata.write_h5ad, args.out)
    qc = adata.uns["scjax"][f"{args.key}_map"]
    out.print(_table(qc["by_batch"], args.batch or ""), _table(qc["by_label"], "nearest to"))
    for line in filter(None, qc["warnings"].split("\n")):
        err.print(f"[bold yellow]warning:[/] {escape(line)}", highlight=False, soft_wrap=True)
    columns = ", ".join(f"{args.key}_{name}" for name in reference.labels)
    out.print(f"{adata.n_obs:,} cells mapped: obs {columns} of {args.out}", highlight=False, markup=False)
    return 0


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    return {"layer": args.layer, "batch_size": args.batch_size, "progress": True}


def _table(summary: Any, name: str) -> Any:
    from rich.table import Table

    table = Table(name, "cells", "distance", "outside", "unassigned", "confidence")
    for key, row in summary.iterrows():
        shares = (f"{row[column]:.1%}" for column in ("outside", "unassigned"))
        table.add_row(
            escape(str(key)),
            f"{row['cells']:,.0f}",
            f"{row['distance']:.2f}",
            *shares,
            f"{row['confidence']:.2f}",
        )
    return table


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("map build", help="a reference index from labelled cells")
    command.set_defaults(run=build)
    command.add_argument("input", metavar="REF.h5ad")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="RUN", help="embeds the counts")
    source.add_argument("--obsm", metavar="KEY", help="the embedding that is there")
    command.add_argument("--labels", required=True, nargs="+", metavar="COLUMN", help="to be transferred")
    command.add_argument("--out", required=True, metavar="INDEX")
    command.add_argument(
        "--group", metavar="COLUMN", help="donor or study: rules are to hold for cells of a new one"
    )
    command.add_argument("--k", type=int, default=15, help="neighbours that vote (default: 15)")
    command.add_argument("--metric", choices=("cosine", "euclidean"), default="cosine")
    command.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="on disk")
    command.add_argument(
        "--no-context",
        action="store_true",
        help="leave out what obs and obsm tell of cells: for cells of new studies",
    )
    add_reading(command)

    command = commands.add_parser("map", help="label cells by the nearest of a reference (see: map build)")
    command.set_defaults(run=map_)
    command.add_argument("input", metavar="IN.h5ad")
    command.add_argument("--reference", required=True, metavar="INDEX")
    command.add_argument("--out", required=True, metavar="OUT.h5ad")
    command.add_argument(
        "--model", metavar="RUN", help="where the model of the reference is now, if it moved"
    )
    command.add_argument("--batch", metavar="COLUMN", help="summarise by it")
    command.add_argument("--error", type=float, default=0.05, help="share of wrong labels (default: 0.05)")
    command.add_argument(
        "--outside", type=float, default=0.01, help="share called outside by mistake (default: 0.01)"
    )
    command.add_argument("--key", default="scjax", help="prefix of the columns (default: scjax)")
    command.add_argument(
        "--nearest", metavar="FILE.tsv", help="also list the nearest reference cells of each"
    )
    command.add_argument("--nearest-cells", type=int, default=5, metavar="N", help="so many (default: 5)")
    add_reading(command)
