"""How fast is a training step of each system, beside PyTorch's on the same cells?

    python tools/bench_step.py                                  # two CPU threads, few layers
    python tools/bench_step.py --systems scgpt,scbert --rounds 9
    python tools/bench_step.py --device gpu --size published    # bfloat16, torch.compile, MFU

Forward pass, backward pass, clipping and AdamW, in one process, the contestants in turn (A B C A B C ...):

  scjax      the jitted, donated step of a training run; raw counts go in, encoding is part of it
  tuned      PyTorch written for speed (tools/reference/tuned.py): fused attention, heads at hidden genes only
  original   the original's own modules, from the packages that the parity tests use; heads at all positions

PyTorch is given scjax's tokens (same genes, hidden ones, lengths and padding) ready made, which favours it.
Dropout acts where scjax has it, in the original also on attention weights. A ratio is the median over the
rounds of PyTorch's time over scjax's in the same round: above 1, scjax is faster. Prints a JSON line a
system and a table. Needs the extra "parity" but for ``--contestants scjax``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from scjax import models
from scjax.config import from_config
from scjax.genes import Vocabulary
from scjax.nn import bind
from scjax.nn.work import FORMULA, work_of
from scjax.parallel import MeshConfig, device_of, make_mesh, place
from scjax.train import OptimizerConfig, abstract_state, init_state, make_optimizer, make_train_step
from scjax.types import CellBatch

CONTESTANTS = ("scjax", "tuned", "original")
MASKED = {"objective": "masked", "mask_fractions": (0.5,)}
GENERATIVE = {"objective": "generative", "mask_fractions": (0.5,), "second_pass_after": 1}
FROZEN = {"gene_table": {"kind": "frozen"}}
SMALL = {"d_model": 32, "n_heads": 2, "n_layers": 2, "d_ff": 128}
DECODER = {"decoder_d_model": 32, "decoder_n_heads": 2, "decoder_d_head": 16, "decoder_n_layers": 2}
# row -> (system, genes of the vocabulary, {size: (cells, changes of the published config)})
ROWS: dict[str, tuple[str, int, dict[str, tuple[int, dict[str, Any]]]]] = {
    "scgpt": (
        "scgpt", 60_694,
        {"bench": (4, MASKED | {"n_layers": 3}), "published": (32, MASKED), "smoke": (4, MASKED | SMALL)},
    ),
    "scgpt-generative": (
        "scgpt", 60_694,
        {"bench": (4, GENERATIVE | {"n_layers": 3}), "published": (32, GENERATIVE),
         "smoke": (4, GENERATIVE | SMALL)},
    ),
    "geneformer": (
        "geneformer", 25_424,
        {"bench": (4, {}), "published": (12, {}), "smoke": (4, SMALL)},
    ),
    "scfoundation": (
        "scfoundation", 19_264,
        {
            "bench": (2, {"n_layers": 2, "decoder_n_layers": 1}), "published": (8, {"remat": "full"}),
            "smoke": (4, SMALL | DECODER | {"decoder_d_ff": 128}),
        },
    ),
    "scbert": (
        "scbert", 16_906,
        {
            "bench": (1, FROZEN | {"n_layers": 2}), "published": (3, FROZEN),
            "smoke": (2, FROZEN | SMALL | {"d_head": 16}),
        },
    ),
    "celllm": (
        "celllm", 19_379,
        {
            "bench": (2, FROZEN | {"n_layers": 2}), "published": (16, FROZEN),
            "smoke": (4, FROZEN | SMALL | {"d_head": 16}),
        },
    ),
}  # fmt: skip
NO_ORIGINAL = {"scgpt-generative": "the class for pretraining is not in scGPT's package"}
Step = Callable[[], float]


def cells(corpus: str | None, n: int, seed: int) -> tuple[CellBatch, int]:
    """One batch, and the number of genes its ids may have."""
    if corpus:
        from scjax.corpus import Corpus
        from scjax.loader import Loader

        opened = Corpus.open(corpus)
        return next(iter(Loader(opened, n, seed=seed, labels=()))), len(opened.vocabulary)
    from scjax.datasets import pbmc
    from scjax.loader.anndata import cells as batches

    adata = pbmc()
    vocabulary = Vocabulary(list(adata.var["ensembl_id"]))
    # as a run with length groups has them: cells of about one length
    drawn = np.random.default_rng(seed).choice(adata.n_obs, min(32 * n, adata.n_obs), replace=False)
    drawn = drawn[np.argsort(adata.X[drawn].getnnz(1), kind="stable")]
    first = (len(drawn) - n) // 2
    chosen = adata[drawn[first : first + n]].copy()
    chosen.var_names = chosen.var["ensembl_id"].to_numpy()
    return next(batches(chosen, vocabulary, n, bucket_lengths=range(64, 16_385, 64))), len(vocabulary)


def ours(system: str, config: Any, batch: CellBatch, n_genes: int) -> tuple[Step, Any, float]:
    """scjax's step, its tokens as numpy arrays, and the useful operations of a step."""
    settings = dataclasses.asdict(config)
    model, mesh = models.build(system, settings, n_genes), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    tx, _ = make_optimizer(OptimizerConfig(1e-4, schedule="constant", weight_decay=0.01), 1000, model)
    abstract = abstract_state(model, tx, mesh)
    tables = {}
    if settings["gene_table"]["kind"] == "frozen":
        width = settings["d_model"]
        vectors = np.random.default_rng(0).standard_normal((n_genes, width)).astype(np.float32)
        tables = {"gene/table": vectors, "gene/known": np.ones(n_genes, np.float32)}
    state = init_state(model, tx, abstract, tables)
    step = make_train_step(model, tx, abstract, seed=0)
    placed = place(batch, mesh)
    encode = jax.jit(lambda p, b, batch: bind(model, p, b).encode(batch, jax.random.key(0)))
    tokens = jax.tree.map(np.asarray, encode(state["params"], state["buffers"], placed))

    def run() -> float:
        nonlocal state
        state, metrics = step(state, placed)
        jax.block_until_ready(state)
        total, weight = metrics["loss"]
        return float(total) / float(weight)

    module = bind(model, state["params"], state["buffers"])
    operations = float(work_of(model, module, (batch.gene_id >= 0).sum(1), batch.weight)[1])
    return run, tokens, operations


def padding_share(tokens: Any) -> float:
    """Share of the network's slots that hold no gene. scBERT reads every gene, and has none."""
    if hasattr(tokens, "expressed"):
        return 0.0
    valid = tokens.real if hasattr(tokens, "real") else tokens.gene_id >= 0
    return float(1 - valid.mean())


def race(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    system, n_genes, sizes = ROWS[row]
    n_cells, changes = sizes[args.size]
    n_cells = args.cells or n_cells
    if args.device == "gpu":
        changes = changes | {"dtype": "bfloat16"}
    batch, known = cells(args.corpus, n_cells, args.seed)
    n_genes = known if args.size == "smoke" else max(n_genes, known)
    config = from_config(models.resolve(system)[1], changes, where=row)
    ready: dict[str, Step] = {}
    ready["scjax"], tokens, useful = ours(system, config, batch, n_genes)
    theirs = [kind for kind in args.contestants if kind != "scjax"]
    for kind in theirs:
        if kind == "original" and row in NO_ORIGINAL:
            continue
        from reference.steps import contestant

        ready[kind] = contestant(
            kind, system, config, n_genes, tokens,
            device="cuda" if args.device == "gpu" else "cpu",
            bfloat16=args.device == "gpu",
            compiled=kind == "tuned" and args.compile,
        )  # fmt: skip
    losses = {}
    for kind, step in ready.items():
        for _ in range(args.warm_up):
            losses[kind] = step()
        if not np.isfinite(losses[kind]):
            raise FloatingPointError(f"{row}: the loss of {kind} is {losses[kind]}")
    seconds: dict[str, list[float]] = {kind: [] for kind in ready}
    core_seconds: dict[str, list[float]] = {kind: [] for kind in ready}
    for _ in range(args.rounds):
        for kind, step in ready.items():
            began, cpu = time.perf_counter(), time.process_time()
            step()
            seconds[kind].append(time.perf_counter() - began)
            core_seconds[kind].append(time.process_time() - cpu)
    middle = {kind: statistics.median(times) for kind, times in seconds.items()}
    line: dict[str, Any] = {
        "system": row,
        "layers": config.n_layers,
        "cells": n_cells,
        "tokens": int(np.shape(tokens.token if hasattr(tokens, "token") else tokens.gene_id)[1]),
        "genes": n_genes,
        "padding": round(padding_share(tokens), 3),
        "cells_per_s": {kind: round(n_cells / t, 3) for kind, t in middle.items()},
        "ratio": ratios(seconds),
        "ratio_core_s": ratios(core_seconds),
        "loss": {kind: round(loss, 4) for kind, loss in losses.items()},
    }
    if system == "scbert":
        line["tokens"] = n_genes + 1
    if system == "scfoundation":
        line["decoder_layers"], line["decoder_tokens"] = config.decoder_n_layers, n_genes + 2
    if args.device == "gpu":
        peak = device_of(jax.devices()[0].device_kind).peak_bf16
        if peak:
            line["mfu"] = {kind: round(useful / (t * peak), 3) for kind, t in middle.items()}
    return line


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """How many times as long as scjax each contestant takes: the median over the rounds."""
    ours = seconds["scjax"]
    return {
        kind: round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 2)
        for kind, theirs in seconds.items()
        if kind != "scjax"
    }


def table(lines: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    out = Table(title=f"one training step, {args.device}, size {args.size}, {args.rounds} rounds")
    kinds = [kind for kind in CONTESTANTS if kind in args.contestants]
    ratios = [kind for kind in kinds if kind != "scjax"]
    names = ["system", "layers", "cells x tokens", "padding", *(f"{kind} cells/s" for kind in kinds)]
    names += [f"scjax / {kind}" for kind in ratios]
    names += [f"MFU {kind}" for kind in kinds] if any("mfu" in line for line in lines) else []
    for name in names:
        out.add_column(name, justify="left" if name == "system" else "right")

    def both(line: dict[str, Any], name: str) -> str:
        return f"{line[name]} + {line[f'decoder_{name}']}" if f"decoder_{name}" in line else str(line[name])

    for line in lines:
        show = lambda values, kind: f"{values[kind]:.2f}" if kind in values else "-"  # noqa: E731
        values = [line["system"], both(line, "layers"), f"{line['cells']} x {both(line, 'tokens')}"]
        values += [f"{line['padding']:.0%}", *(show(line["cells_per_s"], kind) for kind in kinds)]
        values += [show(line["ratio"], kind) for kind in ratios]
        values += [show(line["mfu"], kind) for kind in kinds] if "mfu" in line else []
        out.add_row(*values)
    return out


def versions() -> str:
    """Of the packages that are raced."""
    found = []
    for name in ("jax", "torch", "transformers", "performer-pytorch", "scgpt"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def markdown(lines: list[dict[str, Any]], args: argparse.Namespace, command: str) -> str:
    """The page of a run: command, versions, table, what the contestants are."""
    out = table(lines, args)
    cells = [list(column.cells) for column in out.columns]
    rows = ["| " + " | ".join(map(str, row)) + " |" for row in zip(*cells, strict=True)]
    heads = "| " + " | ".join(str(column.header) for column in out.columns) + " |"
    threads = f"{args.threads} threads each" if args.device == "cpu" else jax.devices()[0].device_kind
    about = __doc__.split("\n\n", 2)[2].strip()
    return "\n".join(
        [
            "# One training step, beside PyTorch",
            "",
            f"    {command}",
            "",
            f"{platform.machine()}, {threads}; Python {platform.python_version()}, {versions()}; "
            f"{args.rounds} rounds. Absolute rates are of one machine: read ratios.",
            "",
            heads,
            "|" + "---|" * len(out.columns),
            *rows,
            "",
            *(f"{row}: no original, {why}." for row, why in NO_ORIGINAL.items()),
            "",
            about,
            "",
            *([FORMULA, ""] if args.device == "gpu" else []),
        ]
    )


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = functools.partial(str.split, sep=",")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--systems", type=names, default=list(ROWS), help=f"of {','.join(ROWS)}")
    parser.add_argument("--contestants", type=names, default=list(CONTESTANTS))
    parser.add_argument("--size", choices=["bench", "published", "smoke"], default="bench")
    parser.add_argument("--cells", type=int, help="of the batch; by default as the size has it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--warm-up", type=int, default=2, help="steps of each contestant before the first round"
    )
    parser.add_argument("--threads", type=int, default=2, help="of each contestant, on the CPU")
    parser.add_argument("--corpus", help="cells of this corpus; by default those of scjax.datasets.pbmc()")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cells")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile; by default on a GPU only"
    )
    parser.add_argument(
        "--markdown", type=pathlib.Path, help="write the table to this file, with what made it"
    )
    args = parser.parse_args(argv)
    for given, known in ((args.systems, ROWS), (args.contestants, CONTESTANTS)):
        if unknown := set(given) - set(known):
            parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if args.compile is None:
        args.compile = args.device == "gpu"
    return args


def pin(args: argparse.Namespace) -> None:
    """XLA takes as many threads as the process may use cores."""
    if args.device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = arguments(argv)
    jax.config.update("jax_platforms", "cuda" if args.device == "gpu" else "cpu")
    if set(args.contestants) - {"scjax"}:
        import torch

        torch.set_num_threads(args.threads)
        torch.set_float32_matmul_precision("highest")
    lines = []
    for row in args.systems:
        lines.append(race(row, args))
        print(json.dumps(lines[-1]), flush=True)
        if len(args.systems) > 1:
            jax.clear_caches()
    Console(width=150).print(table(lines, args))
    if args.device == "gpu":
        print(FORMULA)
    if args.markdown:
        command = " ".join(["python tools/bench_step.py", *(sys.argv[1:] if argv is None else argv)])
        args.markdown.write_text(markdown(lines, args, command))
    return lines


if __name__ == "__main__":
    pin(arguments(None))
    main()
