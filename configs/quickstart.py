"""A small scGPT on two studies of blood cells, minutes on two CPU cores; what ``make quickstart`` trains.

    python experiments/pretrain.py --config=configs/quickstart.py --workdir=runs/quickstart
    python experiments/pretrain.py --config=configs/quickstart.py --workdir=runs/b --config.model.d_model=128

It wants the corpus and the gene list that ``tools/quickstart.sh`` makes first. To start a study of your own,
copy this file, name your corpus and change what you want to ask about.

Where it departs from the published model, and why: 1,500 variable genes and 160 tokens a cell (attention over
every expressed gene would take an hour on a laptop); ties of a count go to the middle of its bins (fewer
epochs to average over random ones); values scaled to 0..1 (Adam need not first learn the number 25); the
objective is "masked", all genes seeing all, where the published one is "generative" (``configs/scgpt.py``).
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f'configs/quickstart.py takes no argument or "smoke", not {arg!r}')
    config = ConfigDict()
    config.system = "scgpt"
    config.seed = 0
    config.model = ConfigDict(
        {
            "d_model": 64,
            "n_heads": 2,
            "n_layers": 2,
            "d_ff": 128,
            "dropout": 0.0,
            "norm": "post",
            "max_length": 161,
            "values": "binned",
            "n_bins": 51,
            "tie": "mid",
            "value_scale": 1 / 50,
            "objective": "masked",
            "mask_fractions": (0.25, 0.5, 0.75),
            "mvc_weight": 1.0,
            "dtype": "float32",
        }
    )
    config.data = ConfigDict(
        {
            "corpus": "runs/pbmc/corpus",
            "genes": "runs/pbmc/genes.tsv",
            "batch_size": 64,
            "group_lengths": True,
        }
    )
    config.validation = ConfigDict({"batch_size": 64})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 2e-3,
            "warmup_steps": 100,
            "schedule": "cosine",
            "end_factor": 0.02,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "b2": 0.99,
        }
    )
    config.train = ConfigDict(
        {
            "steps": 1500,
            "log_every": 20,
            "eval_every": 200,
            "probe_every": 300,
            "checkpoint_every": 300,
            "keep": 2,
            "guard": {"limit": 0.0},
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    if arg == "smoke":
        config.model.update(d_model=16, n_layers=1, d_ff=32, max_length=33)
        config.data.batch_size = 16
        config.validation.update(batch_size=16, max_batches=2)
        config.optimizer.warmup_steps = 5
        config.train.update(steps=30, log_every=5, eval_every=15, probe_every=15, checkpoint_every=10)
    return config
