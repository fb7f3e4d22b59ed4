"""``scjax genes``: tables of gene vectors from graphs and from texts, for ``config.tables``."""

from __future__ import annotations

import argparse
import hashlib
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scjax.cli.shared import err, escape, out, refuse_existing, write_whole

if TYPE_CHECKING:
    from scjax.genes import GeneGraph


def graph(args: argparse.Namespace) -> int:
    from scjax.genes import shuffled, spectral

    _check_out(args)
    network = _graph(args)
    if args.shuffle:
        network = shuffled(network, args.seed)
    err.print(escape(network.summary), highlight=False, soft_wrap=True)
    about: dict[str, Any] = {"graph": network.summary, "shuffled": args.shuffle}
    if args.method == "spectral":
        vectors = spectral(network, args.dim, args.seed)
    else:
        from scjax.genes.autoencoder import masked_autoencoder

        vectors, score = masked_autoencoder(network, args.dim, args.seed, steps=args.steps)
        about |= {"steps": args.steps, "auroc": score}
        err.print(f"hidden edges are told from pairs with as many edges: AUROC {score:.3f}", highlight=False)
    _write(args, network.names, vectors, about)
    return 0


def _check_out(args: argparse.Namespace) -> None:
    if not args.out.endswith(".npz"):
        raise ValueError(f"--out {args.out}: the table is an .npz file, and is read by that name; end it so")
    refuse_existing(args.out, args.force)


def _graph(args: argparse.Namespace) -> GeneGraph:
    """Of a table of edges, or co-expression in an .h5ad file or in the training cells of a corpus."""
    from scjax.cli.shared import read
    from scjax.genes import Vocabulary, coexpression, read_graph

    given, corpus = args.source, (Path(args.source) / "HEAD").exists()
    if not (corpus or given.endswith(".h5ad")):
        vocabulary = Vocabulary.from_tsv(args.genes) if args.genes else None
        how = {"columns": args.columns, "weight": args.weight, "min_matched": args.min_matched}
        return read_graph(given, vocabulary, **how)
    if args.columns or args.weight:
        raise ValueError(f"{given} holds cells and no table of edges: --columns and --weight are of one")
    import numpy as np

    if corpus:
        from scjax.corpus import Corpus

        cells: Any = Corpus.open(given)
        # vectors that validation cells helped to make would be judged on them
        parts = [np.arange(p.first_row, p.first_row + p.n_cells) for p in cells.split("train")]
        rows = np.concatenate(parts)
    else:
        from scjax.corpus.counts import validate_counts

        cells = read(given)
        if cells.X is None:
            raise ValueError(f"{given}: X is empty; co-expression is of the raw counts in X")
        named = list(map(str, cells.var_names)), list(map(str, cells.obs_names))
        validate_counts(cells.X, source=f"{given}, X", genes=named[0], cells=named[1])
        rows = np.arange(cells.n_obs)
    rows = rows[np.sort(np.random.default_rng([args.seed, 13]).permutation(len(rows))[: args.cells])]
    cells = cells.read(rows) if corpus else cells[rows]
    counts, names = cells.X, cells.var_names
    depth = np.asarray(counts.sum(1)).ravel()
    if args.genes:
        match = Vocabulary.from_tsv(args.genes).match(cells.var)
        _, keep = np.unique(match.ids, return_index=True)
        keep = keep[match.ids[keep] >= 0]
        counts, names = counts[:, keep], names[keep]
    how = {"neighbours": args.neighbours, "depth": depth, "source": given}
    return coexpression(counts, list(map(str, names)), **how)


def text(args: argparse.Namespace) -> int:
    from scjax.genes import Vocabulary, lsa, read_descriptions

    _check_out(args)
    descriptions = read_descriptions(args.source, args.gene, args.text)
    if args.genes:
        there = Vocabulary.from_tsv(args.genes)
        ids = there.match(list(descriptions)).ids
        known = {name: words for (name, words), i in zip(descriptions.items(), ids, strict=True) if i >= 0}
        if not known:
            raise ValueError(
                f"{args.source}: none of its {len(descriptions):,} genes, such as "
                f"{next(iter(descriptions))}, is in {args.genes}; name the column of genes with --gene"
            )
        descriptions = known
    first = next(iter(descriptions.items()))
    said = f"{args.source}: texts of {len(descriptions):,} genes, such as {first[0]}: {first[1]!r}"
    err.print(escape(said), highlight=False, soft_wrap=True)
    if args.method == "lsa":
        vectors = lsa(descriptions, args.dim, args.seed)
    else:
        from scjax.genes.sentences import sentence_vectors

        vectors = sentence_vectors(list(descriptions.values()), args.model)
    _write(args, tuple(descriptions), vectors, {"texts": said})
    return 0


def _write(args: argparse.Namespace, names: Any, vectors: Any, about: dict[str, Any]) -> None:
    from scjax import __version__
    from scjax.genes import write_vectors

    if os.path.isfile(args.source):
        with open(args.source, "rb") as file:
            about["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    about |= {"source": args.source, "method": args.method, "seed": args.seed, "scjax": __version__}
    write_whole(partial(write_vectors, names=names, vectors=vectors, about=about), args.out)
    out.print(
        f"{args.out}: {vectors.shape[0]:,} genes, {vectors.shape[1]} wide; a run takes it by "
        f"--config.tables.NAME={args.out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("genes", help="tables of gene vectors, for a model to begin with")
    kinds = parser.add_subparsers(metavar="WHAT", required=True)

    command = kinds.add_parser("graph", help="from interactions, or from co-expression in cells")
    command.set_defaults(run=graph)
    command.add_argument(
        "source", metavar="SOURCE", help="table of edges (.tsv, .csv), .h5ad file of raw counts, or corpus"
    )
    command.add_argument("--method", choices=("spectral", "masked"), default="spectral")
    command.add_argument("--dim", type=int, default=64, help="width of the vectors (default: 64)")
    command.add_argument("--columns", nargs=2, metavar="COLUMN", help="the two genes of an edge")
    command.add_argument("--weight", metavar="COLUMN", help="weight of an edge")
    command.add_argument("--min-matched", type=float, default=0.5, metavar="SHARE")
    command.add_argument("--neighbours", type=int, default=10, help="co-expression: of a gene (default: 10)")
    command.add_argument("--cells", type=int, default=5000, help="co-expression: at most (default: 5000)")
    command.add_argument("--steps", type=int, default=300, help="masked: of training (default: 300)")
    command.add_argument("--shuffle", action="store_true", help="the control: edges shuffled, degrees kept")
    _shared(command)

    command = kinds.add_parser("text", help="from descriptions of genes")
    command.set_defaults(run=text)
    command.add_argument("source", metavar="TABLE", help="a gene a row (.tsv, .csv)")
    command.add_argument("--method", choices=("minilm", "lsa"), default="minilm")
    command.add_argument("--gene", metavar="COLUMN", help="names of the genes")
    command.add_argument("--text", nargs="+", metavar="COLUMN", help="what is written about them")
    command.add_argument("--dim", type=int, default=128, help="lsa: width of the vectors (default: 128)")
    command.add_argument("--model", metavar="DIR", help="a BERT in the place of MiniLM")
    _shared(command)


def _shared(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="TABLE.npz")
    command.add_argument("--genes", metavar="VOCABULARY.tsv", help="only these genes")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--force", action="store_true", help="replace what is there")
