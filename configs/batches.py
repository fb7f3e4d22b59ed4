"""Batch correction by training: a small scGPT on several studies that is not to tell them apart.

    python experiments/pretrain.py --config=configs/batches.py:token+dab+norm --config.data.corpus=CORPUS \\
        --config.data.genes=GENES --workdir=runs/corrected
    python experiments/pretrain.py --config=configs/batches.py:smoke --workdir=runs/batches-smoke

The argument names what is done, any of these joined by "+", or "none", which is the uncorrected control:

  token  each cell's batch stands in its input (scjax.nn.context), so that its embedding need not hold it
  dab    a network that tells the batch off the embedding, whose gradient is reversed (Ganin and Lempitsky,
         ICML 2015), as an adversarial task of scjax.finetune, which takes any system as its base
  norm   the embedded tokens are normalised by the statistics of each cell's own batch (Chang et al., CVPR
         2019): in upstream's scGPT by that of the first cell of the mini-batch, here row by row

The batch is the label ``dataset``, which a corpus has of itself, with ``N_BATCHES`` categories: another label
or number is to be changed in all places below. Embeddings by ``scjax.embed(adata, run)`` need the column
``dataset`` in ``adata.obs`` for "token" and "norm". What it gave on four studies of blood: benchmarks/adapt/
batches.md. ``:smoke`` does all three to the two studies that ship, for 40 steps on two CPU cores.
"""

from ml_collections import ConfigDict

LABEL, N_BATCHES = "dataset", 4
WAYS = {"none", "token", "dab", "norm"}


def get_config(arg: str = "token+dab+norm") -> ConfigDict:
    smoke = arg == "smoke"
    ways = {"token", "dab", "norm"} if smoke else set(arg.split("+"))
    if not ways <= WAYS or (len(ways) > 1 and "none" in ways):
        raise ValueError(
            f'configs/batches.py takes "smoke", "none", or "token", "dab", "norm" joined by "+", not {arg!r}'
        )
    n_batches = 2 if smoke else N_BATCHES
    config = ConfigDict()
    config.seed = 0
    model = {
        "d_model": 64,
        "n_heads": 2,
        "n_layers": 2,
        "d_ff": 128,
        "dropout": 0.0,
        "max_length": 129,
        "tie": "mid",
        "value_scale": 1 / 50,
        "objective": "masked",
        "mask_fractions": (0.25, 0.5, 0.75),
    }
    if "token" in ways:
        model["context"] = {LABEL: {"kind": "label", "size": n_batches, "dropout": 0.1}}
    if "norm" in ways:
        model |= {"batch_norm": "domain", "n_batches": n_batches, "batch_label": LABEL}
    if "dab" in ways:
        config.system = "scjax.finetune.model:Finetuned"
        task = {"kind": "classes", "size": n_batches, "hidden": (64,), "reverse": 1.0, "weight": 0.05}
        config.model = ConfigDict(
            {
                "base": {"system": "scgpt", "model": model},
                "train": "all",
                "objective_weight": 1.0,
                "tasks": {LABEL: task},
            }
        )
    else:
        config.system = "scgpt"
        config.model = ConfigDict(model)
    config.data = ConfigDict(
        {
            "corpus": "runs/corpus",
            "genes": "runs/genes.tsv",
            "batch_size": 64,
            "n_buckets": 1,
            "labels": (LABEL,),
        }
    )
    config.validation = ConfigDict({"batch_size": 64})
    config.optimizer = ConfigDict(
        {"learning_rate": 2e-3, "warmup_steps": 50, "schedule": "cosine", "clip_norm": 1.0, "b2": 0.99}
    )
    config.train = ConfigDict(
        {"steps": 2000, "log_every": 20, "eval_every": 500, "checkpoint_every": 500, "keep": 1}
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    if smoke:
        config.data.update(corpus="runs/pbmc/corpus", genes="runs/pbmc/genes.tsv", batch_size=16)
        base = config.model.base.model
        base.update(d_model=16, n_layers=1, d_ff=32, max_length=33)
        config.validation.update(batch_size=16, max_batches=2)
        config.optimizer.warmup_steps = 5
        config.train.update(steps=40, log_every=10, eval_every=20, checkpoint_every=20)
    return config
