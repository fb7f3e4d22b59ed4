"""Pretraining with metadata tokens: assay, tissue, organism, disease, sex, stage and study of a cell.

    python experiments/pretrain.py --config=configs/context.py --config.data.corpus=CORPUS --workdir=runs/told
    python experiments/pretrain.py --config=configs/context.py:smoke --workdir=runs/context-smoke

The published scGPT (``configs/scgpt.py``) with seven tokens more behind its sequence, named like columns that
the corpus was built with (``--labels assay tissue ...``, CELLxGENE's names). ``size`` is the room for
categories; too little is told before the first step. In training each is absent from 15 % of the cells, the
study from half of them, so that ``scjax.embed`` needs none of them and takes those that are in ``obs``.

Any system takes such tokens, and other kinds: ``--config.model.context.place.kind=coordinates`` and so on,
see ``scjax.nn.context.ContextToken``. What they change: benchmarks/adapt/context.md.

``:smoke`` is about a minute on two CPU cores: a smaller quickstart model on the cells that ship with the
package, told the study. On its validation cells masked_mse ends below the no-information baseline,
gene_mean_mse.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

SIZES = {"assay": 64, "tissue": 512, "organism": 8, "disease": 512, "sex": 4, "development_stage": 512}


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f'configs/context.py takes no argument or "smoke", not {arg!r}')
    begin = pathlib.Path(__file__).with_name("quickstart.py" if arg == "smoke" else "scgpt.py")
    config = runpy.run_path(str(begin))["get_config"]()
    tokens = {name: {"kind": "label", "size": size, "dropout": 0.15} for name, size in SIZES.items()}
    tokens["dataset"] = {"kind": "label", "size": 4096, "dropout": 0.5}
    if arg == "smoke":
        tokens = {"dataset": {"kind": "label", "size": 2, "dropout": 0.3}}
        config.model.update(d_model=32, d_ff=64, max_length=65)
        config.data.batch_size = 32
        config.validation.update(batch_size=32, max_batches=4)
        config.optimizer.warmup_steps = 20
        config.train.update(steps=200, log_every=20, eval_every=100, checkpoint_every=100)
        del config.train.probe_every
    config.model.context = tokens
    config.data.labels = tuple(tokens)
    return config
