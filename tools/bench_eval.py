"""Evaluation of a model on every labelled set of the development data, a page each (benchmarks/eval).

python tools/bench_eval.py --data ../shared/data --model runs/quickstart --out benchmarks/eval

Each page is written as NAME.md with its pictures, and NAME.jsonl.gz holds every value; --html DIR writes
the same pages as HTML. --only cells/kang… runs the pages whose "kind/name" begins so. README.md in --out
lists all pages that lie there, with the leading score of each table.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

import pandas as pd

from scjax.eval import Results, tables, verdict
from scjax.eval.schema import MEAN

KINDS = ("perturbation", "genes", "network", "modalities", "spatial", "training", "cells")
COMMAND = "python tools/bench_eval.py --data ../shared/data --model runs/quickstart --out benchmarks/eval"
HEAD = f"""# Evaluation on real data

Every labelled set of the development data, scored by `scjax.eval`; made by

    {COMMAND}

The model is that of `make quickstart`: small, trained for minutes on 6,574 blood cells of two studies. It
is here so that every page has a model and its untrained twin to judge, not to win. Differences are paired,
with 95 % intervals; **ahead** or *behind* where the interval leaves out zero. Each page holds all baselines,
controls, ceilings and intervals.

| page | table | score | model | model - best simple baseline | | model - untrained twin | |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--html", type=Path)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        for name, title, make in importlib.import_module(f"eval_pages.{kind}").pages(args.data, args.model):
            if not f"{kind}/{name}".startswith(args.only):
                continue
            begun = time.perf_counter()
            results = make()
            for row in results.rows:
                row["pretrain_overlap"] = results.facts.get("pretrain_overlap", "unknown")
            results.to_jsonl(args.out / f"{name}.jsonl.gz")
            results.report(args.out / f"{name}.md", title=title)
            if args.html:
                results.report(args.html / f"{name}.html", title=title)
            print(f"{kind}/{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    index(args.out)


def index(out: Path) -> None:
    """README.md: the leading score of every table of every page in ``out``."""
    lines = []
    for path in sorted(out.glob("*.jsonl.gz")):
        frame = Results.read(path).to_frame()
        for score in verdict.leading(frame):
            rows = score.pick(frame)
            rows = rows[rows["group"].isin(["", MEAN]) | ~rows["group"].eq(MEAN).any()]
            for model in dict.fromkeys(rows.loc[rows["model_kind"] == "model", "model_id"]):
                page = path.name.removesuffix(".jsonl.gz")
                lines.append(_line(page, score.title, rows[rows["model_id"] == model]))
    (out / "README.md").write_text(HEAD + "".join(lines))


def _line(page: str, table: str, rows: pd.DataFrame) -> str:
    rows = rows[rows["group"] == rows["group"].iloc[0]]
    found = {r["versus_role"]: r for r in rows.to_dict("records")}
    own = found[""]
    cells = [f"[{page}]({page}.md)", table, tables.describe(own), f"{own['model_id']} {tables.number(own)}"]
    for role in (verdict.BEST, verdict.TWIN):
        other = found.get(role)
        if other is None:
            cells += ["", ""]
            continue
        mark = {"ahead": "**ahead**", "behind": "*behind*", "unclear": "unclear"}[verdict.state(other)]
        against = f"{other['versus']}: " if role == verdict.BEST else ""
        cells += [against + tables.number(other, signed=True), mark]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
