"""The full published sizes against their PyTorch originals, as the page ``benchmarks/parity.md``.

make test-parity                                              # the small shapes first, and the packages
python tools/parity_full.py > benchmarks/parity.md            # some minutes a system, up to 8 GB
python tools/parity_full.py scbert celllm                     # some of them

Each original is built at its published size from packages (transformers, scGPT's wheel, torch,
performer-pytorch), every parameter jittered, written to the file format of its release, imported with
``scjax.import_pretrained``'s own rules and compared on cells of unequal length, so that padding is there.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

SYSTEMS = ("scgpt", "geneformer", "scfoundation", "scbert", "celllm")
PACKAGES = ("jax", "flax", "torch", "transformers", "performer-pytorch", "scgpt")

PAGE = """\
# Parity at full size

    {command}

Each original at its published size, randomly initialised with every parameter jittered, is written to the
file format of its release, imported by scjax's rules and run on cells of unequal length in float32 on a CPU.
The released weights themselves are not in reach of this measurement: what is compared is the network, the
tokens where the original's are defined, and the way from file to model. Small shapes, gradients and optimiser
steps: `make test-parity`; golden arrays of them are held by `make test`, without PyTorch.

{versions}.

| system | parameters | published | compared | largest difference | tolerance |
|---|---:|---:|---|---:|---:|
{rows}
"""


def measure(system: str) -> dict[str, Any]:
    return importlib.import_module(f"reference.{system}").full()


def lines(report: dict[str, Any], published: int | dict[str, int]) -> list[str]:
    """A row per quantity; of a system of several sizes, each quantity is named after one of them."""
    system, tolerance = report["system"], report["tolerance"]
    sizes = published if isinstance(published, dict) else {"": published}
    counts = report["parameters"] if isinstance(published, dict) else {"": report["parameters"]}
    out = []
    for size, expected in sizes.items():
        assert counts[size] == expected, (system, size, counts)
        first = f"{system} {size}".strip(), f"{counts[size]:,}", f"{expected:,}"
        for name, difference in report["max_abs"].items():
            if name.startswith(size):
                assert difference <= tolerance, (system, name, difference)
                what = name.removeprefix(size).strip()
                out.append(f"| {' | '.join(first)} | {what} | {difference:.1e} | {tolerance:.0e} |")
                first = "", "", ""
    return out


def main(systems: list[str]) -> None:
    rows = []
    for system in systems or SYSTEMS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # its memory ends with it
            report = pool.apply(measure, (system,))
        print(json.dumps(report), file=sys.stderr, flush=True)
        rows += lines(report, importlib.import_module(f"reference.{system}").PUBLISHED)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    command = " ".join(["python tools/parity_full.py", *systems, "> benchmarks/parity.md"])
    print(
        PAGE.format(
            command=command, versions=f"Python {sys.version.split()[0]}, {versions}", rows="\n".join(rows)
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
