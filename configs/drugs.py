"""Drug response: a head on the profile of a sample and on a drug, over any trained base.

    python tools/drug_corpus.py PROFILES.h5ad PAIRS.csv --sample-key line --fingerprints DRUGS.csv \\
        --out runs/drugs/corpus
    python experiments/finetune.py --config=configs/drugs.py --config.start=runs/scgpt \\
        --config.model.drug.fingerprint.size=BITS --workdir=runs/drugs/run
    python tools/drug_corpus.py --out runs/drugs/planted
    python experiments/finetune.py --config=configs/drugs.py:smoke --workdir=runs/drugs/smoke

The tool pairs profiles with a table of responses; whole samples are validation pairs (``--unseen drug``:
drugs). The base is frozen; ``--config.model.train=lora`` or ``all`` trains it, too. The argument "named"
tells a drug by a learned vector in place of a fingerprint. For sensitive or resistant: task kind "classes",
and "response" among ``data.labels`` in place of the values. Most of a table of responses is which drug it is:
``scjax.finetune.drugs.baselines`` says how much, and benchmarks/adapt/drug_response.md what came of it here.

``:smoke`` is about a minute on two CPU cores: planted responses of sums of shipped cells, on the quickstart's
model (``make quickstart`` makes it).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke", "named"):
        raise ValueError(f'configs/drugs.py takes no argument, "named" or "smoke", not {arg!r}')
    config = ConfigDict()
    config.system = "scjax.finetune.drugs:DrugResponse"
    config.seed = 0
    config.start = placeholder(str)  # the base
    drug = {"fingerprint": {"kind": "value", "size": 1024}}
    if arg == "named":
        drug = {"drug": {"kind": "label", "size": 256}}  # as many drugs as the corpus has, or more
    config.model = ConfigDict(
        {
            "train": "head",
            "tasks": {"response": {"kind": "regression", "hidden": (64,)}},
            "drug": drug,
            "width": 32,
            "lora": {"rank": 8, "alpha": 16.0, "kernels": ("*blocks/*",)},
        }
    )
    config.patience = 5
    config.data = ConfigDict(
        {
            "corpus": "runs/drugs/corpus",
            "batch_size": 128,
            "labels": ("drug",),
            "values": ("response",) if arg == "named" else ("response", "fingerprint"),
        }
    )
    config.validation = ConfigDict({"batch_size": 128})
    config.optimizer = ConfigDict(
        {"learning_rate": 2e-3, "warmup_steps": 50, "schedule": "cosine", "weight_decay": 0.1}
    )
    config.train = ConfigDict({"steps": 2000, "log_every": 50, "eval_every": 100, "checkpoint_every": 500})
    if arg == "smoke":
        config.start = "runs/quickstart"
        config.model.drug.fingerprint.size = 16
        config.data.update(corpus="runs/drugs/planted", batch_size=32, max_genes=64)
        config.validation.batch_size = 32
        config.optimizer.update(learning_rate=1e-2, warmup_steps=5)
        config.train.update(steps=60, log_every=10, eval_every=30, checkpoint_every=30)
    return config
