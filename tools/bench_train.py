"""How fast does a run train, cells read from a corpus included, and how does its step compare with PyTorch's?

    python tools/bench_train.py                                  # two CPU threads: few layers, few cells
    python tools/bench_train.py --device gpu                     # published sizes, bfloat16, torch.compile
    python tools/bench_train.py --shapes scgpt-51m,geneformer-104m-2048 --steps 50

Two measurements of each shape, in one process:

  the run     what experiments/pretrain.py does: loader, batches placed ahead, the compiled and donated step.
              Cells/s, tokens/s (without padding), useful operations and MFU; memory by the compiler; and the
              share of the time in which the step waited for cells.
  the race    scjax's step and PyTorch's on one batch, in turn (A B A B ...): encoding, forward and backward
              pass, clipping and AdamW. A ratio is the median over the rounds of PyTorch's time over scjax's
              in the same round: above 1, scjax is faster. "tuned" is PyTorch written for speed
              (tools/reference/tuned.py), fused attention under a mask; "flash", on a GPU, the same with the
              kernel of FlashAttention, which takes no mask: it attends to padding, which favours it. PyTorch
              is given scjax's tokens ready made, which favours it too.

Cells are sums of real ones (scjax.datasets.pbmc), as many as it takes for cells of about as many genes as the
shape has; or, with --corpus, those of a corpus. Prints a JSON line a shape and a table. PyTorch needs the
extra "parity"; ``--contestants scjax`` does without.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from contextlib import closing
from typing import Any

import anndata as ad
import bench_step
import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import sparse

import scjax
from scjax import models
from scjax.config import from_config
from scjax.loader import Loader
from scjax.nn import bind
from scjax.nn.work import FORMULA
from scjax.parallel import MeshConfig, Prefetch, device_of, layout_for, place
from scjax.train import (
    OptimizerConfig,
    abstract_state,
    compile_ahead,
    count_parameters,
    init_state,
    make_optimizer,
    make_train_step,
)

CONTESTANTS = ("scjax", "tuned", "flash")
V1, V2 = {"d_model": 256, "n_heads": 4, "n_layers": 6, "d_ff": 512}, {"specials": True, "dropout": 0.1}
SIZES = {
    "10m": V1,
    "104m": V2 | {"d_model": 768, "n_heads": 12, "n_layers": 12, "d_ff": 3072},
    "316m": V2 | {"d_model": 1152, "n_heads": 18, "n_layers": 18, "d_ff": 4608},
}
ENDS = {"10m": 0, "104m": 2, "316m": 2}
# shape -> (system, genes of the vocabulary, genes of a cell, settings, {device: (cells, settings)})
SHAPES: dict[str, tuple[str, int, int, dict[str, Any], dict[str, tuple[int, dict[str, Any]]]]] = {
    "scgpt-51m": (
        "scgpt", 60_694, 1024, bench_step.MASKED | {"max_length": 1025},
        {"gpu": (128, {}), "cpu": (2, {"n_layers": 2})},
    ),
    **{
        f"geneformer-{size}-{genes}": (
            "geneformer", 25_424, genes, settings | {"max_length": genes + ENDS[size]},
            {
                "gpu": ({"10m": 128, "104m": 32, "316m": 16}[size] * 2048 // genes, {}),
                "cpu": (1, {"n_layers": 2 if size == "10m" else 1, "embed_layer": 0}),
            },
        )
        for size, settings in SIZES.items()
        for genes in (2048, 4096)
    },
    "scfoundation-119m": (
        "scfoundation", 19_264, 2048, {},
        {"gpu": (8, {}), "cpu": (1, {"n_layers": 1, "decoder_n_layers": 1})},
    ),
}  # fmt: skip
SMOKE = bench_step.SMALL | bench_step.DECODER | {"n_layers": 1, "decoder_d_ff": 64, "embed_layer": 0}


def pooled(genes: int, n_cells: int, seed: int) -> ad.AnnData:
    """Raw counts of ``n_cells`` sums of real cells of one type, which have about ``genes`` genes."""
    adata, rng = scjax.datasets.pbmc(), np.random.default_rng(seed)
    types = adata.obs["cell_type"].astype(str).to_numpy()
    common = [t for t in np.unique(types) if (types == t).sum() >= 200]

    def sums(n: int, many: int) -> sparse.csr_matrix:
        drawn = [rng.choice(np.flatnonzero(types == rng.choice(common)), many) for _ in range(n)]
        rows = sparse.csr_matrix(
            (np.ones(n * many, np.float32), np.concatenate(drawn), np.arange(0, n * many + 1, many)),
            (n, adata.n_obs),
        )
        return rows @ adata.X

    many = 1
    while many < 64 and np.median(sums(64, many).getnnz(1)) < 0.95 * genes:
        many += 1
    var = adata.var.set_index("ensembl_id")
    return ad.AnnData(sparse.csr_matrix(sums(n_cells, many)), var=var[[]])


class Ours:
    """scjax's run of a shape: model, state and steps compiled for the batches of its loader."""

    def __init__(self, shape: str, args: argparse.Namespace, folder: str):
        system, n_genes, genes, settings, sizes = SHAPES[shape]
        self.cells, changes = sizes[args.device]
        self.cells = args.cells or self.cells
        hardware = {"attention": "auto", "remat": "auto"}
        hardware |= {"dtype": "bfloat16"} if args.device == "gpu" else {}
        known = set(models.resolve(system)[1].__dataclass_fields__)
        given = settings | changes | {name: value for name, value in hardware.items() if name in known}
        if args.smoke:
            given |= {name: value for name, value in SMOKE.items() if name in known}
            genes, n_genes = 256, 12_881
        self.system, self.config = system, from_config(models.resolve(system)[1], given, where=shape)
        if args.corpus:
            corpus = scjax.Corpus.open(args.corpus)
        else:
            adata = pooled(genes, max(8 * self.cells, 64), args.seed)
            corpus = scjax.build_corpus([adata], f"{folder}/{shape}", names=["pbmc"], progress=False)
        self.n_genes = max(n_genes, len(corpus.vocabulary))
        whole = getattr(models.resolve(system)[0], "WHOLE_CELLS", False)
        # as long as what the network reads: cells with more genes are sampled down where the system may
        limit = None if whole or system == "geneformer" else genes
        self.loader = Loader(corpus, self.cells, max_genes=limit, n_buckets=1, labels=(), seed=args.seed)
        model = self.model = models.build(system, given, self.n_genes)
        layout = self.layout = layout_for(MeshConfig(1), count_parameters(model), devices=jax.devices()[:1])
        tx, _ = make_optimizer(OptimizerConfig(1e-4, schedule="constant", weight_decay=0.01), 1000, model)
        abstract = abstract_state(model, tx, layout.mesh)
        self.state = init_state(model, tx, abstract)
        step = make_train_step(model, tx, abstract, seed=0, layout=layout)
        self.step = compile_ahead(step, abstract, self.loader)

    def train(self, steps: int, warm_up: int) -> dict[str, float]:
        """Seconds of ``steps`` steps through the loader, and what they did; metrics are read at the end."""
        read: list[Any] = []
        with closing(Prefetch(iter(self.loader), self.layout.mesh)) as batches:
            for _ in range(warm_up):
                self.state, metrics = self.step(self.state, next(batches))
            jax.block_until_ready(self.state)
            waited, began = batches.waited, time.perf_counter()
            for _ in range(steps):
                self.state, metrics = self.step(self.state, next(batches))
                read.append(metrics)
            jax.block_until_ready(self.state)
            seconds, waited = time.perf_counter() - began, batches.waited - waited
        done = {
            name: sum(float(metrics[name][0]) for metrics in read)
            for name in ("cells", "tokens", "operations")
        }
        if not np.isfinite(float(read[-1]["loss"][0])):
            raise FloatingPointError(f"the loss is {read[-1]['loss']}")
        return done | {"seconds": seconds, "waited": waited}

    def one_batch(self) -> tuple[Any, Any]:
        """A placed batch, and its tokens as arrays of numpy."""
        with closing(iter(self.loader)) as batches:
            batch = place(next(batches), self.layout.mesh)
        encode = jax.jit(lambda p, b, batch: bind(self.model, p, b).encode(batch, jax.random.key(0)))
        return batch, jax.tree.map(np.asarray, encode(self.state["params"], self.state["buffers"], batch))


def measure(shape: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """One row of the table."""
    ours = Ours(shape, args, folder)
    run = ours.train(args.steps, args.warm_up)
    batch, tokens = ours.one_batch()
    device = device_of(jax.devices()[0].device_kind if args.device == "gpu" else "cpu")
    peak = device.peak(ours.config.dtype)
    slots = np.shape(tokens.token if hasattr(tokens, "token") else tokens.gene_id)[1]
    line: dict[str, Any] = {
        "shape": shape,
        "layers": ours.config.n_layers,
        "parameters": count_parameters(ours.model),
        "cells": ours.cells,
        "slots": int(slots),
        "padding": round(bench_step.padding_share(tokens), 3),
        "cells_per_s": round(run["cells"] / run["seconds"], 3),
        "tokens_per_s": round(run["tokens"] / run["seconds"]),
        "tflop_per_s": round(run["operations"] / run["seconds"] / 1e12, 4),
        "mfu": round(run["operations"] / run["seconds"] / peak, 4) if peak else None,
        "memory_gb": round(max(sizes["all"] for sizes in ours.step.bytes().values()) / 1e9, 3),
        "input_wait": round(run["waited"] / run["seconds"], 5),
        "compile_s": round(ours.step.seconds, 1),
    }
    if ours.system == "scfoundation":
        line["decoder_layers"] = ours.config.decoder_n_layers
    theirs = [kind for kind in args.contestants if kind != "scjax"]
    line["ratio"] = race(ours, batch, tokens, theirs, args) if theirs else {}
    return line


def race(
    ours: Ours, batch: Any, tokens: Any, theirs: list[str], args: argparse.Namespace
) -> dict[str, float]:
    """How many times as long as scjax's each other step takes on the same batch."""
    from reference.steps import contestant

    def step() -> float:
        ours.state, metrics = ours.step(ours.state, batch)
        jax.block_until_ready(ours.state)
        return float(metrics["loss"][0]) / float(metrics["loss"][1])

    ready = {"scjax": step}
    for kind in theirs:
        ready[kind] = contestant(
            kind, ours.system, ours.config, ours.n_genes, tokens,
            device="cuda" if args.device == "gpu" else "cpu",
            bfloat16=args.device == "gpu",
            compiled=args.compile,
        )  # fmt: skip
    for kind, one in ready.items():
        for _ in range(args.warm_up):
            loss = one()
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss of {kind} is {loss}")
    seconds: dict[str, list[float]] = {kind: [] for kind in ready}
    for _ in range(args.rounds):
        for kind, one in ready.items():
            began = time.perf_counter()
            one()
            seconds[kind].append(time.perf_counter() - began)
    return bench_step.ratios(seconds)


def table(lines: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """The rows, for people."""
    out = Table(title=f"training, {args.device}")
    kinds = [kind for kind in args.contestants if kind != "scjax"]
    names = ["shape", "layers", "cells x slots", "padding", "cells/s", "tokens/s", "useful TFLOP/s", "MFU"]
    names += ["memory, GB", "input wait", *(f"scjax / {kind}" for kind in kinds)]
    for name in names:
        out.add_column(name, justify="left" if name == "shape" else "right")
    for line in lines:
        layers = (
            f"{line['layers']} + {line['decoder_layers']}" if "decoder_layers" in line else line["layers"]
        )
        out.add_row(
            line["shape"],
            str(layers),
            f"{line['cells']} x {line['slots']}",
            f"{line['padding']:.0%}",
            f"{line['cells_per_s']:,.2f}",
            f"{line['tokens_per_s']:,}",
            f"{line['tflop_per_s']:,.3g}",
            "-" if line["mfu"] is None else f"{line['mfu']:.1%}",
            f"{line['memory_gb']:,.2f}",
            f"{line['input_wait']:.2%}",
            *(f"{line['ratio'][kind]:.2f}" if kind in line["ratio"] else "-" for kind in kinds),
        )
    return out


def markdown(lines: list[dict[str, Any]], args: argparse.Namespace, command: str) -> str:
    """The page of a run: command, versions, table, how it was measured."""
    cells = [list(column.cells) for column in table(lines, args).columns]
    rows = ["| " + " | ".join(map(str, row)) + " |" for row in zip(*cells, strict=True)]
    heads = "| " + " | ".join(str(column.header) for column in table(lines, args).columns) + " |"
    where = f"{args.threads} threads" if args.device == "cpu" else jax.devices()[0].device_kind
    about = f"{platform.machine()}, {where}; Python {platform.python_version()}, {bench_step.versions()}; "
    about += f"{args.steps} steps of each run, {args.rounds} rounds of each race. "
    if args.device == "cpu":
        about += "Widths, heads and vocabularies as published, fewer layers and cells. "
        about += "Absolute rates are of one machine: read ratios."
    return "\n".join(
        [
            *("# Training, cells read from a corpus included", "", f"    {command}", "", about, "", heads),
            "|" + "---|" * (heads.count("|") - 1),
            *(*rows, "", __doc__.split("\n\n", 2)[2].strip(), "", FORMULA, ""),
        ]
    )


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = functools.partial(str.split, sep=",")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--shapes", type=names, default=list(SHAPES), help=f"of {','.join(SHAPES)}")
    parser.add_argument("--contestants", type=names, help="by default all that the device has")
    parser.add_argument("--cells", type=int, help="of the batch; by default as the shape has it")
    parser.add_argument("--steps", type=int, help="of each run (default: 30 on a GPU, 5 on a CPU)")
    parser.add_argument("--rounds", type=int, help="of each race (default: 10 on a GPU, 3 on a CPU)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before what is timed")
    parser.add_argument("--threads", type=int, default=2, help="of each contestant, on the CPU")
    parser.add_argument("--corpus", help="cells of this corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny networks, to see that it works")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile; by default on a GPU only"
    )
    parser.add_argument("--markdown", type=pathlib.Path, help="write the table here, with what made it")
    args = parser.parse_args(argv)
    gpu = args.device == "gpu"
    args.contestants = args.contestants or [k for k in CONTESTANTS if gpu or k != "flash"]
    for given, known in ((args.shapes, SHAPES), (args.contestants, CONTESTANTS)):
        if unknown := set(given) - set(known):
            parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if "flash" in args.contestants and not gpu:
        parser.error("PyTorch's kernel of FlashAttention needs --device gpu")
    args.steps, args.rounds = args.steps or (30 if gpu else 5), args.rounds or (10 if gpu else 3)
    args.compile = gpu if args.compile is None else args.compile
    return args


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = arguments(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    jax.config.update("jax_platforms", "cuda" if args.device == "gpu" else "cpu")
    if set(args.contestants) - {"scjax"}:
        import torch

        torch.set_num_threads(args.threads)
        torch.set_float32_matmul_precision("highest")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            lines.append(measure(shape, args, folder))
            print(json.dumps(lines[-1]), flush=True)
            jax.clear_caches()
            gc.collect()
            with contextlib.suppress(NameError):
                torch.cuda.empty_cache()
    Console(width=170).print(table(lines, args))
    print(FORMULA)
    if args.markdown:
        command = " ".join(["python tools/bench_train.py", *(sys.argv[1:] if argv is None else argv)])
        args.markdown.write_text(markdown(lines, args, command))
    return lines


if __name__ == "__main__":
    bench_step.pin(arguments(None))
    main()
