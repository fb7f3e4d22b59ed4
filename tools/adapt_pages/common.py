"""What the pages of benchmarks/adapt share: the data, the model they begin with, the look of a page."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "runs" / "adapt" / "base"
BLOOD = ("pbmc3k_10xv1", "pbmc4k_10xv2", "pbmc_facs_10xv1", "kang_ifnb_2k_10x")


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """``--data``, ``--out`` and further options, all with defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "adapt")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    if not (args.data / "README.md").exists():
        raise SystemExit(f"the development data are not at {args.data}: name their folder with --data")
    return args


def read(data: Path, name: str) -> ad.AnnData:
    """A file of the development data: raw counts in X."""
    return ad.read_h5ad(data / f"{name}.h5ad")


def blood(data: Path) -> ad.AnnData:
    """The four studies of blood on their shared genes: unstimulated cells, with
    ``obs["cell_type_harmonised"]`` and ``obs["study"]``."""
    studies = {name: read(data, name) for name in BLOOD}
    kang = studies["kang_ifnb_2k_10x"]
    studies["kang_ifnb_2k_10x"] = kang[kang.obs["condition"].isin(["control", "ctrl"])].copy()
    return ad.concat(studies, label="study", join="inner", index_unique="-", merge="same")


def base(data: Path) -> Path:
    """The small pretrained run that pages begin with (``tools/adapt_pages/base.py`` makes it, once)."""
    if not (BASE / "done").exists():
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name("base.py")), "--data", str(data)], check=True
        )
    return BASE


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers are rounded to three places, the first column is to the left."""
    show = lambda x: f"{x:.3f}" if isinstance(x, float) else str(x)  # noqa: E731
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *[[show(x) for x in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(
    path: Path, title: str, verdict: str, command: str, sections: Mapping[str, str], values: Any = None
) -> None:
    """Writes a page, its first line the verdict, and ``values`` as JSON beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [f"**{verdict}**", f"# {title}", f"Made by `{command}`."]
    for heading, body in sections.items():
        text += [f"## {heading}" if heading else "", body]
    path.write_text("\n\n".join(part for part in text if part) + "\n", encoding="utf-8")
    if values is not None:
        path.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
