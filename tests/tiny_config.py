"""A run of the tiny model; the tests give it a corpus."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.system = "tiny_model:Tiny"
    config.seed = 0
    config.model = ConfigDict({"dropout": 0.1, "explode_at": -1})
    config.data = ConfigDict({"corpus": "", "batch_size": 16, "window": 8, "group_lengths": True})
    config.validation = ConfigDict({"batch_size": 16, "max_batches": 2})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-2,
            "warmup_steps": 3,
            "schedule": "constant",
            "weight_decay": 0.01,
        }
    )
    config.train = ConfigDict(
        {
            "steps": 16,
            "accumulate": 1,
            "log_every": 1,
            "eval_every": 8,
            "checkpoint_every": 6,
            "keep": 3,
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config
