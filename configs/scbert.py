"""scBERT as published: 8M parameters, 6 Performer layers of width 200 over every gene, gene2vec frozen.

    python experiments/pretrain.py --config=configs/scbert.py --config.data.corpus=CORPUS \\
        --config.data.genes=GENES.tsv --config.tables.gene=GENE2VEC.txt --workdir=runs/scbert
    python experiments/pretrain.py --config=configs/scbert.py:smoke --workdir=runs/scbert-smoke

Source of the settings: Yang et al., Nature Machine Intelligence 2022, and the pretraining script of its
repository: Adam 1e-4, 3 cells a GPU x 60 accumulated, 100 epochs of 95 % of 1,126,580 cells, gradients
clipped at 100; the rate falls to 1e-6 and rises again in cycles of 15, 25, 45, ... epochs, 5 of them
rising, each cycle to 0.9 of the highest rate of the one before. The number of GPUs, 32, is what its
authors answered when asked. Its 16,906 genes are given by ``data.genes``, the vectors of gene2vec (200
wide) by ``tables.gene``; without them ``--config.model.gene_table.kind=random`` learns its own.

``:smoke`` is a minute on two CPU cores, on cells that ship with the package (``make quickstart`` makes the
corpus). On its validation cells masked_ce falls to about 0.47, that of each gene's frequencies
(frequency_ce, which knows nothing of the cell) is 0.85.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f'configs/scbert.py takes no argument or "smoke", not {arg!r}')
    config = ConfigDict()
    config.system = "scbert"
    config.seed = 2021
    config.model = ConfigDict(
        {
            "d_model": 200,
            "n_heads": 10,
            "d_head": 64,
            "n_layers": 6,
            "d_ff": 800,
            "dropout": 0.0,
            "gene_table": {"kind": "frozen"},
            "redraw_every": 17,  # steps; upstream counts its 60 micro-batches a step: 1,000
            "mask_fraction": 0.15,
            "replace_fraction": 0.9,
            "pool": "mean",
            "remat": "auto",
            "dtype": "bfloat16",
        }
    )
    gpus, accumulate = 32, 60
    batch = 3 * gpus * accumulate
    epoch = round(0.95 * 1_126_580 / batch)
    config.data = ConfigDict({"corpus": "runs/corpus", "batch_size": batch})
    config.data.genes = placeholder(str)  # None: all genes of the corpus
    config.tables = ConfigDict()
    config.tables.gene = placeholder(str)  # a file of vectors; needed unless gene_table.kind is "random"
    config.validation = ConfigDict({"batch_size": 3 * gpus, "max_batches": 64})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-4,
            "warmup_steps": 5 * epoch,
            "schedule": "cosine_restarts",
            "cycle_steps": 15 * epoch,
            "cycle_growth": 2.0,
            "cycle_decay": 0.9,
            "end_factor": 0.01,
            "weight_decay": 0.0,
            "clip_norm": 100.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
        }
    )
    config.train = ConfigDict(
        {
            "steps": 100 * epoch,
            "accumulate": 0,  # as many micro-batches as the devices need
            "log_every": 10,
            "eval_every": epoch,
            "checkpoint_every": epoch,
            "keep": 3,
            "guard": {"limit": 10.0},  # of steps that are not finite and therefore skipped
        }
    )
    config.train.update(keep_every=placeholder(int), wandb=placeholder(str))
    config.mesh = ConfigDict({"data": -1, "fsdp": 0, "tensor": 0})  # 0: as the hardware table says
    if arg == "smoke":
        config.model.update(d_model=32, n_heads=2, d_head=16, n_layers=2, d_ff=64)
        config.model.update(redraw_every=1000, remat="none", dtype="float32")
        config.model.gene_table.kind = "random"
        config.data.update(corpus="runs/pbmc/corpus", genes="runs/pbmc/genes.tsv", batch_size=16, n_buckets=1)
        config.validation.update(batch_size=32, max_batches=4)
        config.optimizer.update(learning_rate=3e-3, warmup_steps=20, cycle_steps=100, end_factor=0.02)
        config.optimizer.update(clip_norm=1.0, b2=0.99)
        config.train.update(steps=280, accumulate=1, log_every=20, eval_every=140, checkpoint_every=140)
    return config
