"""``scjax eval``: scores of embeddings, predictions and networks, whoever made them.

Nothing here imports JAX unless a run of scjax is to be scored.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scjax.cli.shared import add_reading, err, escape, out, read

TASKS = (  # of scjax.eval.run, which is imported only when it is called
    "annotation",
    "annotation/few-shot",
    "annotation/unseen",
    "clustering",
    "integration",
    "diagnostics",
)
SUITES = ("perturbation", "genes", "network", "spatial", "modalities", "compare", "leaderboard")


def join(argv: Sequence[str]) -> list[str]:
    """``eval perturbation …``, ``runs report …`` and ``map build …`` as one word for the parser: ``eval`` and
    ``map`` take a file there themselves, and ``runs`` a directory."""
    words = list(argv)
    at = next((i for i, w in enumerate(words) if not w.startswith("-")), len(words))
    joined = " ".join(words[at : at + 2])
    if joined in {"runs report", "map build", *(f"eval {suite}" for suite in SUITES)}:
        words[at : at + 2] = [joined]
    return words


def pairs(given: Sequence[str] | None, flag: str) -> dict[str, str]:
    """NAME=FILE, or FILE called by its stem."""
    found: dict[str, str] = {}
    for text in given or ():
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).name.partition(".")[0], text
        if not name or not path:
            raise ValueError(f"{flag} {text!r}: NAME=FILE is needed")
        if name in found:
            raise ValueError(f"{flag}: {name!r} is there twice; give the files different names (NAME=FILE)")
        found[name] = path
    return found


def table(path: str, index: int = 1) -> Any:
    """A table whose first columns are its index, or an AnnData, by the ending of the file."""
    import pandas as pd

    name = Path(path).name.removesuffix(".gz")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if name.endswith(".h5ad"):
        return read(path)
    if name.endswith(".parquet"):
        from scjax.eval.environment import missing

        if absent := missing("pyarrow"):
            raise ImportError(f"{path}: reading parquet needs pyarrow, {absent}")
        return pd.read_parquet(path)
    if not name.endswith((".csv", ".tsv", ".txt")):
        raise ValueError(f"{path}: .csv, .tsv, .txt, .parquet or .h5ad are read")
    columns = list(range(index)) if index > 1 else 0 if index else None
    return pd.read_csv(path, sep="," if name.endswith(".csv") else "\t", index_col=columns)


def listed(path: str) -> list[str]:
    """The lines of a file."""
    found = [line.strip() for line in Path(path).read_text().splitlines()]
    if not any(found):
        raise ValueError(f"{path}: is empty; one name a line is needed")
    return [line for line in found if line]


def twins_of(given: Sequence[str] | None) -> dict[str, str]:
    """MODEL=TWIN."""
    if wrong := [text for text in given or () if not all(text.partition("=")[::2])]:
        raise ValueError(f"--twin {wrong[0]!r}: MODEL=TWIN is needed")
    return dict(text.split("=", 1) for text in given or ())


# ------------------------------------------------------------------------ cells
def evaluate(args: argparse.Namespace) -> int:
    import scjax.eval
    from scjax.eval import checks

    directory = directory_of(args, args.input)
    adata = read(args.input)
    # what is wrong with the call is said before hours of embedding, not after
    for key, role in ((args.label, "label"), (args.batch, "batch"), (args.group, "group")):
        if key is not None:
            checks.column(adata.obs, key, role)
    embeddings, twins, curves, facts = _embeddings(args, adata)
    results = scjax.eval.run(
        adata,
        embeddings=embeddings,
        tasks=args.tasks,
        label_key=args.label,
        batch_key=args.batch,
        group_key=args.group,
        controls={"random_init": twins} if twins else {},
        **protocol(args),
        pretrain_overlap=_overlap(args, adata, facts),
        progress=True,
    )
    return finish(args, results, directory, curves, facts)


def spatial(args: argparse.Namespace) -> int:
    import scjax.eval

    directory = directory_of(args, args.input)
    adata = read(args.input)
    if args.imputed:
        return _imputation(args, adata, directory)
    embeddings, twins, curves, facts = _embeddings(args, adata)
    results = scored(
        scjax.eval.spatial,
        adata,
        embeddings,
        region_key=args.region,
        label_key=args.label,
        section_key=args.section,
        group_key=args.group,
        coordinates=args.coordinates,
        controls={"random_init": twins} if twins else {},
        **protocol(args),
        pretrain_overlap=_overlap(args, adata, facts),
    )
    return finish(args, results, directory, curves, facts)


def protocol(args: argparse.Namespace) -> dict[str, Any]:
    """What every suite is told: where raw counts are, name, resamples, seed."""
    return {
        "counts": args.layer,
        "dataset": args.dataset or "",
        "n_boot": args.n_boot,
        "seed": args.seed,
    }


def _imputation(args: argparse.Namespace, adata: Any, directory: Path) -> int:
    import scjax.eval

    if not args.held_out:
        raise ValueError("--imputed needs --held-out FILE: the genes that were predicted, one a line")
    results = scored(
        scjax.eval.imputation,
        adata,
        {name: table(path) for name, path in pairs(args.imputed, "--imputed").items()},
        genes=listed(args.held_out),
        section_key=args.section,
        group_key=args.group,
        coordinates=args.coordinates,
        **protocol(args),
        twins=twins_of(args.twin),
        pretrain_overlap=args.pretrain_overlap,
    )
    return finish(args, results, directory, facts={"input": str(args.input)})


def _embeddings(
    args: argparse.Namespace, adata: Any
) -> tuple[list[str], dict[str, str], Any, dict[str, Any]]:
    """Puts everything that is to be scored into obsm: its keys, its untrained twins, curves, facts."""
    embeddings: list[str] = list(args.obsm or ())
    twins: dict[str, str] = {}
    facts: dict[str, Any] = {"input": str(args.input)}
    curves = None
    for key in embeddings:
        if key not in adata.obsm:
            raise KeyError(f"{args.input} has no obsm key {key!r}; there are {sorted(adata.obsm)}")
    files = pairs(args.embedding, "--embedding")
    if files:
        from scjax.eval import load_embedding

        for name, path in files.items():
            adata.obsm[_free(adata, name)] = load_embedding(path, adata.obs_names).to_numpy()
            embeddings.append(name)
            facts[f"file of {name}"] = path
    for name in args.embedder or ():
        from scjax.eval import embedder

        made = embedder(name)
        key = _free(adata, name.partition(":")[0])
        adata.obsm[key] = made.embed(adata)
        embeddings.append(key)
        if hasattr(made, "random_twin"):
            twins[key] = f"{key}_random_init"
            adata.obsm[twins[key]] = made.random_twin().embed(adata)
    if args.model:
        from scjax import api

        model = api.load(args.model)
        pair = {"X_scjax": model, "X_scjax_random_init": model.random_twin()}
        for key, one in pair.items():
            api.embed(adata, one, key_added=key, batch_size=args.batch_size, layer=args.layer, progress=True)
        embeddings.insert(0, "X_scjax")
        twins["X_scjax"] = "X_scjax_random_init"
        facts |= {
            "model": str(args.model),
            "step": model.step,
            "parameters": model.n_parameters,
            **{f"genes: {k}": v for k, v in adata.uns["scjax"]["X_scjax"]["genes"].items()},
        }
        curves = model.metrics()
    if not embeddings:
        raise ValueError(
            "nothing to score: give --model RUN, --obsm KEY, --embedding FILE or --embedder NAME; "
            f"obsm of {args.input} holds {sorted(adata.obsm)}"
        )
    for model_name, twin in twins_of(args.twin).items():
        if model_name not in embeddings or twin not in adata.obsm:
            raise ValueError(
                f"--twin {model_name}={twin}: a model of {embeddings} and an obsm key of "
                f"{sorted(adata.obsm)} are needed"
            )
        twins[model_name] = twin
        embeddings = [e for e in embeddings if e != twin]
    return embeddings, twins, curves, facts


def _free(adata: Any, name: str) -> str:
    if name in adata.obsm:
        raise ValueError(f"obsm has a {name!r} already; call the new embedding otherwise (NAME=FILE)")
    return name


def _overlap(args: argparse.Namespace, adata: Any, facts: dict[str, Any]) -> str:
    """What the models saw of these cells in pretraining: as told, or by the manifest of their corpus."""
    if not args.pretrain_corpus:
        return args.pretrain_overlap
    if args.pretrain_overlap != "unknown":
        raise ValueError("give --pretrain-overlap or --pretrain-corpus, not both")
    from scjax.eval.overlap import pretrain_overlap

    found = pretrain_overlap(adata, args.pretrain_corpus, counts=args.layer)
    facts["pretraining corpus"] = f"{args.pretrain_corpus}: {found.note}"
    return found.verdict


# -------------------------------------------------------------------- all together
def compare(args: argparse.Namespace) -> int:
    from rich.table import Table

    from scjax.eval.leaderboard import compare
    from scjax.eval.tables import heading

    found = compare(args.first, args.second, n_boot=args.n_boot, seed=args.seed)
    table = Table("", "first", "second", header_style="")
    for name in ("difference [95 %]", "wins", "units", "p (Holm)"):
        table.add_column(escape(name), justify="right")
    for r in found.astype(object).where(found.notna(), None).to_dict("records"):
        ends = "" if r["ci_low"] is None else f" [{r['ci_low']:+.3f}, {r['ci_high']:+.3f}]"
        where = f"{heading(r['task'], r['track'])}, {r['metric']}" + (
            f", {r['dataset']}" if r["dataset"] else ""
        )
        numbers = (f"{r['difference']:+.3f}{ends}", f"{100 * r['wins']:.0f} %", str(r["n_units"]))
        cells = (where, r["first"], r["second"], *numbers, f"{r['p_holm']:.2g}")
        table.add_row(*map(escape, cells))
    out.print(table)
    out.print("Above zero the first is ahead; paired by what was held out.", highlight=False)
    return 0


def leaderboard(args: argparse.Namespace) -> int:
    from scjax.eval.leaderboard import leaderboard, save

    board = leaderboard(args.results, allow_unknown=args.allow_unknown)
    if args.out:
        save(board, args.out)
    _show(board)
    if args.out:
        out.print(f"leaderboard: {args.out}")
    return _verdict_of(board["problems"], args.allow)


# --------------------------------------------------------------------- in and out
def directory_of(args: argparse.Namespace, name: str) -> Path:
    """Where results go; a directory that holds something is not written into unasked."""
    directory = Path(args.out or f"{Path(name).name.partition('.')[0]}_eval")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; name another --out")
    if directory.exists() and any(directory.iterdir()) and not args.force:
        raise ValueError(f"{directory} is not empty; name another --out or add --force to write into it")
    return directory


def scored(suite: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs a suite with its progress shown."""
    from scjax.eval import progress

    with progress.shown():
        return suite(*args, **kwargs)


def finish(
    args: argparse.Namespace, results: Any, directory: Path, curves: Any = None, facts: Any = None
) -> int:
    """Writes results and reports, shows the main tables; 1 where no claim may rest on them."""
    from scjax.eval.leaderboard import problems

    directory.mkdir(parents=True, exist_ok=True)
    results.to_jsonl(directory / "results.jsonl")
    out.print(results.brief())
    for ending in args.format:
        path = results.report(directory / f"report.{ending}", title=args.title, curves=curves, facts=facts)
        out.print(f"report: {path}", highlight=False, soft_wrap=True)
    return _verdict_of(problems(results), args.allow)


def _verdict_of(problems: Any, allow: bool) -> int:
    found = [p for p in dict.fromkeys(problems) if p]
    if not found:
        return 0
    for problem in found:
        err.print(f"[bold red]problem:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    said = "no claim may rest on these scores"
    err.print(f"{said} (--allow: exit status 0 all the same)" if not allow else said, highlight=False)
    return 0 if allow else 1


def _show(board: Any) -> None:
    from rich.table import Table

    from scjax.eval.leaderboard import lines
    from scjax.eval.tables import heading

    for (dataset, task, track), of in board.groupby(["dataset", "task", "track"], sort=False):
        title = heading(task, track) + (f", {dataset}" if dataset else "")
        table = Table(title=escape(title), title_justify="left", title_style="bold", header_style="")
        for name in ("rank", "model", of["metric"].iloc[0], "minus best baseline", "p", "overlap"):
            table.add_column(escape(name), justify="left" if name == "model" else "right")
        for cells, kind, blamed in zip(lines(of), of["kind"], of["problems"], strict=True):
            style = "red" if blamed else "bold" if kind == "model" else ""
            table.add_row(*map(escape, cells[:6]), style=style)
        out.print(table)


# ------------------------------------------------------------------------ parser
def add_commands(commands: Any) -> None:
    """Adds ``eval`` and what comes under it to the commands of ``scjax``."""
    command = commands.add_parser(
        "eval",
        help="score embeddings beside the controls; write a report",
        epilog=f"further: scjax eval {{{','.join(SUITES)}}} -h",
    )
    command.set_defaults(run=evaluate)
    _add_cells(command)
    command.add_argument(
        "--tasks", nargs="+", default=None, choices=TASKS, help="default: all that the keys allow"
    )
    command.add_argument("--label", required=True, metavar="COLUMN", help="obs column to predict")
    command.add_argument("--batch", metavar="COLUMN", help="obs column of batches (integration)")
    command.add_argument(
        "--group", metavar="COLUMN", help="obs column that splits never cut through (donor, study)"
    )
    add_output(command)
    add_reading(command)

    command = commands.add_parser("eval spatial", help="regions and neighbourhoods in tissue")
    command.set_defaults(run=spatial)
    _add_cells(command)
    command.add_argument("--region", metavar="COLUMN", help="obs column of regions or niches")
    command.add_argument("--label", metavar="COLUMN", help="obs column of cell types")
    command.add_argument("--section", metavar="COLUMN", help="obs column of tissue sections")
    command.add_argument("--group", metavar="COLUMN", help="obs column to generalise to (donor)")
    command.add_argument("--coordinates", default="spatial", metavar="KEY", help="in obsm (default: spatial)")
    command.add_argument(
        "--imputed",
        nargs="+",
        metavar="[NAME=]FILE",
        help="instead of embeddings: predicted genes, cells by name (.csv, .tsv, .parquet, .h5ad)",
    )
    command.add_argument("--held-out", metavar="FILE", help="with --imputed: the genes, one a line")
    add_output(command)
    add_reading(command)

    command = commands.add_parser(
        "eval compare", help="models of two evaluations, paired by what was held out"
    )
    command.set_defaults(run=compare)
    command.add_argument("first", metavar="FIRST.jsonl")
    command.add_argument("second", metavar="SECOND.jsonl")
    command.add_argument("--n-boot", type=int, default=1000, metavar="N", help="resamples (default: 1000)")
    command.add_argument("--seed", type=int, default=0)

    command = commands.add_parser("eval leaderboard", help="many results as one ranking")
    command.set_defaults(run=leaderboard)
    command.add_argument("results", nargs="+", metavar="RESULTS.jsonl")
    command.add_argument("--out", metavar="FILE.md|csv|tsv")
    command.add_argument(
        "--allow-unknown", action="store_true", help="also models whose pretraining may have seen the cells"
    )
    command.add_argument("--allow", action="store_true", help="exit status 0 whatever the problems")


def _add_cells(command: argparse.ArgumentParser) -> None:
    """What is scored on cells, and whoever made it."""
    command.add_argument("input", metavar="IN.h5ad")
    command.add_argument("--model", metavar="RUN", help="run directory; its random twin is scored beside it")
    command.add_argument("--obsm", nargs="+", metavar="KEY", help="embeddings already in the file, anybody's")
    command.add_argument(
        "--embedding",
        nargs="+",
        metavar="[NAME=]FILE",
        help="files keyed by cell: .npz, .npy, .parquet, .csv, .tsv, .h5ad",
    )
    command.add_argument(
        "--embedder", nargs="+", metavar="NAME[:WHAT]", help="registered by an installed package"
    )
    command.add_argument(
        "--twin", nargs="+", metavar="MODEL=KEY", help="the same architecture before training, by model"
    )
    command.add_argument(
        "--pretrain-overlap",
        default="unknown",
        choices=("none", "study", "cell", "unknown"),
        help="what the models saw of these cells in pretraining; noted in every result",
    )
    command.add_argument(
        "--pretrain-corpus", metavar="FILE", help="look that up: hashes or manifest of the pretraining corpus"
    )


def add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", metavar="DIR", help="default: the input's name with _eval")
    command.add_argument("--dataset", metavar="NAME", help="what the data are called in results")
    command.add_argument("--title", default=None, help="of the report")
    command.add_argument(
        "--format", nargs="+", default=["html"], choices=("html", "md"), help="of the report (default: html)"
    )
    command.add_argument("--n-boot", type=int, default=1000, metavar="N", help="resamples (default: 1000)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--allow", action="store_true", help="exit status 0 even where a control is missing or a gate failed"
    )
