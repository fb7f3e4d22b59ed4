#!/usr/bin/env bash
# What `make quickstart` runs once the environment stands: every line can be run by hand.
# Stopped half-way, it goes on where it was; delete runs/ to start anew.
set -euo pipefail
python=${PYTHON:-python}
run=${RUN:-runs/quickstart}
data=${DATA:-runs/pbmc}
scjax() { "$python" -m scjax.cli.main "$@"; }
say() { printf '\n\033[1m[%s] %s\033[0m\n' "$1" "$2"; }

say 1/4 "Two studies of human blood cells, as raw counts, into one corpus"
mkdir -p "$data"
IFS=$'\n' studies=($("$python" -c 'import scjax.datasets as d; print(*d.pbmc_paths().values(), sep="\n")'))
[ -e "$data/corpus/HEAD" ] || scjax corpus build "${studies[@]}" --out "$data/corpus" --validation 0.05
[ -e "$data/genes.tsv" ] || scjax corpus genes "$data/corpus" --top 1500 --out "$data/genes.tsv"

say 2/4 "Pretraining: hide values, predict them (no label is used)"
"$python" experiments/pretrain.py --config=configs/quickstart.py --workdir="$run" \
    --config.data.corpus="$data/corpus" --config.data.genes="$data/genes.tsv"

say 3/4 "Embedding the cells and probing: fit on one study, score on the other"
"$python" -c "import scjax; scjax.datasets.pbmc().write_h5ad('$data/pbmc.h5ad')"
scjax eval "$data/pbmc.h5ad" --model "$run" --tasks annotation clustering integration \
    --label cell_type --batch study --group study --pretrain-overlap cell \
    --out "$run/eval" --force --allow --title "scjax quickstart"
cp "$run/eval/report.html" "$run/report.html"

say 4/4 "Done"
cat <<EOM
The report:        $run/report.html
The run:           $run (config.json, metrics.jsonl, checkpoints/)
First of all:      source $(dirname "$python")/activate
In Python:         model = scjax.load("$run"); scjax.embed(adata, model)
Look inside:       notebooks/probe_a_checkpoint.ipynb
Your own cells:    scjax corpus build *.h5ad --out corpus, then copy configs/quickstart.py
EOM
