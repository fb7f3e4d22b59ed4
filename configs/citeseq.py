"""RNA and surface proteins of the same cells (CITE-seq), pretrained together: a small scGPT that reads both.

    scjax corpus build CITE*.h5ad --values protein --out runs/citeseq/corpus
    scjax corpus genes runs/citeseq/corpus --top 2000 --out runs/citeseq/genes.tsv
    python experiments/pretrain.py --config=configs/citeseq.py --workdir=runs/citeseq/run \\
        --config.model.modalities.protein.size=N
    python tools/smoke_data.py citeseq --out runs/citeseq/planted
    python experiments/pretrain.py --config=configs/citeseq.py:smoke --workdir=runs/citeseq/smoke

Each file holds raw RNA counts in X and raw antibody counts, a table with names, in ``obsm["protein"]``; N is
the number of proteins of all studies together, which ``scjax corpus info`` prints. To begin with a pretrained
base give ``--config.start=RUN`` and the fields of its ``model`` under ``config.model.base.model``.
``scjax.models.modalities.predict(cells, scjax.load("runs/citeseq/run"), "protein")`` then foretells the
proteins of cells of which only the RNA is known, and "rna" the other way round.

In each step every cell keeps RNA or proteins, drawn evenly, and loses the other with probability ``dropout``;
of the proteins that stay, ``mask_fraction`` are hidden too. Proteins are negative binomial over a background,
with an inverse dispersion each. Chromatin is a further entry of ``modalities``: ``likelihood`` "bernoulli" or
"poisson", and ``tokens = False`` for panels of thousands of regions.

``:smoke`` is a minute on two CPU cores, on cells of the package with nine proteins that tools/smoke_data.py
draws by their types. protein_mse, the error of hidden proteins, falls below protein_mean_mse, that of each
protein's mean.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f'configs/citeseq.py takes no argument or "smoke", not {arg!r}')
    config = ConfigDict()
    config.system = "scjax.models.modalities:Multimodal"
    config.seed = 0
    config.start = placeholder(str)
    base = {
        "d_model": 64,
        "n_heads": 2,
        "n_layers": 2,
        "d_ff": 128,
        "dropout": 0.1,
        "max_length": 257,
        "tie": "mid",
        "value_scale": 1 / 50,
        "objective": "masked",
    }
    protein = {"size": 9, "likelihood": "negative_binomial", "background": True, "mask_fraction": 0.3}
    config.model = ConfigDict(
        {
            "base": {"system": "scgpt", "model": base},
            "modalities": {"protein": protein},
            "dropout": 0.5,
            "rna_weight": 1.0,
            "objective_weight": 1.0,
        }
    )
    config.data = ConfigDict(
        {
            "corpus": "runs/citeseq/corpus",
            "genes": "runs/citeseq/genes.tsv",
            "batch_size": 64,
            "values": ("protein",),
            "group_lengths": True,
        }
    )
    config.validation = ConfigDict({"batch_size": 64})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "schedule": "cosine",
            "end_factor": 0.02,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
        }
    )
    config.train = ConfigDict({"steps": 2000, "log_every": 20, "eval_every": 200, "checkpoint_every": 500})
    config.mesh = ConfigDict({"data": -1, "fsdp": 0, "tensor": 0})
    if arg == "smoke":
        folder = "runs/citeseq/planted"
        config.model.base.model.update(d_model=32, n_layers=1, d_ff=64, max_length=129, dropout=0.0)
        config.data.update(corpus=f"{folder}/corpus", genes=f"{folder}/genes.tsv", batch_size=32)
        config.validation.update(batch_size=32, max_batches=4)
        config.optimizer.update(learning_rate=5e-3, warmup_steps=20)
        config.train.update(steps=200, log_every=20, eval_every=100, checkpoint_every=100)
    return config
