"""The five systems side by side: same cells, same genes, a minute or two of training each, the same probe.

make quickstart                                          # makes the corpus, the gene list and the cells
python tools/bench_systems.py --runs runs/systems        # trains what is not there, then scores all at once

Each system trains its ``:smoke`` config (sizes differ: they are those of the config files, not equalised),
then its embedding and that of its random twin are probed across the two studies. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import anndata as ad

import scjax
import scjax.eval

ROOT = Path(__file__).parent.parent
SYSTEMS = ("scgpt", "geneformer", "scfoundation", "scbert", "celllm")
PAIRS = {"masked_mse": "gene_mean_mse", "masked_ce": "frequency_ce"}
CONTROLS = {"pca": "PCA", "hvg": "variable genes", "depth": "sequencing depth", "majority": "majority label"}


def train(system: str, run: Path, data: Path) -> None:
    command = [
        sys.executable,
        ROOT / "experiments" / "pretrain.py",
        f"--config={ROOT}/configs/{system}.py:smoke",
    ]
    options = [
        f"--workdir={run}",
        f"--config.data.corpus={data}/corpus",
        f"--config.data.genes={data}/genes.tsv",
    ]
    subprocess.run([*map(str, command), *options], check=True, stdout=sys.stderr)


def errors(model: scjax.api.Model) -> tuple[str, float, float]:
    """(metric, error, that of the no-information baseline) on the validation cells at the end."""
    last = [line for line in model.metrics() if any(name.startswith("validation/") for name in line)][-1]
    for metric, baseline in PAIRS.items():
        if f"validation/{baseline}" in last:
            return metric, last[f"validation/{metric}"], last[f"validation/{baseline}"]
    raise ValueError(f"{model.path}: no validation error in metrics.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/systems"))
    parser.add_argument("--data", type=Path, default=Path("runs/pbmc"))
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    args = parser.parse_args()

    cells = ad.read_h5ad(args.data / "pbmc.h5ad")
    rows, twins = {}, {}
    for system in args.systems:
        train(system, args.runs / system, args.data)
        model = scjax.load(args.runs / system)
        scjax.embed(cells, model, key_added=f"X_{system}", progress=True)
        scjax.embed(cells, model.random_twin(), key_added=f"X_{system}_twin", progress=True)
        twins[f"X_{system}"] = f"X_{system}_twin"
        rows[f"X_{system}"] = (f"`{system}`", f"{model.n_parameters:,}", *errors(model))
    results = scjax.eval.run(
        cells,
        embeddings=list(rows),
        tasks=["annotation"],
        label_key="cell_type",
        group_key="study",
        controls={"random_init": twins},
        pretrain_overlap="cell",
        progress=True,
    )
    results.to_jsonl(args.runs / "results.jsonl")
    results.report(args.runs / "report.html", title="The five systems, a minute of training each")
    scores = results.to_frame()
    scores = scores[(scores["metric"] == "macro_f1") & (scores["head"] == "logistic")]
    own = scores[scores["versus"] == ""].groupby("model_id")["value"].mean()
    gains = scores[scores["versus_role"] == "random-initialised twin"]
    print(
        "| system | parameters | masked error | no information | probe | random twin | gain, each direction |"
    )
    print("|---|---:|---:|---:|---:|---:|---|")
    for key, (name, size, metric, error, baseline) in rows.items():
        each = gains[(gains["model_id"] == key) & (gains["group"] != "mean of groups")]
        gain = "; ".join(f"{g.value:+.3f} [{g.ci_low:+.3f}, {g.ci_high:+.3f}]" for g in each.itertuples())
        twin = own[key] - each["value"].mean()
        learned = f"{metric} {error:.4f} | {baseline:.4f} | {own[key]:.3f} | {twin:.3f}"
        print(f"| {name} | {size} | {learned} | {gain} |")
    for key, name in CONTROLS.items():
        if key in own:
            print(f"| {name} | | | | {own[key]:.3f} | | |")


if __name__ == "__main__":
    main()
