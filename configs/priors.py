"""A small scGPT whose gene vectors begin with what is known of genes: tables of graphs and texts, mixed.

    scjax genes graph INTERACTIONS.tsv --out runs/priors/graph.npz
    scjax genes text DESCRIPTIONS.tsv --out runs/priors/text.npz
    python experiments/pretrain.py --config=configs/priors.py --config.data.corpus=CORPUS \\
        --workdir=runs/priors/run
    python tools/smoke_data.py priors --out runs/priors/planted
    python experiments/pretrain.py --config=configs/priors.py:smoke --workdir=runs/priors/smoke

Each gene's vector is a weighted mean of its learned one and of the tables that know it, under a learned
linear map each; the weights are learned, too (``gene/weight``), and a gene in no table has its learned vector
alone. A table of a protein language model goes in the same way: another entry of ``gene_table.mix`` with the
width of its vectors, and its file in ``tables``. What a table is worth shows beside the same run with its
edges shuffled (``scjax genes graph --shuffle``); ``benchmarks/adapt/gene_priors.md`` shows it on blood.

``:smoke`` is the quickstart's model for 300 steps on the quickstart's corpus. Its two tables, which
tools/smoke_data.py makes, are of one graph of co-expression: eigenvectors, and a masked graph autoencoder.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f'configs/priors.py takes no argument or "smoke", not {arg!r}')
    config = ConfigDict()
    config.system = "scgpt"
    config.seed = 0
    config.model = ConfigDict(
        {
            "d_model": 256,
            "n_heads": 8,
            "n_layers": 6,
            "d_ff": 512,
            "dropout": 0.1,
            "norm": "pre",
            "max_length": 801,
            "values": "binned",
            "n_bins": 51,
            "value_scale": 1 / 50,
            "objective": "masked",
            "mask_fractions": (0.25, 0.5, 0.75),
            "mvc_weight": 1.0,
            "dtype": "bfloat16",
            "gene_table": {
                "kind": "mixed",
                "mix": {"graph": {"kind": "projected", "dim": 64}, "text": {"kind": "projected", "dim": 384}},
            },
        }
    )
    config.tables = ConfigDict({"graph": "runs/priors/graph.npz", "text": "runs/priors/text.npz"})
    config.data = ConfigDict({"corpus": "runs/corpus", "batch_size": 256, "group_lengths": True})
    config.validation = ConfigDict({"batch_size": 256, "max_batches": 64})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 3e-4,
            "warmup_steps": 2_000,
            "schedule": "cosine",
            "end_factor": 0.02,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
        }
    )
    config.train = ConfigDict(
        {
            "steps": 100_000,
            "accumulate": 0,
            "log_every": 100,
            "eval_every": 2_000,
            "checkpoint_every": 2_000,
            "guard": {"limit": 10.0},
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 0, "tensor": 0})
    if arg == "smoke":
        config.model.update(d_model=64, n_heads=2, n_layers=2, d_ff=128, max_length=97, dropout=0.0)
        config.model.update(tie="mid", dtype="float32")
        part = {"kind": "projected", "dim": 32}
        config.model.gene_table.mix = ConfigDict({"spectral": part, "masked": part})
        config.tables = ConfigDict(
            {name: f"runs/priors/planted/{name}.npz" for name in ("spectral", "masked")}
        )
        config.data.update(corpus="runs/pbmc/corpus", genes="runs/pbmc/genes.tsv", batch_size=64)
        config.validation.update(batch_size=64, max_batches=2)
        config.optimizer.update(learning_rate=2e-3, warmup_steps=30, b2=0.99)
        config.train.update(steps=300, accumulate=1, log_every=20, eval_every=100, checkpoint_every=100)
    return config
