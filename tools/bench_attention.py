"""Which backend of softmax attention is fastest here, and what memory does each take?

    python tools/bench_attention.py --markdown benchmarks/attention_cpu.md
    python tools/bench_attention.py --device gpu --markdown benchmarks/attention_gpu.md

Output and gradients of q, k and v, in one process, the backends in turn (A B C A B C ...), each checked
against einsum first. Of each cell a third of the positions is padding. On a CPU in float32, on a GPU in
bfloat16.

  einsum     all cells and heads at once
  cells      "cellwise" with one loop, over cells
  heads      "cellwise" with a loop over heads inside
  chunked    some keys at a time
  cudnn      on a GPU: cuDNN's fused kernels
  torch      PyTorch's fused attention, where it is installed

Time is relative to einsum: the median over the rounds of seconds over einsum's seconds in the same round,
below 1 faster. On a CPU these are seconds of cores, which other work on the machine disturbs less. Memory is
XLA's: temporaries of the compiled program, in arrays of all scores (4 B H S S bytes). Prints a JSON line a
shape and a table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scjax.nn import attention as module
from scjax.nn.attention import attention

# cells, length, heads, width of a head
SHAPES = {
    "cpu": [(16, 160, 4, 32), (64, 193, 4, 32), (8, 512, 8, 64), (4, 1024, 8, 64), (4, 2048, 4, 64)],
    "gpu": [(64, 1024, 8, 64), (32, 2048, 12, 64), (16, 4096, 12, 64), (4, 16384, 12, 64)],
    "smoke": [(2, 16, 2, 8)],
}
BACKENDS = {"cpu": ("einsum", "cells", "heads", "chunked"), "gpu": ("einsum", "chunked", "cudnn")}
LOOPS = {"cells": 2**62, "heads": 0}  # scores that "cellwise" computes at once
Run = Callable[[], Any]


def ours(backend: str, q: Any, k: Any, v: Any, mask: Any, gradient: Any) -> tuple[Run, float]:
    """A compiled forward and backward pass, and the bytes of its temporaries."""

    def value(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        name = "cellwise" if backend in LOOPS else backend
        out = attention(q, k, v, mask, backend=name)
        return (out.astype(jnp.float32) * gradient).sum(), out

    usual = module.CACHED
    module.CACHED = LOOPS.get(backend, usual)
    try:
        compiled = jax.jit(jax.grad(value, (0, 1, 2), has_aux=True)).lower(q, k, v).compile()
    finally:
        module.CACHED = usual
    return lambda: jax.block_until_ready(compiled(q, k, v)), compiled.memory_analysis().temp_size_in_bytes


def pytorch(q: Any, k: Any, v: Any, mask: Any, gradient: Any, device: str) -> Run:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait do not use up the others' time
    import torch

    torch.set_num_threads(2)
    dtype = torch.bfloat16 if device == "gpu" else torch.float32
    to = {"device": "cuda" if device == "gpu" else "cpu", "dtype": dtype}
    heads = [torch.tensor(np.asarray(x, np.float32)).transpose(1, 2) for x in (q, k, v, gradient)]
    *qkv, grad = (x.contiguous().to(**to) for x in heads)
    qkv = [x.requires_grad_() for x in qkv]
    keys = torch.tensor(np.asarray(mask), device=to["device"])[:, None, None]

    def run() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=keys)
        grads = torch.autograd.grad(out, qkv, grad)
        if device == "gpu":
            torch.cuda.synchronize()
        return [np.asarray(x.detach().float().transpose(1, 2).cpu()) for x in grads], out

    return run


def race(shape: tuple[int, ...], args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    n_cells, length, n_heads, _ = shape
    rng = np.random.default_rng(0)
    dtype = jnp.bfloat16 if args.device == "gpu" else jnp.float32
    q, k, v, gradient = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4))
    mask = jnp.asarray(np.arange(length) < rng.integers(length // 3, length + 1, (n_cells, 1)))
    runs, scores = {}, {}
    for backend in BACKENDS[args.device]:
        runs[backend], size = ours(backend, q, k, v, mask, gradient)
        scores[backend] = round(size / (4 * n_cells * n_heads * length**2), 2)
    with contextlib.suppress(ImportError):
        runs["torch"] = pytorch(q, k, v, mask, gradient, args.device)
    due = None
    for backend, run in runs.items():
        found = [np.asarray(x, np.float32) for x in run()[0]]
        due = found if due is None else due
        for a, b in zip(found, due, strict=True):
            if np.abs(a - b).max() > (1e-3 if args.device == "cpu" else 0.05) * np.abs(b).max():
                raise ValueError(f"{backend} at {shape} does not compute what einsum computes")
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    began = clock()
    runs["einsum"]()
    calls = math.ceil(0.1 / (clock() - began))  # so that a reading is long against the clock's steps
    seconds: dict[str, list[float]] = {backend: [] for backend in runs}
    for _ in range(args.rounds):
        for backend, run in runs.items():
            began = clock()
            for _ in range(calls):
                run()
            seconds[backend].append((clock() - began) / calls)
    ratio = {
        backend: round(statistics.median(a / b for a, b in zip(taken, seconds["einsum"], strict=True)), 2)
        for backend, taken in seconds.items()
    }
    return {"shape": shape, "einsum_s": statistics.median(seconds["einsum"]), "time": ratio, "memory": scores}


def markdown(lines: list[dict[str, Any]], args: argparse.Namespace, command: str) -> str:
    """The page of a run: command, versions, table, what the contestants are."""
    names = list(lines[0]["time"])
    heads = [
        "B x S x H x D",
        "einsum s",
        *names[1:],
        *(f"memory {name}" for name in names if name != "torch"),
    ]
    rows = []
    for line in lines:
        cells = [" x ".join(map(str, line["shape"])), f"{line['einsum_s']:.3f}"]
        cells += [f"{line['time'][name]:.2f}" for name in names[1:]]
        rows.append(cells + [f"{x:.2f}" for x in line["memory"].values()])
    versions = [f"jax {jax.__version__}"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions.append(f"torch {importlib.metadata.version('torch')}")
    where = f"{platform.machine()} CPU" if args.device == "cpu" else jax.devices()[0].device_kind
    return "\n".join(
        [
            "# Backends of softmax attention, beside each other",
            "",
            f"    {command}",
            "",
            f"{where}; Python {platform.python_version()}, {', '.join(versions)}; {args.rounds} rounds.",
            "",
            *("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)),
            "",
            (__doc__ or "").split("\n\n", 2)[2].strip(),
            "",
        ]
    )


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=list(BACKENDS), default="cpu")
    parser.add_argument("--size", choices=["bench", "smoke"], default="bench")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--markdown", type=pathlib.Path, help="write the table to this file")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cuda" if args.device == "gpu" else "cpu")
    lines = []
    for shape in SHAPES["smoke" if args.size == "smoke" else args.device]:
        lines.append(race(shape, args))
        print(json.dumps(lines[-1]), flush=True)
    page = markdown(lines, args, " ".join(["python tools/bench_attention.py", *(argv or sys.argv[1:])]))
    print(page)
    if args.markdown:
        args.markdown.write_text(page)
    return lines


if __name__ == "__main__":
    main()
