"""A Markdown table of macro-F1 by held-out group from the results of ``scjax eval``.

python tools/donor_table.py runs/kang/eval/results.jsonl
"""

import sys

import numpy as np

from scjax.eval import Results

SHOWN = ("X_scjax", "random_init", "pca", "hvg")


def main(path: str) -> None:
    scores = Results.read(path).to_frame()
    scores = scores[(scores["metric"] == "macro_f1") & (scores["head"] == "logistic")]
    own = scores[scores["versus"] == ""].set_index(["model_id", "group"])["value"]
    gain = scores[(scores["versus"] == "random_init") & (scores["model_id"] == "X_scjax")].set_index("group")
    print("| held-out group | pretrained | random twin | PCA | variable genes | pretrained - twin |")
    print("|---|---|---|---|---|---|")
    for group, row in gain.iterrows():
        values = " | ".join(f"{own[model, group]:.3f}" for model in SHOWN)
        print(f"| {group} | {values} | {row.value:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}] |")
    each = gain.drop(index="mean of groups", errors="ignore")["value"].to_numpy()
    draws = np.random.default_rng(0).integers(0, len(each), (10_000, len(each)))
    low, high = np.quantile(each[draws].mean(1), [0.025, 0.975])
    mean = f"{each.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    print(f"\nResampling the {len(each)} groups instead of their cells, pretrained - twin: {mean}")


if __name__ == "__main__":
    main(sys.argv[1])
