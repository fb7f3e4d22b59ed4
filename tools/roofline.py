"""What tools/bench_train.py should measure on a GPU that is not here: a prediction, term by term.

    python tools/roofline.py --markdown benchmarks/roofline.md

Seconds of a step on one device are the sum of four terms, none of which hides behind another:

  products    6 operations for each weight and slot, at 80 % of the device's peak in bfloat16, which large
              products reach; those of FAVOR+ among them
  attention   12 x width for each query and key, padding included, at 40 % of the peak, which fused kernels
              for heads of 64 reach, forward and backward together
  memory      what lies between products, at 80 % of the bandwidth: 36 width + 12 d_ff bytes for each slot
              and layer (residual, normalisation, dropout and activation in bfloat16, read and written once
              forward and twice backward); 64 heads x features bytes for FAVOR+ (float32, eight passes over
              its features); 16 bytes a logit of a head over the vocabulary
  optimiser   32 bytes a parameter (value, gradient and two moments in float32, read and written)

Useful operations are those of scjax.nn.work, of cells whose slots are filled to 90 %. No term for reading
cells: they are placed ahead.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import numpy as np
from bench_train import SHAPES

from scjax import models
from scjax.config import from_config
from scjax.nn.performer import n_features
from scjax.nn.work import late_work
from scjax.parallel import MeshConfig, choose, device_of
from scjax.train import count_parameters

PRODUCTS, ATTENTION, BANDWIDTH, FILLED = 0.8, 0.4, 0.8, 0.9
TERMS = ("products", "attention", "memory", "optimiser")
HEADS = ("shape", "cells x genes", "remat", *TERMS, "cells/s", "MFU", "target")
TARGETS = {"scgpt-51m": "≥ 3,000 cells/s"} | {
    f"geneformer-{size}-{genes}": f"MFU ≥ {share} %"
    for size, share in (("104m", 45), ("316m", 50))
    for genes in (2048, 4096)
}
READING = (
    "Where a target is above the prediction, it is attention that must be faster than assumed: scGPT's 3,000 "
    "cells/s of 1,024 genes are 60 % of the peak if no slot is padding, half of it attention; at 4,096 genes "
    "attention is more than half of the time of Geneformer."
)


def predict(shape: str, kind: str) -> dict[str, Any]:
    """Seconds of each term, cells/s and MFU of a shape on one device of a kind."""
    system, n_genes, genes, settings, sizes = SHAPES[shape]
    cells, device = sizes["gpu"][0], device_of(kind)
    model = models.build(system, settings, n_genes)
    c = from_config(models.resolve(system)[1], settings, where=shape)
    slots, n = cells * genes, count_parameters(model)
    plan = choose(1, n, device, MeshConfig(1))
    read = genes * ((1 - c.mask_fraction) if system == "scfoundation" else 1)  # by the softmax layers
    softmax = c.n_layers * cells * 12.0 * c.d_model * read * read
    traffic = c.n_layers * cells * read * (36 * c.d_model + 12 * c.d_ff)
    operations = late_work(model, np.full(cells, genes))[1] - softmax
    if system == "scfoundation":
        every = cells * (n_genes + 2) * c.decoder_n_layers
        traffic += every * (36 * c.decoder_d_model + 12 * c.decoder_d_ff)
        traffic += every * 64 * c.decoder_n_heads * n_features(c.decoder_d_head)
    if system == "geneformer":
        traffic += slots * c.mask_fraction * 16 * n_genes
    again = 1 / 3 if plan.remat == "full" else 0.0
    peak, bandwidth = device.peak_bf16 or np.nan, BANDWIDTH * (device.bandwidth or np.nan)
    terms = {
        "products": operations * (1 + again) / peak / PRODUCTS,
        "attention": softmax * (1 + again) / peak / ATTENTION,
        "memory": traffic * (1 + again) / bandwidth,
        "optimiser": 32 * n / bandwidth,
    }
    seconds = sum(terms.values())
    useful = late_work(model, np.full(cells, round(FILLED * genes)))[1]
    rates = {"cells_per_s": cells / seconds, "mfu": useful / seconds / peak}
    return {
        "shape": shape,
        "device": kind,
        "cells": cells,
        "genes": genes,
        "remat": plan.remat,
        **terms,
        **rates,
    }


def page(command: str, kinds: list[str]) -> str:
    """The page: one table a device."""
    lines = ["# What a GPU should do", "", f"    {command}", "", "Predicted, not measured.", ""]
    for kind in kinds:
        device = device_of(kind)
        lines += [
            f"## One {kind}",
            "",
            f"{(device.peak_bf16 or 0) / 1e12:,.0f} TFLOP/s in bfloat16, "
            f"{(device.bandwidth or 0) / 1e12:.2f} TB/s. Times in milliseconds.",
            "",
            f"| {' | '.join(HEADS)} |",
            "|---" * len(HEADS) + "|",
        ]
        for shape in SHAPES:
            found = predict(shape, kind)
            terms = " | ".join(f"{1e3 * found[name]:.1f}" for name in TERMS)
            target = TARGETS.get(shape, "") if kind == "H200" else ""
            lines.append(
                f"| {shape} | {found['cells']} x {found['genes']} | {found['remat']} | {terms} | "
                f"{found['cells_per_s']:,.0f} | {found['mfu']:.0%} | {target} |"
            )
        lines.append("")
    lines += [READING, ""]
    return "\n".join([*lines, __doc__.split("\n\n", 2)[2].strip(), ""])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=lambda text: text.split(","), default=["H200", "H100"])
    parser.add_argument("--markdown", type=pathlib.Path, help="write the page here")
    args = parser.parse_args(argv)
    command = " ".join(["python tools/roofline.py", *(sys.argv[1:] if argv is None else argv)])
    text = page(command, args.devices)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
