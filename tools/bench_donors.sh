#!/usr/bin/env bash
# Does pretraining help on donors? Pretrains configs/quickstart.py on one file and probes across its donors.
#   bash tools/bench_donors.sh kang_ctrl_8donors_10x.h5ad runs/kang
set -euo pipefail
python=${PYTHON:-python}
input=$1 run=$2
scjax() { "$python" -m scjax.cli.main "$@"; }
[ -e "$run-corpus/HEAD" ] || scjax corpus build "$input" --out "$run-corpus" --validation 0.05
"$python" experiments/pretrain.py --config=configs/quickstart.py --workdir="$run" \
    --config.data.corpus="$run-corpus" --config.data.genes=
scjax eval "$input" --model "$run" --tasks annotation --label cell_type --group donor --pretrain-overlap cell \
    --out "$run/eval" --force --allow --title "Across donors: $(basename "$input" .h5ad)"
"$python" tools/donor_table.py "$run/eval/results.jsonl"
