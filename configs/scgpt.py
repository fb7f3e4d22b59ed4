"""scGPT as published: 51M parameters, 12 layers of width 512, 1,200 tokens a cell.

    python experiments/pretrain.py --config=configs/scgpt.py --config.data.corpus=CORPUS --workdir=runs/scgpt
    python experiments/pretrain.py --config=configs/scgpt.py:smoke --workdir=runs/scgpt-smoke

Source of the settings: args.json of the released whole-human checkpoint (16 GPUs x 32 cells, 6 epochs
of 33 million cells, Adam 1e-4, 10,000 steps of warm-up, cosine to 0, clip 1.0; bfloat16 here, float16 there).
The objective is the one those weights were trained with: known genes to unknown ones, gene prompts from the
cell embedding, and after 1,000 steps the second pass that starts from it.

``:smoke`` is about a minute on two CPU cores, on cells that ship with the package (``tools/quickstart.sh``
makes the corpus and the list of 1,500 variable genes): a small network, values scaled to 0..1, ties in the
middle of their bins, half of the genes unknown, the second pass from step 300. On the validation cells
masked_mse ends at 0.0222, below the 0.0238 of the no-information baseline, gene_mean_mse.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f'configs/scgpt.py takes no argument or "smoke", not {arg!r}')
    config = ConfigDict()
    config.system = "scgpt"
    config.seed = 42
    config.model = ConfigDict(
        {
            "d_model": 512,
            "n_heads": 8,
            "n_layers": 12,
            "d_ff": 512,
            "dropout": 0.2,
            "norm": "post",
            "max_length": 1200,
            "values": "binned",
            "n_bins": 51,
            "tie": "random",
            "value_scale": 1.0,
            "objective": "generative",
            "mask_fractions": (0.25, 0.5, 0.75),
            "second_pass_after": 1000,
            "mvc_weight": 1.0,
            "attention": "auto",
            "remat": "auto",
            "dtype": "bfloat16",
        }
    )
    config.data = ConfigDict({"corpus": "runs/corpus", "batch_size": 512, "group_lengths": True})
    config.data.genes = placeholder(str)  # None: all genes of the corpus
    config.validation = ConfigDict({"batch_size": 512, "max_batches": 64})
    steps = 6 * 33_000_000 // 512
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-4,
            "warmup_steps": 10_000,
            "schedule": "cosine",
            "end_factor": 0.0,
            "weight_decay": 0.0,
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
        config.model.update(
            d_model=64,
            n_heads=2,
            n_layers=2,
            d_ff=128,
            dropout=0.0,
            max_length=97,
            tie="mid",
            value_scale=1 / 50,
            mask_fractions=(0.5,),
            second_pass_after=300,
            remat="none",
            dtype="float32",
        )
        config.data.update(corpus="runs/pbmc/corpus", genes="runs/pbmc/genes.tsv", batch_size=64)
        config.validation.update(batch_size=64, max_batches=2)
        config.optimizer.update(learning_rate=3e-3, warmup_steps=30, b2=0.99)
        config.train.update(steps=400, accumulate=1, log_every=20, eval_every=100, checkpoint_every=200)
    return config
