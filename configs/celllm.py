"""CellLM as published: 52M parameters, 10 Performer layers of width 512 over the expressed genes.

    python experiments/pretrain.py --config=configs/celllm.py --config.data.corpus=CORPUS \\
        --config.data.genes=GENES.tsv --config.tables.gene=VECTORS.npz --workdir=runs/celllm
    python experiments/pretrain.py --config=configs/celllm.py:smoke --workdir=runs/celllm-smoke

Source of the settings: the network from the released model. Of the optimisation of its pretraining
nothing is published: Adam 1e-4 and 128 cells a step are those of its fine-tuning, dropout and temperature
of the contrast those of SimCSE, the number of steps 10 epochs of its two million cells.

Its 19,379 genes are given by ``data.genes``, the vectors of its protein graph (512 wide) by
``tables.gene``; without them ``--config.model.gene_table.kind=random`` learns its own. Where the corpus
says which cells are of a tumour, name the column and the codes of its tumours (positions in the corpus's
list of values):

    --config.data.labels="('dataset','disease')" --config.model.label=disease \\
        --config.model.tumour_codes="(1,)"

Without, the objective that tells them apart is left out. The contrast is between all cells of a batch,
which are encoded in ``parts``, at the memory of one.

``:smoke`` is a minute on two CPU cores, on cells that ship with the package (``make quickstart`` makes the
corpus). On its validation cells masked_ce falls to about 0.51, that of each gene's frequencies
(frequency_ce, which knows nothing of the cell) is 0.84.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f'configs/celllm.py takes no argument or "smoke", not {arg!r}')
    config = ConfigDict()
    config.system = "celllm"
    config.seed = 42
    config.model = ConfigDict(
        {
            "d_model": 512,
            "n_heads": 16,
            "d_head": 64,
            "n_layers": 10,
            "d_ff": 2048,
            "dropout": 0.1,
            "gene_table": {"kind": "frozen"},
            "max_length": 6000,
            "truncate": "top",
            "redraw_every": 1000,
            "mask_fraction": 0.15,
            "replace_fraction": 0.9,
            "label": "",
            "tumour_codes": (),
            "contrast_weight": 1.0,
            "temperature": 0.05,
            "parts": 8,
            "remat": "auto",
            "dtype": "bfloat16",
        }
    )
    config.data = ConfigDict(
        {"corpus": "runs/corpus", "batch_size": 128, "group_lengths": True, "labels": ("dataset",)}
    )
    config.data.genes = placeholder(str)  # None: all genes of the corpus
    config.tables = ConfigDict()
    config.tables.gene = placeholder(str)  # a file of vectors; needed unless gene_table.kind is "random"
    config.validation = ConfigDict({"batch_size": 128, "max_batches": 64})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-4,
            "warmup_steps": 1_000,
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
            "steps": 10 * 2_000_000 // 128,
            "accumulate": 1,
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
        config.model.update(d_model=32, n_heads=2, d_head=16, n_layers=2, d_ff=64, max_length=256)
        config.model.update(temperature=0.2, parts=2, remat="none", dtype="float32")
        config.model.gene_table.kind = "random"
        config.data.update(corpus="runs/pbmc/corpus", genes="runs/pbmc/genes.tsv", batch_size=32)
        config.validation.update(batch_size=32, max_batches=4)
        config.optimizer.update(
            learning_rate=3e-3, warmup_steps=20, schedule="cosine", end_factor=0.02, b2=0.99
        )
        config.train.update(steps=300, log_every=20, eval_every=150, checkpoint_every=150)
    return config
