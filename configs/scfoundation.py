"""scFoundation, the published 100M model.

    python experiments/pretrain.py --config=configs/scfoundation.py --config.data.corpus=CORPUS \
        --workdir=runs/scfoundation
    python experiments/pretrain.py --config=configs/scfoundation.py:smoke --workdir=runs/scfoundation-smoke

Source of the settings: the configuration stored in the released checkpoint and the list of training
hyper-parameters in the code release (64 GPUs, batches of 128 cells, 8 accumulated: 1,024 cells a step; AdamW
1e-4, no weight decay, clip 1.0, bf16, 9,766 steps of warm-up; the checkpoint is of step 36,000). What follows
the warm-up is not told: here the learning rate stays. The published gene list has 19,264 symbols; give one
as ``data.genes``.

``:smoke`` is a minute on two CPU cores, on cells that ship with the package (``make quickstart`` or
``scjax corpus build`` makes the corpus) and the 1,500 variable genes of ``runs/pbmc/genes.tsv``. On the
validation cells masked_mse ends at 1.76, that of the gene means (gene_mean_mse) at 1.83.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f'configs/scfoundation.py takes no argument or "smoke", not {arg!r}')
    config = ConfigDict()
    config.system = "scfoundation"
    config.seed = 42
    config.model = ConfigDict(
        {
            "d_model": 768,
            "n_heads": 12,
            "n_layers": 12,
            "d_ff": 3072,
            "dropout": 0.1,
            "encoder_length": 15_000,
            "decoder_d_model": 512,
            "decoder_n_heads": 8,
            "decoder_d_head": 64,
            "decoder_n_layers": 6,
            "decoder_d_ff": 2048,
            "stabiliser": "head",
            "redraw_every": 125,  # steps; upstream counts its 8 micro-batches a step: 1,000
            "n_bins": 100,
            "mask_fraction": 0.3,
            "zero_mask_fraction": 0.03,
            "replace_fraction": 0.8,
            "random_fraction": 0.1,
            "thinning": 0.5,
            "thinning_beta": (2.0, 2.0),
            "thinning_min_depth": 1000.0,
            "target": "same",
            "pool": "all",
            "attention": "auto",
            "decoding": "auto",
            "remat": "auto",
            "dtype": "bfloat16",
        }
    )
    config.data = ConfigDict({"corpus": "runs/corpus", "batch_size": 1024, "group_lengths": True})
    config.data.genes = placeholder(str)  # None: all genes of the corpus
    config.validation = ConfigDict({"batch_size": 128, "max_batches": 64})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-4,
            "warmup_steps": 9_766,
            "schedule": "constant",
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
        }
    )
    config.train = ConfigDict(
        {
            "steps": 36_000,
            "accumulate": 0,  # as many micro-batches as the devices need
            "log_every": 100,
            "eval_every": 1_000,
            "checkpoint_every": 1_000,
            "keep": 3,
            "guard": {"limit": 10.0},  # of steps that are not finite and therefore skipped
        }
    )
    config.train.update(keep_every=placeholder(int), wandb=placeholder(str))
    config.mesh = ConfigDict({"data": -1, "fsdp": 0, "tensor": 0})  # 0: as the hardware table says
    if arg == "smoke":
        config.model.update(
            d_model=32,
            n_heads=2,
            n_layers=2,
            d_ff=64,
            dropout=0.0,
            decoder_d_model=32,
            decoder_n_heads=2,
            decoder_d_head=16,
            decoder_n_layers=1,
            decoder_d_ff=64,
            redraw_every=1000,
            remat="none",
            dtype="float32",
        )
        config.data.update(corpus="runs/pbmc/corpus", batch_size=16, genes="runs/pbmc/genes.tsv", n_buckets=1)
        config.validation.update(batch_size=32, max_batches=4)
        config.optimizer.update(learning_rate=1e-2, warmup_steps=10, schedule="cosine")
        config.train.update(steps=250, accumulate=1, log_every=25, eval_every=125, checkpoint_every=125)
    return config
