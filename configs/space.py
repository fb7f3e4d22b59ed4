"""Pretraining that knows where cells lie: scGPT with a token for the place and one for each neighbour.

    python tools/space_corpus.py SECTIONS.h5ad --section-key section --out runs/space/corpus
    python experiments/pretrain.py --config=configs/space.py --workdir=runs/space/run
    python tools/space_corpus.py --out runs/space/planted
    python experiments/pretrain.py --config=configs/space.py:smoke --workdir=runs/space/smoke

The tool makes the values that are read here (``data.values``): principal components of the 8 nearest cells,
which do not hang on how a section lies, and coordinates about its centre, which do: leave them out
(``--config.model.context.coordinates.dropout=1.0``, or a copy of this file) where sections do not lie alike.
Each is absent from a tenth of the cells in training, so that ``scjax.embed`` also takes cells without.
benchmarks/adapt/space.md says what they were worth.

``:smoke`` is half a minute on two CPU cores, on a planted field: of 24 genes one follows the place and the
others nothing. Half of the values are hidden; on the validation section masked_mse ends 7 % below
gene_mean_mse, the share of that gene, which nothing but the place (and neighbours) can tell.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f'configs/space.py takes no argument or "smoke", not {arg!r}')
    config = ConfigDict()
    config.system = "scgpt"
    config.seed = 0
    config.model = ConfigDict(
        {
            "d_model": 256,
            "n_heads": 4,
            "n_layers": 6,
            "d_ff": 512,
            "dropout": 0.1,
            "norm": "pre",
            "max_length": 513,
            "values": "log1p",
            "value_scale": 0.2,
            "objective": "masked",
            "mask_fractions": (0.25, 0.5, 0.75),
            "dtype": "bfloat16",
            "context": {
                "coordinates": {"kind": "coordinates", "size": 2, "scale": 0.2, "dropout": 0.1},
                "neighbours": {"kind": "neighbours", "size": 8, "width": 8, "dropout": 0.1},
            },
        }
    )
    config.data = ConfigDict(
        {
            "corpus": "runs/space/corpus",
            "batch_size": 128,
            "labels": (),
            "values": ("coordinates", "neighbours"),
        }
    )
    config.validation = ConfigDict({"batch_size": 128})
    config.optimizer = ConfigDict(
        {"learning_rate": 5e-4, "warmup_steps": 200, "schedule": "cosine", "end_factor": 0.02, "b2": 0.99}
    )
    config.train = ConfigDict({"steps": 10_000, "log_every": 50, "eval_every": 500, "checkpoint_every": 1000})
    if arg == "smoke":
        config.model.update(
            d_model=32,
            n_heads=2,
            n_layers=1,
            d_ff=64,
            dropout=0.0,
            max_length=25,
            zeros=True,
            dtype="float32",
        )
        config.model.mask_fractions = (0.5,)
        config.data.update(corpus="runs/space/planted", batch_size=64)
        config.validation.batch_size = 64
        config.optimizer.update(learning_rate=5e-3, warmup_steps=10)
        config.train.update(steps=200, log_every=20, eval_every=100, checkpoint_every=100)
    return config
