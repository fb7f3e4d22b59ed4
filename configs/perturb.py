"""A model of perturbations: control cells in, perturbed cells out, around any base.

    python experiments/perturb.py --config=configs/perturb.py --config.data.corpus=CELLS.h5ad \\
        --config.start=runs/scgpt --workdir=runs/perturb
    python experiments/perturb.py --config=configs/perturb.py:generator --config.data.corpus=CELLS.h5ad \\
        --workdir=runs/generator
    python experiments/perturb.py --config=configs/perturb.py:smoke --workdir=runs/perturb-smoke

CELLS.h5ad holds raw counts, ``obs["perturbation"]`` with names such as "A", "A+B" and "control", and, where
effects are within cell lines, types or donors, a column named by ``told.context``. A quarter of the
perturbations is held out, predicted and scored, or what ``told.split``, a column of True and False, marks
False. ``told.tokens`` and ``told.shift`` say how the base and the decoder are told of a condition: by
perturbed genes ("targets", measured or not), by a table ("features": fingerprints, vectors of genes), "dose",
or a learned vector ("perturbation", or a column of obs such as the cell line), which what is held out must
then share with training.

The default is trained on populations: the squared error of the mean of a set of 32 cells, and a tenth of the
energy distance between predicted and real sets. ":generator" is scGPT's recipe instead: all genes of the
panel as tokens, log values that are not binned, factor and term from each gene's own state, squared error
against a random cell of the condition, Adam 1e-4 that falls by a tenth each epoch (here: a cosine). Upstream
marks the token of the perturbed gene; here it is a token of its own, so that it need not be measured.

``:smoke`` is a minute on two CPU cores, on a simulated experiment of 16 unmeasured genes perturbed alone and
in 24 pairs in two cell lines, where a quarter of the pairs is held out: about 0.95 of the Pearson correlation
of effects, where the mean of training perturbations has 0.6 and the sum of the two single effects 0.9.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke", "generator"):
        raise ValueError(f'configs/perturb.py takes no argument, "generator" or "smoke", not {arg!r}')
    config = ConfigDict()
    config.system = "scjax.models.perturbation:Perturbation"
    config.seed = 0
    config.start = placeholder(str)  # the run, or imported model, that is the base; None: from scratch
    config.random_start = False
    transformer = {"d_model": 256, "n_heads": 4, "n_layers": 4, "d_ff": 512, "dropout": 0.0}
    generator = arg == "generator"
    config.model = ConfigDict(
        {
            "base": {
                "system": "scgpt",
                "model": {**transformer, "max_length": 1537, "values": "log1p", "objective": "masked"},
            },
            "decoder": "generator" if generator else "affine",
            "frozen": False,
            "population": not generator,
            "mean_weight": 0.0 if generator else 1.0,
            "energy_weight": 0.0 if generator else 0.1,
            "mmd_weight": 0.0,
            "cells_weight": 1.0 if generator else 0.0,
        }
    )
    if generator:
        config.model.base.model.zeros = True
    config.told = ConfigDict(
        {
            "perturbation": "perturbation",
            "control": "control",
            "kind": "genetic",
            "unseen": "perturbation",
            "fraction": 0.25,
            "validation": 0.1,
            "tokens": ("targets",),
            "shift": () if generator else ("targets",),
            "targets": 2,
            "set_size": 32,
            "max_cells": 256,
        }
    )
    config.told.update(context=placeholder(str), dose=placeholder(str))
    config.told.update(split=placeholder(str), features=placeholder(str))
    config.data = ConfigDict({"corpus": "cells.h5ad", "batch_size": 64 if generator else 256})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-4 if generator else 3e-4,
            "warmup_steps": 100,
            "schedule": "cosine",
            "end_factor": 0.2 if generator else 0.02,
            "weight_decay": 0.0 if generator else 0.01,
            "clip_norm": 1.0,
        }
    )
    config.train = ConfigDict({"steps": 5_000, "log_every": 50, "eval_every": 250, "checkpoint_every": 500})
    config.train.update(keep=2, guard={"limit": 10.0})
    config.mesh = ConfigDict({"data": -1, "fsdp": 0, "tensor": 0})
    if arg == "smoke":
        config.model.base.model.update(d_model=32, n_heads=2, n_layers=1, d_ff=32, max_length=65)
        config.told.update(context="cell_line", unseen="combination", validation=0.05, set_size=16)
        config.told.max_cells = 64
        config.data.update(corpus="simulated", batch_size=64)
        config.optimizer.update(learning_rate=3e-3, warmup_steps=20)
        config.train.update(steps=400, log_every=20, eval_every=100, checkpoint_every=100)
        config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config
