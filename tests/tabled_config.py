"""A run of the model that takes tables; the tests give it a corpus and the tables."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from tiny_config import get_config as tiny


def get_config() -> ConfigDict:
    config = tiny()
    config.system = "tabled_model:Tabled"
    config.tables = ConfigDict({"gene": placeholder(str), "median": "corpus"})
    return config
