"""Geneformer as published, three sizes: "v1-10m" (the default), "v2-104m" and "v2-316m".

    python experiments/pretrain.py --config=configs/geneformer.py --config.data.corpus=CORPUS \\
        --workdir=runs/v1
    python experiments/pretrain.py --config=configs/geneformer.py:v2-104m --config.data.corpus=CORPUS \\
        --workdir=runs/v2
    python experiments/pretrain.py --config=configs/geneformer.py:smoke --workdir=runs/geneformer-smoke

Source of the settings. V1: Theodoris et al., Nature 2023, and the pretraining script of its repository: 27.4
million cells, 3 epochs, 12 GPUs x 12 cells, AdamW 1e-3, 10,000 steps of warm-up, linear to 0, weight decay
0.001. V2-104M: the name of its published run says 3 epochs, 18 cells a device, AdamW 2e-4, cosine, a warm-up
of 0.7 % of the steps; 104 million cells. Its weight decay and number of devices (here 0.001 and 64) are not
published, nor is the optimisation of V2-316M, here that of V2-104M. Gradients are clipped at 1.0, the default
of the library that was used.

Counts are divided by each gene's median in the corpus, which is computed once and kept beside it;
``--config.tables.median=FILE`` takes other medians.

``:smoke`` is a minute on two CPU cores, on cells that ship with the package (``make quickstart`` or ``scjax
corpus build`` makes the corpus). On its validation cells masked_ce falls to about 5.95, that of the genes'
frequencies (frequency_ce, which knows nothing of the cell) is 6.43.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

SIZES = {
    "v1-10m": {"d_model": 256, "n_heads": 4, "n_layers": 6, "d_ff": 512},
    "v2-104m": {"d_model": 768, "n_heads": 12, "n_layers": 12, "d_ff": 3072},
    "v2-316m": {"d_model": 1152, "n_heads": 18, "n_layers": 18, "d_ff": 4608},
}


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke", *SIZES):
        names = ", ".join(repr(name) for name in (*SIZES, "smoke"))
        raise ValueError(f"configs/geneformer.py takes no argument or one of {names}, not {arg!r}")
    size = "v1-10m" if arg in ("", "smoke") else arg
    v2 = size.startswith("v2")
    config = ConfigDict()
    config.system = "geneformer"
    config.seed = 42
    config.model = ConfigDict(
        {
            **SIZES[size],
            "dropout": 0.1 if v2 else 0.02,
            "max_length": 4096 if v2 else 2048,
            "specials": v2,
            "mask_fraction": 0.15,
            "attention": "auto",
            "remat": "auto",
            "dtype": "bfloat16",
        }
    )
    batch = 64 * 18 if v2 else 12 * 12
    cells = 104_000_000 if v2 else 27_406_208
    steps = 3 * cells // batch
    config.data = ConfigDict({"corpus": "runs/corpus", "batch_size": batch, "group_lengths": True})
    config.data.genes = placeholder(str)  # None: all genes of the corpus
    config.tables = ConfigDict({"median": "corpus"})
    config.validation = ConfigDict({"batch_size": batch, "max_batches": 64})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 2e-4 if v2 else 1e-3,
            "warmup_steps": round(0.007 * steps) if v2 else 10_000,
            "schedule": "cosine" if v2 else "linear",
            "end_factor": 0.0,
            "weight_decay": 0.001,
            "clip_norm": 1.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
        }
    )
    config.train = ConfigDict(
        {
            "steps": steps,
            "accumulate": 0,  # as many micro-batches as the devices need
            "log_every": 100,
            "eval_every": 5_000,
            "checkpoint_every": 5_000,
            "keep": 3,
            "guard": {"limit": 10.0},  # of steps that are not finite and therefore skipped
        }
    )
    config.train.update(keep_every=placeholder(int), wandb=placeholder(str))
    config.mesh = ConfigDict({"data": -1, "fsdp": 0, "tensor": 0})  # 0: as the hardware table says
    if arg == "smoke":
        config.model.update(d_model=64, n_heads=2, n_layers=2, d_ff=128, max_length=128)
        config.model.update(dropout=0.0, remat="none", dtype="float32")
        config.data.update(corpus="runs/pbmc/corpus", genes="runs/pbmc/genes.tsv", batch_size=32)
        config.validation.update(batch_size=64, max_batches=4)
        config.optimizer.update(learning_rate=3e-3, warmup_steps=30, schedule="cosine", b2=0.99)
        config.train.update(steps=400, accumulate=1, log_every=20, eval_every=100, checkpoint_every=200)
    return config
