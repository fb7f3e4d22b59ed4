"""Does the best learning rate of a narrow model hold for a wide one? With and without the scaling of widths.

make quickstart            # makes the corpus and the list of genes
python tools/mup.py        # some minutes on two CPU cores; writes benchmarks/mup.md and mup.svg

Trains a small Geneformer, whose output layer is its embedding, at each width and rate for some steps from the
same seed on the same batches, and notes its mean loss over the last quarter of them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scjax.corpus import Corpus
from scjax.genes import Vocabulary
from scjax.loader import Loader
from scjax.models import build
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import (
    OptimizerConfig,
    abstract_state,
    grown,
    init_state,
    make_optimizer,
    make_train_step,
)

RATES = [5e-4 * 2**i for i in range(7)]
WIDTHS = (16, 32, 64, 128)
HEAD = 8  # width of a head: their number grows


def width(d_model: int) -> dict[str, int]:
    return {"d_model": d_model, "n_heads": d_model // HEAD, "d_ff": 2 * d_model}


def adjustable() -> optax.GradientTransformation:
    """Multiplies updates by a number in its state, so that one compiled step serves every learning rate."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u: u * state["rate"], updates), state

    return optax.GradientTransformation(lambda params: {"rate": jnp.ones(())}, update)


def sweep(d_model: int, scaled: bool, batches: list[Any], n_genes: int) -> list[float]:
    """The loss at the end for each of ``RATES``."""
    config = {"n_layers": 2, "max_length": 64, "dropout": 0.0} | width(d_model)
    model, base = build("geneformer", config, n_genes), None
    if scaled:
        base = build("geneformer", config | width(WIDTHS[0]), n_genes)
        model = grown(model, base)
    options = OptimizerConfig(
        1.0, warmup_steps=10, schedule="constant", b2=0.99, width_base=width(WIDTHS[0]) if scaled else None
    )
    tx = optax.chain(make_optimizer(options, len(batches), model, base)[0], adjustable())
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = abstract_state(model, tx, mesh)
    step = make_train_step(model, tx, abstract, seed=0)
    start, ends = jax.device_get(init_state(model, tx, abstract)), []
    for rate in RATES:
        state = jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, abstract))
        state["opt"]["1"]["rate"] = jnp.asarray(rate, jnp.float32)
        losses = []
        for batch in batches:
            state, metrics = step(state, place(batch, mesh))
            losses.append(metrics["loss"])
        last = np.asarray([float(total / weight) for total, weight in losses[-len(losses) // 4 :]])
        ends.append(float(last.mean()))
        print(
            f"{'scaled' if scaled else 'plain '} {d_model:4d} {rate:.1e} {ends[-1]:.4f}",
            file=sys.stderr,
            flush=True,
        )
    return ends


def best(losses: list[float]) -> int:
    return int(np.nanargmin([loss if math.isfinite(loss) else np.nan for loss in losses]))


def picture(found: dict[bool, dict[int, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "scjax"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, len(WIDTHS)))
    for axis, scaled, title in zip(axes, (False, True), ("as usual", "scaled by width (muP)"), strict=True):
        for (d_model, losses), colour in zip(found[scaled].items(), colours, strict=True):
            axis.plot(RATES, losses, "o-", color=colour, label=f"width {d_model}", markersize=4)
            i = best(losses)
            axis.plot(RATES[i], losses[i], "o", color=colour, markersize=10, fillstyle="none")
        axis.set(xscale="log", title=title, xlabel="learning rate (of the base, width 16)")
    axes[0].set_xlabel("learning rate")
    axes[0].set_ylabel("cross-entropy of hidden genes")
    lowest = min(min(losses) for sweeps in found.values() for losses in sweeps.values())
    axes[0].set_ylim(lowest - 0.05, lowest + 1.2)
    axes[1].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def table(found: dict[int, list[float]]) -> str:
    rows = [
        "| width | " + " | ".join(f"{rate:.1e}" for rate in RATES) + " |",
        "|---" * (len(RATES) + 1) + "|",
    ]
    for d_model, losses in found.items():
        cells = [f"**{x:.3f}**" if i == best(losses) else f"{x:.3f}" for i, x in enumerate(losses)]
        rows.append(f"| {d_model} | {' | '.join(cells)} |")
    return "\n".join(rows)


def cost(found: dict[int, list[float]]) -> str:
    """What the base's best rate costs the widest model."""
    wide, rate = found[WIDTHS[-1]], best(found[WIDTHS[0]])
    return (
        f"Best rate of width {WIDTHS[0]}: {RATES[rate]:.1e}; of width {WIDTHS[-1]}: {RATES[best(wide)]:.1e}. "
        f"With the former, width {WIDTHS[-1]} ends at {wide[rate]:.3f}, {wide[rate] - min(wide):+.3f} "
        "against its own best."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/pbmc"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/mup.md"))
    args = parser.parse_args()

    vocabulary = Vocabulary.from_tsv(args.data / "genes.tsv")
    loader = Loader(Corpus.open(args.data / "corpus"), args.batch_size, vocabulary=vocabulary, n_buckets=1)
    with closing(iter(loader)) as cells:
        batches = [jax.tree.map(np.array, batch) for batch in itertools.islice(cells, args.steps)]
    base, *wider = WIDTHS
    as_base = sweep(base, False, batches, len(vocabulary))  # which scaling leaves as it is
    found = {scaled: {base: as_base} for scaled in (False, True)}
    for scaled, d_model in itertools.product((False, True), wider):
        found[scaled][d_model] = sweep(d_model, scaled, batches, len(vocabulary))
    image = args.out.with_suffix(".svg")
    picture(found, image)
    args.out.write_text(
        PAGE.format(
            device=f"{platform.machine()}, JAX {jax.__version__} on {jax.devices()[0].device_kind}",
            steps=args.steps,
            batch=args.batch_size,
            genes=len(vocabulary),
            image=image.name,
            plain=table(found[False]),
            scaled=table(found[True]),
            plain_best=f"{min(found[False][WIDTHS[-1]]):.3f}",
            scaled_best=f"{min(found[True][WIDTHS[-1]]):.3f}",
            plain_cost=cost(found[False]),
            scaled_cost=cost(found[True]),
        )
    )


PAGE = """# One learning rate for all widths

    make quickstart
    python tools/mup.py

Mean cross-entropy of hidden genes over the last quarter of {steps} steps of {batch} cells, {genes:,} genes, a
Geneformer of two layers and 64 tokens a cell, AdamW, 10 steps of warm-up, then a constant rate; one seed, the
same batches for all ({device}). Bold: the best rate of a width.

![Loss by learning rate and width]({image})

As usual, `optimizer.width_base` not set:

{plain}

{plain_cost}

With `optimizer.width_base = {{"d_model": 16, "n_heads": 2, "d_ff": 32}}`:

{scaled}

{scaled_cost}

How to read it: what matters is whether the columns of the best rates line up, so that a rate found at width
16 can be taken to width 128. Runs are short, one seed each, rates a factor of two apart: neighbouring columns
whose losses differ by less than about 0.02 are not told apart. Depth, batch size and length of the run are
not scaled by this; for others of these a rate has to be found again. Nor does it make a wide model learn
faster than one tuned at its own width: the best of width 128 is {plain_best} as usual, {scaled_best} scaled.
"""


if __name__ == "__main__":
    main()
